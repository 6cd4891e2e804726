"""Result files, on disks and object stores, written so that a reader never sees half a file.

A folder on an object store (`gs://BUCKET/…`) is an `etils.epath.Path`. It has the methods of `pathlib.Path` except
`absolute`, `resolve` and `rglob`; and nothing there can be appended to, renamed, locked, or run out of space. What
needs one of these goes through a function of this module. Of a job of many processes only the first one writes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdiff.errors import UserError


def locate(text: str | Path) -> Path:
    """A path from its text: `gs://BUCKET/…` on an object store, anything else on a disk.

    Raises:
      UserError: another scheme, no bucket, or the package that reaches the store is not installed.
    """
    if not isinstance(text, str):
        return text
    if "://" not in text:
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme != "gs":
        raise UserError(
            f"{text}: {scheme}:// is no place for checkpoints; give a folder or gs://BUCKET/FOLDER, or mount the "
            "bucket and give the mounted folder"
        )
    if not rest.strip("/"):
        raise UserError(f"{text}: has no bucket; give gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: the package gcsfs is not installed; pip install 'mdiff[gcs]'")
    import fsspec
    from etils import epath

    # Or this process would not see what another one wrote meanwhile: the lock, for one.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return epath.Path(text)


def is_local(path: Path) -> bool:
    """Is `path` on a disk?"""
    return isinstance(path, Path)


def absolute(path: Path) -> Path:
    """`path` from the root; one on an object store always is."""
    return path.absolute() if is_local(path) else path


def below(folder: Path) -> Iterator[Path]:
    """All files below `folder`."""
    if is_local(folder):
        yield from (path for path in folder.rglob("*") if path.is_file())
    else:  # in one request, where iterdir and is_dir make one for each file
        import fsspec

        yield from (locate(f"gs://{name}") for name in fsspec.filesystem("gs").find(str(folder)))


def modified(path: Path) -> float:
    """When a file was last written, in seconds since 1970 by the clock of where it is.

    Raises:
      FileNotFoundError: it is not there.
    """
    found = path.stat()
    return found.st_mtime if is_local(path) else float(found.mtime)  # type: ignore[attr-defined]


def remove(folder: Path) -> None:
    """Delete a folder with all that is in it."""
    if is_local(folder):
        shutil.rmtree(folder)
    else:
        folder.rmtree()  # type: ignore[attr-defined]


def free_bytes(folder: Path) -> float:
    """Room left where `folder` is; object stores have no end."""
    return shutil.disk_usage(folder).free if is_local(folder) else math.inf


def is_writer() -> bool:
    """Is this the process of its job that writes files? Outside a job it is."""
    if "jax" not in sys.modules:  # no job was joined; commands that need no JAX do not wait for its import
        return True
    from mdiff import processes

    return processes.is_first()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file on this machine's disk, then put it in place; parents are made.

    Only the first process of a job does so; on the others this does nothing, and `write` is not called.

    The temporary name keeps the suffix, since some writers (numpy) would append one.
    """
    if not is_writer():
        return
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="mdiff-") as scratch:
            temporary = Path(scratch) / path.name
            write(temporary)
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def upload(local: Path, remote: Path) -> None:
    """Copy a file on disk to an object store, where it appears when it is whole."""
    from etils import epath

    epath.Path(local).copy(remote, overwrite=True)


def write_text(path: Path, text: str) -> None:
    """Write `text`, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def strict(tree: Any) -> Any:
    """`tree` with every NaN and infinity as None, so that any JSON reader takes it."""
    if isinstance(tree, Mapping):
        return {str(name): strict(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [strict(value) for value in tree]
    if isinstance(tree, float | np.floating):
        return float(tree) if math.isfinite(tree) else None
    return int(tree) if isinstance(tree, np.integer) else tree


def write_json(path: Path, tree: Any) -> None:
    """Write strict JSON (NaN and infinities are errors), atomically."""
    write_text(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")


def check_writable(folder: Path, field: str) -> Path:
    """Can files be made in `folder`, or in the nearest parent that exists? Leaves nothing behind.

    Only the first process of a job tries.

    Returns:
      The folder that was tried.

    Raises:
      UserError: it is a file, or cannot be written; `field` names it.
    """
    if not is_writer():
        return folder
    if not is_local(folder):
        return _check_store(folder, field)
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{field} {folder}: {existing} is a file; choose a folder")
    probe = existing / f".mdiff-{os.getpid()}.probe"
    try:
        probe.write_bytes(b"\0" * 4096)
    except OSError as error:
        raise UserError(
            f"{field} {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    finally:
        if probe.exists():
            probe.unlink()
    return existing


def _check_store(folder: Path, field: str) -> Path:
    """`check_writable` on an object store, where a folder needs not be made."""
    import aiohttp
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    probe = folder / f".mdiff-{os.getpid()}.probe"
    try:
        probe.write_text("probe")
        probe.unlink()
    except (OSError, HttpError, GoogleAuthError, aiohttp.ClientError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{field} {folder}: cannot be written ({first}); check the bucket's name and this machine's credentials"
        ) from None
    return folder

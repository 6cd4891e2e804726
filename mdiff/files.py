"""Result files: strict JSON, written so that a reader never sees half a file, on disks and object stores.

A folder on an object store (`gs://…`, `s3://…`) is an `etils.epath.Path`, which has the methods of `pathlib.Path`
that mdiff uses; `folder` is the one place that decides.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdiff.errors import UserError


def folder(text: str | Path) -> Path:
    """A path from the command line: `scheme://…` on an object store, anything else on a disk.

    Raises:
      UserError: a scheme that no installed package serves.
    """
    if not isinstance(text, str) or "://" not in text:
        return Path(text)
    raise NotImplementedError


def is_local(path: Path) -> bool:
    """Is `path` on a disk, with append, rename, locks and free space?"""
    return isinstance(path, Path)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    The temporary name keeps the suffix, since some writers (numpy) would append one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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

    Returns:
      The folder that was tried.

    Raises:
      UserError: it is a file, or cannot be written; `field` names it.
    """
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

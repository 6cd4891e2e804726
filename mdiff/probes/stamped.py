"""Arrays beside a JSON file, which holds their digest: a pair that does not belong together is noticed."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdiff.errors import UserError


def pack(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, str]:
    """The arrays as the bytes of an .npz file, and their digest, which the JSON stores."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue(), _digest(buffer.getvalue())


def read_json(path: Path, form: int, again: str) -> dict[str, Any]:
    """The JSON object at `path`, which exists.

    Args:
      path: the file.
      form: the "format" it must have.
      again: what an error tells to do.

    Raises:
      UserError: it is no JSON, or of another format.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not JSON{again}") from None
    if not isinstance(tree, dict) or tree.get("format") != form:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise UserError(f"{path}: format {found}, this version reads {form}{again}")
    return tree


def read(path: Path, stamp: str | None, owner: str, again: str) -> dict[str, np.ndarray]:
    """The arrays at `path`.

    Args:
      path: the .npz file.
      stamp: its digest, from the JSON.
      owner: what the error calls the JSON.
      again: what the error tells to do.

    Raises:
      UserError: it is another file than the JSON was written with, or damaged.
    """
    data = path.read_bytes()
    if _digest(data) != stamp:
        raise UserError(f"{path}: does not belong to {owner}{again}")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile):
        raise UserError(f"{path}: damaged{again}") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

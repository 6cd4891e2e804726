"""Arrays beside a JSON file, which holds their digest: a pair that does not belong together is noticed."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mdiff.errors import UserError


def pack(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, str]:
    """The arrays as the bytes of an .npz file, and their digest, which the JSON stores."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue(), _digest(buffer.getvalue())


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

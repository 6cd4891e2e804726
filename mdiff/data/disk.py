"""Images that stay on disk until they are looked at: index, take and `np.asarray` as of an array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from mdiff.data.progress import progress

CHUNK = 256
SAMPLED = 64
"""Records whose pixels make the fingerprint of a set."""


class Records(Protocol):
    """A prepared set, read by position.

    Attributes:
      name: what it is called.
      version: its version, such as "5.1.0".
      split: which part of it.
      shape: (H, W, C) of every image.
      classes: number of classes; 0 if there are no labels or it is not known.
    """

    name: str
    version: str
    split: str
    shape: tuple[int, int, int]
    classes: int

    def __len__(self) -> int: ...

    def images(self, positions: np.ndarray) -> np.ndarray:
        """uint8 [k,H,W,C] at `positions` [k], in that order."""

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """int32 [k] at `positions` [k], in that order."""


class DiskImages:
    """uint8 [N,H,W,C] in a prepared set; what is indexed is read, decoded and resized then and there.

    An index (integer, slice, integer array, mask) gives an ordinary array, `take` another `DiskImages`, and
    `np.asarray` all of it, in memory.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self, records: Records, positions: np.ndarray | None = None, added: np.ndarray | None = None
    ) -> None:
        """Images at `positions` of `records`, default all; from len(records) on they count through `added`."""
        self._records = records
        self._positions = np.arange(len(records)) if positions is None else np.asarray(positions)
        self._added = np.zeros((0, *records.shape), np.uint8) if added is None else added

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._records.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = self._positions[index]
        return self._read(chosen) if np.ndim(chosen) else self._read(chosen[None])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("images on disk cannot be an array without being copied into memory")
        out = np.empty(self.shape, np.uint8)
        starts = range(0, len(self), CHUNK)
        with progress(f"read {self._records.name}") as track:
            for start in track(starts, len(starts)):
                out[start : start + CHUNK] = self._read(self._positions[start : start + CHUNK])
        return out if dtype is None else out.astype(dtype)

    def take(self, indices: np.ndarray, axis: int = 0) -> DiskImages:
        """The images at `indices` [M], still on disk."""
        if axis != 0:
            raise ValueError(f"axis = {axis}: images on disk are taken along axis 0")
        return DiskImages(self._records, self._positions[indices], self._added)

    def append(self, images: np.ndarray) -> DiskImages:
        """These images followed by `images`, uint8 [M,H,W,C], which are held in memory."""
        first = len(self._records) + len(self._added)
        positions = np.concatenate([self._positions, np.arange(first, first + len(images))])
        return DiskImages(self._records, positions, np.concatenate([self._added, images]))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the set without reading all of it.

        Returns:
          Name, version, split and number of examples, how many of them were sampled, evenly over the set,
          and the sha256 of those images' pixels, uint8 [k,H,W,C] in C order.
        """
        total = len(self._records)
        sample = np.linspace(0, total - 1, min(SAMPLED, total)).round().astype(np.int64)
        return {
            "name": self._records.name,
            "version": self._records.version,
            "split": self._records.split,
            "examples": total,
            "sampled": len(sample),
            "sha256": hashlib.sha256(self._records.images(sample).tobytes()).hexdigest(),
        }

    def _read(self, positions: np.ndarray) -> np.ndarray:
        out = np.empty((len(positions), *self._records.shape), np.uint8)
        stored = positions < len(self._records)
        if stored.any():
            out[stored] = self._records.images(positions[stored])
        out[~stored] = self._added[positions[~stored] - len(self._records)]
        return out


class DiskLabels:
    """int32 [N] classes in a prepared set; what is indexed is read then and there."""

    dtype = np.dtype(np.int32)
    ndim = 1

    def __init__(self, records: Records) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = np.arange(len(self))[index]
        return self._read(chosen) if np.ndim(chosen) else self._read(chosen[None])[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("labels on disk cannot be an array without being copied into memory")
        out = self[:]
        return out if dtype is None else out.astype(dtype)

    def max(self) -> int:
        """The largest label the set may hold if it says so, else the largest it does hold."""
        return self._records.classes - 1 if self._records.classes else int(self[:].max())

    def _read(self, positions: np.ndarray) -> np.ndarray:
        starts = range(0, len(positions), CHUNK)
        with progress(f"labels of {self._records.name}") as track:
            parts = [self._records.labels(positions[s : s + CHUNK]) for s in track(starts, len(starts))]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

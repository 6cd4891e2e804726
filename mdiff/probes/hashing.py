"""Perceptual hashes: 64 bits that survive rescaling, recompression and small changes of brightness.

The hash of Zauner (2010): brightness, reduced to 32 x 32 pixels, discrete cosine transform; of the 8 x 8
coefficients of lowest frequency that are not constant along an axis, the bit says whether a coefficient is above
their median. The distance is the number of different bits: about 32 between unrelated images, 0 to about 10
between versions of one image.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from scipy.fft import dctn

from mdiff.types import to_float

SIDE, KEPT = 32, 8
BITS = KEPT * KEPT
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_ROUNDING = 1e-4  # of a coefficient: what float32 makes of an exact zero, as in flat or symmetric images
_ROWS = 1024  # images hashed at once
_PAIRS = 1 << 22  # pairs compared at once


def phash(images: np.ndarray) -> np.ndarray:
    """Perceptual hashes.

    Args:
      images: [N,H,W,C] uint8, or float in [-1, 1]; three channels are RGB, others are averaged.

    Returns:
      uint64 [N]; the first bit is the highest.
    """
    images = np.asarray(images)
    parts = [_bits(images[i : i + _ROWS]) for i in range(0, len(images), _ROWS)]
    bits = np.concatenate(parts) if parts else np.zeros((0, BITS), bool)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)[:, 0]


def _bits(images: np.ndarray) -> np.ndarray:
    x: Any = to_float(images) if images.dtype == np.uint8 else images
    x = np.asarray(x, np.float32)
    grey = x @ _BRIGHTNESS.astype(np.float32) if x.shape[-1] == 3 else x.mean(-1)
    if grey.shape[1:] != (SIDE, SIDE):
        grey = np.asarray(jax.image.resize(grey, (len(grey), SIDE, SIDE), "linear", antialias=True))
    low = dctn(np.float64(grey), axes=(1, 2), norm="ortho")[:, 1 : KEPT + 1, 1 : KEPT + 1].reshape(-1, BITS)
    low = np.where(np.abs(low) < _ROUNDING, 0.0, low)
    return low > np.median(low, axis=1, keepdims=True)


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many of the 64 bits differ: uint64 arrays to int, broadcast."""
    return np.bitwise_count(a ^ b).astype(np.int64)


def nearest_hash(
    queries: np.ndarray, references: np.ndarray, mirrored: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The reference with the fewest different bits; ties go to the lower index.

    Args:
      queries: uint64 [Q].
      references: uint64 [R].
      mirrored: uint64 [R], hashes of the mirrored references, to compare with both orientations.

    Returns:
      dist: int64 [Q] in 0..64.
      index: int64 [Q] into the references.
    """
    dist, index = np.empty(len(queries), np.int64), np.empty(len(queries), np.int64)
    step = max(1, _PAIRS // len(references))
    for start in range(0, len(queries), step):
        part = queries[start : start + step, None]
        bits = hamming(part, references)
        if mirrored is not None:
            bits = np.minimum(bits, hamming(part, mirrored))
        index[start : start + step] = bits.argmin(1)
        dist[start : start + step] = bits.min(1)
    return dist, index

"""Pixels as features: flattened images, and their principal components.

A *feature space* is any object with a `name` that maps images [N,H,W,C] to rows [N,F]; `PixelPCA` is the
one that needs no weights. Numbers are comparable only within one named space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.linalg import eigh

from mdiff.errors import UserError
from mdiff.types import to_float

_ROWS = 4096  # rows projected at once; bounds the float64 copy
_LARGE = 512  # rows and pixels above which a few components are found without a full decomposition


class Features(Protocol):
    """A named map from images to rows."""

    @property
    def name(self) -> str:
        """Stored beside every number measured in this space."""
        ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images [N,H,W,C], uint8 or float in [-1, 1], to rows [N,F]."""
        ...


def flatten(x: np.ndarray) -> np.ndarray:
    """Images as rows.

    Args:
      x: [N,...] uint8 in 0..255, or float in [-1, 1].

    Returns:
      float32 [N,D] in [-1, 1].
    """
    x = np.asarray(x)
    if x.dtype == np.uint8:
        x = np.asarray(to_float(x))
    return np.ascontiguousarray(x.reshape(len(x), -1), np.float32)


def mirror(x: np.ndarray) -> np.ndarray:
    """Images [N,H,W,C] with left and right exchanged."""
    return np.asarray(x)[:, :, ::-1, :]


@dataclass(frozen=True)
class PixelPCA:
    """Leading principal components of pixels in [-1, 1].

    The components are orthonormal and not whitened, so a distance between rows is the Euclidean pixel
    distance inside the subspace.

    Attributes:
      mean: float64 [D], the mean image of the fit.
      components: float64 [k,D], orthonormal rows by falling variance.
      name: such as "pca32-pixel".
    """

    mean: np.ndarray
    components: np.ndarray
    name: str

    @staticmethod
    def fit(images: np.ndarray, k: int) -> PixelPCA:
        """Fits in float64, by a singular value decomposition or, of large sets, by their products' eigenvectors.

        Args:
          images: [N,H,W,C] uint8 or float in [-1, 1].
          k: components; fewer when the images span fewer dimensions (the name says how many).

        Raises:
          UserError: k is below 1, or all images are equal.
        """
        if k < 1:
            raise UserError(f"audit.components = {k}: at least 1 principal component is needed")
        rows = flatten(images).astype(np.float64)
        mean = rows.mean(0)
        scale, basis = _leading(rows - mean, k)
        # float32 pixels carry about seven digits: directions below that are rounding
        rank = int(np.sum(scale > 1e-6 * max(scale[0], 1e-6)))
        k = min(k, rank)
        if k == 0:
            raise UserError(f"images: all {len(rows)} are equal; principal components need different images")
        basis = basis[:k]
        # A singular vector's sign is arbitrary; fixing it makes the space reproducible.
        peak = np.abs(basis).argmax(1)
        basis = basis * np.sign(basis[np.arange(k), peak])[:, None]
        return PixelPCA(mean=mean, components=basis, name=f"pca{k}-pixel")

    def transform(self, images: np.ndarray) -> np.ndarray:
        """Images [N,H,W,C] to float64 [N,k], centred on the mean of the fit."""
        parts = [
            (flatten(images[i : i + _ROWS]) - self.mean) @ self.components.T
            for i in range(0, len(images), _ROWS)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.components)))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The same as `transform`."""
        return self.transform(images)


def _leading(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right singular vectors [.,D] of rows [N,D]: all of them, or of large sets the first k."""
    n = min(rows.shape)
    if n <= _LARGE or k > n // 8:
        _, scale, basis = np.linalg.svd(rows, full_matrices=False)
        return scale, basis
    wide = rows.shape[1] > len(rows)
    gram = rows @ rows.T if wide else rows.T @ rows
    values, vectors = eigh(gram, subset_by_index=(n - k, n - 1))
    scale = np.sqrt(np.maximum(values[::-1], 0.0))
    vectors = vectors[:, ::-1]
    if not wide:
        return scale, vectors.T
    # Products square the condition; a second pass restores orthonormal rows.
    basis, _ = np.linalg.qr(rows.T @ vectors)
    return scale, basis.T

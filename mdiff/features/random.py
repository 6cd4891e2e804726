"""Features of an untrained convolutional network: what texture and layout give without any weights to fetch.

Three 3x3 convolutions with ReLU, each followed by 2x2 mean pooling, then means over the four quarters of the
map. Weights are He-normal draws of a fixed seed, made by numpy, so that they are the same on every machine;
the maps themselves agree up to float32 rounding. Random features rank gross differences as trained ones do
and miss semantic ones; their numbers are not comparable with those of Inception.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.features.pixel import PixelPCA
from mdiff.types import to_float

WIDTHS = (32, 64, 128)
"""Channels of the convolutions."""
SEED = 0
"""Of the weights; a part of the space's definition."""

_PIXELS = 1 << 18  # pixels mapped at once; bounds memory


def convolve(images: np.ndarray) -> np.ndarray:
    """The network's features.

    Args:
      images: [N,H,W,C] uint8, or float in [-1, 1].

    Returns:
      float32 [N, 4 * 128]: the quarters (top left, top right, bottom left, bottom right), each with its
      channels. Maps that reach one pixel are no longer halved, and all quarters are then that pixel.
    """
    images = np.asarray(images)
    n, height, width, channels = images.shape
    kernels = _kernels(channels)
    step = max(1, min(n, _PIXELS // (height * width)))
    out = np.empty((n, 4 * WIDTHS[-1]), np.float32)
    for start in range(0, n, step):
        part = images[start : start + step]
        short = step - len(part)
        x = np.pad(part, ((0, short), (0, 0), (0, 0), (0, 0)))  # one shape, one program
        x = np.asarray(to_float(x) if x.dtype == np.uint8 else x, np.float32)
        out[start : start + step] = np.asarray(_network(x, kernels))[: len(part)]
    return out


@lru_cache(maxsize=8)
def _kernels(channels: int) -> tuple[np.ndarray, ...]:
    generator = np.random.Generator(np.random.Philox(SEED))
    sizes = (channels, *WIDTHS)
    return tuple(
        (generator.standard_normal((3, 3, a, b)) * np.sqrt(2 / (9 * a))).astype(np.float32)
        for a, b in pairwise(sizes)
    )


@jax.jit
def _network(x: Any, kernels: Any) -> Any:
    for kernel in kernels:
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x)
        window = (1, min(2, x.shape[1]), min(2, x.shape[2]), 1)
        total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID")
        x = total / (window[1] * window[2])
    height, width = x.shape[1:3]
    tops = (slice(0, max(1, height // 2)), slice(height // 2, None))
    lefts = (slice(0, max(1, width // 2)), slice(width // 2, None))
    return jnp.concatenate([x[:, i, j].mean((1, 2)) for i in tops for j in lefts], 1)


@dataclass(frozen=True)
class RandomConv:
    """Leading principal components of `convolve`.

    Untrained features share one large mean, so that all raw cosines are near 1; the components are centred.

    Attributes:
      pca: fitted on features.
    """

    pca: PixelPCA

    @property
    def name(self) -> str:
        """Such as "pca32-random"."""
        return self.pca.name

    @staticmethod
    def fit(images: np.ndarray, k: int) -> RandomConv:
        """Fits on images [N,H,W,C]; as `PixelPCA.fit`."""
        pca = PixelPCA.fit(convolve(images), k)
        return RandomConv(replace(pca, name=pca.name.replace("pixel", "random")))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images [N,H,W,C], uint8 or float in [-1, 1], to float64 [N,k]."""
        return self.pca(convolve(images))

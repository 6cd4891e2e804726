"""SSIM and MS-SSIM of pairs of images.

SSIM (Wang et al. 2004) is dm_pix's, on the [0, 1] scale whatever values occur: K1 = 0.01, K2 = 0.03, a Gaussian
window of 11 pixels with sigma 1.5, only where the window lies inside the image (torchmetrics also counts
reflected borders), each colour channel by itself.
On images below 11 pixels the window is the largest odd one that fits and sigma shrinks with it; such values are
comparable only among images of one size.

MS-SSIM (Wang, Simoncelli & Bovik 2003) multiplies the contrast-structure factors of the scales, and the
luminance factor of the coarsest one, to the paper's exponents. It takes as many of the five scales as leave the
window inside the image, with their exponents scaled to a sum of 1. A negative factor, an inverted structure,
counts as 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from mdiff.types import to_float

WINDOW, SIGMA = 11, 1.5
EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales, finest first."""

_PIXELS = 1 << 19  # pixels of pairs compared at once; bounds memory


class Structure(NamedTuple):
    """SSIM of pairs.

    Attributes:
      ssim: float32 [P] in [-1, 1]; 1 is equal.
      ms_ssim: float32 [P] in [0, 1]; equal to SSIM (negative ones as 0) where `scales` is 1.
    """

    ssim: np.ndarray
    ms_ssim: np.ndarray


def window(shape: tuple[int, ...]) -> int:
    """Side of the window for images [...,H,W,C], in pixels."""
    side = min(shape[-3:-1])
    return min(WINDOW, side - 1 + side % 2)


def scales(shape: tuple[int, ...]) -> int:
    """How many scales of MS-SSIM images [...,H,W,C] have room for."""
    side, size, count = min(shape[-3:-1]), window(shape), 1
    while count < len(EXPONENTS) and side // 2 >= max(size, 2):
        side, count = side // 2, count + 1
    return count


def compare(a: np.ndarray, b: np.ndarray) -> Structure:
    """SSIM and MS-SSIM of image i of `a` with image i of `b`.

    Args:
      a: [P,H,W,C] uint8, or float in [-1, 1].
      b: [P,H,W,C] likewise.
    """
    n, height, width, _ = a.shape
    # Powers of two, so that sets of other sizes share the program.
    step = max(1, min(1 << max(n - 1, 0).bit_length(), _PIXELS // (height * width)))
    found: list[Any] = []
    for start in range(0, n, step):
        pairs = [_unit(x[start : start + step], step) for x in (a, b)]
        found.append(np.asarray(_both(*pairs, size=window(a.shape), count=scales(a.shape))))
    both = np.concatenate(found, 1)[:, :n] if found else np.zeros((2, 0), np.float32)
    return Structure(both[0], both[1])


def best_of(
    queries: np.ndarray, references: np.ndarray, index: np.ndarray, flipped: np.ndarray
) -> tuple[Structure, Structure]:
    """The largest SSIM and MS-SSIM of each query with any of its candidates.

    Args:
      queries: [Q,H,W,C] images.
      references: [R,H,W,C] images.
      index: int [Q,k], each query's candidates among the references.
      flipped: bool [Q,k]: compare with the mirrored candidate.

    Returns:
      The largest values, and the references [Q] that have them.
    """
    count = index.shape[1]
    values, at = [], []
    step = max(1, _PIXELS // (count * queries.shape[1] * queries.shape[2]))
    for start in range(0, len(queries), step):
        part = index[start : start + step]
        other = references[part.ravel()]
        turned = flipped[start : start + step].ravel()
        other[turned] = other[turned, :, ::-1]
        pairs = compare(np.repeat(queries[start : start + step], count, 0), other)
        table = np.stack(pairs).reshape(2, len(part), count)
        values.append(table.max(2))
        at.append(np.take_along_axis(part[None], table.argmax(2)[..., None], 2)[..., 0])
    best, where = np.concatenate(values, 1), np.concatenate(at, 1)
    return Structure(best[0], best[1]), Structure(where[0], where[1])


def _unit(images: np.ndarray, count: int) -> np.ndarray:
    """float32 on [0, 1], padded to `count` images so that one program serves all."""
    x = np.asarray(to_float(images) if images.dtype == np.uint8 else images, np.float32)
    return np.pad((x + 1) / 2, ((0, count - len(x)), (0, 0), (0, 0), (0, 0)))


def _gaussian(length: int, size: int) -> np.ndarray:
    """The window as a matrix [length - size + 1, length]: one row for each place it fits."""
    at = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (at / (SIGMA * size / WINDOW)) ** 2)
    out = np.zeros((length - size + 1, length), np.float32)
    for i in range(len(out)):
        out[i, i : i + size] = weights / weights.sum()
    return out


def _ssim(a: Any, b: Any, size: int, k1: float = 0.01) -> Any:
    rows, columns = _gaussian(a.shape[1], size), _gaussian(a.shape[2], size)

    def blur(x: Any) -> Any:
        return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)

    return dm_pix.ssim(a, b, max_val=1.0, k1=k1, filter_fn=blur)


@partial(jax.jit, static_argnames=("size", "count"))
def _both(a: Any, b: Any, *, size: int, count: int) -> Any:
    first = last = _ssim(a, b, size)
    exponents = np.array(EXPONENTS[:count]) / sum(EXPONENTS[:count])
    product = 1.0
    for exponent in exponents[:-1]:
        # A huge K1 makes the luminance factor 1 and leaves contrast and structure.
        product = product * jnp.maximum(_ssim(a, b, size, 1e6), 0) ** exponent
        a, b = _halved(a), _halved(b)
        last = _ssim(a, b, size)
    return jnp.stack([first, product * jnp.maximum(last, 0) ** exponents[-1]])


def _halved(x: Any) -> Any:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

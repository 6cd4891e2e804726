"""How alike two noise differences or images are: SSIM and MS-SSIM as functions that can be mapped and differentiated.

SSIM (Wang et al. 2004) and its multi-scale form (Wang, Simoncelli & Bovik 2003) on the scale [0, 1], so with a data range of 1:
K1 = 0.01, K2 = 0.03, a Gaussian window, only where it lies inside the map, each channel by itself. `probes.structure` compares
images with dm_pix; here window, exponents and scaling are settings, as NeMo's are (arXiv 2406.02366, eq. 4 and its code).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.errors import UserError
from mdiff.nemo import Similarity
from mdiff.types import Array

_C1, _C2 = 0.01**2, 0.03**2
_FLAT = 1e-12  # range below which a map is constant


def check(cfg: Similarity, height: int, width: int) -> None:
    """Raises UserError when the settings are out of range or the window does not fit maps of this size."""
    if cfg.window < 3 or cfg.window % 2 == 0:
        raise UserError(f"similarity.window = {cfg.window}: must be odd and 3 or more")
    if not cfg.deviation > 0:
        raise UserError(f"similarity.deviation = {cfg.deviation}: must be above 0")
    scales = len(cfg.betas) if cfg.measure == "ms_ssim" else 1
    if scales < 1 or min(cfg.betas, default=0) <= 0:
        raise UserError(f"similarity.betas = {cfg.betas}: give one exponent above 0 for each scale")
    side = min(height, width)
    coarsest = side >> (scales - 1)
    if coarsest < cfg.window:
        fits = coarsest - 1 + coarsest % 2
        least = cfg.window << (scales - 1)
        fix = f"a window of {fits}" if fits >= 3 else f"maps of {least} pixels"
        also = ", fewer scales (similarity.betas), or similarity.measure ssim" if scales > 1 else ""
        raise UserError(
            f"similarity.window = {cfg.window}: does not fit maps of {coarsest} pixels, those of {side} at scale {scales}; "
            f"needs {fix}{also}"
        )


def scaled(delta: Array, cfg: Similarity) -> Array:
    """Differences [...,H,W,C] stretched to [0, 1], per image and channel or per image; a constant one becomes 0."""
    axes = (-3, -2) if cfg.scaling == "channel" else (-3, -2, -1)
    low, high = jnp.min(delta, axis=axes, keepdims=True), jnp.max(delta, axis=axes, keepdims=True)
    flat = high - low < _FLAT
    return jnp.where(flat, 0.0, (delta - low) / jnp.where(flat, 1.0, high - low))


def similarity(a: Array, b: Array, cfg: Similarity) -> Array:
    """Similarity of noise differences [...,H,W,C] and [...,H,W,C], each scaled to [0, 1] first; [...], 1 is equal."""
    return images(scaled(a, cfg), scaled(b, cfg), cfg)


def images(a: Array, b: Array, cfg: Similarity) -> Array:
    """Similarity of maps [...,H,W,C] in [0, 1] as they are; [...]."""
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    a, b = (jnp.broadcast_to(x, shape).reshape(-1, *shape[-3:]) for x in (a, b))
    if cfg.measure == "ssim":
        return _factors(a, b, cfg)[0].reshape(shape[:-3])
    out = jnp.ones(len(a))
    for scale, beta in enumerate(cfg.betas):
        whole, contrast = _factors(a, b, cfg)
        last = scale == len(cfg.betas) - 1
        out = out * _power(whole if last else contrast, beta)
        if not last:
            a, b = _halved(a), _halved(b)
    return out.reshape(shape[:-3])


def pairs(delta: Array, cfg: Similarity) -> Array:
    """Similarity of every two of S differences [S,H,W,C]; [S,S]."""
    maps = scaled(delta, cfg)
    return jax.vmap(lambda one: images(one[None], maps, cfg))(maps)


def _power(x: Array, beta: float) -> Array:
    """max(x, 0)^beta, with a finite slope at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.where(positive, x, 1.0) ** beta, 0.0)


def _halved(x: Array) -> Array:
    """Means of 2x2 pixels; an odd last row or column is left out."""
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _factors(a: Array, b: Array, cfg: Similarity) -> tuple[Array, Array]:
    """Mean SSIM and mean contrast-structure factor of [N,H,W,C]; [N] each."""
    offsets = np.arange(cfg.window) - cfg.window // 2
    heights = np.exp(-(offsets**2) / (2 * cfg.deviation**2))
    window = jnp.asarray(heights / heights.sum(), jnp.float32)

    def blurred(x: Array) -> Array:
        """Weighted means over windows inside the map, as two products with banded matrices."""
        rows, columns = (_band(window, size) for size in x.shape[1:3])
        return jnp.einsum("nhwc,gh,vw->ngvc", x, rows, columns, precision="highest")

    ma, mb = blurred(a), blurred(b)
    va = jnp.maximum(blurred(a * a) - ma * ma, 0)
    vb = jnp.maximum(blurred(b * b) - mb * mb, 0)
    contrast = (2 * (blurred(a * b) - ma * mb) + _C2) / (va + vb + _C2)
    whole = contrast * (2 * ma * mb + _C1) / (ma * ma + mb * mb + _C1)
    return whole.mean((1, 2, 3)), contrast.mean((1, 2, 3))


def _band(window: Array, size: int) -> Array:
    """[size - window + 1, size]: row i holds the window from column i."""
    places = size - len(window) + 1
    index = jnp.arange(size)[None] - jnp.arange(places)[:, None]
    inside = (index >= 0) & (index < len(window))
    return jnp.where(inside, window[jnp.clip(index, 0, len(window) - 1)], 0.0)

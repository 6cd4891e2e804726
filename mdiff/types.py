"""Shapes and conventions, stated once.

Images are NHWC, float, in [-1, 1]; on disk and in data sources they are uint8 and become floats on
the device (`x = u / 127.5 - 1`).

Time runs from data to noise: t = 0 is data, t = 1 is noise. A process (`mdiff.process`) gives
`xt = alpha(t) * x0 + sigma(t) * eps`. The working noise level is EDM's sigma, the standard deviation
of the noise once the signal has unit scale; for the variance-exploding process alpha = 1.

Symbols: `x0` clean, `xt` noisy, `eps` unit noise, `sigma`, `alpha`, `logsnr`. Parameters,
coefficients and losses are float32; compute may be bfloat16.

*Corruption* is the diffusion's noise. Damage to the data set itself is *degradation*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array  # a typed key, `jax.random.key`
Params: TypeAlias = Any  # a pytree of arrays
Batch: TypeAlias = Mapping[str, Array]
"""`{"x": [B,H,W,C], "id": [B], …}`. `id` names the training image and travels to every result.
Optional entries: `y` [B,H,W,C], the fixed noisy copy, and `cutoff` [B], its noise level; `seen` and `told` [B,H,W,1], what
damage leaves of the image and of that to the network (`mdiff.data.damage`); the conditions `label` [B], an integer class, `vector`
[B,V], and `augment` [B,9], what the augmentation did to `x` (`mdiff.data.augment`)."""


class Prediction(NamedTuple):
    """What a denoiser says about `xt`; every other parameterization follows from these two.

    Attributes:
      x0: [B,H,W,C] estimate of the clean image, E[x0 | xt].
      eps: [B,H,W,C] estimate of the unit noise, (xt - alpha x0) / sigma.
    """

    x0: Array
    eps: Array


Denoiser: TypeAlias = Callable[[Array, Array, "Array | None"], Prediction]
"""`(xt [B,H,W,C], t [B], cond [B,E] or None) -> Prediction`. All that samplers and most probes see."""

Objective: TypeAlias = Callable[[Params, Key, Batch], tuple[Array, dict[str, Array]]]
"""`(params, key, batch) -> (loss [B], aux)`. Never a mean: per-example loss is the measurement."""

Evaluator: TypeAlias = Callable[[Params, int], dict[str, float]]
"""`(ema parameters, step) -> scalars`: what a training loop calls every so many steps."""


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty and its denominator.

    Attributes:
      value: the point estimate.
      low: lower end of the confidence interval.
      high: upper end of the confidence interval.
      n: how many observations it rests on (the denominator of a rate).
    """

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def to_float(images: np.ndarray | Array) -> Array | np.ndarray:
    """uint8 [..., H, W, C] in 0..255 to float32 in [-1, 1]; stays on the side it came from."""
    return images.astype("float32") / 127.5 - 1.0


def to_uint8(images: np.ndarray | Array) -> np.ndarray:
    """float [..., H, W, C] in [-1, 1] to uint8, rounded and clipped, on the host."""
    images = np.asarray(images, np.float32)
    return np.clip(np.round((images + 1.0) * 127.5), 0, 255).astype(np.uint8)

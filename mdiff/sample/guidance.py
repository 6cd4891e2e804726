"""Guidance: Denoiser in, Denoiser out.

What guides is a linear extrapolation of two predictions, from one towards another and beyond:

    guided = away + weight (towards - away).

Both x0 and eps are linear in each other given xt, so the same weights hold for both, and for the score.
Classifier-free guidance goes from the unconditional to the conditional prediction (arXiv 2207.12598,
eq. 6; weight here is 1 + w there). Others go between two networks, such as a bad and a good version:

    def auto(good: Denoiser, bad: Denoiser, weight: float) -> Denoiser:  # arXiv 2406.02507, eq. 3
        return lambda xt, t, cond: extrapolate(bad(xt, t, cond), good(xt, t, cond), weight)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.types import Array, Denoiser, Prediction


def extrapolate(away: Prediction, towards: Prediction, weight: float | Array) -> Prediction:
    """`away + weight (towards - away)`: weight 0 gives `away`, 1 `towards`, more goes beyond it."""
    return jax.tree.map(lambda a, b: a + weight * (b - a), away, towards)


def _pairs(a: Array, b: Array) -> Array:
    """[B,…] and [B,…] as [2B,…], alternating: each pair stays on the device that holds it."""
    return jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])


def classifier_free(
    denoiser: Denoiser,
    null: Array | None,
    weight: float,
    process: GaussianProcess,
    low: float = 0.0,
    high: float = math.inf,
) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598) at noise levels from `low` to `high` (arXiv 2404.07724).

    The conditional and the unconditional prediction come from one call with a batch of 2B. Outside the
    interval the prediction is the conditional one; when no image of a batch is inside, only that is computed.

    Args:
      denoiser: trained with and without conditions.
      null: [1,E] or [B,E] embedding that stands for "no condition".
      weight: 1 is the denoiser itself, 0 its unconditional prediction, above 1 sharpens.
      process: the noise law that gives times their noise levels.
      low: guidance acts above this noise level.
      high: guidance acts up to this noise level.

    Returns:
      A Denoiser of the same arguments; `cond` must be given.

    Raises:
      UserError: guidance is asked for and there is no null condition.
    """
    if weight == 1:
        return denoiser
    if null is None:
        raise UserError(
            f"sample.guidance = {weight}: the model has no condition to guide by; set sample.guidance to 1"
        )

    def guided(xt: Array, t: Array, cond: Array | None = None) -> Prediction:
        if cond is None:
            raise UserError(f"sample.guidance = {weight}: needs a condition for each image")
        conds = _pairs(cond, jnp.broadcast_to(null, cond.shape))
        both = denoiser(_pairs(xt, xt), _pairs(t, t), conds)
        given, dropped = (Prediction(*(part[side::2] for part in both)) for side in (0, 1))
        level = process.noise_level(t)
        weights = jnp.where((level > low) & (level <= high), weight, 1.0)
        return extrapolate(dropped, given, bcast(weights, xt))

    def guided_inside(xt: Array, t: Array, cond: Array | None = None) -> Prediction:
        level = process.noise_level(t)
        return jax.lax.cond(jnp.any((level > low) & (level <= high)), guided, denoiser, xt, t, cond)

    everywhere = low <= 0 and high >= config.Sample.guidance_max
    return guided if everywhere else guided_inside


def check(cfg: config.Sample, net: config.Net) -> None:
    """Can a model of this network be guided as asked?

    Raises:
      UserError: a field is out of range or has no effect, or the network was not trained for guidance.
    """
    if not 0 <= cfg.guidance < math.inf:
        raise UserError(f"sample.guidance = {cfg.guidance}: must be 0 or above, and finite; 1 is no guidance")
    if not 0 <= cfg.guidance_min < cfg.guidance_max:
        raise UserError(
            f"sample.guidance_min = {cfg.guidance_min}, guidance_max = {cfg.guidance_max}: "
            "need 0 <= guidance_min < guidance_max"
        )
    if cfg.guidance == 1:
        for name in ("guidance_min", "guidance_max"):
            if getattr(cfg, name) != getattr(config.Sample, name):
                raise UserError(
                    f"sample.{name} = {getattr(cfg, name)}: has no effect without guidance; "
                    "leave it out or set sample.guidance to another weight than 1"
                )
        return
    if not net.classes and not net.vector:
        raise UserError(
            f"sample.guidance = {cfg.guidance}: the network has no condition to guide by; "
            "set sample.guidance to 1, or train with net.classes or net.vector"
        )
    if net.condition_dropout == 0:
        raise UserError(
            f"sample.guidance = {cfg.guidance}: the network was trained with net.condition_dropout = 0, so it "
            "has no unconditional half; set sample.guidance to 1, or train with net.condition_dropout 0.1"
        )

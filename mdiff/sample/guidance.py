"""Guidance: Denoiser in, Denoiser out.

What guides is a linear extrapolation of two predictions, from one towards another and beyond:

    guided = away + weight (towards - away).

Both x0 and eps are linear in each other given xt, so the same weights hold for both, and for the score.
Classifier-free guidance goes from the unconditional to the conditional prediction (arXiv 2207.12598,
eq. 6; weight here is 1 + w there). Others go between two networks, such as a bad and a good version:

    def auto(good: Denoiser, bad: Denoiser, weight: float) -> Denoiser:  # arXiv 2406.02507, eq. 3
        return lambda xt, t, cond: extrapolate(bad(xt, t, cond), good(xt, t, cond), weight)

Classifier guidance pushes one prediction along the gradient of a classifier instead (`by_classifier`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.types import Array, Denoiser, Params, Prediction

LogProb = Callable[[Array, Array, Array], Array]
"""`(xt [B,H,W,C], t [B], label int [B]) -> log p(label | xt) [B]`; row i depends on row i alone."""


class Guide(Protocol):
    """What guides: `mdiff.nets.classifier.Classifier`, or anything hashable with these members."""

    @property
    def process(self) -> GaussianProcess:
        """The noise law that its times are of."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""

    @property
    def classes(self) -> int:
        """How many classes it knows."""

    def log_prob(self, params: Params, xt: Array, t: Array, label: Array) -> Array:
        """log p(label | xt) [B] of noisy images xt [B,H,W,C] at times t [B]."""

    def __hash__(self) -> int:
        """Programs are kept by guide."""


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


def by_classifier(
    denoiser: Denoiser,
    log_prob: LogProb,
    label: Array,
    scale: float | Array,
    process: GaussianProcess,
    watch: Callable[[Array], None] | None = None,
) -> Denoiser:
    """Classifier guidance (arXiv 2105.05233, eq. 14; arXiv 2410.02467, algorithm 1).

    What is asked for is the power prior q(x) ~ p(x) p(y|x)^scale, whose score is that of p plus scale times the
    classifier's: 1 is Bayes' rule, more sharpens. Since p(y|x) ~ p(x|y) / p(x), it is also (1 - scale) score(x) +
    scale score(x|y), as in classifier-free guidance. Here both are those of noisy images, and raising to a power does not
    commute with adding noise: but for scale 0 and 1 the guided flow is not that of the noised q.

    With score = -eps / sigma (Tweedie) and x0 = (xt - sigma eps) / alpha, and the gradient taken at xt,

        eps - scale sigma grad log p(y|xt),    x0 + scale (sigma^2 / alpha) grad log p(y|xt).

    At unit signal scale, u = xt / alpha with noise level s = sigma / alpha, grad_u = alpha grad_xt: the push on x0 is
    scale s^2 grad_u, EDM's D + scale sigma^2 grad. s is infinite at alpha = 0, where the image says nothing of y; there
    x0 is left as it is, as eps is.

    Args:
      denoiser: what is guided. For classifier-free guidance too, guide its result: pairs have no labels here.
      log_prob: the classifier.
      label: int [B], the class wanted for each image.
      scale: strength, [] or [B]. The number 0 gives `denoiser` itself; a traced 0 computes the gradient in vain.
      process: the noise law that gives times their coefficients.
      watch: told, while tracing, of ||sigma grad log p(y|xt)|| [B] at each call: the push on eps for scale 1, the same in
        every process at one noise level.

    Returns:
      A Denoiser of the same arguments.

    Raises:
      UserError: the strength is a number that is negative or not finite.
    """
    if isinstance(scale, int | float):
        check_scale(scale)
        if scale == 0:
            return denoiser

    def guided(xt: Array, t: Array, cond: Array | None = None) -> Prediction:
        x0, eps = denoiser(xt, t, cond)
        slope = jax.grad(lambda x: log_prob(x, t, label).sum())(xt)
        alpha, sigma = bcast(process.alpha(t), xt), bcast(process.sigma(t), xt)
        push = sigma * slope
        if watch is not None:
            watch(jnp.sqrt(jnp.sum(jnp.square(push), axis=tuple(range(1, push.ndim)))))
        push = jnp.where(alpha > 0, bcast(jnp.asarray(scale), xt) * push, 0.0)
        return Prediction(x0 + sigma / jnp.where(alpha > 0, alpha, 1.0) * push, eps - push)

    return guided


def check_scale(scale: float) -> None:
    """Raises UserError when no classifier can guide at this strength."""
    if not 0 <= scale < math.inf:
        raise UserError(f"scale = {scale}: must be 0 (no guidance) or above, and finite; 1 is Bayes' rule")


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
    if not (net.classes or net.vector or net.text):
        raise UserError(
            f"sample.guidance = {cfg.guidance}: the network has no condition to guide by; "
            "set sample.guidance to 1, or train with net.classes, net.vector or net.text"
        )
    if net.condition_dropout == 0:
        raise UserError(
            f"sample.guidance = {cfg.guidance}: the network was trained with net.condition_dropout = 0, so it "
            "has no unconditional half; set sample.guidance to 1, or train with net.condition_dropout 0.1"
        )

"""Can copies be told from other generations without the training images? Detectors, and how well they do.

A detector gives each generation one number from the model alone (`recipes.evidence.detector_rows`); whether it is a copy
is the audit's verdict, which knows the training images. At noise level sigma, with u at unit signal scale, D the denoiser
and s(u) = (D(u) - u) / sigma^2 its score:

- `score_norm`: ||eps-hat|| = sigma ||s(x + sigma n)||. Noise along the directions in which the model's images vary is taken
  for image, so of d dimensions a law that fills k of them locally leaves a norm of about sqrt(d - k); a copy has k = 0.
- `flipd`: the local intrinsic dimension k itself (FLIPD, arXiv 2406.03537). The density p_sigma of noisy images obeys the
  heat equation, d p / d sigma = sigma Laplace(p), hence d log p / d ln sigma = sigma^2 (tr grad s + ||s||^2); near a
  k-dimensional set p_sigma grows like sigma^(k - d) on the set, so that

      k = d + sigma^2 (tr grad s(x) + ||s(x)||^2) = tr grad D(x) + ||D(x) - x||^2 / sigma^2,

  at the image x itself: at x + sigma n the last term would add d - k, and the sum be d whatever k is.
- `error`: of the denoised image, mean over pixels, as in `probes.gap`; known by heart is denoised well.
- `gap`: the mean over steps of sigma ||grad log p(c | xt)||, how far a guided sampler had to be pushed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri
from sklearn.metrics import roc_auc_score, roc_curve

from mdiff.errors import UserError
from mdiff.probes import intervals
from mdiff.types import Array, Estimate, Key

SIGNS = {"score_norm": 1, "flipd": -1, "error": -1, "gap": 1}
"""Detector -> 1 where larger numbers speak for a copy, -1 where smaller ones do."""
FALSE_ALARMS = 0.01
"""False-positive rate at which the share of copies found is reported."""
TOPS = (10, 30, 100, 300)
"""How many of the most suspicious generations are looked at."""


@dataclass(frozen=True)
class Detector:
    """How well one number per generation finds the copies.

    Attributes:
      name: of the detector.
      auroc: chance that a copy scores above another generation, ties half; 0.5 is guessing; n counts all generations. NaN
        in [0, 1] when there are no copies or nothing else.
      found: share of the copies found at a false-positive rate of at most `FALSE_ALARMS`; n counts the copies.
      precision: k -> share of copies among the k most suspicious; of equals, copies come last.
      base: share of copies among all: what the precision of guessing is.
    """

    name: str
    auroc: Estimate
    found: Estimate
    precision: dict[int, Estimate]
    base: Estimate


def detect(
    rows: Mapping[str, np.ndarray], copies: np.ndarray, *, confidence: float = 0.95
) -> dict[str, Detector]:
    """Evaluates detectors by name, each in the direction of `SIGNS`.

    Args:
      rows: detector -> [N], or [L,N] which is averaged over L noise levels.
      copies: bool [N], the audit's verdict.
      confidence: level.

    Raises:
      UserError: an unknown detector, or as `evaluate`.
    """
    unknown = [name for name in rows if name not in SIGNS]
    if unknown:
        raise UserError(f"detector {unknown[0]!r}: no such detector; give one of {', '.join(SIGNS)}")
    means = {name: values.mean(0) if np.ndim(values) == 2 else values for name, values in rows.items()}
    return {
        name: evaluate(name, SIGNS[name] * np.asarray(values, np.float64), copies, confidence=confidence)
        for name, values in means.items()
    }


def evaluate(
    name: str,
    scores: np.ndarray,
    copies: np.ndarray,
    *,
    tops: tuple[int, ...] = TOPS,
    confidence: float = 0.95,
) -> Detector:
    """How well scores find copies.

    The AUROC's interval is the wider, at each end, of two. One is Wilson's of a rate with DeLong's variance (DeLong et al. 1988,
    Biometrics 44:837), which follows the scores' own spread but is too narrow for a handful of copies; the other is method 5
    of Newcombe 2006 (Statistics in Medicine 25:559), which never has zero width.

    Args:
      name: of the detector.
      scores: [N], larger for what looks like a copy.
      copies: bool [N].
      tops: values of k; those above N are left out.
      confidence: level.

    Raises:
      UserError: scores are not finite, or the two are not of one length.
    """
    scores, copies = np.asarray(scores, np.float64), np.asarray(copies, bool)
    if scores.shape != copies.shape or scores.ndim != 1 or not len(scores):
        raise UserError(f"{name}: scores of shape {scores.shape} for verdicts {copies.shape}; give one each")
    broken = int(np.sum(~np.isfinite(scores)))
    if broken:
        raise UserError(
            f"{name}: {broken} of {len(scores)} scores are not finite; leave these generations out"
        )
    found = int(copies.sum())
    # Of equal scores the copies come last: a detector that cannot tell gets no credit.
    ranked = copies[np.lexsort((copies, -scores))]
    return Detector(
        name=name,
        auroc=auroc(scores, copies, confidence),
        found=_found(scores, copies, confidence),
        precision={
            k: intervals.wilson(int(ranked[:k].sum()), k, confidence) for k in tops if 1 <= k <= len(scores)
        },
        base=intervals.wilson(found, len(copies), confidence),
    )


def auroc(scores: np.ndarray, copies: np.ndarray, confidence: float = 0.95) -> Estimate:
    """The area under the ROC curve of finite scores [N] for `copies` bool [N]; interval as in `evaluate`."""
    m, n = int(copies.sum()), int((~copies).sum())
    if not m or not n:
        return Estimate(math.nan, 0.0, 1.0, len(scores))
    value = float(roc_auc_score(copies, scores))
    low, high = _newcombe(value, m, n, confidence)
    variance, spread = delong_variance(scores, copies), value * (1 - value)
    if variance > 0 and spread > 0:
        # The variance is at most spread / min(m, n), so the size is at least that.
        wilson = intervals.wilson_limits(value, max(min(m, n), spread / variance), confidence)
        low, high = min(low, wilson[0]), max(high, wilson[1])
    return Estimate(value, low, high, len(scores))


def _newcombe(value: float, m: int, n: int, confidence: float) -> tuple[float, float]:
    """The A with |A - value| = z sqrt(V(A)), V that of two exponential laws (Hanley and McNeil 1982) at mean group size."""
    z, size = float(ndtri(0.5 + confidence / 2)), (m + n) / 2

    def beyond(a: float) -> float:
        part = 1 + (size - 1) * ((1 - a) / (2 - a) + a / (1 + a))
        return (a - value) ** 2 - z * z * a * (1 - a) * part / (m * n)

    # At the value itself `beyond` is below 0, at 0 and 1 above; the exact ends are solutions, or the limits.
    low = (
        brentq(beyond, 0.0, value)
        if 0 < value < 1
        else (0.0 if value == 0 else brentq(beyond, 0.0, 1 - 1e-9))
    )
    high = brentq(beyond, value, 1.0) if 0 < value < 1 else (1.0 if value == 1 else brentq(beyond, 1e-9, 1.0))
    return float(low), float(high)


def delong_variance(scores: np.ndarray, copies: np.ndarray) -> float:
    """DeLong's variance of the AUROC: that of the placements of copies, over m, plus of others, over n; 0 where m or n is 1."""
    up, down = np.sort(scores[copies]), np.sort(scores[~copies])

    def share_below(values: np.ndarray, among: np.ndarray) -> np.ndarray:
        return (np.searchsorted(among, values) + np.searchsorted(among, values, "right")) / (2 * len(among))

    parts = (share_below(up, down), share_below(down, up))
    return sum(float(part.var(ddof=1)) / len(part) for part in parts if len(part) > 1)


def _found(scores: np.ndarray, copies: np.ndarray, confidence: float) -> Estimate:
    """Share of the copies above a threshold that at most `FALSE_ALARMS` of the others pass."""
    count = int(copies.sum())
    if count in (0, len(copies)):
        return Estimate(math.nan, 0.0, 1.0, count)
    alarms, share, _ = roc_curve(copies, scores, drop_intermediate=False)
    return intervals.wilson(round(float(share[alarms <= FALSE_ALARMS].max()) * count), count, confidence)


def local_dimension(
    answer: Callable[[Array], Array], x: Array, sigma: Array, probes: int, each: Key
) -> Array:
    """tr grad D(x) + ||D(x) - x||^2 / sigma^2, the local dimension at noise level sigma (arXiv 2406.03537).

    Args:
      answer: the denoiser D at sigma, images to images at unit signal scale, each on its own.
      x: [N,H,W,C], without noise.
      sigma: the noise level.
      probes: sign vectors that estimate the trace; 0 takes every direction.
      each: [N] keys of the sign vectors.

    Returns:
      [N].
    """
    found, derivative = jax.linearize(answer, x)

    def along(direction: Array) -> Array:
        # Images do not see each other, so one derivative of the batch is each image's own.
        return jnp.sum(direction * derivative(direction), axis=(1, 2, 3))

    def sign_vector(probe: Array) -> Array:
        draw = jax.vmap(lambda k: jax.random.rademacher(jax.random.fold_in(k, probe), x.shape[1:], x.dtype))
        return along(draw(each))

    def axis(place: Array) -> Array:
        return along(jnp.broadcast_to(jax.nn.one_hot(place, x[0].size).reshape(x.shape[1:]), x.shape))

    if probes:
        trace = jax.lax.map(sign_vector, jnp.arange(probes)).mean(0)
    else:
        trace = jax.lax.map(axis, jnp.arange(x[0].size)).sum(0)
    return trace + jnp.sum((found - x) ** 2, axis=(1, 2, 3)) / sigma**2

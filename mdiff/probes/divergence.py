"""Memorization as a divergence, made measurable: Delta M, and the distance to the empirical optimum.

The memorization divergence of a model p on images D is M(D; p, e) = KL(q_e || p), with q_e = (1/N) sum_i N(x_i, e^2 I)
(arXiv 2410.02467). As e -> 0 it is infinite for every p with a bounded density, since the entropy of q_e falls without bound;
but that entropy does not depend on p, so the difference of two models is finite:

    Delta M = M(D; p1, e) - M(D; p2, e) = E_{q_e} [log p2(x) - log p1(x)],    below 0 where p1 knows D better.

**From denoising errors.** For laws smoothed by noise sigma, with scores s = (D(x) - x) / sigma^2 and g^2 dt = d(sigma^2)
(arXiv 2101.09258, theorem 1),

    KL(q || p) at e = KL at the highest sigma + 1/2 int g^2 E||s_q - s_p||^2 dt = ... + int E||D_q - D_p||^2 / sigma^3 dsigma.

where D_p is the posterior mean of p; of a network, which need not be one of any law, the right side is an upper bound.
With q the noisy copies of one image x, D_q = x: -log p(x) is, up to a constant, the denoising error of x weighted with
sigma^-3, and Delta M the difference of two such sums over the whole range of noise, e its lower end. The term at the highest
sigma is neglected; it falls as the squared distance of the two means over 2 sigma^2. In ln sigma the weight is
sigma^-2, under which the integrand is smooth and bounded: the trapezoid rule on levels equally spaced there.

With q the noisy training set, D_q is the empirical denoiser D* (`nets.closed_form.empirical`), and the integral the
distance KL(q || p) to a perfect memorizer; E||D - x0||^2 = E||D* - x0||^2 + E||D - D*||^2 links it to the training loss.

**What to expect of Delta M.** If p1 = p_i is the law of a part of p2 = sum_i pi_i p_i, Delta M is -KL(p_i || p), at least
-log(1 / pi_i) since p >= pi_i p_i: a nat or two of the thousands an image has. What is more than that, was learned by heart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mdiff.errors import UserError
from mdiff.probes import intervals, sharpness
from mdiff.types import Estimate


def make_levels(sigma_min: float, sigma_max: float, count: int = 32) -> tuple[float, ...]:
    """`count` noise levels from sigma_min to sigma_max, equally spaced in ln sigma.

    Raises:
      UserError: not 0 < sigma_min < sigma_max, or fewer than 2 levels.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"levels: from {sigma_min:g} to {sigma_max:g}; give 0 < lowest < highest")
    if count < 2:
        raise UserError(f"levels: {count}; an integral over noise needs 2 or more")
    return tuple(float(level) for level in np.geomspace(sigma_min, sigma_max, count))


def weights(levels: tuple[float, ...]) -> np.ndarray:
    """float64 [L] with sum_l w_l f(sigma_l) = int f(sigma) / sigma^3 dsigma, by the trapezoid rule in ln sigma.

    Raises:
      UserError: fewer than 2 levels, or they do not rise from above 0.
    """
    sigma = np.asarray(levels, np.float64)
    if len(sigma) < 2 or not sigma[0] > 0 or not (np.diff(sigma) > 0).all():
        raise UserError(f"levels: {list(levels)}; give 2 or more noise levels above 0 that rise")
    steps = np.diff(np.log(sigma))
    share = np.zeros(len(sigma))
    share[:-1] += steps / 2
    share[1:] += steps / 2
    return share / sigma**2


@dataclass(frozen=True, eq=False)
class Difference:
    """Delta M of two models, in nats per image; below 0 where the first gives the images more density.

    Attributes:
      levels: L noise levels.
      images: float64 [N], each image's own.
      train: their mean.
      heldout: the mean over held-out images: what the first model knows better everywhere; or None.
      excess: train - heldout: what it knows better of its training images alone; or None.
      by_level: [L] what each level adds to `train`.
    """

    levels: tuple[float, ...]
    images: np.ndarray
    train: Estimate
    heldout: Estimate | None
    excess: Estimate | None
    by_level: list[float]


def delta_m(
    first: np.ndarray,
    second: np.ndarray,
    levels: tuple[float, ...],
    *,
    heldout: tuple[np.ndarray, np.ndarray] | None = None,
    confidence: float = 0.95,
) -> Difference:
    """M(D; first) - M(D; second) from denoising errors under the same noise.

    Args:
      first: [L,N] ||D(x + sigma n) - x||^2, summed over pixels, at each level, of the first model.
      second: [L,N] the same of the second model, of the same images and the same n (common random numbers).
      levels: L noise levels, over the whole range (`make_levels`).
      heldout: ([L,M], [L,M]), the errors of both models on held-out images.
      confidence: level of the intervals: Student's over images; Welch's for the excess.

    Raises:
      UserError: shapes do not go together, fewer than 2 images, or errors that are not finite.
    """
    weight = weights(levels)

    def parts(name: str, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return weight[:, None] * (_checked(name, ours, levels) - _checked(name, theirs, levels, like=ours))

    rows = parts("train", first, second)
    images, control, excess = rows.sum(0), None, None
    if heldout is not None:
        others = parts("heldout", *heldout).sum(0)
        control = sharpness.mean(others, confidence)
        excess = _welch(images, others, confidence)
    train = sharpness.mean(images, confidence)
    return Difference(tuple(levels), images, train, control, excess, rows.mean(1).tolist())


@dataclass(frozen=True, eq=False)
class Optimum:
    """How far a denoiser is from the empirical one, which knows every training image by heart.

    Attributes:
      levels: L noise levels.
      distance: int E||D - D*||^2 / sigma^3 dsigma in nats: the divergence of the model from the noisy training set.
      by_level: E||D - D*||^2 / ||D_mean - D*||^2 at each level, with D_mean the mean training image: 0 is the memorizer, 1
        knows the mean alone; with intervals over images (delta method).
      images: float64 [N], what noisy copies of each image add to the distance.
    """

    levels: tuple[float, ...]
    distance: Estimate
    by_level: list[Estimate]
    images: np.ndarray


def optimum(
    apart: np.ndarray, scale: np.ndarray, levels: tuple[float, ...], confidence: float = 0.95
) -> Optimum:
    """The distance to the empirical optimum.

    Args:
      apart: [L,N] ||D - D*||^2, summed over pixels, at noisy copies of N training images.
      scale: [L,N] ||D_mean - D*||^2 there.
      levels: L noise levels, over the whole range.
      confidence: level.

    Raises:
      UserError: as `delta_m`.
    """
    apart, scale = _checked("apart", apart, levels), _checked("scale", scale, levels, like=apart)
    images = weights(levels) @ apart
    return Optimum(
        tuple(levels),
        sharpness.mean(images, confidence),
        [sharpness.ratio(a, b, confidence) for a, b in zip(apart, scale, strict=True)],
        images,
    )


def _checked(
    name: str, errors: np.ndarray, levels: tuple[float, ...], like: np.ndarray | None = None
) -> np.ndarray:
    errors = np.asarray(errors, np.float64)
    if errors.ndim != 2 or len(errors) != len(levels) or errors.shape[1] < 2:
        raise UserError(
            f"{name}: errors of shape {errors.shape} for {len(levels)} levels; give [levels, images >= 2]"
        )
    if like is not None and errors.shape != np.shape(like):
        raise UserError(
            f"{name}: errors {errors.shape} and {np.shape(like)}; measure both models on the same images"
        )
    if not np.isfinite(errors).all():
        raise UserError(f"{name}: {int(np.sum(~np.isfinite(errors)))} errors are not finite; check the model")
    return errors


def _welch(a: np.ndarray, b: np.ndarray, confidence: float) -> Estimate:
    """mean(a) - mean(b) of independent samples."""
    ends = stats.ttest_ind(a, b, equal_var=False).confidence_interval(confidence)
    return Estimate(float(a.mean() - b.mean()), float(ends.low), float(ends.high), len(a))


# ------------------------------------------------------------------- what earlier definitions do


def m_point(points: np.ndarray, samples: np.ndarray, log_density: np.ndarray, width: float) -> float:
    """sum_i KL(p || N(x_i, e^2 I)), point-wise memorization of early versions of arXiv 2410.02467; nats, by Monte Carlo.

    Each sample of p is far from all points but one, so the sum grows as e^-2 for a perfect memorizer as well.

    Args:
      points: [N,d] the x_i.
      samples: [S,d] of p.
      log_density: [S] log p of the samples, in nats.
      width: e.
    """
    size = points.shape[1]
    squared = np.sum((samples[:, None, :] - points[None]) ** 2, axis=-1)
    log_normal = -0.5 * squared / width**2 - 0.5 * size * math.log(2 * math.pi * width**2)
    return float(np.sum(np.mean(np.asarray(log_density)[:, None] - log_normal, axis=0)))


def covariance_norms(rows: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Operator norms of covariances (divisor n): of all rows [N,d], and of each label's rows, [K] in the order of labels."""
    rows = np.asarray(rows, np.float64)

    def norm(part: np.ndarray) -> float:
        return float(np.linalg.norm((part - part.mean(0)) / math.sqrt(len(part)), 2) ** 2)

    return norm(rows), np.array([norm(rows[labels == label]) for label in np.unique(labels)])


def conditioning_spreads(
    rows: np.ndarray, parts: int = 2, trials: int = 200, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Share of random partitions in which ||Cov(Z | Y = y)|| > ||Cov(Z)|| for some y.

    That conditioning on a label shrinks the norm of the covariance is proposition 1 of early versions of arXiv 2410.02467.
    It holds on average, E Cov(Z | Y) <= Cov(Z) (law of total covariance), but not for each y: of -1, 0, 0, 1 the part {-1, 1}
    has variance 1, and the whole 1/2.

    Args:
      rows: [N,d].
      parts: of each partition, of nearly equal size.
      trials: partitions.
      seed: of them.
      confidence: level of Wilson's interval over partitions.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    labels = np.arange(len(rows)) % parts
    spread = 0
    for _ in range(trials):
        whole, each = covariance_norms(rows, generator.permutation(labels))
        spread += bool(each.max() > whole)
    return intervals.wilson(spread, trials, confidence)

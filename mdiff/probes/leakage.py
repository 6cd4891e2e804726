"""How much the noisy copies of ambient training can tell about the images they were made from.

A copy y = x + tn n of an image x of d values (pixels times channels) is a Gaussian channel. Whatever law x has, if its
covariance is Sigma,

    I(x; y) <= 1/2 log det(I + Sigma / tn^2)  nats,

with equality for a Gaussian x, since the Gaussian has the most entropy of all y of one covariance (Shannon 1948,
section 20; Cover and Thomas 2006, theorem 8.6.5). What is computed from the copies tells no more than they do (data
processing), and N copies of N images no more than N times this, whether or not the images are independent. m independent
draws of noise are one draw of variance tn^2 / m: I <= 1/2 log det(I + m Sigma / tn^2), which grows without bound. This is
lemma 4.2 of arXiv 2502.21278. An attacker who knows that x is one of N pictures learns at most ln N nats, too.

What the bound covers is what is learned above the cutoff. Below it the paper's method shows the network clean images;
only with `loss.clean: never` does the bound hold for all that a trained network can say.

**The covariance has to be guessed** from n images, fewer than d as a rule. All three guesses have the same trace, and
log det(I + .) is concave, so they are in this order whatever the images:

    sample <= shrunk <= isotropic.

`sample`: unbiased as a matrix, but its log det is too small on average (Jensen), by much while n < d: it is 0 in every
direction that the n images do not span. For an attacker who knows these n images, and only not which of them it is, it
bounds from above. `shrunk`: mixed with a multiple of the identity by the weight of Ledoit and Wolf (2004, J. Multivariate
Anal. 88:365), an estimate that errs to either side. `isotropic`: all directions alike, which needs the mean variance of a
value alone, bounds from above, and by far, since neighbouring pixels are alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize

from mdiff import config
from mdiff.data import cutoffs as cutoffs_lib
from mdiff.data.degrade import noise_keys
from mdiff.data.split import Subset
from mdiff.errors import UserError
from mdiff.probes import intervals
from mdiff.types import Estimate, to_float

Covariance = Literal["shrunk", "sample", "isotropic"]
COVARIANCES: tuple[Covariance, ...] = ("sample", "shrunk", "isotropic")


# ------------------------------------------------------------------------------------- the formulas


def information(variances: np.ndarray, cutoff: float, draws: float = 1) -> float:
    """1/2 log det(I + m Sigma / tn^2) in nats: what m noisy copies tell about one image (arXiv 2502.21278, lemma 4.2).

    Args:
      variances: [d] eigenvalues of Sigma, of images in [-1, 1]; zeros may be left out.
      cutoff: tn, the copies' noise level (EDM's sigma, unit signal scale); 0 tells everything: infinity.
      draws: m, independent draws of the noise.
    """
    if cutoff == 0:
        return math.inf
    return 0.5 * float(np.sum(np.log1p(draws * np.asarray(variances, np.float64) / cutoff**2)))


def information_vp(variances: np.ndarray, sigma: float, draws: float = 1) -> float:
    """`information` of copies sqrt(1 - s^2) x + s n, s in (0, 1): 1/2 log det(I + m (1 - s^2) / s^2 Sigma)."""
    return information(variances, sigma / math.sqrt((1 - sigma) * (1 + sigma)), draws)


def unknown_law(size: int, cutoff: float, draws: float = 1) -> float:
    """The bound in nats that needs no covariance: `size` values in [-1, 1] have variances of 1 at most."""
    return information(np.ones(size), cutoff, draws)


def cutoff_for(variances: np.ndarray, nats: float, draws: float = 1) -> float:
    """The cutoff at which `information` has come down to `nats` > 0; 0 if no value varies."""
    logs = np.log(draws * np.asarray(variances, np.float64)[np.asarray(variances) > 0])
    if not len(logs):
        return 0.0

    def over(log_cutoff: float) -> float:
        # log(1 + exp(.)), for cutoffs whose square is no float any more
        return 0.5 * float(np.sum(np.logaddexp(0, logs - 2 * log_cutoff))) - nats

    # From above: log(1 + v) <= v. From below: the largest direction alone tells 1/2 log(1 + v).
    high = 0.5 * (float(np.logaddexp.reduce(logs)) - math.log(2 * nats))
    low = 0.5 * (float(np.max(logs)) - 2 * nats - math.log(-math.expm1(-2 * nats)))
    return math.exp(optimize.brentq(over, low - 1e-9, high + 1e-9, xtol=1e-12))


# ---------------------------------------------------------------------------------- the covariances


@dataclass(frozen=True, eq=False)
class Spectra:
    """Eigenvalues of the guesses at a covariance, all of one trace.

    Attributes:
      sample: [d] of the sample covariance (divisor n - 1), rising.
      shrinkage: Ledoit and Wolf's weight of the identity in `shrunk`, 0 to 1.
      n: images.
    """

    sample: np.ndarray
    shrinkage: float
    n: int

    @property
    def shrunk(self) -> np.ndarray:
        """[d]: sample and isotropic mixed by `shrinkage`."""
        return (1 - self.shrinkage) * self.sample + self.shrinkage * self.isotropic

    @property
    def isotropic(self) -> np.ndarray:
        """[d]: the mean variance of a value, d times."""
        return np.full(len(self.sample), np.mean(self.sample))

    def of(self, covariance: Covariance) -> np.ndarray:
        """[d] of the guess by this name."""
        return {"sample": self.sample, "shrunk": self.shrunk, "isotropic": self.isotropic}[covariance]


def spectra(images: np.ndarray) -> Spectra:
    """The guesses at the covariance of the law that `images` were drawn from.

    Args:
      images: [n,H,W,C] uint8, or float in [-1, 1]; n at least 2.

    Raises:
      UserError: fewer than two images.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    if len(images) < 2:
        raise UserError(f"images: {len(images)} given; a covariance needs 2 or more")
    images = np.asarray(images)
    rows = (to_float(images) if images.dtype == np.uint8 else images).reshape(len(images), -1)
    rows = np.asarray(rows, np.float64)
    rows = rows - rows.mean(0)
    n, size = rows.shape
    # The nonzero eigenvalues of R'R are those of RR', whichever is smaller.
    product = rows @ rows.T if n < size else rows.T @ rows
    found = np.maximum(np.linalg.eigvalsh(product) / (n - 1), 0.0)
    sample = np.concatenate([np.zeros(size - len(found)), found])
    shrinkage = float(ledoit_wolf_shrinkage(rows, assume_centered=True)) if sample.any() else 0.0
    return Spectra(sample, shrinkage, n)


# ------------------------------------------------------------------------------------ of a data set


@dataclass(frozen=True)
class Bound:
    """What the copies at one cutoff can tell.

    Attributes:
      cutoff: tn.
      draws: m.
      nats: per image, by the chosen covariance; the interval is over which images the covariance was guessed from.
      others: nats per image by each of the covariances.
      unknown_law: nats per image without any covariance.
      capped: the smaller of nats and ln of the candidates.
      size: values per image.
      images: images of the set.
    """

    cutoff: float
    draws: int
    nats: Estimate
    others: dict[str, float]
    unknown_law: float
    capped: float
    size: int
    images: int

    @property
    def bits(self) -> float:
        """Per image."""
        return self.nats.value / math.log(2)

    @property
    def per_value(self) -> float:
        """Nats per value of an image."""
        return self.nats.value / self.size

    @property
    def total(self) -> float:
        """Nats about the whole set."""
        return self.images * self.nats.value


@dataclass(frozen=True)
class Leakage:
    """What the noisy copies of a set of images can tell, by cutoff and number of draws.

    Attributes:
      covariance: which guess `nats` are by.
      shrinkage: weight of the identity in the shrunk covariance.
      images: images of the set.
      used: images that the covariance was guessed from.
      size: values per image.
      candidates: pictures that an attacker chooses from.
      bounds: one per cutoff and number of draws.
      identifies_below: cutoff below which one draw may tell which of the candidates an image is: there nats exceed
        ln of their number.
    """

    covariance: Covariance
    shrinkage: float
    images: int
    used: int
    size: int
    candidates: int
    bounds: tuple[Bound, ...]
    identifies_below: float


def leakage(
    images: np.ndarray,
    levels: Sequence[float],
    draws: Sequence[int] = (1,),
    covariance: Covariance = "shrunk",
    candidates: int | None = None,
    confidence: float = 0.95,
    most: int = 2048,
) -> Leakage:
    """What noisy copies of `images` can tell about them.

    Intervals are of a delete-a-group jackknife over the images. A bootstrap's would exclude its own value: resamples
    repeat images, so they span fewer directions, and log det is smaller.

    Args:
      images: [N,H,W,C] uint8, or float in [-1, 1].
      levels: cutoffs above 0.
      draws: numbers of draws of the noise, 1 or more.
      covariance: the guess that `nats` are by.
      candidates: pictures that an attacker chooses from; None is the N images.
      confidence: level of the intervals.
      most: the covariance is guessed from the first so many images.

    Raises:
      UserError: a level is not above 0, a number of draws is not 1 or more, or there are fewer than two images.
    """
    check(levels, draws)
    rows = np.asarray(images[:most])
    known = len(images) if candidates is None else candidates
    whole = spectra(rows)
    size = len(whole.sample)
    # An eigendecomposition per group, cubic in the smaller of n and d: fewer groups where it takes seconds.
    groups = 20 if min(len(rows), size) <= 1024 else 8

    @functools.cache
    def part(kept: bytes) -> np.ndarray:
        return spectra(rows[np.frombuffer(kept, np.int64)]).of(covariance)

    def bound(level: float, m: int) -> Bound:
        def statistic(kept: np.ndarray) -> float:
            left = whole.of(covariance) if len(kept) == len(rows) else part(kept.tobytes())
            return information(left, level, m)

        if len(rows) > 2:
            nats = intervals.jackknife(
                statistic, np.arange(len(rows)), confidence=confidence, groups=groups
            ).plain
            nats = Estimate(nats.value, max(nats.low, 0.0), nats.high, nats.n)
        else:  # no group can be left out
            nats = Estimate(information(whole.of(covariance), level, m), 0.0, math.inf, len(rows))
        return Bound(
            cutoff=float(level),
            draws=m,
            nats=nats,
            others={name: information(whole.of(name), level, m) for name in COVARIANCES},
            unknown_law=unknown_law(size, level, m),
            capped=min(nats.value, math.log(known)),
            size=size,
            images=len(images),
        )

    return Leakage(
        covariance=covariance,
        shrinkage=whole.shrinkage,
        images=len(images),
        used=len(rows),
        size=size,
        candidates=known,
        bounds=tuple(bound(level, m) for level in levels for m in draws),
        identifies_below=cutoff_for(whole.of(covariance), math.log(known)) if known > 1 else math.inf,
    )


def check(levels: Sequence[float], draws: Sequence[int]) -> None:
    """Is there a bound for these?

    Raises:
      UserError: a level is not above 0, or a number of draws is not 1 or more.
    """
    for level in levels:
        if level == 0:
            raise UserError(
                "cutoff 0: is plain training, which sees the images: no bound; give levels above 0"
            )
        if not 0 < level < math.inf:
            raise UserError(f"cutoff {level:g}: must be a number above 0; useful values are 0.4 to 4")
    for m in draws:
        if m < 1:
            raise UserError(f"draws {m}: must be 1 or more; mdiff draws the noise of an image once")


# ----------------------------------------------------------------------------------------- of a run


@dataclass(frozen=True)
class Budget:
    """The cutoffs that a run trains with: what its noisy copies may tell, image by image.

    Attributes:
      levels: (cutoff, images) rising; images with one noisy copy, of which this is the least noisy version ever used.
        The same picture under two ids, or mirrored, has one copy and is counted once.
      clean: images without a cutoff at some time, which training sees as they are.
      exposed: images with copies of one noise at two levels, which give them away: x + s n and x + t n are two
        equations for two unknowns.
      epochs: times that an image is trained on.
      isometries: how many versions of an image the flips and shifts make. mdiff makes them of the finished copy.
      whole: True where the network never sees a clean image, so that the budget is that of the whole model.
    """

    levels: tuple[tuple[float, int], ...]
    clean: int
    exposed: int
    epochs: float
    isometries: int
    whole: bool

    def total(self, variances: np.ndarray, draws: float = 1) -> float:
        """Nats about all images that have one copy; there is no bound for those that are clean or exposed."""
        return sum(count * information(variances, level, draws) for level, count in self.levels)


def budget(cfg: config.Config, subset: Subset) -> Budget:
    """What the noisy copies of a run may tell.

    With `loss.cutoff_stages` the copies of an image are a random walk, x, y_s, y_t with s < t: a Markov chain, so that all of
    them together tell what the least noisy one does.

    Args:
      cfg: uses loss, data and train.
      subset: the run's images.
    """
    loss, data = cfg.loss, cfg.data
    if loss.cutoff_stages:
        each = np.full(len(subset.train), min(loss.cutoff_stages.values()), np.float64)
    else:
        # In float32 as training has them; the shortest decimal of each is what was asked for.
        each = np.array([float(str(level)) for level in cutoffs_lib.of_images(cfg, subset.origin)])
    if loss.clean == "always":
        each = np.zeros_like(each)
    if data.reading == "disk":  # too many to hash: each is taken for a picture of its own
        whose = np.arange(len(each))
    else:
        whose = np.unique(noise_keys(np.asarray(subset.train.x))[:, :2], axis=0, return_inverse=True)[1]
    own: dict[int, set[float]] = {}
    for picture, level in zip(whose.ravel(), each, strict=True):
        own.setdefault(int(picture), set()).add(float(level))
    clean = sum(0.0 in found for found in own.values())
    exposed = sum(len(found) > 1 and 0.0 not in found for found in own.values())
    single = [min(found) for found in own.values() if len(found) == 1 and 0.0 not in found]
    return Budget(
        levels=tuple((level, single.count(level)) for level in sorted(set(single))),
        clean=clean,
        exposed=exposed,
        epochs=cfg.train.steps * cfg.train.batch / len(subset.slots),
        isometries=(1 + data.flip) * (1 + 2 * data.shift) ** 2,
        whole=loss.clean == "never" and not clean and not exposed,
    )

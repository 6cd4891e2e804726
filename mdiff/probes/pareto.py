"""Two things wanted small at once: dominance, fronts, the area a front dominates, and how sure all of that is.

A point is a pair (x, y), each the smaller the better; turn the sign of what is wanted large. Point a dominates b if
it is no worse in both and better in one, so equal points do not dominate each other; the front is what nothing
dominates. The area is the hypervolume indicator in two dimensions (Zitzler & Thiele 1998, PPSN V). A point with a
NaN is not there: it dominates nothing and is on no front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from mdiff.types import Estimate

_ELEMENTS = 1 << 22  # pairs compared at once; bounds memory

Cells = Mapping[int, tuple[Estimate, Estimate]]
"""The cells of one setting: seed -> its two numbers."""


def dominates(points: np.ndarray) -> np.ndarray:
    """Which point dominates which.

    Args:
      points: [..., K, 2].

    Returns:
      bool [..., K, K]: entry [i, j] says that i dominates j.
    """
    one, other = points[..., :, None, :], points[..., None, :, :]
    return np.logical_and((one <= other).all(-1), (one < other).any(-1))


def on_front(points: np.ndarray) -> np.ndarray:
    """Which points nothing dominates.

    Args:
      points: [..., K, 2].

    Returns:
      bool [..., K].
    """
    count = points.shape[-2]
    flat = points.reshape(math.prod(points.shape[:-2]), count, 2)
    size = max(1, _ELEMENTS // max(1, count * count))
    parts = [~dominates(flat[i : i + size]).any(-2) for i in range(0, len(flat), size)]
    there = np.isfinite(points).all(-1)
    return np.concatenate(parts).reshape(there.shape) & there if parts else there


def staircase(points: np.ndarray) -> np.ndarray:
    """The front of points [K, 2] in the order of x, each place once; [F, 2]."""
    return np.unique(points[on_front(points)], axis=0)


def hypervolume(points: np.ndarray, reference: tuple[float, float]) -> np.ndarray:
    """The area that points dominate, up to a reference point; exact.

    Args:
      points: [..., K, 2]; one that is not better than the reference in both adds nothing.
      reference: (x, y), the worst of what counts.

    Returns:
      [...]: area in units of x times units of y.
    """
    worst = np.asarray(reference, np.float64)
    there = np.isfinite(points).all(-1, keepdims=True)
    clipped = np.where(there, np.minimum(points, worst), worst)
    order = np.argsort(clipped[..., 0], axis=-1)
    x, y = (np.take_along_axis(clipped[..., axis], order, -1) for axis in (0, 1))
    ends = np.broadcast_to(worst[0], (*x.shape[:-1], 1))
    widths = np.diff(np.concatenate([x, ends], -1), axis=-1)
    return (widths * (worst[1] - np.minimum.accumulate(y, axis=-1))).sum(-1)


# ------------------------------------------------------------------------------------------ over seeds


def over_seeds(
    cells: Sequence[Estimate],
    confidence: float = 0.95,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """The mean over seeds, with an interval for the mean of all seeds there could be.

    Student's interval over the cells. Where it is narrower than what the cells' own intervals alone leave open
    (every cell at 0 of n gives it no width at all), that is taken, on each side by itself.

    Args:
      cells: one number per seed.
      confidence: level of the result and of the cells' intervals.
      limits: between which the number lies by its nature.

    Returns:
      The mean; n is the number of seeds. One seed has no interval: NaN.
    """
    values = np.array([cell.value for cell in cells], np.float64)
    below = np.array([cell.value - cell.low for cell in cells], np.float64)
    above = np.array([cell.high - cell.value for cell in cells], np.float64)
    return _over_seeds(values, below, above, confidence, limits)


def difference(
    first: Mapping[int, Estimate], second: Mapping[int, Estimate], confidence: float = 0.95
) -> Estimate | None:
    """second - first, paired by seed, with an interval as of `over_seeds`; None when they share no seed.

    Pairing takes out what a seed does to both. The cells' own intervals are added as if independent.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    one, two = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    values = np.array([b.value - a.value for a, b in zip(one, two, strict=True)])
    below = [math.hypot(b.value - b.low, a.high - a.value) for a, b in zip(one, two, strict=True)]
    above = [math.hypot(b.high - b.value, a.value - a.low) for a, b in zip(one, two, strict=True)]
    return _over_seeds(values, np.array(below), np.array(above), confidence, (-math.inf, math.inf))


def _over_seeds(
    values: np.ndarray,
    below: np.ndarray,
    above: np.ndarray,
    confidence: float,
    limits: tuple[float, float],
) -> Estimate:
    count, value = len(values), float(np.mean(values))
    if count < 2:
        return Estimate(value, math.nan, math.nan, count)
    half = float(special.stdtrit(count - 1, 0.5 + confidence / 2) * np.std(values, ddof=1)) / math.sqrt(count)
    own = [math.sqrt(float(np.nansum(side**2))) / count for side in (below, above)]
    low, high = value - max(half, own[0]), value + max(half, own[1])
    return Estimate(value, max(low, limits[0]), min(high, limits[1]), count)


# ------------------------------------------------------------------------------------------- bootstrap


def draws(
    settings: Sequence[Cells], *, n_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> np.ndarray:
    """Means over seeds as they might have come out: seeds drawn again, and each cell within its interval.

    Settings with the same seeds share the draw of seeds, as they share what a seed decides. A cell's number is drawn
    from two halves of normal laws that its interval's two sides give; the two numbers of a cell independently.
    Seeds drawn again already carry a cell's own noise, so with several seeds this is a little too wide; with two
    or three seeds, of which the draw alone is too narrow by a third to a half of the variance, it should be.

    Args:
      settings: K settings, each with its cells.
      n_resamples: B.
      confidence: level of the cells' intervals.
      seed: of the draws.

    Returns:
      float64 [B, K, 2]; NaN for a setting without cells.
    """
    scale = float(special.ndtri(0.5 + confidence / 2))
    picked: dict[tuple[int, ...], np.ndarray] = {}
    noise = np.random.Generator(np.random.Philox([seed, 1]))
    found = np.full((n_resamples, len(settings), 2), np.nan)
    for k, cells in enumerate(settings):
        seeds = tuple(sorted(cells))
        if not seeds:
            continue
        if seeds not in picked:
            generator = np.random.Generator(np.random.Philox([seed, 2, *seeds]))
            picked[seeds] = generator.integers(0, len(seeds), (n_resamples, len(seeds)))
        for axis in (0, 1):
            rows = [cells[each][axis] for each in seeds]
            value, low, high = (
                np.array([getattr(row, name) for row in rows]) for name in ("value", "low", "high")
            )
            at = picked[seeds]
            z = noise.standard_normal(at.shape) / scale
            side = np.nan_to_num(np.where(z < 0, (value - low)[at], (high - value)[at]))
            found[:, k, axis] = (value[at] + z * side).mean(-1)
    return found


def reflected(
    value: float, drawn: np.ndarray, confidence: float = 0.95, least: float = -math.inf
) -> Estimate:
    """The basic bootstrap interval of a number with draws [B] (Davison & Hinkley 1997, eq. 5.6).

    For an area under a front: noise moves some points outwards, so an area of noisy points is too large, and that
    of its draws by as much again; reflecting the draws takes this out, where percentiles would double it.

    Args:
      value: the number.
      drawn: [B].
      confidence: level.
      least: which the number cannot be below.
    """
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(
        value, max(least, 2 * value - float(high)), max(least, 2 * value - float(low)), len(drawn)
    )

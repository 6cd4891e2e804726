"""Generations against one reference set: what each copies by every rule, and the numbers made of that.

`compare` looks at pictures and keeps what it finds per generation, so that generations of several seeds can be put
together before any number is made of them; `numbers` makes the numbers, and `beside` sets them beside a control's.

`ums_any_pair` is the UMS of arXiv 2410.02467, eq. 9, for comparison: every pair inside a band counts, so a generation can
be credited with many images, and UMS can exceed AMS.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from mdiff.config import Audit
from mdiff.features.pixel import Features, mirror
from mdiff.probes import intervals, sets, similarity, yields
from mdiff.probes.audit import COSINES, DISTANCES
from mdiff.probes.sets import Side
from mdiff.probes.yields_probe import BANDS
from mdiff.types import Estimate

VERDICTS = {
    "memorized": "the audit's ratio rule",
    "calibrated": "calibrated L2",
    "over_half": "cosine to the nearest image above 0.5 (arXiv 2212.03860)",
    "inauthentic": "nearer to a training image than that one is to the next (arXiv 2102.08921)",
}
"""Columns of verdicts, bool [Q]: what each counts as a copy."""
PERCENTILE = 0.95
"""Of the similarity to the nearest image."""
_EDGES = [(low, high) for _, low, high in BANDS]
_CURVES = (("cosine", "cosine", "cosine_nearest", COSINES), ("rms", "d1", "nearest", DISTANCES))


@dataclass(frozen=True)
class Compared:
    """Every generation compared with one reference set.

    Attributes:
      name: of the set.
      digest: of its pixels.
      labels: int64 [R], near-duplicate cluster of each image; a cluster counts as one image.
      columns: per generation [Q]: the verdicts of `VERDICTS`; `d1` and `nearest` (RMS distance to the nearest image, and
        its index), `ratio`, `cosine` and `cosine_nearest`. Indices are into `origin`.
      origin: int64 [R], index of each image in the set as given.
      any_pair: bool [bands,R], images with any generation inside the band.
    """

    name: str
    digest: str
    labels: np.ndarray
    columns: dict[str, np.ndarray]
    origin: np.ndarray
    any_pair: np.ndarray

    @property
    def clusters(self) -> int:
        """How many different images there are."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Against(Compared):
    """The same with its numbers.

    Attributes:
      estimates: rates, areas and counts by name; beside a control also with `_control` and `_excess`.
      rarefaction: expected number of different images copied, for each number of generations (its n).
      bands: one row per band of `BANDS`: AMS, UMS by nearest image, UMS by any pair.
      curves: "cosine" and "rms": lists over thresholds, of `similarity.ams_ums` and, beside a control, excess,
        excess_low and excess_high of AMS.
    """

    estimates: dict[str, Estimate]
    rarefaction: list[Estimate]
    bands: list[dict[str, Any]]
    curves: dict[str, dict[str, list[float]]]


def compare(rows: np.ndarray, in_space: np.ndarray, side: Side, space: Features, config: Audit) -> Compared:
    """Every rule, of every generation.

    Args:
      rows: [Q,D] generations in [-1, 1] (`features.pixel.flatten`).
      in_space: [Q,F] the same in the space of cosines.
      side: the reference set.
      space: of cosines.
      config: the rules.
    """
    near = similarity.nearest_with_flips(
        rows, side.rows, side.mirrored, max(2, config.neighbours), config.chunk
    )
    rule = functools.partial(
        similarity.ratio_test,
        references=side.rows,
        labels=side.labels,
        mirrored=side.mirrored,
        chunk=config.chunk,
        what=side.name,
    )
    ratio, spacing = rule(rows, neighbours=near), rule(side.rows).d2
    calibrated = similarity.calibrated_l2(near.dist, config.alpha, config.neighbours).value
    refs = [np.asarray(space(side.images), np.float64)]
    if config.flips:
        refs.append(np.asarray(space(mirror(side.images)), np.float64))
    cosine, at = similarity.cosine_nearest(in_space, np.concatenate(refs), chunk=config.chunk)
    first = near.index[:, 0]
    columns = {
        "memorized": ratio.ratio < config.ratio,
        "calibrated": calibrated < config.calibrated,
        "over_half": cosine > 0.5,
        "inauthentic": ~yields.authentic(ratio.d1, first, spacing),
        "d1": ratio.d1,
        "nearest": first,
        "ratio": ratio.ratio,
        "cosine": cosine,
        "cosine_nearest": at % len(side.images),
    }
    pairs = similarity.any_pair(in_space, refs, _EDGES, chunk=config.chunk)
    return Compared(side.name, sets.digest(side.images), side.labels, columns, side.origin, pairs)


def join(several: Sequence[Compared]) -> Compared:
    """Generations of several seeds, one after another; a set of images that occurs again is taken once."""
    starts: dict[str, int] = {}
    labels: list[np.ndarray] = []
    origins: list[np.ndarray] = []
    clusters = 0
    for one in several:
        if one.digest not in starts:
            starts[one.digest] = sum(map(len, labels))
            labels.append(one.labels + clusters)
            origins.append(one.origin)
            clusters += one.clusters
    any_pair = np.zeros((len(BANDS), sum(map(len, labels))), bool)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in several[0].columns}
    for one in several:
        start = starts[one.digest]
        any_pair[:, start : start + len(one.labels)] |= one.any_pair
        for name, column in one.columns.items():
            columns[name].append(column + start if name in ("nearest", "cosine_nearest") else column)
    return Compared(
        several[0].name,
        "+".join(starts),
        np.concatenate(labels),
        {name: np.concatenate(parts) for name, parts in columns.items()},
        np.concatenate(origins),
        any_pair,
    )


def numbers(compared: Compared, prompts: np.ndarray | None, config: Audit, at: Sequence[int]) -> Against:
    """Rates, counts, curves and bands, with their intervals.

    Args:
      compared: the generations.
      prompts: int [Q] or None, as in `extraction.score`.
      config: the rules.
      at: numbers of generations to rarefy to.
    """
    columns, labels = compared.columns, compared.labels
    level, q, copies = config.confidence, len(columns["d1"]), columns["memorized"]
    hits = np.bincount(labels[columns["nearest"][copies]], minlength=compared.clusters)
    found = {key: intervals.wilson(int(columns[key].sum()), q, level) for key in VERDICTS}
    found |= {key: _interval(columns["cosine"], key, config) for key in _STATISTICS}
    found["coverage"] = intervals.wilson(int((hits > 0).sum()), compared.clusters, level)
    found["unique_per_generation"] = _per(found["coverage"], q, q)
    if prompts is not None and (prompts >= 0).any():
        asked = len(np.unique(prompts[prompts >= 0]))
        answered = len(np.unique(prompts[(prompts >= 0) & copies]))
        found["unique_per_prompt"] = _per(found["coverage"], asked, q)
        found["prompts_with_copies"] = intervals.wilson(answered, asked, level)
    found["chao1"] = yields.chao1(hits, q, most=compared.clusters, confidence=level)
    curves = {
        kind: similarity.ams_ums(
            columns[best], columns[match], grid, labels=labels, distance=kind == "rms", confidence=level
        )
        for kind, best, match, grid in _CURVES
    }
    rarefied = yields.rarefaction(hits, q, np.array(at), confidence=level)
    return Against(
        **vars(compared),
        estimates=found,
        rarefaction=rarefied,
        bands=_bands(compared, level),
        curves=curves,
    )


def beside(one: Against, control: Against, config: Audit) -> Against:
    """With the control's numbers and the excess over it."""
    pairs = excess(one, control, config)
    found = dict(one.estimates)
    for key, pair in pairs.items():
        found |= {f"{key}_control": control.estimates[key], f"{key}_excess": pair}
    curves = {}
    for kind, column, _, grid in _CURVES:
        sign = -1 if kind == "rms" else 1
        mine, theirs = sign * one.columns[column], sign * control.columns[column]
        rows = [
            intervals.newcombe(mine >= tau, theirs >= tau, config.confidence)
            for tau in sign * np.asarray(grid)
        ]
        ends = {"excess": "value", "excess_low": "low", "excess_high": "high"}
        curves[kind] = one.curves[kind] | {k: [getattr(row, end) for row in rows] for k, end in ends.items()}
    return replace(one, estimates=found, curves=curves)


def excess(one: Against, other: Against, config: Audit) -> dict[str, Estimate]:
    """How much more the generations give away of one set than of another; see `extraction.excess_of`."""
    out = {
        key: intervals.newcombe(one.columns[key], other.columns[key], config.confidence) for key in VERDICTS
    }
    for key, statistic in _STATISTICS.items():
        a, b = statistic(one.columns["cosine"]), statistic(other.columns["cosine"])
        out[key] = intervals.bootstrap(
            lambda weights, a=a, b=b: a(weights) - b(weights),
            len(one.columns["cosine"]),
            n_resamples=config.bootstrap,
            confidence=config.confidence,
            seed=config.seed,
        )
    out["coverage"] = difference(one.estimates["coverage"], other.estimates["coverage"])
    return out


def difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second of two independent rates, from the limits of each (Newcombe 1998, Statistics in Medicine 17:873).

    Its n is the smaller one.
    """
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, low, high, min(first.n, second.n))


def _area(cosine: np.ndarray) -> intervals.Statistic:
    """The integral of AMS over thresholds 0..1: the share past a threshold, over all of them, is the mean similarity."""
    return intervals.mean(np.clip(cosine, 0.0, 1.0))


def _p95(cosine: np.ndarray) -> intervals.Statistic:
    order = np.argsort(cosine, kind="stable")
    ranked = cosine[order]

    def statistic(weights: np.ndarray) -> np.ndarray:
        reached = np.cumsum(weights[:, order], axis=1) >= PERCENTILE * weights.sum(1, keepdims=True) - 1e-9
        return ranked[reached.argmax(1)]

    return statistic


_STATISTICS = {"area": _area, "p95": _p95}


def _interval(cosine: np.ndarray, key: str, config: Audit) -> Estimate:
    statistic, n = _STATISTICS[key](cosine), len(cosine)
    if key == "p95":  # of order statistics, exact for any law; NaN where so few generations set no limit
        value = float(statistic(np.ones((1, n)))[0])
        limits = stats.quantile_test(cosine, p=PERCENTILE).confidence_interval(config.confidence)
        return Estimate(value, float(limits.low), float(limits.high), n)
    return intervals.bootstrap(
        statistic, n, n_resamples=config.bootstrap, confidence=config.confidence, seed=config.seed
    )


def _per(coverage: Estimate, denominator: int, most: int | None) -> Estimate:
    """Images copied, `most` of them at most, over another number than that of the images; may exceed 1."""
    scale = coverage.n / denominator
    high = coverage.high * scale if most is None else min(coverage.high * scale, most / denominator)
    return Estimate(coverage.value * scale, coverage.low * scale, high, denominator)


def _bands(compared: Compared, confidence: float) -> list[dict[str, Any]]:
    labels, best = compared.labels, compared.columns["cosine"]
    at = compared.columns["cosine_nearest"]
    found = yields.banded(best, at, _EDGES, labels=labels, confidence=confidence)
    rows = []
    for (name, low, high), (ams, ums), pairs in zip(BANDS, found, compared.any_pair, strict=True):
        images = intervals.wilson(int(pairs.sum()), len(labels), confidence)
        any_pair = _per(images, len(best), None)
        rows.append(
            {
                "band": name,
                "from": low,
                "to": min(high, 1.0),
                "ams": ams,
                "ums": ums,
                "ums_any_pair": any_pair,
            }
        )
    return rows

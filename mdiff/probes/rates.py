"""How well numbers per prompt find memorized prompts, against planted truth.

Published rates at 1 % false alarms are read off the ROC curve in two ways, which differ when few prompts are not memorized; both are
here. `nearest`: the point whose false-positive rate is closest to 1 %, which may be above it (arXiv 2403.11052, 2412.04140,
2601.20642). `below`: the last point whose false-positive rate is under 1 % (arXiv 2407.21720). Of points with the same
false-positive rate the highest counts, of two equally close ones the one with fewer false alarms.

Intervals resample prompts, memorized and other ones apart, so that they hold the threshold's own uncertainty. Where all resamples
agree (every prompt found) a bootstrap would claim certainty: at each end the interval is the wider of it and one that never has
zero width, Wilson's for a rate and that of `detectors.auroc`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from mdiff.errors import UserError
from mdiff.files import strict
from mdiff.probes import detectors, intervals
from mdiff.types import Estimate

TRUTHS = ("verbatim", "template", "none", "")
"""Memorized verbatim, memorized as a template, not memorized, and left out."""
GROUPS = {"verbatim": ("verbatim",), "template": ("template",), "both": ("verbatim", "template")}
"""Group -> truths that count as memorized; the others are always the prompts that are not."""


@dataclass(frozen=True)
class Found:
    """Share of memorized prompts found at one point of the ROC curve.

    Attributes:
      share: of the memorized prompts; n counts them. NaN in [0, 1] when there are none, or no others.
      false_alarms: share of the other prompts above the threshold there.
      threshold: scores from it on count as memorized; infinite when no score does.
    """

    share: Estimate
    false_alarms: float
    threshold: float


@dataclass(frozen=True)
class Rates:
    """How well one detector finds one group of memorized prompts.

    Attributes:
      name: of the detector.
      group: "verbatim", "template" or "both".
      memorized: how many prompts of the group there are.
      others: how many that are not memorized.
      auroc: chance that a memorized prompt scores above another one, ties half; n counts both.
      nearest: at the false-positive rate closest to the one asked for.
      below: at the last false-positive rate under it.
      false: false-positive rates of the ROC curve's corners, rising from 0 to 1; none when a side is empty.
      true: true-positive rates there.
    """

    name: str
    group: str
    memorized: int
    others: int
    auroc: Estimate
    nearest: Found
    below: Found
    false: tuple[float, ...]
    true: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """As a strict JSON tree: a NaN or an infinity is null."""
        tree: dict[str, Any] = strict(asdict(self))
        return tree

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Rates:
        """The inverse of `to_json`.

        Raises:
          UserError: the tree is no such record.
        """
        try:
            return Rates(
                name=str(tree["name"]),
                group=str(tree["group"]),
                memorized=int(tree["memorized"]),
                others=int(tree["others"]),
                auroc=_estimate(tree["auroc"]),
                nearest=_found(tree["nearest"]),
                below=_found(tree["below"]),
                false=tuple(float(each) for each in tree["false"]),
                true=tuple(float(each) for each in tree["true"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"rates of a detector: damaged record ({error}); run the detection again"
            ) from None


def evaluate(
    name: str,
    scores: np.ndarray,
    truth: np.ndarray,
    *,
    false_alarms: float = 0.01,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Rates]:
    """Evaluates one detector against planted truth.

    Args:
      name: of the detector.
      scores: [P], larger for what looks memorized (`prompted_run.Scored.suspicion`).
      truth: [P] of `TRUTHS`; "" leaves a prompt out.
      false_alarms: false-positive rate at which the share of found prompts is reported.
      confidence: level of the intervals.
      n_resamples: bootstrap resamples; 0 leaves the other intervals.
      seed: of the resamples: detectors evaluated on one truth share them.

    Returns:
      Group -> rates: verbatim, template, both.

    Raises:
      UserError: scores are not finite, the two are not of one length, or a truth is unknown.
    """
    scores, truth = np.asarray(scores, np.float64), np.asarray(truth)
    if scores.shape != truth.shape or scores.ndim != 1 or not len(scores):
        raise UserError(f"{name}: scores of shape {scores.shape} for truths {truth.shape}; give one each")
    unknown = sorted({str(each) for each in truth} - set(TRUTHS))
    if unknown:
        raise UserError(f"truth: {unknown[0]!r} is none of {', '.join(repr(each) for each in TRUTHS)}")
    if not 0 < false_alarms < 1:
        raise UserError(f"false_alarms = {false_alarms}: must be between 0 and 1, such as 0.01")
    broken = int(np.sum(~np.isfinite(scores)))
    if broken:
        raise UserError(f"{name}: {broken} of {len(scores)} scores are not finite; leave these prompts out")
    others = scores[truth == "none"]

    def rates(group: str, kinds: tuple[str, ...]) -> Rates:
        up = scores[np.isin(truth, kinds)]
        return _rates(name, group, up, others, false_alarms, confidence, n_resamples, seed)

    return {group: rates(group, kinds) for group, kinds in GROUPS.items()}


def _rates(
    name: str,
    group: str,
    up: np.ndarray,
    down: np.ndarray,
    false_alarms: float,
    confidence: float,
    n_resamples: int,
    seed: int,
) -> Rates:
    """One group: scores of its memorized prompts `up` [m] and of the others `down` [n]."""
    m, n = len(up), len(down)
    if not m or not n:
        nothing = Found(Estimate(math.nan, 0.0, 1.0, m), math.nan, math.nan)
        return Rates(
            name, group, m, n, Estimate(math.nan, 0.0, 1.0, m + n), nothing, nothing, false=(), true=()
        )
    both, memorized = np.concatenate([up, down]), np.arange(m + n) < m
    levels, place = np.unique(-both, return_inverse=True)  # the highest score first
    curve_up, curve_down = (_Counts.of(part, len(levels)) for part in (place[:m], place[m:]))

    def statistic(up_weights: np.ndarray, down_weights: np.ndarray) -> np.ndarray:
        hits, alarms = curve_up(up_weights), curve_down(down_weights)
        # Trapezoids: levels are the curve's corners, and ties are its slanted parts.
        area = np.sum(np.diff(alarms) * (hits[:, 1:] + hits[:, :-1]) / 2, axis=1) / (m * n)
        shares = [
            np.take_along_axis(hits, at[:, None], axis=1)[:, 0] / m for at in _points(alarms, n, false_alarms)
        ]
        return np.stack([area, *shares], axis=1)

    whole = statistic(np.ones((1, m)), np.ones((1, n)))[0]
    draws = intervals.resample(statistic, m, n, n_resamples=n_resamples, seed=seed).reshape(-1, 3)

    def widened(estimate: Estimate, column: int) -> Estimate:
        if not len(draws):
            return estimate
        boot = intervals.percentile(float(whole[column]), draws[:, column], estimate.n, confidence)
        if math.isnan(boot.low):  # one prompt: resamples say nothing
            return estimate
        return Estimate(
            estimate.value, min(estimate.low, boot.low), max(estimate.high, boot.high), estimate.n
        )

    hits, alarms = curve_up(np.ones((1, m))), curve_down(np.ones((1, n)))
    found = []
    for column, at in enumerate(_points(alarms, n, false_alarms), 1):
        point = int(at[0])
        share = widened(intervals.wilson(int(hits[0, point]), m, confidence), column)
        threshold = float(-levels[point - 1]) if point else math.inf
        found.append(Found(share, float(alarms[0, point]) / n, threshold))
    false, true, _ = roc_curve(memorized, both)
    return Rates(
        name=name,
        group=group,
        memorized=m,
        others=n,
        auroc=widened(detectors.auroc(both, memorized, confidence), 0),
        nearest=found[0],
        below=found[1],
        false=tuple(false.tolist()),
        true=tuple(true.tolist()),
    )


@dataclass(frozen=True, eq=False)
class _Counts:
    """How many prompts are above each level of the scores.

    Attributes:
      order: int [N], prompts from the highest level down.
      ends: int [K+1], how many of them are at the first k levels.
    """

    order: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(place: np.ndarray, levels: int) -> _Counts:
        """From each prompt's level, int [N] in 0..levels-1, 0 the highest."""
        order = np.argsort(place, kind="stable")
        return _Counts(order, np.searchsorted(place[order], np.arange(levels + 1)))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Weighted counts [B,K+1], from none to all, of weights [B,N]."""
        sums = np.cumsum(weights[:, self.order], axis=1)
        return np.concatenate([np.zeros((len(weights), 1)), sums], axis=1)[:, self.ends]


def _points(alarms: np.ndarray, n: int, wanted: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the ROC curve with false alarms [B,K+1] (counts of n) is read: `nearest` and `below`, indices [B] each."""
    away = np.round(np.abs(alarms - wanted * n), 9)
    first = np.take_along_axis(alarms, away.argmin(1)[:, None], axis=1)  # of equally close ones the lowest
    last = alarms.shape[1] - 1
    return (
        last - np.argmax((alarms == first)[:, ::-1], axis=1),
        last - np.argmax((alarms < wanted * n - 1e-9)[:, ::-1], axis=1),
    )


def _estimate(tree: Mapping[str, Any]) -> Estimate:
    return Estimate(
        **{name: math.nan if tree[name] is None else float(tree[name]) for name in ("value", "low", "high")},
        n=int(tree["n"]),
    )


def _found(tree: Mapping[str, Any]) -> Found:
    """Both infinite and unknown thresholds are null: without false-alarm rate it is unknown."""
    alarms = math.nan if tree["false_alarms"] is None else float(tree["false_alarms"])
    empty = math.nan if math.isnan(alarms) else math.inf
    threshold = empty if tree["threshold"] is None else float(tree["threshold"])
    return Found(_estimate(tree["share"]), alarms, threshold)

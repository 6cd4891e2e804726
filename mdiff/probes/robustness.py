"""Does a comparison of attacks hold whatever measure and threshold it is made by?

Methods whose generations were scored against the same reference sets (`probes.extraction`) are compared at every
threshold of AMS, and ranked by every measure. A conclusion that rests on a chosen threshold shows as a small share of
thresholds; measures that disagree show as a low rank correlation (Kendall 1938).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from mdiff.errors import UserError
from mdiff.files import strict
from mdiff.probes.against import Against, difference
from mdiff.probes.extraction import Scores
from mdiff.types import Estimate

METRICS = {
    "ams_area": "area under AMS over all thresholds of cosine",
    "p95": "95th percentile of the cosine to the nearest image",
    "over_half": "share above a cosine of 0.5",
    "memorized": "share by the ratio rule, d1 / d2 < 1/3",
    "calibrated": "share by calibrated L2",
    "inauthentic": "share that is not authentic",
    "unique": "different images copied by the ratio rule, per generation",
}
"""What methods are ranked by; the larger, the more was given away."""
_SOURCE = {"ams_area": "area", "unique": "unique_per_generation"}


@dataclass(frozen=True)
class Thresholds:
    """One method against the baseline at every threshold.

    Attributes:
      tau: thresholds.
      difference: method less baseline at each.
      above: share of all thresholds at which the interval lies above zero.
      below: share at which it lies below.
      idle: share at which both rates are 0 or both are 1, where no method can be better.
    """

    tau: list[float]
    difference: list[Estimate]
    above: float
    below: float
    idle: float


@dataclass(frozen=True)
class Robustness:
    """How far a comparison depends on its measure.

    Attributes:
      reference: the reference set.
      baseline: the method that others are compared with.
      metrics: metric -> method -> its number.
      thresholds: method -> curve -> `Thresholds`; curves are "cosine" and "rms" (AMS) and, with a control, "cosine_excess"
        and "rms_excess" (AMS less that of the control).
      agreement: (metric, metric) -> Kendall's tau-b of the rankings of the methods, NaN where a metric has all methods
        equal.
    """

    reference: str
    baseline: str
    metrics: dict[str, dict[str, float]]
    thresholds: dict[str, dict[str, Thresholds]]
    agreement: dict[tuple[str, str], float]


def compare(methods: Mapping[str, Scores], baseline: str, *, reference: str = "train") -> Robustness:
    """Compares methods by every measure.

    Differences are those of independent rates, from the limits of each (Newcombe 1998): with generations from the
    same noise in both methods they are a little too wide. An excess has Newcombe's paired interval within each method.

    Args:
      methods: name -> scores of its generations, two or more, against the same images by the same rules.
      baseline: one of them.
      reference: the reference set that is meant.

    Raises:
      UserError: fewer than two methods, no such baseline or reference, or other images, spaces or rules.
    """
    _check(methods, baseline, reference)
    one = {name: scores[reference] for name, scores in methods.items()}
    metrics = {
        metric: {name: each.estimates[_SOURCE.get(metric, metric)].value for name, each in one.items()}
        for metric in METRICS
    }
    curves = ["cosine", "rms"]
    if all("excess" in each.curves["cosine"] for each in one.values()):
        curves += ["cosine_excess", "rms_excess"]
    thresholds = {
        name: {curve: _over(each, one[baseline], curve) for curve in curves}
        for name, each in one.items()
        if name != baseline
    }
    return Robustness(reference, baseline, metrics, thresholds, agreement(metrics))


def agreement(metrics: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    """Kendall's tau-b between the rankings of methods by each pair of metrics (metric -> method -> number)."""
    names = list(metrics)
    columns = {name: list(metrics[name].values()) for name in names}
    return {
        (a, b): float(stats.kendalltau(columns[a], columns[b]).statistic)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def to_json(found: Robustness) -> dict[str, Any]:
    """As plain JSON; the agreement as rows of two metrics and their tau."""
    return strict(
        {
            "reference": found.reference,
            "baseline": found.baseline,
            "metrics": found.metrics,
            "thresholds": {
                name: {
                    curve: vars(each) | {"difference": [asdict(d) for d in each.difference]}
                    for curve, each in curves.items()
                }
                for name, curves in found.thresholds.items()
            },
            "agreement": [{"first": a, "second": b, "tau": tau} for (a, b), tau in found.agreement.items()],
        }
    )


def _over(method: Against, baseline: Against, curve: str) -> Thresholds:
    kind, excess = curve.removesuffix("_excess"), curve.endswith("_excess")
    names = ("excess", "excess_low", "excess_high") if excess else ("ams", "ams_low", "ams_high")
    sides = []
    for one in (method, baseline):
        n = len(one.columns["d1"])
        value, low, high = (one.curves[kind][name] for name in names)
        sides.append([Estimate(*row, n) for row in zip(value, low, high, strict=True)])
    found = [difference(a, b) for a, b in zip(*sides, strict=True)]
    ams = [one.curves[kind]["ams"] for one in (method, baseline)]
    same = [a == b and a in (0.0, 1.0) for a, b in zip(*ams, strict=True)]
    return Thresholds(
        tau=method.curves[kind]["tau"],
        difference=found,
        above=float(np.mean([d.low > 0 for d in found])),
        below=float(np.mean([d.high < 0 for d in found])),
        idle=float(np.mean(same)),
    )


def _check(methods: Mapping[str, Scores], baseline: str, reference: str) -> None:
    names: Sequence[str] = list(methods)
    if len(names) < 2 or baseline not in methods:
        raise UserError(
            f"methods: {', '.join(names) or 'none'}, baseline {baseline!r}; give the baseline and one or more others"
        )
    first = methods[baseline]
    for name, scores in methods.items():
        if reference not in scores.against:
            raise UserError(
                f"{name}: was not scored against {reference!r}; give one of {', '.join(scores.against)}"
            )
        if scores[reference].digest != first[reference].digest:
            raise UserError(
                f"{name}: was scored against other images of {reference!r} than {baseline}; score all alike"
            )
        if scores.space != first.space or scores.config != first.config:
            raise UserError(f"{name}: was scored by other rules than {baseline}; score all by one audit")

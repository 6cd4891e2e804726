"""What a search for neurons found, and what many searches say together.

Greedy elimination gives one set of neurons that is enough, not the only one: another order, other noises or another
prompt of the same image may give another. `stability` and `transfer` measure that, `random_control` shows what as many
arbitrary neurons do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mdiff.errors import UserError
from mdiff.probes import intervals
from mdiff.types import Estimate

CLOSE = 1e-5
"""Scores this near to the threshold may fall on its other side in another batch or on another device."""


@dataclass(frozen=True)
class Decision:
    """One test of the search.

    Attributes:
      stage: "initial" (D3); "layer" or "neuron" (D4); "prefix" and "verify" of fast mode; "ranked" of gradient mode.
      index: what was tested: the round, the layer, the neuron (of a prefix the last one), or how many ranked neurons.
      score: of the set that stayed off.
      threshold: tau or tau_ref.
      passed: initial and ranked: score <= threshold, the set is large enough; others: score < threshold, dropped.
    """

    stage: str
    index: int
    score: float
    threshold: float
    passed: bool


Reason = Literal["below tau", "tau not reached", "no candidate", "not memorized"]


@dataclass(frozen=True)
class Found:
    """What the search found for one prompt.

    Attributes:
      prompt: its number.
      mode: "exact", "fast" or "gradient".
      initial: neurons of the first set that brought the score to tau, or of the last one tried, in the order D2 gives.
      refined: those of them that remained, ascending.
      theta: the outlier threshold of the initial set; NaN where no outliers were asked for.
      top: largest activations per layer in it; in gradient mode the number of ranked neurons.
      tau: the wanted score.
      tau_ref: the score refinement stayed below: tau, or the score of the initial set if that never reached tau.
      score_initial: of the initial set.
      score: of the refined set.
      reason: why the initial set was taken; "not memorized": no seed was kept, "no candidate": nothing to switch off.
      evaluations: scores computed for this prompt, speculative ones included.
      rounds: calls of the score function that this prompt took part in.
      violations: fast mode: dropped when verified, which a monotone score forbids.
      decisions: every test of the sequential algorithm in order, also those whose score was known.
    """

    prompt: int
    mode: str
    initial: tuple[int, ...] = ()
    refined: tuple[int, ...] = ()
    theta: float = math.nan
    top: int = 0
    tau: float = math.nan
    tau_ref: float = math.nan
    score_initial: float = math.nan
    score: float = math.nan
    reason: Reason = "not memorized"
    evaluations: int = 0
    rounds: int = 0
    violations: int = 0
    decisions: tuple[Decision, ...] = ()

    @property
    def close(self) -> tuple[Decision, ...]:
        """Decisions that rounding could have turned (`CLOSE`)."""
        return tuple(d for d in self.decisions if abs(d.score - d.threshold) <= CLOSE)

    @staticmethod
    def load(saved: dict[str, Any]) -> Found:
        """The record from `dataclasses.asdict` of it, also when that went through JSON."""
        lists = {name: tuple(int(i) for i in saved[name]) for name in ("initial", "refined")}
        numbers = {
            name: math.nan if saved[name] is None else float(saved[name])
            for name in ("theta", "tau", "tau_ref", "score_initial", "score")
        }
        decisions = tuple(Decision(**d) for d in saved["decisions"])
        return Found(**{**saved, **lists, **numbers, "decisions": decisions})


def iou(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection over union of two sets of neurons; 1 for two empty ones, which agree."""
    union = len(set(a) | set(b))
    return len(set(a) & set(b)) / union if union else 1.0


@dataclass(frozen=True)
class Disagreement:
    """How two searches of one prompt differ.

    Attributes:
      prompt: its number.
      iou: intersection over union of the refined sets.
      missed: neurons only the reference has.
      extra: neurons only the other has.
      initial: intersection over union of the initial sets.
    """

    prompt: int
    iou: float
    missed: tuple[int, ...]
    extra: tuple[int, ...]
    initial: float

    @property
    def same(self) -> bool:
        """Neuron for neuron the same."""
        return not (self.missed or self.extra)


def disagreement(reference: Found, other: Found) -> Disagreement:
    """How the search `other` differs from `reference`, such as fast from exact mode."""
    if reference.prompt != other.prompt:
        raise UserError(f"records of prompts {reference.prompt} and {other.prompt}: compare the same prompt")
    a, b = set(reference.refined), set(other.refined)
    return Disagreement(
        prompt=reference.prompt,
        iou=iou(reference.refined, other.refined),
        missed=tuple(sorted(a - b)),
        extra=tuple(sorted(b - a)),
        initial=iou(reference.initial, other.initial),
    )


def stability(
    runs: Sequence[Sequence[Found]], *, n_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[Estimate, np.ndarray]:
    """How alike the neurons of a prompt are when it is searched again with other noises or in another order.

    A prompt counts if some run found neurons for it: agreeing on nothing is no sign of stability.

    Args:
      runs: two or more, each with one record of every prompt, in any order.
      n_resamples: bootstrap resamples of prompts.
      seed: of the bootstrap.
      confidence: level of the interval.

    Returns:
      Mean over prompts of the mean intersection over union of all pairs of runs, and float64 [P], that of each prompt
      by ascending number, NaN where no run found any.

    Raises:
      UserError: fewer than two runs, or runs of different prompts.
    """
    tables = [{r.prompt: r for r in run} for run in runs]
    if len(tables) < 2 or any(table.keys() != tables[0].keys() for table in tables):
        raise UserError(f"stability of {len(tables)} runs: must be two or more, of the same prompts")
    pairs = [(a, b) for i, a in enumerate(tables) for b in tables[i + 1 :]]
    each = np.full(len(tables[0]), np.nan)
    for i, prompt in enumerate(sorted(tables[0])):
        if any(table[prompt].refined for table in tables):
            each[i] = np.mean([iou(a[prompt].refined, b[prompt].refined) for a, b in pairs])
    values = each[~np.isnan(each)]
    if not len(values):
        return Estimate(math.nan, 0.0, 1.0, 0), each
    mean = intervals.bootstrap(
        intervals.mean(values), len(values), n_resamples=n_resamples, seed=seed, confidence=confidence
    )
    return mean, each


def frequency(records: Sequence[Found], n: int) -> np.ndarray:
    """int [N]: in how many prompts each of the `n` neurons was found. Their union is where it is above 0."""
    return np.bincount([i for r in records for i in r.refined], minlength=n)


@dataclass(frozen=True)
class Transfer:
    """What the neurons of some prompts say of those of others.

    Attributes:
      union: neurons of the known prompts, ascending: what would be pruned.
      covered: float [L], share of the other prompts' neurons (each prompt's counted) that are in the union, by layer; NaN
        where they have none.
      counted: int [L], how many neurons that share is of.
      overlap: float [L], intersection over union of both halves' unions, by layer; NaN where both are empty.
      complete: share of the other prompts all of whose neurons are in the union, of those that have any.
    """

    union: tuple[int, ...]
    covered: np.ndarray
    counted: np.ndarray
    overlap: np.ndarray
    complete: Estimate


def transfer(records: Sequence[Found], known: np.ndarray, layer: np.ndarray) -> Transfer:
    """Overlap per layer of the neurons of half of the prompts with those of each prompt of the other half.

    Args:
      records: one for each prompt, R in all.
      known: bool [R], the half whose neurons are taken together.
      layer: int [N], each neuron's layer.
    """
    if len(known) != len(records) or known.all() or not known.any():
        raise UserError(f"known: must be {len(records)} booleans, of which some are true and some false")
    n, size = len(layer), int(np.max(layer)) + 1
    mine = frequency([r for r, k in zip(records, known, strict=True) if k], n) > 0
    others = [r for r, k in zip(records, known, strict=True) if not k and r.refined]
    counts = frequency(others, n)
    counted = np.bincount(layer, weights=counts, minlength=size)
    both = np.bincount(layer, weights=mine & (counts > 0), minlength=size)
    either = np.bincount(layer, weights=mine | (counts > 0), minlength=size)
    with np.errstate(invalid="ignore"):
        covered = np.bincount(layer, weights=counts * mine, minlength=size) / counted
        overlap = both / either
    complete = intervals.wilson(sum(bool(mine[list(r.refined)].all()) for r in others), len(others))
    return Transfer(tuple(np.flatnonzero(mine).tolist()), covered, counted.astype(int), overlap, complete)


def random_control(
    neurons: Sequence[int], layer: np.ndarray, seed: int, *, avoid: Sequence[int] = ()
) -> tuple[int, ...]:
    """As many random neurons of the same layers, none of them among the found ones.

    Args:
      neurons: the found ones.
      layer: int [N], each neuron's layer.
      seed: of the draw.
      avoid: further neurons not to draw, such as the union over prompts.

    Returns:
      Neurons, ascending.

    Raises:
      UserError: a layer has too few others.
    """
    rng = np.random.default_rng(seed)
    drawn: list[int] = []
    free = np.ones(len(layer), bool)
    free[[*neurons, *avoid]] = False
    for number, count in zip(*np.unique(layer[list(neurons)], return_counts=True), strict=True):
        others = np.flatnonzero(free & (layer == number))
        if len(others) < count:
            raise UserError(
                f"random control: layer {number} has {len(others)} neurons beside the found ones, {count} are needed; "
                "use wider layers, or find fewer"
            )
        drawn += rng.choice(others, count, replace=False).tolist()
    return tuple(sorted(drawn))

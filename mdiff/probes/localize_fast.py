"""The search of NeMo with fewer scores, at the price of other neurons now and then.

Fast mode assumes that the score never falls when a neuron is switched on again. Then the removable prefix of the
remaining neurons has one end, found by doubling its length until the score is too high, then by bisection: per neuron
that stays, about twice the logarithm of the distance to the next, instead of the distance. Afterwards each neuron that
stayed is tested alone; one that can go contradicts the assumption and is counted. Where the assumption holds, the
neurons are those of exact mode.

Gradient mode replaces outliers by a ranking the caller supplies, such as |d score / d gate| of one backward pass. The
number of leading neurons whose ablation brings the score to tau is found by doubling and bisection, and only these are
refined, exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from mdiff.nemo import Nemo
from mdiff.probes import localize
from mdiff.probes.found import Found
from mdiff.probes.localize import Neurons, Start
from mdiff.probes.lockstep import Asked, Evaluate, Tests, run

Log = Callable[[int, float, bool], None]
"""`(m, score of make(m), whether it holds)`."""

EXPECTED = 8
"""Neurons between two that stay, as long as nothing is known: about 10 in NeMo's results."""


def longest(
    tests: Tests,
    make: Callable[[int], np.ndarray],
    n: int,
    holds: Callable[[float], bool],
    log: Log,
    first: int = 1,
) -> Asked:
    """The largest m in 0..n for which the set make(m) holds, if all smaller ones do too; 0 is taken to hold.

    Args:
      tests: the tests of the prompt.
      make: the set for m in 1..n.
      n: the largest m.
      holds: of a score.
      log: is told m, the score, and whether it holds.
      first: the first m that is tried, then its doubles.
    """
    low, high, size = 0, n + 1, first
    while high - low > 1:
        if high > n:
            points = [*itertools.takewhile(lambda m: m < n, (size << i for i in range(n.bit_length()))), n]
        else:
            # As many as are asked for in one round, evenly spread: bisection if that is one.
            parts = tests.width + 1
            points = sorted({max(low + (high - low) * i // parts, low + 1) for i in range(1, parts)})
        scores = yield from tests.until(chosen(make, points), len(points), lambda score: not holds(score))
        for m, score in zip(points, scores, strict=False):
            log(m, score, holds(score))
            low, high = (m, high) if holds(score) else (low, m)
    return low


def chosen(make: Callable[[int], np.ndarray], points: Sequence[int]) -> Callable[[int], np.ndarray]:
    """`i -> make(points[i])`."""
    return lambda i: make(points[i])


def refine(tests: Tests, start: Start, layer: np.ndarray, order: str) -> Asked:
    """Backward elimination by prefixes. Returns bool [N], what must stay off, and how often the score was not monotone."""
    layers = localize.by_layer(start.neurons, layer, order)
    off = yield from localize.eliminate(tests, "layer", layers, [int(layer[g[0]]) for g in layers], start)
    left = np.array([i for group in layers for i in group if off[i]], int)
    begin = stayed = 0

    def holds(score: float) -> bool:
        return score < start.tau_ref

    while begin < len(left):
        names = left[begin:]

        def log(m: int, score: float, held: bool, names: np.ndarray = names) -> None:
            tests.note("prefix", names[m - 1], score, start.tau_ref, held)

        make = less(off, names)
        # ln 2 of the mean distance: the first test is passed about every other time, which tells most.
        first = max(1, round(math.log(2) * (EXPECTED + begin - stayed) / (1 + stayed)))
        dropped = yield from longest(tests, make, len(names), holds, log, first)
        off = make(dropped)
        begin, stayed = begin + dropped + 1, stayed + 1
    kept = [np.array([i]) for i in left if off[i]]
    verified = yield from localize.eliminate(
        tests, "verify", kept, [int(g[0]) for g in kept], replace(start, off=off)
    )
    return verified, int((off & ~verified).sum())


def less(off: np.ndarray, neurons: np.ndarray) -> Callable[[int], np.ndarray]:
    """`m -> off` with the first m of these neurons switched on again."""

    def make(m: int) -> np.ndarray:
        out = off.copy()
        out[neurons[:m]] = False
        return out

    return make


def ranked(tests: Tests, order: np.ndarray, tau: float) -> Asked:
    """The shortest prefix of `order` [N] whose ablation brings the score to tau, if scores fall along it.

    Where none of the prefixes tried does, the one of the lowest score. Returns a `Start`.
    """
    tried: dict[int, float] = {}

    def log(m: int, score: float, held: bool) -> None:
        tried[m] = score
        tests.note("ranked", m, score, tau, not held)

    def make(m: int) -> np.ndarray:
        return tests.off(order[:m])

    short = yield from longest(tests, make, len(order), lambda score: score > tau, log)
    top = short + 1 if short < len(order) else min(tried, key=lambda m: (tried[m], m))
    reached = tried[top] <= tau
    return Start(
        neurons=order[:top],
        off=make(top),
        theta=math.nan,
        top=top,
        tau_ref=tau if reached else tried[top],
        score=tried[top],
        reason="below tau" if reached else "tau not reached",
    )


def fast(
    evaluate: Evaluate,
    activation: np.ndarray,
    neurons: Neurons,
    tau: float,
    cfg: Nemo,
    *,
    prompts: Sequence[int] | None = None,
    memorized: np.ndarray | None = None,
    rows: int = 0,
) -> Iterator[Found]:
    """The neurons that NeMo finds if scores are monotone, with fewer evaluations; arguments as `localize.exact`.

    `Found.violations` counts what contradicts monotone scores, as far as it was seen; `found.disagreement` with the
    exact record says what it changed.
    """
    prompts = localize.check(activation, neurons, tau, prompts, memorized)
    localize.thetas(cfg)

    def search(tests: Tests, prompt: int) -> Asked:
        start = yield from localize.initial(tests, activation[prompt], neurons, tau, cfg)
        off, violations = yield from refine(tests, start, neurons.layer, cfg.order)
        return localize.record(tests, start, off, tau, "fast", violations)

    return run(search, evaluate, len(neurons), "fast", cfg, prompts=prompts, memorized=memorized, rows=rows)


def gradient(
    evaluate: Evaluate,
    importance: np.ndarray,
    neurons: Neurons,
    tau: float,
    cfg: Nemo,
    *,
    prompts: Sequence[int] | None = None,
    memorized: np.ndarray | None = None,
    rows: int = 0,
) -> Iterator[Found]:
    """Neurons among the leading ones of a ranking, refined exactly, in each layer the least important first; or all leading ones.

    Args:
      evaluate: the score function.
      importance: float [P,N], larger is tried first, such as |d score / d gate|; equal ones by number.
      neurons: their layers; the statistics are not used.
      tau: score at or below which an image is not memorized.
      cfg: settings of the search; without `refine` the leading neurons are what is found.
      prompts: see `localize.exact`.
      memorized: see `localize.exact`.
      rows: see `localize.exact`.

    Yields:
      A record for each prompt when it is finished; its `top` is how many leading neurons were refined.
    """
    prompts = localize.check(importance, neurons, tau, prompts, memorized, what="importance")

    def search(tests: Tests, prompt: int) -> Asked:
        order = np.argsort(-np.asarray(importance[prompt], np.float64), kind="stable")
        start = yield from ranked(tests, order, tau)
        least = replace(start, neurons=start.neurons[::-1])
        off = start.off
        if cfg.refine:
            off = yield from localize.refine(tests, least, neurons.layer, cfg.order)
        return localize.record(tests, start, off, tau, "gradient")

    return run(
        search, evaluate, len(neurons), "gradient", cfg, prompts=prompts, memorized=memorized, rows=rows
    )

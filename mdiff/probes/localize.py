"""The search of NeMo: which neurons must be switched off so that a prompt no longer triggers its memorized image.

Written against a score function, so that it knows no network (arXiv 2406.02366, Alg. 1-4). The score of a set of
neurons is the similarity between the first noise difference of the whole network and that with the set switched off;
while it is large, the image is still memorized. For one prompt:

- outliers (D2): neurons whose activation lies more than theta standard deviations from its mean, and the k largest
  activations of each layer;
- initial set (D3): theta falls and k grows until the score of the whole set is tau or less;
- refinement (D4): backward elimination. Whole layers, then single neurons, are switched on again, in a fixed order and
  once each; what leaves the score below the reference is dropped from the set for good.

The result depends on the order, so an exact search must make the same decisions one after the other. It is still made
in batches, in two ways that change no decision. Each prompt's search is a generator that asks for scores, and all of
them move in lockstep: a batch holds the next test of every open prompt. And inside a prompt the next tests are known as
long as nothing fails (S - {a}, S - {a, b}, ...): they are asked for together, accepted up to the first failure, and the
search restarts behind it (`mdiff.probes.lockstep`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mdiff.errors import UserError
from mdiff.nemo import Nemo
from mdiff.probes.found import Found, Reason
from mdiff.probes.lockstep import Asked, Evaluate, Tests, run


@dataclass(frozen=True)
class Neurons:
    """The neurons that are searched.

    Attributes:
      mean: float [N], mean activation over ordinary prompts.
      std: float [N], its standard deviation.
      layer: int [N], number of the neuron's layer in the network's order, 0 first.
    """

    mean: np.ndarray
    std: np.ndarray
    layer: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)


def outliers(
    activation: np.ndarray, neurons: Neurons, theta: float, k: int, two_sided: bool = True
) -> np.ndarray:
    """Neurons that react unusually to a prompt (D2).

    A neuron without spread (std = 0) is an outlier whenever its activation differs from the mean at all.

    Args:
      activation: float [N].
      neurons: their statistics and layers.
      theta: standard deviations.
      k: how many of the largest activations each layer adds; the lower number first among equals.
      two_sided: also those below the mean.

    Returns:
      int [M], no neuron twice: layer by layer, in each the outliers ascending, then the largest by falling activation.
    """
    gap = np.asarray(activation, np.float64) - neurons.mean
    if two_sided:
        gap = np.abs(gap)
    far = np.where(neurons.std > 0, gap > theta * np.asarray(neurons.std, np.float64), gap > 0)
    out = []
    for number in np.unique(neurons.layer):
        members = np.flatnonzero(neurons.layer == number)
        largest = members[np.argsort(-np.asarray(activation)[members], kind="stable")[:k]]
        out += [members[far[members]], largest[~far[largest]]]
    return np.concatenate(out)


def thetas(cfg: Nemo) -> list[float]:
    """The thresholds of D3 in turn: from `theta` down in steps of `theta_step`, the last one `theta_min`."""
    if not (cfg.theta_step > 0 and cfg.theta >= cfg.theta_min > 0):
        raise UserError(
            f"nemo.theta = {cfg.theta:g}, theta_step = {cfg.theta_step:g}, theta_min = {cfg.theta_min:g}: "
            "must fall from theta to theta_min > 0 in steps above 0"
        )
    n = math.ceil((cfg.theta - cfg.theta_min) / cfg.theta_step - 1e-9)
    return [max(cfg.theta - i * cfg.theta_step, cfg.theta_min) for i in range(n)] + [cfg.theta_min]


@dataclass(frozen=True)
class Start:
    """The initial set, and the score to stay below.

    Attributes:
      neurons: int [M], in the order of D2.
      off: the same as bool [N].
      theta: see `Found`.
      top: see `Found`.
      tau_ref: see `Found`.
      score: of the set.
      reason: see `Found`.
    """

    neurons: np.ndarray
    off: np.ndarray
    theta: float
    top: int
    tau_ref: float
    score: float
    reason: Reason


def without(off: np.ndarray, groups: Sequence[np.ndarray]) -> Callable[[int], np.ndarray]:
    """`i -> off` with groups 0..i switched on again."""

    def make(i: int) -> np.ndarray:
        out = off.copy()
        out[np.concatenate(groups[: i + 1])] = False
        return out

    return make


def initial(tests: Tests, activation: np.ndarray, neurons: Neurons, tau: float, cfg: Nemo) -> Asked:
    """The first set of outliers whose score is tau or less, or the last set tried (D3). Returns a `Start`."""
    steps = thetas(cfg)

    def chosen(i: int) -> np.ndarray:
        return outliers(activation, neurons, steps[i], i * cfg.top, cfg.two_sided)

    scores = yield from tests.until(lambda i: tests.off(chosen(i)), len(steps), lambda score: score <= tau)
    for i, score in enumerate(scores):
        tests.note("initial", i, score, tau, score <= tau)
    last, score = len(scores) - 1, scores[-1]
    reason: Reason = "below tau" if score <= tau else "tau not reached"
    candidates = chosen(last)
    if not len(candidates):
        reason = "no candidate"
    tau_ref = tau if score <= tau else score
    return Start(candidates, tests.off(candidates), steps[last], last * cfg.top, tau_ref, score, reason)


def by_layer(neurons: np.ndarray, layer: np.ndarray, order: str) -> list[np.ndarray]:
    """The neurons of each layer that has any, deep or shallow layers first; inside a layer in the given order."""
    groups = [neurons[layer[neurons] == number] for number in np.unique(layer[neurons])]
    return groups[::-1] if order == "deep" else groups


def eliminate(
    tests: Tests, stage: str, groups: Sequence[np.ndarray], names: Sequence[int], start: Start
) -> Asked:
    """Switches groups of neurons on again, each for good if the score stays below the reference without it.

    Args:
      tests: the tests of the prompt.
      stage: for the log.
      groups: int arrays, in the order of the tests.
      names: their numbers, for the log.
      start: what is off before, and the reference.

    Returns:
      bool [N], what is still off.
    """
    off, begin = start.off, 0
    while begin < len(groups):
        make = without(off, groups[begin:])
        scores = yield from tests.until(make, len(groups) - begin, lambda score: score >= start.tau_ref)
        dropped = sum(score < start.tau_ref for score in scores)
        for i, score in enumerate(scores):
            tests.note(stage, names[begin + i], score, start.tau_ref, score < start.tau_ref)
        off = make(dropped - 1) if dropped else off
        begin += len(scores)
    return off


def refine(tests: Tests, start: Start, layer: np.ndarray, order: str) -> Asked:
    """Backward elimination of whole layers, then of neurons (D4). Returns bool [N], what must stay off."""
    layers = by_layer(start.neurons, layer, order)
    off = yield from eliminate(tests, "layer", layers, [int(layer[g[0]]) for g in layers], start)
    left = [np.array([i]) for group in layers for i in group if off[i]]
    names = [int(group[0]) for group in left]
    return (yield from eliminate(tests, "neuron", left, names, replace(start, off=off)))


def search(tests: Tests, activation: np.ndarray, neurons: Neurons, tau: float, cfg: Nemo) -> Asked:
    """The whole search of one prompt, exactly as the sequential algorithm. Returns a `Found`."""
    start = yield from initial(tests, activation, neurons, tau, cfg)
    off = yield from refine(tests, start, neurons.layer, cfg.order)
    return record(tests, start, off, tau, "exact")


def record(tests: Tests, start: Start, off: np.ndarray, tau: float, mode: str, violations: int = 0) -> Found:
    """The record of a finished search, its prompt not filled in."""
    return Found(
        prompt=-1,
        mode=mode,
        initial=tuple(start.neurons.tolist()),
        refined=tuple(np.flatnonzero(off).tolist()),
        theta=start.theta,
        top=start.top,
        tau=tau,
        tau_ref=start.tau_ref,
        score_initial=start.score,
        score=tests.score(off),
        reason=start.reason,
        evaluations=tests.evaluations,
        rounds=tests.rounds,
        violations=violations,
        decisions=tuple(tests.decisions),
    )


def exact(
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
    """The neurons that NeMo finds, neuron for neuron, for many prompts at once.

    Args:
      evaluate: the score function; called with up to `rows` sets.
      activation: float [P,N], of each prompt.
      neurons: statistics and layers of the neurons.
      tau: score at or below which an image is not memorized.
      cfg: settings of the search; its `width` 0 is 1 on CPU and 8 elsewhere.
      prompts: which rows of `activation` are searched, such as those a killed run has left; all by default.
      memorized: bool [P], whether a prompt has any kept seed; one without costs nothing. All by default.
      rows: sets in a call of `evaluate`; 0 is `cfg.batch`. Times the devices, if the function spreads them.

    Yields:
      A record for each prompt when it is finished, which is not the order of `prompts`.

    Raises:
      UserError: arguments that do not fit together, or a score that is not finite.
    """
    prompts = check(activation, neurons, tau, prompts, memorized)
    thetas(cfg)

    def search_of(tests: Tests, prompt: int) -> Asked:
        return search(tests, activation[prompt], neurons, tau, cfg)

    return run(
        search_of, evaluate, len(neurons), "exact", cfg, prompts=prompts, memorized=memorized, rows=rows
    )


def check(
    activation: np.ndarray,
    neurons: Neurons,
    tau: float,
    prompts: Sequence[int] | None,
    memorized: np.ndarray | None,
    what: str = "activation",
) -> Sequence[int]:
    """The prompts to search; raises a UserError for arguments that do not fit together."""
    if activation.ndim != 2 or activation.shape[1] != len(neurons):
        raise UserError(f"{what} has shape {list(activation.shape)}: must be [prompts, {len(neurons)}]")
    for name, values in (("mean", neurons.mean), ("std", neurons.std)):
        if (
            np.shape(values) != (len(neurons),)
            or not np.isfinite(values).all()
            or np.min(values, initial=0) < 0
        ):
            raise UserError(
                f"{name} of the neurons: must be {len(neurons)} finite numbers, 0 or more; calibrate again"
            )
    if not np.isfinite(activation).all():
        bad = np.flatnonzero(~np.isfinite(activation).all(1))[0]
        raise UserError(f"{what} of prompt {bad} is not finite; run in float32, or check the checkpoint")
    if not math.isfinite(tau):
        raise UserError(f"nemo.tau = {tau}: must be finite; calibrate on more prompts, or set it")
    if memorized is not None and np.shape(memorized) != (len(activation),):
        raise UserError(f"memorized has shape {list(np.shape(memorized))}: must be [{len(activation)}]")
    if prompts is None:
        return range(len(activation))
    for prompt in prompts:
        if not 0 <= prompt < len(activation):
            raise UserError(f"prompt {prompt}: there are {len(activation)} prompts, numbered from 0")
    return prompts

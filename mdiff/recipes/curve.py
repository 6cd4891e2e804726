"""What is measured while a model trains: memorization, its control, quality, and the loss gap by noise level.

The rows of `metrics.jsonl` it makes, all beginning with `eval/`; `_low` and `_high` are limits of intervals:

    memorized, control     share of the generations that the ratio rule calls copies of training, held-out images
    excess                 how much nearer generations are to training than to as many held-out images (RMS per pixel)
    quality                energy distance of the generations to held-out images, in the audit's feature space; low is good
    gap, gap@SIGMA         held-out over training error: geometric mean over the noise levels, and at each (`probes.gap`)
    n                      generations
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mdiff.features.pixel import flatten
from mdiff.features.spaces import make_features
from mdiff.nets.denoiser import Model
from mdiff.probes import audit as audits
from mdiff.probes import gap as gaps
from mdiff.probes import intervals, neighbours, quality, sets
from mdiff.recipes.generate import draw, make_generator
from mdiff.recipes.measure import audit_rules
from mdiff.recipes.runs import Experiment
from mdiff.sample import sampler
from mdiff.train import mesh
from mdiff.types import Array, Estimate, Evaluator, Params, to_float

MOST = 128
"""Images of each side that the loss gap is measured on."""
RESAMPLES = 200
"""Bootstrap resamples of quality while training."""


def memorization_curve(experiment: Experiment) -> Evaluator:
    """The evaluator a training loop is handed: `(averaged parameters, step) -> scalars`."""
    cfg, model, subset = experiment.config, experiment.model, experiment.subset
    n = cfg.train.eval_samples
    generate = make_generator(model, sampler.settings(cfg), subset.train.vector, mesh.make_mesh(cfg.mesh))
    measures = _of_generations(experiment)
    measure_gap = _gap_measure(experiment)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        images = draw(functools.partial(generate, params), n, min(n, cfg.sample.batch))
        scalars: dict[str, float] = {}
        for name, measure in measures.items():
            scalars |= _scalars(name, measure(images))
        if measure_gap is not None:
            found = measure_gap(params)
            scalars |= _scalars("gap", found.overall)
            for level, ratio in zip(found.levels, found.ratio, strict=True):
                scalars[f"eval/gap@{level:g}"] = ratio.value
        return {**scalars, "eval/n": float(n)}

    return evaluate


def _scalars(name: str, found: Estimate) -> dict[str, float]:
    return {f"eval/{name}": found.value, f"eval/{name}_low": found.low, f"eval/{name}_high": found.high}


def _of_generations(experiment: Experiment) -> dict[str, Callable[[np.ndarray], Estimate]]:
    """What is measured of generations uint8 [Q,H,W,C]; what depends on the real images alone is computed once."""
    subset, rules = experiment.subset, audit_rules(experiment.config)
    found: dict[str, Callable[[np.ndarray], Estimate]] = {}
    n, held = len(subset.train), len(subset.heldout)
    train = np.asarray(subset.train.x)
    if n >= 2:
        found["memorized"] = audits.ratio_rule(train, rules, "train", n)
    if held >= 2:
        heldout = np.asarray(subset.heldout.x)
        found["control"] = audits.ratio_rule(heldout, rules, "heldout", n)
        found["excess"] = _excess(
            train, sets.reference(heldout, rules, "heldout", n).images, rules.confidence
        )
        found["quality"] = _quality(experiment, train, heldout)
    return found


def _excess(train: np.ndarray, heldout: np.ndarray, confidence: float) -> Callable[[np.ndarray], Estimate]:
    """Distance to the nearest of M held-out images less that to the nearest of M training images."""
    size = min(len(train), len(heldout))  # a larger set is nearer by its size alone
    ours, theirs = flatten(train[:size]), flatten(heldout[:size])

    def excess(generated: np.ndarray) -> Estimate:
        rows = flatten(generated)
        nearer = neighbours.nearest(rows, theirs, 1)[0][:, 0] - neighbours.nearest(rows, ours, 1)[0][:, 0]
        return intervals.bootstrap(
            intervals.mean(nearer), len(nearer), n_resamples=RESAMPLES, confidence=confidence
        )

    return excess


def _quality(
    experiment: Experiment, train: np.ndarray, heldout: np.ndarray
) -> Callable[[np.ndarray], Estimate]:
    rules = audit_rules(experiment.config)
    space = make_features(rules, train, sets.reference(heldout, rules, "heldout", len(train)).images)
    reference = np.asarray(space(quality.thinned(heldout, rules.seed)), np.float64)

    def distance(generated: np.ndarray) -> Estimate:
        rows = quality.thinned(np.asarray(space(generated), np.float64), rules.seed)
        pairs = quality.energy(rows, reference)
        return intervals.bootstrap(
            pairs, *pairs.sizes, n_resamples=RESAMPLES, confidence=rules.confidence, seed=rules.seed
        )

    return distance


def _gap_measure(experiment: Experiment) -> Callable[[Params], gaps.Gap] | None:
    """The loss gap as a function of parameters; None where it is not asked for or cannot be measured."""
    cfg, subset = experiment.config, experiment.subset
    count = min(len(subset.train), len(subset.heldout), MOST)
    if count < 2 or not cfg.train.eval_levels:
        return None
    sides = (subset.train.take(np.arange(count)), subset.heldout.take(np.arange(count)))
    images = np.concatenate([np.asarray(side.x) for side in sides])
    entries: dict[str, np.ndarray] = {}
    for name in ("label", "vector"):
        columns = [getattr(side, name) for side in sides]
        if all(column is not None for column in columns):
            entries[name] = np.concatenate(columns)
    on = mesh.make_mesh(cfg.mesh)
    program = _gap_program(experiment.model, cfg.train.eval_levels, mesh.replicated(on))
    fixed = mesh.place(
        ({"x": images, "id": np.arange(2 * count, dtype=np.int32)}, entries), mesh.replicated(on)
    )

    def measure(params: Params) -> gaps.Gap:
        found = np.asarray(program(params, *fixed))
        return gaps.gap(found[:, :count], found[:, count:], cfg.train.eval_levels, cfg.audit.confidence)

    return measure


@functools.lru_cache(maxsize=8)  # the cells of a sweep share one compilation
def _gap_program(model: Model, levels: tuple[float, ...], whole: Any) -> Any:
    """Jitted `(params, {x, id}, entries of conditions) -> errors [L,N]`."""

    @functools.partial(jax.jit, out_shardings=whole)
    def program(params: Params, images: dict[str, Array], entries: dict[str, Array]) -> Array:
        x0 = to_float(images["x"])
        cond = model.condition(params, entries, n=len(x0))
        return gaps.errors(model.process, model.denoiser(params), x0, images["id"], levels, cond=cond)  # type: ignore[arg-type]

    return program

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
from jax.sharding import Mesh as DeviceMesh

from mdiff.features.pixel import flatten
from mdiff.features.spaces import make_features
from mdiff.keys import keys
from mdiff.nets.denoiser import Model
from mdiff.probes import audit as audits
from mdiff.probes import gap as gaps
from mdiff.probes import intervals, neighbours, quality, sets
from mdiff.probes.sets import Side
from mdiff.recipes.generate import draw, make_generator, own
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
    generate = make_generator(model, sampler.settings(cfg), own(subset.train), mesh.make_mesh(cfg.mesh))
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
        # As many of each: a larger set is nearer by its size alone.
        sides = ((train, "train", held), (heldout, "heldout", n))
        found["excess"] = _excess(*(sets.reference(x, rules, name, most) for x, name, most in sides))
        found["quality"] = _quality(experiment, train, heldout)
    return found


def _excess(train: Side, heldout: Side) -> Callable[[np.ndarray], Estimate]:
    """Distance to the nearest of M held-out images less that to the nearest of M training images."""

    def distance(rows: np.ndarray, side: Side) -> np.ndarray:
        return neighbours.nearest_with_flips(rows, side.rows, side.mirrored, 1).dist[:, 0]

    def excess(generated: np.ndarray) -> Estimate:
        rows = flatten(generated)
        nearer = distance(rows, heldout) - distance(rows, train)
        return intervals.bootstrap(
            intervals.mean(nearer), len(nearer), n_resamples=RESAMPLES, confidence=train.config.confidence
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
    columns: dict[str, np.ndarray] = {
        "x": np.concatenate([np.asarray(side.x) for side in sides]),
        "id": np.concatenate([side.id for side in sides]),  # of the source: an image's noise is its own
    }
    for name in ("label", "vector", "tokens"):
        found = [getattr(side, name) for side in sides]
        if all(column is not None for column in found):
            columns[name] = np.concatenate(found)
    on = mesh.make_mesh(cfg.mesh)
    program = _gap_program(experiment.model, cfg.train.eval_levels, on)
    # Equal parts, as large as a batch of generations may be; what they are filled up with is not read.
    parts = -(-2 * count // cfg.sample.batch)
    size = -(-2 * count // (parts * mesh.batch_devices(on))) * mesh.batch_devices(on)
    rows = np.minimum(np.arange(parts * size), 2 * count - 1).reshape(parts, size)
    placed = [
        mesh.place({name: column[part] for name, column in columns.items()}, mesh.replicated(on))
        for part in rows
    ]

    def measure(params: Params) -> gaps.Gap:
        wrong = np.concatenate([np.asarray(program(params, part)) for part in placed], axis=1)
        ours, theirs = wrong[:, :count], wrong[:, count : 2 * count]
        return gaps.gap(ours, theirs, cfg.train.eval_levels, cfg.audit.confidence)

    return measure


@functools.lru_cache(maxsize=8)  # the cells of a sweep share one compilation
def _gap_program(model: Model, levels: tuple[float, ...], on: DeviceMesh) -> Any:
    """Jitted `(params, {x uint8 [N,H,W,C], id, conditions}) -> errors [L,N]`, split over the devices by image."""

    @functools.partial(jax.jit, out_shardings=mesh.replicated(on))
    def program(params: Params, batch: dict[str, Array]) -> Array:
        batch = jax.lax.with_sharding_constraint(batch, mesh.batch_sharding(on))
        ids, x0 = batch["id"], to_float(batch["x"])
        entries = {name: column for name, column in batch.items() if name not in ("id", "x")}
        cond = model.condition(params, entries, n=len(ids))
        seen = None
        if model.damage is not None:  # such a model is asked as it was trained: through damage
            seen = model.damage.fresh(keys(0, "gap damage", ids), *model.shape[:2])
        denoiser = model.denoiser(params, seen=seen)
        with mesh.activations_on(on):
            return gaps.errors(model.process, denoiser, x0, ids, levels, cond=cond)  # type: ignore[arg-type]

    return program

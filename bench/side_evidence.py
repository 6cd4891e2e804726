"""Detectors, return rates, implicit labels and distances to the empirical optimum: results/side/evidence.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats
from side_common import ATTACK, SEEDS, attack, half, images, write
from side_labels import ARMS

from mdiff.console import Monitor
from mdiff.probes import detectors, divergence, extraction, implicit, pareto, returns
from mdiff.recipes import evidence as asked
from mdiff.recipes import guided
from mdiff.recipes import runs as recipe_runs
from mdiff.recipes import side as recipe
from mdiff.types import Estimate

STRENGTH = 8.0
"""Of the guided generations that are looked at."""
DETECT = (0.05, 0.1, 0.2, 0.5)
RETURN = (0.5, 1.0, 2.0, 4.0)
LOOK = (0.05, 0.2, 0.5, 1.0, 2.0)


def evidence(runs: Path, monitor: Monitor) -> None:
    """All of them, on the models of half A."""
    found: list[dict[str, Any]] = []
    for seed in SEEDS:
        target, folder = attack(runs, seed, "A", monitor)
        sets = images(runs, seed)
        drawn = {scale: guided.load(guided.path_of(folder / "guided", scale)) for scale in (0.0, STRENGTH)}
        references = {name: sets[name] for name in ("A", "C")}
        scores = {
            s: extraction.score(d["x"], references, ATTACK.audit, control="C") for s, d in drawn.items()
        }
        found.append(
            {
                "seed": seed,
                "detectors": {f"{s:g}": detected(target, drawn[s], scores[s]["A"].columns) for s in drawn},
                "returns": returned(target, drawn[STRENGTH]["x"], scores[STRENGTH]["A"].columns, sets),
                "implicit": looked(target, runs, seed),
            }
        )
        monitor.say(f"seed {seed}: detectors, returns and implicit labels measured")
    write(
        "evidence",
        {"strength": STRENGTH, "over seeds": over(found), "runs": found, "optimum": distances(runs, monitor)},
    )


def over(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of what the summary quotes."""

    def mean(pick: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        return asdict(pareto.over_seeds([Estimate(**pick(one)) for one in found]))

    one, half_sigma = RETURN.index(1.0), LOOK.index(0.5)
    first = found[0]
    return {
        "detectors": {
            name: mean(lambda run, name=name: run["detectors"][f"{STRENGTH:g}"][name]["auroc"])
            for name in first["detectors"][f"{STRENGTH:g}"]
        },
        "returns": {
            name: mean(lambda run, name=name: run["returns"]["home"][name][one])
            for name in first["returns"]["home"]
        },
        "implicit": {
            name: mean(lambda run, name=name: run["implicit"]["above"][name][half_sigma])
            for name in first["implicit"]["above"]
        },
    }


def detected(
    target: recipe.Target, drawn: dict[str, np.ndarray], columns: dict[str, np.ndarray]
) -> dict[str, Any]:
    """How well each detector finds the copies among generations, without training images."""
    rows = asked.detector_rows(target.model, target.params, asked.images_of(drawn["x"]), DETECT)
    if np.isfinite(drawn["gap"]).all():
        rows["gap"] = drawn["gap"]
    return {
        name: {
            "auroc": asdict(one.auroc),
            "found": asdict(one.found),
            "base": asdict(one.base),
            "precision": {str(k): asdict(each) for k, each in one.precision.items()},
        }
        for name, one in detectors.detect(rows, columns["memorized"]).items()
    }


def returned(
    target: recipe.Target, x: np.ndarray, columns: dict[str, np.ndarray], sets: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Do guided copies come back to the same training image when noised and denoised without guidance?"""
    copy = columns["memorized"]
    sampling = replace(ATTACK.sample, steps=18, method="heun")

    def back(given: np.ndarray) -> np.ndarray:
        return asked.noised_and_denoised(
            target.model, target.params, asked.images_of(given), RETURN, sampling
        )

    others = x[~copy][: len(sets["A"])]
    groups = {
        "hits": returns.Group(back(x[copy]), columns["nearest"][copy], sets["A"]),
        "training": returns.Group(back(sets["A"]), np.arange(len(sets["A"])), sets["A"]),
        "held-out": returns.Group(back(sets["C"]), np.arange(len(sets["C"])), sets["C"]),
        "guided, no copies": returns.Group(back(others), np.arange(len(others)), others),
    }
    one = returns.returns(groups, RETURN, sets["A"], ATTACK.audit)
    return {
        "levels": RETURN,
        "home": {name: [asdict(rate) for rate in rates] for name, rates in one.home.items()},
        "to training": {name: [asdict(rate) for rate in rates] for name, rates in one.training.items()},
    }


def looked(target: recipe.Target, runs: Path, seed: int) -> dict[str, Any]:
    """What the model's middle features say about digits it was never told, of images it never saw."""
    held = recipe_runs.reopen(half(runs, seed, "B")).subset.heldout  # after both halves
    shown = asked.images_of(np.asarray(held.x))
    untrained = target.model.init(jax.random.key(seed))
    rows = {
        "network": asked.features(target.model, target.params, shown, LOOK),
        "untrained": asked.features(target.model, untrained, shown, LOOK),
        "pixels": asked.noisy_pixels(target.model, shown, LOOK),
    }
    one = implicit.implicit(rows, np.asarray(held.label), LOOK)
    return {
        "levels": LOOK,
        "chance": asdict(one.chance),
        "accuracy": {name: [asdict(each) for each in found] for name, found in one.accuracy.items()},
        "above": {name: [asdict(each) for each in found] for name, found in one.above.items()},
        "nmi": {name: [asdict(each.nmi) for each in found] for name, found in one.labels.items()},
    }


def distances(runs: Path, monitor: Monitor) -> dict[str, Any]:
    """Distance to the empirical optimum, and Delta M of labelled models against the unlabelled one, beside what was memorized."""
    rows, delta = [], []
    for seed in SEEDS:
        plain: dict[str, np.ndarray] = {}
        for arm, where in ARMS.items():
            folder = runs / where.format(seed)
            if not (folder / "audit.json").is_file():
                continue
            made = recipe_runs.reopen(folder)
            params, _ = recipe_runs.load_params(folder, monitor)
            span = made.config.process
            levels = divergence.make_levels(0.02, span.sigma_max, 24)
            memorized = json.loads((folder / "audit.json").read_text())["estimates"]["memorized"]["value"]
            train, held = made.subset.train, made.subset.heldout.take(np.arange(len(made.subset.train)))
            apart = asked.optimum_errors(made.model, params, train, levels)
            one = divergence.optimum(*apart, levels)
            rows.append(
                {"seed": seed, "labels": arm, "memorized": memorized, "distance": asdict(one.distance)}
            )
            if made.config.data.labels in ("unique", "redrawn"):
                continue  # held-out images have no such label; a label drawn anew is none to ask with
            errors = {
                name: asked.elbo_errors(made.model, params, side, levels)
                for name, side in (("train", train), ("heldout", held))
            }
            if arm == "none":
                plain = errors
                continue
            ours = divergence.delta_m(
                errors["train"], plain["train"], levels, heldout=(errors["heldout"], plain["heldout"])
            )
            assert ours.heldout is not None and ours.excess is not None
            delta.append(
                {
                    "seed": seed,
                    "labels": arm,
                    "memorized": memorized,
                    "train": asdict(ours.train),
                    "heldout": asdict(ours.heldout),
                    "excess": asdict(ours.excess),
                }
            )
        monitor.say(f"seed {seed}: distances measured")
    return {
        "rows": rows,
        "memorized with distance": correlation([(r["memorized"], r["distance"]["value"]) for r in rows]),
        "delta_m": delta,
        "memorized with delta_m excess": correlation([(r["memorized"], r["excess"]["value"]) for r in delta]),
    }


def correlation(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Spearman's, with Fisher's interval (Bonett and Wright 2000, Psychometrika 65:23)."""
    if len(pairs) < 5:
        return {"value": None, "low": None, "high": None, "n": len(pairs)}
    rho = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    half_width = 1.96 * np.sqrt((1 + rho**2 / 2) / (len(pairs) - 3))
    low, high = (float(np.tanh(np.arctanh(np.clip(rho, -0.9999, 0.9999)) + s * half_width)) for s in (-1, 1))
    return asdict(Estimate(rho, low, high, len(pairs)))

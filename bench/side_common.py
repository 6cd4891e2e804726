"""What the parts of bench/side.py share: the targets, the attack, and numbers over seeds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mdiff import config
from mdiff.console import Monitor
from mdiff.fields import to_json
from mdiff.files import strict, write_json
from mdiff.probes import pareto
from mdiff.probes.against import Against
from mdiff.recipes import runs as recipe_runs
from mdiff.recipes import side as recipe
from mdiff.recipes import side_scores
from mdiff.recipes.side_scores import Strength
from mdiff.side import Classifier, Side, Surrogate

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "side"
TARGET = ROOT / "configs" / "side_digits8.py"
SEEDS = (0, 1, 2)
HALVES = {"A": 0, "B": 100}
"""Half of the data -> data.skip."""

ATTACK = Side(
    surrogate=Surrogate(n=2048, clusters=50),
    classifier=Classifier(width=32, blocks=(1, 1), steps=1000, lr=2e-3),
    scales=(0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    sample=config.Sample(n=512, batch=256, method="ddim", steps=25),
)
"""The attack of all parts."""


def half(runs: Path, seed: int, name: str) -> Path:
    """The run of one half."""
    return runs / f"halves{seed}" / "cells" / f"skip={HALVES[name]}"


def images(runs: Path, seed: int) -> dict[str, np.ndarray]:
    """Reference sets of a seed: both halves, C of neither as large, and R, the remaining ones, which quality is measured against."""
    halves = {name: recipe_runs.reopen(half(runs, seed, name)).subset for name in HALVES}
    beyond = np.asarray(halves["B"].heldout.x)  # it begins where B ends
    own = {name: np.asarray(subset.train.x) for name, subset in halves.items()}
    return {**own, "C": beyond[:100], "R": beyond[100:]}


def attack(
    runs: Path, seed: int, name: str, monitor: Monitor, cfg: Side = ATTACK, where: str = ""
) -> tuple[recipe.Target, Path]:
    """The attack on one half's model: its target and its folder, finished."""
    target, made = recipe.of_run(half(runs, seed, name), cfg, monitor)
    folder = runs / f"side{seed}" / f"{name}{where}"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = runs / f"side{seed}" / name / "synthetic.npz"
    if where and drawn.is_file() and not (folder / "synthetic.npz").is_file():
        shutil.copy(drawn, folder / "synthetic.npz")  # of one model: the same images
    known = None
    if cfg.surrogate.teacher == "oracle":
        train = made.subset.train
        known = np.asarray(train.x), np.asarray(train.label)
    recipe.attack(target, cfg, folder, monitor, known=known)
    return target, folder


def synthetic(folder: Path) -> np.ndarray:
    """The unguided images of an attack."""
    with np.load(folder / "synthetic.npz") as stored:
        found: np.ndarray = stored["x"]
    return found


def write(name: str, tree: dict[str, Any]) -> None:
    """Write results/side/NAME.json."""
    about = {
        "format": 1,
        "command": f"python bench/side.py {name}",
        "attack": to_json(ATTACK),
        "seeds": SEEDS,
    }
    write_json(OUT / f"{name}.json", strict({**about, **tree}))


SHOWN = ("memorized", "calibrated", "coverage", "area", "p95")


def over_seeds(found: Sequence[Against]) -> dict[str, Any]:
    """Means over seeds, and every seed's own."""
    out: dict[str, Any] = {}
    for key in SHOWN:
        for name in (key, f"{key}_excess"):
            each = [one.estimates[name] for one in found]
            out[name] = {**asdict(pareto.over_seeds(each)), "seeds": [asdict(one) for one in each]}
    return out


def slim(one: Strength, reference: str) -> dict[str, Any]:
    """A strength's numbers against one set, without curves."""
    tree = side_scores.to_json(one)
    mine = tree["scores"]["references"][reference]
    return {
        "scale": one.scale,
        "estimates": mine["estimates"],
        "rarefaction": mine["rarefaction"],
        "bands": mine["bands"],
        "repetition": tree["repetition"],
        "beside_unguided": tree["beside_unguided"],
        "quality": tree["quality"],
    }

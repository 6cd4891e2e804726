"""What labels do to memorization, and label noise as a mitigation: results/side/labels.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from side_common import SEEDS, write
from sklearn.linear_model import LogisticRegression

from mdiff.console import Monitor
from mdiff.data import source
from mdiff.features.pixel import flatten
from mdiff.probes import intervals, pareto
from mdiff.recipes import generate
from mdiff.recipes import runs as recipe_runs
from mdiff.types import Estimate

ARMS = {
    "none": "halves{}/cells/skip=0",
    "own": "labels{}/cells/labels=own",
    "clusters": "labels{}/cells/labels=clusters",
    "random 2": "random{}/cells/classes=2",
    "random 10": "labels{}/cells/labels=random",
    "random 50": "random{}/cells/classes=50",
    "redrawn 10": "labels{}/cells/labels=redrawn",
    "unique": "unique{}/cells/labels=unique",
    "own, noise 0.2": "noise{}/cells/label_noise=0.2",
    "own, noise 0.5": "noise{}/cells/label_noise=0.5",
}
"""Labels -> where their runs are. Noise 1 is random 10."""
NOISE = {"own": 0.0, "own, noise 0.2": 0.2, "own, noise 0.5": 0.5, "random 10": 1.0}


def labels(runs: Path, monitor: Monitor) -> None:
    """Memorized fraction, quality and entropy of the labels, by kind of label."""
    rows, by_arm = [], {}
    for arm, where in ARMS.items():
        cells: dict[str, dict[int, Estimate]] = {}
        entropies, missing = [], []
        for seed in SEEDS:
            folder = runs / where.format(seed)
            if not (folder / "audit.json").is_file():
                missing.append(seed)
                continue
            found = json.loads((folder / "audit.json").read_text())["estimates"]
            for key in ("memorized", "excess", "energy_heldout", "unique"):
                cells.setdefault(key, {})[seed] = Estimate(**found[key])
            entropies.append(entropy(folder))
            if arm in NOISE:
                cells.setdefault("obeyed", {})[seed] = obeyed(folder)
        by_arm[arm] = cells
        row: dict[str, Any] = {"labels": arm, "entropy": float(np.mean(entropies)) if entropies else None}
        for key, each in cells.items():
            own = [asdict(one) for one in each.values()]
            row[key] = {**asdict(pareto.over_seeds(list(each.values()))), "seeds": own}
        rows.append({**row, "seeds": [seed for seed in SEEDS if seed not in missing], "not run": missing})
        monitor.say(f"{arm}: measured")
    against = {
        arm: asdict(found)
        for arm in ARMS
        if arm != "none"
        and (found := pareto.difference(by_arm["none"]["memorized"], by_arm[arm]["memorized"]))
    }
    # Random labels alone: their entropy is all that differs. "redrawn" tells nothing, so it counts as none.
    names = ("none", "random 2", "random 10", "random 50", "unique")
    pairs = [
        (row["entropy"], one["value"])
        for row in rows
        if row["labels"] in names
        for one in row["memorized"]["seeds"]
    ]
    trend = stats.spearmanr(*zip(*pairs, strict=True))
    fixed = pareto.difference(by_arm["redrawn 10"]["memorized"], by_arm["random 10"]["memorized"])
    write(
        "labels",
        {
            "rows": rows,
            "over none": against,
            "random 10 over redrawn 10": None if fixed is None else asdict(fixed),
            "trend with entropy": {
                "spearman": float(trend.statistic),
                "p": float(trend.pvalue),
                "n": len(pairs),
            },
            "mitigation": mitigation(rows),
            "conditional accuracy by": "logistic regression on the held-out digits, asked for the class of each generation",
        },
    )


def entropy(folder: Path) -> float:
    """H(Y) of the training labels in nats; 0 without labels, and where they are drawn anew: those tell nothing of the image."""
    made = recipe_runs.reopen(folder)
    if not made.config.net.classes or made.config.data.labels == "redrawn":
        return 0.0
    share = np.bincount(made.subset.train.label) / len(made.subset.train)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def obeyed(folder: Path) -> Estimate:
    """Share of generations that an outside classifier takes for the class they were asked for."""
    made = recipe_runs.reopen(folder)
    generated, _ = generate.load(folder)
    held = made.subset.heldout
    truth = source.load("digits", 8).label[held.id]  # whatever the run was told
    judge = LogisticRegression(max_iter=2000).fit(flatten(np.asarray(held.x)), truth)
    asked = np.arange(len(generated)) % made.config.net.classes
    return intervals.wilson(int((judge.predict(flatten(generated)) == asked).sum()), len(generated))


def mitigation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Memorization, quality and obedience over the share of labels replaced, and which points another one beats in all."""
    points = []
    for row in rows:
        if row["labels"] in NOISE:
            values = {key: row[key] for key in ("memorized", "energy_heldout", "obeyed")}
            points.append({"noise": NOISE[row["labels"]], **values})

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        signs = {"memorized": 1, "energy_heldout": 1, "obeyed": -1}
        less = [sign * (a[key]["value"] - b[key]["value"]) for key, sign in signs.items()]
        return max(less) <= 0 and min(less) < 0

    for point in points:
        point["dominated"] = any(beats(other, point) for other in points if other is not point)
    return sorted(points, key=lambda point: point["noise"])

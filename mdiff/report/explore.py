"""What the page needs to be explored: every row's numbers, the pictures not yet on it, and the sliders.

All of it is made here, so that the page's script picks numbers and never computes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdiff.probes import intervals
from mdiff.report import figures, words
from mdiff.report.collect import Run
from mdiff.types import Estimate

ROWS = 20_000
"""Generations whose numbers are on the page, at most: those with the lowest ratio."""

_SIDES = (("train", "training images"), ("heldout", "held-out images"))
_START = {"cosine": 0.9, "rms": 0.05}
_GRID = np.round(np.arange(1, 101) / 100, 2)  # ratios the slider stops at, beside the rules' own

SLIDERS = {
    "ratio": ("Move the threshold", "ratio below", ("generations",)),
    "cosine": ("Move the threshold", "τ =", ("AMS(τ)", "UMS(τ)", "different images")),
    "rms": ("Move the threshold", "δ =", ("AMS(δ)", "UMS(δ)", "different images")),
}
"""Label of each slider, what its value is, and the columns of its table."""


def pairs(run: Run) -> dict[str, Any] | None:
    """The numbers of a run's generations, lowest ratio first; None without an `audit.npz`.

    Returns:
      Columns of equal length: index, and those of ratio, d1, cosine, id (of the nearest image), memorized,
      mirrored (both 0 or 1) that there are; `total`, the number of generations.
    """
    ratio = run.arrays.get("ratio")
    if ratio is None:
        return None
    order = np.argsort(ratio, kind="stable")[:ROWS]
    found: dict[str, Any] = {"total": len(ratio), "index": order.tolist()}
    for name, column in (
        ("ratio", "ratio"),
        ("d1", "d1"),
        ("cosine", "cosine"),
        ("id", "nearest_id"),
        ("memorized", "memorized"),
        ("mirrored", "flipped"),
    ):
        values = run.arrays.get(column)
        if values is None or len(values) != len(ratio):
            continue
        picked = values[order]
        if picked.dtype == bool:
            found[name] = picked.astype(int).tolist()
        elif np.issubdtype(picked.dtype, np.floating):
            found[name] = [float(f"{x:.4g}") if math.isfinite(x) else None for x in picked]
        else:
            found[name] = picked.tolist()
    return found


def sliders(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The sliders that some run has numbers for, by name.

    Returns:
      Per slider: `at`, the thresholds it stops at, as numbers; `text`, the same as shown; `start`, where it
      stands first; and `rows`, one per run and side with `run` (number), `side`, `n`, `cells`
      (per column of `SLIDERS` one text per threshold, "" where the run has none) and `marks` (per figure
      the numbers themselves).
    """
    made = {"ratio": _ratios(runs), **{space: _curves(runs, space) for space in ("cosine", "rms")}}
    return {name: slider for name, slider in made.items() if slider["rows"]}


def _ratios(runs: Sequence[Run]) -> dict[str, Any]:
    """Share of generations with a ratio below each threshold, counted again from the rows."""
    cuts = sorted({*_GRID.tolist(), *words.thresholds(runs)})
    rows = []
    for number, run in enumerate(runs):
        for column, (_, label) in zip(("ratio", "control_ratio"), _SIDES, strict=True):
            values = run.arrays.get(column)
            if values is None:
                continue
            level = run.rule("confidence") or 0.95
            found = [intervals.wilson(int((values < cut).sum()), len(values), level) for cut in cuts]
            rows.append(
                {
                    "run": number,
                    "side": label,
                    "n": len(values),
                    "cells": [[_share(one) for one in found]],
                    "marks": {"ratio": [one.value for one in found]},
                }
            )
    rules = words.thresholds(runs)
    start = cuts.index(rules[0]) if rules else len(cuts) // 3
    return {"at": cuts, "text": [words.fraction(cut) for cut in cuts], "start": start, "rows": rows}


def _curves(runs: Sequence[Run], space: str) -> dict[str, Any]:
    """AMS and UMS, at the thresholds the audits measured them at and no others."""
    trees = [
        (number, run, label, tree)
        for number, run in enumerate(runs)
        for side, label in _SIDES
        if (tree := ((run.audit.get("curves") or {}).get(space) or {}).get(side)) and tree.get("tau")
    ]
    taus = sorted({tau for *_, tree in trees for tau in tree["tau"]})
    rows = []
    for number, run, label, tree in trees:
        n = run.estimates["memorized"].n
        place = {tau: k for k, tau in enumerate(tree["tau"])}
        columns: list[list[str]] = []
        marks = {}
        for kind in ("ams", "ums"):
            if kind not in tree:
                continue
            marks[f"{space}-{kind}"] = [tree[kind][place[tau]] if tau in place else None for tau in taus]
            columns.append([_at(tree, kind, place, tau, n) for tau in taus])
        if "unique" in tree:
            columns.append([f"{tree['unique'][place[tau]]:.0f}" if tau in place else "" for tau in taus])
        rows.append({"run": number, "side": label, "n": n, "cells": columns, "marks": marks})
    start = min(range(len(taus)), key=lambda k: abs(taus[k] - _START[space]), default=0)
    return {"at": taus, "text": [f"{tau:g}" for tau in taus], "start": start, "rows": rows}


def _at(tree: Mapping[str, Any], kind: str, place: Mapping[float, int], tau: float, n: int) -> str:
    if tau not in place:
        return ""
    k = place[tau]
    found = [tree[name][k] if name in tree else None for name in (kind, f"{kind}_low", f"{kind}_high")]
    middle, low, high = (math.nan if x is None else float(x) for x in found)
    value = Estimate(middle, low, high, n)
    return _share(value) if kind == "ams" else " ".join(words.shown(value, "distance")).strip()


def _share(value: Estimate) -> str:
    return " ".join(words.shown(value, "rate")).strip()


def view(runs: Sequence[Run], made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each slider as the template shows it before anybody moves it."""
    return {
        name: {
            "label": SLIDERS[name][0],
            "symbol": SLIDERS[name][1],
            "columns": SLIDERS[name][2][: max(len(row["cells"]) for row in slider["rows"])],
            "last": len(slider["at"]) - 1,
            "start": slider["start"],
            "text": slider["text"][slider["start"]],
            "rows": [
                {
                    "run": {"name": runs[row["run"]].name, "color": figures.color(row["run"])},
                    "side": row["side"],
                    "n": f"{row['n']:,}",
                    "cells": [texts[slider["start"]] for texts in row["cells"]],
                }
                for row in slider["rows"]
            ],
        }
        for name, slider in made.items()
    }

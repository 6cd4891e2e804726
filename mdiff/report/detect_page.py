"""The page of detectors of memorized prompts, `detect.html`, written from its files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdiff.errors import UserError
from mdiff.files import locate, write_text
from mdiff.report import detect_figures, parts, words
from mdiff.report.parts import Row

READS = 1
"""Format of `detect.json` that this page is made from."""
GROUPS = {"all": "all", "verbatim": "verbatim", "template": "template"}
"""What detectors are asked to find: name in the file -> on the page."""
SHOWN = 6
"""Detectors with a column in the table of prompts: the best."""
IMAGES = 4
"""Generations of a prompt shown."""
_NEEDED = {
    *(
        "command",
        "target",
        "settings",
        "detectors",
        "prompts",
        "truth",
        "curve",
        "verdict",
        "versions",
        "arrays",
    ),
}


def write(out: Path) -> Path:
    """Write the page of the detection in `out`.

    Args:
      out: its folder, with `detect.json` and `detect.npz`.

    Returns:
      The page.

    Raises:
      UserError: one of them is missing, damaged, or not of this detection.
    """
    out = locate(out)
    tree, arrays = parts.read(out / "detect.json", READS, _NEEDED, "mdiff detect")
    _check(out / "detect.npz", tree, arrays)
    ordered, settings = best_first(tree["detectors"]), tree["settings"]
    groups = [name for name in GROUPS if any(one["groups"][name] for one in ordered)]
    shown = ordered[:SHOWN]
    html = parts.render(
        "detect.html",
        "detect.json",
        title=f"Prompts known by heart: {tree['target']['name']}",
        facts=_facts(tree),
        verdict=tree["verdict"],
        truth=tree["truth"],
        level=f"{100 * settings['confidence']:g}\N{NO-BREAK SPACE}%",
        alarms=f"{100 * settings['false_alarms']:g}\N{NO-BREAK SPACE}%",
        groups=[_group(name, ordered) for name in groups],
        detectors=[_detector(one, groups) for one in ordered],
        needs=[_needs(one) for one in ordered],
        rocs=[
            (GROUPS[name], parts.uris(detect_figures.roc(ordered, arrays, name, settings["false_alarms"])))
            for name in groups
        ],
        curve=_curve(tree),
        scores=parts.uris(detect_figures.scores(ordered, tree["prompts"])),
        strips=_strips(tree["prompts"], arrays),
        names=[one["name"] for one in shown],
        others=len(ordered) - len(shown),
        prompts=[_prompt(row, shown) for row in _suspicious(tree["prompts"], ordered)],
        notes=_notes(tree, groups),
        settings=parts.flat(settings),
        provenance=_provenance(tree),
    )
    write_text(out / "detect.html", html)
    return out / "detect.html"


def best_first(detectors: Sequence[Row]) -> list[Row]:
    """Detectors by the AUROC of all memorized prompts, else of a group; those without come last, as they were."""

    def place(one: Row) -> float:
        values = [one["groups"][name] for name in GROUPS]
        return next(
            (-each["auroc"]["value"] for each in values if each and each["auroc"]["value"] is not None),
            math.inf,
        )

    return sorted(detectors, key=place)


def _check(path: Path, tree: Row, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where an array is missing."""
    curves = [
        f"roc_{one['name']}_{name}_{end}"
        for one in tree["detectors"]
        for name in GROUPS
        if one["groups"][name] is not None
        for end in ("fpr", "tpr")
    ]
    again = "; run mdiff detect again, which makes it anew"
    for name in [*curves, *(["image_prompt", "train"] if "images" in arrays else [])]:
        if name not in arrays:
            raise UserError(f"{path}: has no {name}{again}")
    if "images" in arrays and len(arrays["images"]) != len(arrays["image_prompt"]):
        raise UserError(
            f"{path}: has images of {len(arrays['images'])} prompts and {len(arrays['image_prompt'])} names{again}"
        )


def _facts(tree: Row) -> str:
    target, settings = tree["target"], tree["settings"]
    step = f"step {target['step']:,}; " if isinstance(target.get("step"), int) else ""
    return (
        f"{step}trained on {target['train']:,} images; {len(tree['detectors'])} detectors on {len(tree['prompts']):,} prompts, "
        f"{settings['seeds']} noises each"
    )


def _group(name: str, ordered: Sequence[Row]) -> dict[str, Any]:
    """A group of memorized prompts, as the head of its columns."""
    there = next(one["groups"][name] for one in ordered if one["groups"][name])
    return {"name": GROUPS[name], "positives": there["positives"], "negatives": there["negatives"]}


def _detector(one: Row, groups: Sequence[str]) -> dict[str, Any]:
    """A row of the tables of detectors, with cells for each group."""
    found = [one["groups"][name] or {} for name in groups]
    return {
        "name": one["name"],
        "what": one["what"],
        "auroc": [parts.number(each.get("auroc"), "score") for each in found],
        "found": [
            parts.number(each.get(key), "rate") for key in ("tpr_nearest", "tpr_below") for each in found
        ],
        "seconds": parts.plain(one["seconds"]),
    }


def _needs(one: Row) -> dict[str, Any]:
    needs = one["needs"]
    marks = ["yes" if needs[name] else "" for name in ("attention", "jvp", "guidance")]
    return {
        "name": one["name"],
        "what": one["what"],
        "sign": "larger" if one["sign"] > 0 else "smaller",
        "marks": marks,
        "calls": parts.plain(needs["calls"], f"{needs['calls']:,}"),
        "seconds": parts.plain(one["seconds"]),
    }


def _curve(tree: Row) -> dict[str, Any] | None:
    """P(copy | copies), its plot and what it says; None where the copies are not known."""
    found = tree["curve"]
    if found is None:
        return None
    r50, slope = found["r50"], parts.number(found["slope"], "count")
    within = "The data do not say at how many copies half the generations recite."
    if r50["value"] is not None:
        low, high = (None if r50[end] is None else f"{r50[end]:,.3g}" for end in ("low", "high"))
        within = (
            f"Half the generations recite at r50 = {r50['value']:,.3g} copies "
            f"[{low or 'no lower end'}, {high or 'no upper end'}]; the logit grows by {slope['value']} {slope['interval']} for ten "
            "times the copies."
        )
        if not found["low"] <= r50["value"] <= found["high"]:
            within += f" That is outside of the {found['low']:,} to {found['high']:,} copies there are: an extrapolation."
    rungs = [
        {"copies": int(copies), "n": value["n"], "cell": parts.number(value, "rate")}
        for copies, value in found["rungs"].items()
    ]
    return {
        "text": within,
        "plots": parts.uris([detect_figures.recited(found, tree["prompts"])]),
        "rungs": rungs,
    }


# -------------------------------------------------------------------------------------------- the prompts


def _strips(prompts: Sequence[Row], arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A few prompts: training images, where they are known, and generations."""
    if "images" not in arrays:
        return []
    out = []
    for images, place in zip(arrays["images"], arrays["image_prompt"].tolist(), strict=True):
        row, cells = prompts[place], []
        own = row.get("own") or []
        if own:
            text = f"seen {row['copies']:,}×"
            cells.append(
                parts.sheet(arrays["train"][own[:IMAGES]], "training image" + "s" * (len(own) > 1), text)
            )
        share = row["recited"]
        told = "" if share is None else f"{100 * share:.0f}\N{NO-BREAK SPACE}% copies"
        cells.append(parts.sheet(images[:IMAGES], "generations", told))
        out.append({"prompt": row["prompt"], "text": row["kind"], "cells": cells})
    return out


def _suspicious(prompts: Sequence[Row], ordered: Sequence[Row]) -> list[Row]:
    """Prompts by the share of copies, then by the best detector's score."""
    first = ordered[0] if ordered else None

    def place(row: Row) -> tuple[float, float]:
        score = row["scores"].get(first["name"]) if first else None
        share = -1.0 if row["recited"] is None else row["recited"]
        return -share, math.inf if score is None or first is None else -first["sign"] * score

    return sorted(prompts, key=place)


def _prompt(row: Row, shown: Sequence[Row]) -> dict[str, Any]:
    share = row["recited"]
    return {
        "prompt": row["prompt"],
        "kind": row["kind"],
        "copies": parts.plain(row["copies"] or None, f"{row['copies']:,}"),
        "recited": parts.ABSENT if share is None else parts.plain(share, words.percent(share)),
        "scores": [parts.plain(row["scores"].get(one["name"])) for one in shown],
    }


def _notes(tree: Row, groups: Sequence[str]) -> list[str]:
    """What these numbers cannot say."""
    if not groups:
        return [
            "Which prompts are memorized is not known here, so no detector is evaluated: the scores only rank the prompts, each "
            "detector by itself."
        ]
    negatives = max(
        one["groups"][name]["negatives"]
        for one in tree["detectors"]
        for name in groups
        if one["groups"][name]
    )
    wanted = tree["settings"]["false_alarms"]
    notes = [
        "Detectors were compared on this model and on prompts whose images were planted. Ordinary captions of another model may be "
        "harder to tell from memorized ones.",
        "The order of detectors is that of these prompts; where intervals overlap much, it is not shown.",
        "Thresholds are read off the same prompts that the rates are counted on; the intervals resample prompts, and hold that.",
        "Seconds are those of this machine, at this size; calls of the network are the same everywhere.",
    ]
    if negatives * wanted < 1:
        notes.append(
            f"With {negatives} prompts that are not memorized one false alarm is {100 / negatives:.2g} %, more than the "
            f"{100 * wanted:g} % asked for: the two ways to read the rate there differ."
        )
    return notes


def _provenance(tree: Row) -> list[tuple[str, str]]:
    return [
        ("command", tree["command"]),
        *((f"model: {name}", str(value)) for name, value in tree["target"].items()),
        *((name, str(value)) for name, value in tree["versions"].items()),
    ]

"""The page of an attack, `side.html`, written from its files alone."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdiff.errors import UserError
from mdiff.files import locate, write_text
from mdiff.probes import clusters as clustering
from mdiff.recipes import guided
from mdiff.report import parts, side_figures, words
from mdiff.report.html import data_uri
from mdiff.report.parts import Row
from mdiff.types import Estimate

READS = 1
"""Format of `side.json` that this page is made from."""
MEMBERS, OPEN, FOLDED = 8, 24, 96
"""Images shown of a cluster; clusters shown, the largest; how many more are folded away."""
COPIES, RANDOM = 24, 12
"""Generations shown: the strongest copies, and those drawn at random."""
_SMALL, _LARGE = 48, 112  # pixels; what is wider than the first is shrunk to the second
_AGAIN = "; run mdiff side again, which makes it anew"
_WHOLE = {
    *("target", "settings", "surrogate", "classifier", "membership", "chosen", "oracle", "strengths"),
    *("detector", "verdict", "versions", "arrays", "command"),
}
_TEACHERS = {
    "clusters": "clusters of them",
    "shuffled": "clusters of them, dealt at random: a control",
    "model": "the attacked model itself, as a classifier",
    "oracle": "a classifier trained on the real images, which no attacker has",
}


def write(out: Path) -> Path:
    """Write the page of the attack in `out`.

    Args:
      out: the attack's folder, with `side.json`, `side.npz`, `synthetic.npz`, `guided/` and, where it clustered,
        `clusters.json` and `clusters.npz`.

    Returns:
      The page.

    Raises:
      UserError: one of them is missing, damaged, or not of this attack.
    """
    out = locate(out)
    tree, arrays = parts.read(out / "side.json", READS, _WHOLE, "mdiff side")
    scale = tree["chosen"] or tree["oracle"]
    levels = {one["scores"]["audit"]["confidence"] for one in tree["strengths"]}
    html = parts.render(
        "side.html",
        "side.json",
        title=f"Extraction from {tree['target']['name']}",
        facts=_facts(tree),
        verdict=tree["verdict"],
        attack=_attack(tree),
        surrogate=_surrogate(out, tree),
        knowledge=_knowledge(tree),
        curves=parts.uris(side_figures.over_strength(tree)),
        level=" and ".join(f"{100 * level:g}\N{NO-BREAK SPACE}%" for level in sorted(levels)),
        pictures=_pictures(out, tree, arrays, scale),
        copies=[_copies_row(one, tree) for one in tree["strengths"]],
        quality=[_quality_row(one, tree) for one in tree["strengths"]],
        images=tree["strengths"][0]["scores"]["references"]["train"]["different"],
        thresholds=parts.uris(side_figures.thresholds(tree, scale)),
        detector=_detector(tree),
        notes=_notes(tree),
        provenance=[(name, str(value)) for name, value in tree["versions"].items()],
    )
    write_text(out / "side.html", html)
    return out / "side.html"


# ------------------------------------------------------------------------------------------ the files


def _columns(path: Path, n: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names of a file of images, one row for each of `n`."""
    again = "; delete it and run mdiff side again, which draws it anew"
    if not path.is_file():
        raise UserError(f"{path}: no such file{_AGAIN}")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            found = {name: stored[name] for name in names}
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path}: is damaged{again}") from None
    if len(found["x"]) != n:
        raise UserError(f"{path}: holds {len(found['x'])} images where side.json counts {n}{again}")
    return found


# ------------------------------------------------------------------------------------------- the attack


def _facts(tree: Row) -> str:
    target, about = tree["target"], tree["settings"]
    step = f"step {target['step']:,}; " if isinstance(target.get("step"), int) else ""
    heldout = f"{target['heldout']:,} held-out images" if target["heldout"] else "no held-out images"
    return (
        f"{step}trained on {target['train']:,} images, compared with {heldout}; {about['sample']['n']:,} generations at "
        f"each of {len(tree['strengths'])} strengths"
    )


def _attack(tree: Row) -> list[tuple[str, str]]:
    """What was done, as a table."""
    about, surrogate = tree["settings"], tree["surrogate"]
    classifier, adapter, sample = about["classifier"], about["adapter"], about["sample"]
    seen = "noisy images" if classifier["timed"] else "clean images only (not told the noise)"
    guide = f"a classifier of {seen}: {classifier['arch']}, {classifier['steps']:,} steps"
    if adapter["rank"]:
        guide = f"low-rank adapters of the model, rank {adapter['rank']}, {adapter['steps']:,} steps"
    return [
        ("the attacker drew", f"{about['surrogate']['n']:,} unguided images from the model"),
        ("labelled by", _TEACHERS[surrogate["teacher"]] + f"; {surrogate['classes']} classes"),
        ("learned from", f"{surrogate['images']:,} of these images"),
        ("guided by", guide),
        ("sampler", f"{sample['method']}, {sample['steps']} steps, seed {sample['seed']}"),
        ("command", tree["command"]),
    ]


def _surrogate(out: Path, tree: Row) -> dict[str, Any] | None:
    """The clusters: a sheet of those kept, the largest first. None where something else labelled."""
    about = tree["surrogate"]["clusters"]
    if not about:
        return None
    images = _columns(out / "synthetic.npz", about["images"], ("x",))["x"]
    labels = clustering.load(out).labels
    if len(labels) != len(images):
        raise UserError(
            f"{out / 'clusters.npz'}: labels {len(labels)} images, and synthetic.npz has {len(images)}{_AGAIN}"
        )
    settings, kept = tree["settings"]["surrogate"], [one for one in about["clusters"] if one["kept"]]
    order = np.argsort(-np.array(about["members"]), kind="stable")[: OPEN + FOLDED]
    sheet = []
    for k in order:
        members = images[np.flatnonzero(labels == k)[:MEMBERS]]
        own, labelled = kept[k]["size"], about["members"][k]
        less = f" ({own} its own)" if labelled != own else ""
        sheet.append(
            {
                "uri": data_uri(_strip(members), MEMBERS * _LARGE, MEMBERS * (_SMALL + 4)),
                "pixels": images.shape[2] <= _SMALL,
                "share": 100 * len(members) / MEMBERS,
                "text": f"{labelled} images{less}, cohesion {kept[k]['cohesion']:.2f}",
                "alt": f"{len(members)} images of cluster {k}",
            }
        )
    text = (
        f"{about['kept']} of {about['found']} clusters of {about['images']:,} unguided images (space: {about['space']}) are kept: "
        f"cohesive to {settings['cohesion']:g} and of {settings['min_size']} images or more."
    )
    if about["found"] > about["kept"]:
        out_of = f"out, {about['images'] - about['labelled']:,} of them"
        where = "to the nearest kept cluster" if settings["dropped"] == "reassign" else out_of
        text += f" Images of the others went {where}."
    if tree["surrogate"]["teacher"] == "shuffled":
        text += " Labels were then dealt at random, so the rows below have no common content: this is the control."
    plot = side_figures.clusters(about["clusters"], settings["cohesion"], settings["min_size"])
    shown = {"open": sheet[:OPEN], "folded": sheet[OPEN:], "left": len(kept) - len(sheet)}
    return {"text": text, "plots": parts.uris([plot]), **shown}


def _strip(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W,C] side by side, with a white gap."""
    n, height, width, channels = images.shape
    gap = max(1, width // 16)
    canvas = np.full((height, n * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        canvas[:, i * (width + gap) : i * (width + gap) + width] = image
    return canvas


def _knowledge(tree: Row) -> dict[str, Any]:
    """What the classifier knows of its labels, and of the training images."""
    found, surrogate = tree["classifier"], tree["surrogate"]
    if found is None:
        return {"plots": [], "text": "Adapters guide this attack: there is no classifier to measure."}
    members = surrogate["clusters"].get("members") or [1] * surrogate["classes"]
    text = f"Measured on {found['accuracy'][0]['n']:,} labelled images that it did not learn from, noised to each level."
    if tree["membership"] is not None:
        text += (
            " Asked about real images, its confidence tells training from held-out ones with an AUROC of "
            f"{Estimate(**tree['membership'])}, where 0.5 is guessing; it has seen neither."
        )
    else:
        text += " There are no held-out images, so what it knows of the training images is not measured."
    return {"plots": parts.uris(side_figures.knowledge(found, max(members) / sum(members))), "text": text}


# ----------------------------------------------------------------------------------------- the pictures


def _pictures(out: Path, tree: Row, arrays: Mapping[str, np.ndarray], scale: float) -> dict[str, Any]:
    """Guided images beside their nearest training images, and what the same noise gives without guidance."""
    n = tree["settings"]["sample"]["n"]
    names, folder = ("x", "id", "label", "finite"), out / "guided"
    drawn, plain = (_columns(guided.path_of(folder, each), n, names) for each in (scale, 0.0))
    nearest, ratio, copied = (arrays[f"{name}_{scale:g}"] for name in ("nearest", "ratio", "memorized"))
    unguided = dict(zip(plain["id"].tolist(), plain["x"], strict=True))

    def item(i: int) -> dict[str, Any]:
        image, twin = drawn["x"][i], arrays["train"][nearest[i]]
        shown = [
            (image, f"Generation {drawn['id'][i]}"),
            (twin, f"Its nearest training image, {arrays['train_id'][nearest[i]]}"),
        ]
        if scale:
            shown.append((unguided[int(drawn["id"][i])], "The same noise, unguided"))
        return {
            "images": [{"uri": data_uri(each, _LARGE, _SMALL), "alt": alt} for each, alt in shown],
            "pixels": max(image.shape[:2]) <= _SMALL,
            "copied": bool(copied[i]),
            "finite": bool(drawn["finite"][i]),
            "ratio": words.distance(float(ratio[i])) if math.isfinite(ratio[i]) else "–",
            "id": str(arrays["train_id"][nearest[i]]),
            "cluster": str(drawn["label"][i]),
        }

    best = strongest(nearest, ratio, copied)
    random = np.random.Generator(np.random.Philox(0)).choice(n, min(RANDOM, n), replace=False)
    different = len(np.unique(nearest[copied]))
    said = f"{int(copied.sum())} of {n:,} generations at strength {scale:g} are copies, of {different} different training images."
    if not copied.any():
        said = f"None of {n:,} generations at strength {scale:g} is a copy; these come nearest to one."
    why = "which the attacker would choose"
    if not tree["chosen"]:
        why = "which has most copies: the attacker would choose none" if scale else "the model alone"
    return {
        "scale": f"{scale:g}",
        "why": why,
        "said": said,
        "rule": words.fraction(tree["settings"]["audit"]["ratio"]),
        "guided": bool(scale),
        "best": [item(i) for i in best],
        "random": [item(i) for i in np.sort(random)],
    }


def strongest(
    nearest: np.ndarray, ratio: np.ndarray, copied: np.ndarray, most: int = COPIES, least: int = 6
) -> np.ndarray:
    """Which generations show best what was copied: copies first, one for each training image before a second, by ratio.

    Args:
      nearest: int [N], the training image nearest to each.
      ratio: float [N], distance to it over that to its neighbours; not finite for a generation that is not.
      copied: bool [N], the verdict.
      most: how many at most.
      least: filled up to so many with what is no copy.

    Returns:
      int [K], indices.
    """
    finite = np.isfinite(ratio)
    order = np.lexsort((np.where(finite, ratio, np.inf), ~copied))
    seen: dict[int, int] = {}
    turn = np.zeros(len(nearest), np.int64)  # the how-manieth of its training image it is
    for i in order:
        turn[i] = seen.get(int(nearest[i]), 0)
        seen[int(nearest[i])] = int(turn[i]) + 1
    order = order[np.lexsort((turn[order], ~copied[order]))]
    return order[finite[order]][: min(most, max(least, int(copied.sum())))]


# ------------------------------------------------------------------------------------------- the numbers


def _copies_row(one: Row, tree: Row) -> dict[str, Any]:
    found = one["scores"]["references"]["train"]["estimates"]
    count = found["coverage"]["value"] * found["coverage"]["n"]
    cells = [
        parts.number(found["memorized"], "rate"),
        parts.number(found.get("memorized_control"), "rate"),
        parts.number(found.get("memorized_excess"), "rate"),
        {"value": f"{count:.0f}", "interval": "", "sort": count},
        parts.number(found["unique_per_generation"], "rate"),
        parts.number(found.get("unique_per_prompt"), "count"),
        parts.number(found["coverage"], "rate"),
        parts.number(found["chao1"], "count"),
    ]
    return _row(one, tree, cells)


def _quality_row(one: Row, tree: Row) -> dict[str, Any]:
    repetition, beside, quality = one["repetition"], one["beside_unguided"], one["quality"]
    spread = {"value": f"{beside['spread']:.2f}", "interval": "", "sort": beside["spread"]}
    cells = [
        parts.number(repetition["grouped"], "rate"),
        parts.number(repetition["excess"], "cosine"),
        parts.number(beside["precision"], "rate"),
        spread if beside["spread"] is not None else parts.ABSENT,
        parts.number(quality.get("energy"), "distance"),
        parts.number(quality.get("precision"), "rate"),
        parts.number(quality.get("recall"), "rate"),
    ]
    return _row(one, tree, cells)


def _row(one: Row, tree: Row, cells: Sequence[Row]) -> dict[str, Any]:
    named = (("chosen", tree["chosen"]), ("most copies", tree["oracle"]))
    marks = [word for word, scale in named if scale == one["scale"] and (scale or word != "chosen")]
    told = ", ".join(marks + ["the model alone"] * (one["scale"] == 0))
    return {"scale": f"{one['scale']:g}", "on": bool(marks), "marks": told, "cells": cells}


def _detector(tree: Row) -> str:
    found = tree["detector"]
    if found is None:
        return (
            "Whether the surrogate gap, how hard the classifier had to push, tells copies from other generations is not measured: that "
            "takes a chosen strength above 0 with both among its generations."
        )
    text = (
        "The surrogate gap, how hard the classifier had to push, tells copies from other generations at the chosen strength with "
        f"an AUROC of {Estimate(**found['auroc'])}, where 0.5 is guessing."
    )
    for k, share in found["precision"].items():
        value, interval = words.shown(Estimate(**share), "rate")
        text += f" Of its {k} most suspicious {value} {interval} are copies."
    return text + f" Of all, {words.percent(found['base']['value'])} are."


def _notes(tree: Row) -> list[str]:
    """What these numbers cannot say."""
    notes = list(dict.fromkeys(note for one in tree["strengths"] for note in one["scores"]["notes"]))
    mine = [
        "A copy under guidance does not by itself show that the model kept it and not the classifier: the crossed design of "
        "bench/side.py asks that.",
        f"The strength with most copies is the best of {len(tree['strengths'])}, found with the training images: its rate is "
        "high by that choice, and no attacker knows it.",
        "Intervals cover fresh generations of this model and this classifier, not another training of either, and not the choice "
        "of the strength. All strengths start from the same noise.",
    ]
    if not tree["target"]["heldout"]:
        mine.append("Without held-out images nothing says how often the rules call a copy by chance.")
    return [note if note.endswith(".") else f"{note}." for note in notes] + mine

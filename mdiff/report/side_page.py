"""The page of an attack, `side.html`, written from its files alone."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mdiff import __version__
from mdiff.errors import UserError
from mdiff.files import locate, write_text
from mdiff.probes import clusters as clustering
from mdiff.probes import stamped
from mdiff.recipes import guided
from mdiff.report import side_figures
from mdiff.report.front_figures import png
from mdiff.report.html import embedded_json, encode, environment, read_asset, script

SHOWN = 24
"""Generations in each picture."""
_AGAIN = "; run mdiff side again, which makes it anew"


def write(out: Path) -> Path:
    """Write the page of the attack in `out`.

    Raises:
      UserError: a file of the attack is missing or damaged.
    """
    out = locate(out)
    path = out / "side.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run mdiff side")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        stamp = tree["arrays"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged{_AGAIN}") from None
    arrays = stamped.read(out / "side.npz", stamp, str(path), _AGAIN)
    pictures = [
        ("Over the strength of the guidance", side_figures.curves(tree), _CURVES),
        *_images(out, tree, arrays),
        *_surrogate(out, tree),
        ("What the classifier knows, and every threshold", side_figures.knowledge(tree), _KNOWLEDGE),
    ]
    html = (
        environment()
        .get_template("side.html")
        .render(
            title=f"Extraction from {tree['target']['name']}",
            facts=_facts(tree),
            css=Markup(read_asset("page.css")),
            code=script(read_asset("page.js")),
            data=embedded_json({"runs": [], "sliders": {}}),
            verdict=tree["verdict"],
            columns=COLUMNS,
            pictures=[
                {"name": name, "uri": encode("image/png", png(figure)), "text": text}
                for name, figure, text in pictures
            ],
            rows=[_row(one, tree) for one in tree["strengths"]],
            detector=_detector(tree["detector"]),
            notes=_notes(tree),
            provenance=[("command", tree["command"]), *((k, str(v)) for k, v in tree["versions"].items())],
            version=__version__,
        )
    )
    write_text(out / "side.html", html)
    return out / "side.html"


_CURVES = (
    "Copies by the ratio rule, the same rule against held-out images, and how many different training images are copied; groups of "
    "near-identical generations, and the share that lies beside unguided ones, which is all an attacker has to choose by; precision and "
    "recall against held-out images. Bands are 95 % intervals of these generations."
)
_KNOWLEDGE = (
    "Left, on labelled images held out from the classifier's training: where accuracy is that of guessing, its guidance is noise. Right: "
    "the share of generations past each cosine, less the share past it among held-out images; a conclusion that holds at one "
    "threshold only would show."
)


def _images(
    out: Path, tree: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> list[tuple[str, Any, str]]:
    """Guided images beside the nearest training images, and what the same noise gives without guidance."""
    scale = tree["chosen"] or tree["oracle"]
    drawn = guided.load(guided.path_of(out / "guided", scale))["x"]
    plain_path = guided.path_of(out / "guided", 0.0)
    plain = guided.load(plain_path)["x"] if plain_path.is_file() else None
    nearest, ratio = arrays[f"nearest_{scale:g}"], arrays[f"ratio_{scale:g}"]
    order = np.argsort(ratio, kind="stable")
    _, first = np.unique(nearest[order], return_index=True)  # the strongest copy of each training image
    best = order[np.sort(first)][:SHOWN]
    random = np.sort(
        np.random.Generator(np.random.Philox(0)).choice(len(drawn), min(SHOWN, len(drawn)), replace=False)
    )
    made = []
    for name, index, text in (
        (
            "The strongest copies",
            best,
            "Sorted by the ratio rule, one for each training image: a selection, not a sample. The last row is what the "
            "same noise becomes without guidance.",
        ),
        ("Generations at random", random, "Not selected: how a generation at this strength usually looks."),
    ):
        rows = [
            (f"guided at strength {scale:g}", drawn[index]),
            ("nearest training image", arrays["train"][nearest[index]]),
        ]
        if plain is not None and scale:
            rows.append(("the same noise, unguided", plain[index]))
        made.append((name, side_figures.pairs(rows), text))
    return made


def _surrogate(out: Path, tree: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """The clusters."""
    made = []
    about = tree["surrogate"]["clusters"]
    if about:
        with np.load(io.BytesIO((out / "synthetic.npz").read_bytes())) as stored:
            images = stored["x"]
        figure = side_figures.clusters(images, clustering.load(out).labels, about["clusters"])
        text = (
            f"{about['kept']} of {about['found']} clusters of {about['images']} unguided images are cohesive and large enough, in "
            f"{about['space']}; the largest are shown, each with its first members. Labels say which cluster an image is guided to."
        )
        made.append(("The surrogate condition", figure, text))
    return made


def _facts(tree: Mapping[str, Any]) -> str:
    target, surrogate = tree["target"], tree["surrogate"]
    n = tree["strengths"][0]["scores"]["generated"]
    return (
        f"step {target.get('step', '–')}; the attacker drew {surrogate['images']} unguided images and labelled them by "
        f"{surrogate['teacher']} ({surrogate['classes']} classes); {n} generations at each of {len(tree['strengths'])} "
        f"strengths; compared with {target['train']} training and {target['heldout']} held-out images"
    )


def _row(one: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    found = one["scores"]["references"]["train"]["estimates"]
    marks = [
        word
        for word, scale in (("chosen", tree["chosen"]), ("most copies", tree["oracle"]))
        if scale == one["scale"]
    ]
    return {
        "scale": f"{one['scale']:g}",
        "marks": ", ".join(marks),
        "cells": [
            _number(found["memorized"], 100),
            _number(found.get("memorized_excess"), 100),
            _number(found["coverage"], 100),
            _number(found["unique_per_generation"], 100),
            _number(found.get("unique_per_prompt"), 100),
            _number(found["chao1"], 1),
            _number(one["repetition"]["grouped"], 100),
            _number(one["quality"].get("energy"), 1, 3),
        ],
    }


COLUMNS = (
    "Copies, % of generations",
    "Beyond held-out",
    "Training images copied, %",
    "Different ones per 100 generations",
    "Different ones per 100 clusters",
    "In the end, at least (Chao1)",
    "In groups of repeats, %",
    "Energy distance to held-out",
)


def _number(value: Mapping[str, Any] | None, factor: float, digits: int = 1) -> dict[str, Any]:
    if value is None or value["value"] is None:
        return {"value": "", "interval": "", "sort": None}
    low, high = (value[key] for key in ("low", "high"))
    interval = (
        "" if low is None or high is None else f"{factor * low:.{digits}f} to {factor * high:.{digits}f}"
    )
    return {"value": f"{factor * value['value']:.{digits}f}", "interval": interval, "sort": value["value"]}


def _detector(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    auroc, base = found["auroc"], found["base"]
    top = next(iter(found["precision"].items()), None)
    text = (
        f"The surrogate gap (how hard the classifier had to push) tells copies from other generations with an AUROC of "
        f"{auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}] at the chosen strength"
    )
    if top is not None:
        text += f"; of its {top[0]} most suspicious, {100 * top[1]['value']:.0f} % are copies, against {100 * base['value']:.0f} % of all"
    return text + "."


def _notes(tree: Mapping[str, Any]) -> list[str]:
    notes = list(dict.fromkeys(note for one in tree["strengths"] for note in one["scores"]["notes"]))
    return [
        *notes,
        "A copy under guidance does not by itself show that the model kept it and not the classifier: the crossed design of "
        "bench/side.py asks that.",
        "Intervals cover fresh generations of this model and this classifier, not another training of either.",
    ]

"""The page of a search for neurons, `nemo.html`, written from its files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdiff import nemo
from mdiff.errors import UserError
from mdiff.files import locate, write_text
from mdiff.report import nemo_figures, parts
from mdiff.report.nemo_figures import ARMS
from mdiff.report.parts import Row

READS = 1
"""Format of `nemo.json` that this page is made from."""
OPEN, FOLDED = 6, 18
"""Prompts of each kind whose images are shown, and how many more are folded away."""
IMAGES = 4
"""Images of a prompt shown from each network."""
_NEEDED = {
    *(
        "command",
        "target",
        "settings",
        "sampling",
        "calibration",
        "layers",
        "prompts",
        "union",
        "groups",
        "nearest",
        "beside",
    ),
    *("seconds", "evaluations", "calls", "verdict", "versions", "arrays"),
}


def write(out: Path) -> Path:
    """Write the page of the search in `out`.

    Args:
      out: its folder, with `nemo.json` and `nemo.npz`.

    Returns:
      The page.

    Raises:
      UserError: one of them is missing, damaged, or not of this search.
    """
    out = locate(out)
    tree, arrays = parts.read(out / "nemo.json", READS, _NEEDED, "mdiff nemo")
    _check(out / "nemo.npz", tree, arrays)
    known = [row for row in tree["prompts"] if row["memorized"]]
    groups, nearest = tree["groups"], tree["nearest"]
    bars = [nemo_figures.copies(groups), nemo_figures.nearest(nearest)] if groups else []
    html = parts.render(
        "nemo.html",
        "nemo.json",
        title=f"Neurons that recite: {tree['target']['name']}",
        facts=_facts(tree),
        verdict=tree["verdict"],
        level=_level(tree),
        strips=_strips(tree, known, arrays),
        arms=ARMS,
        guidance=f"{tree['sampling']['guidance']:g}",
        seed=tree["sampling"]["seed"],
        alarms=parts.number(tree["calibration"]["false_positives"], "rate"),
        fresh=len(tree["calibration"]["fresh"]),
        similarity=parts.uris(nemo_figures.similarity(tree)),
        known=len(known),
        asked=len(tree["prompts"]),
        union=sum(map(len, tree["union"].values())),
        neurons=sum(each["neurons"] for each in tree["layers"]),
        most=int(arrays["frequency"].max(initial=0)),
        shades=_shades(int(arrays["frequency"].max(initial=0))),
        map=nemo_figures.layers(tree["layers"], arrays["layer"], arrays["frequency"]),
        bars=parts.uris(bars),
        groups={"Copies": _groups(groups), "Own image nearest": _groups(nearest)},
        prompts=[_prompt(row, tree["settings"]["seeds"]) for row in tree["prompts"]],
        notes=_notes(tree, known),
        decisions=decisions(tree["settings"]),
        settings=parts.flat(tree["settings"]),
        provenance=_provenance(tree),
    )
    write_text(out / "nemo.html", html)
    return out / "nemo.html"


def _check(path: Path, tree: Row, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where the arrays do not fit the numbers."""
    known = sum(row["memorized"] for row in tree["prompts"])
    neurons = sum(each["neurons"] for each in tree["layers"])
    sizes = {"frequency": neurons, "layer": neurons, "memorized": len(tree["prompts"])}
    if known:
        sizes |= {f"images_{name}": known for name in ARMS}
    for name, n in {"train": None, **sizes}.items():
        if name not in arrays or (n is not None and len(arrays[name]) != n):
            found = f"has {len(arrays[name])} rows of {name}" if name in arrays else f"has no {name}"
            wanted = "" if n is None else f" where nemo.json counts {n}"
            raise UserError(f"{path}: {found}{wanted}; run mdiff nemo again, which makes it anew")


def _facts(tree: Row) -> str:
    target, settings = tree["target"], tree["settings"]
    step = f"step {target['step']:,}; " if isinstance(target.get("step"), int) else ""
    neurons = sum(each["neurons"] for each in tree["layers"])
    return (
        f"{step}trained on {target['train']:,} images; {target['prompts']:,} prompts; {neurons:,} neurons of "
        f"{len(tree['layers'])} layers searched, {settings['mode']} mode"
    )


def _level(tree: Row) -> str:
    level = tree["sampling"].get("confidence")
    return f"{100 * level:g}\N{NO-BREAK SPACE}% intervals" if level else "intervals"


# -------------------------------------------------------------------------------------------- the images


def strongest(known: Sequence[Row]) -> list[int]:
    """Places of memorized prompts, those most often recited first, then those whose seeds agree most."""
    shares = [(row["copies_of_own"].get("whole"), row["similarity"]) for row in known]
    filled = [tuple(-1.0 if value is None else value for value in pair) for pair in shares]
    return sorted(range(len(known)), key=lambda i: (-filled[i][0], -filled[i][1], i))


def _strips(tree: Row, known: Sequence[Row], arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each kind the strongest prompts: training images, and those of each network."""
    order, out = strongest(known), []
    for kind in nemo_figures.kinds_of(known):
        places = [i for i in order if known[i]["kind"] == kind]
        items = [_strip(i, known[i], arrays) for i in places[: OPEN + FOLDED]]
        left = len(places) - len(items)
        out.append({"kind": kind, "open": items[:OPEN], "folded": items[OPEN:], "left": left})
    return out


def _strip(place: int, row: Row, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    shares, cells = row["copies_of_own"], []
    if row["own"]:
        images = arrays["train"][row["own"][:IMAGES]]
        several = f"; {len(images)} of {len(row['own'])}" if len(row["own"]) > 1 else ""
        cells.append(
            parts.sheet(
                images, "training image" + "s" * (len(row["own"]) > 1), f"seen {row['copies']}×{several}"
            )
        )
    else:
        cells.append({"name": "training image", "text": "not known", "uri": "", "pixels": False})
    for name, text in ARMS.items():
        images, share = arrays[f"images_{name}"][place], shares.get(name)
        told = "" if share is None else f"{100 * share:.0f}\N{NO-BREAK SPACE}% copies"
        cells.append(parts.sheet(images[:IMAGES], text, told))
    count = sum(map(len, row["neurons"].values()))
    copies = f"{row['copies']:,} {'copy' if row['copies'] == 1 else 'copies'}, " if row["copies"] else ""
    return {"prompt": row["prompt"], "text": f"{copies}{_neurons(count)}", "cells": cells}


def _neurons(count: int) -> str:
    return f"{count:,} neuron{'s' * (count != 1)}"


# ------------------------------------------------------------------------------------------ the numbers


def _shades(most: int) -> list[tuple[str, str]]:
    """Counts of the map's legend with their opacity: at most four, from one prompt to the most."""
    counts = np.unique(np.linspace(1, max(most, 1), 4).round().astype(int)).tolist()
    return [(f"{nemo_figures.shade(count, max(most, 1)):.2f}", f"{count}") for count in counts]


def _groups(groups: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each kind: copies in each network, and paired differences from all neurons on."""
    return [
        {
            "kind": kind,
            "n": rates["whole"]["n"],
            "cells": [parts.number(rates.get(name), "rate") for name in ARMS]
            + [parts.number(rates.get(f"{name} - whole"), "rate") for name in ARMS if name != "whole"],
        }
        for kind, rates in groups.items()
    ]


def _prompt(row: Row, seeds: int) -> dict[str, Any]:
    known, shares = row["memorized"], row["copies_of_own"]
    initial, refined = (sum(map(len, row[name].values())) for name in ("initial", "neurons"))

    def share(name: str) -> Row:
        value = shares.get(name)
        return parts.ABSENT if value is None else parts.plain(value, f"{100 * value:.0f}\N{NO-BREAK SPACE}%")

    def count(value: int) -> Row:
        return parts.plain(value, f"{value:,}") if known else parts.ABSENT

    return {
        "prompt": row["prompt"],
        "kind": row["kind"],
        "memorized": known,
        "state": row["reason"] if known else "not memorized",
        "copies": parts.plain(row["copies"] or None, f"{row['copies']:,}"),
        "similarity": _three(row["similarity"]),
        "kept": parts.plain(row["kept"], f"{row['kept']} of {seeds}"),
        "initial": count(initial),
        "neurons": refined if known else None,
        "layers": [(name, ", ".join(map(str, places))) for name, places in row["neurons"].items()],
        "numbers": [
            parts.plain(row["theta"], "" if row["theta"] is None else f"{row['theta']:g}"),
            _three(row["tau_ref"]),
            _three(row["score"]),
            count(row["evaluations"]),
            *(share(name) for name in ARMS),
        ],
    }


def _three(value: float | None) -> Row:
    return parts.plain(value, "" if value is None else f"{value:.3f}")


BESIDE = {
    "union": "from the same layers, apart from the neurons found for any prompt",
    "own": "from the same layers, apart from the prompt's own, as too few others are left",
    "any layer": "from any of the layers, apart from the prompt's own",
    "none": "not at all, as more than half of all neurons were found",
}


def _notes(tree: Row, known: Sequence[Row]) -> list[str]:
    """What these numbers cannot say."""
    close = sum(row["close"] for row in tree["prompts"])
    notes = [
        "A path was cut; no image was erased. The neurons say where these prompts pass: another prompt, or the same one worded "
        "otherwise, may reach the image on another path.",
        "Elimination leaves one set of neurons that is enough, not the only one: other noises or another order of layers may "
        "leave another.",
        "The search looks at the first step of the sampler. Whether images change is seen above, from other starting noises.",
        "Similarity above tau marks a prompt whose seeds agree. An ordinary prompt with one obvious picture may agree too, and an "
        "image that only part of the seeds recite may be missed.",
    ]
    if known:
        ways = [f"{BESIDE[way]} ({count} prompts)" for way, count in tree["beside"].items() if count]
        notes.append(f"Random neurons, as many as the prompt's own, were drawn {', '.join(ways)}.")
        notes.append(
            "Intervals resample prompts: they cover other prompts of this model, not another training of it."
        )
    if close:
        times = "once" if close == 1 else f"{close} times"
        notes.append(
            f"A score was within 1e-5 of its threshold {times}: there another device or batch may keep another neuron."
        )
    return notes


# ---------------------------------------------------------------------------------- settings, provenance

_DECISION = re.compile(r"^- ([^():]+) \((T[\d, T]*)\): (.*?)(?=^- |\Z)", re.M | re.S)


def decisions(settings: Row) -> list[dict[str, str]]:
    """What is done where the paper and its code differ (the docstring of `mdiff.nemo`), with this search's values.

    Args:
      settings: `mdiff.nemo.Nemo` as JSON.
    """
    values = {
        name: text
        for full, text in parts.flat(settings)
        for name in (full, f"Similarity.{full.split('.')[-1]}")
    }
    out = []
    for what, traps, text in _DECISION.findall(nemo.__doc__ or ""):
        named = [name for name in dict.fromkeys(re.findall(r"`([\w.]+)`", text)) if name in values]
        here = "; ".join(f"{name.removeprefix('Similarity.')} = {values[name]}" for name in named)
        out.append(
            {"what": what, "traps": traps, "text": " ".join(text.replace("`", "").split()), "here": here}
        )
    return out


def _provenance(tree: Row) -> list[tuple[str, str]]:
    seconds, sampling = tree["seconds"], tree["sampling"]
    return [
        ("command", tree["command"]),
        *((f"model: {name}", str(value)) for name, value in tree["target"].items()),
        ("images", f"{sampling['images']} of each prompt and network, guidance {sampling['guidance']:g}, seed {sampling['seed']}"),
        ("search", f"{tree['evaluations']:,} scores in {tree['calls']:,} calls, {seconds['search']:,.1f} s"),
        ("drawing", f"{seconds['images']:,.1f} s"),
        *((name, str(value)) for name, value in tree["versions"].items()),
    ]  # fmt: skip

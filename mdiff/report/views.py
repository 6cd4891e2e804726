"""What the template shows, as plain values: table cells, picture rows, figures, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdiff.report import along_figures, figures, probed, words
from mdiff.report.collect import Run
from mdiff.report.html import data_uri, encode
from mdiff.types import Estimate

_ROWS = {"top": 24, "random": 12}
_HEADLINE = ("memorized", "control", "excess", "quality")
_SMALL = 48  # pixels; larger pictures are shrunk, or a page of photographs would weigh tens of megabytes
_LARGE = 112
SPACES = (
    (
        "cosine",
        "Similarity to the nearest image, over the threshold τ",
        "AMS(τ) is the share of generations whose most similar image reaches τ, and UMS(τ) the number of "
        "different images so matched over the number of generations. Only the gap between solid "
        "(training images) and dashed (held-out) speaks of memorization.",
    ),
    (
        "rms",
        "Distance to the nearest image, over the threshold δ",
        "The same two with RMS pixel distance: a generation counts when its nearest image is within δ.",
    ),
)


PAIRED = {
    "memorized": "Memorized",
    "calibrated": "Calibrated L2",
    "control": "Control",
    "d1": "RMS distance to the nearest training image",
    "log_ratio": "Logarithm of the ratio",
    "cosine": "Cosine to the nearest training image",
    "energy_train": "Energy distance to training images",
    "energy_heldout": "Energy distance to held-out images",
    "kernel_train": "Kernel distance to training images",
    "kernel_heldout": "Kernel distance to held-out images",
}
"""What `probes.compare` compares, in words."""


def table(runs: Sequence[Run], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of numbers: label, meaning and one cell per run."""
    entries = [report[run.name] for run in runs]
    rows = []
    for name in measures(entries):
        about = words.measure(name)
        cells = []
        for run in entries:
            found = entry(run, name)
            cells.append(
                found
                and {
                    "value": words.shown(found, about.kind)[0],
                    "interval": words.shown(found, about.kind)[1],
                    "n": f"n = {found.n:,}",
                    "sort": found.value,
                }
            )
        label = about.label
        if name == "quality":
            label += " to " + " / ".join(sorted({run["quality_reference"] for run in entries} - {None}))
        rows.append({"label": label, "means": about.means, "of": about.of, "cells": cells})
    return rows


def measures(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Headline measures first, then the rest; the one that `quality` repeats is left out."""
    repeated = {
        {"held-out": "energy_heldout", "train": "energy_train"}[reference]
        for reference in [run["quality_reference"] for run in entries]
        if reference is not None
    }
    same = len(repeated) == 1
    present = {name for run in entries for name in run["estimates"]}
    rest = [name for name in words.MEASURES if name in present] + sorted(present - set(words.MEASURES))
    head = [name for name in _HEADLINE if any(run[name] is not None for run in entries)]
    return head + [name for name in rest if not (same and name in repeated)]


def entry(run: Mapping[str, Any], name: str) -> Estimate | None:
    """A measure of one run's part of `report.json`; a limit that is null there is NaN."""
    found = run[name] if name in _HEADLINE else run["estimates"].get(name)
    if found is None:
        return None
    low, high = (math.nan if found[end] is None else found[end] for end in ("low", "high"))
    return Estimate(found["value"], low, high, found["n"])


def run_view(run: Run, index: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs of one run."""
    return {
        "name": run.name,
        "number": index,
        "color": figures.color(index),
        "facts": _facts(run, entry),
        "top": _pictures(run, "top"),
        "random": _pictures(run, "random"),
        "config": _dump(run.config),
        "audit_config": _dump(run.audit.get("config")),
        "counts": {
            name: count for name, count in (run.audit.get("counts") or {}).items() if count is not None
        },
        "percentiles": _percentiles(run),
    }


def _percentiles(run: Run) -> dict[str, list[str]]:
    """`percentiles` as texts by name, `level` first; {} when the audit has none."""
    tree = dict(run.audit.get("percentiles") or {})
    if "level" not in tree:
        return {}
    rows = {"level": [f"{level:g} %" for level in tree.pop("level")["all"]]}
    for name, sides in tree.items():
        rows |= {f"{name}, {side}": [words.distance(v) for v in values] for side, values in sides.items()}
    return rows


def _dump(tree: Any) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) if tree else ""


def _facts(run: Run, entry: Mapping[str, Any]) -> str:
    """The run in one line, from its config."""
    config = entry["config"]
    parts = []
    if config["source"] is not None:
        size = f" {config['size']}×{config['size']}" if config["size"] else ""
        count = f", {config['n']:,} training images" if config["n"] else ""
        parts.append(f"{config['source']}{size}{count}")
    if config["parameters"]:
        parts.append(f"{config['parameters'] / 1e6:.2f} M parameters")
    if run.steps:
        parts.append(f"{run.steps:,} steps")
    if config["cutoff"] is not None:
        parts.append(
            f"ambient, cutoff at σ = {config['cutoff']:g}" if config["cutoff"] else "no noise cutoff"
        )
    if run.early:
        parts.append(run.early["text"])
    return " · ".join(parts)


def _pictures(run: Run, kind: str) -> list[dict[str, Any]]:
    """Pairs (generated, nearest) with their numbers; "top" by ratio, smallest first."""
    arrays = run.arrays
    if not _has_pictures(run, kind):
        return []
    index = arrays[f"{kind}_index"].astype(int)
    ratio, d1, copied = (_rows(arrays.get(name), index) for name in ("ratio", "d1", "memorized"))
    nearest, flipped = (_rows(arrays.get(name), index) for name in ("nearest_id", "flipped"))
    order = np.arange(len(index))
    if kind == "top" and ratio is not None:
        order = np.argsort(ratio, kind="stable")
    return [
        {
            "generated": data_uri(arrays[f"{kind}_generated"][i], _LARGE, _SMALL),
            "nearest": data_uri(arrays[f"{kind}_nearest"][i], _LARGE, _SMALL),
            "distance": None if d1 is None else words.distance(float(d1[i])),
            "ratio": None if ratio is None else words.distance(float(ratio[i])),
            "copied": bool(copied[i]) if copied is not None else None,
            "index": int(index[i]),
            "id": None if nearest is None else str(nearest[i]),
            "mirrored": flipped is not None and bool(flipped[i]),
            "pixels": max(arrays[f"{kind}_generated"].shape[1:3]) <= _SMALL,
        }
        for i in order[: _ROWS[kind]]
    ]


def _has_pictures(run: Run, kind: str) -> bool:
    return all(f"{kind}_{part}" in run.arrays for part in ("generated", "nearest", "index"))


def _rows(values: np.ndarray | None, index: np.ndarray) -> np.ndarray | None:
    if values is None or (len(index) and index.max() >= len(values)):
        return None
    return values[index]


def stored_pictures(run: Run) -> dict[str, list[str]]:
    """Pictures of the audit that `run_view` does not show: generation number to [generated, nearest]."""
    found: dict[str, list[str]] = {}
    shown = {item["index"] for kind in _ROWS for item in _pictures(run, kind)}
    for kind in _ROWS:
        if not _has_pictures(run, kind):
            continue
        arrays = (run.arrays[f"{kind}_{part}"] for part in ("index", "generated", "nearest"))
        for index, generated, nearest in zip(*arrays, strict=True):
            if int(index) not in shown:
                found.setdefault(str(index), [data_uri(x, _LARGE, _SMALL) for x in (generated, nearest)])
    return found


def embedded(*named: tuple[str, str, figures.Plot | None]) -> list[dict[str, Any]]:
    """Figures for the template: (name of its marks, text for who cannot see it, plot)."""
    return [
        {
            "alt": alt,
            "uri": encode("image/svg+xml", plot.svg.encode()),
            "marks": marks,
            "place": json.dumps({"box": plot.box, "x": plot.x, "y": plot.y}),
        }
        for marks, alt, plot in named
        if plot is not None
    ]


def curve_figures(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    return {
        "training": embedded(("", "Loss and memorized fraction over training steps", figures.training(runs))),
        "along": embedded(
            ("", "Excess, quality and loss gap over training steps", along_figures.measures(runs)),
            ("", "Loss gap over the noise level, one line per measured step", along_figures.levels(runs)),
        ),
        "ratio": embedded(("ratio", "Cumulative distribution of the distance ratio", figures.ratios(runs))),
        **{
            space: embedded(
                (
                    f"{space}-ams",
                    f"Generations with a match over the {space} threshold",
                    figures.similarity(runs, space, "ams"),
                ),
                (
                    f"{space}-ums",
                    f"Distinct images matched over the {space} threshold",
                    figures.similarity(runs, space, "ums"),
                ),
            )
            for space, *_ in SPACES
        },
    }


def notes(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Every note once, with the names of the runs it is about unless that is all of them."""
    return probed.said([(run.name, run.audit.get("notes") or []) for run in runs])


def provenance(runs: Sequence[Run], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what is common to the runs: command, cost, versions."""
    rows: list[tuple[str, str]] = []
    extra = dict(report["extra"])
    if "command" in extra:
        rows.append(("command", str(extra.pop("command"))))
    if report["seconds"] is not None:
        rows.append(("seconds in all", f"{report['seconds']:,.0f}"))
    if report["peak_rss_gb"] is not None:
        rows.append(("peak memory", f"{report['peak_rss_gb']:.2f} GB"))
    rows += [(str(name), str(value)) for name, value in extra.items()]
    rows += [
        (f"version of {name}" if name != "platform" else name, v) for name, v in report["versions"].items()
    ]
    return rows


def provenance_by_run(runs: Sequence[Run], report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, one value per run, "" where there is none): what identifies each run's data and model."""
    by_run: list[dict[str, str]] = []
    for run in runs:
        entry = report[run.name]
        found = {"folder": entry["folder"]}
        if entry["digest"]:
            found["config digest"] = entry["digest"]
        found |= entry["sha256"]
        found |= {f"audited {name} pixels, sha256": value for name, value in entry["digests"].items()}
        if run.ledger.get("images_per_second") is not None:
            found["images per second"] = f"{run.ledger['images_per_second']:,.1f}"
        by_run.append(found)
    names = dict.fromkeys(name for found in by_run for name in found)
    return [(name, [found.get(name, "") for found in by_run]) for name in names]


def seconds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Seconds by cause, the largest cause first, with widths in per cent of the largest cell."""
    spent = [run.ledger.get("seconds") or {} for run in runs]
    largest = max((value for seconds in spent for value in seconds.values()), default=0)
    if not largest:
        return []
    causes = sorted(
        {cause for seconds in spent for cause in seconds}, key=lambda c: -sum(s.get(c, 0) for s in spent)
    )
    return [
        {
            "cause": cause,
            "cells": [
                {"seconds": seconds[cause], "width": 100 * seconds[cause] / largest}
                if cause in seconds
                else None
                for seconds in spent
            ],
        }
        for cause in causes
    ]


def differences(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per pair of runs: what, the paired difference, its interval, whether that excludes zero."""
    tables = []
    for pair, found in report["differences"].items():
        rows = []
        for name, fields in found.items():
            kind = "rate" if name in ("memorized", "calibrated", "control") else "distance"
            value = Estimate(**fields)
            text, interval = words.shown(value, kind)
            shown = "" if value.low <= 0 <= value.high else "not zero"
            rows.append(
                {
                    "label": PAIRED.get(name, name.replace("_", " ")),
                    "value": text.replace("%", "points") if kind == "rate" else text,
                    "interval": interval,
                    "n": value.n,
                    "shown": shown,
                    "sort": value.value,
                }
            )
        tables.append({"pair": pair, "rows": rows})
    return tables

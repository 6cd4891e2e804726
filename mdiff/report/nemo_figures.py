"""The plots of a search for neurons: how alike first steps are, which neurons were found, and what switching them off does.

Kinds of prompts have colours of their own in every figure; networks (whole, own, union, random) have others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from mdiff.report import figures, parts
from mdiff.report.figures import COLORS, MARKERS
from mdiff.report.parts import Captioned, Row

KINDS = ("verbatim", "template", "unique", "heldout", "given")
ARMS = {"whole": "all on", "own": "own off", "union": "union off", "random": "random off"}
"""The networks that draw images: name in the files -> on the page."""
_INK, _SOFT = "#333d47", "#8a949c"
_ARM_COLORS = ("#56606a", COLORS[0], COLORS[2], COLORS[1])
_SIZE = (5.2, 3.4)
_WIDE = 256  # layers of more neurons get longer rows
_COLUMNS = (64, 128)


def kinds_of(prompts: Sequence[Row]) -> list[str]:
    """The kinds that there are, in the order of the pages; unknown ones last."""
    there = dict.fromkeys(row["kind"] for row in prompts)
    return [kind for kind in KINDS if kind in there] + [kind for kind in there if kind not in KINDS]


def kind_color(kind: str) -> str:
    """The colour of a kind of prompts."""
    return COLORS[KINDS.index(kind)] if kind in KINDS else COLORS[-1]


def similarity(tree: Row) -> list[Captioned]:
    """Scores of ordinary prompts in both halves, and of the prompts asked about, by kind and by copies."""
    made = [_histogram(tree)]
    copies = [row for row in tree["prompts"] if row["copies"] and row["similarity"] is not None]
    if len({row["copies"] for row in copies}) > 1:
        made.append(_by_copies(copies, tree["calibration"]["tau"]))
    return made


def _histogram(tree: Row) -> Captioned:
    found, prompts = tree["calibration"], tree["prompts"]
    kinds = kinds_of(prompts)
    asked = {
        kind: np.array([row["similarity"] for row in prompts if row["kind"] == kind], np.float64)
        for kind in kinds
    }
    halves = [np.array(found[name], np.float64) for name in ("scores", "fresh")]
    every = np.concatenate([*halves, *asked.values(), [found["tau"]]])
    every = every[np.isfinite(every)]
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-3), 31)
    pairs = tree["settings"]["calibrate_on"] == "pairs"
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=(_SIZE[0], 2.5 + 0.35 * len(kinds)), layout="constrained")
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.9, max(0.35 * len(kinds), 0.4)))
        names = ("ordinary, pairs" if pairs else "ordinary, for tau", "ordinary, fresh")
        for values, ink, dash in zip(halves, (_INK, COLORS[3]), ("-", "--"), strict=True):
            values = values[np.isfinite(values)]
            counts = np.histogram(values, edges)[0] / max(len(values), 1)
            top.stairs(counts, edges, color=ink, ls=dash, lw=1.6)
        top.set(ylabel="share", ylim=(0, None))
        top.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        rng = np.random.Generator(np.random.Philox(0))  # dots of one row lie beside each other
        for place, kind in enumerate(kinds):
            values = asked[kind]
            height = place + rng.uniform(-0.28, 0.28, len(values))
            below.plot(values, height, "o", color=kind_color(kind), ms=4, alpha=0.65, mew=0)
        for axes in (top, below):
            axes.axvline(found["tau"], color=_INK, lw=1.3, ls=":")
        below.set_yticks(range(len(kinds)), labels=kinds)
        below.set(ylim=(len(kinds) - 0.5, -0.5), xlabel="similarity of the first step between seeds")
        below.grid(False, axis="y")
        figures.legend(
            top,
            [(_INK, "-", names[0]), (COLORS[3], "--", names[1]), (_INK, ":", f"tau = {found['tau']:.3f}")],
        )
        return parts.captioned(
            figure,
            "Above: ordinary prompts, the half that sets tau and the other one. Below: each prompt asked about, by kind; right "
            "of tau it looks memorized.",
            "Similarity between seeds",
            "nemo.json",
        )


def _by_copies(rows: Sequence[Row], tau: float) -> Captioned:
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        kinds = kinds_of(rows)
        rng = np.random.Generator(np.random.Philox(0))
        for kind in kinds:
            table = np.array(
                [(row["copies"], row["similarity"]) for row in rows if row["kind"] == kind], np.float64
            )
            at = table[:, 0] * np.exp(rng.uniform(-0.06, 0.06, len(table)))
            marker = MARKERS[KINDS.index(kind) % len(MARKERS)] if kind in KINDS else MARKERS[-1]
            axes.plot(at, table[:, 1], marker, color=kind_color(kind), ms=4.5, alpha=0.65, mew=0)
        axes.axhline(tau, color=_INK, lw=1.3, ls=":")
        axes.set(xlabel="copies in the training set", ylabel="similarity")
        copies_axis(axes, sorted({row["copies"] for row in rows}))
        figures.legend(axes, [(kind_color(kind), "-", kind) for kind in kinds] + [(_INK, ":", "tau")])
        return parts.captioned(
            figure,
            "Each prompt by how many training images are seen under it in an epoch.",
            "Similarity over copies",
            "nemo.json",
        )


def copies_axis(axes: Axes, copies: Sequence[int]) -> None:
    """A logarithmic axis that names the copies there are, as far as there is room."""
    axes.set_xscale("log")
    named: list[int] = []
    for each in copies:
        if not named or each >= 1.8 * named[-1]:
            named.append(each)
    axes.set_xticks(named, labels=[f"{each:,}" for each in named])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def copies(groups: Mapping[str, Mapping[str, Any]]) -> Captioned:
    """Share of images that are copies, with nothing, the found and random neurons off."""
    return _bars(
        groups,
        "images that are copies",
        "Memorized prompts only. Random: as many neurons, none of the prompt's own.",
    )


def nearest(groups: Mapping[str, Mapping[str, Any]]) -> Captioned:
    """Share of images to which the prompt's own training image is still the nearest."""
    caption = (
        "Images to which the prompt's own training image is nearer than any other. A copy that neurons off only spoil is no copy "
        "above, and still stands here."
    )
    return _bars(groups, "own image is nearest", caption)


def _bars(groups: Mapping[str, Mapping[str, Any]], label: str, caption: str) -> Captioned:
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(ARMS)
        for k, rates in enumerate(groups.values()):
            for place, name in enumerate(ARMS):
                if name not in rates or rates[name]["value"] is None:
                    continue
                value = parts.estimate(rates[name])
                at = k + (place - (len(ARMS) - 1) / 2) * width
                axes.bar(at, value.value, 0.88 * width, color=_ARM_COLORS[place])
                axes.plot([at, at], [value.low, value.high], color="#111", lw=1.3, solid_capstyle="butt")
                axes.text(
                    at, max(value.high, value.value) + 0.015, f"{100 * value.value:.0f}", ha="center", va="bottom", fontsize=8.5
                )  # fmt: skip
        axes.set_xticks(range(len(groups)), labels=list(groups))
        axes.set(ylabel=label, ylim=(0, 1.12), xlim=(-0.55, len(groups) - 0.45))
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.grid(False, axis="x")
        figures.legend(axes, [(_ARM_COLORS[i], "-", text) for i, text in enumerate(ARMS.values())])
        return parts.captioned(
            figure,
            caption,
            f"{label.capitalize()}, with neurons off",
            "nemo.json",
        )


def layers(sizes: Sequence[Row], layer: np.ndarray, frequency: np.ndarray) -> list[dict[str, Any]]:
    """The map of neurons: for each layer an inline SVG of one cell per neuron, shaded by in how many prompts it was found.

    Args:
      sizes: name and number of neurons of each layer.
      layer: int [N], each neuron's layer.
      frequency: int [N], in how many prompts it was found.

    Returns:
      For each layer: name, neurons, found, most and svg. Long layers take several lines of cells.
    """
    columns = _COLUMNS[max(each["neurons"] for each in sizes) > _WIDE] if sizes else 1
    columns = min(columns, max((each["neurons"] for each in sizes), default=1))
    most = max(int(frequency.max(initial=0)), 1)
    return [
        _layer(each["name"], frequency[layer == number], columns, most) for number, each in enumerate(sizes)
    ]


def _layer(name: str, counts: np.ndarray, columns: int, most: int) -> dict[str, Any]:
    lines = -(-len(counts) // columns)
    found = [(i, int(count)) for i, count in enumerate(counts) if count]
    cells = "".join(
        f'<rect class="found" x="{i % columns}" y="{i // columns}" width=".9" height=".9" '
        f'fill-opacity="{shade(count, most):.2f}"><title>neuron {i}: in {count} prompt{"s" * (count > 1)}</title></rect>'
        for i, count in found
    )
    last = len(counts) - (lines - 1) * columns
    plain = f'<rect class="empty" width="{columns}" height="{lines - 1}"/>' if lines > 1 else ""
    plain += f'<rect class="empty" y="{lines - 1}" width="{last}" height="1"/>'
    label = escape(f"{name}: {len(found)} of {len(counts)} neurons found")
    return {
        "name": name,
        "neurons": len(counts),
        "found": len(found),
        "most": int(counts.max(initial=0)),
        "svg": Markup(
            f'<svg role="img" aria-label="{label}" viewBox="0 0 {columns} {lines}">{plain}{cells}</svg>'
        ),
    }


def shade(count: int, most: int) -> float:
    """Opacity of a neuron that was found in `count` prompts, where the most frequent one was in `most`."""
    return 1.0 if most == 1 else 0.4 + 0.6 * (count - 1) / (most - 1)

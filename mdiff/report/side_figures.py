"""The pictures of an attack: what the classifier knows, curves over the strength, clusters, and guided images beside their nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mdiff.report.figures import COLORS, MARKERS
from mdiff.report.front_figures import SOFT, style

MEMBERS, CLUSTERS = 10, 24
"""Images shown of each cluster, and clusters shown, the largest."""

Row = Mapping[str, Any]


def curves(tree: Row) -> Figure:
    """Copies with their control, what the attacker sees, and quality, over the strength of the guidance."""
    ones = tree["strengths"]
    x = [one["scale"] for one in ones]
    found = [one["scores"]["references"]["train"]["estimates"] for one in ones]
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(11, 3.5), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        band(left, x, [e["memorized"] for e in found], "copies", 0)
        if "memorized_control" in found[0]:
            band(left, x, [e["memorized_control"] for e in found], "same rule, held-out", 5)
        band(left, x, [e["coverage"] for e in found], "training images copied", 1)
        left.set(title="What came out, %")
        band(middle, x, [one["repetition"]["grouped"] for one in ones], "in groups of repeats", 2)
        band(middle, x, [one["beside_unguided"]["precision"] for one in ones], "beside unguided images", 3)
        middle.set(title="What the attacker sees, %")
        for place, key in enumerate(("precision", "recall")):
            if ones[0]["quality"]:
                band(right, x, [one["quality"][key] for one in ones], f"{key} against held-out", 4 + place)
        right.set(title="Quality of the same images, %")
        for axes in (left, middle, right):
            axes.axvline(tree["chosen"], color=SOFT, lw=1, ls="--", label="chosen without training images")
            axes.axvline(tree["oracle"], color=SOFT, lw=1, ls=":", label="most copies")
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(x, labels=[f"{value:g}" for value in x])
            axes.minorticks_off()
            axes.set(xlabel="strength of the guidance", ylim=(0, None))
            axes.legend(fontsize=8, frameon=False)
        return figure


def knowledge(tree: Row) -> Figure:
    """Two panels: what the classifier knows at each noise level, and the share of generations past every threshold."""
    found = tree["classifier"]
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        if found is None:
            left.set_axis_off()
        else:
            band(left, found["levels"], found["accuracy"], "accuracy", 0)
            band(left, found["levels"], found["ece"], "calibration error", 1)
            left.set(
                xscale="log", xlabel="noise level σ", ylim=(0, 100), title="What the classifier knows, %"
            )
            left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            left.legend(frameon=False)
        for place, scale in enumerate(sorted({0.0, tree["chosen"], tree["oracle"]})):
            one = next((each for each in tree["strengths"] if each["scale"] == scale), None)
            if one is None:
                continue
            curve = one["scores"]["references"]["train"]["curves"]["cosine"]
            keys = (
                ("excess", "excess_low", "excess_high")
                if "excess" in curve
                else ("ams", "ams_low", "ams_high")
            )
            value, low, high = (100 * np.asarray(curve[key]) for key in keys)
            right.plot(curve["tau"], value, color=COLORS[place], label=f"strength {scale:g}")
            right.fill_between(curve["tau"], low, high, color=COLORS[place], alpha=0.15, lw=0)
        right.set(
            xlabel="cosine to the nearest image", title="Generations past it, training less held-out, %"
        )
        right.legend(frameon=False)
        return figure


def clusters(images: np.ndarray, labels: np.ndarray, about: Sequence[Row]) -> Figure:
    """A row of member images for each kept cluster, the largest first."""
    kept = [one for one in about if one["kept"]]
    counts = np.bincount(labels[labels >= 0], minlength=len(kept))
    shown = np.argsort(-counts, kind="stable")[:CLUSTERS]
    columns = 3
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(11, 0.62 * rows + 0.1), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, k in zip(grid.T.flat, shown, strict=False):
            members = images[np.flatnonzero(labels == k)[:MEMBERS]]
            axes.imshow(strip(members, MEMBERS), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(
                f"{counts[k]} images, cohesion {kept[k]['cohesion']:.2f}",
                loc="left",
                fontsize=7.5,
                color=SOFT,
                pad=2,
            )
        return figure


def pairs(rows: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Rows of images [n,H,W,C] under each other, each with its name: images of one column belong together."""
    count = max(len(images) for _, images in rows)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(11, 0.75 * len(rows) + 0.1), layout="constrained")
        grid = figure.subplots(len(rows), 1, squeeze=False)
        for axes, (name, images) in zip(grid[:, 0], rows, strict=True):
            axes.set_axis_off()
            axes.imshow(strip(images, count), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(name, loc="left", fontsize=8, color=SOFT, pad=2)
        return figure


def strip(images: np.ndarray, count: int) -> np.ndarray:
    """uint8 [n,H,W,C] side by side with a white gap of one pixel, filled up with white to `count` images."""
    height, width, channels = images.shape[1:]
    canvas = np.full((height, count * (width + 1) - 1, channels), 255, np.uint8)
    for i, image in enumerate(images[:count]):
        canvas[:, i * (width + 1) : i * (width + 1) + width] = image
    return canvas[..., 0] if channels == 1 else canvas


def band(axes: Axes, x: Sequence[float], rows: Sequence[Row], name: str, place: int) -> None:
    """A line of shares in % with its interval."""
    value, low, high = (
        [np.nan if row[key] is None else 100 * row[key] for row in rows] for key in ("value", "low", "high")
    )
    color = COLORS[place % len(COLORS)]
    axes.plot(x, value, color=color, marker=MARKERS[place % len(MARKERS)], ms=4, label=name)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)

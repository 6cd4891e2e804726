"""The pictures of `mdiff denoise`: curves over the noise level, and the denoised images themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mdiff.recipes.denoising import Denoised, Denoising
from mdiff.report.figures import COLORS, MARKERS, short
from mdiff.report.front_figures import SOFT, style
from mdiff.types import Estimate, to_uint8

_TILE = 0.42
"""Inches along a side of a picture's tile."""
_ROOM = 0.12
"""Room between tiles, as a share of a tile."""


def curves(found: Denoising) -> Figure:
    """Four panels over the noise level: the gap, both errors, total variation and high frequencies of the answers."""
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(11, 8), layout="constrained")
        first, second, third, fourth = figure.subplots(2, 2, sharex=True).flat
        _lines(first, found, lambda run: [(run.gap.ratio, "-")], "held-out error / training error")
        first.set_title("The gap: 1 is no memory of single images", loc="left")
        _lines(
            second,
            found,
            lambda run: [(run.train.error, "-"), (run.heldout.error, "--")],
            "mean squared error",
        )
        second.set_title("Error (solid: images trained on, dashed: held out)", loc="left")
        _lines(
            third, found, lambda run: [(run.heldout.variation, "-")], "total variation / that of the images"
        )
        _lines(
            fourth,
            found,
            lambda run: [(run.heldout.high, "-")],
            "share of high frequencies / that of the images",
        )
        for axes in (third, fourth):
            axes.set_xlabel("noise level σ; dotted: lowest cutoff of the run")
        third.set_title("Sharpness of the answers to held-out images", loc="left")
        fourth.set_title("The same by high frequencies", loc="left")
        for axes in (first, second):
            _decades(axes)
        for axes in (third, fourth):
            axes.set_ylim(bottom=0)
        for axes in (first, third, fourth):
            axes.axhline(1, color=SOFT, lw=0.8, zorder=1)
        handles = [
            Line2D(
                [],
                [],
                color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)],
                lw=1.6,
                label=short(run.name),
            )
            for i, run in enumerate(found.runs)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
        return figure


def pictures(found: Denoising) -> Figure:
    """What each run answers to the shown images by noise level, below what it was shown; left, those trained on."""
    halves = [
        (title, np.flatnonzero(which))
        for title, which in (
            ("images that all runs were trained on", found.trained),
            ("images that no run was trained on", ~found.trained),
        )
        if which.any()
    ]
    columns, rows = len(found.settings.levels) + 1, 1 + len(found.runs)
    tall = max(len(places) for _, places in halves)
    size = (1.5 + columns * len(halves) * _TILE * 1.15, 0.9 + tall * (rows + 0.4) * _TILE * 1.1)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=size, layout="constrained")
        every = figure.subplots(1, len(halves), squeeze=False)[0]
        for axes, (title, places) in zip(every, halves, strict=True):
            _mosaic(axes, found, places, tall, labelled=axes is every[0])
            axes.set_title(title, loc="left", pad=20)
        return figure


def _lines(
    axes: Axes,
    found: Denoising,
    lines: Callable[[Denoised], Sequence[tuple[Sequence[Estimate], str]]],
    label: str,
) -> None:
    """The lines of every run with their intervals, and its lowest cutoff."""
    x = found.settings.levels
    for i, run in enumerate(found.runs):
        ink = COLORS[i % len(COLORS)]
        for values, dash in lines(run):
            middle, low, high = (
                np.array([getattr(v, end) for v in values]) for end in ("value", "low", "high")
            )
            axes.plot(x, middle, dash, color=ink, marker=MARKERS[i % len(MARKERS)], ms=4, lw=1.5)
            axes.fill_between(x, low, high, color=ink, alpha=0.15, lw=0)
        if run.config.loss.levels:
            axes.axvline(run.config.loss.levels[0], color=ink, ls=":", lw=1.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)


def _decades(axes: Axes) -> None:
    """A logarithmic axis with plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = high / max(low, 1e-300) > 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mosaic(axes: Axes, found: Denoising, places: np.ndarray, tall: int, labelled: bool) -> None:
    """Blocks of rows, one block per image: the image and its noisy copies, then each run's answers."""
    levels, names = found.settings.levels, ["noisy", *(short(run.name, 26) for run in found.runs)]
    height, width, channels = found.clean.shape[1:]
    room = max(1, math.ceil(_ROOM * max(height, width)))
    step, block = height + room, len(names) * (height + room) + 2 * room
    picture = np.full(
        (tall * block - 3 * room, (len(levels) + 1) * (width + room) - room, channels), 255, np.uint8
    )
    # Noise is shown at the contrast of its level, or nothing but noise would be white and black.
    seen = [found.noisy[i] / math.sqrt(1 + level**2) for i, level in enumerate(levels)]
    ticks = []
    for k, place in enumerate(places):
        for row in range(len(names)):
            top = k * block + row * step
            ticks.append(top + height / 2 - 0.5)
            tiles = [
                seen[i][place] if row == 0 else found.runs[row - 1].pictures[i, place]
                for i in range(len(levels))
            ]
            for column, tile in enumerate(([found.clean[place]] if row == 0 else [None]) + tiles):
                if tile is not None:
                    left = column * (width + room)
                    picture[top : top + height, left : left + width] = to_uint8(tile)
    axes.imshow(
        picture[..., 0] if channels == 1 else picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest"
    )
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    centres = [column * (width + room) + width / 2 - 0.5 for column in range(len(levels) + 1)]
    axes.set_xticks(centres, labels=["image", *(f"{level:.2g}" for level in levels)], fontsize=7)
    axes.xaxis.tick_top()
    axes.set_yticks(ticks if labelled else [], labels=names * len(places) if labelled else [], fontsize=7)
    axes.tick_params(length=0, pad=2)

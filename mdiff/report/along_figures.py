"""The report's figures of what was measured while training: excess, quality and the loss gap, and the gap by noise level."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mdiff.report import figures
from mdiff.report.collect import Run
from mdiff.report.figures import MARKERS, Plot, color

_PANELS = {
    "excess": ("excess (RMS per pixel)", 0.0),
    "quality": ("energy distance", None),
    "gap": ("loss gap", 1.0),
}
"""Measure: what its axis says, and the value of a model that copies nothing."""
_SHOWN = 6
_INK = "#333d47"


def measures(runs: Sequence[Run]) -> Plot | None:
    """Excess, quality and loss gap over the training step with their intervals, as far as they were measured."""
    present = [name for name in _PANELS if any(name in row for run in runs for row in _known(run, name))]
    if not present:
        return None
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=(5.2, 1.75 * len(present) + 0.6), layout="constrained")
        panels = list(np.atleast_1d(figure.subplots(len(present), 1, sharex=True)))
        for axes, name in zip(panels, present, strict=True):
            label, neutral = _PANELS[name]
            for i, run in enumerate(runs):
                _line(axes, run, i, name)
            if neutral is not None:
                axes.axhline(neutral, color=_INK, lw=0.8)
            if name == "gap":
                _log(axes)
            axes.set_ylabel(label)
        panels[-1].set_xlabel("training step")
        entries = [(color(i), "-", run.name) for i, run in enumerate(runs) if run.points]
        figures.legend(panels[0], entries + figures.kept(panels, runs))
        return figures.svg(figure)


def levels(runs: Sequence[Run]) -> Plot | None:
    """The loss gap over the noise level: one panel per run, one line per measured step, later ones darker."""
    drawn = [(run, table) for run in runs if (table := _table(run)) is not None][:_SHOWN]
    if not drawn:
        return None
    across = min(2, len(drawn))
    rows = -(-len(drawn) // across)
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=(5.2, 2.5 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False)
        steps = np.concatenate([at for _, (at, _, _) in drawn])
        first, last = float(steps.min()), float(steps.max())
        shade = ScalarMappable(Normalize(first, last if last > first else first + 1), "viridis_r")
        for axes in grid.flat[len(drawn) :]:
            axes.set_axis_off()
        for axes, (run, (at, sigma, gap)) in zip(grid.flat, drawn, strict=False):
            for step, row in zip(at, gap, strict=True):
                axes.plot(sigma, row, color=shade.to_rgba(step), lw=1.5, marker="o", ms=3)
            axes.axhline(1.0, color=_INK, lw=0.8)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            if len(runs) > 1:
                axes.set_title(figures.short(run.name), fontsize=9.5)
        _log(grid[0, 0])
        for axes in grid[:, 0]:
            axes.set_ylabel("loss gap")
        for axes in grid[-1]:
            axes.set_xlabel("noise level σ")
        if last > first:
            bar = figure.colorbar(shade, ax=grid.ravel().tolist(), location="top", aspect=40, fraction=0.04)
            bar.set_label("training step")
        return figures.svg(figure)


def _known(run: Run, *names: str) -> list[dict[str, float]]:
    return [row for row in run.points if all(row.get(name) is not None for name in names)]


def _line(axes: Axes, run: Run, number: int, name: str) -> None:
    if not (rows := _known(run, name)):
        return
    marker = MARKERS[number % len(MARKERS)]
    axes.plot(*figures.columns(rows, "step", name), color=color(number), lw=1.5, marker=marker, ms=4)
    ends = f"{name}_low", f"{name}_high"
    if band := _known(run, name, *ends):
        at, low, high = figures.columns(band, "step", *ends)
        axes.fill_between(at, low, high, color=color(number), alpha=0.15, lw=0)


def _table(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps [S], noise levels [L] rising and the gap [S,L], NaN where a step measured other levels; None without any."""
    names = sorted({name for row in run.points for name in row if name.startswith("gap@")}, key=_sigma)
    rows = [row for row in run.points if any(row.get(name) is not None for name in names)]
    if not rows:
        return None
    gap = np.array([[row.get(name) for name in names] for row in rows], np.float64)  # None is NaN
    return np.array([row["step"] for row in rows]), np.array([_sigma(name) for name in names]), gap


def _sigma(name: str) -> float:
    return float(name.removeprefix("gap@"))


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

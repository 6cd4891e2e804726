"""The report's figures: SVG from a `Run`'s arrays, without pyplot and its global state.

Each function returns a `Plot`, or None when no run has what it shows. Runs differ in colour and
marker (Okabe–Ito colours, safe for colour-blind readers); training against held-out is solid against
dashed, everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from mdiff.probes.records import Curve
from mdiff.report.collect import Run
from mdiff.report.words import bounded, fraction, thresholds

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _GRID = "#333d47", "#d9dfe4"
_CONTROL = ("#555555", "--", "held-out control")
_DASHES = ("-", "--", ":", "-.")
_POINTS = 400  # more points than a panel has pixels only make the page heavy


class Plot(NamedTuple):
    """An SVG document, and where its (last) axes lie, so that a page can put marks on it.

    Attributes:
      svg: the document.
      box: left, right, bottom, top of the axes as shares of the picture, from its lower left corner.
      x: data at the left and right end of the axes.
      y: data at their bottom and top.
    """

    svg: str
    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]


def color(index: int) -> str:
    """The colour of run number `index`."""
    return COLORS[index % len(COLORS)]


def rates(runs: Sequence[Run]) -> Plot | None:
    """Memorized fraction and control of every run, with their intervals, on one axis."""
    rows = [
        (f"{run.name}, {label}", run.estimates[name], i, name == "memorized")
        for i, run in enumerate(runs)
        for name, label in (("memorized", "memorized"), ("control", "control"))
        if name in run.estimates
    ]
    return _whiskers(rows, "share of generations", percent=True)


def energies(runs: Sequence[Run]) -> Plot | None:
    """Energy distance of every run with its interval, and the floor."""
    rows = []
    for i, run in enumerate(runs):
        if run.quality is None:
            continue
        quality, reference, floor = run.quality
        rows.append((f"{run.name}, to {reference}", quality, i, True))
        if floor is not None and reference == "held-out":
            rows.append((f"{run.name}, floor", floor, i, False))
    return _whiskers(rows, "energy distance (lower is better)", percent=False)


def training(runs: Sequence[Run]) -> Plot | None:
    """Loss over step, and below it on the same axis the memorized fraction with its interval."""
    has_loss, has_points = any(run.losses for run in runs), any(run.points for run in runs)
    if not has_loss and not has_points:
        return None
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(5.2, 2.2 * (has_loss + has_points) + 0.4), layout="constrained")
        panels = list(np.atleast_1d(figure.subplots(has_loss + has_points, 1, sharex=True)))
        if has_loss:
            _losses(panels[0], runs)
        if has_points:
            _points(panels[-1], runs)
        panels[-1].set_xlabel("training step")
        entries = [(color(i), "-", run.name) for i, run in enumerate(runs) if run.losses or run.points]
        control = any(row.get("control") is not None for run in runs for row in run.points)
        legend(panels[0], entries + [_CONTROL] * control + kept(panels, runs))
        return svg(figure)


def similarity(runs: Sequence[Run], space: str, kind: str) -> Plot | None:
    """AMS or UMS over the threshold, training solid with its band, held-out dashed.

    Args:
      runs: the runs to overlay.
      space: "cosine" (a match counts at or above the threshold) or "rms" (at or below it).
      kind: "ams" or "ums".
    """
    drawn = [
        (i, run, part, curve)
        for i, run in enumerate(runs)
        for part in ("train", "heldout")
        if (curve := _curve(run, space, part, kind)) is not None
    ]
    if not drawn:
        return None
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.subplots()
        for i, _, part, (grid, middle, low, high) in drawn:
            axes.plot(grid, middle, "-" if part == "train" else "--", color=color(i), lw=1.8)
            axes.fill_between(grid, low, high, color=color(i), alpha=0.15, lw=0)
        entries = [(color(i), "-", run.name) for i, run, part, _ in drawn if part == "train"]
        control = any(part == "heldout" for _, _, part, _ in drawn)
        if kind == "ams":
            axes.set_ylim(-0.02, 1.05)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("least cosine similarity τ" if space == "cosine" else "greatest RMS distance δ")
        symbol = "τ" if space == "cosine" else "δ"
        axes.set_ylabel(f"{kind.upper()}({symbol})")
        legend(axes, entries + [_CONTROL] * control)
        return svg(figure)


def ratios(runs: Sequence[Run]) -> Plot | None:
    """Cumulative share of generations over d(nearest)/d(second nearest), with the threshold."""
    drawn = [(i, run) for i, run in enumerate(runs) if run.arrays.get("ratio") is not None]
    if not drawn:
        return None
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.subplots()
        control = False
        for i, run in drawn:
            for name, dash in (("ratio", "-"), ("control_ratio", "--")):
                if run.arrays.get(name) is None:
                    continue
                x, y = cumulative(run.arrays[name])
                axes.plot(x, y, dash, color=color(i), lw=1.8, drawstyle="steps-post")
                control = control or name == "control_ratio"
        entries = [(color(i), "-", run.name) for i, run in drawn]
        entries += [_CONTROL] * control
        for cut in thresholds(run for _, run in drawn):
            axes.axvline(cut, color=_INK, lw=1.2, ls=":")
            entries.append((_INK, ":", f"threshold {fraction(cut)}"))
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.02, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("ratio: distance to the nearest / to the second nearest image")
        axes.set_ylabel("generations with a ratio below")
        legend(axes, entries)
        return svg(figure)


def probe_curve(curves: Sequence[tuple[int, str, Curve]]) -> Plot | None:
    """One curve of a probe, for several runs: runs differ in colour, lines of a run in dash.

    Args:
      curves: (run number, run name, curve), all of one title.
    """
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        lines = list(dict.fromkeys(line.name for *_, curve in curves for line in curve.series))
        for i, _, curve in curves:
            for line in curve.series:
                x, y = np.asarray(curve.x, np.float64), np.asarray(line.y, np.float64)
                dash = _DASHES[lines.index(line.name) % len(_DASHES)]
                marker = MARKERS[i % len(MARKERS)] if np.isfinite(y).sum() == 1 else ""
                axes.plot(x, y, dash, marker=marker, color=color(i), lw=1.6)
                if line.low is not None and line.high is not None:
                    low, high = (np.asarray(end, np.float64) for end in (line.low, line.high))
                    axes.fill_between(x, low, high, color=color(i), alpha=0.15, lw=0)
        if not axes.has_data():
            return None
        entries = [(color(i), "-", name) for i, name, _ in curves] if len(curves) > 1 else []
        if len(lines) > 1 or not entries:
            ink = _INK if entries else color(curves[0][0])
            entries += [(ink, _DASHES[k % len(_DASHES)], name) for k, name in enumerate(lines)]
        axes.set_xlabel(curves[0][2].x_label)
        legend(axes, entries)
        return svg(figure)


def cumulative(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The empirical distribution function of `values` [N], thinned to at most 400 steps.

    Returns:
      (x, y): sorted values, and the share of all values at or below each; starts at (0, 0).
    """
    ordered = np.sort(np.asarray(values, np.float64)[np.isfinite(values)])
    if len(ordered) == 0:
        return np.zeros(1), np.zeros(1)
    kept = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), _POINTS)).round().astype(int))
    return np.append(0.0, ordered[kept]), np.append(0.0, (kept + 1) / len(ordered))


def kept(panels: Sequence[Axes], runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """A line at the step that each run was stopped early and went back to, and the entry that explains it."""
    marked = [(color(i), run.early["kept"]) for i, run in enumerate(runs) if "kept" in run.early]
    for axes in panels:
        for ink, step in marked:
            axes.axvline(step, color=ink, lw=1.2, ls=":")
    return [(_CONTROL[0], ":", "kept by early stopping")] if marked else []


def _losses(axes: Axes, runs: Sequence[Run]) -> None:
    positive = True
    for i, run in enumerate(runs):
        rows = [(row["step"], row["loss"]) for row in run.losses if row["loss"] is not None]
        if not rows:
            continue
        steps, loss = _thin(np.array(rows, np.float64))
        positive = positive and bool((loss > 0).all())
        axes.plot(steps, loss, color=color(i), lw=1.5)
    if positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("training loss")


def _points(axes: Axes, runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        if not run.points:
            continue
        steps, middle = columns(run.points, "step", "memorized")
        axes.plot(steps, middle, color=color(i), lw=1.5, marker=MARKERS[i % len(MARKERS)], ms=4)
        ends = ("memorized_low", "memorized_high")
        band = [row for row in run.points if all(row.get(end) is not None for end in ends)]
        if band:
            at, low, high = columns(band, "step", *ends)
            axes.fill_between(at, low, high, color=color(i), alpha=0.15, lw=0)
        known = [row for row in run.points if row.get("control") is not None]
        if known:
            axes.plot(*columns(known, "step", "control"), "--", color=color(i), lw=1.2)
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("memorized")


def _whiskers(rows: Sequence[tuple[str, Any, int, bool]], label: str, percent: bool) -> Plot | None:
    if not rows:
        return None
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(5.2, 0.3 * len(rows) + 0.75), layout="constrained")
        axes = figure.subplots()
        for place, (_, value, i, filled) in enumerate(rows):
            if bounded(value):
                axes.plot([value.low, value.high], [place, place], color=color(i), lw=3, alpha=0.45)
            face = color(i) if filled else "white"
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(value.value, place, marker, color=color(i), mfc=face, mew=1.6, ms=7, clip_on=False)
        axes.set_yticks(range(len(rows)), labels=[short(name) for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(label)
        if percent:
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.axvline(0, color=_INK, lw=0.8)
            axes.margins(x=0.08)
        axes.grid(False, axis="y")
        return svg(figure)


def _curve(run: Run, space: str, side: str, kind: str) -> np.ndarray | None:
    """[4,T]: thresholds, value, low, high; None when the audit has no such curve."""
    tree = ((run.audit.get("curves") or {}).get(space) or {}).get(side) or {}
    names = ("tau", kind, f"{kind}_low", f"{kind}_high")
    if not all(tree.get(name) for name in names):
        return None
    return np.array([tree[name] for name in names], np.float64)


def columns(rows: Iterable[Mapping[str, Any]], *names: str) -> tuple[np.ndarray, ...]:
    """Entries `names` of each row, each as float64 [N]."""
    table = np.array([[row[name] for name in names] for row in rows], np.float64)
    return tuple(table.T)


def _thin(rows: np.ndarray) -> np.ndarray:
    """[N,2] as [2,M]; above 400 rows, means of blocks of neighbouring rows."""
    size = -(-len(rows) // _POINTS)
    blocks = [rows[i : i + size].mean(axis=0) for i in range(0, len(rows), size)]
    return np.array(blocks).T


def legend(axes: Axes, entries: Sequence[tuple[str, str, str]]) -> None:
    """Lines above the axes, as (colour, dash, name)."""
    # Texts are set afterwards: matplotlib leaves out labels that begin with "_".
    handles = [Line2D([], [], color=ink, ls=dash, lw=1.8) for ink, dash, _ in entries]
    names = [short(name) for *_, name in entries]
    across = len(names) if sum(map(len, names)) <= 50 - 6 * len(names) else 2
    legend = axes.legend(
        handles,
        [str(i) for i in range(len(names))],
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=across,
        columnspacing=1.2,
        borderaxespad=0.3,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def short(name: str, most: int = 40) -> str:
    """A name cut to what a legend has room for."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def style() -> Any:
    """How all figures of the page look."""
    return {
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
        "axes.grid": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "svg.hashsalt": "mdiff",
        "svg.fonttype": "path",
        "text.parse_math": False,  # a run called "$x" is a name, not a formula
    }


def svg(figure: Figure) -> Plot:
    """The figure as a document, the same for the same results."""
    FigureCanvasSVG(figure)
    stream = io.StringIO()
    # No date in the file: the same results give the same page.
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    axes = figure.axes[-1]
    place = axes.get_position()  # after drawing: the layout is made then
    left, right, bottom, top = (round(float(x), 5) for x in (place.x0, place.x1, place.y0, place.y1))
    x, y = (tuple(float(end) for end in ends) for ends in (axes.get_xlim(), axes.get_ylim()))
    return Plot(stream.getvalue(), (left, right, bottom, top), (x[0], x[1]), (y[0], y[1]))

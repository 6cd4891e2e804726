"""The plots of a front: the plane of quality and memorization, the course of training, and both over the cutoff.

Series (settings that differ in cutoff alone) differ in colour and marker (Okabe-Ito colours), standard training is
black everywhere; what is on the front is filled, what is dominated hollow.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from mdiff.probes import pareto
from mdiff.report import figures
from mdiff.report.figures import COLORS, MARKERS
from mdiff.report.front import Front, Fronts, Point
from mdiff.report.front_cells import Measure
from mdiff.report.front_settings import Setting
from mdiff.types import Estimate

SOFT = "#6b7680"
_INK = "#333d47"
_BLACK = ("#000000", "*")
_AROUND = [(7, 5), (7, -11), (-7, 5), (-7, -11), (0, 9), (0, -15), (14, -3), (-14, -3), (16, 12), (16, -18)]
"""Places for a label around its point, in points; the first that is free is taken."""
Paint = tuple[str, str]
"""Colour and marker of a series."""
Label = tuple[Point, str, str, bool]
"""A point, its text ("" for none), the text's colour, and whether it is bold."""


def plane(found: Fronts) -> Figure:
    """Per front four panels: the front, the course of training, memorization and quality over the cutoff."""
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(11, 9.2 * len(found.fronts)), layout="constrained")
        parts = figure.subfigures(len(found.fronts), 1, squeeze=False, hspace=0.04)[:, 0]
        labels = [
            each
            for part, front in zip(parts, found.fronts, strict=True)
            for each in _panels(part, front, found)
        ]
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()  # places are known from here on
        for axes, texts in labels:
            _label(axes, texts)
        return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG document, the same for the same results."""
    with matplotlib.rc_context(style()):
        FigureCanvasSVG(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        return stream.getvalue()


def png(figure: Figure, dots: int = 130) -> bytes:
    """The figure as a PNG file."""
    with matplotlib.rc_context(style()):
        FigureCanvasAgg(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=dots, metadata={"Software": None})
        return stream.getvalue()


def _panels(part: SubFigure, front: Front, found: Fronts) -> list[tuple[Axes, list[Label]]]:
    (first, second), (third, fourth) = part.subplots(2, 2)
    paints = _paints(front.settings)
    labels = [
        (first, _front(first, front, found, paints)),
        (second, _course(second, front, found, paints)),
    ]
    _over_cutoff(third, front, found.memorized, lambda point: point.memorized, paints)
    _over_cutoff(fourth, front, found.quality, lambda point: point.quality, paints)
    part.legend(handles=_legend(paints), loc="outside upper center", ncols=4, frameon=False)
    if front.name:
        part.suptitle(front.name, x=0.02, ha="left", weight="bold")
    return labels


def _paints(settings: Sequence[Setting]) -> dict[str, Paint]:
    series = list(dict.fromkeys(one.series for one in settings if not one.standard))
    found = {name: (COLORS[i % 6], MARKERS[i % len(MARKERS)]) for i, name in enumerate(series)}
    return ({"standard": _BLACK} if any(one.standard for one in settings) else {}) | found


def _legend(paints: Mapping[str, Paint]) -> list[Line2D]:
    names = {"standard": "standard training", "ambient": "ambient training"}
    handles = [
        Line2D(
            [],
            [],
            color=ink,
            marker=marker,
            ls="-",
            lw=1.4,
            ms=_size(marker),
            label=figures.short(names.get(name, name), 44),
        )
        for name, (ink, marker) in paints.items()
    ]
    return [
        *handles,
        Line2D([], [], color=SOFT, lw=5, alpha=0.4, label="the front"),
        Line2D([], [], color=_INK, marker="o", ls="", label="on the front (filled)"),
        Line2D([], [], color=_INK, marker="o", mfc="white", ls="", label="dominated (hollow)"),
    ]


# ---------------------------------------------------------------------------------------------- the panels


def _front(axes: Axes, front: Front, found: Fronts, paints: Mapping[str, Paint]) -> list[Label]:
    axes.set_title("At the end of training: means over seeds, and single cells (small)", loc="left")
    settings = [one for one in front.settings if one.name in front.means]
    _staircase(axes, list(front.means.values()), found.quality)
    for one in settings:
        ink, marker = paints[one.series]
        for cell in one.measured.values():
            point = front.cells[cell.name]
            axes.plot(
                point.quality.value, point.memorized.value, ".", color=ink, ms=4, alpha=0.45, mew=0, zorder=2
            )
    for one in settings:
        point, (ink, marker) = front.means[one.name], paints[one.series]
        at = (point.quality.value, point.memorized.value)
        axes.errorbar(
            *at,
            xerr=_arms(point.quality),
            yerr=_arms(point.memorized),
            fmt="none",
            ecolor=ink,
            elinewidth=1,
            alpha=0.4,
            zorder=1,
        )
        face = ink if point.on_front else "white"
        axes.plot(
            *at, marker, color=ink, mfc=face, mew=1.4, ms=_size(marker), zorder=4 if point.on_front else 3
        )
    _axes_of_plane(axes, found)
    return [
        (
            front.means[one.name],
            "standard" if one.standard else f"{one.cutoff:g}",
            paints[one.series][0],
            one.standard or front.means[one.name].on_front,
        )
        for one in sorted(settings, key=lambda one: not front.means[one.name].on_front)
    ]


def _course(axes: Axes, front: Front, found: Fronts, paints: Mapping[str, Paint]) -> list[Label]:
    axes.set_title("Along training: means over seeds at every measured step", loc="left")
    if not front.along:
        axes.text(
            0.5,
            0.5,
            textwrap.fill(f"none: {front.no_along}", 46),
            ha="center",
            va="center",
            transform=axes.transAxes,
        )
        axes.set_axis_off()
        return []
    _staircase(axes, front.along, found.quality)
    last: dict[str, Point] = {point.name: point for point in front.along}
    for one in front.settings:
        points = [point for point in front.along if point.name == one.name]
        if not points:
            continue
        ink, marker = paints[one.series]
        bold = one.standard or any(point.on_front for point in points)
        x, y = zip(*((point.quality.value, point.memorized.value) for point in points), strict=True)
        axes.plot(x, y, "-", color=ink, lw=1.3 if bold else 0.7, alpha=0.9 if bold else 0.35, zorder=2)
        for point in points:
            face = ink if point.on_front else "white"
            size = _size(marker) * (1.0 if point.on_front or point is last[point.name] else 0.55)
            axes.plot(
                point.quality.value,
                point.memorized.value,
                marker,
                color=ink,
                mfc=face,
                ms=size,
                mew=1,
                alpha=1 if bold else 0.5,
                zorder=4 if point.on_front else 3,
            )
    _axes_of_plane(axes, found)
    values = [point.quality.value for point in front.along]
    if min(values) > 0 and max(values) > 3 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    known = {one.name: one for one in front.settings}
    labels: list[Label] = []
    for point in front.along:
        one = known[point.name]
        text = f"{'standard' if one.standard else f'{one.cutoff:g}'} @{point.step}" if point.on_front else ""
        labels.append((point, text, paints[one.series][0], one.standard))
    return labels


def _over_cutoff(
    axes: Axes,
    front: Front,
    measure: Measure,
    value: Callable[[Point], Estimate],
    paints: Mapping[str, Paint],
) -> None:
    axes.set_title(f"{measure.label}, by cutoff", loc="left")
    places = {
        level: i for i, level in enumerate(sorted({one.cutoff for one in front.settings if not one.standard}))
    }
    for one in front.settings:
        if not one.standard or one.name not in front.means:
            continue
        number = value(front.means[one.name])
        axes.axhline(number.value, color="black", ls="--", lw=1.2, zorder=2)
        if _bounded(number):
            axes.axhspan(number.low, number.high, color="black", alpha=0.08, lw=0)
    drawn = [(series, paint) for series, paint in paints.items() if series != "standard"]
    count = len(drawn)
    for k, (series, (ink, marker)) in enumerate(drawn):
        part = [
            one
            for one in front.settings
            if one.series == series and not one.standard and one.name in front.means
        ]
        part.sort(key=lambda one: one.cutoff)
        x = [
            places[one.cutoff] + 0.12 * (k - (count - 1) / 2) for one in part
        ]  # side by side, so that arms show
        numbers = [value(front.means[one.name]) for one in part]
        axes.plot(x, [number.value for number in numbers], "-", color=ink, lw=1.2, zorder=2)
        for at, one, number in zip(x, part, numbers, strict=True):
            axes.errorbar(
                at, number.value, yerr=_arms(number), fmt="none", ecolor=ink, elinewidth=1.2, alpha=0.6
            )
            face = ink if front.means[one.name].on_front else "white"
            axes.plot(at, number.value, marker, color=ink, mfc=face, mew=1.4, ms=_size(marker), zorder=3)
    axes.set_xticks(list(places.values()), labels=[f"{level:g}" for level in places])
    axes.set_xlim(-0.6, max(0, len(places) - 1) + 0.6)
    axes.set_xlabel("cutoff (noise level); dashed: standard training")
    axes.set_ylabel(_axis(measure))
    _rate(axes, measure, "y")
    _from_zero(axes, measure)


def _axes_of_plane(axes: Axes, found: Fronts) -> None:
    axes.set_xlabel(_axis(found.quality))
    axes.set_ylabel(_axis(found.memorized))
    _rate(axes, found.quality, "x")
    _rate(axes, found.memorized, "y")
    axes.margins(0.06)
    _from_zero(axes, found.memorized)


def _from_zero(axes: Axes, measure: Measure) -> None:
    """A share is shown from 0 up, with a little room below for the markers."""
    if measure.limits[0] == 0:
        top = max(axes.get_ylim()[1], 0.01)
        axes.set_ylim(-0.04 * top, top)


def _staircase(axes: Axes, points: Sequence[Point], quality: Measure) -> None:
    """The border of what the points dominate; to be drawn before anything sets the limits."""
    rows = np.array([[quality.sign * point.quality.value, point.memorized.value] for point in points])
    steps = pareto.staircase(rows)
    low, high = rows.min(0), rows.max(0)
    room = 0.05 * np.where(high > low, high - low, 1.0)
    x = np.concatenate([steps[:1, 0], steps[:, 0], [high[0] + room[0]]])
    y = np.concatenate([[high[1] + room[1]], steps[:, 1], steps[-1:, 1]])
    axes.plot(
        quality.sign * x,
        y,
        color=SOFT,
        lw=5,
        alpha=0.4,
        drawstyle="steps-post",
        zorder=1,
        solid_joinstyle="miter",
    )


def _label(axes: Axes, labels: Sequence[Label]) -> None:
    """Each text at the place around its point where it hides least."""
    figure = axes.get_figure(root=True)
    if figure is None or not labels:
        return
    dot = figure.dpi / 72
    spots = axes.transData.transform([(point.quality.value, point.memorized.value) for point, *_ in labels])
    inside = axes.get_window_extent()
    taken = [(x - 4 * dot, y - 4 * dot, x + 4 * dot, y + 4 * dot) for x, y in spots]
    for (x, y), (point, text, ink, bold) in zip(spots, labels, strict=True):
        if not text:
            continue
        places = []
        for dx, dy in _AROUND:
            width, height = (5.8 if bold else 5.2) * dot * len(text), 8 * dot
            left = x + dx * dot - (0 if dx > 0 else width if dx < 0 else width / 2)
            box = (left, y + dy * dot, left + width, y + dy * dot + height)
            out = max(0, inside.x0 - box[0], box[2] - inside.x1, inside.y0 - box[1], box[3] - inside.y1)
            places.append((1000 * out + sum(_shared(box, other) for other in taken), (dx, dy), box))
        _, (dx, dy), box = min(places, key=lambda place: place[0])
        taken.append(box)
        axes.annotate(
            text,
            (point.quality.value, point.memorized.value),
            (dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="bottom",
            color=ink,
            fontsize=9 if bold else 8.5,
            weight="bold" if bold else "normal",
            zorder=5,
            path_effects=[withStroke(linewidth=2, foreground="white", alpha=0.8)],
        )


def _shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# ------------------------------------------------------------------------------------------- small things


def _size(marker: str) -> float:
    return 12.0 if marker == "*" else 7.0


def _bounded(value: Estimate) -> bool:
    return math.isfinite(value.low) and math.isfinite(value.high)


def _arms(value: Estimate) -> list[list[float]] | None:
    """Lengths of an error bar; limits can lie inside the value by rounding."""
    return (
        [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
        if _bounded(value)
        else None
    )


def _axis(measure: Measure) -> str:
    return f"{measure.label} ({measure.better} is better)"


def _rate(axes: Axes, measure: Measure, which: str) -> None:
    if measure.kind == "rate":
        (axes.xaxis if which == "x" else axes.yaxis).set_major_formatter(PercentFormatter(1.0))


def style() -> Any:
    """How all pictures of a front look, for `matplotlib.rc_context`."""
    return {**figures.style(), "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9.5}

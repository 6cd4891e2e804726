"""The plots of an attack: clusters, what the classifier knows, curves over the strength and over all thresholds.

Training images are solid, held-out images dashed, as in every figure; strengths have colours of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from mdiff.report import figures, parts
from mdiff.report.figures import COLORS, MARKERS
from mdiff.report.parts import Captioned, Row

_INK, _SOFT = "#333d47", "#555555"
_SIZE = (5.2, 3.2)
_GAP = 0.06  # least distance of two marked strengths along an axis of length 1


class _Line(NamedTuple):
    rows: Sequence[Row | None]
    name: str
    color: str
    dash: str = "-"


def clusters(about: Sequence[Row], cohesion: float, min_size: int) -> Captioned:
    """Size and cohesion of every cluster, and the limits that decide which are kept.

    Args:
      about: `size`, `cohesion` and `kept` of each.
      cohesion: least cohesion of those kept.
      min_size: their least size.
    """
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        size, cosine = (np.array([one[key] for one in about], np.float64) for key in ("size", "cohesion"))
        kept = np.array([one["kept"] for one in about], bool)
        axes.plot(cosine[kept], size[kept], "o", color=COLORS[0], ms=6, alpha=0.75, mew=0)
        axes.plot(cosine[~kept], size[~kept], "o", color=COLORS[1], mfc="none", ms=6, mew=1.4)
        axes.axvline(cohesion, color=_INK, lw=1, ls=":")
        axes.axhline(min_size, color=_INK, lw=1, ls=":")
        axes.set(xlabel="cohesion", ylabel="images", ylim=(0, None))
        axes.margins(x=0.06)
        drawn = axes.get_lines()[:2]
        names = ("kept", "dropped") if not kept.all() else ("kept",)
        axes.legend(
            drawn[: len(names)],
            names,
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=2,
            handletextpad=0.1,
        )
        return _plot(
            figure, "Every cluster; dotted: the least cohesion and size of those kept.", "Size over cohesion"
        )


def knowledge(found: Row, guess: float) -> list[Captioned]:
    """Accuracy and calibration error of the classifier at each noise level.

    Args:
      found: `classifier` of side.json.
      guess: accuracy of a classifier that knows nothing.
    """
    accuracy = _by_level(found["levels"], _Line(found["accuracy"], "accuracy", COLORS[0]), "accuracy", guess)
    error = _by_level(
        found["levels"], _Line(found["ece"], "calibration error", COLORS[1]), "calibration error", None
    )
    return [
        _plot(
            accuracy,
            "Where it is no better than naming the largest class (dotted), guidance is noise.",
            "Accuracy over noise",
        ),
        _plot(
            error,
            "Mean gap between confidence and accuracy, before the temperatures that correct it.",
            "Calibration error over noise",
        ),
    ]


def over_strength(tree: Row) -> list[Captioned]:
    """What came out, what the attacker sees, and quality, over the strength of the guidance."""
    ones = tree["strengths"]
    found = [one["scores"]["references"]["train"]["estimates"] for one in ones]
    seen = [one["repetition"]["grouped"] for one in ones]
    beside = [one["beside_unguided"] for one in ones]
    floor = tree["settings"]["quality_floor"] * _at(ones, 0.0)["beside_unguided"]["precision"]["value"]

    def pair(key: str, name: str, color: str) -> list[_Line]:
        control = [_Line([e.get(f"{key}_control") for e in found], "held-out control", _SOFT, "--")]
        return [
            _Line([e[key] for e in found], name, color),
            *(control if f"{key}_control" in found[0] else []),
        ]

    made = [
        _plot(
            _curves(tree, pair("memorized", "copies", COLORS[0]), "share of generations"),
            "Generations that the ratio rule calls copies of training images, and of held-out images.",
            "Copies over the strength",
        ),
        _plot(
            _curves(
                tree,
                pair("coverage", "different images", COLORS[1]),
                f"share of {found[0]['coverage']['n']} images",
            ),
            "Different images copied: falls where guidance leads many generations to one image.",
            "Different training images over the strength",
        ),
        _plot(
            _curves(tree, [_Line(seen, "in groups of repeats", COLORS[2])], "share of generations"),
            "What the attacker sees: generations in groups of near-identical ones. The most of it is chosen, where quality allows.",
            "Repetition over the strength",
        ),
        _plot(
            _curves(
                tree,
                [
                    _Line([one["precision"] for one in beside], "beside unguided ones", COLORS[3]),
                    _Line(
                        [{"value": one["spread"]} for one in beside],
                        "spread, against theirs",
                        COLORS[5],
                        "-.",
                    ),
                ],
                "share",
                level=floor,
            ),
            "What the attacker may give up for it: above the dotted floor a strength may be chosen.",
            "Quality that the attacker sees, over the strength",
        ),
    ]
    if ones[0]["quality"]:
        quality = [one["quality"] for one in ones]
        lines = [
            _Line([q[key] for q in quality], key, COLORS[place])
            for key, place in (("precision", 4), ("recall", 5))
        ]
        made += [
            _plot(
                _curves(tree, lines, "share"),
                "The same generations beside held-out images: precision, how many look real; recall, how much of "
                "the variety is there.",
                "Precision and recall over the strength",
            ),
            _plot(
                _curves(
                    tree,
                    [_Line([q["energy"] for q in quality], "energy distance", COLORS[0])],
                    "energy distance",
                    percent=False,
                ),
                "Distance of the same generations to held-out images; lower is better.",
                "Energy distance over the strength",
            ),
        ]
    return made


def thresholds(tree: Row, scale: float) -> list[Captioned]:
    """Share of generations whose nearest image is past each cosine: training against held-out, and the difference.

    Args:
      tree: side.json.
      scale: strength of the first plot.
    """
    scores = _at(tree["strengths"], scale)["scores"]
    sides = [("train", "training", COLORS[0], "-")]
    if scores["control"] is not None:
        sides.append((scores["control"], "held-out control", _SOFT, "--"))
    lines = [
        (scores["references"][side]["curves"]["cosine"], "ams", name, ink, dash)
        for side, name, ink, dash in sides
    ]
    made = [
        _plot(
            _over_cosine(lines, "AMS(τ)"),
            f"Strength {scale:g}: share of generations whose nearest image has this cosine or more.",
            "Share of generations over the threshold",
        )
    ]
    if scores["control"] is not None:
        scales = dict.fromkeys((0.0, tree["chosen"], tree["oracle"]))
        curves = {
            one: _at(tree["strengths"], one)["scores"]["references"]["train"]["curves"] for one in scales
        }
        lines = [
            (curve["cosine"], "excess", f"strength {one:g}", COLORS[place], "-")
            for place, (one, curve) in enumerate(curves.items())
        ]
        made.append(
            _plot(
                _over_cosine(lines, "AMS(τ), training − held-out"),
                "Training less held-out: a conclusion that holds near one threshold only would show.",
                "Excess over held-out over the threshold",
            )
        )
    return made


# ------------------------------------------------------------------------------------------- the axes


def _by_level(levels: Sequence[float], line: _Line, label: str, guess: float | None) -> Figure:
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        _band(axes, levels, line, 0)
        if guess is not None:
            axes.axhline(guess, color=_INK, lw=1.2, ls=":")
        axes.set(xscale="log", xlabel="noise level σ", ylabel=label, ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return figure


def _curves(
    tree: Row, lines: Sequence[_Line], label: str, *, percent: bool = True, level: float | None = None
) -> Figure:
    scales = [one["scale"] for one in tree["strengths"]]
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for place, line in enumerate(lines):
            _band(axes, scales, line, place)
        if level is not None:
            axes.axhline(level, color=_INK, lw=1.2, ls=":")
        axes.set(xlabel="strength of the guidance λ", ylabel=label, ylim=(0, None))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _strengths(axes, scales)
        _marks(axes, tree["chosen"], tree["oracle"])
        figures.legend(axes, [(line.color, line.dash, line.name) for line in lines])
        return figure


def _strengths(axes: Axes, scales: Sequence[float]) -> None:
    """A logarithmic axis that holds strength 0, with as many of the strengths named as there is room for."""
    positive = [scale for scale in scales if scale > 0]
    if positive:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        axes.set_xlim(min(scales) - 0.25 * min(positive), 1.08 * max(scales))
    place = axes.transData.transform
    low, high = (place((end, 0))[0] for end in (min(scales), max(scales)))
    named: list[float] = []
    for scale in sorted(scales):
        at = place((scale, 0))[0]
        if not named or at - place((named[-1], 0))[0] >= _GAP * (high - low):
            named.append(scale)
    axes.set_xticks(named, labels=[f"{scale:g}" for scale in named])
    axes.minorticks_off()


def _marks(axes: Axes, chosen: float, oracle: float) -> None:
    """Upright lines at the strength chosen and at the best in truth; neither where it is the model alone."""
    marks = sorted({(chosen, "chosen", "-"), (oracle, "most copies", ":")})
    if chosen == oracle:
        marks = [(chosen, "chosen and most copies", "-")]
    marks = [mark for mark in marks if mark[0]]
    for i, (scale, name, dash) in enumerate(marks):
        axes.axvline(scale, color=_INK, lw=1, ls=dash, zorder=1)
        axes.text(
            scale,
            0.03,
            f"{name}: {scale:g}",
            transform=axes.get_xaxis_transform(),
            rotation=90,
            ha="left" if i else "right",  # two names stand on either side of their lines
            va="bottom",
            fontsize=8.5,
            color=_INK,
            bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5},
        )


def _over_cosine(lines: Sequence[tuple[Row, str, str, str, str]], label: str) -> Figure:
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for curve, key, _, ink, dash in lines:
            value, low, high = (np.array(curve[key + end], np.float64) for end in ("", "_low", "_high"))
            axes.plot(curve["tau"], value, dash, color=ink, lw=1.8)
            axes.fill_between(curve["tau"], low, high, color=ink, alpha=0.15, lw=0)
        axes.set(xlabel="least cosine similarity τ", ylabel=label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        figures.legend(axes, [(ink, dash, name) for _, _, name, ink, dash in lines])
        return figure


def _band(axes: Axes, x: Sequence[float], line: _Line, place: int) -> None:
    """A line with its intervals; a number that is missing leaves a gap."""
    value, low, high = (
        np.array([(row or {}).get(key) for row in line.rows], np.float64) for key in ("value", "low", "high")
    )
    marker = MARKERS[place % len(MARKERS)]
    axes.plot(x, value, line.dash, color=line.color, marker=marker, ms=4.5, lw=1.6, clip_on=False, zorder=3)
    axes.fill_between(x, low, high, color=line.color, alpha=0.15, lw=0)


def _at(strengths: Sequence[Row], scale: float) -> Row:
    return next(one for one in strengths if one["scale"] == scale)


def _plot(figure: Figure, caption: str, alt: str) -> Captioned:
    return parts.captioned(figure, caption, alt, "side.json")

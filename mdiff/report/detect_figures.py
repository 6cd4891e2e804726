"""The plots of detectors of memorized prompts: ROC curves, how the rate of copies grows, and scores by copies.

The best detectors have a colour each, the same in every figure; the others are grey. Kinds of prompts differ in marker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from mdiff.report import figures, parts
from mdiff.report.figures import COLORS
from mdiff.report.nemo_figures import copies_axis, kind_color, kinds_of
from mdiff.report.parts import Captioned, Row

COLORED = 6
"""Detectors with a colour of their own."""
PANELS = 6
"""Detectors whose scores are drawn by copies."""
_INK, _REST = "#333d47", "#c3cad0"
FIT = COLORS[5]  # of no kind of prompts
_SIZE = (5.2, 4.3)
_FILE = "detect.json"


def roc(
    ordered: Sequence[Row], arrays: Mapping[str, np.ndarray], group: str, false_alarms: float
) -> list[Captioned]:
    """ROC curves of one group, over a linear and a logarithmic false-positive rate; none where it was not evaluated.

    Args:
      ordered: detectors, the best first.
      arrays: of detect.npz.
      group: such as "all".
      false_alarms: the rate that is marked.
    """
    there = [(i, one) for i, one in enumerate(ordered) if one["groups"][group] is not None]
    if not there:
        return []
    negatives = there[0][1]["groups"][group]["negatives"]
    least = 0.5 / max(negatives, 1)  # no alarm at all has no place on a logarithmic axis
    made = []
    for log in (False, True):
        with matplotlib.rc_context(figures.style()):
            figure = Figure(figsize=_SIZE, layout="constrained")
            axes = figure.subplots()
            for i, one in reversed(there):  # the best on top
                fpr, tpr = (
                    np.asarray(arrays[f"roc_{one['name']}_{group}_{end}"], np.float64)
                    for end in ("fpr", "tpr")
                )
                ink, width = (COLORS[i], 1.8) if i < COLORED else (_REST, 1.0)
                axes.plot(*_stepped(fpr, tpr, least if log else 0.0), color=ink, lw=width, clip_on=False)
            axes.axvline(false_alarms, color=_INK, lw=1, ls=":")
            even = np.geomspace(least, 1, 60) if log else np.linspace(0, 1, 2)
            axes.plot(even, even, "--", color=_INK, lw=0.9)
            axes.set(xlim=(least if log else -0.01, 1), ylim=(-0.01, 1.01), ylabel="memorized prompts found")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            if log:
                axes.set_xscale("log")
                axes.set_xlabel("ordinary prompts taken for memorized, logarithmic")
            else:
                axes.set_xlabel("ordinary prompts taken for memorized")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
            entries = [(COLORS[i], "-", one["name"]) for i, one in there if i < COLORED]
            more = len(there) - len(entries)
            entries += [(_REST, "-", f"{more} more")] if more else []
            figures.legend(axes, entries)
            positives = there[0][1]["groups"][group]["positives"]
            said = f"{positives} memorized against {negatives} other prompts; dotted: {100 * false_alarms:g} % false alarms, dashed: guessing."
            if log:
                said = f"The same where false alarms are rare; one prompt is {100 / max(negatives, 1):.2g} %."
            made.append(
                parts.captioned(figure, said, f"ROC curves, {group}{', logarithmic' if log else ''}", _FILE)
            )
    return made


def _stepped(fpr: np.ndarray, tpr: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """A ROC curve with what is left of `least` moved there; ties, which are slanted, stay straight in the rates themselves."""
    if not least:
        return fpr, tpr
    at = np.geomspace(least, 1, 400)
    x = np.unique(np.concatenate([at, fpr[fpr >= least]]))
    # np.interp takes the last of equal abscissas: the top of an upright part.
    return np.concatenate([[least], x]), np.concatenate([[0.0], np.interp(x, fpr, tpr)])


def recited(curve: Row, prompts: Sequence[Row]) -> Captioned:
    """Share of generations that are copies over the copies trained on: each prompt, each rung, the fit and its r50."""
    rungs = {int(copies): parts.estimate(value) for copies, value in curve["rungs"].items()}
    r50, slope = parts.estimate(curve["r50"]), parts.estimate(curve["slope"])
    with matplotlib.rc_context(figures.style()):
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        axes = figure.subplots()
        known = [row for row in prompts if row["copies"] and row["recited"] is not None]
        rng = np.random.Generator(np.random.Philox(0))
        kinds = kinds_of(known)
        for kind in kinds:
            table = np.array(
                [(row["copies"], row["recited"]) for row in known if row["kind"] == kind], np.float64
            )
            x = table[:, 0] * np.exp(rng.uniform(-0.09, 0.09, len(table)))
            y = table[:, 1] + rng.uniform(-0.012, 0.012, len(table))
            axes.plot(x, y, "o", color=kind_color(kind), ms=3.5, alpha=0.35, mew=0)
        for copies, value in rungs.items():
            axes.plot([copies, copies], [value.low, value.high], color=_INK, lw=1.6)
            axes.plot(copies, value.value, "s", color=_INK, ms=5)
        if math.isfinite(r50.value) and r50.value > 0 and math.isfinite(slope.value):
            x = np.geomspace(min(rungs), max(rungs), 200)
            logit = slope.value * (np.log10(x) - np.log10(r50.value))
            axes.plot(x, 1 / (1 + np.exp(-np.clip(logit, -60, 60))), color=FIT, lw=1.8)
            if math.isfinite(r50.low) and math.isfinite(r50.high) and r50.low > 0:
                axes.axvspan(r50.low, r50.high, color=FIT, alpha=0.15, lw=0)
            axes.axvline(r50.value, color=FIT, lw=1.1, ls=":")
        axes.axhline(0.5, color=_INK, lw=0.8, ls=":")
        axes.set(
            xlabel="copies in the training set", ylabel="generations that are copies", ylim=(-0.04, 1.04)
        )
        low, high = min(rungs), max(rungs)
        axes.set_xlim(low / 1.35, high * 1.35)
        copies_axis(axes, sorted(rungs))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        figures.legend(
            axes,
            [(kind_color(kind), "-", kind) for kind in kinds]
            + [(_INK, "-", "mean"), (FIT, "-", "fit, and r50")],
        )
        return parts.captioned(
            figure,
            "Dots: prompts. Squares: means of all with as many copies. Band: interval of r50, where half the generations are copies.",
            "Share of copies over copies trained on",
            _FILE,
        )


def scores(ordered: Sequence[Row], prompts: Sequence[Row]) -> list[Captioned]:
    """Scores of the best detectors by the copies trained on; ordinary prompts stand at the left."""
    if len({row["copies"] for row in prompts}) < 2:
        return []
    made = []
    for one in ordered[:PANELS]:
        with matplotlib.rc_context(figures.style()):
            figure = Figure(figsize=(5.2, 3.2), layout="constrained")
            axes = figure.subplots()
            _scatter(axes, one["name"], prompts)
            axes.set(ylabel=figures.short(one["name"]), xlabel="copies in the training set")
            kinds = kinds_of(prompts)
            figures.legend(axes, [(kind_color(kind), "-", kind) for kind in kinds])
            side = "larger" if one["sign"] > 0 else "smaller"
            made.append(
                parts.captioned(
                    figure,
                    f"{one['name']}: {side} numbers speak for memorization.",
                    f"{one['name']} over copies",
                    _FILE,
                )
            )
    return made


def _scatter(axes: Axes, name: str, prompts: Sequence[Row]) -> None:
    counts = sorted({row["copies"] for row in prompts if row["copies"]})
    zero = min(counts) / 3
    rng = np.random.Generator(np.random.Philox(0))
    for kind in kinds_of(prompts):
        rows = [row for row in prompts if row["kind"] == kind and row["scores"].get(name) is not None]
        table = np.array([(row["copies"] or zero, row["scores"][name]) for row in rows], np.float64).reshape(
            -1, 2
        )
        x = table[:, 0] * np.exp(rng.uniform(-0.12, 0.12, len(table)))
        axes.plot(x, table[:, 1], "o", color=kind_color(kind), ms=3.5, alpha=0.5, mew=0)
    copies_axis(axes, counts)
    if any(not row["copies"] for row in prompts):
        ticks: list[Any] = [*axes.get_xticks()]
        names = [f"{each:,.0f}" for each in ticks]
        axes.set_xticks([zero, *ticks], labels=["none", *names])

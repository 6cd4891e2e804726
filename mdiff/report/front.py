"""The front of quality and memorization over the cells of sweeps: points, dominance, areas, and the course of training.

Cells compete when they were trained on the same images. On the front is what no other cell (no other setting) beats in
one of the two without losing in the other. Numbers come from the cells' result files alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mdiff.errors import UserError
from mdiff.probes import pareto
from mdiff.report.front_cells import Cell, Measure, check_alike, find_measure, images_of
from mdiff.report.front_settings import Setting, group, text
from mdiff.types import Estimate

RESAMPLES = 2000
_ALONG = {"quality": "energy_heldout", "memorized": "memorized"}
"""The measures that are also taken while a model trains."""


@dataclass(frozen=True)
class Point:
    """A place in the plane of quality and memorization.

    Attributes:
      name: of its cell or setting.
      step: training step the generations come from; None where cells of a setting differ in it.
      quality: with its interval.
      memorized: with its interval.
      control: what the rule of memorization finds among held-out images; None without them.
      on_front: nothing else is no worse in both and better in one.
      dominated_by: points on the front that dominate it.
      chance: share of bootstrap draws in which it is on the front; None for a cell.
    """

    name: str
    step: int | None
    quality: Estimate
    memorized: Estimate
    control: Estimate | None
    on_front: bool = False
    dominated_by: tuple[str, ...] = ()
    chance: float | None = None


@dataclass(frozen=True)
class Change:
    """A setting less its standard training, paired by seed."""

    quality: Estimate
    memorized: Estimate


@dataclass(frozen=True)
class Area:
    """What is dominated, up to a reference point (quality, memorized).

    Attributes:
      reference: the worst that counts, in the measures' own units.
      all: by all settings.
      without: by the settings that train on no noisy copies; None where there are none.
      added: the difference; None where one side has no settings.
    """

    reference: tuple[float, float]
    all: Estimate
    without: Estimate | None
    added: Estimate | None


@dataclass(frozen=True)
class Front:
    """The cells that were trained on the same images.

    Attributes:
      name: what tells its images from those of other fronts, such as "n 100"; "" when there is one.
      n: training images.
      confidence: level of all intervals.
      settings: all of them.
      cells: points of the measured cells, by name.
      means: points of the settings with a measured cell, by name.
      changes: of settings that have a standard training with common seeds, by name.
      beats: `beats[a][b]`: share of bootstrap draws in which setting a dominates b.
      area: of the means.
      along: points of settings at every measured step; empty where none can be had.
      along_of: generations each of those rests on.
      no_along: why there are none.
    """

    name: str
    n: int
    confidence: float
    settings: tuple[Setting, ...]
    cells: dict[str, Point]
    means: dict[str, Point]
    changes: dict[str, Change]
    beats: dict[str, dict[str, float]]
    area: Area
    along: tuple[Point, ...]
    along_of: int
    no_along: str


@dataclass(frozen=True)
class Fronts:
    """All fronts of a command, and what they are of."""

    quality: Measure
    memorized: Measure
    cells: tuple[Cell, ...]
    fronts: tuple[Front, ...]


def collect(
    cells: Sequence[Cell],
    quality: str = "energy_heldout",
    memorized: str = "memorized",
    reference: tuple[float, float] | None = None,
) -> Fronts:
    """The fronts of cells, one for each set of training images.

    Args:
      cells: from `front_cells.read_cells`.
      quality: a number of the audit, or PROBE.MEASURE.
      memorized: the same.
      reference: (quality, memorized) up to which areas are counted. By default the worst measured cell's quality,
        and 1 where the other is a share, else the worst cell's.

    Raises:
      UserError: no such measure, or cells that do not compare.
    """
    good, bad = find_measure("quality", quality, cells), find_measure("memorized", memorized, cells)
    check_alike(cells, (good, bad))
    if reference is not None and not all(map(math.isfinite, reference)):
        raise UserError(f"--reference {reference[0]} {reference[1]}: give two finite numbers")
    parts: dict[str, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(images_of(cell), []).append(cell)
    trees = {images: json.loads(images) for images in parts}
    varied = [name for name in next(iter(trees.values())) if len({text(t[name]) for t in trees.values()}) > 1]
    fronts = []
    for images, part in sorted(parts.items(), key=lambda item: trees[item[0]]["n"]):
        if any(cell.run is not None for cell in part):
            name = ", ".join(f"{field} {text(trees[images][field])}" for field in varied)
            fronts.append(_front(name, part, good, bad, reference))
    return Fronts(good, bad, tuple(cells), tuple(fronts))


def _front(
    name: str, cells: Sequence[Cell], good: Measure, bad: Measure, reference: tuple[float, float] | None
) -> Front:
    everything = group(cells)
    settings = [setting for setting in everything if setting.measured]
    first = next(cell.run for cell in cells if cell.run is not None)
    level = first.rule("confidence") or 0.95
    numbers = {one.name: _numbers(one, good, bad) for one in settings}
    points = {cell.name: _cell_point(cell, good, bad) for cell in cells if cell.run is not None}
    means = {one.name: _mean(one, numbers[one.name], good, bad, level) for one in settings}
    drawn = _signed(pareto.draws(list(numbers.values()), n_resamples=RESAMPLES, confidence=level), good)
    along, of, reason = _along(settings, good, bad, level)
    return Front(
        name=name,
        n=cells[0].config.data.n,
        confidence=level,
        settings=tuple(everything),
        cells=_judged(points, good),
        means=_judged(means, good, drawn),
        changes=_changes(settings, numbers, level),
        beats=_beats([one.name for one in settings], drawn),
        area=_area(settings, list(means.values()), list(points.values()), drawn, good, bad, reference, level),
        along=along,
        along_of=of,
        no_along=reason,
    )


def _numbers(setting: Setting, good: Measure, bad: Measure) -> dict[int, tuple[Estimate, Estimate]]:
    """(quality, memorized) of a setting's measured cells by seed."""
    found = {}
    for seed, cell in setting.measured.items():
        assert cell.run is not None
        quality, memorized = good.of(cell.run), bad.of(cell.run)
        assert quality is not None and memorized is not None  # `find_measure` saw to it
        found[seed] = quality, memorized
    return found


def _cell_point(cell: Cell, good: Measure, bad: Measure) -> Point:
    assert cell.run is not None
    quality, memorized = good.of(cell.run), bad.of(cell.run)
    assert quality is not None and memorized is not None
    return Point(cell.name, cell.run.steps, quality, memorized, cell.run.estimates.get("control"))


def _mean(
    setting: Setting,
    numbers: Mapping[int, tuple[Estimate, Estimate]],
    good: Measure,
    bad: Measure,
    level: float,
) -> Point:
    runs = [cell.run for cell in setting.measured.values() if cell.run is not None]
    steps = {run.steps for run in runs}
    controls = [found for run in runs if (found := run.estimates.get("control")) is not None]
    quality, memorized = zip(*numbers.values(), strict=True)
    return Point(
        name=setting.name,
        step=steps.pop() if len(steps) == 1 else None,
        quality=pareto.over_seeds(quality, level, good.limits),
        memorized=pareto.over_seeds(memorized, level, bad.limits),
        control=pareto.over_seeds(controls, level, (0.0, 1.0)) if controls else None,
    )


# --------------------------------------------------------------------------------------------- dominance


def _plane(points: Sequence[Point], good: Measure) -> np.ndarray:
    """[K, 2]: (quality, memorized), the smaller the better."""
    rows = [(good.sign * point.quality.value, point.memorized.value) for point in points]
    return np.array(rows, np.float64).reshape(-1, 2)


def _signed(drawn: np.ndarray, good: Measure) -> np.ndarray:
    return drawn * np.array([good.sign, 1.0])


def _marked(points: Sequence[Point], good: Measure, drawn: np.ndarray | None = None) -> list[Point]:
    """The points with what the others make of them; `drawn` [B, K, 2] gives the chances."""
    plane = _plane(points, good)
    front, beats = pareto.on_front(plane), pareto.dominates(plane)
    chance = None if drawn is None else pareto.on_front(drawn).mean(0)
    names = [point.name for point in points]
    return [
        replace(
            point,
            on_front=bool(front[k]),
            dominated_by=tuple(dict.fromkeys(names[i] for i in np.flatnonzero(beats[:, k] & front))),
            chance=None if chance is None else float(chance[k]),
        )
        for k, point in enumerate(points)
    ]


def _judged(points: Mapping[str, Point], good: Measure, drawn: np.ndarray | None = None) -> dict[str, Point]:
    return dict(zip(points, _marked(list(points.values()), good, drawn), strict=True))


def _beats(names: Sequence[str], drawn: np.ndarray) -> dict[str, dict[str, float]]:
    share = np.mean([pareto.dominates(part).mean(0) for part in np.array_split(drawn, 20)], axis=0)
    return {a: {b: float(share[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}


def _changes(
    settings: Sequence[Setting],
    numbers: Mapping[str, Mapping[int, tuple[Estimate, Estimate]]],
    level: float,
) -> dict[str, Change]:
    found = {}
    for one in settings:
        before, after = numbers.get(one.baseline, {}), numbers[one.name]
        pair = [
            pareto.difference(
                {seed: each[axis] for seed, each in before.items()},
                {seed: each[axis] for seed, each in after.items()},
                level,
            )
            for axis in (0, 1)
        ]
        if pair[0] is not None and pair[1] is not None:
            found[one.name] = Change(pair[0], pair[1])
    return found


def _area(
    settings: Sequence[Setting],
    means: Sequence[Point],
    cells: Sequence[Point],
    drawn: np.ndarray,
    good: Measure,
    bad: Measure,
    reference: tuple[float, float] | None,
    level: float,
) -> Area:
    worst = _plane(cells, good).max(0)
    if reference is not None:
        worst = np.array([good.sign * reference[0], reference[1]])
    elif bad.limits[1] == 1:
        worst[1] = 1.0
    corner = (float(worst[0]), float(worst[1]))
    plane, copies = _plane(means, good), np.array([one.copies for one in settings])

    def area(which: np.ndarray) -> tuple[float, np.ndarray]:
        return float(pareto.hypervolume(plane[which], corner)), pareto.hypervolume(drawn[:, which], corner)

    value, values = area(np.ones(len(settings), bool))
    without = added = None
    if not copies.all():
        base, bases = area(~copies)
        without = pareto.reflected(base, bases, level, least=0.0)
        if copies.any():
            added = pareto.reflected(value - base, values - bases, level, least=0.0)
    whole = pareto.reflected(value, values, level, least=0.0)
    return Area((good.sign * corner[0], corner[1]), whole, without, added)


# -------------------------------------------------------------------------------------- along training


def _along(
    settings: Sequence[Setting], good: Measure, bad: Measure, level: float
) -> tuple[tuple[Point, ...], int, str]:
    """(points, generations of each, why there are none): settings at each step that all their cells measured."""
    for measure, key in ((good, _ALONG["quality"]), (bad, _ALONG["memorized"])):
        if measure.key != key:
            return (), 0, f"{measure.key} is not measured while a model trains ({key} is)"
    found: list[Point] = []
    numbers: list[dict[int, tuple[Estimate, Estimate]]] = []
    sizes = set()
    for one in settings:
        rows = {seed: _rows(cell) for seed, cell in one.measured.items()}
        for step in sorted(set.intersection(*(set(each) for each in rows.values()))):
            at = {seed: each[step] for seed, each in rows.items()}
            sizes |= {memorized.n for _, memorized in at.values()}
            quality, memorized = zip(*at.values(), strict=True)
            numbers.append(at)
            found.append(
                Point(
                    one.name,
                    step,
                    pareto.over_seeds(quality, level, good.limits),
                    pareto.over_seeds(memorized, level, bad.limits),
                    None,
                )
            )
    if not found:
        return (), 0, "no cell measured memorized fraction and quality while it trained (train.eval_every)"
    if len(sizes) > 1:
        return (
            (),
            0,
            f"cells measured {' and '.join(map(str, sorted(sizes)))} generations (train.eval_samples)",
        )
    drawn = pareto.draws(numbers, n_resamples=RESAMPLES // 2, confidence=level)
    return tuple(_marked(found, good, _signed(drawn, good))), sizes.pop(), ""


def _rows(cell: Cell) -> dict[int, tuple[Estimate, Estimate]]:
    """(quality, memorized) by step, of the rows that have both."""
    assert cell.run is not None
    found = {}
    for row in cell.run.points:
        pair = [_estimate(row, name) for name in ("quality", "memorized")]
        if pair[0] is not None and pair[1] is not None:
            found[row["step"]] = pair[0], pair[1]
    return found


def _estimate(row: Mapping[str, Any], name: str) -> Estimate | None:
    if row.get(name) is None:
        return None
    low, high = (
        math.nan if row.get(f"{name}_{end}") is None else row[f"{name}_{end}"] for end in ("low", "high")
    )
    return Estimate(row[name], low, high, int(row.get("n") or 0))

"""What a front says, in sentences: is standard training on it, is it when stopped early, what do noisy copies add.

As in `words`, a sentence is chosen by intervals and by bootstrap draws, never by the point estimates alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from mdiff.report import words
from mdiff.report.front import Change, Front, Fronts, Point
from mdiff.report.front_cells import MEASURED, Cell, Measure
from mdiff.report.front_settings import Setting
from mdiff.types import Estimate

SURE = 0.95
"""Share of bootstrap draws from which a place on the front, or off it, is called settled."""


def verdict(front: Front, found: Fronts) -> list[str]:
    """Paragraphs about one front: who is on it, standard training at its end, stopped early, the ends of the
    cutoffs, the area, and the cautions."""
    said = [_members(front, found)]
    standard = [front.means[one.name] for one in front.settings if one.standard and one.name in front.means]
    said += [_standard(point, front, found) for point in standard]
    if not standard:
        said.append("No cell of standard training (cutoff 0) is measured, so nothing is held against it.")
    said += [_early(front, found)] * bool(front.along and standard)
    said += [_ends(front)] * bool(front.changes)
    said += [_area(front)]
    said += [_cautions(front, found)]
    return [paragraph for paragraph in said if paragraph]


def number(value: Estimate, measure: Measure) -> str:
    """ "12.5 % [8.1, 17.0]", or without an interval where there is none."""
    return " ".join(words.shown(value, measure.kind)).strip()


def difference(value: Estimate, measure: Measure) -> str:
    """A change of a measure with its sign: shares in percentage points."""
    text, span = words.shown(value, measure.kind)
    if measure.kind == "rate":
        text = text.removesuffix("\N{NO-BREAK SPACE}%")
    sign = "+" if value.value > 0 and text[:1] not in "<>" else ""
    unit = " percentage points" if measure.kind == "rate" else ""
    return f"{sign}{text}{f' {span}' if span else ''}{unit}"


def named(measure: Measure) -> str:
    """A measure's label inside a sentence."""
    head, _, tail = measure.label.partition(" ")
    return f"{head.lower() if head[1:].islower() else head} {tail}".strip()


def _members(front: Front, found: Fronts) -> str:
    cells = len(front.cells)
    seeds = sorted({len(one.measured) for one in front.settings if one.measured})
    each = _count(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    on = [name for name, point in front.means.items() if point.on_front]
    images = f"On {front.n:,} training images{f' ({front.name})' if front.name else ''}: "
    names = ", ".join(f"“{name}”" for name in on[:8]) + (" and others" if len(on) > 8 else "")
    return (
        f"{images}{_count(len(front.means), 'setting')}, {_count(cells, 'cell')}, {each} each. By the means over seeds of "
        f"{named(found.quality)} ({found.quality.better} is better) and {named(found.memorized)}, {len(on)} "
        f"{'is' if len(on) == 1 else 'are'} on the front: {names}."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _standard(point: Point, front: Front, found: Fronts) -> str:
    """Is standard training on the front at its end?"""
    assert point.chance is not None
    where = f"({_at(point, found)}; on the front in {words.percent(point.chance)} of bootstrap draws)"
    who = _who(point, front)
    if point.on_front:
        sure = point.chance >= SURE
        text = f"{who} is on the front {where}" + ("." if sure else ", though the draws do not settle it.")
        return f"{text} {_next(point, front, found)}".strip()
    best = max(point.dominated_by, key=lambda name: front.beats[name][point.name])
    other = front.means[best]
    sure = point.chance <= 1 - SURE
    text = (
        f"{who} is not on the front {where}: "
        if sure
        else f"{who} is off the front by the means only {where}: "
    )
    text += f"“{best}” ({_at(other, found)}) dominates it, in {words.percent(front.beats[best][point.name])} of the draws."
    return f"{text} {_paired(best, point.name, front, found)}".strip()


def _who(point: Point, front: Front) -> str:
    several = sum(one.standard and one.name in front.means for one in front.settings) > 1
    return f"Standard training, “{point.name}”," if several else "Standard training"


def _at(point: Point, found: Fronts) -> str:
    return (
        f"{named(found.memorized)} {number(point.memorized, found.memorized)}, "
        f"{named(found.quality)} {number(point.quality, found.quality)}"
    )


def _paired(name: str, standard: str, front: Front, found: Fronts) -> str:
    change = front.changes.get(name)
    if change is None or not words.bounded(change.quality):
        return ""
    baseline = next(one.baseline for one in front.settings if one.name == name)
    if baseline != standard:
        return ""
    return (
        f"Paired by seed, it differs from standard training by {difference(change.memorized, found.memorized)} in "
        f"{named(found.memorized)} ({_shown(change.memorized)}) and by {difference(change.quality, found.quality)} in "
        f"{named(found.quality)} ({_shown(change.quality)})."
    )


def _shown(change: Estimate) -> str:
    return "zero is inside" if change.low <= 0 <= change.high else "not zero"


def _next(point: Point, front: Front, found: Fronts) -> str:
    """Standard training on the front: what the nearest setting that memorizes less would cost."""
    less = [
        other
        for other in front.means.values()
        if other.on_front and other.memorized.value < point.memorized.value
    ]
    if not less:
        return "No setting on the front memorizes less."
    nearest = min(less, key=lambda other: found.quality.sign * other.quality.value)
    text = f"Of those that memorize less, “{nearest.name}” ({_at(nearest, found)}) is nearest in quality."
    return f"{text} {_paired(nearest.name, point.name, front, found)}".strip()


def _early(front: Front, found: Fronts) -> str:
    """Is standard training on the front of all settings at all steps?"""
    standard = {one.name for one in front.settings if one.standard}
    ours = [point for point in front.along if point.name in standard]
    on = [point for point in ours if point.on_front]
    head = (
        f"Along training ({front.along_of:,} generations per cell and step, {len(front.along)} points, a front of their "
        "own): "
    )
    if not ours:
        return ""
    best = max(ours, key=lambda point: point.chance or 0.0)
    if not on:
        assert best.chance is not None
        sure = best.chance <= 1 - SURE
        tail = "Stopping early does not bring it there." if sure else "The draws do not settle that."
        return (
            f"{head}no step of standard training is on it by the means; step {best.step} comes nearest "
            f"({_at(best, found)}; on it in {words.percent(best.chance)} of the draws). {tail}"
        )
    steps = "; ".join(
        f"step {point.step} ({_at(point, found)}; {words.percent(point.chance or 0.0)} of the draws)"
        for point in on[:3]
    ) + (f" and {len(on) - 3} more" if len(on) > 3 else "")
    last = max(point.step or 0 for point in ours)
    early = [point for point in on if point.step != last]
    tail = " Stopped early, standard training is a point of it." if early else " Only its last step is."
    doubt = (
        ""
        if any((point.chance or 0.0) >= SURE for point in on)
        else " None of these places is settled by the draws."
    )
    return f"{head}standard training is on it by the means: {steps}.{tail}{doubt}"


def _ends(front: Front) -> str:
    """Do the lowest and the highest cutoff return to standard training?"""
    series: dict[str, list[Setting]] = {}
    for one in front.settings:
        if one.name in front.changes and one.copies:
            series.setdefault(one.series, []).append(one)
    said = []
    for name, part in series.items():
        if len(part) >= 3:
            ends = " and ".join(
                f"at {one.cutoff:g} {_apart(front.changes[one.name])}" for one in (part[0], part[-1])
            )
            said.append(f"{name}: {ends}" if len(series) > 1 else ends)
    if not said:
        return ""
    return f"The lowest and the highest cutoff against standard training, paired by seed: {'; '.join(said)}."


def _apart(change: Change) -> str:
    known = [
        (name, one)
        for name, one in (("memorization", change.memorized), ("quality", change.quality))
        if words.bounded(one)
    ]
    if not known:
        return "one seed cannot tell"
    differ = [name for name, one in known if not one.low <= 0 <= one.high]
    return f"{' and '.join(differ)} differ{'s' * (len(differ) == 1)}" if differ else "no difference is shown"


def _area(front: Front) -> str:
    area = front.area
    quality, memorized = area.reference
    text = f"Area dominated, up to quality {words.distance(quality)} and memorization {words.distance(memorized)}: "
    text += f"{_distance(area.all)} by all settings"
    if area.without is None or area.added is None:
        return f"{text}."
    share = (
        f" ({words.percent(area.added.value / area.without.value)} of it)" if area.without.value > 0 else ""
    )
    sure = "." if area.added.low > 0 else ", which the draws do not tell from nothing."
    return (
        f"{text}, {_distance(area.without)} by those without noisy copies; noisy copies add "
        f"{_distance(area.added)}{share}{sure}"
    )


def _distance(value: Estimate) -> str:
    return " ".join(words.shown(value, "distance")).strip()


def _cautions(front: Front, found: Fronts) -> str:
    said = []
    missing = [cell for one in front.settings for cell in one.cells if cell.state != MEASURED]
    if missing:
        said.append(
            f"{len(missing)} of {len(missing) + len(front.cells)} cells are not measured ({_states(missing)}): the front is "
            "of the others."
        )
    placed = {cell.name for each in found.fronts for one in each.settings for cell in one.cells}
    elsewhere = [cell for cell in found.cells if cell.name not in placed]
    if elsewhere and front is found.fronts[-1]:
        said.append(f"Of other training images no cell is measured ({_states(elsewhere)}).")
    if any(len(one.measured) == 1 for one in front.settings):
        said.append(
            "Settings of one seed have no interval: the luck of a training can move them by more than shown."
        )
    levels = {
        bool((cell.run.audit.get("config") or {}).get("flips"))
        for one in front.settings
        for cell in one.measured.values()
        if cell.run
    }
    if len(levels) > 1:
        said.append(
            "Some cells were compared with mirrored training images and some were not: measure all with audit.flips "
            "to compare their memorization strictly."
        )
    said.append(
        "A front of noisy points lies too far out, and which points are on it is partly luck; the draws say how much."
    )
    return " ".join(said)


def _states(cells: Sequence[Cell]) -> str:
    states = [cell.state for cell in cells]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def legend(measures: Sequence[Measure]) -> list[str]:
    """What each of the two numbers means, for the page."""
    return [
        f"{one.label}: {words.measure(one.key).means}" if "." not in one.key else one.label
        for one in measures
    ]

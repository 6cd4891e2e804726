"""Numbers as text, what each measure means, and the verdict: sentences that follow from the intervals.

Every sentence is chosen by confidence intervals: of the paired difference where two runs allow one, else of
the two numbers. Where a difference may be zero, or two intervals overlap, the page says that nothing is
shown; it never ranks by the point estimates alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mdiff.report.collect import Run
from mdiff.types import Estimate

_UNIT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Measure:
    """How one number is shown.

    Attributes:
      label: its name on the page.
      kind: "rate" (shown in per cent) or "distance".
      of: what its `n` counts.
      means: one sentence on what it says and what it does not.
    """

    label: str
    kind: str
    of: str
    means: str


MEASURES: dict[str, Measure] = {
    "memorized": Measure(
        "Memorized",
        "rate",
        "generations",
        "Share of generations that are much closer to one training image than to every other (ratio rule). "
        "It does not see copies of a part of an image, shifted or recoloured ones.",
    ),
    "control": Measure(
        "Control",
        "rate",
        "generations",
        "The same rule against held-out images that the model never saw: how often it fires by chance. "
        "It says nothing about the model's copying.",
    ),
    "excess": Measure(
        "Excess",
        "rate",
        "generations",
        "Memorized minus control: what is due to having trained on these images. "
        "It is a difference, not a share, and can be negative by chance.",
    ),
    "calibrated": Measure(
        "Calibrated L2",
        "rate",
        "generations",
        "Share whose distance to the nearest training image is small against the distances to its "
        "neighbours (a second rule, arXiv 2301.13188). Its level is not comparable with the ratio rule's.",
    ),
    "calibrated_control": Measure(
        "Calibrated L2, control",
        "rate",
        "generations",
        "The calibrated rule against held-out images: how often it fires by chance. "
        "It says nothing about the model's copying.",
    ),
    "calibrated_excess": Measure(
        "Calibrated L2, excess",
        "rate",
        "generations",
        "Calibrated minus its control. Where the two rules disagree, look at the pictures.",
    ),
    "unique": Measure(
        "Training images copied",
        "rate",
        "training images",
        "Share of the training images that at least one memorized generation copies. "
        "It grows with the number of generations, so compare it only at equal numbers.",
    ),
    "quality": Measure(
        "Quality: energy distance",
        "distance",
        "generations",
        "Distance between the distribution of generations and that of real images; lower is better, 0 is "
        "none (an unbiased estimate can fall below 0). It does not judge single pictures, and a model that "
        "only copies can score well.",
    ),
    "energy_heldout": Measure(
        "Energy distance to held-out",
        "distance",
        "generations",
        "Distance between the distributions of generations and held-out images; lower is better. "
        "It does not judge single pictures.",
    ),
    "energy_train": Measure(
        "Energy distance to training images",
        "distance",
        "generations",
        "The same distance to the training images. A low value, or one below 0, can mean good fit or "
        "copying; this number alone cannot tell which.",
    ),
    "energy_floor": Measure(
        "Energy distance, floor",
        "distance",
        "training images",
        "What the training images themselves score against the held-out ones: an ideal set of new images "
        "scores about this. Scoring below it is chance, not merit.",
    ),
    "kernel_heldout": Measure(
        "Kernel distance to held-out",
        "distance",
        "generations",
        "A second distance between distributions, with another kernel; lower is better, and it can be "
        "slightly negative by chance. Its scale is not that of the energy distance.",
    ),
    "kernel_train": Measure(
        "Kernel distance to training images",
        "distance",
        "generations",
        "The kernel distance to the training images. Low can mean good fit or copying.",
    ),
    "kernel_floor": Measure(
        "Kernel distance, floor",
        "distance",
        "training images",
        "What the training images themselves score against the held-out ones in the kernel distance.",
    ),
}


def measure(name: str) -> Measure:
    """The entry of `MEASURES`; a number this version does not know is shown bare, as recorded."""
    bare = Measure(name.replace("_", " "), "distance", "", "As recorded in audit.json.")
    return MEASURES.get(name, bare)


def order(runs: Sequence[Run]) -> list[str]:
    """The measures any of `runs` has, known ones first and in the order of `MEASURES`."""
    present = {name for run in runs for name in run.estimates}
    known = [name for name in MEASURES if name in present]
    return known + sorted(present - set(known))


def percent(value: float) -> str:
    """0.7616 → "76.2 %"; a rate that would round to zero but is not zero stays visible."""
    if 0 < abs(value) < 0.0005:
        return f"<0.1{_UNIT}" if value > 0 else f">−0.1{_UNIT}"
    return f"{_minus(f'{100 * value:.1f}')}{_UNIT}"


def distance(value: float) -> str:
    """Three significant digits, no exponent between 0.0001 and 99999."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        text = f"{value:#.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return _minus(text.rstrip("."))
    return _minus(f"{value:.2e}")


def shown(value: Estimate, kind: str) -> tuple[str, str]:
    """A number and its interval with equally many decimals: ("76.2 %", "[70.6, 81.0]").

    Rates have one decimal in per cent; distances three significant digits of the largest of the three
    numbers. The interval is "" when there is none.
    """
    limits = [value.low, value.high]
    if kind == "rate":
        texts = [_minus(f"{100 * limit:.1f}") for limit in limits]
        return percent(value.value), f"[{', '.join(texts)}]" if bounded(value) else ""
    largest = max(abs(x) for x in [value.value, *(limits if bounded(value) else [])])
    if not 1e-4 <= largest < 1e5:
        texts = [distance(x) for x in (value.value, *limits)]
    else:
        decimals = max(0, 2 - math.floor(math.log10(largest)))
        texts = [_minus(f"{x:.{decimals}f}") for x in (value.value, *limits)]
    return texts[0], f"[{texts[1]}, {texts[2]}]" if bounded(value) else ""


def level(run: Run) -> str:
    """ "95 %", the level of the run's intervals, or "" when the audit does not say."""
    found = run.rule("confidence")
    return "" if found is None else f"{100 * found:g}{_UNIT}"


def thresholds(runs: Iterable[Run]) -> list[float]:
    """The ratios below which a generation counts as memorized, each once."""
    found = (run.rule("ratio") for run in runs)
    return sorted({cut for cut in found if cut is not None})


def fraction(value: float) -> str:
    """1/3 as "1/3", anything that is no simple fraction with three digits."""
    for below in range(2, 11):
        if abs(value * below - 1) < 1e-9:
            return f"1/{below}"
    return distance(value)


Differences: TypeAlias = Mapping[str, Estimate]
"""Paired differences to the first run by measure, from `probes.compare`."""


def overlap(a: Estimate, b: Estimate) -> bool:
    """Whether the two intervals share a point; both must have one (`bounded`)."""
    return a.low <= b.high and b.low <= a.high


def bounded(value: Estimate) -> bool:
    """Whether the number has an interval."""
    return math.isfinite(value.low) and math.isfinite(value.high)


def verdict(runs: Sequence[Run], paired: Mapping[str, Differences] | None = None) -> list[str]:
    """The report's first words, as paragraphs: each run, the comparisons with the first run, the cautions.

    `paired` holds, for every run that allows it, its paired differences to the first run; without them two
    runs are compared by whether their intervals overlap.
    """
    paired = paired or {}
    paragraphs = [" ".join(_single(run, alone=len(runs) == 1)) for run in runs]
    for other in runs[1:]:
        paragraphs.append(" ".join(_pair(runs[0], other, paired.get(other.name, {}))))
    cautions = [sentence for other in runs[1:] for sentence in _differences(runs[0], other)]
    if any(other.name not in paired for other in runs[1:]):
        cautions.append(
            "Overlapping intervals are a cautious test; the command “mdiff compare” gives sharper, paired "
            "differences."
        )
    if len(runs) > 1:
        cautions.append(
            "The intervals cover the draw of generations, not the luck of one training: "
            "another training seed can move these numbers by more."
        )
    return [*paragraphs, " ".join(dict.fromkeys(cautions))] if cautions else paragraphs


def _single(run: Run, alone: bool) -> list[str]:
    memorized, control, excess = (run.estimates.get(k) for k in ("memorized", "control", "excess"))
    assert memorized is not None  # read_run refuses a run without it
    name, copies = f"“{run.name}”", f"{percent(memorized.value)} of its {memorized.n:,} generations"
    leaked = (run.audit.get("counts") or {}).get("heldout_leaked") or 0
    if leaked:
        said = [
            f"{name} cannot be judged by its control: {leaked:,} of the held-out images are near-duplicates of "
            f"training images, so what the rule finds there is not chance. {copies} are copies of a training image "
            f"by the ratio rule ({_ci(memorized, run)}). Audit again with held-out images that were not trained on."
        ]
    elif excess is not None and excess.high < 0:
        assert control is not None
        said = [
            f"The generations of {name} copy held-out images ({percent(control.value)}) more often than training "
            f"images ({percent(memorized.value)}). Chance does not do that: were the two sets swapped, or was the "
            "model trained on the held-out ones?"
        ]
    elif memorized.value == 0:
        said = [
            f"{name} shows no memorization: none of its {memorized.n:,} generations is a copy by the ratio "
            f"rule; that many cannot rule out a rate up to {percent(memorized.high)}."
        ]
    elif control is None or excess is None or not bounded(excess):
        said = [
            f"{name}: {copies} are copies of a training image by the ratio rule ({_ci(memorized, run)}). "
            "Without a held-out control, how much of that is chance is unknown."
        ]
    elif excess.low > 0:
        said = [
            f"{name} memorizes: {copies} are copies of a training image by the ratio rule "
            f"({_ci(memorized, run)}), against {percent(control.value)} for held-out images, which it never "
            f"saw ({_span(control)})."
        ]
    else:
        said = [
            f"{name} shows no memorization beyond chance: the ratio rule fires on {copies}, and on "
            f"{percent(control.value)} against held-out images; the interval of the excess, "
            f"{_span(excess)}, includes zero."
        ]
    if control is not None and control.low > 0.05 and not leaked and not (excess and excess.high < 0):
        said.append(
            f"The control of {name} is high: on this data the ratio rule is loose, so trust the excess."
        )
    if alone and run.quality is not None:
        said.append(_own_quality(*run.quality))
    return said


def _own_quality(quality: Estimate, reference: str, floor: Estimate | None) -> str:
    """One run's energy distance, beside what the training images themselves score."""
    score = _score(quality)
    if reference == "train" or floor is None or not (bounded(quality) and bounded(floor)):
        return f"Its energy distance to {_images(reference)} is {score}; lower is better."
    if overlap(quality, floor):
        return (
            f"Its energy distance to held-out images, {score}, cannot be told from the training images' own, "
            f"{_score(floor)}."
        )
    word = "farther from" if quality.value > floor.value else "closer to"
    return (
        f"Its generations are {word} held-out images (energy distance {score}) than the training images "
        f"are ({_score(floor)})."
    )


def _pair(first: Run, other: Run, paired: Differences) -> list[str]:
    a, b = first.estimates["memorized"], other.estimates["memorized"]
    change = paired.get("memorized")
    differ = not overlap(a, b) if change is None else not _includes_zero(change)
    low, high = (other, first) if b.value <= a.value else (first, other)
    if differ:
        less, more = (percent(run.estimates["memorized"].value) for run in (low, high))
        said = [
            f"“{low.name}” memorizes less than “{high.name}”: {less} against {more}, "
            + ("and the intervals do not overlap." if change is None else f"{_points(change, first, other)}.")
        ]
    else:
        said = [
            f"No difference in memorization between “{first.name}” and “{other.name}” is shown: "
            + (
                f"their intervals, {_span(a)} and {_span(b)}, overlap."
                if change is None
                else f"{_points(change, first, other)}."
            )
        ]
    return said + _compare_quality(low, high, differ, paired)


def _includes_zero(change: Estimate) -> bool:
    return change.low <= 0 <= change.high


def _points(change: Estimate, first: Run, other: Run) -> str:
    value, span = shown(change, "rate")
    difference = f"{value.removesuffix(_UNIT)} {span} percentage points"
    return f"paired over generations, “{other.name}” minus “{first.name}” is {difference}"


def _compare_quality(low: Run, high: Run, differ: bool, paired: Differences) -> list[str]:
    """How the run that memorizes less does in quality, beside the one that memorizes more."""
    if low.quality is None or high.quality is None:
        return []
    (a, reference, _), (b, other_reference, _) = low.quality, high.quality
    if reference != other_reference:
        return ["Their quality is measured to different images, so it is not compared."]
    scale = f"energy distance to {_images(reference)} {_score(a)} against {_score(b)}, lower is better"
    if not (bounded(a) and bounded(b)):
        return [f"Their quality has no interval, so it is not compared: {scale}."]
    change = paired.get("energy_heldout" if reference == "held-out" else "energy_train")
    if change is not None:
        scale += f"; paired difference {_score(change)}"
    if overlap(a, b) if change is None else _includes_zero(change):
        start = "Its lower memorization comes with no" if differ else "Nor is there a"
        return [f"{start} difference in quality that these intervals show: {scale}."]
    word = "worse" if a.value > b.value else "better"
    if differ:
        return [f"Its lower memorization comes with {word} quality: {scale}."]
    return [f"The quality of “{low.name}” is {word} than that of “{high.name}”: {scale}."]


def _differences(first: Run, other: Run) -> list[str]:
    """What makes the two runs not quite comparable."""
    said = []
    pair = f"“{first.name}” and “{other.name}”"
    if first.subset and other.subset and first.subset != other.subset:
        said.append(f"Caution: {pair} did not use the same training and held-out images.")
    generations = (run.estimates["memorized"].n for run in (first, other))
    for what, (a, b) in (("steps", (first.steps, other.steps)), ("generations", generations)):
        if a is not None and b is not None and a != b:
            said.append(f"Caution: {pair} differ in their number of {what} ({a:,} and {b:,}).")
    cutoffs = first.setting("loss.cutoff"), other.setting("loss.cutoff")
    if None not in cutoffs and cutoffs[0] != cutoffs[1]:
        same = first.steps is not None and first.steps == other.steps
        at = f"after {first.steps:,} steps" if same else "at the last step of each"
        look = ", so read it with the curves below" if first.points and other.points else ""
        said.append(f"This compares them {at}; a run that learns more slowly also memorizes later{look}.")
    return said


def _ci(value: Estimate, run: Run) -> str:
    return f"{level(run)} interval {_span(value)}".strip()


def _span(value: Estimate) -> str:
    """The interval of a rate in words: "70.6 to 81.0 %"."""
    return shown(value, "rate")[1].strip("[]").replace(", ", " to ") + _UNIT


def _score(value: Estimate) -> str:
    return " ".join(shown(value, "distance")).strip()


def _images(reference: str) -> str:
    return "held-out images" if reference == "held-out" else "the training images"


def _minus(text: str) -> str:
    return text.replace("-", "−")

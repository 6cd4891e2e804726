"""Human verdicts: how often people call a copy what the ratio rule calls one.

A judge sees pairs, each a generation beside its match, and says whether the one is a copy of the other. Most
are the generations with the lowest ratio beside their nearest training image. The others are controls, a
generation beside its nearest held-out image, which it cannot have copied: how often the judge says "copy"
there is the judge's rate of false alarms. Order and page do not tell one kind from the other, and no
generation is shown twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score

from mdiff.errors import UserError
from mdiff.probes import intervals
from mdiff.probes.records import Curve, Measure, ProbeResult, Series, Table
from mdiff.probes.results import AuditResult
from mdiff.types import Estimate

FORMAT = 1
"""Of an answers file."""

ANSWERS = ("yes", "no", "unsure")
_TOP = 100  # pairs shown when nobody says how many


@dataclass(frozen=True, eq=False)
class Sheet:
    """The pairs of one page, in the order shown.

    Attributes:
      generation: int [P], index into the audited generations.
      match: int [P], index of the picture beside it, into the training or the held-out images.
      control: bool [P], whether that picture is a held-out image.
      flipped: bool [P], whether the match is mirrored.
      rank: int [P], place by ratio among pairs of its kind, 0 the most copy-like.
      flagged: bool [P], whether the ratio rule calls the pair a copy; never for a control.
      top: pairs with a training image.
      controls: control pairs.
      seed: of the order.
      digest: of all this and of the audit it comes from.
    """

    generation: np.ndarray
    match: np.ndarray
    control: np.ndarray
    flipped: np.ndarray
    rank: np.ndarray
    flagged: np.ndarray
    top: int
    controls: int
    seed: int
    digest: str

    def __len__(self) -> int:
        return len(self.generation)


@dataclass(frozen=True)
class Answers:
    """What one judge said, in the order of the sheet; None where nothing was said."""

    judge: str
    said: tuple[str | None, ...]
    top: int
    controls: int
    seed: int
    digest: str
    path: str


def choose(result: AuditResult, top: int | None = None, controls: int | None = None, seed: int = 0) -> Sheet:
    """The pairs to judge.

    Args:
      result: the audit.
      top: how many of the lowest ratios; None is 100, or two thirds of fewer than 150 generations.
      controls: how many control pairs, those with the lowest ratio among generations not yet shown;
        None is half of `top`, and 0 where the audit has no held-out images.
      seed: of the order shown.

    Raises:
      UserError: more pairs than generations, or controls without held-out images.
    """
    ratio = result.rows["ratio"]
    other = result.rows.get("control_ratio")
    n = len(ratio)
    if top is None:
        top = min(_TOP, n if other is None or controls == 0 else max(1, 2 * n // 3))
    if controls is None:
        controls = 0 if other is None else min(top // 2, max(0, n - top))
    for name, value, least in (("top", top, 1), ("controls", controls, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: give {least} or more")
    if controls and other is None:
        raise UserError(f"--controls {controls}: the audit has no held-out images; give 0")
    if top + controls > n:
        raise UserError(
            f"--top {top}, --controls {controls}: the audit has {n} generations, each shown once; "
            f"lower them to {n} in all"
        )
    first = np.argsort(ratio, kind="stable")[:top]
    second = np.zeros(0, int)
    if controls and other is not None:
        order = np.argsort(other, kind="stable")
        second = order[~np.isin(order, first)][:controls]
    prefixes = [""] * top + ["control_"] * controls
    generation = np.concatenate([first, second])
    columns = {
        name: np.array([result.rows[p + name][i] for p, i in zip(prefixes, generation, strict=True)])
        for name in ("nearest_index", "flipped")
    }
    control = np.arange(top + controls) >= top
    shuffle = np.random.Generator(np.random.Philox(seed)).permutation(top + controls)
    rank = np.concatenate([np.arange(top), np.arange(controls)])
    flagged = result.rows["memorized"][generation] & ~control
    return Sheet(
        generation=generation[shuffle],
        match=columns["nearest_index"][shuffle],
        control=control[shuffle],
        flipped=columns["flipped"][shuffle],
        rank=rank[shuffle],
        flagged=flagged[shuffle],
        top=top,
        controls=controls,
        seed=seed,
        digest=digest(result.digests, result.rows, top, controls, seed),
    )


def digest(
    digests: Mapping[str, str], rows: Mapping[str, np.ndarray], top: int, controls: int, seed: int
) -> str:
    """Of what the pairs of a page depend on; not of intervals, feature spaces or the rule's threshold."""
    found = hashlib.sha256(json.dumps([dict(digests), top, controls, seed], sort_keys=True).encode())
    for prefix in ("", "control_"):
        for name in ("ratio", "nearest_index", "flipped"):
            if prefix + name in rows:
                found.update(np.ascontiguousarray(rows[prefix + name]).tobytes())
    return found.hexdigest()[:16]


def read_answers(path: str | Path) -> Answers:
    """One judge's answers, as the page saved them.

    Raises:
      UserError: no such file, not an answers file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the file that the page's button saved")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not JSON; save the answers on the page again") from None
    again = "save the answers on the page again"
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or "answers" not in tree:
        raise UserError(f"{path}: not an answers file of format {FORMAT}; {again}")
    said, numbers = tree["answers"], [tree.get(name, "") for name in ("top", "controls", "seed")]
    if not all(type(number) is int for number in numbers) or not isinstance(tree.get("sheet"), str):
        raise UserError(f"{path}: its sheet, top, controls or seed is missing; {again}")
    top, controls, seed = numbers
    if not isinstance(said, list) or len(said) != top + controls:
        found = f"{len(said)} answers" if isinstance(said, list) else "no list of answers"
        raise UserError(f"{path}: {found} for {top + controls} pairs; {again}")
    for place, answer in enumerate(said):
        if answer is not None and answer not in ANSWERS:
            raise UserError(f"{path}: answer {place + 1} is {answer!r}; give one of {', '.join(ANSWERS)}")
    judge = str(tree.get("judge") or "").strip() or path.stem
    return Answers(judge, tuple(said), top, controls, seed, tree["sheet"], str(path))


def verdicts(result: AuditResult, judges: Sequence[Answers]) -> ProbeResult:
    """Precision of the ratio rule by human judgement, false alarms, and agreement between judges.

    A pair counts as a copy when more than half of the judges who answered it say yes; "unsure" is not yes.
    Arrays: generation, control, flagged, rank as in `Sheet`, and answers int8 [judges, P] (index into
    `ANSWERS`, -1 for none).

    Args:
      result: the audit that was judged.
      judges: one entry per judge, all of one page.

    Raises:
      UserError: answers of another audit or page, the same answers twice, or none at all.
    """
    sheet = _sheet(result, judges)
    table = np.array([[-1 if a is None else ANSWERS.index(a) for a in judge.said] for judge in judges])
    table = table.astype(np.int8)
    if not (table >= 0).any():
        raise UserError(f"{judges[0].path}: no pair is answered; judge some and save again")
    yes, answers = (table == 0).sum(0), (table >= 0).sum(0)
    copy, answered = 2 * yes > answers, answers > 0
    level = result.config.confidence
    names = _names(judges)

    def rate(which: np.ndarray, hits: np.ndarray = copy, known: np.ndarray = answered) -> Estimate | None:
        among = which & known
        return intervals.wilson(int((among & hits).sum()), int(among.sum()), level) if among.any() else None

    kappas = [
        (names[i], names[j], *_kappa(table[i], table[j], level, result.config))
        for i, j in itertools.combinations(range(len(judges)), 2)
    ]
    all_flagged, shown_flagged = int(result.rows["memorized"].sum()), int(sheet.flagged.sum())
    pairs = ~sheet.control
    rows = [
        Measure(
            "precision", "Flagged pairs judged a copy", rate(sheet.flagged), "%", "higher",
            f"Precision of the ratio rule below {result.config.ratio:.3g} on the {shown_flagged} of "
            f"{all_flagged} flagged generations that were shown, those with the lowest ratios."
            if shown_flagged else "No shown pair is flagged by the ratio rule.",
        ),
        Measure(
            "false_alarms", "Control pairs judged a copy", rate(sheet.control), "%", "lower",
            "How often judges call a copy what cannot be one: a generation beside its nearest held-out image."
            if sheet.controls else "No control pairs were shown, so the judges' false alarms are unknown.",
        ),
        Measure(
            "missed", "Pairs not flagged, judged a copy", rate(pairs & ~sheet.flagged), "%", "lower",
            "Copies the rule does not see, among the shown pairs above its threshold; not of all generations."
            if (pairs & ~sheet.flagged).any() else "Every shown pair is flagged by the ratio rule.",
        ),
        Measure(
            "unsure", "Answers that are “unsure”",
            intervals.wilson(int((table == 2).sum()), int((table >= 0).sum()), level), "%", "lower",
            "Counted as not a copy everywhere above. Judges answer the same pairs: with several the interval is too narrow.",
        ),
    ]  # fmt: skip
    if len(judges) == 2:
        _, _, kappa, both = kappas[0]
        rows.append(
            Measure(
                "kappa", "Agreement of the judges (Cohen's κ)", kappa, "", "higher",
                "Agreement beyond chance on yes, no and unsure: 1 is full, 0 is chance."
                if kappa else f"Not defined: on the {both} pairs both answered, the judges gave one answer only.",
            )
        )  # fmt: skip
    return ProbeResult(
        probe="verdicts",
        title="Human verdicts",
        space="pictures, judged by eye",
        rows=rows,
        tables=_tables(sheet, table, names, kappas),
        curves=[_curve(sheet, copy, answered, level)],
        arrays={
            "generation": sheet.generation,
            "control": sheet.control,
            "flagged": sheet.flagged,
            "rank": sheet.rank,
            "answers": table,
        },
        notes=_notes(result, sheet, table, names),
        config={
            "sheet": sheet.digest,
            "judges": names,
            "top": sheet.top,
            "controls": sheet.controls,
            "seed": sheet.seed,
            "ratio": result.config.ratio,
        },
    )


def belongs(found: ProbeResult, digests: Mapping[str, str], rows: Mapping[str, np.ndarray]) -> bool:
    """Whether stored verdicts are about the audit with these digests and rows."""
    top, controls, seed = (found.config.get(name, 0) for name in ("top", "controls", "seed"))
    return found.config.get("sheet") == digest(digests, rows, top, controls, seed)


def _sheet(result: AuditResult, judges: Sequence[Answers]) -> Sheet:
    if not judges:
        raise UserError("ANSWERS: none given; give the file that the page's button saved")
    first = judges[0]
    for one in judges:
        if one.digest != digest(result.digests, result.rows, one.top, one.controls, one.seed):
            raise UserError(f"{one.path}: answers about another audit; export the page again and judge that")
        if (one.top, one.controls, one.seed) != (first.top, first.controls, first.seed):
            raise UserError(
                f"{one.path}: answers on another page than {first.path}; give every judge the same page"
            )
    for one, other in itertools.combinations(judges, 2):
        if (one.judge, one.said) == (other.judge, other.said):
            raise UserError(f"{other.path}: the same judge and answers as {one.path}; give each judge once")
    return choose(result, first.top, first.controls, first.seed)


def _names(judges: Sequence[Answers]) -> list[str]:
    """The judges' names; two of one name are told apart by their files."""
    names = [judge.judge for judge in judges]
    return [
        name if names.count(name) == 1 else f"{name} ({Path(judge.path).stem})"
        for name, judge in zip(names, judges, strict=True)
    ]


def _kappa(a: np.ndarray, b: np.ndarray, level: float, config: Any) -> tuple[Estimate | None, int]:
    """Cohen's kappa (Educ. Psychol. Meas. 20:37, 1960) with a bootstrap interval over pairs, and their n."""
    both = (a >= 0) & (b >= 0)
    a, b, n = a[both], b[both], int(both.sum())
    if n == 0 or len(np.unique(np.concatenate([a, b]))) == 1:
        return None, n
    value = float(cohen_kappa_score(a, b))
    one, two = (np.eye(len(ANSWERS))[answers] for answers in (a, b))
    agree = (a == b).astype(float)

    def statistic(weights: np.ndarray) -> np.ndarray:
        chance = ((weights @ one) * (weights @ two)).sum(1) / n**2
        with np.errstate(invalid="ignore"):
            return np.where(chance < 1, (weights @ agree / n - chance) / (1 - chance), np.nan)

    draws = intervals.resample(statistic, n, n_resamples=config.bootstrap, seed=config.seed)
    return intervals.percentile(value, draws, n, level), n


def _tables(
    sheet: Sheet, table: np.ndarray, names: list[str], kappas: list[tuple[str, str, Estimate | None, int]]
) -> list[Table]:
    def share(answers: np.ndarray, which: np.ndarray) -> str:
        return f"{int((answers[which] == 0).sum())} of {int((answers[which] >= 0).sum())}"

    kinds = (sheet.flagged, ~sheet.control & ~sheet.flagged, sheet.control)
    rows: list[list[Any]] = [
        [name, *(share(answers, kind) for kind in kinds), int((answers == 2).sum()), int((answers < 0).sum())]
        for name, answers in zip(names, table, strict=True)
    ]
    columns = ["judge", "copies among flagged", "among not flagged", "among controls", "unsure", "unanswered"]
    found = [Table("By judge", columns, rows)]
    if len(names) > 2:
        agreement: list[list[Any]] = [
            [f"{a} and {b}", *((None,) * 3 if k is None else (k.value, k.low, k.high)), n]
            for a, b, k, n in kappas
        ]
        found.append(
            Table("Agreement of two judges", ["judges", "Cohen's κ", "low", "high", "pairs"], agreement)
        )
    return found


def _curve(sheet: Sheet, copy: np.ndarray, answered: np.ndarray, level: float) -> Curve:
    pairs = np.flatnonzero(~sheet.control)
    order = pairs[np.argsort(sheet.rank[pairs])]
    hits, known = np.cumsum((copy & answered)[order]), np.cumsum(answered[order])
    rates = [intervals.wilson(int(h), int(n), level) for h, n in zip(hits, known, strict=True)]
    y, low, high = (
        [getattr(rate, part) if rate.n else math.nan for rate in rates] for part in ("value", "low", "high")
    )
    return Curve(
        "Judged a copy among the k lowest ratios",
        "k, pairs in order of the ratio",
        [float(k + 1) for k in range(len(order))],
        [Series("judged a copy", y, low, high)],
    )


def _notes(result: AuditResult, sheet: Sheet, table: np.ndarray, names: list[str]) -> list[str]:
    notes = []
    for name, answers in zip(names, table, strict=True):
        if missing := int((answers < 0).sum()):
            notes.append(f"{missing} of {len(sheet)} pairs are unanswered by {name} and left out")
    images = len(np.unique(sheet.match[sheet.flagged]))
    if shown := int(sheet.flagged.sum()):
        notes.append(
            f"the {shown} flagged pairs show {images} different training images; "
            "the intervals treat pairs as independent"
        )
    if len(names) > 2:
        notes.append("a pair counts as a copy when more than half of those who answered it say yes")
    elif len(names) == 2:
        notes.append("a pair counts as a copy when both judges say yes (or the only one who answered it)")
    else:
        notes.append("one judge: nothing is known about agreement")
    return notes

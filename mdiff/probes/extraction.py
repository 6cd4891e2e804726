"""Scores of an extraction: what a set of generations gives away of each of several reference sets.

The same generations are scored against every reference set, the training images of one model, of another, and the
control that no model saw, so that rates can be subtracted generation by generation (`excess_of`). Per reference:

- over all thresholds: AMS and nearest-neighbour UMS (`similarity.ams_ums`) of cosine and of distance, their bands
  as differences (`yields.banded`), the area under AMS, the 95th percentile;
- verdicts: the audit's ratio rule, calibrated L2, a cosine above 0.5, and want of authenticity;
- counts: different images copied by the ratio rule, over three denominators: per generation, per prompt (the
  clusters that were asked for) and per training image. They differ by orders of magnitude, and each has been
  quoted as "the" rate of extraction;
- what more generations would give: rarefaction and Chao1 (`probes.yields`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mdiff import config as config_lib
from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.features.pixel import Features, flatten
from mdiff.features.spaces import make_features
from mdiff.files import strict
from mdiff.probes import against, intervals, pareto, sets, similarity
from mdiff.probes.against import Against, Compared
from mdiff.probes.sets import Side
from mdiff.types import Estimate

POINTS = 20
"""Points of a rarefaction curve, when none are asked for."""


@dataclass(frozen=True)
class Scores:
    """Generations scored against several reference sets.

    Attributes:
      n: generations, Q.
      against: by name of the reference set, the control included.
      control: which of them is the control; None without one.
      prompts: int [Q], cluster asked for; None when nothing was.
      space: name of the space of cosines.
      notes: what these numbers cannot say, one sentence each; the first is the least rate that would show.
      config: the rules.
      at: numbers of generations of the rarefaction.
    """

    n: int
    against: dict[str, Against]
    control: str | None
    prompts: np.ndarray | None
    space: str
    notes: list[str]
    config: Audit
    at: tuple[int, ...]

    def __getitem__(self, name: str) -> Against:
        """The generations against the reference set of this name."""
        return self.against[name]


def score(
    generated: np.ndarray,
    references: Mapping[str, np.ndarray],
    config: Audit,
    *,
    control: str | None = None,
    features: Features | None = None,
    prompts: np.ndarray | None = None,
    at: Sequence[int] = (),
) -> Scores:
    """Scores generations against every reference set.

    Args:
      generated: [Q,H,W,C] uint8, or float in [-1, 1].
      references: name -> [R,H,W,C], such as {"train": …, "heldout": …} or {"A": …, "B": …, "C": …}.
      config: the rules, as the audit's.
      control: name of the set that no model saw; it is cut to the smallest of the others.
      features: space of cosines; None makes the one `config.features` names, fitted on equally many images of
        each set, so that all runs with the same sets share it.
      prompts: int [Q], the cluster asked for by each generation, from 0; -1 where none was.
      at: numbers of generations to rarefy to; by default evenly spaced.

    Raises:
      UserError: bad images or settings (`sets.against`), or prompts or numbers that do not fit the generations.
    """
    given = sets.against(generated, references, control, config)
    q = len(given.generated)
    if prompts is not None:
        prompts = np.asarray(prompts)
        if prompts.shape != (q,) or prompts.dtype.kind not in "iu":
            raise UserError(
                f"prompts: {prompts.dtype} of shape {prompts.shape} for {q} generations; give one int each"
            )
    wanted = tuple(int(n) for n in at) or _evenly(q)
    if not 1 <= min(wanted) <= max(wanted) <= q:
        raise UserError(f"at = {min(wanted)}..{max(wanted)}: rarefaction is to 1..{q} generations")
    space = features or _space(list(given.sides.values()), control, config)
    rows, in_space = flatten(given.generated), np.asarray(space(given.generated), np.float64)
    raw = [against.compare(rows, in_space, side, space, config) for side in given.sides.values()]
    notes = given.notes + _notes(given.sides, control)
    return _scores(raw, control, prompts, space.name, notes, config, wanted)


def excess_of(scores: Scores, first: str, second: str) -> dict[str, Estimate]:
    """How much more the generations give away of one reference set than of another, generation by generation.

    Rates have Newcombe's interval for paired rates; `area` and `p95` a bootstrap over generations; `coverage`, over the
    images of two sets, Newcombe's for independent rates.

    Args:
      scores: of the generations.
      first: a reference set, such as the one that the attacker's classifier knows.
      second: another, of the same size, such as the control.

    Raises:
      UserError: no such set.
    """
    for name in (first, second):
        if name not in scores.against:
            raise UserError(f"{name!r}: no such reference set; give one of {', '.join(scores.against)}")
    return against.excess(scores[first], scores[second], scores.config)


def pool(scores: Sequence[Scores]) -> tuple[Scores, dict[str, dict[str, Estimate]]]:
    """Scores of several seeds (trainings, attacks) as one.

    Returns:
      pooled: all generations together. Its intervals cover fresh generations from these same models, not other
        models: with few seeds that differ they are far too narrow. Images of equal reference sets are counted once;
        sets that differ (other data seeds) are put side by side.
      means: reference -> name -> mean over seeds with Student's interval, which covers another training and attack
        with another seed, and is no narrower than what the seeds' own intervals leave open
        (`pareto.over_seeds`). Its n is the number of seeds; of one seed the limits are NaN. An estimate that any seed
        lacks is absent.

    Raises:
      UserError: no scores, or other reference sets, controls or rules.
    """
    if not scores:
        raise UserError("scores: none were given; give one for each seed")
    first = scores[0]
    for other in scores[1:]:
        if (list(other.against), other.control) != (list(first.against), first.control):
            raise UserError(
                f"scores: against {', '.join(first.against)} and against {', '.join(other.against)}; pool those of one design"
            )
        if other.config != first.config:
            raise UserError("scores: were made by different audit settings; score all by one")
    notes = list(dict.fromkeys(note for each in scores for note in each.notes[1:]))
    if len({each.space for each in scores}) > 1:
        notes.append("cosines of different spaces are put together")
    prompts, offset = [], 0
    for each in scores:  # a cluster of one attack is not that of another
        if each.prompts is not None:
            prompts.append(np.where(each.prompts < 0, -1, each.prompts + offset))
            offset = max(offset, int(prompts[-1].max()) + 1)
    raw = [against.join([each[name] for each in scores]) for name in first.against]
    total = sum(each.n for each in scores)
    asked = np.concatenate(prompts) if len(prompts) == len(scores) else None
    pooled = _scores(raw, first.control, asked, first.space, notes, first.config, _evenly(total))
    means: dict[str, dict[str, Estimate]] = {}
    for name in first.against:
        shared = [key for key in first[name].estimates if all(key in s[name].estimates for s in scores)]
        means[name] = {
            key: pareto.over_seeds([s[name].estimates[key] for s in scores], first.config.confidence)
            for key in shared
        }
    return pooled, means


def to_json(scores: Scores) -> dict[str, Any]:
    """All numbers as plain JSON, every rate as {value, low, high, n}; without what is per generation."""
    return strict(
        {
            "generated": scores.n,
            "control": scores.control,
            "space": scores.space,
            "references": {
                name: {
                    "images": len(one.labels),
                    "different": one.clusters,
                    "digest": one.digest,
                    "estimates": {key: asdict(value) for key, value in one.estimates.items()},
                    "rarefaction": [asdict(value) for value in one.rarefaction],
                    "bands": [
                        {k: asdict(v) if isinstance(v, Estimate) else v for k, v in row.items()}
                        for row in one.bands
                    ],
                    "curves": one.curves,
                }
                for name, one in scores.against.items()
            },
            "notes": scores.notes,
            "audit": config_lib.to_json(scores.config),
        }
    )


# ------------------------------------------------------------------------------------------ in common


def _space(sides: list[Side], control: str | None, config: Audit) -> Features:
    """The audit's own space for one set and its control; for more sets, of equally many images of each."""
    held = [side.images for side in sides if side.name == control]
    rest = [side.images for side in sides if side.name != control]
    if len(rest) == 1:
        return make_features(config, rest[0], held[0] if held else None)
    most = min(map(len, (*rest, *held)))
    alike = len({images.dtype for images in (*rest, *held)}) == 1
    chosen = [x[np.linspace(0, len(x) - 1, most).astype(int)] for x in (*rest, *held)]
    return make_features(config, np.concatenate(chosen if alike else [sets.as_bytes(x) for x in chosen]))


def _scores(
    raw: Sequence[Compared],
    control: str | None,
    prompts: np.ndarray | None,
    space: str,
    notes: list[str],
    config: Audit,
    at: tuple[int, ...],
) -> Scores:
    alone = {one.name: against.numbers(one, prompts, config, at) for one in raw}
    found = {
        name: one if control in (None, name) else against.beside(one, alone[str(control)], config)
        for name, one in alone.items()
    }
    n = len(raw[0].columns["d1"])
    rate = 100 * intervals.invisible_below(n, config.confidence)
    notes = [f"{n} generations cannot show rates below {rate:.2g} %", *notes]
    return Scores(n, found, control, prompts, space, notes, config, at)


def _evenly(q: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.unique(np.linspace(1, q, min(q, POINTS)).round()))


def _notes(sides: dict[str, Side], control: str | None) -> list[str]:
    notes = []
    rest = [side for name, side in sides.items() if name != control]
    for side in rest:
        if side.clusters < len(side.images):
            notes.append(f"{side.name}: {len(side.images)} images are {side.clusters} different ones")
    if len({len(side.images) for side in rest}) > 1:
        sizes = ", ".join(f"{len(side.images)} of {side.name}" for side in rest)
        notes.append(f"reference sets differ in size ({sizes}): more images are nearer by chance")
    if control is None:
        notes.append("no control: how often the rules fire by chance is unknown")
        return notes
    held = sides[control]
    if len(held.images) < min(len(side.images) for side in rest):
        notes.append(f"the control has only {len(held.images)} images: it is too low, the excess too high")
    for side in rest:
        near = similarity.nearest_with_flips(held.rows, side.rows, side.mirrored, 1, side.config.chunk)
        leaked = int((near.dist[:, 0] <= side.threshold).sum())
        if leaked:
            notes.append(
                f"{leaked} of {len(held.images)} images of the control are near-duplicates of {side.name}: the excess "
                "is too low"
            )
    return notes

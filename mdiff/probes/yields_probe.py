"""The yields probe: how many different training images come out, per generation, per image and in the end.

A generation is a copy by the audit's ratio rule; near-duplicate training images count as one image. Everything is
measured against held-out images too, by the same rule.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from mdiff.config import Audit, to_json
from mdiff.features.pixel import flatten, mirror
from mdiff.features.spaces import make_features
from mdiff.probes import intervals, sets, similarity, yields
from mdiff.probes.records import Curve, Measure, ProbeResult, Series, Table
from mdiff.probes.sets import Progress, Side
from mdiff.types import Estimate

BANDS = (("low", 0.4, 0.5), ("mid", 0.5, 0.6), ("high", 0.6, math.inf))
"""Bands of cosine similarity (arXiv 2410.02467, Fig. 4, chosen there for SSCD features; 0.4 is not printed there)."""
POINTS = 40
"""Points of the rarefaction curve."""


def run(
    generated: np.ndarray,
    train: np.ndarray,
    heldout: np.ndarray | None,
    config: Audit,
    *,
    train_ids: np.ndarray | None = None,
    heldout_ids: np.ndarray | None = None,
    labels: dict[str, np.ndarray] | None = None,
    progress: Progress | None = None,
) -> ProbeResult:
    """Measures how many different images are copied.

    Args:
      generated: [Q,H,W,C] uint8, or float in [-1, 1].
      train: [R,H,W,C].
      heldout: [S,H,W,C] or None: control and excess are then absent.
      config: `ratio`, `near_duplicate`, `flips`, `features`, `components`, `confidence`, `chunk`, `seed`.
      train_ids: int [R].
      heldout_ids: int [S].
      labels: not used.
      progress: called before each stage and at the end.

    Returns:
      The numbers; arrays `hits` int [R] (copies of each training image), `copy` and `authentic` bool [Q],
      `nearest_id` int [Q], and the same of held-out images as control_….

    Raises:
      UserError: bad images or settings, or a set without two different images; see `sets.read`.
    """
    given = sets.read(generated, train, heldout, config, train_ids, heldout_ids)
    report = progress or (lambda what, done, total: None)
    stages = 2 * len(given.sides) + 1
    held = given.heldout
    space = make_features(config, given.train.images, None if held is None else held.images)
    rows_q, features_q = flatten(given.generated), np.asarray(space(given.generated), np.float64)
    arrays: dict[str, np.ndarray] = {}
    cosines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for i, (prefix, side) in enumerate(given.sides.items()):
        report(f"{side.name}: copies and spacing", 2 * i, stages)
        arrays |= {prefix + name: x for name, x in _copies(rows_q, side, config).items()}
        report(f"{side.name}: cosines", 2 * i + 1, stages)
        refs = np.asarray(space(side.images), np.float64)
        if config.flips:
            refs = np.concatenate([refs, np.asarray(space(mirror(side.images)), np.float64)])
        best, at = similarity.cosine_nearest(features_q, refs, chunk=config.chunk)
        cosines[prefix] = best, at % len(side.images)

    report("curves", stages - 1, stages)
    q = len(given.generated)
    at = np.unique(np.linspace(1, q, min(q, POINTS)).round().astype(int))
    spread = {
        prefix: yields.rarefaction(
            _clusters(arrays[prefix + "hits"], side), q, at, confidence=config.confidence
        )
        for prefix, side in given.sides.items()
    }
    rows = _measures(given, arrays, spread, config)
    tables = [_multiplicity(arrays["hits"], given.train), _bands(given, cosines, config)]
    curves = [_rarefaction(given, spread, at), _coverage(given, spread, at)]
    report("done", stages, stages)
    return ProbeResult(
        probe="yields",
        title="How many training images come out",
        space=f"pixels (copies, authenticity); {space.name} (bands)",
        rows=rows,
        tables=tables,
        curves=curves,
        arrays=arrays,
        notes=given.notes + _notes(given, arrays, config),
        config=to_json(config) | {"bands": [[name, low] for name, low, _ in BANDS]},
    )


def _copies(rows: np.ndarray, side: Side, config: Audit) -> dict[str, np.ndarray]:
    """The ratio rule's verdicts and authenticity of every generation; hits of every image as given."""
    near = similarity.nearest_with_flips(rows, side.rows, side.mirrored, 8, config.chunk)
    rule = partial(
        similarity.ratio_test,
        references=side.rows,
        labels=side.labels,
        mirrored=side.mirrored,
        chunk=config.chunk,
        what=side.name,
    )
    ratio, spacing = rule(rows, neighbours=near), rule(side.rows).d2
    first, copy = near.index[:, 0], ratio.ratio < config.ratio
    return {
        "hits": np.bincount(first[copy], minlength=len(side.rows)),
        "copy": copy,
        "authentic": yields.authentic(ratio.d1, first, spacing),
        "nearest_id": side.ids[first],
    }


def _clusters(hits: np.ndarray, side: Side) -> np.ndarray:
    """Hits of clusters of near-duplicates."""
    return np.bincount(side.labels, hits, side.clusters).astype(np.int64)


def _measures(
    given: sets.Sets, arrays: dict[str, np.ndarray], spread: dict[str, list[Estimate]], config: Audit
) -> list[Measure]:
    q, level, side = len(given.generated), config.confidence, given.train
    hits = _clusters(arrays["hits"], side)
    copies = intervals.wilson(int(arrays["copy"].sum()), q, level)
    images = intervals.wilson(int((hits > 0).sum()), side.clusters, level)
    genuine = arrays["authentic"]
    rows = [
        Measure("copies", "copies, of all generations", copies, "%", "lower", "by the audit's ratio rule"),
        Measure(
            "coverage",
            "training images copied, of all different ones",
            images,
            "%",
            "lower",
            f"by {q} generations; more generations copy more images",
        ),
        Measure(
            "different",
            "different training images copied",
            spread[""][-1],
            "images",
            "lower",
            f"in {q} generations; the interval is that of the expected number in {q}",
        ),
        Measure(
            "chao1",
            "images copied in the end, at least (Chao1)",
            yields.chao1(hits, q, most=side.clusters, confidence=level),
            "images",
            "lower",
            "a lower bound from the images copied once and twice; rare ones can remain unseen beyond its interval",
        ),
        Measure(
            "authentic",
            "authentic generations",
            intervals.wilson(int(genuine.sum()), q, level),
            "%",
            "higher",
            "farther from the nearest training image than that one from the next; 0 % for a pure memorizer",
        ),
    ]
    other = given.heldout
    if other is None:
        absent = "absent: there are no held-out images"
        return [
            *rows,
            Measure("copies_excess", "excess of copies", None, "%", "lower", absent),
            Measure("authentic_excess", "lack of authenticity beyond control", None, "%", "lower", absent),
        ]
    alarm, control = arrays["control_copy"], arrays["control_authentic"]
    rows[1:1] = [
        Measure(
            "copies_control",
            "the same rule, held-out",
            intervals.wilson(int(alarm.sum()), q, level),
            "%",
            "",
            "false alarms: held-out images cannot have been copied",
        ),
        Measure(
            "copies_excess",
            "excess of copies",
            intervals.newcombe(arrays["copy"], alarm, level),
            "%",
            "lower",
            "training less held-out, paired over generations",
        ),
    ]
    return [
        *rows,
        Measure(
            "authentic_control",
            "the same against held-out images",
            intervals.wilson(int(control.sum()), q, level),
            "%",
            "",
            "what a model that copied nothing would have",
        ),
        Measure(
            "authentic_excess",
            "lack of authenticity beyond control",
            intervals.newcombe(control, genuine, level),
            "%",
            "lower",
            "authentic against held-out less against training images, paired; above 0 generations keep too close",
        ),
        Measure(
            "different_control",
            "different held-out images 'copied'",
            spread["control_"][-1],
            "images",
            "",
            "false alarms, counted as images",
        ),
    ]


def _multiplicity(hits: np.ndarray, side: Side) -> Table:
    """How many different images were copied how often."""
    hits = _clusters(hits, side)
    edges = [(0, 0), (1, 1), (2, 2), (3, 5), (6, 10), (11, 100), (101, None)]
    rows: list[list[object]] = []
    for low, high in edges:
        count = int(np.sum((hits >= low) & ((hits <= high) if high is not None else True)))
        name = str(low) if low == high else f"{low} to {high}" if high is not None else f"over {low - 1}"
        rows.append([name, count, count / side.clusters])
    return Table("Training images by number of copies", ["copies", "images", "share"], rows)


def _bands(given: sets.Sets, cosines: dict[str, tuple[np.ndarray, np.ndarray]], config: Audit) -> Table:
    columns = ["images", "band", "from", "to", "AMS", "AMS low", "AMS high", "UMS", "UMS low", "UMS high"]
    rows: list[list[object]] = []
    for prefix, side in given.sides.items():
        best, index = cosines[prefix]
        found = yields.banded(
            best,
            index,
            [(low, high) for _, low, high in BANDS],
            labels=side.labels,
            confidence=config.confidence,
        )
        for (name, low, high), (ams, ums) in zip(BANDS, found, strict=True):
            ends = [low, high if math.isfinite(high) else 1.0]
            rows.append([side.name, name, *ends, *(x for e in (ams, ums) for x in (e.value, e.low, e.high))])
    return Table("Matches by band of cosine similarity", columns, rows)


_NAMES = {"": "training", "control_": "held-out"}


def _rarefaction(given: sets.Sets, spread: dict[str, list[Estimate]], at: np.ndarray) -> Curve:
    lines = [
        Series(_NAMES[prefix], *([getattr(e, end) for e in one] for end in ("value", "low", "high")))
        for prefix, one in spread.items()
    ]
    return Curve("Different images copied", "generations", [float(n) for n in at], lines)


def _coverage(given: sets.Sets, spread: dict[str, list[Estimate]], at: np.ndarray) -> Curve:
    lines = []
    for prefix, one in spread.items():
        all_of = given.sides[prefix].clusters
        ends = ([getattr(e, end) / all_of for e in one] for end in ("value", "low", "high"))
        lines.append(Series(_NAMES[prefix], *ends))
    return Curve("Share of all different images copied", "generations", [float(n) for n in at], lines)


def _notes(given: sets.Sets, arrays: dict[str, np.ndarray], config: Audit) -> list[str]:
    q, side = len(given.generated), given.train
    rate = 100 * intervals.invisible_below(q, config.confidence)
    notes = [
        f"{q} generations cannot show rates below {rate:.2g} %",
        "bands were chosen for SSCD features; in another space the same cosine means something else",
    ]
    if side.clusters < len(side.images):
        notes.append(f"{len(side.images)} training images are {side.clusters} different ones")
    if not arrays["copy"].any():
        notes.append("no copy was found: how many images could be copied in the end is unknown")
    if given.heldout is None:
        notes.append("no held-out images: how often the rules fire by chance is unknown")
    elif len(given.heldout.images) < len(side.images):
        notes.append(
            f"{len(given.heldout.images)} held-out images against {len(side.images)} training images: the control "
            "is only rough"
        )
    return notes

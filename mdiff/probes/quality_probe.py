"""The quality probe: how far generations are from the data's law, in one named feature space.

The reference is the held-out set: distance to the training images rewards copying them. Beside it stand the
same numbers against the training images, and their floor, training against held-out images: what two samples of
one law show at these sizes.

The space is fitted on the training and held-out rows, so they lie in it better than new rows of their law. With few rows
a component the floor is therefore too low, and every distance of generations a little too high (see docs).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mdiff.config import Audit, to_json
from mdiff.errors import UserError
from mdiff.features.pixel import Features
from mdiff.features.spaces import make_features
from mdiff.probes import frechet, intervals, manifold, quality, sets
from mdiff.probes.records import Better, Measure, ProbeResult, Table
from mdiff.probes.sets import Progress
from mdiff.types import Estimate

PAIRS = (
    ("heldout", "generated", "heldout", "to held-out"),
    ("train", "generated", "train", "to training"),
    ("floor", "train", "heldout", "training to held-out (floor)"),
)
_PER_CLASS = 10  # rows of a class below which nothing is measured
_CALLS: dict[str, tuple[str, Better, str]] = {
    "frechet": (
        "Fréchet distance, bias removed",
        "lower",
        "unbiased to first order in 1/n; 0 for equal laws",
    ),
    "frechet_plain": ("Fréchet distance, plain", "lower", "above 0 by about its floor even for equal laws"),
    "kid": ("KID", "lower", "unbiased squared distance under a cubic kernel; 0 for equal laws"),
    "energy": ("energy distance", "lower", "unbiased; 0 for equal laws"),
    "precision": ("precision", "higher", "generations inside the reference's support: looks like the data"),
    "recall": ("recall", "higher", "reference images inside the generations' support: nothing is left out"),
    "density": (
        "density",
        "higher",
        "as precision, but counting how deep: 1 for equal laws, above it where generations crowd",
    ),
    "coverage": ("coverage", "higher", "reference images with a generation nearby, robust to outliers"),
}


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
    """Measures quality and variety.

    Args:
      generated: [Q,H,W,C] uint8, or float in [-1, 1].
      train: [R,H,W,C].
      heldout: [S,H,W,C] or None: only distances to the training images are then known.
      config: `features`, `components`, `bootstrap`, `confidence`, `seed`.
      train_ids: not used.
      heldout_ids: not used.
      labels: int class labels of `generated` [Q], `train` [R] and `heldout` [S], for the numbers per class.
      progress: called before each stage and at the end.

    Returns:
      Each number against held-out images, against training images, and as the floor; one table per class
      where there are labels.

    Raises:
      UserError: bad images, settings or labels; see `sets.read`.
    """
    given = sets.read(generated, train, heldout, config, train_ids, heldout_ids)
    report = progress or (lambda what, done, total: None)
    held = given.heldout
    space = make_features(config, given.train.images, None if held is None else held.images)
    classes = _labels(labels, generated, train, heldout, given)
    stages = 6
    report("features", 0, stages)
    found = _features(space, given)
    notes = list(given.notes)
    most = min(map(len, found.values()))
    equal = {name: _drawn(rows, most, config.seed) for name, rows in found.items()}
    pairs = [p for p in PAIRS if p[1] in found and p[2] in found]
    got: dict[str, Estimate | None] = {}
    for i, (suffix, first, second, label) in enumerate(pairs):
        report(label, 1 + i, stages)
        values = _compared(equal[first], equal[second], config) | _unbiased(
            found[first], found[second], config
        )
        got |= {f"{name}_{suffix}": value for name, value in values.items()}
    report("vendi", 4, stages)
    for name, rows in equal.items():
        got[f"vendi_{name}"] = manifold.vendi(rows, confidence=config.confidence).plain if most > 1 else None
    report("classes", 5, stages)
    tables = [_table(got, pairs)]
    if classes is not None:
        tables.append(_per_class(found, classes, config, notes))
    elif labels:
        notes.append(
            "no numbers per class: they need labels of generations and of training or held-out images"
        )
    report("done", stages, stages)
    return ProbeResult(
        probe="quality",
        title="Quality and variety",
        space=space.name,
        rows=_measures(got, held is None),
        tables=tables,
        notes=notes + _notes(found, most, space, given),
        config=to_json(config) | {"k": manifold.K, "equal_rows": most, "rows_of_pairs": quality.ROWS},
    )


def _features(space: Features, given: sets.Sets) -> dict[str, np.ndarray]:
    out = {"generated": np.asarray(space(given.generated), np.float64)}
    return out | {side.name: np.asarray(space(side.images), np.float64) for side in given.sides.values()}


def _drawn(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the rows, drawn by seed and in their order."""
    if len(rows) <= count:
        return rows
    generator = np.random.Generator(np.random.Philox(seed))
    return rows[np.sort(generator.choice(len(rows), count, replace=False))]


def _compared(a: np.ndarray, b: np.ndarray, config: Audit) -> dict[str, Estimate | None]:
    """What depends on the number of rows; a and b have equally many."""
    names = ("frechet", "frechet_plain", "precision", "recall", "density", "coverage")
    out: dict[str, Estimate | None] = dict.fromkeys(names)
    level, seed = config.confidence, config.seed
    if len(a) > 2:
        distance = frechet.frechet(a, b, confidence=level, seed=seed)
        out |= {"frechet": distance.corrected, "frechet_plain": distance.plain}
    if len(a) > manifold.K:
        shared = manifold.support(a, b, n_resamples=config.bootstrap, confidence=level, seed=seed)
        out |= {name: getattr(shared, name) for name in ("precision", "recall", "density", "coverage")}
    return out


def _unbiased(a: np.ndarray, b: np.ndarray, config: Audit) -> dict[str, Estimate | None]:
    """What is comparable across numbers of rows."""
    if min(len(a), len(b)) < 2:
        return {"kid": None, "energy": None}
    a, b = (quality.thinned(x, config.seed) for x in (a, b))
    out: dict[str, Estimate | None] = {}
    for name, pairs in (("kid", quality.polynomial(a, b)), ("energy", quality.energy(a, b))):
        out[name] = intervals.bootstrap(
            pairs, *pairs.sizes, n_resamples=config.bootstrap, confidence=config.confidence, seed=config.seed
        )
    return out


def _measures(got: dict[str, Estimate | None], alone: bool) -> list[Measure]:
    rows = []
    for suffix, *_, label in PAIRS:
        for name, (called, better, note) in _CALLS.items():
            estimate = got.get(f"{name}_{suffix}")
            if alone and suffix != "train":
                note = "absent: there are no held-out images"
            elif estimate is None:
                note = f"absent: too few images ({_needs(name)})"
            rate = name in ("precision", "recall", "coverage")
            direction: Better = "" if suffix == "floor" else better
            rows.append(
                Measure(
                    f"{name}_{suffix}", f"{called} {label}", estimate, "%" if rate else "", direction, note
                )
            )
    for name in ("generated", "train", "heldout"):
        if f"vendi_{name}" in got:
            estimate = got[f"vendi_{name}"]
            note = "different images in effect, by cosine; grows with their number, here equal for all sets"
            note = note if estimate else "absent: too few images (each set needs at least 2)"
            good: Better = "higher" if name == "generated" else ""
            rows.append(Measure(f"vendi_{name}", f"Vendi score, {name}", estimate, "", good, note))
    return rows


def _needs(name: str) -> str:
    least = {"kid": 2, "energy": 2, "frechet": 3, "frechet_plain": 3}.get(name, manifold.K + 1)
    return f"each set needs at least {least}"


def _table(got: dict[str, Estimate | None], pairs: list[tuple[str, str, str, str]]) -> Table:
    rows: list[list[Any]] = []
    for name, (called, *_) in _CALLS.items():
        values = [got[f"{name}_{suffix}"] for suffix, *_ in pairs]
        rows.append([called, *(x for v in values for x in ([v.value, v.low, v.high] if v else [None] * 3))])
    ends = ("", " low", " high")
    return Table("Against every set", ["measure", *(f"{p[3]}{end}" for p in pairs for end in ends)], rows)


def _labels(
    labels: dict[str, np.ndarray] | None,
    generated: np.ndarray,
    train: np.ndarray,
    heldout: np.ndarray | None,
    given: sets.Sets,
) -> dict[str, np.ndarray] | None:
    """Labels of the images used, by set; None when they are not known for the generations."""
    if not labels or labels.get("generated") is None:
        return None
    out = {}
    for name, images in (("generated", generated), ("train", train), ("heldout", heldout)):
        if images is None or labels.get(name) is None:
            continue
        one = np.asarray(labels[name])
        if one.shape != (len(images),) or not np.issubdtype(one.dtype, np.integer):
            raise UserError(
                f"labels.{name}: {one.dtype} of shape {one.shape} for {len(images)} images; give one integer each"
            )
        out[name] = one
    if given.heldout is not None and "heldout" in out:
        out["heldout"] = out["heldout"][given.heldout.origin]
    return out if len(out) > 1 else None


def _per_class(
    found: dict[str, np.ndarray], classes: dict[str, np.ndarray], config: Audit, notes: list[str]
) -> Table:
    """Each class against its held-out images, or training images where none are labelled."""
    against = "heldout" if "heldout" in classes else "train"
    names = ("kid", "frechet", "precision", "recall")
    columns = ["class", "generated", against]
    columns += [name + end for name in names for end in ("", " low", " high")]
    rows: list[list[Any]] = []
    short = []
    for c in np.unique(np.concatenate([classes["generated"], classes[against]])):
        a = found["generated"][classes["generated"] == c]
        b = found[against][classes[against] == c]
        values: dict[str, Estimate | None] = {}
        if min(len(a), len(b)) >= _PER_CLASS:
            most = min(len(a), len(b))
            equal = [_drawn(x, most, config.seed) for x in (a, b)]
            values = _compared(equal[0], equal[1], config) | _unbiased(a, b, config)
        else:
            short.append(str(c))
        cells = [values.get(name) for name in names]
        ends = [x for v in cells for x in ([v.value, v.low, v.high] if v else [None] * 3)]
        rows.append([int(c), len(a), len(b), *ends])
    if short:
        notes.append(
            f"classes with fewer than {_PER_CLASS} generations or {against} images have no numbers: "
            + ", ".join(short)
        )
    return Table(f"Per class, generated against {against}", columns, rows)


def _notes(found: dict[str, np.ndarray], most: int, space: Features, given: sets.Sets) -> list[str]:
    size = next(iter(found.values())).shape[1]
    notes = [
        f"space {space.name}: numbers are not comparable with those of another space, nor with Inception's",
        f"Fréchet, precision, recall, density, coverage and Vendi use {most} images of each set, drawn by seed, so "
        "that they share the bias of that number",
    ]
    if most <= size:
        notes.append(
            f"{most} images in {size} dimensions: the covariances have no full rank; read the Fréchet distance "
            "only beside its floor"
        )
    if max(map(len, found.values())) > quality.ROWS:
        notes.append(f"KID and energy distance use {quality.ROWS} images of each larger set, drawn by seed")
    if min(float(np.ptp(x, axis=0).max()) for x in found.values()) == 0:
        notes.append("a set's images are all equal: its spread and Vendi score say nothing")
    if given.heldout is None:
        notes.append("no held-out images: distance to training images rewards copying them, and has no floor")
    return notes

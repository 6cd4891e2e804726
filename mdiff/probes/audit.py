"""The audit: what a set of generations copied from its training images, with a control and intervals.

Every rule is applied twice, against the training images and against as many held-out ones, or fewer where fewer
are held out. A held-out
image cannot have been copied, so what the rule finds there is its rate of false alarms; the difference,
paired over generations, is the excess. Near-duplicate images count as one image throughout.

Distances are RMS per pixel on the [0, 1] scale. Cosines and the quality distances are measured in one named
feature space, by default principal components of pixels in [-1, 1], fitted on the training and held-out
images together so that neither side is favoured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mdiff.config import Audit
from mdiff.features.pixel import Features, flatten, mirror
from mdiff.features.spaces import make_features
from mdiff.probes import intervals, quality, sets, similarity
from mdiff.probes.results import AuditResult, load, save
from mdiff.probes.sets import Progress, Side
from mdiff.types import Estimate

__all__ = ["AuditResult", "audit", "load", "save"]

COSINES = np.round(np.arange(30, 101) / 100, 2)
"""Thresholds of the cosine curves."""
DISTANCES = np.round(np.arange(1, 41) / 100, 2)
"""Thresholds of the distance curves, RMS per pixel on [0, 1]."""
LEVELS = (5, 25, 50, 75, 95)
"""Percentiles of d1, ratio and cosine."""

_TOP, _RANDOM = 64, 32  # pictures kept: most copy-like, random


def audit(
    generated: np.ndarray,
    train: np.ndarray,
    heldout: np.ndarray | None,
    config: Audit,
    *,
    train_ids: np.ndarray | None = None,
    heldout_ids: np.ndarray | None = None,
    features: Features | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Measures memorization and quality of a set of generations.

    Args:
      generated: [Q,H,W,C] uint8, or float in [-1, 1]; floats outside are clipped, as in an image file.
      train: [R,H,W,C] uint8, or float in [-1, 1].
      heldout: [S,H,W,C] from the same source, never trained on; None leaves control, excess and the floor
        absent. More than R are cut to R, drawn by `config.seed`.
      config: the rules.
      train_ids: int [R], default 0..R-1.
      heldout_ids: int [S], default 0..S-1.
      features: space of cosine and quality; None makes the one `config.features` names.
      progress: called before each stage and at the end.

    Returns:
      The result; every rate carries its denominator and its interval.

    Raises:
      UserError: a set is empty, not finite, of another image shape or range, or has no two distinct images.
    """
    report = progress or (lambda what, done, total: None)
    given = sets.read(generated, train, heldout, config, train_ids, heldout_ids)
    generated, sides, notes = given.generated, given.sides, given.notes
    side, control = given.train, given.heldout
    stages = 5

    report("near-duplicates", 0, stages)
    for one in sides.values():
        one.labels  # noqa: B018  computed here, where the progress says so
    space = features or make_features(config, side.images, None if control is None else control.images)

    report("nearest images", 1, stages)
    flat = flatten(generated)
    in_space = np.asarray(space(generated), np.float64)
    rows: dict[str, np.ndarray] = {}
    for prefix, one in sides.items():
        found = _compare(flat, in_space, one, space, config)
        rows |= {prefix + name: values for name, values in found.items()}
    hits = np.bincount(rows["nearest_index"][rows["memorized"]], minlength=len(train))

    report("curves", 2, stages)
    curves = _curves(rows, sides, config)

    report("quality", 3, stages)
    samples = {"generated": quality.thinned(in_space, config.seed)}
    for name, images in (
        ("train", train),
        ("heldout", heldout),
    ):  # all of them: a distance needs no equal sizes
        if images is not None:
            samples[name] = np.asarray(space(quality.thinned(images, config.seed)), np.float64)
    if max(map(len, (in_space, train, () if heldout is None else heldout))) > quality.ROWS:
        notes.append(f"energy and kernel distances use {quality.ROWS} rows of each larger set, drawn by seed")
    if len(in_space) < 2:
        notes.append("1 generation: energy and kernel distances need at least 2 and are absent")
    distances, draws = quality.compare_sets(
        samples, n_resamples=config.bootstrap, confidence=config.confidence, seed=config.seed
    )
    estimates = _rates(rows, side, config) | distances

    report("notes and pictures", 4, stages)
    counts = {
        "generated": len(generated),
        "train": len(train),
        "train_clusters": side.clusters,
        "neighbours": min(config.neighbours, len(train)),
        "heldout": None,
        "heldout_clusters": None,
        "heldout_given": None if heldout is None else len(heldout),
        "unique": len(np.unique(side.labels[hits > 0])),
        "quality_generated": len(samples["generated"]),
    }
    percentiles: dict[str, dict[str, list[float]]] = {"level": {"all": [float(level) for level in LEVELS]}}
    for name in ("d1", "ratio", "cosine"):
        percentiles[name] = {
            one.name: np.percentile(rows[prefix + name], LEVELS).tolist() for prefix, one in sides.items()
        }
    if control is not None:
        counts |= {"heldout": len(control.rows), "heldout_clusters": control.clusters}
        near = similarity.nearest_with_flips(control.rows, side.rows, side.mirrored, 1, config.chunk)
        percentiles["d1"]["background"] = np.percentile(near.dist[:, 0], LEVELS).tolist()
        leaked = int((near.dist[:, 0] <= side.threshold).sum())
        counts["heldout_leaked"] = leaked
        if leaked:
            notes.append(
                f"{leaked} of {len(control.rows)} held-out images are near-duplicates of training images: "
                "the control is too high and the excess too low"
            )
    notes += _limits(counts, side, config)
    result = AuditResult(
        rows=rows,
        estimates=estimates,
        curves=curves,
        percentiles=percentiles,
        counts=counts,
        notes=notes,
        config=config,
        feature=space.name,
        hits=hits,
        ids={prefix + "ids": one.ids for prefix, one in sides.items()},
        digests={one.name: sets.digest(one.images) for one in sides.values()},
        draws=draws,
        pictures=_pictures(generated, side, rows, config),
    )
    report("done", stages, stages)
    return result


def ratio_rule(
    reference: np.ndarray, config: Audit, name: str = "train", most: int | None = None
) -> Callable[[np.ndarray], Estimate]:
    """The audit's ratio rule alone, for curves: what depends on `reference` is computed once.

    Args:
      reference: [R,H,W,C] uint8, or float in [-1, 1].
      config: the rules.
      name: of the reference in an error.
      most: images a control may have, those the audit would use: the number of training images.

    Returns:
      A function of generations [Q,H,W,C]: the share that are copies of a reference image.
    """
    side = sets.reference(reference, config, name, most)

    def rate(generated: np.ndarray) -> Estimate:
        ratio = similarity.ratio_test(
            flatten(generated), side.rows, side.labels, mirrored=side.mirrored, chunk=config.chunk, what=name
        ).ratio
        return intervals.wilson(int((ratio < config.ratio).sum()), len(generated), config.confidence)

    return rate


def _compare(
    rows: np.ndarray, in_space: np.ndarray, side: Side, space: Features, config: Audit
) -> dict[str, np.ndarray]:
    """Every rule of every generation against one side; indices are into the set as given."""
    near = similarity.nearest_with_flips(
        rows, side.rows, side.mirrored, max(2, config.neighbours), config.chunk
    )
    ratio = similarity.ratio_test(
        rows,
        side.rows,
        side.labels,
        mirrored=side.mirrored,
        neighbours=near,
        chunk=config.chunk,
        what=side.name,
    )
    calibrated = similarity.calibrated_l2(near.dist, config.alpha, config.neighbours).value
    refs = np.asarray(space(side.images), np.float64)
    if side.mirrored is not None:
        refs = np.concatenate([refs, np.asarray(space(mirror(side.images)), np.float64)])
    cosine, at = similarity.cosine_nearest(in_space, refs, chunk=config.chunk)
    first, at = near.index[:, 0], at % len(side.images)
    return {
        "nearest_id": side.ids[first],
        "nearest_index": side.origin[first],
        "flipped": near.flipped[:, 0],
        "d1": ratio.d1,
        "d2": ratio.d2,
        "ratio": ratio.ratio,
        "memorized": ratio.ratio < config.ratio,
        "calibrated": calibrated,
        "calibrated_copy": calibrated < config.calibrated,
        "cosine": cosine,
        "cosine_id": side.ids[at],
        "cosine_index": side.origin[at],
    }


def _curves(
    rows: dict[str, np.ndarray], sides: dict[str, Side], config: Audit
) -> dict[str, dict[str, dict[str, list[float]]]]:
    out: dict[str, dict[str, dict[str, list[float]]]] = {"cosine": {}, "rms": {}}
    for prefix, side in sides.items():
        for space, best, match, grid in (
            ("cosine", "cosine", "cosine_index", COSINES),
            ("rms", "d1", "nearest_index", DISTANCES),
        ):
            out[space][side.name] = similarity.ams_ums(
                rows[prefix + best],
                np.searchsorted(side.origin, rows[prefix + match]),
                grid,
                labels=side.labels,
                distance=space == "rms",
                confidence=config.confidence,
            )
    return out


def _rates(rows: dict[str, np.ndarray], side: Side, config: Audit) -> dict[str, Estimate | None]:
    level = config.confidence
    q = len(rows["memorized"])
    hit = np.unique(side.labels[rows["nearest_index"][rows["memorized"]]])
    out: dict[str, Estimate | None] = {}
    for name, column, control, excess in (
        ("memorized", "memorized", "control", "excess"),
        ("calibrated", "calibrated_copy", "calibrated_control", "calibrated_excess"),
    ):
        verdict, other = rows[column], rows.get("control_" + column)
        out[name] = intervals.wilson(int(verdict.sum()), q, level)
        out[control] = None if other is None else intervals.wilson(int(other.sum()), q, level)
        out[excess] = None if other is None else intervals.newcombe(verdict, other, level)
    # Over images, not generations: see `similarity.ams_ums` for why Wilson is conservative here.
    out["unique"] = intervals.wilson(len(hit), side.clusters, level)
    return out


def _limits(counts: dict[str, Any], side: Side, config: Audit) -> list[str]:
    """What these sample sizes cannot see, one sentence each."""
    n, train, heldout = counts["generated"], counts["train"], counts["heldout"]
    rate = 100 * intervals.invisible_below(n, config.confidence)
    notes = [f"{n} generations cannot show rates below {rate:.2g} %"]
    if heldout is None:
        notes.append("no held-out images: how often the rules fire by chance is unknown")
    elif heldout < train:
        notes.append(f"{heldout} held-out images against {train} training images: the control is only rough")
    elif counts["heldout_given"] > heldout:
        notes.append(f"{heldout} of {counts['heldout_given']} held-out images are used, as many as training")
    if counts["neighbours"] < config.neighbours:
        notes.append(
            f"calibrated distance uses {counts['neighbours']} neighbours instead of {config.neighbours}: "
            "there are no more training images"
        )
    largest = int(np.bincount(side.labels).max())
    if largest > 1:
        notes.append(
            f"{train} training images are {side.clusters} different ones; the largest group of "
            f"near-duplicates has {largest}"
        )
    if largest > 1 and 2 * largest > counts["neighbours"]:
        notes.append(
            f"a group of {largest} near-duplicates fills half or more of the {counts['neighbours']} "
            "neighbours: the calibrated rule can miss copies of it"
        )
    return notes


def _pictures(
    generated: np.ndarray, side: Side, rows: dict[str, np.ndarray], config: Audit
) -> dict[str, np.ndarray]:
    """uint8 images of the most copy-like and of random generations beside the image each is nearest to."""
    generator = np.random.Generator(np.random.Philox(config.seed))
    count = min(_RANDOM, len(generated))
    chosen = {
        "top": np.argsort(rows["ratio"], kind="stable")[:_TOP],
        "random": np.sort(generator.choice(len(generated), count, replace=False)),
    }
    out: dict[str, np.ndarray] = {}
    for name, index in chosen.items():
        match = sets.as_bytes(side.images[rows["nearest_index"][index]])
        flipped = rows["flipped"][index][:, None, None, None]
        out[f"{name}_index"] = index
        out[f"{name}_generated"] = sets.as_bytes(generated[index])
        out[f"{name}_nearest"] = np.where(flipped, mirror(match), match)
    return out

"""Two audits side by side: paired differences, so that what both runs share cancels.

Generation i of both runs starts from the same noise, and both are compared with the same images.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from mdiff.errors import UserError
from mdiff.probes import intervals
from mdiff.probes.audit import AuditResult
from mdiff.types import Estimate

_FLOOR = 1e-3  # of a ratio before its logarithm; an exact copy's ratio is 0
_FREE = ("chunk", "bootstrap", "seed")  # settings that change no rule


def compare(a: AuditResult, b: AuditResult) -> dict[str, Estimate]:
    """Differences b - a, paired over generations.

    Args:
      a: the first run's audit (`probes.audit.load`).
      b: the second run's.

    Returns:
      `memorized`, `calibrated` and, with held-out images, `control`: differences of rates with Newcombe's
      paired interval. `d1` (RMS per pixel on [0, 1]), `log_ratio` (natural; ratios below 0.001 count as
      0.001) and `cosine`: differences of means with a paired bootstrap. `energy_train`,
      `energy_heldout`, `kernel_train`, `kernel_heldout`: with a joint bootstrap, whose resamples pick the
      same rows in both runs; absent when the two audits resampled differently (seed or number).

    Raises:
      UserError: different numbers of generations, training or held-out images, or rules.
    """
    _check(a, b)
    level, seed, count = b.config.confidence, b.config.seed, b.config.bootstrap
    out: dict[str, Estimate] = {}
    for name, column in (
        ("memorized", "memorized"),
        ("calibrated", "calibrated_copy"),
        ("control", "control_memorized"),
    ):
        if column in a.rows:
            out[name] = intervals.newcombe(b.rows[column], a.rows[column], level)
    for name, first, second in (
        ("d1", a.rows["d1"], b.rows["d1"]),
        ("log_ratio", _log(a.rows["ratio"]), _log(b.rows["ratio"])),
        ("cosine", a.rows["cosine"], b.rows["cosine"]),
    ):
        out[name] = intervals.bootstrap(
            intervals.mean(second - first), len(first), n_resamples=count, confidence=level, seed=seed
        )
    # Draws are paired only when they picked the same rows, that is with one seed.
    if (a.config.seed, a.config.bootstrap) == (seed, count):
        for name in ("energy_train", "energy_heldout", "kernel_train", "kernel_heldout"):
            one, two = a.estimates[name], b.estimates[name]
            if one is not None and two is not None:
                draws = b.draws[name] - a.draws[name]
                out[name] = intervals.percentile(two.value - one.value, draws, two.n, level)
    return out


def _log(ratio: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(ratio, _FLOOR))


def _check(a: AuditResult, b: AuditResult) -> None:
    na, nb = a.counts["generated"], b.counts["generated"]
    if na != nb:
        raise UserError(f"compare: {na} generations against {nb}; sample equally many from both runs")
    for name, ids in (("train", "ids"), ("heldout", "control_ids")):
        if (name in a.digests) != (name in b.digests):
            raise UserError(f"compare: only one audit has {name} images; audit both runs alike")
        if name not in a.digests:
            continue
        if a.digests[name] != b.digests[name] or not np.array_equal(a.ids[ids], b.ids[ids]):
            raise UserError(f"compare: the {name} images differ; audit both runs against the same ones")
    for field in fields(a.config):
        one, two = getattr(a.config, field.name), getattr(b.config, field.name)
        if one != two and field.name not in _FREE:
            raise UserError(f"compare: audit.{field.name} is {one} and {two}; audit both runs with one value")
    if a.feature != b.feature:
        raise UserError(f"compare: feature spaces {a.feature} and {b.feature}; audit both runs in one")

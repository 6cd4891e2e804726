"""One experiment from its config to its audit: train, sample, audit, each resumable.

The door to the recipes: what a run is (`runs`), what it generates (`generate`), what that tells (`measure`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mdiff import config
from mdiff.errors import UserError
from mdiff.objectives import damaged
from mdiff.recipes.curve import memorization_curve
from mdiff.recipes.generate import make_generator, sample, write_pngs
from mdiff.recipes.measure import (
    audit,
    audit_denoiser,
    audit_folders,
    audit_rules,
    load_folders,
    probe,
    probe_folders,
)
from mdiff.recipes.runs import Experiment, load_params, prepare, reopen, run_config
from mdiff.train import loop

__all__ = [
    "Experiment",
    "audit",
    "audit_denoiser",
    "audit_folders",
    "audit_rules",
    "load_folders",
    "load_params",
    "make_generator",
    "memorization_curve",
    "prepare",
    "probe",
    "probe_folders",
    "reopen",
    "sample",
    "train",
    "write_pngs",
]


def train(
    experiment: Experiment,
    folder: Path,
    monitor: loop.Monitor,
    init_from: Path | None = None,
    guard: Callable[[], None] | None = None,
) -> loop.Outcome:
    """Train the experiment in `folder`, measuring memorization along the way; `guard` as in `loop.train`."""
    cfg, model = experiment.config, experiment.model
    params = None
    if init_from is not None:
        if not init_from.exists():
            raise UserError(
                f"--init-from {init_from}: no such folder; give a run's folder, or its checkpoints/STEP"
            )
        params = load_params(init_from, monitor, like=model, on=cfg.mesh)[0]
        _say_what_was_seen(cfg, init_from, monitor)
    objective = damaged.make(model, cfg)
    evaluator = memorization_curve(experiment)
    return loop.train(cfg, model, objective, experiment.subset, folder, monitor, evaluator, params, guard)


_COPIES = ("cutoff", "cutoff_of", "cutoff_stages", "clean", "clean_share")
"""What decides which noisy copies a run sees, beside data and seed."""


def _say_what_was_seen(cfg: config.Config, init_from: Path, monitor: loop.Monitor) -> None:
    """One draw of noise per image protects it only if no earlier training saw the image or another copy.

    Another cutoff is another copy, also a higher one: the same noise at two levels gives the image away (`data.degrade`).
    """
    before = run_config(init_from)
    same = all(getattr(before.loss, name) == getattr(cfg.loss, name) for name in _COPIES)
    if cfg.loss.copies and not (same and (before.data, before.seed) == (cfg.data, cfg.seed)):
        monitor.say(
            f"--init-from {init_from}: its cutoff is {before.loss.cutoff:g}, its seed {before.seed}: what it saw of the "
            "images above the new cutoff, clean or as other copies, stays in its weights; ambient training protects none of it"
        )
    if cfg.data.degrade != "none" and (before.data, before.seed) != (cfg.data, cfg.seed):
        monitor.say(
            f"--init-from {init_from}: its data or its seed {before.seed} are others: what it saw of pixels that are "
            "hidden now stays in its weights"
        )

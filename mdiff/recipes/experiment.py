"""One experiment from its config to its audit: train, sample, audit, each resumable.

The door to the recipes: what a run is (`runs`), what it generates (`generate`), what that tells (`measure`).
"""

from __future__ import annotations

from pathlib import Path

from mdiff.objectives import ambient
from mdiff.recipes.generate import make_generator, sample, write_pngs
from mdiff.recipes.measure import (
    audit,
    audit_denoiser,
    audit_folders,
    audit_rules,
    memorization_curve,
    probe,
    probe_folders,
)
from mdiff.recipes.runs import Experiment, load_params, prepare, reopen
from mdiff.train import loop

__all__ = [
    "Experiment",
    "audit",
    "audit_denoiser",
    "audit_folders",
    "audit_rules",
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
    experiment: Experiment, folder: Path, monitor: loop.Monitor, init_from: Path | None = None
) -> loop.Outcome:
    """Train the experiment in `folder`, measuring memorization along the way."""
    cfg, model = experiment.config, experiment.model
    params = None if init_from is None else load_params(init_from, monitor, like=model)[0]
    objective = ambient.make(model, cfg)
    evaluator = memorization_curve(experiment)
    return loop.train(cfg, model, objective, experiment.subset, folder, monitor, evaluator, params)

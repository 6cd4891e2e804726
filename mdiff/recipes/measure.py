"""Measurements of generations: a run's own, while it trains and after, and images and models from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from mdiff import config
from mdiff.data import source
from mdiff.errors import UserError
from mdiff.files import write_json
from mdiff.keys import keys
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.probes import audit as audits
from mdiff.probes import records, registry
from mdiff.probes.records import ProbeResult
from mdiff.probes.results import AuditResult
from mdiff.process import laws
from mdiff.recipes.generate import draw, load
from mdiff.recipes.runs import Experiment
from mdiff.sample import guidance, sampler
from mdiff.train import loop, workdir
from mdiff.train.ledger import Ledger
from mdiff.types import Array

Sets = tuple[np.ndarray, source.Images, source.Images | None]
"""Generations [Q,H,W,C], training images and, if there are any, held-out ones."""


def audit_rules(cfg: config.Config) -> config.Audit:
    """The audit's rules, with mirrored images compared whenever they were trained on."""
    mirrored = cfg.data.flip or bool(cfg.data.planted_flips) or cfg.data.augment > 0
    return replace(cfg.audit, flips=cfg.audit.flips or mirrored)


def audit(experiment: Experiment, folder: Path, monitor: loop.Monitor) -> AuditResult:
    """Audit `folder/samples.npz` against the run's own training and held-out images."""
    subset = experiment.subset
    generated, step = load(folder)
    ledger = Ledger.load(folder / "ledger.json")
    with ledger.time("audit"):
        result = audits.audit(
            generated,
            np.asarray(subset.train.x),
            np.asarray(subset.heldout.x) if len(subset.heldout) else None,
            audit_rules(experiment.config),
            train_ids=subset.train.id,
            heldout_ids=subset.heldout.id,
            progress=lambda what, done, total: monitor.progress("audit", done, total, {}),
        )
        audits.save(result, folder)
        sampled = config.to_json(experiment.config.sample)
        write_json(
            folder / "evaluation.json", {"step": step, "sample": sampled, "versions": workdir.versions()}
        )
    ledger.save(folder / "ledger.json")
    return result


def probe(name: str, experiment: Experiment, folder: Path, monitor: loop.Monitor) -> ProbeResult:
    """Run a probe of `probes.registry` on `folder/samples.npz` against the run's own images, and save it there.

    Raises:
      UserError: no such probe, or its settings do not fit.
    """
    subset, classes = experiment.subset, experiment.config.net.classes
    generated, _ = load(folder)
    labels = None
    if classes and subset.train.label is not None and subset.heldout.label is not None:
        labels = {
            "generated": np.arange(len(generated)) % classes,
            "train": subset.train.label,
            "heldout": subset.heldout.label,
        }
    sets = (generated, subset.train, subset.heldout if len(subset.heldout) else None)
    ledger = Ledger.load(folder / "ledger.json")
    with ledger.time("probe"):
        result = _probe(name, sets, audit_rules(experiment.config), labels, folder, monitor)
    ledger.save(folder / "ledger.json")
    return result


def _probe(
    name: str,
    sets: Sets,
    rules: config.Audit,
    labels: dict[str, np.ndarray] | None,
    folder: Path,
    monitor: loop.Monitor,
) -> ProbeResult:
    generated, known, control = sets
    result = registry.find(name)(
        generated,
        np.asarray(known.x),
        None if control is None else np.asarray(control.x),
        rules,
        train_ids=known.id,
        heldout_ids=None if control is None else control.id,
        labels=labels,
        progress=lambda what, done, total: monitor.progress(name, done, total, {}),
    )
    records.save(result, folder)
    return result


def audit_folders(sets: Sets, rules: config.Audit, out: Path, monitor: loop.Monitor) -> AuditResult:
    """Audit images from any system, as `load_folders` read them: no model."""
    generated, known, control = sets
    result = audits.audit(
        generated,
        known.x,
        None if control is None else control.x,
        rules,
        train_ids=known.id,
        heldout_ids=None if control is None else control.id,
        progress=lambda what, done, total: monitor.progress("audit", done, total, {}),
    )
    audits.save(result, out)
    write_json(out / "evaluation.json", {"versions": workdir.versions()})
    return result


def probe_folders(
    name: str, sets: Sets, rules: config.Audit, out: Path, monitor: loop.Monitor
) -> ProbeResult:
    """Run a probe on images from any system, as `load_folders` read them, and save it in `out`."""
    return _probe(name, sets, rules, None, out, monitor)


def load_folders(generated: str, train_images: str, heldout: str | None, out: Path) -> Sets:
    """Images from any system: three folders or .npz files, for the audit and the probes.

    Raises:
      UserError: they cannot be read or do not fit together, or `out` is one of them.
    """
    sets = [
        None if path is None else source.load(path, None, f"--{field}")
        for field, path in (("generated", generated), ("train", train_images), ("heldout", heldout))
    ]
    made, known, control = sets
    assert made is not None and known is not None
    for path in (generated, train_images, heldout):
        if path is not None and Path(path).resolve() == out.resolve():
            raise UserError(f"--out {out}: is one of the image folders; choose another folder")
    for field, path, images in (("train", train_images, known), ("heldout", heldout, control)):
        if images is not None and len(images) < 2:
            raise UserError(f"--{field} = {path!r}: 1 image; the ratio rule needs 2 or more, add some")
        if images is not None and images.x.shape[1:] != made.x.shape[1:]:
            theirs, ours = ("x".join(map(str, each.x.shape[1:])) for each in (images, made))
            raise UserError(
                f"--{field} = {path!r}: images are {theirs} (height, width, channels), generated ones {ours}; "
                "bring both to one size and colour mode"
            )
    return made.x, known, control


def audit_denoiser(
    denoise: Callable[[Array, Array], Array],
    train_images: np.ndarray,
    heldout: np.ndarray | None = None,
    *,
    sample_as: config.Sample = config.Sample(),
    rules: config.Audit = config.Audit(),
    process: config.Process = config.Process(),
) -> AuditResult:
    """Bring your own model: sample any `denoise(xt, sigma) -> x0` and audit what it draws.

    Args:
      denoise: traceable by JAX; xt [B,H,W,C] with noise of standard deviation sigma [B] on images in
        [-1, 1], to its estimate of the clean images.
      train_images: [N,H,W,C] uint8 (or float in [-1, 1]): what the model was trained on.
      heldout: [M,H,W,C] from the same source, never trained on; the control.
      sample_as: sampler, grid and number of generations.
      rules: what counts as a copy.
      process: noise range of the sampler.

    Returns:
      The audit's result; `mdiff.probes.audit.save` stores it and `mdiff.report` shows it.

    Raises:
      UserError: a field is out of range or the images do not fit.
    """
    for part, name in ((sample_as, "sample"), (rules, "audit"), (process, "process")):
        config.check_values(part, name)
    laws.check(process)
    sampler.check(sample_as)
    guidance.check(sample_as, config.Net())  # the function has no condition to guide by
    law = laws.make_process(process)
    denoiser, shape = from_sigma_fn(denoise, law), train_images.shape[1:]

    @jax.jit
    def generate(index: Array) -> Array:
        return sampler.sample(law, sample_as, denoiser, keys(sample_as.seed, "sample", index), shape)

    return audits.audit(draw(generate, sample_as.n, sample_as.batch), train_images, heldout, rules)

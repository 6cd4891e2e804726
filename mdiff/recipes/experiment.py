"""One experiment from its config to its audit: train, sample, audit, each resumable."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mdiff import config
from mdiff.data import source
from mdiff.data.split import Subset, load_subset, split
from mdiff.errors import UserError
from mdiff.files import write_atomically, write_json
from mdiff.keys import keys
from mdiff.nets.denoiser import Model, from_sigma_fn, make_model
from mdiff.objectives import ambient
from mdiff.probes import audit as audits
from mdiff.probes.results import AuditResult
from mdiff.process.laws import VarianceExploding, make_process
from mdiff.process.times import karras_grid
from mdiff.sample import sampler
from mdiff.train import checkpoint, loop, mesh, state, workdir
from mdiff.train.ledger import Ledger
from mdiff.types import Array, Denoiser, Evaluator, Params, to_uint8


@dataclass(frozen=True)
class Experiment:
    """A config with everything it describes made, and nothing yet run."""

    config: config.Config
    subset: Subset
    model: Model


def prepare(cfg: config.Config, record: Path | None = None) -> Experiment:
    """Load the data and build the model; the place where a config's mistakes surface.

    Args:
      cfg: the experiment.
      record: a run's `subset.json`: take the images it names and check their hashes, instead of drawing.

    Raises:
      UserError: the first field that is out of range or does not fit the data or the record.
    """
    if cfg.process.sigma_min <= 0 or cfg.process.sigma_max <= cfg.process.sigma_min or cfg.process.rho <= 0:
        raise UserError(
            f"process.sigma_min = {cfg.process.sigma_min}, sigma_max = {cfg.process.sigma_max}, "
            f"rho = {cfg.process.rho}: need 0 < sigma_min < sigma_max and rho > 0"
        )
    ambient.check(cfg.loss, cfg.process)
    state.check(cfg.train)
    sampler.check(cfg.sample)
    images = source.load(cfg.data.source, cfg.data.size)
    model = make_model(cfg, images.x.shape[-1])
    subset = split(cfg.data, images) if record is None else load_subset(record, images)
    if cfg.net.classes:
        found = -1 if images.label is None else int(images.label.max())
        if found < 0 or found >= cfg.net.classes:
            have = "has no labels" if found < 0 else f"has labels up to {found}"
            fix = "set net.classes to 0" if found < 0 else f"set net.classes to {found + 1}"
            raise UserError(f"net.classes = {cfg.net.classes}: {cfg.data.source!r} {have}; {fix}")
    return Experiment(cfg, subset, model)


def train(
    experiment: Experiment, folder: Path, monitor: loop.Monitor, init_from: Path | None = None
) -> loop.Outcome:
    """Train the experiment in `folder`, measuring memorization along the way."""
    cfg, model = experiment.config, experiment.model
    params = None if init_from is None else load_params(init_from, monitor, like=model)[0]
    objective = ambient.make(model, cfg.loss)
    evaluator = memorization_curve(experiment)
    return loop.train(cfg, model, objective, experiment.subset, folder, monitor, evaluator, params)


def _run_folder(path: Path) -> tuple[Path, int | None]:
    """A run's folder and the step, if `path` is the folder of one of its checkpoints."""
    whole = path.absolute()
    if whole.parent.name == "checkpoints" and whole.name.isdigit():
        return whole.parent.parent, int(whole.name)
    return path, None


def load_params(path: Path, monitor: loop.Monitor, like: Model | None = None) -> tuple[Params, int]:
    """Averaged parameters of the run (or single checkpoint of a run) at `path`, and their step.

    Raises:
      UserError: no readable checkpoint there, or its network is not that of `like`.
    """
    folder, step = _run_folder(path)
    stored = workdir.read(folder)
    model = make_model(stored.config, stored.shape[-1])
    if like is not None:
        ours, theirs = (jax.eval_shape(lambda m=m: m.init(jax.random.key(0))) for m in (like, model))
        if jax.tree.map(lambda leaf: leaf.shape, ours) != jax.tree.map(lambda leaf: leaf.shape, theirs):
            raise UserError(
                f"--init-from {path}: its network differs from the config's net; use its net.* fields"
            )
    optimizer = state.make_optimizer(stored.config.train)
    device_mesh = mesh.make_mesh(config.Mesh())
    _, abstract = state.plan_state(model, optimizer, stored.config.seed, device_mesh)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no checkpoints; train it first")
    with checkpoint.open_run(folder, stored.config.train) as checkpoints:
        restored = checkpoints.restore(abstract, monitor.say, step)
    if restored is None:
        raise UserError(f"{path}: no checkpoint; train it first")
    return restored[0].ema, int(restored[0].step)


# ---------------------------------------------------------------------------------------- sampling


def conditions(model: Model, params: Params, index: Array) -> Array | None:
    """Conditions of samples `index` [B]: classes in turn; None for a model without labels."""
    if model.embedding is None:
        return None
    return model.embed(params, index % model.embedding.classes)


def make_generator(model: Model, cfg: config.Sample) -> Callable[[Params, Array], Array]:
    """A jitted `(params, sample index [B]) -> images [B,H,W,C]`; sample i is the same in any batch."""
    assert isinstance(model.process, VarianceExploding)
    process, shape = model.process, model.shape

    @jax.jit
    def generate(params: Params, index: Array) -> Array:
        return _integrate(
            process, cfg, model.denoiser(params), index, shape, conditions(model, params, index)
        )

    return generate


def _integrate(
    process: VarianceExploding,
    cfg: config.Sample,
    denoiser: Denoiser,
    index: Array,
    shape: tuple[int, ...],
    cond: Array | None = None,
) -> Array:
    """Samples `index` [B] of any denoiser by the configured method on the Karras grid; trace it in a jit."""
    step, grid = sampler.METHODS[cfg.method](process, cfg), karras_grid(process, cfg.steps)
    return sampler.integrate(process, denoiser, step, grid, keys(cfg.seed, "sample", index), shape, cond)


def batches(n: int, batch: int) -> list[Array]:
    """Sample indices 0..n-1 in device batches of one size; the last one runs over."""
    return [jnp.arange(start, start + batch) for start in range(0, n, batch)]


def draw(generate: Callable[[Array], Array], n: int, batch: int) -> np.ndarray:
    """Samples 0..n-1 of `generate(index [B]) -> images [B,H,W,C]` as uint8 [n,H,W,C]."""
    return np.concatenate([to_uint8(generate(index)) for index in batches(n, batch)])[:n]


def sample(experiment: Experiment, folder: Path, monitor: loop.Monitor) -> np.ndarray:
    """Draw the configured generations from the newest checkpoint into `folder/samples.npz`.

    Finished batches are kept in `folder/samples/`, so an interrupted call goes on where it was.

    Returns:
      uint8 [n,H,W,C].
    """
    cfg, model = experiment.config, experiment.model
    params, step = load_params(folder, monitor)
    drawn = json.dumps([step, config.digest(cfg), {**config.to_json(cfg.sample), "n": 0}], sort_keys=True)
    unfinished = folder / "samples" / hashlib.sha256(drawn.encode()).hexdigest()[:12]
    ledger = Ledger.load(folder / "ledger.json")
    with ledger.time("sample"):
        generate = make_generator(model, cfg.sample)
        parts = []
        for place, index in enumerate(batches(cfg.sample.n, cfg.sample.batch)):
            path = unfinished / f"{place:06d}.npy"
            if not path.is_file():
                write_atomically(path, functools.partial(np.save, arr=to_uint8(generate(params, index))))
            parts.append(np.load(path))
            done = min((place + 1) * cfg.sample.batch, cfg.sample.n)
            monitor.progress("sample", done, cfg.sample.n, {})
        images = np.concatenate(parts)[: cfg.sample.n]
        write_atomically(
            folder / "samples.npz",
            lambda temporary: np.savez_compressed(temporary, x=images, id=np.arange(len(images)), step=step),
        )
        shutil.rmtree(folder / "samples")
    ledger.save(folder / "ledger.json")
    return images


def write_pngs(images: np.ndarray, folder: Path) -> None:
    """uint8 [n,H,W,C] as `folder/000000.png`, …."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, image in enumerate(images):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            folder / f"{place:06d}.png"
        )


# ---------------------------------------------------------------------------------------- measuring


def audit_rules(cfg: config.Config) -> config.Audit:
    """The audit's rules, with mirrored images compared whenever they were trained on."""
    return replace(cfg.audit, flips=cfg.audit.flips or cfg.data.flip)


def memorization_curve(experiment: Experiment) -> Evaluator:
    """The evaluator a training loop is handed: memorized fraction of a few generations, with control."""
    cfg, model, subset = experiment.config, experiment.model, experiment.subset
    n = cfg.train.eval_samples
    generate = make_generator(model, cfg.sample)
    rules = {
        name: audits.ratio_rule(reference.x, audit_rules(cfg), side)
        for name, side, reference in (
            ("memorized", "train", subset.train),
            ("control", "heldout", subset.heldout),
        )
        if len(reference) >= 2
    }

    def evaluate(params: Params, step: int) -> dict[str, float]:
        images = draw(functools.partial(generate, params), n, min(n, cfg.sample.batch))
        scalars: dict[str, float] = {}
        for name, rule in rules.items():
            rate = rule(images)
            scalars |= {
                f"eval/{name}": rate.value,
                f"eval/{name}_low": rate.low,
                f"eval/{name}_high": rate.high,
            }
        return {**scalars, "eval/n": float(n)}

    return evaluate


def audit(experiment: Experiment, folder: Path, monitor: loop.Monitor) -> AuditResult:
    """Audit `folder/samples.npz` against the run's own training and held-out images."""
    subset = experiment.subset
    with np.load(folder / "samples.npz") as stored:
        generated, step = stored["x"], int(stored["step"])
    ledger = Ledger.load(folder / "ledger.json")
    with ledger.time("audit"):
        result = audits.audit(
            generated,
            subset.train.x,
            subset.heldout.x if len(subset.heldout) else None,
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


def reopen(
    folder: Path, sample_as: config.Sample | None = None, audit_as: config.Audit | None = None
) -> Experiment:
    """The experiment stored in a run's folder, optionally sampled and audited otherwise.

    Raises:
      UserError: no run there, or its images are no longer those it was trained on.
    """
    stored = workdir.read(folder)
    cfg = replace(
        stored.config, sample=sample_as or stored.config.sample, audit=audit_as or stored.config.audit
    )
    return prepare(cfg, folder / "subset.json")


def audit_folders(
    generated: str,
    train_images: str,
    heldout: str | None,
    rules: config.Audit,
    out: Path,
    monitor: loop.Monitor,
) -> AuditResult:
    """Audit images from any system: three folders or .npz files, no model."""
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
    result = audits.audit(
        made.x,
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
    sampler.check(sample_as)
    law = make_process(process)
    denoiser, shape = from_sigma_fn(denoise, law), train_images.shape[1:]
    generate = jax.jit(lambda index: _integrate(law, sample_as, denoiser, index, shape))
    return audits.audit(draw(generate, sample_as.n, sample_as.batch), train_images, heldout, rules)

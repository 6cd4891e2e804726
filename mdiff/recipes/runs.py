"""A run: its config, its data and its model made, and its weights loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax

from mdiff import config
from mdiff.data import augment, captions, damage, labels, source
from mdiff.data.split import Subset, load_subset, split
from mdiff.errors import UserError
from mdiff.features import spaces
from mdiff.files import absolute
from mdiff.nets.denoiser import Model, make_model
from mdiff.objectives import ambient
from mdiff.process import laws
from mdiff.sample import guidance, sampler
from mdiff.train import checkpoint, loop, mesh, optim, snapshots, state, stopping, workdir
from mdiff.types import Params


@dataclass(frozen=True)
class Experiment:
    """A config with everything it describes made, and nothing yet run."""

    config: config.Config
    subset: Subset
    model: Model


def check_fields(cfg: config.Config) -> None:
    """Raises UserError for the first field of training or sampling that is out of range; data are not looked at."""
    config.check_values(cfg)
    laws.check(cfg.process)
    ambient.check(cfg.loss, cfg.process)
    damage.check(cfg)
    labels.check(cfg)
    state.check(cfg.train)
    sampler.check(cfg.sample)
    guidance.check(cfg.sample, cfg.net)


def prepare(cfg: config.Config, record: Path | None = None) -> Experiment:
    """Load the data and build the model; the place where a config's mistakes surface.

    Args:
      cfg: the experiment.
      record: a run's `subset.json`: take the images it names and check their hashes, instead of drawing.

    Raises:
      UserError: the first field that is out of range or does not fit the data or the record.
    """
    check_fields(cfg)
    spaces.check(cfg.audit)
    mesh.make_mesh(cfg.mesh)
    images = source.load(cfg.data.source, cfg.data.size, split=cfg.data.split, reading=cfg.data.reading)
    augment.check(cfg.data)
    model = make_model(cfg, images.x.shape[-1])
    subset = split(cfg.data, images) if record is None else load_subset(record, images)
    stopping.check_data(cfg.train, len(subset.heldout))
    subset = labels.relabel(cfg, subset)
    damage.check_images(cfg, subset.train.x, subset.train.id)
    return Experiment(cfg, captions.tokenize(cfg.net, subset), model)


def reopen(
    folder: Path,
    sample_as: config.Sample | None = None,
    audit_as: config.Audit | None = None,
    mesh_as: config.Mesh = config.Mesh(),
) -> Experiment:
    """The experiment stored in a run's folder, on these devices, optionally sampled and audited otherwise.

    Raises:
      UserError: no run there, or its images are no longer those it was trained on.
    """
    stored = workdir.read(folder)
    cfg = replace(
        stored.config,
        sample=sample_as or stored.config.sample,
        audit=audit_as or stored.config.audit,
        mesh=mesh_as,
    )
    return prepare(cfg, folder / "subset.json")


def _run_folder(path: Path) -> tuple[Path, int | None]:
    """A run's folder and the step, if `path` is the folder of one of its checkpoints."""
    whole = absolute(path)
    if whole.parent.name == "checkpoints" and whole.name.isdigit():
        return whole.parent.parent, int(whole.name)
    return path, None


def run_config(path: Path) -> config.Config:
    """The config of the run (or single checkpoint of a run) at `path`."""
    stored: config.Config = workdir.read(_run_folder(path)[0]).config
    return stored


def load_params(
    path: Path,
    monitor: loop.Monitor,
    like: Model | None = None,
    ema: float = 0.0,
    on: config.Mesh = config.Mesh(),
) -> tuple[Params, int]:
    """Averaged parameters of the run (or single checkpoint of a run) at `path`, and their step.

    Args:
      path: a run's folder, or checkpoints/STEP in it.
      monitor: told about damaged checkpoints that were passed over.
      like: refuse a network that is not this one's.
      ema: relative width of a power-function average (`mdiff.train.ema`); 0 is the run's usual average.
      on: the devices the parameters are laid out over.

    Raises:
      UserError: no readable checkpoint there, or its network is not that of `like`, or it has no such average.
    """
    folder, step = _run_folder(path)
    stored = workdir.read(folder)
    model = make_model(stored.config, stored.shape[-1])
    if like is not None:
        ours, theirs = (jax.eval_shape(lambda m=m: m.init(jax.random.key(0))) for m in (like, model))
        if jax.tree.map(lambda leaf: leaf.shape, ours) != jax.tree.map(lambda leaf: leaf.shape, theirs):
            also = ""
            if (like.damage is None) != (model.damage is None):  # one channel more, or one less
                also = f", and data.degrade {stored.config.data.degrade}"
            raise UserError(
                f"--init-from {path}: its network differs from the config's net; use its net.* fields{also}"
            )
    settings = stored.config.train
    optimizer = optim.make_optimizer(settings)
    device_mesh = mesh.make_mesh(on)
    _, abstract = state.plan_state(
        model, optimizer, stored.config.seed, device_mesh, settings.ema_lengths, on.shard_above
    )
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no checkpoints; train it first")
    with checkpoint.open_run(folder, settings) as checkpoints:
        restored = checkpoints.restore(abstract, monitor.say, step)
    if restored is None:
        raise UserError(f"{path}: no checkpoint; train it first")
    current = restored[0]
    if ema:
        return snapshots.load_average(folder, ema, current, stored.config, monitor.say), int(current.step)
    return current.ema, int(current.step)

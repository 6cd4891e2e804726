"""The folder of one run: what it was configured as, and whether it may be continued."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import jax

import mdiff
from mdiff import config, processes
from mdiff.errors import UserError
from mdiff.files import check_writable, free_bytes, write_json

STATEFUL = ("optimizer", "ema_lengths")
"""Fields of `config.Train` that say what a checkpoint holds: a run is resumed with the ones it began with."""


@dataclass(frozen=True)
class Stored:
    """What `config.json` of a run holds.

    Attributes:
      config: the run's configuration.
      digest: identity of model, data and objective.
      shape: (H, W, C) of one image.
      noise: whose the fixed noise is (`config.NOISE`); empty up to mdiff 0.3.
    """

    config: config.Config
    digest: str
    shape: tuple[int, int, int]
    noise: str = ""


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    }
    return {
        "mdiff": mdiff.__version__,
        "python": platform.python_version(),
        **packages,
        "platform": f"{platform.system()} {platform.machine()}, {jax.default_backend()}",
    }


def read(folder: Path) -> Stored:
    """The stored configuration of the run in `folder`.

    Raises:
      UserError: there is none, or it is damaged or of another version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir {folder}: no run here (no config.json); train one with mdiff train")
    try:
        tree = json.loads(path.read_text())
        stored, digest, shape = tree["config"], tree["digest"], tuple(tree["shape"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error!r}); restore it, or train in a new --workdir") from None
    return Stored(config.from_json(config.Config, stored, str(path)), digest, shape, tree.get("noise", ""))


def check(folder: Path, cfg: config.Config, state_bytes: int = 0, snapshot_bytes: int = 0) -> bool:
    """May this run write into `folder`? Touches nothing but a probe file; True when it resumes a run.

    Of a job of many processes the first one is asked.

    Args:
      folder: the run's folder.
      cfg: the experiment.
      state_bytes: size of one checkpoint.
      snapshot_bytes: size of all stored averages that are still to come.

    Raises:
      UserError: another model's run is there, or one whose state holds other things, the folder cannot be
        written, or it lacks the space.
    """
    resuming = False
    if (folder / "config.json").exists():
        stored = read(folder)
        if config.digest(stored.config) != config.digest(cfg):  # not as stored: newer fields have defaults
            known = {name: tree for name, tree in config.to_json(cfg).items() if name in config.DIGESTED}
            what = processes.first_difference(config.to_json(stored.config), known)
            raise UserError(
                f"--workdir {folder}: holds another run ({what}); choose a new --workdir, or go on with its config"
            )
        if cfg.loss.ambient and stored.noise != config.NOISE:
            raise UserError(
                f"--workdir {folder}: was begun by mdiff 0.3 or older, whose noisy copies were others; going on would "
                "be a second draw of noise; train in a new --workdir"
            )
        for name in STATEFUL:
            was, now = getattr(stored.config.train, name), getattr(cfg.train, name)
            if was != now:
                raise UserError(
                    f"--workdir {folder}: was trained with train.{name} = {was}, which its checkpoints hold the state of; "
                    f"{now} needs a new --workdir (--init-from takes the weights along)"
                )
        resuming = True
    for name in ("checkpoints", "ema"):
        if not resuming and (folder / name).is_dir() and any((folder / name).iterdir()):
            raise UserError(f"--workdir {folder}: has {name} but no config.json; choose a new --workdir")
    existing = check_writable(folder, "--workdir")
    checkpoint_bytes, free = state_bytes * (cfg.train.keep + 1), free_bytes(existing)
    if free < checkpoint_bytes + snapshot_bytes:
        more = (
            f" and the snapshots of train.ema_every {snapshot_bytes / 1e6:.0f} MB" if snapshot_bytes else ""
        )
        fix = "train.keep, or raise train.ema_every" if snapshot_bytes else "train.keep"
        raise UserError(
            f"--workdir {folder}: {free / 1e6:.0f} MB free, but {cfg.train.keep + 1} checkpoints take "
            f"{checkpoint_bytes / 1e6:.0f} MB{more}; free some space, or lower {fix}"
        )
    return resuming


def write(folder: Path, cfg: config.Config, shape: tuple[int, int, int], parameters: int) -> None:
    """Store the configuration of a run and what it takes to rebuild its model."""
    tree = {
        "config": config.to_json(cfg),
        "digest": config.digest(cfg),
        "shape": list(shape),
        "parameters": parameters,
        "noise": config.NOISE,
        "versions": versions(),
    }
    write_json(folder / "config.json", tree)

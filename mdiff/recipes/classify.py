"""From labelled images to a calibrated time-dependent classifier in a folder, and back.

The folder is a run's (`train.workdir`), so training is checkpointed and resumed as any; beside that it holds

    classifier.json     what it takes to rebuild the network, and a hash of what it learned from
    statistics.npz      means and variances of batch normalization, if it has any
    calibration.json    accuracy, calibration error and temperature by noise level; written last: with it, all is done
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh

from mdiff import config, processes, side
from mdiff.data.source import Images
from mdiff.data.split import Subset
from mdiff.data.stream import permutation
from mdiff.errors import UserError
from mdiff.fields import check_values, from_json, to_json
from mdiff.files import check_writable, locate, strict, write_atomically, write_json
from mdiff.nets.classifier import STATISTICS, Classifier, make_classifier, temperatures
from mdiff.nets.denoiser import Model
from mdiff.objectives import distill
from mdiff.probes import calibration, stamped
from mdiff.process.laws import make_process
from mdiff.recipes.classified import answers, make_statistics, membership, noise_levels
from mdiff.train import checkpoint, loop, mesh, optim, state, workdir
from mdiff.trees import map_named, named_leaves
from mdiff.types import Params

__all__ = ["Trained", "answers", "hold_out", "load", "membership", "train"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `classifier.json` holds: what it takes to rebuild the network, and `learned`, a hash of images and labels."""

    classifier: side.Classifier
    process: config.Process
    shape: tuple[int, int, int]
    classes: int
    sigma_data: float
    learned: str


@dataclass(frozen=True, kw_only=True)
class Guide:
    """What `calibration.json` says of the parameters: their step, the temperatures divided by, and the digest of statistics.npz."""

    step: int
    levels: tuple[float, ...]
    temperature: tuple[float, ...]
    statistics: str = ""

    def complete(self, params: Params) -> Params:
        """`params` with the temperatures."""
        return {**params, "temperature": temperatures(self.levels, self.temperature)}


@dataclass(frozen=True)
class Trained:
    """What training came to.

    Attributes:
      classifier: the network and its process.
      params: its parameters, averaged over training; with temperature and statistics if it is finished.
      calibration: on the held-out share; None if it is not finished.
      stopped: name of the signal that came, or "": the same call goes on from there.
    """

    classifier: Classifier
    params: Params
    calibration: calibration.Calibration | None
    stopped: str


def train(
    cfg: side.Classifier,
    images: np.ndarray,
    teacher: np.ndarray,
    like: config.Config,
    folder: Path,
    monitor: loop.Monitor,
    guard: Callable[[], None] | None = None,
) -> Trained:
    """Distill the teacher into a classifier, or go on with it, and calibrate it on images it did not see.

    Args:
      cfg: the classifier.
      images: uint8 [N,H,W,C].
      teacher: float [N,K] class probabilities of each.
      like: the model to be guided: uses process, data.size, net.sigma_data and mesh.
      folder: where it is kept.
      monitor: told about progress.
      guard: as in `loop.train`.

    Raises:
      UserError: a field is out of range, images and teacher do not fit, or the folder holds another classifier.
    """
    folder = locate(folder)
    on = processes.together(lambda: mesh.make_mesh(like.mesh))
    _check(cfg, images, teacher, like, on)
    shape, classes = (images.shape[1], images.shape[2], images.shape[3]), teacher.shape[1]
    classifier = make_classifier(cfg, make_process(like.process), shape, classes, like.net.sigma_data)
    subset = hold_out(cfg, images, np.asarray(teacher, np.float32))
    objective = distill.make(classifier, cfg, like.process)
    levels = noise_levels(like.process)
    statistics = make_statistics(classifier, objective, subset.train.x, cfg, on)
    processes.from_first(lambda: _claim(folder, _record(cfg, classifier, like, subset)))

    def complete(params: Params) -> Params:
        if not classifier.batch_norm:
            return params
        return {**params, STATISTICS: statistics(params)}

    def evaluate(params: Params, step: int) -> dict[str, float]:
        logits = answers(classifier, complete(params), subset.heldout.x, levels, on)
        hits = logits.argmax(-1) == _vectors(subset.heldout).argmax(-1)
        each = {
            f"eval/accuracy@{level:.3g}": float(row.mean()) for level, row in zip(levels, hits, strict=True)
        }
        return {"eval/accuracy": float(hits.mean()), **each}

    outcome = loop.train(
        _run_config(cfg, subset, like),
        cast(Model, classifier),  # of a model the loop needs init and shape, which this has
        objective,
        subset,
        folder,
        monitor,
        evaluate,
        guard=guard,
    )
    if outcome.stopped:
        return Trained(classifier, outcome.state.ema, None, outcome.stopped)
    params = complete(outcome.state.ema)
    logits = answers(classifier, params, subset.heldout.x, levels, on)
    found = calibration.measure(logits, _vectors(subset.heldout), levels)
    if guard is not None:
        processes.from_first(guard)
    guide = _finish(folder, cfg, params, found, int(outcome.state.step))
    return Trained(classifier, guide.complete(params), found, "")


def hold_out(cfg: side.Classifier, images: np.ndarray, teacher: np.ndarray) -> Subset:
    """Deals images [N,H,W,C] and their probabilities [N,K] into training and held-out ones, by seed; ids are positions."""
    n = len(images)
    everything = Images("side", images, np.arange(n, dtype=np.int32), vector=teacher)
    order = permutation(cfg.seed, "classifier", 0, n)
    held = round(cfg.heldout * n)
    parts = [everything.take(np.sort(part)) for part in (order[held:], order[:held])]
    return Subset(parts[0], parts[1], np.arange(n - held, dtype=np.int32))


def load(
    folder: Path, monitor: loop.Monitor | None = None, on: config.Mesh = config.Mesh()
) -> tuple[Classifier, Params]:
    """The finished classifier in `folder`, with temperature and statistics.

    Args:
      folder: of `train`.
      monitor: told of damaged checkpoints.
      on: the devices the parameters are laid out over.

    Raises:
      UserError: there is none, it is not finished, or its files are damaged.
    """
    folder = locate(folder)
    if not (folder / "classifier.json").is_file():
        raise UserError(f"{folder}: no classifier here (no classifier.json); train one with mdiff side")
    if not (folder / "calibration.json").is_file():
        raise UserError(f"{folder}: its classifier is not finished; run the same mdiff side command again")
    record: Record = from_json(Record, _read(folder / "classifier.json"), str(folder / "classifier.json"))
    measured = _read(folder / "calibration.json")
    guide: Guide = from_json(Guide, measured.get("guide", {}), f"{folder / 'calibration.json'}: guide")
    process = make_process(record.process)
    classifier = make_classifier(record.classifier, process, record.shape, record.classes, record.sigma_data)
    params = _restored(folder, classifier, guide.step, monitor, on)
    if classifier.batch_norm:
        params = {**params, STATISTICS: _read_statistics(folder, guide, classifier, params)}
    return classifier, guide.complete(params)


def _check(
    cfg: side.Classifier, images: np.ndarray, teacher: np.ndarray, like: config.Config, on: DeviceMesh
) -> None:
    check_values(cfg, "classifier")
    for name in ("steps", "batch"):
        if getattr(cfg, name) < 1:
            raise UserError(f"classifier.{name} = {getattr(cfg, name)}: must be 1 or more")
    if cfg.lr <= 0:
        raise UserError(f"classifier.lr = {cfg.lr}: must be above 0; the usual one is 1e-4")
    if cfg.weight_decay < 0:
        raise UserError(f"classifier.weight_decay = {cfg.weight_decay}: must be 0 or more")
    ways = mesh.batch_devices(on)
    if cfg.batch % ways:
        near = max(ways, round(cfg.batch / ways) * ways)
        raise UserError(
            f"classifier.batch = {cfg.batch}: does not divide over {ways} devices; set it to {near}"
        )
    size = like.data.size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:3] != (size, size):
        raise UserError(
            f"classifier: its images are {images.dtype} {images.shape}, the model's are {size}x{size} (data.size); "
            f"give uint8 [N,{size},{size},C]"
        )
    if teacher.ndim != 2 or len(teacher) != len(images):
        raise UserError(
            f"classifier: labels {teacher.shape} for {len(images)} images; give one row [K] of each image"
        )
    sums = teacher.sum(axis=1)
    wrong = np.flatnonzero(~((np.abs(sums - 1) < 1e-3) & (teacher >= 0).all(axis=1)))
    if len(wrong):
        raise UserError(
            f"classifier: labels of image {wrong[0]} are no probabilities (least {teacher[wrong[0]].min():g}, sum "
            f"{sums[wrong[0]]:g}); give a teacher whose rows are 0 or more and sum to 1"
        )
    held = round(cfg.heldout * len(images))
    if not (0 < cfg.heldout < 1 and 2 <= held <= len(images) - 2):
        raise UserError(
            f"classifier.heldout = {cfg.heldout}: of {len(images)} labelled images that holds out {held}; both sides need 2, "
            "so set it between 0 and 1, or raise surrogate.n"
        )


def _run_config(cfg: side.Classifier, subset: Subset, like: config.Config) -> config.Config:
    """The run that training a classifier is."""
    every = max(1, cfg.steps // 4)
    return config.Config(
        name="classifier",
        seed=cfg.seed,
        data=config.Data(
            source="side", size=like.data.size, n=len(subset.train), heldout=len(subset.heldout)
        ),
        process=like.process,
        net=config.Net(vector=_vectors(subset.train).shape[1], sigma_data=like.net.sigma_data),
        loss=config.Loss(times=cfg.levels),
        train=config.Train(
            steps=cfg.steps,
            batch=cfg.batch,
            optimizer="adamw",
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            save_every=min(500, every),
            eval_every=every,
        ),
        mesh=like.mesh,
    )


def _record(cfg: side.Classifier, classifier: Classifier, like: config.Config, subset: Subset) -> Record:
    seen = hashlib.sha256()
    for part in (subset.train, subset.heldout):
        seen.update(np.ascontiguousarray(part.x).tobytes())
        seen.update(_vectors(part).tobytes())
    sizes = {"shape": classifier.shape, "classes": classifier.classes, "sigma_data": classifier.sigma_data}
    return Record(classifier=cfg, process=like.process, **sizes, learned=seen.hexdigest()[:16])  # type: ignore[arg-type]


def _claim(folder: Path, record: Record) -> None:
    """Write `classifier.json`, or find that it is there and says the same but for the length of training."""
    path, new = folder / "classifier.json", to_json(record)
    if path.is_file():
        old = _read(path)
        known = {**old, "classifier": {**old.get("classifier", {}), "steps": record.classifier.steps}}
        what = processes.first_difference(known, new)
        if what:
            raise UserError(
                f"{folder}: holds another classifier ({what}); choose another folder, or go on with its settings and images"
            )
    elif (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds a run that is no classifier's; choose another folder")
    check_writable(folder, "classifier folder")
    write_json(path, new)


def _vectors(images: Images) -> np.ndarray:
    """float32 [N,K], the teacher's probabilities."""
    assert images.vector is not None
    return images.vector


def _finish(
    folder: Path, cfg: side.Classifier, params: Params, found: calibration.Calibration, step: int
) -> Guide:
    """Write what was measured. A classifier without time has one temperature, that of the level it is trained at."""
    values = [estimate.value for estimate in found.temperature]
    if not cfg.calibrate:
        values = [1.0] * len(values)
    elif not cfg.timed:
        values = values[:1] * len(values)
    stamp = ""
    if STATISTICS in params:
        leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params[STATISTICS])}
        packed, stamp = stamped.pack(leaves)
        write_atomically(folder / "statistics.npz", lambda path: path.write_bytes(packed))
    guide = Guide(step=step, levels=found.levels, temperature=tuple(values), statistics=stamp)
    write_json(folder / "calibration.json", {**strict(asdict(found)), "guide": to_json(guide)})
    return guide


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged; restore it, or train the classifier in another folder")
    return tree


def _restored(
    folder: Path, classifier: Classifier, step: int, monitor: loop.Monitor | None, on: config.Mesh
) -> Params:
    """The averaged parameters of that step's checkpoint."""
    gone = UserError(
        f"{folder}: checkpoint {step} of its classifier is gone; run the same mdiff side command again"
    )
    if not (folder / "checkpoints").is_dir():
        raise gone
    stored = workdir.read(folder).config
    optimizer = optim.make_optimizer(stored.train)
    _, abstract = state.plan_state(
        cast(Model, classifier), optimizer, stored.seed, mesh.make_mesh(on), (), on.shard_above
    )
    warn = (lambda message: None) if monitor is None else monitor.say
    with checkpoint.open_run(folder, stored.train) as checkpoints:
        restored = checkpoints.restore(abstract, warn, step)
    if restored is None:
        raise gone
    return restored[0].ema


def _read_statistics(folder: Path, guide: Guide, classifier: Classifier, params: Params) -> Params:
    path = folder / "statistics.npz"
    again = "; delete calibration.json there and run the same mdiff side command again"
    if not path.is_file():
        raise UserError(f"{path}: is missing{again}")
    found = stamped.read(path, guide.statistics, "calibration.json", again)
    x, t = jnp.zeros((1, *classifier.shape)), jnp.zeros((1,))
    shapes = jax.eval_shape(classifier.moments, params, x, t)
    return map_named(lambda name, _: jnp.asarray(found[name]), shapes)

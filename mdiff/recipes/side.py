"""SIDE: extraction through a surrogate condition (arXiv 2410.02467), stage by stage, each resumable.

    synthetic   unguided images of the model
    surrogate   their clusters, which stand in for the labels that the model was never given
    guide       a classifier of noisy images distilled from them (or adapters that make the model conditional)
    guided      images drawn towards each cluster, at several strengths
    scores      what came out, compared with training and held-out images

The first four are the attack. They see the model alone, and choose the strength by how much the generations repeat
themselves; training images are read by the last stage only, which is the auditor's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdiff import config, processes, side
from mdiff.errors import UserError
from mdiff.features import spaces
from mdiff.fields import check_values, to_json
from mdiff.files import locate, remove, write_json
from mdiff.nets.classifier import Classifier
from mdiff.probes import clusters as clustering
from mdiff.probes import sets
from mdiff.recipes import adapt, classify, evidence, guided, teachers
from mdiff.recipes.generate import draw_kept, make_generator
from mdiff.recipes.side_target import Target, check_target, of_denoiser, of_run
from mdiff.sample import guidance, sampler
from mdiff.side import Side
from mdiff.train import loop, mesh
from mdiff.types import Params

__all__ = [
    "Stopped",
    "Surrogate",
    "Target",
    "attack",
    "check",
    "check_target",
    "distil",
    "extract",
    "extract_adapted",
    "features",
    "label",
    "of_denoiser",
    "of_run",
    "open_folder",
    "synthesize",
]

Guard = Callable[[], None]
"""Called before every write; raises `UserError` when the folder is no longer ours."""

SETTINGS = "attack.json"
"""What an attack's folder was made with."""
LATER = ("scales", "quality_floor", "audit", "mesh")
"""Fields of `Side` that an attack may go on with otherwise: they change nothing that was made."""


class Stopped(Exception):
    """A signal came while classifier or adapters were trained; the same call goes on from there. Its text is the signal's name."""


@dataclass(frozen=True)
class Surrogate:
    """The labelled images that the guide learns from.

    Attributes:
      images: uint8 [M,H,W,C].
      teacher: float32 [M,K], probabilities.
      clusters: how they came about; None with another teacher.
    """

    images: np.ndarray
    teacher: np.ndarray
    clusters: clustering.Clusters | None

    @property
    def classes(self) -> int:
        """K."""
        return int(self.teacher.shape[1])


def check(cfg: Side) -> None:
    """Raises UserError for the first setting that is out of range, whatever the target."""
    check_values(cfg)
    clustering.check(cfg.surrogate)
    guided.check_scales(cfg.scales)
    if 0 not in cfg.scales:
        raise UserError(
            f"scales = {cfg.scales}: has no 0, the model alone, which the others are compared with; add it"
        )
    sampler.check(cfg.sample)
    sets.check(cfg.audit)
    spaces.check(_space(cfg.surrogate))
    if not 0 <= cfg.quality_floor <= 1:
        raise UserError(
            f"quality_floor = {cfg.quality_floor}: must be in [0, 1], a share of the unguided precision"
        )
    if not cfg.surrogate.level > 0:
        raise UserError(f"surrogate.level = {cfg.surrogate.level}: must be above 0; 0.3 is usual")


def open_folder(folder: Path, target: Target, cfg: Side) -> None:
    """Write what the attack in `folder` is made with, or check that it goes on with the same.

    Raises:
      UserError: it holds another attack, or cannot be written.
    """
    path = locate(folder) / SETTINGS
    made = {name: part for name, part in to_json(cfg).items() if name not in LATER}
    tree = {"format": 1, "target": target.identity, "settings": made}
    if not path.is_file():
        write_json(path, tree)
        return
    try:
        found = json.loads(path.read_text())
        before = _flat({"target": found["target"], **found["settings"]})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; choose another --out, or delete the attack") from None
    now = _flat({"target": target.identity, **made})
    for name in now:
        if before.get(name) != now[name]:
            raise UserError(
                f"{folder}: holds an attack with {name} = {before.get(name)!r}, and this one has {now[name]!r}; choose "
                "another --out"
            )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in tree.items():
        flat |= (
            {f"{name}.{key}": value for key, value in part.items()}
            if isinstance(part, dict)
            else {name: part}
        )
    return flat


# ---------------------------------------------------------------------------------------- the attack


def synthesize(target: Target, cfg: Side, folder: Path, monitor: loop.Monitor) -> np.ndarray:
    """The model's own unguided images, uint8 [n,H,W,C]: all that the attack knows of the training images."""
    path = locate(folder) / "synthetic.npz"
    if not processes.from_first(path.is_file):
        drawn = replace(cfg.sample, n=cfg.surrogate.n, seed=cfg.surrogate.seed)
        generate = make_generator(target.model, _sampling(target, drawn), None, mesh.make_mesh(cfg.mesh))
        unfinished = locate(folder) / "synthetic"
        draw_kept(
            lambda index: generate(target.params, index),
            drawn.n,
            drawn.batch,
            unfinished,
            path,
            monitor,
            "synthetic",
        )
        processes.from_first(lambda: remove(unfinished))
    with path.open("rb") as opened, np.load(opened) as stored:
        images: np.ndarray = stored["x"]
    return images


def label(
    target: Target,
    cfg: Side,
    images: np.ndarray,
    folder: Path,
    known: tuple[np.ndarray, np.ndarray] | None = None,
) -> Surrogate:
    """Give the images their surrogate labels.

    Args:
      target: the model; looks at them with surrogate.features network, labels them with surrogate.teacher model.
      cfg: the attack.
      images: uint8 [N,H,W,C], from `synthesize`.
      folder: where `clusters.json` and `clusters.npz` go.
      known: for the oracle alone: training images uint8 [R,H,W,C] and their labels int [R].

    Raises:
      UserError: no cluster is left, or the teacher needs what is not there.
    """
    kind = cfg.surrogate.teacher
    if kind == "model":
        levels = tuple(float(x) for x in np.geomspace(0.05, 5.0, 8))
        return Surrogate(
            images, teachers.diffusion_classifier(target.model, target.params, levels)(images), None
        )
    if kind == "oracle":
        if known is None:
            raise UserError(
                "surrogate.teacher = 'oracle': needs the training images and their labels, and these have none; take clusters"
            )
        return Surrogate(images, teachers.oracle(*known)(images), None)
    rows, space = features(target, cfg, images)
    found = processes.together(lambda: clustering.cluster(rows, cfg.surrogate, space=space))
    if kind == "shuffled":
        found = replace(found, labels=clustering.shuffled(found.labels, cfg.surrogate.seed))
    processes.from_first(lambda: str(clustering.save(found, folder)))
    used = found.labels >= 0
    if cfg.surrogate.soft and kind == "clusters":
        probabilities = clustering.soft(found, rows[used], cfg.surrogate.soft)
    else:
        probabilities = clustering.one_hot(found.labels[used], len(found.centres))
    return Surrogate(images[used], probabilities, found)


def features(target: Target, cfg: Side, images: np.ndarray) -> tuple[np.ndarray, str]:
    """Rows [N,F] of images in the space that is clustered, and its name; nothing but the images and the model decides it."""
    about = cfg.surrogate
    if about.features == "network":
        seen = evidence.features(target.model, target.params, evidence.images_of(images), (about.level,))[0]
        centred = np.asarray(seen, np.float64) - seen.mean(0)
        return centred, f"the model's middle features at noise level {about.level:g}"
    space = spaces.make_features(_space(about), images)
    return np.asarray(space(images), np.float64), space.name


def distil(
    target: Target,
    cfg: Side,
    labelled: Surrogate,
    folder: Path,
    monitor: loop.Monitor,
    guard: Guard | None = None,
) -> tuple[Classifier, Params]:
    """The classifier that guides, trained on the labelled images in `folder`/classifier.

    Raises:
      Stopped: a signal came; the same call goes on.
    """
    where = locate(folder) / "classifier"
    if not processes.from_first((where / "calibration.json").is_file):
        like = replace(target.config, mesh=cfg.mesh)
        found = classify.train(cfg.classifier, labelled.images, labelled.teacher, like, where, monitor, guard)
        if found.stopped:
            raise Stopped(found.stopped)
    classifier, params = classify.load(where, monitor, cfg.mesh)
    guided.check_guide(target.model, classifier)
    return classifier, params


def extract(
    target: Target,
    cfg: Side,
    guide: guidance.Guide,
    guide_params: Params,
    folder: Path,
    monitor: loop.Monitor,
    guard: Guard | None = None,
    scales: Sequence[float] | None = None,
) -> dict[float, Path]:
    """Images guided towards each class in turn, at each strength, in `folder`/guided.

    Args:
      target: the model.
      cfg: the attack.
      guide: the classifier.
      guide_params: its parameters.
      folder: the attack's; another one than the classifier's in a crossed design.
      monitor: told about progress.
      guard: called before writes.
      scales: strengths; `cfg.scales` by default.

    Returns:
      strength -> file (`guided.load`).
    """
    sampling = _sampling(target, cfg.sample)
    generator = guided.make_generator(target.model, sampling, guide, mesh.make_mesh(cfg.mesh))
    draw = functools.partial(generator, target.params, guide_params)
    scales = cfg.scales if scales is None else scales
    return _drawn(target, sampling, draw, guide_params, guide.classes, scales, folder, monitor, guard)


def extract_adapted(
    target: Target,
    cfg: Side,
    labelled: Surrogate,
    folder: Path,
    monitor: loop.Monitor,
    guard: Guard | None = None,
) -> dict[float, Path]:
    """The second way: adapters make the model conditional on the surrogate labels (`mdiff.recipes.adapt`).

    Raises:
      Stopped: a signal came while they were trained; the same call goes on.
    """
    where, label_of = locate(folder) / "adapter", labelled.teacher.argmax(1)
    told, like = json.dumps(target.identity, sort_keys=True), replace(target.config, mesh=cfg.mesh)
    _, outcome = adapt.train(
        cfg.adapter, like, target.model, target.params, labelled.images, label_of, labelled.classes, where, told,
        monitor, guard,
    )  # fmt: skip
    if outcome.stopped:
        raise Stopped(outcome.stopped)
    sampling, fitted = _sampling(target, cfg.sample), outcome.state.ema
    generator = adapt.make_generator(target.model, sampling, mesh.make_mesh(cfg.mesh))
    draw = functools.partial(generator, target.params, fitted)
    return _drawn(target, sampling, draw, fitted, labelled.classes, cfg.scales, folder, monitor, guard)


def _drawn(
    target: Target,
    sampling: config.Sample,
    draw: guided.Generator,
    guide_params: Params,
    classes: int,
    scales: Sequence[float],
    folder: Path,
    monitor: loop.Monitor,
    guard: Guard | None,
) -> dict[float, Path]:
    told = _identity(target, guide_params)
    return guided.draw(
        draw, sampling, tuple(scales), classes, locate(folder) / "guided", told, monitor, guard
    )


def attack(
    target: Target,
    cfg: Side,
    folder: Path,
    monitor: loop.Monitor,
    guard: Guard | None = None,
    known: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Surrogate, dict[float, Path]]:
    """All stages that make something; what is there already is not made again.

    Args:
      target: the model.
      cfg: the attack.
      folder: where it goes.
      monitor: told about progress.
      guard: called before writes.
      known: for the oracle alone, as of `label`.

    Returns:
      The labelled images, and the file of each strength's generations.
    """
    check(cfg)
    check_target(target, cfg)
    processes.from_first(lambda: open_folder(folder, target, cfg))
    labelled = label(target, cfg, synthesize(target, cfg, folder, monitor), folder, known)
    if cfg.adapter.rank:
        return labelled, extract_adapted(target, cfg, labelled, folder, monitor, guard)
    classifier, params = distil(target, cfg, labelled, folder, monitor, guard)
    return labelled, extract(target, cfg, classifier, params, folder, monitor, guard)


def _space(about: side.Surrogate) -> config.Audit:
    """The feature space as the audit names it."""
    name = "pixel" if about.features == "network" else about.features
    return config.Audit(features=name, components=about.components)


def _sampling(target: Target, cfg: config.Sample) -> config.Sample:
    """The sampler, ending where the target's training knew nothing lower."""
    return sampler.settings(replace(target.config, sample=cfg))


def _identity(target: Target, guide_params: Params) -> str:
    """Which model and which classifier, for the stamp of finished files."""
    sums = [float(np.abs(np.asarray(leaf, np.float64)).sum()) for leaf in jax.tree.leaves(guide_params)]
    return json.dumps([target.identity, sums], sort_keys=True)

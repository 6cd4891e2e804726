"""What an attack is made on: the newest checkpoint of a run, or any denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mdiff import config
from mdiff.errors import UserError
from mdiff.nets import classifier as classifiers
from mdiff.nets.denoiser import Model, from_sigma_fn
from mdiff.process import laws
from mdiff.process.gaussian import GaussianProcess
from mdiff.recipes.runs import Experiment, load_params, reopen
from mdiff.side import Side
from mdiff.train import loop
from mdiff.types import Array, Denoiser, Params


@dataclass(frozen=True)
class Target:
    """The model that is attacked.

    Attributes:
      model: the network, or what stands for one (`of_denoiser`).
      params: its parameters.
      config: uses process, data.size, net.sigma_data, loss (where sampling ends) and mesh.
      identity: plain JSON that tells it from other models.
    """

    model: Model
    params: Params
    config: config.Config
    identity: dict[str, Any]


def of_run(folder: Path, cfg: Side, monitor: loop.Monitor) -> tuple[Target, Experiment]:
    """The newest checkpoint of a run as a target, and the run, whose images only the auditor may see."""
    made = reopen(folder, mesh_as=cfg.mesh)
    params, step = load_params(folder, monitor, ema=cfg.sample.ema, on=cfg.mesh)
    identity = {"step": step, "digest": config.digest(made.config), "name": made.config.name}
    return Target(made.model, params, made.config, identity), made


@dataclass(frozen=True)
class Given:
    """What stands for a model where only a denoiser is known: unconditional, without parameters.

    Attributes:
      denoise: `(x [B,H,W,C], sigma [B]) -> x0`, traceable by JAX, as of `nets.denoiser.from_sigma_fn`.
      process: the noise law that samplers use.
      shape: (H, W, C) of one image.
    """

    denoise: Callable[[Array, Array], Array]
    process: GaussianProcess
    shape: tuple[int, int, int]
    embedding: None = None
    damage: None = None

    def denoiser(self, params: Params, gates: None = None, seen: None = None) -> Denoiser:
        """As `Model.denoiser`; nothing is left open."""
        return from_sigma_fn(self.denoise, self.process)

    def condition(self, *args: Any, **kwargs: Any) -> None:
        """None: there are no conditions."""


def of_denoiser(
    denoise: Callable[[Array, Array], Array],
    shape: tuple[int, int, int],
    process: config.Process = config.Process(),
    *,
    sigma_data: float = 0.5,
    name: str = "denoiser",
) -> Target:
    """Bring your own model: any `denoise(x, sigma) -> x0` as a target.

    Args:
      denoise: x [B,H,W,C] with noise of standard deviation sigma [B] on images in [-1, 1], to its estimate of the clean
        images; traceable and differentiable by JAX.
      shape: (H, W, C) of one image, H = W.
      process: noise range, and the law the classifier is trained under.
      sigma_data: standard deviation of the images, for the classifier's input scale.
      name: tells this model from others in the attack's folder; change it when the model changes.
    """
    laws.check(process)
    given = Given(denoise, laws.make_process(process), shape)
    about = config.Config(
        name=name, process=process, data=config.Data(size=shape[0]), net=config.Net(sigma_data=sigma_data)
    )
    return Target(cast(Model, given), {}, about, {"name": name, "shape": list(shape)})


def check_target(target: Target, cfg: Side) -> None:
    """Raises UserError when the settings do not fit the model, before anything is made."""
    classifiers.check(cfg.classifier, target.model.shape, 2)
    about = cfg.surrogate
    embedding = target.model.embedding
    if about.teacher == "model" and (embedding is None or not embedding.classes):
        raise UserError(
            "surrogate.teacher = 'model': the model has no classes (net.classes = 0) and cannot classify; take clusters"
        )
    if cfg.adapter.rank < 0:
        raise UserError(f"adapter.rank = {cfg.adapter.rank}: must be 0 (a classifier guides) or more")
    if cfg.adapter.rank and isinstance(target.model, Given):
        raise UserError(
            f"adapter.rank = {cfg.adapter.rank}: a bare denoiser has no network to adapt; set it to 0"
        )
    if about.features == "network" and isinstance(target.model, Given):
        raise UserError(
            "surrogate.features = 'network': a bare denoiser has no features to look at; take pixel or random"
        )

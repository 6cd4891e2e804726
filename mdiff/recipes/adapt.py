"""The second way of guiding: low-rank adapters and a table of conditions, fine-tuned on labelled generations.

The loss is the plain denoising loss with the label as condition (arXiv 2410.02467, method 2; there of eps). What comes of it is
a conditional denoiser, so no classifier is needed; its strength is that of classifier-free guidance, from the frozen
model towards the adapted one: 1 is the adapted model itself.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh

from mdiff import config, side
from mdiff.data.source import Images
from mdiff.data.split import Subset
from mdiff.errors import UserError
from mdiff.keys import keys
from mdiff.nets import lora
from mdiff.nets.denoiser import Model
from mdiff.objectives import denoise
from mdiff.recipes import generate
from mdiff.recipes.guided import Guided, check_labels
from mdiff.sample import guidance, sampler
from mdiff.train import loop, mesh
from mdiff.trees import nbytes
from mdiff.types import Array, Params, Prediction

LARGEST = 1 << 30
"""Bytes of frozen parameters above which training is refused: they are constants of its program, of 2 GB at most."""


def config_of(
    cfg: side.Adapter, target: config.Config, x: np.ndarray, label: np.ndarray, classes: int, identity: str
) -> config.Config:
    """The training run of adapters: the target's process, network and noise levels, on other images.

    Args:
      cfg: rank, steps, batch, lr.
      target: the experiment whose model is adapted.
      x: uint8 [N,H,W,C] images.
      label: int [N] their labels.
      classes: K.
      identity: which parameters are frozen, such as digest and step of the target's run.

    Returns:
      Its config. data.source says which images, labels, frozen parameters and rank it is of, so that nothing
      else is resumed in its folder.
    """
    told = hashlib.sha256(f"{identity}|{cfg.rank}|{x.shape}|".encode())
    told.update(np.ascontiguousarray(x).tobytes() + np.asarray(label, np.int32).tobytes())
    loss, old = target.loss, target.loss.level_weight
    return config.Config(
        name=f"adapter of {target.name}",
        seed=target.seed,
        data=config.Data(source=f"generations {told.hexdigest()[:16]}", size=x.shape[1], n=len(x), heldout=0),
        process=target.process,
        net=replace(target.net, classes=classes, vector=0, condition_dropout=0.0),
        loss=config.Loss(
            times=loss.times,
            p_mean=loss.p_mean,
            p_std=loss.p_std,
            level_weight="edm" if old == "learned" else old,
            min_snr=loss.min_snr,
        ),
        train=config.Train(
            steps=cfg.steps,
            batch=cfg.batch,
            lr=cfg.lr,
            warmup=min(100, cfg.steps // 10),
            save_every=max(1, cfg.steps // 4),
            log_every=max(1, min(50, cfg.steps)),
        ),
        mesh=target.mesh,
    )


def train(
    cfg: side.Adapter,
    target: config.Config,
    model: Model,
    frozen: Params,
    x: np.ndarray,
    label: np.ndarray,
    classes: int,
    folder: Path,
    identity: str,
    monitor: loop.Monitor,
    guard: Callable[[], None] | None = None,
) -> tuple[lora.Adapted, loop.Outcome]:
    """Fit adapters and condition table to labelled images, or go on fitting them in `folder`.

    The frozen parameters are constants of the compiled step, so each process holds all of them.

    Args:
      cfg: rank, steps, batch, lr.
      target: the experiment whose model is adapted.
      model: its network.
      frozen: its parameters.
      x: uint8 [N,H,W,C] images, generations of the model.
      label: int [N] their labels, 0 to K-1.
      classes: K, rows of the table.
      folder: the run's folder.
      identity: which parameters are frozen.
      monitor: told about progress.
      guard: as of `loop.train`.

    Returns:
      The adapted model, and how training ended; its averaged parameters, `state.ema`, are the ones to draw with.

    Raises:
      UserError: rank, labels or images do not fit, the folder holds another run, or the model is too large.
    """
    x, label = np.asarray(x), np.asarray(label)
    if x.ndim != 4 or x.dtype != np.uint8 or tuple(x.shape[1:]) != tuple(model.shape) or len(x) < 2:
        raise UserError(
            f"adapter: images are {x.dtype} {x.shape}; give 2 or more, uint8 [N, {', '.join(map(str, model.shape))}]"
        )
    if len(label) != len(x):
        raise UserError(f"adapter: {len(label)} labels for {len(x)} images; give one for each")
    check_labels(label, classes)
    if nbytes(frozen) > LARGEST:
        raise UserError(
            f"adapter.rank = {cfg.rank}: the model has {nbytes(frozen) / 1e9:.1f} GB, above {LARGEST / 1e9:.1f} GB that "
            "adapters can be trained for; guide it by a classifier (adapter.rank 0)"
        )
    made = config_of(cfg, target, x, label, classes, identity)
    fitted = lora.adapted(model, jax.device_get(frozen), classes, cfg.rank)
    images = Images(made.data.source, x, np.arange(len(x), dtype=np.int32), label.astype(np.int32))
    subset = Subset(images, images.take(np.arange(0)), np.arange(len(x), dtype=np.int32))
    objective = denoise.make(fitted, made)
    return fitted, loop.train(made, fitted, objective, subset, folder, monitor, guard=guard)


def make_generator(
    model: Model,
    cfg: config.Sample,
    on: DeviceMesh | None = None,
) -> Callable[[Params, Params, Any, Any, Any], Guided]:
    """`(frozen, adapted params, sample index [B], label [B], scale) -> Guided`, as `guided.make_generator`.

    Sample i starts from the noise of sample i of `generate.make_generator`, and is its sample at scale 0. Scale 1 is the
    adapted model, any other the extrapolation from the frozen model's prediction towards it, which costs both.
    `gap` is NaN: there is no classifier.

    Args:
      model: the model that was adapted.
      cfg: the sampler; its own guidance fields apply at scale 0 alone.
      on: devices the batch is split over; it is filled up where it does not divide.

    Raises:
      UserError: on call, a strength is negative or not finite, or a label has no row in the table.
    """
    plain = generate.make_generator(model, cfg, None, on)
    program = _program(model, cfg, on)
    ways = 1 if on is None else mesh.batch_devices(on)

    def run(frozen: Params, params: Params, index: Any, label: Any, scale: Any) -> Guided:
        n, label = len(index), check_labels(label, len(params["table"]))
        guidance.check_scale(scale)
        nothing = jnp.full(n, jnp.nan)
        if scale == 0:
            return Guided(plain(frozen, index), nothing)
        rows: tuple[Any, ...] = (np.asarray(index, np.int32), label.astype(np.int32))
        rows = tuple(np.pad(row, (0, -n % ways), mode="edge") for row in rows)
        if on is not None:
            rows = mesh.place(rows, mesh.replicated(on))
        return Guided(program(frozen, params, *rows, np.float32(scale), alone=scale == 1)[:n], nothing)

    return run


@functools.lru_cache(maxsize=8)
def _program(model: Model, cfg: config.Sample, on: DeviceMesh | None) -> Any:
    split, whole = (None, None) if on is None else (mesh.batch_sharding(on), mesh.replicated(on))

    @functools.partial(jax.jit, out_shardings=whole, static_argnames="alone")
    def program(
        frozen: Params, params: Params, index: Array, label: Array, scale: Array, alone: bool
    ) -> Array:
        if split is not None:
            index, label = (jax.lax.with_sharding_constraint(x, split) for x in (index, label))
        fitted = lora.adapted(model, frozen, len(params["table"]), rank=1)
        towards, away = model.denoiser(fitted.merged(params)), model.denoiser(frozen)
        null = model.condition(frozen, {}, n=len(label))

        def blended(xt: Array, t: Array, cond: Array | None) -> Prediction:
            return guidance.extrapolate(away(xt, t, null), towards(xt, t, cond), scale)

        denoiser = towards if alone else blended
        cond = fitted.condition(params, {"label": label})
        every = keys(cfg.seed, "sample", index)
        with mesh.activations_on(on) if on is not None else nullcontext():
            return sampler.sample(model.process, cfg, denoiser, every, model.shape, cond)

    return program

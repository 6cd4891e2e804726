"""The training state and one step of it, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh as DeviceMesh

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.denoiser import Model
from mdiff.train import mesh as meshes
from mdiff.types import Array, Batch, Key, Objective, Params

BatchFn = Callable[[dict[str, Array], Array, Key], Batch]
"""`(pool on device, index [B], key) -> Batch`; a pure function, traced into the step."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a resumed run needs beside its config.

    Attributes:
      step: [] int32, updates done.
      params: network parameters, float32.
      ema: their running average, what sampling uses.
      opt_state: optax state.
    """

    step: Array
    params: Params
    ema: Params
    opt_state: Any


def make_optimizer(cfg: config.Train) -> optax.GradientTransformation:
    """Adam with linear warm-up and clipping by global norm."""
    if cfg.warmup:
        schedule = optax.linear_schedule(0.0, cfg.lr, cfg.warmup)
    else:
        schedule = optax.constant_schedule(cfg.lr)
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip > 0 else optax.identity()
    return optax.chain(clip, optax.adam(schedule))


def plan_state(
    model: Model, optimizer: optax.GradientTransformation, seed: int, mesh: DeviceMesh
) -> tuple[Callable[[], TrainState], Any]:
    """How to make a fresh state, and what it looks like, before any memory is taken.

    Returns:
      A function that creates the state sharded over `mesh`, and the state's shapes, dtypes and
      shardings: what a checkpoint is restored into.
    """

    def init() -> TrainState:
        params = model.init(key(seed, "init"))
        ema = jax.tree.map(jnp.copy, params)  # donated separately, so it must not alias
        return TrainState(jnp.int32(0), params, ema, optimizer.init(params))

    shapes = jax.eval_shape(init)
    out = meshes.shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, sh: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sh), shapes, out)
    # Run once: on CPU, optimizing hundreds of small kernels costs four times what it takes to compile them.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}
    return jax.jit(init, out_shardings=out, compiler_options=options), abstract


def ema_rate(step: Array, batch: int, halflife: float) -> Array:
    """Decay of the average at `step` (counted from 1): half-life in images, but never more than 5 % of
    the images seen, so that early averages forget the initialization (arXiv 2206.00364, app. F)."""
    images = step.astype(jnp.float32) * batch
    return 0.5 ** (batch / jnp.maximum(jnp.minimum(halflife, 0.05 * images), 1e-8))


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_fn: BatchFn,
    cfg: config.Train,
    seed: int,
) -> Callable[[TrainState, dict[str, Array], Array], tuple[TrainState, dict[str, Array]]]:
    """One update: `(state, pool, index [B]) -> (state, metrics)`. All randomness is key(seed, step)."""

    def step(state: TrainState, pool: dict[str, Array], index: Array) -> tuple[TrainState, dict[str, Array]]:
        batch = batch_fn(pool, index, key(seed, "batch", state.step))

        def mean_loss(params: Params) -> Array:
            return objective(params, key(seed, "train", state.step), batch)[0].mean()

        loss, grads = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = ema_rate(state.step + 1, cfg.batch, cfg.ema_halflife)
        ema = jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, state.ema, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def check(cfg: config.Train) -> None:
    """Raises UserError when a training field is out of range."""
    for name in ("steps", "batch", "log_every", "save_every", "keep", "eval_samples"):
        if getattr(cfg, name) < 1:
            raise UserError(f"train.{name} = {getattr(cfg, name)}: must be 1 or more")
    for name in ("warmup", "keep_every", "eval_every", "clip"):
        if getattr(cfg, name) < 0:
            raise UserError(f"train.{name} = {getattr(cfg, name)}: must be 0 or more")
    for name in ("lr", "ema_halflife"):
        if not getattr(cfg, name) > 0:
            raise UserError(f"train.{name} = {getattr(cfg, name)}: must be above 0")

"""The training state and one step of it, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh as DeviceMesh
from jax.tree_util import GetAttrKey

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.denoiser import Model
from mdiff.objectives.denoise import DrawnObjective, Draws
from mdiff.train import ema, optim, stopping
from mdiff.train import mesh as meshes
from mdiff.types import Array, Batch, Key, Objective, Params

Arrays: TypeAlias = dict[str, Array]
BatchFn = Callable[[Arrays, Arrays, Key], Batch]
"""`(arrays that stay on the devices, rows of this step, key) -> Batch`; a pure function, traced into the step."""


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class TrainState:
    """Everything a resumed run needs beside its config.

    Attributes:
      step: [] int32, updates done.
      params: network parameters, float32.
      ema: their running average, what sampling uses.
      opt_state: optax state.
      profiles: power-function averages by `ema.name(length)`; empty unless train.ema_lengths asks for some.
    """

    step: Array
    params: Params
    ema: Params
    opt_state: Any
    profiles: dict[str, Params] = field(default_factory=dict)

    # Without profiles the tree has no such branch: what was saved before there were any restores as before.
    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        names = [each.name for each in fields(self) if each.name != "profiles" or self.profiles]
        return [(GetAttrKey(name), getattr(self, name)) for name in names], tuple(names)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Sequence[Any]) -> TrainState:
        return cls(**dict(zip(names, children, strict=True)))


def fresh_state(
    model: Model, optimizer: optax.GradientTransformation, seed: int | Array, lengths: Sequence[float] = ()
) -> TrainState:
    """The state a run begins with; pure, and to be traced in a jit. Arguments as of `plan_state`."""
    params = model.init(key(seed, "init"))

    def copy() -> Params:  # donated separately, so nothing must alias
        return jax.tree.map(jnp.copy, params)

    profiles = {ema.name(length): copy() for length in lengths}
    return TrainState(jnp.int32(0), params, copy(), optimizer.init(params), profiles)


def plan_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: DeviceMesh,
    lengths: Sequence[float] = (),
    shard_above: int = config.Mesh.shard_above,
) -> tuple[Callable[[], TrainState], Any]:
    """How to make a fresh state, and what it looks like, before any memory is taken.

    Args:
      model: the network.
      optimizer: from `optim.make_optimizer`.
      seed: the run's seed.
      mesh: the devices.
      lengths: power-function averages to keep (train.ema_lengths).
      shard_above: leaves of fewer bytes are not sharded (mesh.shard_above).

    Returns:
      A function that creates the state sharded over `mesh`, and the state's shapes, dtypes and
      shardings: what a checkpoint is restored into.
    """

    def init() -> TrainState:
        return fresh_state(model, optimizer, seed, lengths)

    shapes = jax.eval_shape(init)
    out = meshes.shardings(shapes, mesh, min_bytes=shard_above)
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
    seed: int | Array,
    *,
    unroll: bool = False,
) -> Callable[[TrainState, Arrays, Arrays], tuple[TrainState, Arrays]]:
    """One update: `(state, resident, rows) -> (state, metrics)`. All randomness is key(seed, step).

    Metrics are scalars: loss, grad_norm, lr (of this update), and the mean of the objective's loss_edm, if any.

    Args:
      objective: per-example loss.
      optimizer: from `optim.make_optimizer`.
      batch_fn: makes the batch on the device.
      cfg: uses batch, accumulate and the averages' fields.
      seed: the run's seed; may be traced.
      unroll: write the parts of an accumulated batch one after another instead of looping over them (a
        convolution's gradient in a loop is slow on CPU).
    """
    schedule = optim.make_schedule(cfg)

    def step(state: TrainState, resident: Arrays, rows: Arrays) -> tuple[TrainState, Arrays]:
        batch = batch_fn(resident, rows, key(seed, "batch", state.step))
        grad = jax.value_and_grad(_mean_loss(objective), has_aux=True)
        now = key(seed, "train", state.step)
        if cfg.accumulate == 1:
            (loss, more), grads = grad(state.params, now, batch)
        else:
            (loss, more), grads = _accumulated(
                grad, objective, state.params, now, batch, cfg.accumulate, unroll
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        done = state.step + 1
        rate = ema_rate(done, cfg.batch, cfg.ema_halflife)
        average = jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, state.ema, params)
        profiles = ema.update(state.profiles, params, done, cfg.ema_lengths)
        lr = jnp.asarray(schedule(state.step), jnp.float32)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "lr": lr, **more}
        return TrainState(done, params, average, opt_state, profiles), metrics

    return step


def _mean_loss(objective: Objective) -> Callable[..., tuple[Array, Arrays]]:
    """`(params, key, batch, draws=None) -> (mean loss, means worth logging)`."""

    def mean_loss(params: Params, key: Key, batch: Batch, draws: Any = None) -> tuple[Array, Arrays]:
        if draws is None:
            losses, aux = objective(params, key, batch)
        else:
            assert isinstance(objective, DrawnObjective)
            losses, aux = objective.loss(params, draws, batch)
        return losses.mean(), {name: aux[name].mean() for name in ("loss_edm",) if name in aux}

    return mean_loss


def _accumulated(
    grad: Callable[..., Any],
    objective: Objective,
    params: Params,
    key: Key,
    batch: Batch,
    parts: int,
    unroll: bool,
) -> Any:
    """What `grad` gives for the whole batch, from `parts` equal parts one after another.

    Noise and levels are drawn for the batch as a whole, so they do not depend on `parts`; dropout inside the
    network does. An objective that cannot be drawn for apart gets a key per part.
    """

    def split(x: Array) -> Array:  # every part takes equally many rows of each device: nothing moves
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    every = jax.vmap(lambda part: jax.random.fold_in(key, part))(jnp.arange(parts))
    draws = None
    if isinstance(objective, DrawnObjective):
        whole = objective.draw(key, batch)
        every = jax.vmap(lambda part: jax.random.fold_in(whole.key, part))(jnp.arange(parts))
        draws = jax.tree.map(split, {name: x for name, x in whole._asdict().items() if name != "key"})

    def one(part: Any) -> Any:
        at, rows, drawn = part
        found = grad(params, at, rows, None if drawn is None else Draws(**drawn, key=at))
        return jax.tree.map(lambda leaf: leaf / parts, found)

    def body(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(part)), None

    xs = (every, jax.tree.map(split, dict(batch)), draws)
    shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda leaf: leaf[0], xs)))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(body, zero, xs, unroll=parts if unroll else 1)[0]


def check(cfg: config.Train) -> None:
    """Raises UserError when a training field is out of range."""
    if cfg.accumulate < 1 or cfg.batch % cfg.accumulate:
        raise UserError(
            f"train.accumulate = {cfg.accumulate}: must be 1 or more and divide train.batch = {cfg.batch}"
        )
    for name in ("steps", "batch", "log_every", "save_every", "keep", "eval_samples"):
        if getattr(cfg, name) < 1:
            raise UserError(f"train.{name} = {getattr(cfg, name)}: must be 1 or more")
    for name in ("keep_every", "eval_every"):
        if getattr(cfg, name) < 0:
            raise UserError(f"train.{name} = {getattr(cfg, name)}: must be 0 or more")
    if not cfg.ema_halflife > 0:
        raise UserError(f"train.ema_halflife = {cfg.ema_halflife}: must be above 0")
    optim.check(cfg)
    ema.check(cfg)
    stopping.check(cfg)
    for level in cfg.eval_levels:
        if not level > 0:
            raise UserError(f"train.eval_levels = {cfg.eval_levels}: noise levels are above 0")

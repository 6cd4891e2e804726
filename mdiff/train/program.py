"""The program of a training run, from shapes alone: what the loop runs and what a plan compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh as DeviceMesh

from mdiff import config
from mdiff.data import stream
from mdiff.nets.denoiser import Model
from mdiff.train import mesh as meshes
from mdiff.train import optim, state
from mdiff.types import Batch, Key, Objective


class TrainProgram(NamedTuple):
    """A training run before any memory is taken.

    Attributes:
      fresh: makes a fresh state, sharded over the mesh.
      abstract: the state's shapes, dtypes and shardings.
      step: jitted `(state, resident, rows) -> (state, metrics)`; the state is donated.
    """

    fresh: Callable[[], state.TrainState]
    abstract: Any
    step: Any


def make_batch_fn(cfg: config.Config) -> state.BatchFn:
    """How a batch is made on the device: gather, fixed noisy copies, then augmentations."""

    def batch_fn(resident: state.Arrays, rows: state.Arrays, key: Key) -> Batch:
        return stream.finish(stream.gather(resident, rows), key, cfg)

    return batch_fn


def train_program(cfg: config.Config, model: Model, objective: Objective, mesh: DeviceMesh) -> TrainProgram:
    """The program of `cfg` on `mesh`, whose devices need not exist.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    meshes.check_batch(cfg.train.batch, mesh, cfg.train.accumulate)
    optimizer = optim.make_optimizer(cfg.train)
    fresh, abstract = state.plan_state(
        model, optimizer, cfg.seed, mesh, cfg.train.ema_lengths, cfg.mesh.shard_above
    )
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    step = state.make_step(
        objective,
        optimizer,
        make_batch_fn(cfg),
        cfg.train,
        cfg.seed,
        unroll=on_cpu and not cfg.net.scan_safe,
    )
    out = (jax.tree.map(lambda leaf: leaf.sharding, abstract), None)

    def sharded_step(*args: Any) -> Any:
        with meshes.activations_on(mesh):
            return step(*args)

    return TrainProgram(fresh, abstract, jax.jit(sharded_step, donate_argnums=0, out_shardings=out))

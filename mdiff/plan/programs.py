"""The programs a config runs, as shapes on devices that need not exist: a training step, a batch of samples, a sweep.

They are the ones the commands run: nothing here is a model of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding

from mdiff import config, flops
from mdiff.errors import UserError
from mdiff.nets.denoiser import Model, make_model
from mdiff.objectives import damaged
from mdiff.probes import ablation
from mdiff.recipes import generate
from mdiff.sample import sampler
from mdiff.train import mesh as meshes
from mdiff.train.program import train_program

PARTS = ("train", "sample", "sweep")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The sweep over neurons that is planned."""

    images: int = 4
    """Noisy images each ablation is tried on."""
    chunk: int = 8
    """Ablations a device works on at once."""
    pattern: str = ""
    """Neurons whose gate's name contains a match of this regular expression; all when empty."""


@dataclass(frozen=True)
class Program:
    """One jitted program and what it is called with.

    Attributes:
      jitted: the function, with its shardings and donations.
      args: its arguments as `ShapeDtypeStruct`s with shardings.
      holds: what the arguments are: name -> tree of `ShapeDtypeStruct`s.
      unit: what is counted.
      per_call: units that one call makes, on all devices together.
      units: what the whole run makes.
      calls: how often the whole run calls it.
      executed: operations of one call on all devices, counted from the jaxpr, recomputation included.
      useful: the same without recomputation: what MFU is a share of.
    """

    jitted: Any
    args: tuple[Any, ...]
    holds: Mapping[str, Any]
    unit: str
    per_call: int
    units: int
    calls: int
    executed: int
    useful: int


def build(part: str, cfg: config.Config, channels: int, devices: list[Any], sweep: Sweep) -> Program:
    """The program of `part` on a mesh of `devices`.

    Raises:
      UserError: the config's mesh or batch does not divide the devices, or a field is out of range.
    """
    build_part = {"train": _train, "sample": _sample, "sweep": _sweep}[part]
    return build_part(cfg, make_model(cfg, channels), devices, sweep)


def _train(cfg: config.Config, model: Model, devices: list[Any], _: Sweep) -> Program:
    mesh = meshes.make_mesh(cfg.mesh, devices)
    program = train_program(cfg, model, damaged.make(model, cfg), mesh)
    whole, split = meshes.replicated(mesh), meshes.batch_sharding(mesh)

    def images(n: int, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
        columns = {"x": ((n, *model.shape), jnp.uint8), "id": ((n,), jnp.int32)}
        if cfg.net.classes:
            columns["label"] = ((n,), jnp.int32)
        if cfg.net.vector:
            columns["vector"] = ((n, cfg.net.vector), jnp.float32)
        if cfg.net.text:
            columns["tokens"] = ((n, cfg.net.text_length), jnp.int32)
        if cfg.loss.copies or cfg.data.degrade != "none":
            columns["noise"] = ((n, 3), jnp.uint32)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype) in columns.items()
        }

    batch = cfg.train.batch
    if cfg.data.reading == "disk":
        resident, rows = {}, images(batch, split)
    else:
        planted = cfg.data.planted_flips, cfg.data.planted_crops
        resident = images(cfg.data.n + sum(sum(each.values()) for each in planted), whole)
        rows = {"index": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)}
    if cfg.loss.ambient:
        rows["cutoff"] = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=split)
    args = (program.abstract, resident, rows)
    executed = useful = flops.count(program.step, *args, padding=False).total
    if cfg.net.remat != "none":
        plain = replace(cfg, net=replace(cfg.net, remat="none"))
        model = replace(model, net=make_model(plain, model.shape[-1]).net)
        useful = flops.count(
            train_program(plain, model, damaged.make(model, plain), mesh).step, *args, padding=False
        ).total
    state = program.abstract
    holds = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "averages": (state.ema, state.profiles),
        "data": (resident, rows),
    }
    steps = cfg.train.steps
    return Program(program.step, args, holds, "images", batch, steps * batch, steps, executed, useful)


def _sample(cfg: config.Config, model: Model, devices: list[Any], _: Sweep) -> Program:
    mesh = meshes.make_mesh(cfg.mesh, devices)
    ways = meshes.batch_devices(mesh)
    batch = cfg.sample.batch + -cfg.sample.batch % ways
    given: dict[str, np.ndarray] = {}
    if cfg.net.vector:
        given["vector"] = np.zeros((1, cfg.net.vector), np.float32)
    if cfg.net.text:
        given["tokens"] = np.zeros((1, cfg.net.text_length), np.int32)
    jitted = generate.sample_program(model, sampler.settings(cfg), given or None, mesh)
    params = _params(model, mesh, cfg)
    index = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=meshes.replicated(mesh))
    counted = flops.count(jitted, params, index, padding=False).total
    calls = -(-cfg.sample.n // cfg.sample.batch)
    return Program(
        jitted,
        (params, index),
        {"parameters": params},
        "images",
        cfg.sample.batch,
        cfg.sample.n,
        calls,
        counted,
        counted,
    )


def _sweep(cfg: config.Config, model: Model, devices: list[Any], sweep: Sweep) -> Program:
    if sweep.images < 1 or sweep.chunk < 1:
        raise UserError(f"sweep.images = {sweep.images}, sweep.chunk = {sweep.chunk}: must be 1 or more")
    mesh = meshes.make_mesh(config.Mesh(data=1, trial=-1), devices)
    gates = model.gates()
    wanted = len(ablation.neurons(gates, sweep.pattern))
    every = sweep.chunk * mesh.shape["trial"]
    n = wanted + -wanted % every
    whole, trial = meshes.replicated(mesh), NamedSharding(mesh, jax.sharding.PartitionSpec("trial"))

    def shape(*dims: int, dtype: Any = jnp.float32, sharding: NamedSharding = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    params = _params(model, mesh, cfg)
    xt = shape(sweep.images, *model.shape)
    cond = None
    if model.embedding is not None:
        width = jax.eval_shape(lambda p: model.condition(p, {}, n=1), params).shape[1]
        cond = shape(sweep.images, width)
    args = (params, shape(n, dtype=jnp.int32, sharding=trial), xt, shape(sweep.images), cond)
    jitted = ablation.program(model, mesh, chunk=sweep.chunk, decode=ablation.one_off(gates))
    executed = (
        flops.count(jitted, *args, padding=False).total * mesh.shape["trial"]
    )  # of one shard, times shards
    one = flops.count(
        lambda p, x, t, c: model.apply(p, x, t, c)[0].eps,
        params,
        xt,
        shape(sweep.images),
        cond,
        padding=False,
    )
    return Program(
        jitted, args, {"parameters": params}, "ablations", wanted, wanted, 1, executed, wanted * one.total
    )


def _params(model: Model, mesh: DeviceMesh, cfg: config.Config) -> Any:
    """Shapes of the parameters, sharded over `mesh` as training shards them."""
    shapes = jax.eval_shape(model.init, jax.random.key(cfg.seed))
    names = meshes.shardings({"params": shapes}, mesh)["params"]
    return jax.tree.map(lambda x, sh: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sh), shapes, names)


def held_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded shapes on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )

"""One mesh with axes data, fsdp and trial, and sharding as a list of (leaf-name pattern, rule) pairs.

State is created sharded: shapes first (`eval_shape`), then rules, then `jit(init, out_shardings=…)`. One
device, several simulated ones and a pod run the same code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from mdiff import config
from mdiff.errors import UserError
from mdiff.trees import map_named
from mdiff.types import Array

Rule: TypeAlias = Literal["replicate", "fsdp"]
Rules: TypeAlias = Sequence[tuple[str, Rule]]

AXES = ("data", "fsdp", "trial")
BATCH = P(("data", "fsdp"))
DEFAULT_RULES: Rules = ((r"^(params|ema|profiles|opt_state)/", "fsdp"), (r".*", "replicate"))


def mesh_shape(cfg: config.Mesh, devices: int) -> tuple[int, ...]:
    """Sizes of the axes `data`, `fsdp`, `trial` on so many devices.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    shape = [cfg.data, cfg.fsdp, cfg.trial]
    shown = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"{shown}: sizes are 1 or more, and at most one may be -1 (take what is left)")
    fixed = int(np.prod([size for size in shape if size != -1]))
    if (-1 in shape and devices % fixed) or (-1 not in shape and fixed != devices):
        fix = "mesh.fsdp and mesh.trial to divisors" if shape[0] == -1 else "mesh.data to -1"
        raise UserError(f"{shown}: do not divide {devices} devices; set {fix}")
    return tuple(devices // fixed if size == -1 else size for size in shape)


def make_mesh(cfg: config.Mesh, devices: Sequence[jax.Device] | None = None) -> DeviceMesh:
    """A mesh of all devices (or `devices`) with axes `data`, `fsdp`, `trial`.

    Raises:
      UserError: as `mesh_shape`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(cfg, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_devices(mesh: DeviceMesh | AbstractMesh) -> int:
    """Over how many devices a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch: int, mesh: DeviceMesh | AbstractMesh, accumulate: int = 1) -> None:
    """Raises UserError when `batch`, in `accumulate` parts, does not divide over the mesh."""
    ways = batch_devices(mesh) * accumulate
    if batch % ways:
        near = max(ways, round(batch / ways) * ways)
        parts = f" in train.accumulate = {accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"train.batch = {batch}: does not divide over {batch_devices(mesh)} devices{parts}; set it to {near}"
        )


def _spec(rule: Rule, shape: tuple[int, ...], dtype: Any, mesh: DeviceMesh, min_bytes: int) -> P:
    """`fsdp` splits the largest divisible axis of leaves of at least `min_bytes`."""
    ways = mesh.shape["fsdp"]
    if rule == "replicate" or ways == 1 or not shape:
        return P()
    if int(np.prod(shape)) * np.dtype(dtype).itemsize < min_bytes:
        return P()
    divisible = [axis for axis in range(len(shape)) if shape[axis] % ways == 0]
    if not divisible:
        return P()
    largest = max(divisible, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == largest else None for axis in range(len(shape))))


def shardings(
    shapes: Any,
    mesh: DeviceMesh,
    rules: Rules = DEFAULT_RULES,
    min_bytes: int = config.Mesh.shard_above,
) -> Any:
    """A tree of `NamedSharding` for a tree of shapes; the first rule whose pattern is found in a leaf's
    name decides, and a leaf without a rule is an error."""

    def choose(name: str, leaf: Any) -> NamedSharding:
        for pattern, rule in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, _spec(rule, leaf.shape, leaf.dtype, mesh, min_bytes))
        raise ValueError(f"no sharding rule matches {name!r}")

    return map_named(choose, shapes)


@contextmanager
def activations_on(mesh: DeviceMesh) -> Iterator[None]:
    """Networks called within, while a program is traced, keep every feature map [B,…] split over the batch axes.

    Left to itself the compiler may split features instead where parameters are sharded, and then passes feature maps
    around: sampling DiT-XL over fsdp = 16 on 256 chips, each sent 217 GB per batch instead of 29 GB (`mdiff plan`).
    """

    def keep(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh)) if jnp.ndim(x) >= 3 else x

    def after(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        return jax.tree.map(keep, out) if context.method_name == "__call__" else out

    with nn.intercept_methods(after) if batch_devices(mesh) > 1 else nullcontext():
        yield


def replicated(mesh: DeviceMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays that every process holds whole, as global arrays; each process copies only its own parts."""

    def one(x: Any) -> Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def batch_places(mesh: DeviceMesh, batch: int) -> np.ndarray:
    """Which places of a batch this process's devices hold, int64 [b], rising.

    Not simply its share in order: devices may be laid out otherwise, and axes that hold no batch repeat it.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    held = [np.arange(batch)[index] for index in parts]
    return np.unique(np.concatenate(held))


def place_batch(local: dict[str, np.ndarray], places: np.ndarray, batch: int, mesh: DeviceMesh) -> Any:
    """The global batch [batch,…] of which this process holds the rows `local` at `places`."""
    split = batch_sharding(mesh)

    def one(x: np.ndarray) -> Array:
        def rows(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch)
            first = int(np.searchsorted(places, start))
            return x[first : first + stop - start]

        return jax.make_array_from_callback((batch, *x.shape[1:]), split, rows)

    return {name: one(x) for name, x in local.items()}


def batch_sharding(mesh: DeviceMesh) -> NamedSharding:
    """First axis split over the data and fsdp axes."""
    return NamedSharding(mesh, BATCH)

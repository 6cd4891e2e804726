"""What switching neurons off changes: one number per ablation and noisy image.

A neuron is a channel that a gate multiplies, an ablation a pytree like `Model.gates()`. Comparing the predicted
noise of one step with and without an ablation is how NeMo (arXiv 2406.02366) searches for the neurons that
trigger a memorized image.

A batch of ablations is a `vmap` over gates. Devices take equal shares of the ablations along the mesh axis
`trial`, each with the whole network, and never talk to each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mdiff.errors import UserError
from mdiff.nets.denoiser import Model
from mdiff.train import mesh as meshes
from mdiff.trees import named_leaves
from mdiff.types import Array, Params

Statistic = Callable[[Array, Array], Array]
"""`(eps of the ablated network [S,H,W,C], eps of the whole one [S,H,W,C]) -> [S]`."""

Decode = Callable[[Any], Params]
"""One ablation in compact form, such as a neuron's number, -> its gates."""

Sweep = Callable[[Params, Any, Array, Array, "Array | None"], Any]
"""`(params, ablations [K,…], xt [S,H,W,C], t [S], cond [S,E] or None) -> [K,S]`."""


def rms(ablated: Array, whole: Array) -> Array:
    """Root mean square of the change of each image [S]."""
    return jnp.sqrt(jnp.mean((ablated - whole) ** 2, axis=(1, 2, 3)))


def program(
    model: Model,
    mesh: Mesh,
    *,
    chunk: int = 8,
    decode: Decode = lambda gates: gates,
    statistic: Statistic = rms,
) -> Sweep:
    """The jitted program of `sweep`: K divides over `chunk` times the devices, and the result stays on them.

    Each device runs the whole network first, as a chunk of ablations that ablate nothing: compared with the same
    program, what changes nothing gives exactly 0.
    """
    ones = model.gates()

    def share(params: Params, ablations: Any, xt: Array, t: Array, cond: Array | None) -> Array:
        def predict(gates: Params) -> Array:
            return model.apply(params, xt, t, cond, gates=gates)[0].eps

        def body(before: tuple[Array, Array], step: tuple[Array, Any]) -> tuple[tuple[Array, Array], Array]:
            # Compared a step later, from memory: computed again for each use, eps would be rounded in two ways.
            count, part = step
            whole, last = before
            whole = jnp.where(count == 1, last, whole)
            gates = jax.tree.map(
                lambda one, gate: jnp.where(count == 0, one, gate), ones, jax.vmap(decode)(part)
            )
            return (whole, jax.vmap(predict)(gates)), jax.vmap(statistic)(last, whole)

        def split(x: Array) -> Array:
            chunks = x.reshape(-1, chunk, *x.shape[1:])
            return jnp.concatenate([chunks[:1], chunks])

        chunks = jax.tree.map(split, ablations)
        n = len(jax.tree.leaves(chunks)[0])
        nothing = jnp.zeros((chunk, *xt.shape))
        (whole, last), changes = jax.lax.scan(body, (nothing, nothing), (jnp.arange(n), chunks))
        changes = jnp.concatenate([changes[2:], jax.vmap(statistic)(last, whole)[None]])
        return changes.reshape(-1, len(xt))

    trial, every = P("trial"), P()
    spread = jax.shard_map(
        share, mesh=mesh, in_specs=(every, trial, every, every, every), out_specs=trial, check_vma=False
    )
    here, there = NamedSharding(mesh, every), NamedSharding(mesh, trial)
    return jax.jit(spread, in_shardings=(here, there, here, here, here), out_shardings=there)


def sweep(
    model: Model,
    mesh: Mesh,
    *,
    chunk: int = 8,
    decode: Decode = lambda gates: gates,
    statistic: Statistic = rms,
) -> Sweep:
    """How much each of K ablations changes the predicted noise of S fixed noisy images.

    Args:
      model: the network.
      mesh: spreads the ablations over its axis `trial`.
      chunk: ablations a device works on at once; memory grows with chunk * S, not with K.
      decode: turns one entry of the ablations into gates, on the device; by default it is a tree of gates.
      statistic: the number that is kept of a change.

    Returns:
      A function whose result is float32 [K,S] on every process's host.

    Raises:
      UserError: `chunk` is below 1.
    """
    if chunk < 1:
        raise UserError(f"chunk = {chunk}: must be 1 or more")
    compiled = program(model, mesh, chunk=chunk, decode=decode, statistic=statistic)
    every = chunk * mesh.shape["trial"]

    def run(params: Params, ablations: Any, xt: Array, t: Array, cond: Array | None = None) -> np.ndarray:
        n = len(jax.tree.leaves(ablations)[0])
        rows = np.minimum(np.arange(n + -n % every), n - 1)  # filled up with the last one
        full = jax.tree.map(lambda x: np.asarray(x)[rows], ablations)
        out = compiled(params, meshes.place(full, NamedSharding(mesh, P("trial"))), xt, t, cond)
        return np.asarray(multihost_utils.process_allgather(out, tiled=True))[:n]

    return run


def neurons(gates: Params, pattern: str = "") -> np.ndarray:
    """Numbers of the neurons whose gate's name contains a match of `pattern`, int32 [K].

    Neurons are numbered through all gates in the tree's own order; `place` says where one is.
    """
    found, start = [], 0
    for name, leaf in named_leaves(gates):
        if re.search(pattern, name):
            found.append(np.arange(start, start + leaf.size, dtype=np.int32))
        start += leaf.size
    if not found:
        names = ", ".join(name for name, _ in named_leaves(gates)[:3])
        raise UserError(f"pattern {pattern!r}: matches no gate; they are named like {names}")
    return np.concatenate(found)


def place(gates: Params, neuron: int) -> tuple[str, tuple[int, ...]]:
    """The gate's name and the index in it of neuron number `neuron`."""
    start = 0
    for name, leaf in named_leaves(gates):
        if start <= neuron < start + leaf.size:
            return name, tuple(int(i) for i in np.unravel_index(neuron - start, leaf.shape))
        start += leaf.size
    raise UserError(f"neuron {neuron}: the network has {start} neurons, numbered from 0")


def one_off(gates: Params) -> Decode:
    """`neuron number [] -> gates` with this neuron switched off; a negative number switches none off."""
    leaves, tree = jax.tree.flatten(gates)
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])

    def decode(neuron: Array) -> Params:
        out = [
            jnp.where(jnp.arange(leaf.size).reshape(leaf.shape) + start == neuron, 0.0, leaf)
            for leaf, start in zip(leaves, starts[:-1], strict=True)
        ]
        return jax.tree.unflatten(tree, out)

    return decode

"""Random keys as a pure function of (seed, stream, step).

No key is carried in a state or stored in a checkpoint, so a resumed run, another batch size or another
number of processes draws the same numbers. The stream's name keeps uses apart: the noise of training
step 7 and of sample 7 never share a key.
"""

from __future__ import annotations

import zlib

import jax

from mdiff.types import Array, Key


def key(seed: int | Array, stream: str, step: int | Array = 0) -> Key:
    """The key of `stream` at `step`.

    Args:
      seed: the run's seed; may be traced.
      stream: the name of the use, such as "init", "train", "sample", "degradation".
      step: a training step, a sample's index or an image's id; may be traced.

    Returns:
      A typed scalar key.
    """
    # Named, since other generators (rbg) do not give the same numbers under vmap as alone.
    root = jax.random.key(seed, impl="threefry2x32")
    base = jax.random.fold_in(root, zlib.crc32(stream.encode()))
    return jax.random.fold_in(base, step)


def keys(seed: int | Array, stream: str, ids: Array) -> Key:
    """One key per entry of `ids` [B]; entry i depends on `ids[i]` alone, not on its place or on B."""
    return jax.vmap(lambda i: key(seed, stream, i))(ids)

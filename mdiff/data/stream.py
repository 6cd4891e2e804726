"""Batches as a pure function of (seed, step).

An epoch is a permutation of the slots (the training images, planted duplicates repeated); the epochs
laid end to end are one endless sequence, and step k reads positions k * batch to (k + 1) * batch - 1 of
it. Nothing is carried from step to step, so a resumed run reads what an uninterrupted one would have.
"""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.data.degrade import noisy_copy
from mdiff.types import Array, Batch, Key, to_float


def permutation(seed: int, stream: str, count: int, n: int) -> np.ndarray:
    """A uniform permutation of 0..n-1, int32 [n], as a pure function of its arguments.

    It sorts n raw words of the Philox counter generator (Salmon et al., SC 2011). numpy promises those
    words for all versions, and does not promise `Generator.permutation`.

    Args:
      seed: any integer; taken modulo 2**64.
      stream: the name of the use, which keeps uses apart.
      count: which permutation of the stream, such as the epoch; below 2**32.
      n: how many.
    """
    key = np.array([seed % 2**64, zlib.crc32(stream.encode()) << 32 | count], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").astype(np.int32)


@functools.lru_cache(maxsize=8)
def _epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    order = permutation(seed, "epoch", epoch, n)
    order.setflags(write=False)
    return order


def indices(seed: int, step: int, batch: int, slots: np.ndarray) -> np.ndarray:
    """Which training images make the batch of `step`.

    Every epoch visits every slot exactly once. Batches may span epochs, and may be larger than one.

    Args:
      seed: the run's seed.
      step: training step, from 0.
      batch: images per step.
      slots: int32 [S] indices into the training images; an image with k copies occurs k times.

    Returns:
      int32 [batch], entries of `slots`.
    """
    n = len(slots)
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    orders = np.concatenate([_epoch(seed, epoch, n) for epoch in epochs])
    start = first - epochs[0] * n
    return slots[orders[start : start + batch]]


def device_batch(
    x_u8: Array,
    ids: Array,
    index: Array,
    key: Key,
    *,
    flip: bool,
    cutoff: float,
    noise_seed: int,
    labels: Array | None = None,
) -> Batch:
    """Gathers a batch on the device, adds the fixed noisy copies, then augments. Pure; jit it.

    Args:
      x_u8: uint8 [N,H,W,C], the whole training set.
      ids: [N] ids of the training images.
      index: [B] which of them, from `indices`.
      key: randomness of the augmentation, new at every step.
      flip: mirror each example left-right with probability 1/2; x and y with the same coin. Static.
      cutoff: noise level of the fixed noisy copies; 0 makes none. Static.
      noise_seed: seed of the noisy copies, the same at every step.
      labels: [N] integer classes.

    Returns:
      `x` float32 [B,H,W,C] in [-1, 1], `id` [B]; with cutoff > 0 also `y` [B,H,W,C], with labels `label` [B].
    """
    batch = {"x": jnp.asarray(to_float(x_u8[index])), "id": ids[index]}
    if cutoff > 0:
        # Before the flip: noise on a flipped image would be a second draw, which leaks (see degrade.py).
        batch["y"] = noisy_copy(batch["x"], batch["id"], cutoff, noise_seed)
    if flip:
        coin = jax.random.bernoulli(key, 0.5, index.shape)[:, None, None, None]
        for name in ("x", "y") if cutoff > 0 else ("x",):
            batch[name] = jnp.where(coin, batch[name][:, :, ::-1], batch[name])
    if labels is not None:
        batch["label"] = labels[index]
    return batch

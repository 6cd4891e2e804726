"""Changing the resolution of images [B,H,W,C]: filtered by two, and losslessly between space and channels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mdiff.types import Array

BOX, FIR = (1, 1), (1, 3, 3, 1)  # filters: of DDPM++ and ADM, and of NCSN++


def downsample(x: Array, taps: tuple[int, ...] = BOX, pad: bool = True) -> Array:
    """Filter along H and W, then keep every second pixel.

    Args:
      x: [B,H,W,C].
      taps: the filter of each axis, even in number, scaled to sum to one; (1, 1) is the 2x2 mean.
      pad: surround x with len(taps)/2 - 1 zeros first, which makes the result [B,H/2,W/2,C].
    """
    b, h, w, c = x.shape
    if taps == BOX:
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    margin = (len(taps) // 2 - 1) * pad
    x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    for axis in (1, 2):
        size = (x.shape[axis] - len(taps)) // 2 + 1
        x = _weighted(x, [(i, weight / sum(taps)) for i, weight in enumerate(taps)], axis, size, stride=2)
    return x


def upsample(x: Array, taps: tuple[int, ...] = BOX) -> Array:
    """[B,H,W,C] -> [B,2H,2W,C]: zeros between the pixels, filtered with gain 2 per axis.

    (1, 1) is the nearest neighbour. With any taps the transpose of `downsample`, times 4.
    """
    if taps == BOX:
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    margin = len(taps) // 2 - 1
    reach = (margin + 1) // 2
    for axis in (1, 2):
        size = x.shape[axis]
        padded = jnp.pad(x, [(reach, reach) if i == axis else (0, 0) for i in range(4)])
        phases = []
        for phase in (0, 1):
            # Output 2j + phase meets the taps i of its parity, each at pixel j + (phase + margin - i) / 2.
            mine = range((phase + margin) % 2, len(taps), 2)
            places = [(reach + (phase + margin - i) // 2, 2 * taps[i] / sum(taps)) for i in mine]
            phases.append(_weighted(padded, places, axis, size, stride=1))
        x = jnp.stack(phases, axis=axis + 1).reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x


def surround(x: Array) -> Array:
    """[B,H,W,C] -> [B,H+2,W+2,C] with zeros around.

    A 3x3 SAME convolution of it, then `downsample(..., FIR, pad=False)`, is what an image on an endless black
    plane would give: the filter sees what the convolution makes of the border.
    """
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _weighted(x: Array, places: list[tuple[int, float]], axis: int, size: int, stride: int) -> Array:
    """Sum over (start, weight) of weight * `size` entries of x along `axis`, from start on.

    Slices, since a strided convolution has a slow gradient inside a scan on CPU.
    """
    parts = [
        weight * jax.lax.slice_in_dim(x, start, start + stride * (size - 1) + 1, stride, axis)
        for start, weight in places
    ]
    return sum(parts[1:], parts[0])


def space_to_depth(x: Array, p: int) -> Array:
    """[B,H,W,C] -> [B,H/p,W/p,p*p*C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // p, w // p, p * p * c)


def depth_to_space(x: Array, p: int) -> Array:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, p, p, c // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, c // (p * p))

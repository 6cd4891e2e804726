"""Augmentations on the right side of the noise.

Flips and shifts move an image and its fixed noisy copy together, with one draw for both, after the noise
(see `mdiff.data.degrade` for why not before).

The non-leaky augmentation of EDM (arXiv 2206.00364, appendix F.2) also tells the network what was done, so
that it can be asked for images to which nothing was. It moves the clean image alone: a warp would blur the
noise of the copy, which must stay white. Where a training step uses the copy, nothing was done, and the
network has to be told zeros.

With p' and p the centred positions of a pixel after and before, x to the right and y down, the warp is

    p' = T A(phi, b) R(theta) S(s) Fy Fx p,

the flips Fx and Fy, the scaling S = 2^(s/5), the rotation R by theta, the stretch A by 2^(b/5) along the
direction phi and by its inverse across it, and the translation T by (W u / 8, H v / 8). Fx is a fair coin
always, as in EDM's training; each of the other five is done with the same probability, independently; s, u, v are
normal, b is the size of a normal number, theta is uniform over the circle, phi is along x or y half of the time
and else uniform over the circle, and Fy, if it is done, is a fair coin. (With b of either sign, as in the
paper, the law of the images is the same, but what the network is told of b and phi would leave open whether
the image was stretched along phi or across it.)
"""

from __future__ import annotations

import zlib

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.errors import UserError
from mdiff.types import Array, Key

PARAMETERS = ("flip x", "flip y", "s", "cos theta - 1", "sin theta", "b cos phi", "b sin phi", "u", "v")
"""What the network is told, in this order; all 0 where nothing was done."""
OCTAVES = 0.2  # of scaling and stretching, per standard deviation
REACH = 1 / 8  # of a translation, in image widths per standard deviation


def check(cfg: config.Data) -> None:
    """Raises UserError when an augmentation is out of range."""
    if not 0 <= cfg.shift < cfg.size:
        raise UserError(
            f"data.shift = {cfg.shift}: set it to 0 (no shifts) or below data.size, now {cfg.size}"
        )
    if not 0 <= cfg.augment <= 1:
        raise UserError(f"data.augment = {cfg.augment}: is a probability; set it in 0..1 (EDM: 0.12)")


def stream(key: Key, name: str) -> Key:
    """The key of one use among those of a step."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def flip(key: Key, images: dict[str, Array]) -> dict[str, Array]:
    """Mirrors each example left-right half of the time; one coin per example, the same for all `images`.

    Args:
      key: new at every step.
      images: arrays [B,H,W,C] of the same examples.
    """
    batch = next(iter(images.values())).shape[0]
    coin = jax.random.bernoulli(key, 0.5, (batch,))[:, None, None, None]
    return {name: jnp.where(coin, dm_pix.flip_left_right(x), x) for name, x in images.items()}


def shift(key: Key, images: dict[str, Array], pixels: int, cyclic: bool = False) -> dict[str, Array]:
    """Shifts each example by up to `pixels` along each axis; what comes in is mirrored at the edge pixel.

    Args:
      key: new at every step.
      images: arrays [B,H,W,C] of the same examples; all are shifted alike.
      pixels: below H and W. Static.
      cyclic: what leaves on one side comes in on the other instead. A mirrored pixel repeats the noise of a
        copy, which must stay white; a cyclic shift only moves it. Static.
    """
    joint = jnp.concatenate(list(images.values()), axis=-1)
    padding = ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
    padded = jnp.pad(joint, padding, mode="wrap" if cyclic else "reflect")
    keys = jax.random.split(key, len(joint))
    moved = jax.vmap(lambda k, image: dm_pix.random_crop(k, image, joint.shape[1:]))(keys, padded)
    parts = jnp.split(moved, np.cumsum([x.shape[-1] for x in images.values()])[:-1], axis=-1)
    return dict(zip(images, parts, strict=True))


def non_leaky(key: Key, x: Array, probability: float) -> tuple[Array, Array]:
    """EDM's augmentation of clean images.

    Args:
      key: new at every step.
      x: [B,H,W,C].
      probability: of each of the five transforms beside the flip along x. Static.

    Returns:
      The warped images [B,H,W,C], exactly x where nothing was done, and what was done, [B,9], see
      `PARAMETERS`.
    """
    told = draw(key, x.shape[0], probability)
    linear, offset = inverse_map(told, x.shape[1], x.shape[2])
    touched = jnp.any(told != 0, axis=1)[:, None, None, None]
    return jnp.where(touched, warp(x, linear, offset), x), told


def draw(key: Key, batch: int, probability: float) -> Array:
    """What is done to each of `batch` examples: float32 [batch, 9], see `PARAMETERS`."""
    key_done, key_coin, key_normal, key_angle = jax.random.split(key, 4)
    done = jax.random.bernoulli(key_done, probability, (5, batch))
    mirrored, upended, straight, upright = jax.random.bernoulli(key_coin, 0.5, (4, batch))
    s, b, u, v = jax.random.normal(key_normal, (4, batch))
    theta, phi = jax.random.uniform(key_angle, (2, batch), minval=-jnp.pi, maxval=jnp.pi)
    b = jnp.abs(b)
    phi = jnp.where(straight, jnp.where(upright, jnp.pi / 2, 0.0), phi)
    flip_y, scaled, rotated, stretched, moved = done.astype(jnp.float32)
    columns = [
        mirrored.astype(jnp.float32),
        flip_y * upended,
        scaled * s,
        rotated * (jnp.cos(theta) - 1),
        rotated * jnp.sin(theta),
        stretched * b * jnp.cos(phi),
        stretched * b * jnp.sin(phi),
        moved * u,
        moved * v,
    ]
    return jnp.stack(columns, axis=1)


def inverse_map(told: Array, height: int, width: int) -> tuple[Array, Array]:
    """Where each pixel of the warped image comes from.

    Args:
      told: [B,9], see `PARAMETERS`.
      height: H in pixels.
      width: W in pixels.

    Returns:
      `linear` [B,2,2] and `offset` [B,2], with p = linear (p' - offset) for centred positions (x, y).
    """
    flip_x, flip_y, s, cos, sin, along, across, u, v = told.T
    cos = cos + 1
    b = jnp.hypot(along, across)
    # The direction phi; any will do when b is 0, and the guarded division keeps it finite.
    c, d = jnp.where(b > 0, along / jnp.where(b > 0, b, 1), 1), across / jnp.where(b > 0, b, 1)
    g = 2 ** (OCTAVES * b)
    # Entries written out: matrix products may round to bfloat16 on accelerators.
    shrink, grow, cross = c * c / g + d * d * g, d * d / g + c * c * g, c * d * (1 / g - g)
    scale = 2 ** (-OCTAVES * s)
    top = (cos * shrink + sin * cross, cos * cross + sin * grow)
    bottom = (-sin * shrink + cos * cross, -sin * cross + cos * grow)
    x_side, y_side = scale * (1 - 2 * flip_x), scale * (1 - 2 * flip_y)
    rows = [
        jnp.stack([x_side * top[0], x_side * top[1]], -1),
        jnp.stack([y_side * bottom[0], y_side * bottom[1]], -1),
    ]
    return jnp.stack(rows, 1), jnp.stack([REACH * width * u, REACH * height * v], -1)


def warp(x: Array, linear: Array, offset: Array) -> Array:
    """Samples each image at linear (p' - offset) by cubic convolution (Keys 1981, a = -1/2).

    It interpolates: whole-pixel moves, flips and quarter turns are exact. Beyond the edge the image is
    mirrored at the edge pixel.

    Args:
      x: [B,H,W,C].
      linear: [B,2,2].
      offset: [B,2] in pixels, (x, y).

    Returns:
      [B,H,W,C] in x's type.
    """
    _, height, width, _ = x.shape
    across, down = jnp.arange(width) - (width - 1) / 2, jnp.arange(height) - (height - 1) / 2

    def one(image: Array, linear: Array, offset: Array) -> Array:
        px, py = (across - offset[0])[None, :], (down - offset[1])[:, None]
        column = linear[0, 0] * px + linear[0, 1] * py + (width - 1) / 2
        row = linear[1, 0] * px + linear[1, 1] * py + (height - 1) / 2
        left, top = jnp.floor(column), jnp.floor(row)
        by_column, by_row = _cubic(column - left), _cubic(row - top)
        out = jnp.zeros_like(image)
        for i, weight_row in enumerate(by_row):
            for j, weight_column in enumerate(by_column):
                taken = image[_mirror(top + (i - 1), height), _mirror(left + (j - 1), width)]
                out += (weight_row * weight_column)[..., None] * taken
        return out

    return jax.vmap(one)(x, linear, offset)


def _cubic(t: Array) -> tuple[Array, Array, Array, Array]:
    """Weights of the four pixels around a position a share t behind the second one; they sum to 1."""
    return (
        ((-0.5 * t + 1) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1,
        ((-1.5 * t + 2) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    )


def _mirror(place: Array, size: int) -> Array:
    """Places on the line folded into 0..size-1, the edge pixels not repeated."""
    last = size - 1
    if last == 0:
        return jnp.zeros(place.shape, jnp.int32)
    return last - jnp.abs(last - place.astype(jnp.int32) % (2 * last))

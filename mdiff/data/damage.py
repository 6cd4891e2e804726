"""Training images that are only seen damaged, each by one operator for good (Ambient Diffusion, arXiv 2305.19256).

Instead of an image x0 there is A x0: some of its pixels, or a blur of it. A network cannot learn from A x0 alone what A
takes away: whatever it puts there is compared with nothing. So at every step a part of what is left is taken away
too, A~ = B A, the network sees A~ xt and is told A~, and its guess is compared with A x0 (section 3):

    E || A (D(A~ xt, A~) - x0) ||^2.

It cannot tell what B hides from what A hides, so it has to guess all of it: if E[A^T A | A~] has full rank, that is if
each pixel hidden by A~ may be one that A shows, the minimum is D = E[x0 | A~ xt, A~] at all pixels (section 4). With
B = 1 what A hides is left open.

    mask    each pixel hidden with probability p, in all channels; B hides each of the rest with probability q
    blocks  the same for blocks of 4x4 pixels, on a grid that is its own mirror image
    blur    Gaussian, of standard deviation s pixels; B is another one, of at most q s, uniform

The blur's boundary is cyclic, so that it is exactly exp(-2 pi^2 s^2 |f|^2) at frequency f (in cycles per pixel) and
blurs compose: G_a G_b = G_sqrt(a^2 + b^2). It hides less than a mask: no frequency is quite gone. But what is compared
is A D with A x0, so a frequency counts as the square of that factor.

A belongs to the image's pixels and the run's seed, as the noise of `mdiff.data.degrade` does: the same picture under two
ids is hidden alike, and its mirror image has the mirrored mask. B is new at every step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config, keys
from mdiff.data.degrade import noise_keys
from mdiff.errors import UserError
from mdiff.types import Array, Key

BLOCK = 4
"""Pixels along a side of a block."""
CHUNK = 4096
"""Images looked at together."""


@dataclass(frozen=True)
class Damage:
    """How images are damaged.

    What is seen of B images is a float32 array [B,H,W,1], `seen`. Masks: 1 where a pixel is seen, 0 where it is hidden.
    Blur: its standard deviation in pixels, the same everywhere in an image.

    Attributes:
      kind: mask, blocks or blur.
      by: share hidden by A; of blur the standard deviation in pixels.
      further: share of the rest hidden by B; of blur the largest further standard deviation, as a multiple of `by`.
    """

    kind: str
    by: float
    further: float

    def fixed(self, noise: Array, seed: int | Array, height: int, width: int) -> Array:
        """A of each image, for good: what is seen of it, [B,H,W,1].

        Args:
          noise: uint32 [B,3], from `degrade.noise_keys`.
          seed: the run's seed; may be traced.
          height: H in pixels.
          width: W in pixels.
        """
        base = keys.key(seed, "damage")

        def one(words: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(base, words[0]), words[1])
            seen = self._seen(key, height, width)
            return jnp.where(words[2] > 0, seen[:, ::-1], seen)

        return jax.vmap(one)(noise)

    def more(self, key: Key, seen: Array) -> Array:
        """A~ = B A of each image, with a new B: what is seen then, [B,H,W,1]."""
        each = jax.random.split(key, len(seen))
        return jax.vmap(self._more)(each, seen)

    def fresh(self, keys: Key, height: int, width: int) -> Array:
        """An A~ that belongs to no image for each of B keys, in the law of training: [B,H,W,1]."""

        def one(key: Key) -> Array:
            first, second = jax.random.split(key)
            return self._more(second, self._seen(first, height, width))

        return jax.vmap(one)(keys)

    def apply(self, x: Array, seen: Array) -> Array:
        """A x of images [B,H,W,C]: hidden pixels are 0, whatever they were."""
        if self.kind == "blur":
            return blur(x, seen[:, 0, 0, 0])
        return jnp.where(seen > 0, x, 0.0)

    def go_on(self, damaged: Array, seen: Array, told: Array) -> Array:
        """A~ x from A x [B,H,W,C], where A~ is `told` and A is `seen`."""
        if self.kind == "blur":
            variance = jnp.maximum(told**2 - seen**2, 0.0)
            return blur(damaged, jnp.sqrt(variance[:, 0, 0, 0]))
        return self.apply(damaged, told)

    def hidden(self, seen: Array) -> Array:
        """Is a pixel's value not in what is seen, but for the noise? bool [B,H,W,1]; of a blur no pixel's is."""
        return seen > 0 if self.kind == "blur" else seen <= 0

    def nothing(self, x: Array) -> Array:
        """What is seen of undamaged images [B,H,W,C]: [B,H,W,1]."""
        return jnp.full((*x.shape[:3], 1), 0.0 if self.kind == "blur" else 1.0)

    def _seen(self, key: Key, height: int, width: int) -> Array:
        if self.kind == "blur":
            return jnp.full((height, width, 1), self.by, jnp.float32)
        return self._cells(key, height, width, self.by)

    def _more(self, key: Key, seen: Array) -> Array:
        if self.kind == "blur":
            return jnp.hypot(seen, self.by * self.further * jax.random.uniform(key))
        return seen * self._cells(key, seen.shape[0], seen.shape[1], self.further)

    def _cells(self, key: Key, height: int, width: int, share: float) -> Array:
        """1 in each pixel or block with probability 1 - share, else 0: [H,W,1]."""
        side = BLOCK if self.kind == "blocks" else 1
        kept = jax.random.uniform(key, (height // side, width // side)) >= share
        return jnp.repeat(jnp.repeat(kept, side, axis=0), side, axis=1)[..., None].astype(jnp.float32)


def blur(x: Array, std: Array) -> Array:
    """Gaussian blur with a cyclic boundary, of standard deviation std [B] pixels, of images x [B,H,W,C].

    By Hartley's transform, which is its own inverse: a real matrix product over each axis. An FFT would gather the
    batch on every device.
    """
    for axis, size in ((1, x.shape[1]), (2, x.shape[2])):
        angle = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
        waves = jnp.asarray((np.cos(angle) + np.sin(angle)) / np.sqrt(size), x.dtype)
        kept = jnp.exp(-2 * (np.pi * std[:, None] * np.fft.fftfreq(size)) ** 2)  # [B,size], alike at f and -f
        turn = functools.partial(jnp.tensordot, axes=(axis, 0), precision=jax.lax.Precision.HIGHEST)
        amplitudes = jnp.moveaxis(turn(x, waves), -1, axis)
        shape = [len(std), 1, 1, 1]
        shape[axis] = size
        x = jnp.moveaxis(turn(amplitudes * kept.reshape(shape), waves), -1, axis)
    return x


def make(cfg: config.Config) -> Damage | None:
    """The damage of a config; None where there is none."""
    data = cfg.data
    return None if data.degrade == "none" else Damage(data.degrade, data.degrade_by, cfg.loss.further)


def check(cfg: config.Config) -> None:
    """Is the damage well defined, and does it go with the rest?

    Raises:
      UserError: a field is out of range, has no effect, or cannot be had together with damaged images.
    """
    data, further = cfg.data, cfg.loss.further
    if data.degrade == "none":
        for name, value, default in (
            ("data.degrade_by", data.degrade_by, config.Data.degrade_by),
            ("loss.further", further, config.Loss.further),
        ):
            if value != default:
                raise UserError(
                    f"{name} = {value}: has no effect without data.degrade; set that to mask, blocks or blur, or "
                    f"leave it at {default}"
                )
        return
    kind = data.degrade
    if data.degrade_by == 0:
        raise UserError(
            f"data.degrade_by = 0: nothing is degraded by {kind}; set it above 0, or data.degrade none"
        )
    if kind == "blur" and not 0 < data.degrade_by <= data.size / 4:
        raise UserError(
            f"data.degrade_by = {data.degrade_by}: of blur is the standard deviation in pixels; set it above 0 and at "
            f"most to a quarter of data.size, {data.size / 4:g}"
        )
    if kind != "blur" and not 0 < data.degrade_by < 1:
        raise UserError(
            f"data.degrade_by = {data.degrade_by}: of {kind} is the share hidden; set it above 0 and below 1"
        )
    if kind == "blocks" and data.size % BLOCK:
        raise UserError(
            f"data.size = {data.size}: data.degrade blocks needs a multiple of {BLOCK}; set data.size to "
            f"{max(BLOCK, round(data.size / BLOCK) * BLOCK)}, or data.degrade to mask"
        )
    if not 0 < further < 1:
        raise UserError(
            f"loss.further = {further}: must be above 0 and below 1; with nothing hidden on top the network learns "
            "nothing about what is hidden"
        )
    for there, field, fix in (
        (cfg.loss.ambient, "a noise cutoff", "leave out loss.cutoff, cutoff_of and cutoff_stages"),
        (cfg.loss.consistency > 0, f"loss.consistency = {cfg.loss.consistency}", "set it to 0"),
        (
            data.augment > 0,
            f"data.augment = {data.augment}",
            "set it to 0 (data.flip and data.shift are fine)",
        ),
        (data.reading == "disk", "data.reading = disk", "set it to memory"),
    ):
        if there:
            raise UserError(f"data.degrade = {kind}: does not go with {field}; {fix}")


def check_images(cfg: config.Config, x: np.ndarray, ids: np.ndarray) -> None:
    """Is something seen of every image?

    Args:
      cfg: uses data.degrade, data.degrade_by and seed.
      x: uint8 [N,H,W,C], the training images.
      ids: int [N].

    Raises:
      UserError: an image is hidden as a whole.
    """
    damage = make(cfg)
    if damage is None or damage.kind == "blur":
        return
    look = jax.jit(lambda noise: damage.fixed(noise, cfg.seed, *x.shape[1:3]).any(axis=(1, 2, 3)))
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        blank = np.flatnonzero(~np.asarray(look(noise_keys(x[part]))))
        if len(blank):
            raise UserError(
                f"data.degrade_by = {cfg.data.degrade_by}: hides all of training image {ids[part][blank[0]]}; lower "
                "it, or set another seed"
            )

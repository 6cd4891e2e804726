"""DDPM++ and NCSN++ (arXiv 2011.13456) in EDM's sizing (arXiv 2206.00364, app. F), and ADM (arXiv 2105.05233).

One U-Net whose `Style` says where the three differ. Differences to the published networks: 1x1 convolutions are
`Dense`, weights start Xavier-uniform in all three, and an optional space-to-depth stem lets small images run at a
quarter of the positions. Gates sit on the hidden and output channels of every residual block, on attention values
and on the units of the embedding MLP.

A text-conditional one (`net.text`) is told of the text by cross-attention alone, as Stable Diffusion is: blocks of the
resolutions in `net.cross` end with attention of pixels to tokens and a feed-forward part (`nets/cross.py`), and no text
enters the embedding of the noise level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from mdiff import config
from mdiff.nets.cross import CrossAttention, FeedForward
from mdiff.nets.embeddings import FourierFeatures, noise_embedding
from mdiff.nets.layers import (
    Attention,
    Conv,
    Dense,
    Gate,
    group_norm,
    rematerialize,
    tap,
)
from mdiff.nets.resample import BOX, FIR, depth_to_space, downsample, space_to_depth, surround, upsample
from mdiff.types import Array


@dataclass(frozen=True)
class Style:
    """Where the U-Nets differ.

    Attributes:
      fourier: Fourier features of ln(sigma)/4 instead of sinusoidal ones.
      features: width of the noise features, in multiples of `channels`.
      late: the condition joins after the embedding MLP's last map, not before its first.
      taps: filter of down- and upsampling.
      pyramid: the encoder also sees the downsampled input at every level.
      adaptive: the embedding scales and shifts the normalized channels, instead of adding to them.
      scale: factor of every residual sum; sqrt(1/2) keeps its variance.
      project: blocks that resample map their skip path even when its width stays.
      attention_everywhere: in all decoder blocks of a resolution with attention, not only in the last.
      epsilon: of group norms.
    """

    fourier: bool = False
    features: int = 1
    late: bool = False
    taps: tuple[int, ...] = BOX
    pyramid: bool = False
    adaptive: bool = False
    scale: float = 0.5**0.5
    project: bool = True
    attention_everywhere: bool = False
    epsilon: float = 1e-6


STYLES = {
    "ddpmpp": Style(),
    "ncsnpp": Style(fourier=True, features=2, taps=FIR, pyramid=True),
    "adm": Style(late=True, adaptive=True, scale=1.0, project=False, attention_everywhere=True, epsilon=1e-5),
}


class Carry(NamedTuple):
    """Where a U-Net stands before one of its blocks: what it needs to go on from there.

    Attributes:
      x: [B,h,w,C] feature map.
      skips: those the encoder has left and the decoder not yet taken.
      pyramid: the downsampled input, where the style has it.
    """

    x: Array
    skips: tuple[Array, ...]
    pyramid: Array


class Stage(NamedTuple):
    """One block of a U-Net and where it stands.

    Attributes:
      name: of the module, such as "enc8_0": part, resolution, number.
      features: channels it gives.
      attention: has self-attention.
      cross: attends to the text.
      resample: "down", "up" or "".
      takes: joins a skip to its input.
      leaves: its result is a skip.
    """

    name: str
    features: int
    attention: bool = False
    cross: bool = False
    resample: str = ""
    takes: bool = False
    leaves: bool = False


def stages(cfg: config.Net, top: int) -> tuple[Stage, ...]:
    """The blocks in the order they run, for feature maps that start at `top` x `top`."""
    widths = [cfg.channels * m for m in cfg.mults]
    last, style, found = len(widths) - 1, STYLES[cfg.arch], []

    def add(name: str, res: int, features: int, attention: bool = False, **kind: Any) -> None:
        found.append(Stage(name, features, attention, bool(cfg.text) and res in cfg.cross, **kind))

    for level, width in enumerate(widths):
        res = top >> level
        if level:
            found.append(Stage(f"enc{res}_down", widths[level - 1], resample="down", leaves=True))
        for i in range(cfg.blocks):
            add(f"enc{res}_{i}", res, width, res in cfg.attention, leaves=True)
    for level, width in reversed(list(enumerate(widths))):
        res = top >> level
        if level == last:
            add(f"mid{res}_0", res, width, True)
            found.append(Stage(f"mid{res}_1", width))
        else:
            found.append(Stage(f"dec{res}_up", widths[level + 1], resample="up"))
        for i in range(cfg.blocks + 1):
            attention = res in cfg.attention and (style.attention_everywhere or i == cfg.blocks)
            add(f"dec{res}_{i}", res, width, attention, takes=True)
    return tuple(found)


class Block(nn.Module):
    """Residual block with optional resampling and attention; taps `hidden`, `branch` and `out`.

    `branch` is what the block adds to its skip path, before the sum's scale.
    """

    cfg: config.Net
    features: int
    attention: bool = False
    resample: str = ""
    train: bool = False
    cross: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array, text: Array | None = None) -> Array:
        cfg, style = self.cfg, STYLES[self.cfg.arch]
        scan_safe, dtype = cfg.scan_safe, jnp.dtype(cfg.dtype)

        def resample(v: Array) -> Array:
            if not self.resample:
                return v
            return (downsample if self.resample == "down" else upsample)(v, style.taps)

        h = resample(nn.silu(group_norm(x, "norm0", style.epsilon)))
        h = Conv(self.features, scan_safe=scan_safe, dtype=dtype, name="conv0")(h)
        if style.adaptive:
            scale, shift = jnp.split(Dense(2 * self.features, name="emb")(emb)[:, None, None, :], 2, axis=-1)
            h = group_norm(h, "norm1", style.epsilon) * (1 + scale) + shift
        else:
            h = group_norm(
                h + Dense(self.features, name="emb")(emb)[:, None, None, :], "norm1", style.epsilon
            )
        h = Gate(name="hidden_gate")(nn.silu(h))
        tap(self, "hidden", h)
        h = nn.Dropout(cfg.dropout, deterministic=not self.train)(h)
        h = Conv(self.features, scale=1e-5, scan_safe=scan_safe, dtype=dtype, name="conv1")(h)
        h = Gate(name="out_gate")(h)
        tap(self, "branch", h)
        x = resample(x)
        if x.shape[-1] != self.features or (self.resample and style.project):
            x = Dense(self.features, dtype=dtype, name="skip")(x)
        x = (x + h) * style.scale
        if self.attention:
            x = Attention(cfg.head_channels, style.epsilon, dtype, name="attention")(x) * style.scale
        if self.cross:
            assert text is not None
            cross = CrossAttention(cfg.head_channels, style.epsilon, dtype, cfg.cross_channels, name="cross")
            x = cross(x, text) * style.scale
            x = FeedForward(style.epsilon, dtype, name="feed")(x) * style.scale
        tap(self, "out", x)
        return x


class UNet(nn.Module):
    """`(x [B,H,W,C], c_noise [B], cond) -> [B,H,W,C]`.

    `cond` is [B,E] or None, E = `condition_width(cfg)`; of a text-conditional one it is [B,L,E], embedded tokens.
    """

    cfg: config.Net

    @nn.compact
    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: Array | None = None,
        train: bool = False,
        carry: Carry | None = None,
        start: str = "",
        stop: str = "",
    ) -> Array | Carry:
        """Args:
        carry: go on before the block `start` from here, instead of from x.
        stop: give the `Carry` before this block, instead of the result.
        """
        cfg, style, channels_out = self.cfg, STYLES[self.cfg.arch], x.shape[-1]
        make_block, dtype = rematerialize(Block, cfg.remat), jnp.dtype(cfg.dtype)
        text = cond if cfg.text else None
        if cfg.text and text is None:
            text = jnp.zeros((len(x), cfg.text_length, cfg.text))  # of `init` and `gates`: shapes only
        emb = self.embedding(c_noise, None if cfg.text else cond)
        side = x.shape[1] // cfg.patch

        def conv(name: str, features: int, x: Array, scale: float = 1.0) -> Array:
            return Conv(features, scale, cfg.scan_safe, dtype, name=name)(x)

        if carry is None:
            x = space_to_depth(x, cfg.patch) if cfg.patch > 1 else x
            first = conv("conv_in", cfg.channels, x)
            carry = Carry(first, (first,), x)
        plan = stages(cfg, side)
        names = [stage.name for stage in plan]
        for stage in plan[names.index(start) if start else 0 :]:
            if stage.name == stop:
                return carry
            x, skips, pyramid = carry
            if stage.takes:
                x, skips = jnp.concatenate([x, skips[-1]], axis=-1), skips[:-1]
            kind = (stage.attention, stage.resample, train, stage.cross)
            block = make_block(cfg, stage.features, *kind, name=stage.name)
            x = block(x, emb, text) if stage.cross else block(x, emb)
            if stage.resample == "down" and style.pyramid:
                wide = conv(stage.name.replace("down", "pyramid"), x.shape[-1], surround(pyramid))
                x = pyramid = (x + downsample(wide, style.taps, pad=False)) * style.scale
            carry = Carry(x, (*skips, x) if stage.leaves else skips, pyramid)

        x = nn.silu(group_norm(carry.x, "norm_out", style.epsilon))
        x = conv("conv_out", channels_out * cfg.patch**2, x, scale=1e-5)
        return depth_to_space(x, cfg.patch) if cfg.patch > 1 else x

    def embedding(self, c_noise: Array, cond: Array | None) -> Array:
        """[B, 4 channels] float32, from the noise level and the condition."""
        cfg, style = self.cfg, STYLES[self.cfg.arch]
        if style.fourier and cfg.prediction == "edm":
            emb = FourierFeatures(style.features * cfg.channels, name="noise")(c_noise)
        else:
            emb = noise_embedding(c_noise, style.features * cfg.channels)
        for i in range(2):
            emb = emb if cond is None or style.late or i else emb + cond
            emb = Dense(4 * cfg.channels, name=f"emb{i}_map")(emb)
            emb = emb if cond is None or not style.late or not i else emb + cond
            emb = Gate(name=f"emb{i}_gate")(nn.silu(emb))
            tap(self, f"emb{i}", emb)
        return emb


def condition_width(cfg: config.Net) -> int:
    """E, the width of the condition that the U-Net takes."""
    style = STYLES[cfg.arch]
    return cfg.channels * (4 if style.late else style.features)

"""DDPM++ and NCSN++ (arXiv 2011.13456) in EDM's sizing (arXiv 2206.00364, app. F), and ADM (arXiv 2105.05233).

One U-Net whose `Style` says where the three differ. Differences to the published networks: 1x1 convolutions are
`Dense`, weights start Xavier-uniform in all three, and an optional space-to-depth stem lets small images run at a
quarter of the positions. Gates sit on the hidden and output channels of every residual block, on attention values
and on the units of the embedding MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from mdiff import config
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


class Block(nn.Module):
    """Residual block with optional resampling and attention; taps `hidden`, `branch` and `out`.

    `branch` is what the block adds to its skip path, before the sum's scale.
    """

    cfg: config.Net
    features: int
    attention: bool = False
    resample: str = ""
    train: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> Array:
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
        tap(self, "out", x)
        return x


class UNet(nn.Module):
    """`(x [B,H,W,C], c_noise [B], cond [B,E] or None) -> [B,H,W,C]`, E = `condition_width(cfg)`."""

    cfg: config.Net

    @nn.compact
    def __call__(self, x: Array, c_noise: Array, cond: Array | None = None, train: bool = False) -> Array:
        cfg, style, channels_out = self.cfg, STYLES[self.cfg.arch], x.shape[-1]
        make_block, dtype = rematerialize(Block, cfg.remat), jnp.dtype(cfg.dtype)
        emb = self.embedding(c_noise, cond)

        def block(name: str, features: int, x: Array, attention: bool = False, resample: str = "") -> Array:
            return make_block(cfg, features, attention, resample, train, name=name)(x, emb)

        def conv(name: str, features: int, x: Array, scale: float = 1.0) -> Array:
            return Conv(features, scale, cfg.scan_safe, dtype, name=name)(x)

        x = space_to_depth(x, cfg.patch) if cfg.patch > 1 else x
        widths = [cfg.channels * m for m in cfg.mults]
        top, last = x.shape[1], len(widths) - 1

        pyramid = x
        x = conv("conv_in", cfg.channels, x)
        skips = [x]
        for level, width in enumerate(widths):
            res = top >> level
            if level:
                x = block(f"enc{res}_down", x.shape[-1], x, resample="down")
                if style.pyramid:
                    wide = conv(f"enc{res}_pyramid", x.shape[-1], surround(pyramid))
                    x = pyramid = (x + downsample(wide, style.taps, pad=False)) * style.scale
                skips.append(x)
            for i in range(cfg.blocks):
                x = block(f"enc{res}_{i}", width, x, attention=res in cfg.attention)
                skips.append(x)

        for level, width in reversed(list(enumerate(widths))):
            res = top >> level
            if level == last:
                x = block(f"mid{res}_0", width, x, attention=True)
                x = block(f"mid{res}_1", width, x)
            else:
                x = block(f"dec{res}_up", x.shape[-1], x, resample="up")
            for i in range(cfg.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                attention = res in cfg.attention and (style.attention_everywhere or i == cfg.blocks)
                x = block(f"dec{res}_{i}", width, x, attention=attention)

        x = nn.silu(group_norm(x, "norm_out", style.epsilon))
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

"""DDPM++ U-Net (arXiv 2011.13456) in EDM's sizing (arXiv 2206.00364, app. F).

Differences to the published network: 1x1 convolutions are `Dense`, and an optional space-to-depth stem
lets small images run at a quarter of the positions. Gates sit on the hidden and output channels of every
residual block, on attention values and on the units of the embedding MLP.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from mdiff import config
from mdiff.errors import UserError
from mdiff.nets.layers import (
    Attention,
    Conv,
    Dense,
    Gate,
    depth_to_space,
    downsample,
    edm_init,
    group_norm,
    noise_embedding,
    space_to_depth,
    tap,
    upsample,
)
from mdiff.types import Array

SKIP_SCALE = 0.5**0.5  # keeps the variance of a residual sum


class Block(nn.Module):
    """Residual block with optional resampling and attention; taps `hidden` and `out`."""

    features: int
    attention: bool = False
    resample: str = ""
    dropout: float = 0.0
    scan_safe: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        resample = {"": lambda v: v, "down": downsample, "up": upsample}[self.resample]
        h = resample(nn.silu(group_norm(x, "norm0")))
        h = Conv(self.features, scan_safe=self.scan_safe, name="conv0")(h)
        h = h + Dense(self.features, name="emb")(emb)[:, None, None, :]
        h = Gate(name="hidden_gate")(nn.silu(group_norm(h, "norm1")))
        tap(self, "hidden", h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, scale=1e-5, scan_safe=self.scan_safe, name="conv1")(h)
        h = Gate(name="out_gate")(h)
        x = resample(x)
        if self.resample or x.shape[-1] != self.features:
            x = Dense(self.features, name="skip")(x)
        x = (x + h) * SKIP_SCALE
        if self.attention:
            x = Attention(name="attention")(x) * SKIP_SCALE
        tap(self, "out", x)
        return x


class UNet(nn.Module):
    """DDPM++: `(x [B,H,W,C], c_noise [B], cond [B,channels] or None) -> [B,H,W,C]`."""

    cfg: config.Net

    @nn.compact
    def __call__(self, x: Array, c_noise: Array, cond: Array | None = None, train: bool = False) -> Array:
        cfg, channels_out = self.cfg, x.shape[-1]
        emb = noise_embedding(c_noise, cfg.channels)
        if cond is not None:
            emb = emb + cond
        for i in range(2):
            emb = nn.silu(Dense(4 * cfg.channels, name=f"emb{i}_map")(emb))
            emb = Gate(name=f"emb{i}_gate")(emb)
            tap(self, f"emb{i}", emb)

        def block(name: str, features: int, x: Array, attention: bool = False, resample: str = "") -> Array:
            return Block(features, attention, resample, cfg.dropout, cfg.scan_safe, name=name)(x, emb, train)

        x = space_to_depth(x, cfg.patch) if cfg.patch > 1 else x
        widths = [cfg.channels * m for m in cfg.mults]
        top, last = x.shape[1], len(widths) - 1

        x = Conv(cfg.channels, scan_safe=cfg.scan_safe, name="conv_in")(x)
        skips = [x]
        for level, width in enumerate(widths):
            res = top >> level
            if level:
                x = block(f"enc{res}_down", x.shape[-1], x, resample="down")
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
                x = block(f"dec{res}_{i}", width, x, attention=i == cfg.blocks and res in cfg.attention)

        x = nn.silu(group_norm(x, "norm_out"))
        x = Conv(channels_out * cfg.patch**2, scale=1e-5, scan_safe=cfg.scan_safe, name="conv_out")(x)
        return depth_to_space(x, cfg.patch) if cfg.patch > 1 else x


class LabelEmbedding(nn.Module):
    """Class labels [B] -> condition vectors [B, features], added to the noise embedding."""

    classes: int
    features: int

    @nn.compact
    def __call__(self, label: Array) -> Array:
        table = self.param("table", edm_init(), (self.classes, self.features))
        return table[label] * self.classes**0.5


def check(cfg: config.Net, size: int) -> None:
    """Can `cfg` process images of `size` x `size`?

    Raises:
      UserError: the levels do not divide the size, or a field is out of range.
    """
    factor = cfg.patch * 2 ** (len(cfg.mults) - 1)
    if cfg.patch < 1 or not cfg.mults:
        raise UserError(
            f"net.patch = {cfg.patch}, net.mults = {cfg.mults}: need patch >= 1 and one level or more"
        )
    if size % factor:
        fits = max(factor, round(size / factor) * factor)
        raise UserError(
            f"data.size = {size}: {len(cfg.mults)} levels with patch {cfg.patch} need a multiple of {factor}; "
            f"set data.size to {fits}, or fewer net.mults"
        )
    if cfg.channels < 4 or cfg.channels % 4:
        raise UserError(f"net.channels = {cfg.channels}: must be a positive multiple of 4")
    if min(cfg.mults) < 1 or cfg.blocks < 1:
        raise UserError(f"net.mults = {cfg.mults}, net.blocks = {cfg.blocks}: must all be 1 or more")
    if not 0 <= cfg.dropout < 1:
        raise UserError(f"net.dropout = {cfg.dropout}: must be in [0, 1)")
    if cfg.sigma_data <= 0:
        raise UserError(
            f"net.sigma_data = {cfg.sigma_data}: must be above 0 (images in [-1, 1] have about 0.5)"
        )

"""DiT (arXiv 2212.09748): a transformer over patches, conditioned by adaLN-zero, its blocks scanned.

All blocks are one module under `nn.scan`, so a program's size does not grow with depth. Whatever belongs to a
block therefore has a leading axis [blocks]: parameters, gates ([blocks, C]), attention biases (broadcastable to
[blocks, B, heads, Q, K]) and tapped activations. Names are those of one block: "blocks/attention/map" holds the
maps of all.

Differences to the published network: queries and keys are RMS-normalized (arXiv 2302.05442), the output is one
image without a learned variance, and weights start Xavier-uniform.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mdiff import config
from mdiff.nets.embeddings import noise_embedding, position_embedding
from mdiff.nets.layers import (
    BIASES,
    GATES,
    TAPS,
    Dense,
    Gate,
    attend,
    rematerialize,
    tap,
)
from mdiff.nets.resample import depth_to_space, space_to_depth
from mdiff.types import Array

NOISE_FEATURES = 256


def _modulated(x: Array, shift: Array, scale: Array) -> Array:
    """LayerNorm without parameters, then an affine map given from outside, in float32."""
    normed = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)(x.astype(jnp.float32))
    return normed * (1 + scale) + shift


class TokenAttention(nn.Module):
    """Self-attention over tokens [B,N,C] with normalized queries and keys; gate, taps and bias as in `attend`."""

    head_channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        qkv = Dense(3 * c, dtype=self.dtype, name="qkv")(x)
        return Dense(c, dtype=self.dtype, name="out")(attend(self, qkv, self.head_channels, qk_norm=True))


class TransformerBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and weighted by the embedding; taps `hidden`, `branch`, `out`.

    The weights start at zero: a fresh block is the identity. `branch` is the MLP's output before its weight.
    """

    cfg: config.Net
    train: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> tuple[Array, None]:
        cfg, c, dtype = self.cfg, x.shape[-1], jnp.dtype(self.cfg.dtype)
        modulation = Dense(6 * c, scale=0.0, name="modulation")(emb)[:, None, :]
        shift_a, scale_a, weight_a, shift_m, scale_m, weight_m = jnp.split(modulation, 6, axis=-1)

        h = TokenAttention(cfg.head_channels, dtype, name="attention")(_modulated(x, shift_a, scale_a))
        x = (x + weight_a * h).astype(dtype)

        h = Dense(4 * c, dtype=dtype, name="mlp_in")(_modulated(x, shift_m, scale_m))
        h = Gate(name="hidden_gate")(nn.gelu(h, approximate=True))
        tap(self, "hidden", h)
        h = nn.Dropout(cfg.dropout, deterministic=not self.train)(h)
        h = Gate(name="out_gate")(Dense(c, dtype=dtype, name="mlp_out")(h))
        tap(self, "branch", h)
        x = (x + weight_m * h).astype(dtype)
        tap(self, "out", x)
        return x, None


class DiT(nn.Module):
    """`(x [B,H,W,C], c_noise [B], cond [B,channels] or None) -> [B,H,W,C]`."""

    cfg: config.Net

    @nn.compact
    def __call__(self, x: Array, c_noise: Array, cond: Array | None = None, train: bool = False) -> Array:
        cfg, dtype, channels_out = self.cfg, jnp.dtype(self.cfg.dtype), x.shape[-1]
        emb = noise_embedding(c_noise, NOISE_FEATURES)
        for i in range(2):
            emb = Dense(cfg.channels, name=f"emb{i}_map")(emb)
            emb = emb + cond if i and cond is not None else emb
            emb = Gate(name=f"emb{i}_gate")(nn.silu(emb))
            tap(self, f"emb{i}", emb)

        x = space_to_depth(x, cfg.patch)
        b, h, w, _ = x.shape
        x = Dense(cfg.channels, dtype=dtype, name="patch_in")(x).reshape(b, h * w, cfg.channels)
        x = (x + position_embedding(h, w, cfg.channels)).astype(dtype)

        blocks = nn.scan(
            rematerialize(TransformerBlock, cfg.remat, scanned=True),
            variable_axes={"params": 0, GATES: 0, BIASES: 0, TAPS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=cfg.blocks,
        )
        x, _ = blocks(cfg, train, name="blocks")(x, emb)

        shift, scale = jnp.split(
            Dense(2 * cfg.channels, scale=0.0, name="modulation_out")(emb)[:, None, :], 2, axis=-1
        )
        x = Dense(channels_out * cfg.patch**2, scale=0.0, dtype=dtype, name="patch_out")(
            _modulated(x, shift, scale)
        )
        return depth_to_space(x.reshape(b, h, w, -1), cfg.patch)

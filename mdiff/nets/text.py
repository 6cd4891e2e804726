"""A small text encoder, as text-to-image models have: tokens -> one embedding for each position.

A transformer with causal attention, normalization before each part and learned positions, as CLIP's
(arXiv 2103.00020, section 2.4): the start token looks at itself alone and is the same for every caption, the end token has
seen all words, and padding behind it is encoded too. The caption that is dropped in training, and the null condition of
classifier-free guidance, is the empty one (start, end, padding), as in Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mdiff.data.captions import empty
from mdiff.errors import UserError
from mdiff.nets.layers import Dense, Gate, attend
from mdiff.types import Array

HEAD = 32
"""Channels of one attention head, where the width divides by it."""


class TextEncoder(nn.Module):
    """`(entries, n, drop) -> [B, length, width]` float32; entry `tokens` int32 [B, length].

    Gates act on the attention values and on the hidden units of each block's MLP.

    Attributes:
      width: of an embedding.
      blocks: transformer blocks.
      length: tokens of a caption.
      vocabulary: tokens known.
    """

    width: int
    blocks: int
    length: int
    vocabulary: int
    dtype: Any = jnp.float32

    @property
    def takes(self) -> tuple[str, ...]:
        """Entries that are conditions of an image."""
        return ("tokens",)

    @nn.compact
    def __call__(self, entries: Mapping[str, Array], n: int, drop: Array | None = None) -> Array:
        """Args:
          entries: `tokens` int32 [B, length]; without it every caption is empty.
          n: the batch size B.
          drop: [B] bool, whose caption is replaced by the empty one.

        Raises:
          UserError: captions of another length.
        """
        nothing = jnp.asarray(empty(self.length))
        tokens = jnp.asarray(entries.get("tokens", jnp.broadcast_to(nothing, (n, self.length))))
        if tokens.ndim != 2 or tokens.shape[-1] != self.length:
            raise UserError(
                f"tokens: has shape {tuple(tokens.shape)}, not [B, {self.length}] (net.text_length)"
            )
        if drop is not None:
            tokens = jnp.where(drop[:, None], nothing, tokens)
        init = nn.initializers.normal(1.0)
        x = nn.Embed(self.vocabulary, self.width, embedding_init=init, name="tokens")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.3), (self.length, self.width))
        for index in range(self.blocks):
            x = TextBlock(self.dtype, name=f"block{index}")(x)
        return nn.LayerNorm(name="norm_out")(x.astype(jnp.float32))


class TextBlock(nn.Module):
    """Causal attention and an MLP, both residual, [B,L,E]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        x = x + CausalAttention(self.dtype, name="attention")(nn.LayerNorm(name="norm0")(x))
        h = Dense(4 * width, dtype=self.dtype, name="mlp_in")(nn.LayerNorm(name="norm1")(x))
        h = Gate(name="hidden_gate")(nn.gelu(h))
        return x + Dense(width, scale=0.1, dtype=self.dtype, name="mlp_out")(h)


class CausalAttention(nn.Module):
    """Self-attention in which a position sees none behind it; gate and taps as in `attend`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        qkv = Dense(3 * width, dtype=self.dtype, name="qkv")(x)
        head = HEAD if width % HEAD == 0 else 0
        out = attend(self, qkv, head, causal=True)
        return Dense(width, scale=0.1, dtype=self.dtype, name="out")(out)

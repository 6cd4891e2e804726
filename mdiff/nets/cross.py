"""What tells the pixels about the text: cross-attention and a feed-forward part, as in Stable Diffusion's U-Net.

Of its transformer blocks (arXiv 2112.10752, app. E.2.1) these are the second and third part; the first, self-attention, is
`layers.Attention`. Queries, keys and values are maps of their own without bias, as there: a neuron switched off is a zero
column of a kernel, and each of the three has gates.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mdiff.nets.layers import Dense, Gate, group_norm, look, tap
from mdiff.types import Array

WIDER = 2
"""Hidden units of the feed-forward part, as a multiple of the channels."""


class CrossAttention(nn.Module):
    """Residual attention of pixels [B,H,W,C] to tokens [B,L,E]; taps and bias as in `layers.look`.

    Gates: `query_gate`, `key_gate` and `value_gate`, each [width] ([C] where width is 0).
    """

    head_channels: int = 0
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    width: int = 0

    @nn.compact
    def __call__(self, x: Array, text: Array) -> Array:
        b, h, w, c = x.shape
        normed = group_norm(x, "norm", self.epsilon).reshape(b, h * w, c)

        def project(name: str, given: Array) -> Array:
            mapped = Dense(self.width or c, bias=False, dtype=self.dtype, name=f"to_{name}")(given)
            return Gate(name=f"{name}_gate")(mapped)

        seen = look(
            self, project("query", normed), project("key", text), project("value", text), self.head_channels
        )
        return x + Dense(c, scale=0.1, dtype=self.dtype, name="out")(seen).reshape(b, h, w, c)


class FeedForward(nn.Module):
    """Residual GEGLU (arXiv 2002.05202, eq. 6) on each pixel of [B,H,W,C]; its gate `hidden_gate` is on the hidden units."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        normed = group_norm(x, "norm", self.epsilon)
        h, by = jnp.split(Dense(2 * WIDER * c, dtype=self.dtype, name="mlp_in")(normed), 2, axis=-1)
        h = Gate(name="hidden_gate")(h * nn.gelu(by))
        tap(self, "hidden", h)
        return x + Dense(c, scale=0.1, dtype=self.dtype, name="mlp_out")(h)

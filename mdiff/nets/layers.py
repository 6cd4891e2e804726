"""Layers shared by the networks: convolution rules, gates, taps, attention, embeddings.

A *gate* multiplies a layer's channels by an entry of the variable collection `gates`; a *tap* names an
activation that `apply(..., taps=...)` may return; an *attention bias* is added to the logits of one
attention layer. All three cost nothing when absent: without its collection a gate is not in the
program, and untapped activations are dead code to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mdiff.types import Array

GATES, TAPS, BIASES = "gates", "taps", "attn_bias"

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def _conv_same(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_DIMENSIONS)


@jax.custom_vjp
def conv_scan_safe(x: Array, kernel: Array) -> Array:
    """Stride-1 SAME convolution whose gradients are canonical NHWC/HWIO convolutions.

    XLA:CPU runs the usual transposed-layout gradients on a slow path inside `scan` and `while_loop`;
    these keep the fast one. Values equal `lax.conv_general_dilated`. No forward mode (`jvp`).

    Args:
      x: [B,H,W,Cin].
      kernel: [k,k,Cin,Cout], k odd.

    Returns:
      [B,H,W,Cout].
    """
    return _conv_same(x, kernel)


def _conv_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv_same(x, kernel), (x, kernel)


def _conv_backward(residual: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residual
    dx = _conv_same(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    # Correlate x with dy: channels act as the batch, the batch is contracted.
    pad = [(k // 2, k // 2) for k in kernel.shape[:2]]
    dk = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), pad, dimension_numbers=_DIMENSIONS
    )
    return dx, dk.transpose(1, 2, 0, 3)


conv_scan_safe.defvjp(_conv_forward, _conv_backward)


def edm_init(scale: float = 1.0) -> Callable[..., Array]:
    """Xavier-uniform initialization times `scale`, as EDM's DDPM++ (arXiv 2206.00364, app. F)."""
    base = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return scale * base(key, shape, dtype)

    return init


class Conv(nn.Module):
    """3x3 stride-1 convolution; `scan_safe` picks the rule of its gradient."""

    features: int
    scale: float = 1.0
    scan_safe: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", edm_init(self.scale), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return (conv_scan_safe if self.scan_safe else _conv_same)(x, kernel) + bias


class Dense(nn.Module):
    """Linear map of the last axis; also every 1x1 convolution (faster than one on CPU)."""

    features: int
    scale: float = 1.0
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features, use_bias=self.bias, kernel_init=edm_init(self.scale), name="map")(x)


class Gate(nn.Module):
    """Multiplies the channels (last axis) of `x` by this layer's entry of the `gates` collection.

    The entry has shape [C], or any shape that broadcasts against `x`, such as [B,1,1,C].
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_variable(GATES, "gate") or self.is_mutable_collection(GATES):
            return x * self.variable(GATES, "gate", jnp.ones, (x.shape[-1],), jnp.float32).value
        return x


def tap(module: nn.Module, name: str, x: Array) -> None:
    """Offer `x` under `name` to `apply(..., taps=...)`."""
    module.sow(TAPS, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def group_norm(x: Array, name: str) -> Array:
    """GroupNorm with min(32, C/4) groups, epsilon 1e-6; call inside a compact method."""
    groups = max(1, min(32, x.shape[-1] // 4))
    while x.shape[-1] % groups:
        groups -= 1
    return nn.GroupNorm(num_groups=groups, epsilon=1e-6, name=name)(x)


class Attention(nn.Module):
    """Single-head self-attention over pixels, residual; taps `map` [B,Q,K] and `value` [B,K,C].

    The `gate` acts on the value channels. An attention bias broadcastable to [B,Q,K] may be given
    in the collection `attn_bias` under this layer's path, name "bias".
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        qkv = Dense(3 * c, scale=0.2**0.5, name="qkv")(group_norm(x, "norm")).reshape(b, h * w, 3, c)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) / c**0.5
        if self.has_variable(BIASES, "bias"):
            logits = logits + self.get_variable(BIASES, "bias")
        weights = nn.softmax(logits)
        tap(self, "map", weights)
        v = Gate(name="value_gate")(v)
        tap(self, "value", v)
        out = jnp.einsum("bqk,bkc->bqc", weights.astype(v.dtype), v).reshape(b, h, w, c)
        return x + Dense(c, scale=1e-5, name="out")(out)


def noise_embedding(c_noise: Array, dim: int, max_period: float = 10_000.0) -> Array:
    """Sinusoidal features [B, dim] of the scalar c_noise [B]: sines, then cosines (arXiv 2011.13456)."""
    half = dim // 2
    frequency = max_period ** -(jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angle = c_noise[:, None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


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


def downsample(x: Array) -> Array:
    """2x2 mean: the box filter [1,1] with stride 2."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: Array) -> Array:
    """Nearest neighbour by 2: the transposed box filter."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)

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
    """3x3 stride-1 convolution computed in `dtype`; `scan_safe` picks the rule of its gradient."""

    features: int
    scale: float = 1.0
    scan_safe: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", edm_init(self.scale), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return (conv_scan_safe if self.scan_safe else _conv_same)(x, kernel) + bias


class Dense(nn.Module):
    """Linear map of the last axis in `dtype`; also every 1x1 convolution (faster than one on CPU)."""

    features: int
    scale: float = 1.0
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = edm_init(self.scale)
        return nn.Dense(self.features, self.bias, dtype=self.dtype, kernel_init=init, name="map")(x)


class Gate(nn.Module):
    """Multiplies the channels (last axis) of `x` by this layer's entry of the `gates` collection.

    The entry has shape [C], or any shape that broadcasts against `x`, such as [B,1,1,C]. Its tap `in` is `x`.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        tap(self, "in", x)
        if self.has_variable(GATES, "gate") or self.is_mutable_collection(GATES):
            gate = self.variable(GATES, "gate", jnp.ones, (x.shape[-1],), jnp.float32).value
            return x * gate.astype(x.dtype)
        return x


def tap(module: nn.Module, name: str, x: Array) -> None:
    """Offer `x` under `name` to `apply(..., taps=...)`."""
    module.sow(TAPS, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def group_norm(x: Array, name: str, epsilon: float = 1e-6) -> Array:
    """GroupNorm with min(32, C/4) groups, in float32; call inside a compact method."""
    groups = max(1, min(32, x.shape[-1] // 4))
    while x.shape[-1] % groups:
        groups -= 1
    return nn.GroupNorm(num_groups=groups, epsilon=epsilon, name=name)(x.astype(jnp.float32))


def attend(
    module: nn.Module, qkv: Array, head_channels: int, qk_norm: bool = False, causal: bool = False
) -> Array:
    """Softmax self-attention over N positions; call inside `module`'s compact method.

    Args:
      module: the calling module, whose taps, gate and bias are those of `look`.
      qkv: [B,N,3C] queries, keys and values.
      head_channels: D, the width of one head; 0 is a single head.
      qk_norm: RMS-normalize queries and keys per head, with learned scales (arXiv 2302.05442, section 2).
      causal: a position sees none behind it.

    Returns:
      [B,N,C].
    """
    q, k, v = jnp.split(qkv, 3, axis=-1)
    n = qkv.shape[1]
    seen = jnp.tril(jnp.ones((n, n), bool)) if causal else None
    return look(module, q, k, Gate(name="value_gate")(v), head_channels, qk_norm, seen)


def look(
    module: nn.Module,
    q: Array,
    k: Array,
    v: Array,
    head_channels: int,
    qk_norm: bool = False,
    seen: Array | None = None,
) -> Array:
    """Softmax attention of Q positions to K others; call inside `module`'s compact method.

    Taps of `module`: `map` [B,heads,Q,K] and `value` [B,K,C]. A gate on the value channels acts on all heads;
    channels h*D to (h+1)*D belong to head h, D its width. A bias that broadcasts to [B,heads,Q,K] may be given
    in the collection `attn_bias` under the module's path, name "bias".

    Args:
      module: the calling module.
      q: [B,Q,C] queries.
      k: [B,K,C] keys.
      v: [B,K,C] values.
      head_channels: D, the width of one head; 0 is a single head.
      qk_norm: RMS-normalize queries and keys per head, with learned scales.
      seen: [Q,K] bool, which keys a query sees; None is all.

    Returns:
      [B,Q,C].
    """
    b, n, c = q.shape
    width = head_channels or c
    tap(module, "value", v)
    q, k, v = (a.reshape(b, a.shape[1], c // width, width) for a in (q, k, v))
    if qk_norm:
        q = nn.RMSNorm(name="norm_q")(q.astype(jnp.float32)).astype(v.dtype)
        k = nn.RMSNorm(name="norm_k")(k.astype(jnp.float32)).astype(v.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / width**0.5
    if module.has_variable(BIASES, "bias"):
        logits = logits + module.get_variable(BIASES, "bias")
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    weights = nn.softmax(logits)
    tap(module, "map", weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v).reshape(b, n, c)


class Attention(nn.Module):
    """Residual self-attention over pixels [B,H,W,C]; gate, taps and bias as in `attend`."""

    head_channels: int = 0
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        normed = group_norm(x, "norm", self.epsilon).reshape(b, h * w, c)
        qkv = Dense(3 * c, scale=0.2**0.5, dtype=self.dtype, name="qkv")(normed)
        out = attend(self, qkv, self.head_channels)
        return x + Dense(c, scale=1e-5, dtype=self.dtype, name="out")(out).reshape(b, h, w, c)


def _costly(primitive: Any, *args: Any, **params: Any) -> bool:
    """Convolutions and matrix products without batch axes (an attention map has them, and is large)."""
    unbatched = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive is jax.lax.conv_general_dilated_p or bool(unbatched(primitive, *args, **params))


def rematerialize(block: type[nn.Module], remat: str, scanned: bool = False) -> Any:
    """A block `(x, emb)` that keeps less for its backward pass.

    Args:
      block: the module's class.
      remat: "none" keeps everything, "blocks" only the block's inputs, "dots" also the results of
        convolutions and of matrix products but those of attention.
      scanned: the block is the body of a scan, where the compiler needs no barrier to keep recomputation.
    """
    if remat == "none":
        return block
    policy = _costly if remat == "dots" else None
    return nn.remat(block, policy=policy, prevent_cse=not scanned)

"""Floating-point operations of a function, counted from its jaxpr: nothing is compiled or run.

Counted are matrix products and convolutions, two operations per multiply-add; they are all but a few per cent of
a network's work. A scan counts its body times its length, where the compiler's own `cost_analysis` counts it
once. Convolutions are counted as if every tap met a pixel, unless told otherwise: at the border the compiler
counts fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from mdiff.trees import size
from mdiff.types import Array, Key, Params, Prediction


@dataclass(frozen=True)
class Flops:
    """Operations of one call.

    Attributes:
      total: multiplications and additions of matrix products and convolutions.
      by_primitive: the same per primitive, `{"dot_general": …, "conv_general_dilated": …}`.
      unbounded: `while` loops whose number of rounds is not known; their bodies are counted once.
    """

    total: int
    by_primitive: Mapping[str, int]
    unbounded: int


class Denoising(Protocol):
    """What is counted: `mdiff.nets.denoiser.Model` has this form."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def init(self, key: Key) -> Params: ...

    def condition(self, params: Params, batch: Mapping[str, Array], n: int | None = None) -> Array | None: ...

    def apply(
        self, params: Params, xt: Array, t: Array, cond: Array | None = None
    ) -> tuple[Prediction, Any]: ...


def count(fn: Callable[..., Any], *args: Any, padding: bool = True) -> Flops:
    """Operations of `fn(*args)`; arguments may be arrays or `jax.ShapeDtypeStruct`s.

    Without `padding` a convolution's products with padding are not counted, as the compiler has it. A `cond` counts its costliest branch, `shard_map` the work of one shard, recomputation (`jax.checkpoint`)
    the work it repeats.
    """
    found: Counter[str] = Counter()
    unbounded = _walk(jax.make_jaxpr(fn)(*args).jaxpr, 1, found, _COSTS if padding else _COSTS_INSIDE)
    return Flops(sum(found.values()), dict(found), unbounded)


def forward(model: Denoising, batch: int = 1) -> Flops:
    """One denoising of `batch` images with the null condition."""
    params, xt, t = _inputs(model, batch)
    return count(lambda p, x, t: _denoise(model, p, x, t), params, xt, t)


def train_step(model: Denoising, batch: int = 1) -> Flops:
    """Loss and gradient of `batch` images (the mean square of x0); the optimizer has no matrix products."""
    params, xt, t = _inputs(model, batch)

    def loss(p: Params, x: Array, t: Array) -> Array:
        return jnp.mean(_denoise(model, p, x, t) ** 2)

    return count(jax.grad(loss), params, xt, t)


def parameters(model: Denoising) -> int:
    """Number of parameters, without making them."""
    return size(jax.eval_shape(model.init, jax.random.key(0)))


def _inputs(model: Denoising, batch: int) -> tuple[Params, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, *model.shape), jnp.float32)
    return params, images, jax.ShapeDtypeStruct((batch,), jnp.float32)


def _denoise(model: Denoising, params: Params, xt: Array, t: Array) -> Array:
    return model.apply(params, xt, t, model.condition(params, {}, n=len(xt)))[0].x0


def _walk(jaxpr: core.Jaxpr, times: int, found: Counter[str], costs: Costs) -> int:
    """Add the operations of `jaxpr`, run `times` times, to `found`; returns the number of unbounded loops."""
    unbounded = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in costs:
            found[name] += times * costs[name](equation)
        elif name == "cond":
            branches = []
            for branch in equation.params["branches"]:
                inside: Counter[str] = Counter()
                unbounded += _walk(branch.jaxpr, times, inside, costs)
                branches.append(inside)
            found.update(max(branches, key=lambda inside: sum(inside.values())))
        else:
            rounds = equation.params["length"] if name == "scan" else 1
            unbounded += name == "while"
            for inner in _inner(equation.params):
                unbounded += _walk(inner, times * rounds, found, costs)
    return unbounded


def _inner(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _dot(equation: Any) -> int:
    left, right = (v.aval.shape for v in equation.invars[:2])
    (contract, _), (batch, _) = equation.params["dimension_numbers"]
    shared = prod(left[i] for i in contract) * prod(left[i] for i in batch)
    return 2 * prod(left) * prod(right) // max(1, shared)


def _convolution(equation: Any) -> int:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    spec = equation.params["dimension_numbers"].rhs_spec  # (out features, in features, spatial...)
    taps = kernel[spec[1]] * prod(kernel[i] for i in spec[2:])
    # Zeros between the pixels of a dilated input are not multiplied.
    return 2 * prod(out) * taps // prod(equation.params["lhs_dilation"])


def _convolution_inside(equation: Any) -> int:
    image, kernel = (v.aval.shape for v in equation.invars[:2])
    out, given = equation.outvars[0].aval.shape, equation.params
    numbers = given["dimension_numbers"]  # (batch, features, spatial...) of each
    products = kernel[numbers.rhs_spec[1]] * out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    for axis, (low, _) in enumerate(given["padding"]):
        n, size, results = (
            shape[spec[axis + 2]]
            for shape, spec in zip(
                (image, kernel, out), (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec), strict=True
            )
        )
        steps = (given[name][axis] for name in ("window_strides", "lhs_dilation", "rhs_dilation"))
        stride, spread, dilation = steps
        products *= pairs(n, results, size, stride, low, spread, dilation)
    return 2 * products


def pairs(n: int, out: int, size: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """How many (output, tap) pairs of one axis of a convolution meet an input, not padding or a dilation's zero.

    Args:
      n: inputs.
      out: outputs.
      size: taps.
      stride: step from output to output.
      low: padding before the first input.
      spread: distance of neighbouring inputs once dilated.
      dilation: distance of neighbouring taps.
    """
    last, total = (n - 1) * spread, 0
    for tap in range(size):
        # Outputs o with 0 <= o * stride + shift <= last, and that sum a multiple of spread.
        shift = tap * dilation - low
        first, final = max(0, -(shift // stride)), min(out - 1, (last - shift) // stride)
        if spread == 1:
            total += max(0, final - first + 1)
        else:
            total += sum((o * stride + shift) % spread == 0 for o in range(first, final + 1))
    return total


Costs: TypeAlias = Mapping[str, Callable[[Any], int]]
_COSTS: Costs = {"dot_general": _dot, "conv_general_dilated": _convolution}
_COSTS_INSIDE: Costs = {"dot_general": _dot, "conv_general_dilated": _convolution_inside}

"""The neurons of a network by number: discovered from its gates, in the order the network computes them.

A neuron is a channel that a gate multiplies; a layer is a gate. Names are paths of gates: "text/block0/hidden_gate" of the
text encoder, "net/enc8_0/cross/value_gate" of the denoising network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdiff.errors import UserError
from mdiff.nets import unet
from mdiff.nets.denoiser import Model
from mdiff.trees import named_leaves
from mdiff.types import Array, Params

_PARTS = ("attention", "cross", "feed")
_GATES = ("query", "key", "value", "hidden", "out")


@dataclass(frozen=True, eq=False)
class Units:
    """Layers of neurons, and where their gates are.

    Attributes:
      names: of the layers.
      sizes: neurons of each.
      blocks: the network's block each layer belongs to; "" where it is computed before all blocks.
      ones: all gates of the model, on: `{"net": …, "text": …}`.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: tuple[str, ...]
    ones: Params

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def layer(self) -> np.ndarray:
        """int [N]: number of each neuron's layer."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def starts(self) -> np.ndarray:
        """int [layers + 1]: number of the first neuron of each layer, and N."""
        return np.cumsum([0, *self.sizes])

    def gates(self, factor: Array) -> Params:
        """All gates, with those of these neurons multiplied by `factor` [N]; trace it."""
        place = {name: i for i, name in enumerate(self.names)}
        named = named_leaves(self.ones)
        leaves = [
            leaf * factor[self.starts[place[key]] : self.starts[place[key] + 1]] if key in place else leaf
            for key, leaf in ((_layer(name), leaf) for name, leaf in named)
        ]
        return jax.tree.unflatten(jax.tree.structure(self.ones), leaves)

    def place(self, neuron: int) -> tuple[str, int]:
        """Name of the neuron's layer, and its index in it.

        Raises:
          UserError: there is no such neuron.
        """
        if not 0 <= neuron < len(self):
            raise UserError(f"neuron {neuron}: the layers have {len(self)} neurons, numbered from 0")
        layer = int(self.layer[neuron])
        return self.names[layer], int(neuron - self.starts[layer])

    def number(self, name: str, index: int) -> int:
        """The inverse of `place`.

        Raises:
          UserError: no such layer, or it has no such neuron.
        """
        if name not in self.names:
            raise UserError(f"layer {name!r}: not among the layers searched, {', '.join(self.names)}")
        layer = self.names.index(name)
        if not 0 <= index < self.sizes[layer]:
            raise UserError(f"neuron {index} of {name}: the layer has {self.sizes[layer]}, numbered from 0")
        return int(self.starts[layer] + index)

    def off(self, neurons: Sequence[int]) -> np.ndarray:
        """bool [N], true for these neurons."""
        out = np.zeros(len(self), bool)
        out[np.asarray(neurons, int)] = True
        return out

    def by_layer(self, neurons: Sequence[int]) -> dict[str, list[int]]:
        """Layer -> indices in it, for layers that have any of these neurons."""
        found: dict[str, list[int]] = {}
        for neuron in sorted(int(n) for n in neurons):
            name, index = self.place(neuron)
            found.setdefault(name, []).append(index)
        return found


def discover(model: Model, pattern: str) -> Units:
    """The layers of `model` whose name has a match of the regular expression `pattern`.

    Raises:
      UserError: it is no regular expression, or no layer matches: of a model without text, none has cross-attention.
    """
    ones = {"net": model.gates(), "text": model.text_gates()}
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UserError(f"nemo.layers = {pattern!r}: is no regular expression ({error})") from None
    sizes = {_layer(name): leaf.size for name, leaf in named_leaves(ones)}
    order = sorted(sizes, key=_order(model))
    chosen = tuple(name for name in order if wanted.search(name))
    if not chosen:
        why = "" if any("cross" in name for name in order) else "; the model has no cross-attention"
        raise UserError(
            f"nemo.layers = {pattern!r}: matches no layer{why}; layers are named like {', '.join(order[-3:])}"
        )
    blocks = tuple(_block(model, name) for name in chosen)
    return Units(chosen, tuple(sizes[name] for name in chosen), blocks, ones)


def _layer(leaf: str) -> str:
    return leaf.removesuffix("/gate")


def _stages(model: Model) -> list[str]:
    cfg: Any = getattr(model.net, "cfg", None)
    if not isinstance(model.net, unet.UNet):
        return []
    return [stage.name for stage in unet.stages(cfg, model.shape[0] // cfg.patch)]


def _block(model: Model, name: str) -> str:
    part = name.split("/")[1]
    return part if part in _stages(model) else ""


def _order(model: Model) -> Any:
    """Sort key of layer names: text encoder, embedding, blocks as they run, and the order inside a block."""
    stages = {name: i for i, name in enumerate(_stages(model))}

    def key(name: str) -> tuple[Any, ...]:
        side, block, *rest = name.split("/")
        part = _PARTS.index(rest[0]) + 1 if rest and rest[0] in _PARTS else 0
        gate = name.rsplit("/", 1)[-1].removesuffix("_gate")
        inside = _GATES.index(gate) if gate in _GATES else -1
        return (
            side != "text",
            stages.get(block, -1),
            block if block not in stages else "",
            part,
            inside,
            name,
        )

    return key


def ablate(off: Array, factor: float = 0.0) -> Array:
    """`off` [N] bool to the factors of `Units.gates`: `factor` where off, else 1."""
    return jnp.where(off, factor, 1.0)

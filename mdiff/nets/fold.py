"""Gates made permanent: weights of an ordinary network that answers as the gated one does.

A gate stands between two linear maps, so multiplying the columns of the map that feeds it or the rows of the map that reads it
says the same. Which of the two is exact depends on what lies between: the values, keys and queries of attention come straight
from a linear map; hidden units behind a nonlinearity go straight into one.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mdiff.errors import UserError
from mdiff.trees import named_leaves
from mdiff.types import Params

_SIDES = {"net": "net", "text": "embedding"}


def fold(params: Params, gates: Params) -> Params:
    """Parameters without need of gates.

    Args:
      params: of a `Model`.
      gates: `{"net": …, "text": …}`, as of `Model.gates` and `Model.text_gates`; what is one changes nothing.

    Returns:
      New parameters, on the host.

    Raises:
      UserError: a gate that is not one has no linear map beside it that could carry it.
    """
    found = jax.tree.map(lambda leaf: np.array(leaf), params)
    for name, leaf in named_leaves(gates):
        factor = np.asarray(leaf, np.float32)
        if (factor == 1).all():
            continue
        side, *path = name.removesuffix("/gate").split("/")
        _fold(found[_SIDES[side]], path, factor, name)
    return found


def _fold(net: dict[str, Any], path: list[str], factor: np.ndarray, name: str) -> None:
    *where, gate = path
    part = where[-1] if where else ""
    at = net
    for each in where:
        at = at[each]
    kind = gate.removesuffix("_gate")
    if part == "cross" and kind in ("query", "key", "value"):
        _columns(at[f"to_{kind}"]["map"], factor)
    elif part == "attention" and kind == "value" and "qkv" in at:
        _columns(at["qkv"]["map"], np.concatenate([np.ones(2 * len(factor), np.float32), factor]))
    elif kind == "hidden" and "mlp_out" in at:
        at["mlp_out"]["map"]["kernel"] *= factor[:, None]
    elif kind == "hidden" and "conv1" in at:
        at["conv1"]["kernel"] *= factor[:, None]
    elif kind == "out" and "conv1" in at:
        _columns(at["conv1"], factor)
    else:
        raise UserError(
            f"gate {name}: no one linear map carries it, so it cannot be pruned for good; leave it on, or choose other layers"
        )


def _columns(linear: dict[str, Any], factor: np.ndarray) -> None:
    """Multiply what a linear map or convolution gives, channel by channel."""
    linear["kernel"] *= factor
    if "bias" in linear:
        linear["bias"] *= factor

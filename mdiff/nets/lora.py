"""Low-rank adapters (LoRA, arXiv 2106.09685) and learned conditions around a frozen network.

Every kernel W of the network becomes W + A B with A [inputs, r] and B [r, outputs]; a convolution's four axes are taken as
[height * width * in, out]. B starts at zero, so a fresh adapter changes nothing. All of it is a pytree beside the
parameters, and `merge` makes parameters of the two: no network knows of it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from mdiff.errors import UserError
from mdiff.nets import unet
from mdiff.nets.denoiser import Model
from mdiff.nets.unet import UNet
from mdiff.types import Array, Key, Params, Prediction


def _matrix(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """Leading axes (of scanned blocks), rows and columns of a kernel as a matrix."""
    if len(shape) == 4:
        return (), math.prod(shape[:3]), shape[3]
    return shape[:-2], shape[-2], shape[-1]


def init(key: Key, net: Params, rank: int) -> Params:
    """Fresh adapters of every kernel of the network parameters `net`; a matrix's rank caps theirs.

    Args:
      key: of A, which is normal with variance 1/inputs.
      net: the network's parameters (or their shapes), nested dicts.
      rank: r, 1 or more.

    Returns:
      A tree like `net` with `{"a": [..., inputs, r], "b": [..., r, outputs]}` in place of each kernel, and no other leaves.

    Raises:
      UserError: the rank is below 1.
    """
    if rank < 1:
        raise UserError(f"adapter.rank = {rank}: must be 1 or more")
    found = {}
    for path, leaf in traverse_util.flatten_dict(net).items():
        if path[-1] != "kernel":
            continue
        lead, rows, columns = _matrix(leaf.shape)
        r = min(rank, rows, columns)
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        found[(*path, "a")] = jax.random.normal(own, (*lead, rows, r)) * rows**-0.5
        found[(*path, "b")] = jnp.zeros((*lead, r, columns))
    return traverse_util.unflatten_dict(found)


def merge(net: Params, adapters: Params) -> Params:
    """The network parameters `net` with W + A B for every kernel that `adapters` (of `init`) has."""
    factors = traverse_util.flatten_dict(adapters)

    def one(path: tuple[str, ...], leaf: Array) -> Array:
        if (*path, "a") not in factors:
            return leaf
        product = jnp.matmul(factors[*path, "a"], factors[*path, "b"], precision=jax.lax.Precision.HIGHEST)
        return leaf + product.reshape(leaf.shape)

    return traverse_util.unflatten_dict(
        {path: one(path, leaf) for path, leaf in traverse_util.flatten_dict(net).items()}
    )


def condition_width(model: Model) -> int:
    """E, the width of the condition that the model's network takes."""
    cfg: Any = model.net.cfg
    return unet.condition_width(cfg) if isinstance(model.net, UNet) else cfg.channels


@dataclass(frozen=True, eq=False)
class Adapted(Model):
    """A frozen model with adapters and a table of conditions; a Model, whose parameters are those two.

    Its parameters are `{"adapters": …, "table": [K,E]}`. A label's row is added to the frozen model's null condition (to
    nothing, where it has none); all rows start at zero, so that a fresh adapted model is the frozen one. Its labels are those
    of the table: `recipes.adapt` draws from it, since `recipes.generate` would ask for the frozen model's.

    Attributes:
      frozen: parameters of the model that is adapted.
      classes: K.
      rank: of the adapters.
    """

    frozen: Params = None
    classes: int = 0
    rank: int = 0

    def init(self, key: Key) -> Params:
        """Fresh `{"adapters": …, "table": …}`."""
        table = jnp.zeros((self.classes, condition_width(self)))
        return {"adapters": init(key, self.frozen["net"], self.rank), "table": table}

    def merged(self, params: Params) -> Params:
        """Parameters of the model that was adapted, with the adapters in."""
        return {**self.frozen, "net": merge(self.frozen["net"], params["adapters"])}

    @property
    def base(self) -> Model:
        """The model that is adapted."""
        return Model(**{each.name: getattr(self, each.name) for each in fields(Model)})

    def condition(
        self,
        params: Params,
        batch: Mapping[str, Array],
        n: int | None = None,
        drop: Array | None = None,
        gates: Params | None = None,
    ) -> Array | None:
        """As of `Model.condition`: rows of `label` [B], the null condition without labels; nothing is dropped or gated."""
        n = len(next(iter(batch.values()))) if n is None else n
        null = super().condition(self.frozen, {}, n)
        if "label" not in batch:
            return null
        rows = params["table"][batch["label"]]
        return rows if null is None else null + rows

    def log_variance(self, params: Params, sigma: Array) -> Array | None:
        """None: the learned weight of a loss is not adapted."""
        return None

    def apply(self, params: Params, *args: Any, **kwargs: Any) -> tuple[Prediction, dict[str, Array]]:
        """As of `Model.apply`."""
        return super().apply(self.merged(params), *args, **kwargs)


def adapted(model: Model, frozen: Params, classes: int, rank: int) -> Adapted:
    """`model` with parameters `frozen`, to be adapted to `classes` labels.

    Raises:
      UserError: rank or classes are out of range, or it is a model of damaged images.
    """
    if rank < 1:
        raise UserError(f"adapter.rank = {rank}: must be 1 or more")
    if classes < 1:
        raise UserError(f"adapter: {classes} classes; give 1 or more")
    if "tokens" in getattr(model.embedding, "takes", ()):
        raise UserError("adapter: a text model has no room for labels; attack it by its captions")
    if model.damage is not None:
        raise UserError(
            "adapter: a model of damaged images cannot be adapted; guide it by a classifier (adapter.rank 0)"
        )
    parts = {each.name: getattr(model, each.name) for each in fields(Model)}
    return Adapted(**{**parts, "uncertainty": None}, frozen=frozen, classes=classes, rank=rank)

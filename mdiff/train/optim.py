"""Optimizers and learning-rate schedules, all from optax.

Muon (arXiv 2502.16982) replaces the gradient's running mean, as a matrix, by the nearest orthogonal one, in
the form of `optax.contrib.scale_by_muon`. Its updates are scaled to the size of Adam's (section 2.2
there), so that one learning rate serves both. Shampoo is not offered: optax has none, and Muon is
Shampoo without accumulation.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mdiff import config
from mdiff.errors import UserError
from mdiff.trees import map_named
from mdiff.types import Array, Params

MUON_BETA = 0.95
"""Decay of Muon's mean of gradients (arXiv 2502.16982); Adam's b1 is for the leaves left to Adam."""
MUON_RMS = 0.2
"""Root mean square of an Adam update, which Muon's are scaled to (arXiv 2502.16982, eq. 4)."""

_VECTORS = re.compile(r"(^|/)(bias|scale)$")  # a block axis of scanned blocks makes them two-dimensional
_ENDS = re.compile(r"(^|/)(conv_in|conv_out|patch_in|patch_out|embedding|uncertainty)(/|$)")


def make_schedule(cfg: config.Train) -> optax.Schedule:
    """Learning rate by step (counted from 0): linear warm-up, then the configured fall.

    `inverse_sqrt` is lr / sqrt(max(t / decay_steps, 1)) (arXiv 2312.02696, eq. 67), t the step. With
    decay_steps 0, linear and cosine end at `train.steps`: extending such a run changes its rates.
    """
    end = cfg.decay_steps or cfg.steps
    start = cfg.decay_steps or cfg.warmup

    def inverse_sqrt(count: Array) -> Array:
        return cfg.lr / jnp.sqrt(jnp.maximum((count + cfg.warmup) / start, 1.0))

    if cfg.schedule == "constant":
        after = optax.constant_schedule(cfg.lr)
    elif cfg.schedule == "linear":
        after = optax.linear_schedule(cfg.lr, 0.0, end - cfg.warmup)
    elif cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.lr, end - cfg.warmup)
    else:
        after = inverse_sqrt
    if not cfg.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, cfg.lr, cfg.warmup), after], [cfg.warmup])


def decayed(params: Params) -> Any:
    """Which leaves weight decay acts on: matrices, kernels and tables, not biases and scales."""
    return map_named(lambda name, leaf: leaf.ndim >= 2 and not _VECTORS.search(name), params)


def _matrix(leaf: Array) -> optax.contrib.MuonDimensionNumbers:
    """The axes a kernel is a matrix over: [..., in, out], all but the last of a convolution's four."""
    inputs = (0, 1, 2) if leaf.ndim == 4 else (leaf.ndim - 2,)
    return optax.contrib.MuonDimensionNumbers(inputs, (leaf.ndim - 1,))


def orthogonalized(params: Params) -> Any:
    """ "muon" for hidden matrices and convolution kernels; "adam" for the first and last layer, for
    embeddings and for vectors, as the leaf's name and rank say."""

    def choose(name: str, leaf: Array) -> str:
        hidden = name.endswith("kernel") and 2 <= leaf.ndim <= 4 and not _ENDS.search(name)
        return "muon" if hidden else "adam"

    return map_named(choose, params)


def _scale_to_adam(updates: Params, _: Params | None) -> Params:
    def scale(leaf: Array) -> Array:
        axes = _matrix(leaf)
        inputs = math.prod(leaf.shape[axis] for axis in axes.reduction_axis)
        return MUON_RMS * math.sqrt(max(inputs, leaf.shape[-1])) * leaf

    return jax.tree.map(scale, updates)


def make_optimizer(cfg: config.Train) -> optax.GradientTransformation:
    """The configured optimizer with its schedule, after clipping by global norm.

    adam; adamw, with decoupled decay (times the learning rate) of matrices and kernels; muon for
    hidden matrices with Adam for the rest, and the same decay.
    """
    schedule = make_schedule(cfg)
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip > 0 else optax.identity()
    if cfg.optimizer == "adam":
        return optax.chain(clip, optax.adam(schedule, cfg.b1, cfg.b2))
    if cfg.optimizer == "adamw":
        return optax.chain(
            clip, optax.adamw(schedule, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=decayed)
        )
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=MUON_BETA, weight_dimension_numbers=lambda leaves: jax.tree.map(_matrix, leaves)
        ),
        optax.stateless(_scale_to_adam),
    )
    direction = optax.partition({"muon": muon, "adam": optax.scale_by_adam(cfg.b1, cfg.b2)}, orthogonalized)
    decay = optax.add_decayed_weights(cfg.weight_decay, decayed)
    return optax.chain(clip, direction, decay, optax.scale_by_learning_rate(schedule))


def check(cfg: config.Train) -> None:
    """Raises UserError when a field of the optimizer or its schedule is out of range."""
    for name in ("b1", "b2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"train.{name} = {getattr(cfg, name)}: must be in [0, 1)")
    for name in ("warmup", "decay_steps", "clip", "weight_decay"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"train.{name} = {getattr(cfg, name)}: must be 0 or more")
    if not 0 < cfg.lr < math.inf:
        raise UserError(f"train.lr = {cfg.lr}: must be above 0")
    if cfg.weight_decay and cfg.optimizer == "adam":
        raise UserError(
            f"train.weight_decay = {cfg.weight_decay}: adam has none; set train.optimizer to adamw or muon"
        )
    if cfg.schedule == "constant" and cfg.decay_steps:
        raise UserError(
            f"train.decay_steps = {cfg.decay_steps}: a constant rate does not fall; set train.schedule or leave it 0"
        )
    if cfg.schedule in ("linear", "cosine") and (cfg.decay_steps or cfg.steps) <= cfg.warmup:
        name = "decay_steps" if cfg.decay_steps else "steps"
        raise UserError(
            f"train.{name} = {getattr(cfg, name)}: train.schedule {cfg.schedule} ends before the warm-up "
            f"({cfg.warmup} steps) does; lower train.warmup"
        )
    if cfg.schedule == "inverse_sqrt" and not (cfg.decay_steps or cfg.warmup):
        raise UserError("train.decay_steps = 0: without a warm-up, inverse_sqrt needs the step it falls from")
    if cfg.schedule == "inverse_sqrt" and 0 < cfg.decay_steps < cfg.warmup:
        raise UserError(
            f"train.decay_steps = {cfg.decay_steps}: inverse_sqrt would fall before the warm-up ends; set it "
            f"to {cfg.warmup} (train.warmup) or more"
        )

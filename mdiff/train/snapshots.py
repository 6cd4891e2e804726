"""Stored power-function averages, and any other average made of them after training (arXiv 2312.02696, section 3.2).

Every `train.ema_every` steps all averages are written below `ema/` of the run's folder, in float32. Stored in
float16 a reconstruction is off by 2e-4 of the weights' norm and in bfloat16 by 2e-3, where float32 leaves the fit's
own 3e-6 (tests/test_ema.py: width 0.15 from 30 snapshots of 0.05 and 0.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.errors import UserError
from mdiff.train import ema
from mdiff.train.checkpoint import Checkpoints
from mdiff.train.state import TrainState
from mdiff.types import Array, Params

FOLDER = "ema"
MAX_MISFIT = 0.05
"""A reconstruction whose misfit (`ema.Fit`) is larger is refused."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Snapshot:
    """All averages of one step.

    Attributes:
      step: [] int32.
      profiles: parameters by `ema.name(length)`.
    """

    step: Array
    profiles: dict[str, Params]


def snapshot(state: TrainState) -> Snapshot:
    """The averages of a state."""
    return Snapshot(state.step, state.profiles)


def meta(cfg: config.Config) -> dict[str, Any]:
    """What is stored beside a snapshot: whose it is."""
    return {"config": config.to_json(cfg)}


class Snapshots(Checkpoints):
    """The stored averages of one run, all of them kept; like checkpoints, each is whole or not there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / FOLDER, keep=None)


def stored(folder: Path) -> bool:
    """Has the run in `folder` stored averages?"""
    return (folder / FOLDER).is_dir()


def reconstruct(snapshots: Iterable[Snapshot], weights: dict[tuple[int, str], float]) -> Params:
    """The weighted sum of stored averages, in float32 and one snapshot at a time.

    Args:
      snapshots: read as they are needed.
      weights: weight of each average by (step, name), from `ema.solve`.
    """
    total: Params = None
    for each in snapshots:
        for name, params in each.profiles.items():
            weight = jnp.float32(weights[int(each.step), name])
            part = jax.tree.map(lambda leaf, w=weight: w * leaf, params)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def load_average(
    folder: Path,
    sigma_rel: float,
    state: TrainState,
    cfg: config.Config,
    warn: Callable[[str], None],
    field: str = "sample.ema",
) -> Params:
    """The average of relative width `sigma_rel` at the step of `state`.

    A length that was tracked is returned as it is. Any other is made of the averages stored until then and
    those of `state` itself.

    Args:
      folder: the run's folder.
      sigma_rel: the wanted relative width.
      state: a restored state of the run.
      cfg: the run's own configuration.
      warn: told about damaged snapshots, which are passed over.
      field: what the message of an error names.

    Returns:
      Parameters, sharded as those of `state`.

    Raises:
      UserError: the run kept no averages, or they cannot express this one.
    """
    target, lengths, step = ema.gamma(sigma_rel, field), cfg.train.ema_lengths, int(state.step)
    if not state.profiles:
        raise UserError(
            f"{field} = {sigma_rel:g}: {folder} was trained without train.ema_lengths; leave it at 0"
        )
    if ema.name(sigma_rel) in state.profiles:
        return state.profiles[ema.name(sigma_rel)]
    if not stored(folder):
        weights = _weights([step], step, target, lengths, f"{field} = {sigma_rel:g}")
        return reconstruct([snapshot(state)], weights)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), snapshot(state)
    )
    with Snapshots(folder) as kept:
        earlier = [at for at in kept.whole(warn) if at < step]
        weights = _weights([*earlier, step], step, target, lengths, f"{field} = {sigma_rel:g}")

        def read() -> Iterator[Snapshot]:
            for at in earlier:
                found, beside = kept.read(at, abstract)
                theirs = config.from_json(config.Config, beside["config"], f"{kept.folder}: snapshot {at}")
                if config.digest(theirs) != config.digest(cfg):
                    raise UserError(f"{kept.folder}: snapshot {at} belongs to another run; move it away")
                yield found
            yield snapshot(state)

        return reconstruct(read(), weights)


def _weights(
    steps: Sequence[int], step: int, target: float, lengths: Sequence[float], field: str
) -> dict[tuple[int, str], float]:
    """The weight of every average stored at `steps`.

    Raises:
      UserError: their best sum is too far from the wanted average.
    """
    parts = [(at, length) for at in steps for length in lengths]
    times, gammas = np.array([at for at, _ in parts]), np.array([ema.gamma(length) for _, length in parts])
    fit = ema.solve(times, gammas, step, target)
    if fit.misfit > MAX_MISFIT:
        tracked = ", ".join(map(ema.name, lengths))
        raise UserError(
            f"{field}: the averages kept at {len(steps)} steps express it with a relative error of {fit.misfit:.2g} "
            f"(allowed: {MAX_MISFIT}); take one of the lengths kept ({tracked}), or train with a smaller train.ema_every"
        )
    return {(at, ema.name(length)): w for (at, length), w in zip(parts, fit.weights.tolist(), strict=True)}

"""The program of many small trainings at once, one per device: `shard_map` over the mesh axis `trial`, and no communication.

Trials of one group have states and batches of the same shapes and as many steps; they may differ in all else. Those
that differ in seed and data alone are one traced program, with the seed as a traced number. Other differences are
branches of a `lax.switch` by the trial's kind: all are compiled, each device runs its own.

On CPU a convolution's gradient inside a branch is about ten times slower, as it is inside a loop, so there programs
of several branches are traced with the scan-safe convolution (`net.scan_safe`), which computes the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mdiff import config
from mdiff.data.reader import Reader
from mdiff.data.split import Subset
from mdiff.errors import UserError
from mdiff.nets.denoiser import Model
from mdiff.nets.unet import UNet
from mdiff.train import loop, mesh, optim, state
from mdiff.train.program import make_batch_fn
from mdiff.trees import nbytes
from mdiff.types import Array, Evaluator, Objective

DEVICE_BYTES = 2 << 30
"""What a trial may take where a device does not say how much memory it has (CPU)."""

_COLLECTIVE = re.compile(
    r"\b((?:ragged-)?all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast|send|recv)"
    r"(?:-start)?\("
)
_UNTRACED = ("name", "seed", "mesh", "sample", "audit")
_UNTRACED_DATA = (
    "source", "split", "n", "heldout", "seed", "skip", "label_noise", "duplicates", "planted_flips", "planted_crops",
)  # fmt: skip
_UNTRACED_LOSS = ("cutoff", "cutoff_of", "cutoff_stages", "clean_share")  # they come with the batch
_UNTRACED_TRAIN = (*config.AROUND, "ema_every")


class TooLarge(UserError):
    """One trial does not fit one device."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One training among others.

    Attributes:
      name: what the user calls it.
      cfg: the experiment.
      model: its network and process.
      objective: makes the per-example loss of a model and a config.
      subset: training images and the order of an epoch.
      folder: the run's folder.
      monitor: told about this trial's progress.
      evaluator: called on (averaged parameters, step), as by `loop.train`.
    """

    name: str
    cfg: config.Config
    model: Model
    objective: Callable[[Model, config.Config], Objective]
    subset: Subset
    folder: Path
    monitor: loop.Monitor
    evaluator: Evaluator | None = None


def kind(cfg: config.Config) -> str:
    """What a config puts into the traced program: trials of equal kind share one."""
    tree = config.to_json(cfg)
    for name in _UNTRACED:
        del tree[name]
    for part, names in (("data", _UNTRACED_DATA), ("train", _UNTRACED_TRAIN), ("loss", _UNTRACED_LOSS)):
        for name in names:
            del tree[part][name]
    tree["loss"] |= {"ambient": cfg.loss.ambient, "ladder": cfg.loss.ladder}
    return json.dumps(tree, sort_keys=True)


def shapes(trial: Trial) -> str:
    """What trials have to agree in to be trained side by side: shapes of state, batch and metrics, and steps."""
    cfg = trial.cfg
    abstract = _abstract(trial, mesh.make_mesh(config.Mesh(data=1), jax.local_devices()[:1]))
    leaves = [f"{leaf.shape}{leaf.dtype}" for leaf in jax.tree.leaves(abstract)]
    batch = (
        trial.model.shape,
        cfg.train.batch,
        cfg.data.reading,
        cfg.net.classes > 0,
        cfg.net.vector,
        cfg.net.text,
    )
    return repr(
        (
            jax.tree.structure(abstract),
            leaves,
            batch,
            cfg.train.steps,
            cfg.loss.level_weight == "edm",
            cfg.loss.ambient,
        )
    )


def _abstract(trial: Trial, devices: jax.sharding.Mesh) -> Any:
    cfg = trial.cfg
    return state.plan_state(
        trial.model, optim.make_optimizer(cfg.train), cfg.seed, devices, cfg.train.ema_lengths
    )[1]


def state_bytes(trial: Trial) -> int:
    """Size of the state of a trial."""
    one = mesh.make_mesh(config.Mesh(data=1), jax.local_devices()[:1])
    return nbytes(_abstract(trial, one))


def device_bytes() -> int:
    """Memory of one device, as far as it says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", DEVICE_BYTES))


def collectives(text: str) -> list[str]:
    """Kinds of communication between devices in the text of a compiled program."""
    return sorted(set(_COLLECTIVE.findall(text)))


class Program:
    """The programs of a group of trials on `width` devices, one trial each.

    Attributes:
      mesh: the devices, along the axis `trial`.
      abstract: the state of one trial, whole on every device.
    """

    def __init__(self, trials: Sequence[Trial], width: int) -> None:
        devices = jax.devices()[:width]
        self.mesh = mesh.make_mesh(config.Mesh(data=1, fsdp=1, trial=width), devices)
        self.abstract = _abstract(trials[0], self.mesh)
        self.width = width
        self._compiled: Any = None
        self._split = NamedSharding(self.mesh, P("trial"))
        self._on_cpu = devices[0].platform == "cpu"
        kinds = {kind(trial.cfg): trial for trial in trials}
        self._kinds = list(kinds)
        self._examples = list(kinds.values())
        self._images = max(len(trial.subset.train) for trial in trials)

    @property
    def is_compiled(self) -> bool:
        """Is the step compiled already?"""
        return self._compiled is not None

    @property
    def here(self) -> list[int]:
        """Which places along the axis are devices of this process."""
        mine = jax.process_index()
        return [i for i, device in enumerate(self.mesh.devices.flat) if device.process_index == mine]

    def numbers(self, trials: Sequence[Trial]) -> tuple[Array, Array]:
        """Kind int32 [T] and seed uint32 [T] of each trial."""
        kinds = np.array([self._kinds.index(kind(trial.cfg)) for trial in trials], np.int32)
        seeds = np.array([trial.cfg.seed for trial in trials], np.uint32)
        placed: tuple[Array, Array] = mesh.place((kinds, seeds), self._split)
        return placed

    def stack(self, tree: Any, get: Callable[[int], Any]) -> Any:
        """Trees of host arrays like `tree`, one per place, as one of arrays [T,…]; only own places are asked for."""
        parts = {place: jax.tree.leaves(get(place)) for place in self.here}

        def one(number: int, leaf: Any) -> Array:
            def rows(index: Any) -> np.ndarray:
                return np.asarray(parts[index[0].start or 0][number])[None]

            return jax.make_array_from_callback((self.width, *np.shape(leaf)), self._split, rows)

        numbers = jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))
        return jax.tree.map(one, numbers, tree)

    def resident(self, reader: Reader) -> dict[str, np.ndarray]:
        """What lives on the device, filled up to the most images that a trial has."""

        def fill(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, np.zeros((self._images - len(x), *x.shape[1:]), x.dtype)])

        return {name: fill(np.asarray(x)) for name, x in reader.resident.items()}

    @cached_property
    def fresh(self) -> Any:
        """Jitted `(kinds, seeds) -> states` [T,…]."""

        def make(trial: Trial) -> Callable[[Array], Any]:
            def init(seed: Array) -> Any:
                cfg = trial.cfg.train
                return state.fresh_state(trial.model, optim.make_optimizer(cfg), seed, cfg.ema_lengths)

            return init

        options = {"xla_backend_optimization_level": 0} if self._on_cpu else {}
        return self._jit([make(trial) for trial in self._examples], (), options)

    @cached_property
    def step(self) -> Any:
        """Jitted `(kinds, seeds, states, resident, rows) -> (states, metrics)`, all [T,…]; states are donated."""
        safe = self._on_cpu and len(self._examples) > 1
        return self._jit([self._update(trial, safe) for trial in self._examples], (2,), {})

    def _update(self, trial: Trial, safe: bool) -> Callable[..., Any]:
        cfg, model = trial.cfg, trial.model
        if safe and isinstance(model.net, UNet):
            model = replace(model, net=UNet(replace(model.net.cfg, scan_safe=True)))
        objective, unroll = trial.objective(model, cfg), self._on_cpu and not (safe or cfg.net.scan_safe)

        def update(seed: Array, current: Any, resident: state.Arrays, rows: state.Arrays) -> Any:
            seeded = replace(cfg, seed=seed)  # type: ignore[arg-type]
            optimizer = optim.make_optimizer(cfg.train)
            step = state.make_step(
                objective, optimizer, make_batch_fn(seeded), cfg.train, seed, unroll=unroll
            )
            return step(current, resident, rows)

        return update

    def _jit(self, branches: list[Callable[..., Any]], donate: tuple[int, ...], options: Any) -> Any:
        def trial(kinds: Array, *stacked: Any) -> Any:
            number, *inputs = jax.tree.map(lambda leaf: leaf[0], (kinds, *stacked))
            found = branches[0](*inputs) if len(branches) == 1 else jax.lax.switch(number, branches, *inputs)
            return jax.tree.map(lambda leaf: leaf[None], found)

        mapped = jax.shard_map(
            trial, mesh=self.mesh, in_specs=P("trial"), out_specs=P("trial"), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donate, compiler_options=options)

    def compiled(self, *inputs: Any) -> Any:
        """The step for inputs of these shapes, compiled once and checked.

        Raises:
          TooLarge: a trial takes more memory than a device has.
        """
        if self._compiled is not None:
            return self._compiled
        compiled = self.step.lower(*inputs).compile()
        if found := collectives(compiled.as_text()):
            raise RuntimeError(f"trials side by side must not communicate, but the program has {found}")
        memory = compiled.memory_analysis()
        if memory is not None:
            needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            if needed > device_bytes():
                raise TooLarge(
                    f"--side-by-side: one cell takes {needed / 1e9:.1f} GB, a device has {device_bytes() / 1e9:.1f} GB; "
                    "train them one after another (--side-by-side no)"
                )
        self._compiled = compiled
        return compiled

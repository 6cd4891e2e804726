"""Where the batches of a run come from: the devices' memory, or the disk.

Either way the batch of a step is `mdiff.data.stream.indices` of (seed, step), so it is the same global batch
for any number of processes and however the images are read, and a run is resumed by asking for its step.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np

from mdiff import config
from mdiff.data import augment
from mdiff.data.split import Subset
from mdiff.data.stream import indices
from mdiff.errors import UserError

STEPS = 2**40
"""More steps than any run has: how far the disk reader could read ahead."""


class Reader(Protocol):
    """Batches by step; use with `mdiff.data.stream.gather` and `finish`.

    Attributes:
      resident: what lives on every device for the whole run; empty if batches bring all they need.
    """

    resident: dict[str, np.ndarray]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the global batch of `step`: the first axis is the batch's."""

    def close(self) -> None:
        """Stop reading ahead."""


def make_reader(
    cfg: config.Config,
    subset: Subset,
    places: np.ndarray | None = None,
) -> Reader:
    """The reader that data.reading asks for.

    Args:
      cfg: uses data, train.batch, seed, net.classes and net.vector.
      subset: from `split` or `load_subset`.
      places: int [b], which places of each batch this process reads; None is all of them.

    Raises:
      UserError: an augmentation is out of range, or the network is conditioned on what the images do not come
        with.
    """
    augment.check(cfg.data)
    places = np.arange(cfg.train.batch) if places is None else places
    rows = Rows(cfg.seed, cfg.train.batch, subset.slots, places)
    columns = _columns(cfg, subset)
    if cfg.data.reading == "disk":
        return DiskReader(subset.train.x, columns, rows)
    return MemoryReader(np.asarray(subset.train.x), columns, rows)


def _columns(cfg: config.Config, subset: Subset) -> dict[str, np.ndarray]:
    """What goes with each training image: its id, and what the network is conditioned on."""
    train, net = subset.train, cfg.net
    columns = {"id": train.id}
    if net.classes:
        if train.label is None:
            raise UserError(
                f"net.classes = {net.classes}: {train.name!r} has no labels; set net.classes to 0"
            )
        columns["label"] = train.label
    if net.vector:
        width = 0 if train.vector is None else train.vector.shape[1]
        if train.vector is None or width != net.vector:
            have = f"has vectors of width {width}" if width else "has no array vector"
            raise UserError(f"net.vector = {net.vector}: {train.name!r} {have}; set net.vector to {width}")
        columns["vector"] = train.vector
    return columns


class Rows:
    """Which training images make this process's part of each batch."""

    def __init__(self, seed: int, batch: int, slots: np.ndarray, places: np.ndarray) -> None:
        self._seed, self._batch, self._slots, self._mine = seed, batch, slots, places

    def __call__(self, step: int) -> np.ndarray:
        """int32 [b] indices into the training images."""
        return indices(self._seed, step, self._batch, self._slots)[self._mine]


class MemoryReader:
    """The training images live on the devices; a batch is an index into them."""

    def __init__(self, x: np.ndarray, columns: dict[str, np.ndarray], rows: Rows) -> None:
        self.resident = {"x": x, **columns}
        self._rows = rows

    def batch(self, step: int) -> dict[str, np.ndarray]:
        return {"index": self._rows(step)}

    def close(self) -> None:
        """Nothing to stop."""


class DiskReader:
    """Each batch is read, decoded and resized ahead of time, by Grain's threads.

    What is read for a step depends on the step alone, so there is no iterator state to store.
    """

    def __init__(self, x: np.ndarray, columns: dict[str, np.ndarray], rows: Rows) -> None:
        import grain

        self.resident: dict[str, np.ndarray] = {}
        threads = max(1, min(4, os.cpu_count() or 1))
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        batches: Any = grain.MapDataset.source(_Batches(x, columns, rows))
        self._iterator = iter(batches.to_iter_dataset(ahead))
        self._next = -1  # reading ahead begins where the first batch is asked for

    def batch(self, step: int) -> dict[str, np.ndarray]:
        if step != self._next:
            self._seek(step)
        batch = next(self._iterator)
        self._next += 1
        return batch

    def close(self) -> None:
        self._iterator.close()

    def _seek(self, step: int) -> None:
        self._iterator.set_state({"next_index": step})
        self._iterator.start_prefetch()
        self._next = step


class _Batches:
    """The batches of a run as a random-access data source of Grain."""

    def __init__(self, x: np.ndarray, columns: dict[str, np.ndarray], rows: Rows) -> None:
        self._x, self._columns, self._rows = x, columns, rows

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: Any) -> dict[str, np.ndarray]:
        rows = self._rows(int(step))
        return {"x": self._x[rows], **{name: column[rows] for name, column in self._columns.items()}}

"""Where the batches of a run come from: the devices' memory, or the disk.

Either way the batch of a step is `mdiff.data.stream.indices` of (seed, step), so it is the same global batch
for any number of processes and however the images are read, and a run is resumed by asking for its step.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np

from mdiff import config
from mdiff.data import augment, cutoffs
from mdiff.data.degrade import noise_keys
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
    levels = _Levels(cfg, subset) if cfg.loss.ambient else None
    if cfg.data.reading == "disk":
        return DiskReader(subset.train.x, columns, rows, levels)
    return MemoryReader(np.asarray(subset.train.x), columns, rows, levels)


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
    if net.text:
        assert train.tokens is not None  # of `captions.tokenize`
        columns["tokens"] = train.tokens
    if cfg.data.degrade != "none":
        columns["noise"] = noise_keys(np.asarray(train.x))  # whose damage; reading from disk is refused
    return columns


class _Levels:
    """The cutoff of each image of a batch; where there are stages, by the step."""

    def __init__(self, cfg: config.Config, subset: Subset) -> None:
        self._cfg, self._each, self.copies = cfg, cutoffs.of_images(cfg, subset.origin), cfg.loss.copies

    def check(self, noise: np.ndarray, ids: np.ndarray) -> None:
        """The same noise at two levels would give the picture away.

        Raises:
          UserError: one picture under two ids, or its mirror image, has two cutoffs above 0.
        """
        seen: dict[tuple[int, int], int] = {}
        for place in np.flatnonzero(self._each > 0):
            first = seen.setdefault((int(noise[place, 0]), int(noise[place, 1])), int(place))
            if self._each[first] != self._each[place]:
                raise UserError(
                    f"loss.cutoff_of: images {ids[first]} and {ids[place]} are one picture with cutoffs "
                    f"{self._each[first]:g} and {self._each[place]:g}: two copies of one noise give it away; give both the same"
                )

    def __call__(self, step: int, rows: np.ndarray) -> np.ndarray:
        """float32 [b]."""
        stage = cutoffs.stage(self._cfg, step)
        return self._each[rows] if stage is None else np.full(len(rows), stage, np.float32)


class Rows:
    """Which training images make this process's part of each batch."""

    def __init__(self, seed: int, batch: int, slots: np.ndarray, places: np.ndarray) -> None:
        self._seed, self._batch, self._slots, self._mine = seed, batch, slots, places

    def __call__(self, step: int) -> np.ndarray:
        """int32 [b] indices into the training images."""
        return indices(self._seed, step, self._batch, self._slots)[self._mine]


class MemoryReader:
    """The training images live on the devices; a batch is an index into them."""

    def __init__(
        self, x: np.ndarray, columns: dict[str, np.ndarray], rows: Rows, levels: _Levels | None = None
    ) -> None:
        self.resident = {"x": x, **columns}
        if levels is not None and levels.copies:
            self.resident["noise"] = noise_keys(x)
            levels.check(self.resident["noise"], columns["id"])
        self._rows, self._levels = rows, levels

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rows = self._rows(step)
        return {"index": rows} | ({} if self._levels is None else {"cutoff": self._levels(step, rows)})

    def close(self) -> None:
        """Nothing to stop."""


class DiskReader:
    """Each batch is read, decoded and resized ahead of time, by Grain's threads.

    What is read for a step depends on the step alone, so there is no iterator state to store.
    """

    def __init__(
        self, x: np.ndarray, columns: dict[str, np.ndarray], rows: Rows, levels: _Levels | None = None
    ) -> None:
        import grain

        self.resident: dict[str, np.ndarray] = {}
        threads = max(1, min(4, os.cpu_count() or 1))
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        batches: Any = grain.MapDataset.source(_Batches(x, columns, rows, levels))
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

    def __init__(
        self, x: np.ndarray, columns: dict[str, np.ndarray], rows: Rows, levels: _Levels | None
    ) -> None:
        self._x, self._columns, self._rows, self._levels = x, columns, rows, levels

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: Any) -> dict[str, np.ndarray]:
        rows = self._rows(int(step))
        batch = {"x": self._x[rows], **{name: column[rows] for name, column in self._columns.items()}}
        if self._levels is not None:
            batch["cutoff"] = self._levels(int(step), rows)
            if self._levels.copies:
                batch["noise"] = noise_keys(batch["x"])
        return batch

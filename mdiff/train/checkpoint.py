"""Checkpoints: orbax behind a few functions, so that its next API generation is a local change.

Saving is asynchronous and atomic: a checkpoint is a directory that orbax renames into place and marks
complete. Beside the state each holds a small JSON `meta` (the run's clock and position), and the sums of its
files, since tensorstore does not notice a changed bit inside an array. A checkpoint that is not whole is
passed over for the next older one, and said so.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from mdiff import config, processes
from mdiff.errors import UserError
from mdiff.files import absolute, below, free_bytes, is_local, remove, write_json

_FAILURES = (ValueError, OSError, KeyError, TypeError, RuntimeError)
"""What orbax and tensorstore raise when reading or writing fails (they document no narrower type)."""

_ITEMS = ("state", "meta")
_SUMS = "sums.json"
_UNFINISHED = ".orbax-checkpoint-tmp"
_COMMITTED = "commit_success.txt"
_OVERHEAD = 1 << 20  # bytes of a checkpoint beside its arrays, generously


def _sums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint's items, by path below it; on an object store, which has sums, its size."""
    files = sorted(file for item in _ITEMS for file in below(checkpoint / item))
    found = {}
    for file in files:
        name = file.relative_to(checkpoint).as_posix()
        if is_local(file):
            with file.open("rb") as opened:
                found[name] = hashlib.file_digest(opened, "sha256").hexdigest()
        elif file.name != _COMMITTED:
            found[name] = str(file.stat().length)  # type: ignore[attr-defined]
    return found


def _damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint, "" when they are as they were written."""
    try:
        written = json.loads((checkpoint / _SUMS).read_text())
        found = _sums(checkpoint)
    except (OSError, ValueError):
        return f"{_SUMS} is missing or damaged"
    for name in written:
        if found.get(name) != written[name]:
            return f"{name} {'has changed' if name in found else 'is missing'}"
    return ""


def _is_news(record: logging.LogRecord) -> bool:
    """False for orbax's warnings that a save waited (the ledger counts it), and of preemption (the loop says so)."""
    text = record.getMessage()
    return not (text.startswith("Waiting for previous save") or "preemption sync point" in text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


class _Pinned(policies.PreservationPolicy):
    """Preserves one step, which may change."""

    def __init__(self) -> None:
        self.step = -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [each.step == self.step for each in checkpoints]


class Checkpoints:
    """The checkpoints of one run (`keep` newest; None keeps all); a context manager, so that pending saves finish.

    A state is any pytree with a `step` [].
    """

    def __init__(self, folder: Path, keep: int | None, keep_every: int = 0) -> None:
        self._pinned = _Pinned()
        kept: list[Any] = [policies.LatestN(keep), self._pinned]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self.folder = absolute(folder)
        self._saving = -1
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides when
                preservation_policy=policies.AnyPreservationPolicy(kept),
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Failed writes, which surface in whichever call waits for them, as one line."""
        absl = logging.getLogger("absl")
        absl.addFilter(_is_news)
        try:
            yield
        except _FAILURES as error:
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({_first_line(error)}); make room or permit writing, "
                "then run the same command again"
            ) from error
        finally:
            absl.removeFilter(_is_news)

    def _seal(self) -> None:
        """Write the sums; orbax calls this when all files are there and the directory is not yet renamed."""
        if processes.is_first():
            for unfinished in self._unfinished(self._saving):
                write_json(unfinished / _SUMS, _sums(unfinished))

    def _unfinished(self, step: int | None = None) -> list[Path]:
        """Folders of saves under way or killed: of one step, or of all."""
        if is_local(self.folder):
            return list(self.folder.glob(f"{'*' if step is None else step}{_UNFINISHED}*"))
        # Nothing is renamed on an object store: orbax marks a finished checkpoint by a file in it.
        found = (path for path in self.folder.glob("*") if path.name.isdigit())
        return [path for path in found if step in (None, int(path.name)) and not (path / _COMMITTED).exists()]

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def pin(self, step: int) -> None:
        """Keep the checkpoint of `step`, however old it gets, in place of the one pinned before."""
        self._pinned.step = step

    def save(self, state: Any, meta: dict[str, Any]) -> None:
        """Save `state` at its own step; returns at once. Saving the newest step again does nothing.

        Raises:
          UserError: there is no room, or this save or the last one failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
        processes.from_first(lambda: self._check_room(needed))
        self._saving = step
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._manager.save(step, args=args)

    def _check_room(self, needed: int) -> None:
        free = free_bytes(self.folder)
        if free < needed:
            raise UserError(
                f"{self.folder}: {free / 1e6:.1f} MB free, but a checkpoint takes {needed / 1e6:.1f} MB; free some "
                f"space, then run the same command again: checkpoints {self.steps()} are kept"
            )

    def wait(self) -> None:
        """Block until pending saves are complete.

        Raises:
          UserError: one of them failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def discard_after(self, step: int) -> None:
        """Delete checkpoints newer than `step`, so that training can save those steps again, and what
        killed saves left behind."""
        self.wait()
        for later in self.steps():
            if later > step:
                self._manager.delete(later)
        if processes.is_first():
            for unfinished in self._unfinished():
                remove(unfinished)
        processes.wait("checkpoints discarded")

    def damage(self, step: int) -> str:
        """What is wrong with the files of a checkpoint, as one line; "" when they are as they were written."""
        # Before orbax, which also prints tracebacks of its threads when a file is cut.
        damage = processes.from_first(lambda: _damage(self.folder / str(step)))
        return f"checkpoint {step} in {self.folder} cannot be read ({damage})" if damage else ""

    def whole(self, warn: Callable[[str], None]) -> list[int]:
        """Steps of undamaged checkpoints, oldest first; `warn` is told about the others."""
        damages = {step: self.damage(step) for step in self.steps()}
        for damage in filter(None, damages.values()):
            warn(damage)
        return [step for step, damage in damages.items() if not damage]

    def read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """One checkpoint as (state, meta), in the shapes, dtypes and shardings of `abstract`.

        Raises:
          UserError: it cannot be read.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())

        def restore() -> Any:
            try:
                return self._manager.restore(step, args=items)
            except _FAILURES as error:
                raise UserError(
                    f"checkpoint {step} in {self.folder} cannot be read ({_first_line(error)})"
                ) from error

        restored = processes.together(restore)
        return restored["state"], restored["meta"]

    def restore(
        self, abstract: Any, warn: Callable[[str], None], only: int | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest readable checkpoint as (state, meta); None when there is none.

        Args:
          abstract: the state's shapes, dtypes and shardings (`plan_state`).
          warn: told about each unreadable checkpoint that was passed over.
          only: restore this step or none.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        steps = [step for step in self.steps() if only in (None, step)]
        for step in reversed(steps):
            damage = self.damage(step)
            if damage:
                warn(damage)
                continue
            try:
                found = self.read(step, abstract)
            except UserError as error:
                warn(str(error))
                continue
            if step != steps[-1]:
                warn(f"using checkpoint {step} instead")
            return found
        if steps:
            raise UserError(
                f"{self.folder}: none of the checkpoints {steps} can be read; move the folder away to start over"
            )
        return None


def open_run(folder: Path, cfg: config.Train) -> Checkpoints:
    """The checkpoints of the run in `folder`, kept as the config says."""
    return Checkpoints(folder / "checkpoints", cfg.keep, cfg.keep_every)

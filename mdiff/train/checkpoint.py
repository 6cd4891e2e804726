"""Checkpoints: orbax behind a few functions, so that its next API generation is a local change.

Saving is asynchronous and atomic: a checkpoint is a directory that orbax renames into place and marks
complete. Beside the state each holds a small JSON `meta` (the run's clock and position). A checkpoint that
cannot be read is passed over for the next older one, and said so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from mdiff import config
from mdiff.errors import UserError
from mdiff.train.state import TrainState

_UNREADABLE = (ValueError, OSError, KeyError, TypeError, RuntimeError)
"""What orbax and tensorstore raise for missing, cut or garbled files (they document no narrower type)."""


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that pending saves finish."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides when
                preservation_policy=policies.AnyPreservationPolicy(kept),
                enable_async_checkpointing=True,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Save `state` at its own step; returns at once. Saving the newest step again does nothing."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        )

    def wait(self) -> None:
        """Block until pending saves are complete."""
        self._manager.wait_until_finished()

    def discard_after(self, step: int) -> None:
        """Delete checkpoints newer than `step`, so that training can save those steps again."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def restore(
        self, abstract: Any, warn: Callable[[str], None], only: int | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
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
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
                    ),
                )
            except _UNREADABLE as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                warn(f"checkpoint {step} in {self.folder} cannot be read ({lines[0][:160]})")
                continue
            return restored["state"], restored["meta"]
        if steps:
            raise UserError(
                f"{self.folder}: none of the checkpoints {steps} can be read; move the folder away to start over"
            )
        return None


def open_run(folder: Path, cfg: config.Train) -> Checkpoints:
    """The checkpoints of the run in `folder`, kept as the config says."""
    return Checkpoints(folder / "checkpoints", cfg.keep, cfg.keep_every)

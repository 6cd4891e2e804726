"""Scalars of a run: `metrics.jsonl` and TensorBoard event files, consistent across interruptions."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mdiff.errors import UserError
from mdiff.files import write_text


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`; a last line cut off by a kill is left out.

    Raises:
      UserError: another line is damaged.
    """
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text().splitlines(keepends=True)
    for place, line in enumerate(lines):
        if place == len(lines) - 1 and not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}: line {place + 1} is damaged; delete that line") from None
    return rows


class _Board:
    """A TensorBoard event file, written in the caller's thread.

    tensorboardX's own SummaryWriter hands rows to a thread, which prints tracebacks when the disk is full.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"))
        self._add(Event(file_version="brain.Event:2"))
        # Makes TensorBoard forget what a killed run wrote from this step on.
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._add(Event(step=step, summary=scalar(name, value)))
        self._records.flush()

    def close(self) -> None:
        self._records.close()


class Metrics:
    """Appends rows; opening at step k first drops rows of later steps, which a killed run may have left.

    Use as a context manager.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "metrics.jsonl"
        rows = [row for row in read(self._path) if row["step"] <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self._path.open("a")
        self._board = _Board(folder / "tensorboard", step + 1)
        self.evaluated = {row["step"] for row in rows if any(name.startswith("eval/") for name in row)}

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One row, flushed at once."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        self._board.write(step, scalars)
        if any(name.startswith("eval/") for name in scalars):
            self.evaluated.add(step)

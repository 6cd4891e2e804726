"""Scalars of a run: `metrics.jsonl` and TensorBoard event files, consistent across interruptions.

On a disk they are appended to. Objects of a store cannot be: there both files grow in a scratch folder of this
machine and are copied whole from time to time.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mdiff.errors import UserError
from mdiff.files import is_local, is_writer, upload, write_text

COPY_EVERY = 30.0
"""Seconds between two copies to an object store, at least."""


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
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._records = RecordWriter(str(self.path))
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

    Use as a context manager. Of a job of many processes only the first one reads and writes.

    Attributes:
      evaluated: steps that have an evaluation; empty on other processes.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.evaluated: set[int] = set()
        self._writes = is_writer()
        self._open = ExitStack()
        if not self._writes:
            return
        path = folder / "metrics.jsonl"
        rows = [row for row in read(path) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(path, text)
        self.evaluated |= {row["step"] for row in rows if any(name.startswith("eval/") for name in row)}
        self._store = None if is_local(folder) else folder
        self._here = folder
        if self._store is not None:
            self._here = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="mdiff-")))
            write_text(self._here / path.name, text)
        self._copied = time.monotonic()
        self._file = self._open.enter_context((self._here / path.name).open("a"))
        self._board = _Board(self._here / "tensorboard", step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if self._writes:
                self._board.close()
                self.flush()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One row; on a disk it is there at once."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        self._board.write(step, scalars)
        if any(name.startswith("eval/") for name in scalars):
            self.evaluated.add(step)
        if time.monotonic() - self._copied > COPY_EVERY:
            self.flush()

    def flush(self) -> None:
        """Bring an object store up to date; call when a checkpoint is saved, so that no row before it is lost."""
        if self._writes and self._store is not None:
            for path in (self._here / "metrics.jsonl", self._board.path):
                upload(path, self._store / path.relative_to(self._here).as_posix())
            self._copied = time.monotonic()

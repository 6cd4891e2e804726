"""Scalars of a run: `metrics.jsonl` and TensorBoard event files, consistent across interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter

from mdiff.files import write_text


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text().splitlines(keepends=True)
    for place, line in enumerate(lines):
        if place == len(lines) - 1 and not line.endswith("\n"):
            break
        rows.append(json.loads(line))
    return rows


class Metrics:
    """Appends rows; opening at step k first drops rows of later steps, which a killed run may have left.

    Use as a context manager.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "metrics.jsonl"
        rows = [row for row in read(self._path) if row["step"] <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
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
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if any(name.startswith("eval/") for name in scalars):
            self.evaluated.add(step)

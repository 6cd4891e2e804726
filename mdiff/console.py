"""What a person sees while work is running: progress bars, or sparse plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PARTS = 10  # plain lines of a task, but none sooner than `_SOON` and none later than `_LATE` seconds
_SOON, _LATE = 5.0, 60.0


def make_progress(console: Console) -> Progress:
    """Bars with count, elapsed time, time left and a short text; plain lines when not on a terminal."""
    kind = Progress if console.is_terminal else _Lines
    return kind(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


class _Lines(Progress):
    """Progress for logs: a line per tenth of a slow task, at least one a minute, and one at the end."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._printed: dict[TaskID, tuple[int, float]] = {}

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """See `rich.progress.Progress.update`; then prints a line if one is due."""
        super().update(task_id, **fields)
        task = self._tasks[task_id]
        if not task.total:
            return
        now, part = self.get_time(), int(_PARTS * task.completed // task.total)
        last, when = self._printed.setdefault(task_id, (0, now))
        due = part > last and now - when >= _SOON
        ended = part >= _PARTS > last
        if not (ended or due or (now - when >= _LATE and last < _PARTS)):
            return
        self._printed[task_id] = (part, now)
        text = f"{task.description}: {task.completed:.0f} of {task.total:.0f}"
        if task.fields.get("note"):
            text += f", {task.fields['note']}"
        if task.elapsed is not None and task.elapsed >= 1:
            text += f", {task.elapsed:.0f} s"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def note(scalars: Mapping[str, float]) -> str:
    """The newest values, shortly."""
    parts = []
    if "loss" in scalars:
        parts.append(f"loss {scalars['loss']:.4f}")
    if scalars.get("images_per_second"):
        parts.append(f"{scalars['images_per_second']:.0f} images/s")
    return ", ".join(parts)


class Monitor:
    """Progress of each task; use as a context manager. `quiet`: shows and says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._progress = make_progress(self._console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Monitor:
        return self  # the bars start with the first task, so that an early error stands alone

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            self._progress.live.transient = error is not None  # an error is one line, without a bar above it
            self._progress.stop()

    def progress(self, task: str, done: int, total: int, scalars: Mapping[str, float]) -> None:
        """See `mdiff.train.loop.Monitor`."""
        if not self._tasks:
            self._progress.start()
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, note="")
        self._progress.update(self._tasks[task], completed=done, total=total, note=note(scalars))

    def say(self, message: str) -> None:
        """See `mdiff.train.loop.Monitor`."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

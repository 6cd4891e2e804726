"""What a person sees while work is running: rich progress bars with the time left."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

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


def make_progress(console: Console) -> Progress:
    """Bars with count, elapsed time, time left and a short text."""
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def note(scalars: Mapping[str, float]) -> str:
    """The newest values, shortly."""
    parts = []
    if "loss" in scalars:
        parts.append(f"loss {scalars['loss']:.4f}")
    if scalars.get("images_per_second"):
        parts.append(f"{scalars['images_per_second']:.0f} images/s")
    return ", ".join(parts)


class Monitor:
    """Progress bars on the terminal, one per task; use as a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
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

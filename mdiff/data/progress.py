"""A progress bar for work on data that takes longer than a moment."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console

from mdiff.console import make_progress

T = TypeVar("T")
Track = Callable[[Iterable[T], int], Iterable[T]]
"""`(items, how many) -> the same items`, showing how many have been taken."""


@contextlib.contextmanager
def progress(task: str) -> Iterator[Track]:
    """Yields a `Track` whose bar stands on the terminal; nothing is shown where there is none."""
    # A console that asks for sys.stderr anew each time would be silenced with the libraries' chatter.
    console = Console(file=sys.stderr)
    bar = make_progress(console)

    def track(items: Iterable[T], total: int) -> Iterable[T]:
        shown = bar.add_task(task, total=total, note="")
        for item in items:
            yield item
            bar.advance(shown)

    with bar:
        yield track

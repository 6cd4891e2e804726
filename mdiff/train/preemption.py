"""SIGTERM and Ctrl-C as a request to save and stop, not as death."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set once a signal has asked the run to stop.

    Attributes:
      signal: name of the signal, "" while there was none.
    """

    def __init__(self) -> None:
        self.signal = ""

    def __bool__(self) -> bool:
        return bool(self.signal)


@contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Within the block, the first SIGTERM or SIGINT sets the request; a second one acts as usual.

    `say` is told about the first, since a compilation that is under way has to end before the save.
    Call from the main thread of a single-process run.
    """
    request = StopRequest()
    handled = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in handled}

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        for each, handler in previous.items():
            signal.signal(each, handler)
        say(f"{request.signal}: saving and stopping after this step; once more stops at once")

    for number in handled:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

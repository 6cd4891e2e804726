"""SIGTERM and Ctrl-C as a request to save and stop, not as death.

In a process of its own a signal is heard at once and the run stops after the step. In a job of several processes
(`mdiff.processes`) SIGTERM on any of them is a preemption notice, which spreads: all agree on a step not far ahead
and stop there. Ctrl-C is passed on as such a notice.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from mdiff import processes


class StopRequest:
    """Set once something has asked the run to stop.

    Attributes:
      signal: name of the signal, "" while there was none.
    """

    def __init__(self) -> None:
        self.signal = ""

    def due(self, step: int) -> bool:
        """Is the run to stop at `step`? Ask after every step; in a job every process asks."""
        if jax.distributed.is_initialized():
            if not processes.preempted(step):
                return False
            self.signal = self.signal or "SIGTERM"  # on this process or another one
        return bool(self.signal)


@contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Within the block, the first SIGTERM or SIGINT sets the request; a second one acts as usual.

    `say` is told about the first, since a compilation that is under way has to end before the save.
    Call from the main thread.
    """
    request = StopRequest()
    in_job = jax.distributed.is_initialized()
    # In a job SIGTERM belongs to jax's own notice.
    handled = (signal.SIGINT,) if in_job else (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in handled}

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        for each, handler in previous.items():
            signal.signal(each, handler)
        if in_job:
            say(f"{request.signal}: all processes save and stop after one of the next steps")
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            say(f"{request.signal}: saving and stopping after this step; once more stops at once")

    for number in handled:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""A command as one process of a job: joining it, holding its folder, and who speaks when something is wrong.

Nothing here imports JAX until a job begins, so that `mdiff --help` is quick.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mdiff import config
from mdiff.arguments import option
from mdiff.console import Monitor
from mdiff.errors import UserError

T = TypeVar("T")

RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")
"""Where clusters say which process of a job this is."""


@dataclass(frozen=True)
class Job:
    """What a command works with.

    Attributes:
      monitor: shows progress on the first process, nothing on others.
      held: closed when the command ends.
      first: this process writes the files.
    """

    monitor: Monitor
    held: ExitStack
    first: bool
    _locks: list[Any] = field(default_factory=list)

    def prepare(self, folder: Path, work: Callable[[], T]) -> T:
        """What `work()` makes on every process; then no other job may write into `folder`.

        In this order, so that a mistake leaves nothing behind.

        Raises:
          UserError: on all processes, when it fails on one or the folder is another job's.
        """
        from mdiff import processes

        made = processes.together(work)
        processes.from_first(lambda: self._hold(folder))
        return made

    def _hold(self, folder: Path) -> None:
        from mdiff import lock

        self._locks.append(self.held.enter_context(lock.hold(folder, self.monitor.say)))

    def check(self) -> None:
        """Is the folder still ours? Ask before a save; on the first process.

        Raises:
          UserError: another job took it over, while this process was suspended, say.
        """
        for each in self._locks:
            each.check()


@contextmanager
def join(
    name: str, cfg: config.Processes, settings: Mapping[str, Any], *, notices: bool = False
) -> Iterator[Job]:
    """Become part of the job of command `name`, if there is one.

    Args:
      name: the command.
      cfg: which process this is.
      settings: plain JSON that all processes must agree on.
      notices: SIGTERM asks to save and stop.
    """
    from mdiff import processes

    processes.join(cfg, notices=notices)
    processes.check_same("config", {"command": name, **settings})
    with Monitor(quiet=not processes.is_first()) as monitor, ExitStack() as held:
        yield Job(monitor, held, processes.is_first())


def resume_line(name: str, arguments: Sequence[str]) -> str:
    """How to go on with the command that was stopped."""
    each = ", each process with its own --processes.index" if option(arguments, "processes.index") else ""
    return f"resume with{each}: {shlex.join(['mdiff', name, *arguments])}"


def fail(error: UserError) -> int:
    """One line and exit code 2; in a job one line for all processes, or one from the process with the problem."""
    if "jax" not in sys.modules or not sys.modules["jax"].distributed.is_initialized():
        if next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0":
            print(f"mdiff: {error}", file=sys.stderr)
        return 2
    from mdiff import processes

    if processes.is_first():
        print(f"mdiff: {error}", file=sys.stderr)
    elif not error.shared:
        print(f"mdiff: process {processes.index()}: {error}", file=sys.stderr)
    if processes.count() > 1 and not error.shared:
        sys.stderr.flush()
        os._exit(2)  # the others may wait for this process in a computation; its absence ends them
    return 2

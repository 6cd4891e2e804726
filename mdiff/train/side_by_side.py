"""Many small trainings at once, one per device (`mdiff.train.trials`), with the files and the order of `loop.train`.

A trial's folder is that of any run: what is saved for it is its slice of the stacked state. One that diverges is
marked and runs on unread; the others do not notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mdiff import processes
from mdiff.data.reader import Reader, make_reader
from mdiff.data.split import save_subset
from mdiff.errors import UserError
from mdiff.train import checkpoint, loop, snapshots, state, stopping, workdir
from mdiff.train.ledger import Ledger
from mdiff.train.metrics import Metrics
from mdiff.train.preemption import StopRequest, stop_on_signal
from mdiff.train.trials import Program, Trial
from mdiff.trees import nbytes, size


def to_host(tree: Any) -> Any:
    """Stacked arrays [T,…] as numpy arrays, on every process."""
    if processes.count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def _slice(tree: Any, place: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf[place]), tree)


class _Run:
    """The files of one trial while it trains; `failure` is set once its loss was not finite, `early` once it left a limit."""

    def __init__(self, trial: Trial, abstract: Any, begin: int, stack: ExitStack) -> None:
        cfg, folder, every = trial.cfg, trial.folder, trial.cfg.train.ema_every
        resuming, averaged = processes.from_first(
            lambda: [workdir.check(folder, cfg, nbytes(abstract)), bool(every) or snapshots.stored(folder)]
        )
        processes.from_first(lambda: stopping.check_run(folder, cfg.train, begin))
        self.trial, self.every = trial, every
        self.failure: loop.Diverged | None = None
        self.early: stopping.Stopped | None = None
        processes.from_first(functools.partial(stopping.forget, folder))  # it would not be trained otherwise
        self.ledger = processes.together(
            lambda: Ledger.load(folder / "ledger.json") if resuming else Ledger()
        )
        self.checkpoints = stack.enter_context(checkpoint.open_run(folder, cfg.train))
        self.averages = stack.enter_context(snapshots.Snapshots(folder)) if averaged else None
        self.stores = [self.checkpoints] + ([self.averages] if self.averages is not None else [])
        self.restored: Any = None
        if begin:
            found = self.checkpoints.restore(abstract, trial.monitor.say, begin)
            if found is None:
                raise UserError(f"{folder}: checkpoint {begin} is gone; run the same command again")
            self.restored = jax.tree.map(np.asarray, found[0])  # whole on every device
        workdir.write(folder, cfg, trial.model.shape, size(abstract.params))
        save_subset(folder / "subset.json", trial.subset, cfg.data)
        for kept in self.stores:
            kept.discard_after(begin)
        self.metrics = stack.enter_context(Metrics(folder, begin))
        self.log = loop.Log(cfg, self.metrics, self.ledger, trial.monitor)
        self.evaluated = set(processes.from_first(lambda: sorted(self.metrics.evaluated)))
        self.good = max(self.evaluated & set(self.checkpoints.steps()), default=begin)
        self.checkpoints.pin(self.good)

    @property
    def over(self) -> bool:
        """Does it run on unread?"""
        return self.failure is not None or self.early is not None

    def flush(self, step: int) -> None:
        if self.over:
            return
        try:
            self.log.flush(step)
        except loop.Diverged as error:
            self.failure = error
            for kept in self.stores:
                kept.discard_after(error.step - 2)

    def measure(self, ema: Any, step: int) -> bool:
        """Measure; True when the state is to be saved, as one within limits."""
        assert self.trial.evaluator is not None
        scalars, limits = self.trial.evaluator(ema, step), self.trial.cfg.train.stop_when
        self.early = loop.agreed(lambda: stopping.exceeded(limits, scalars, step, self.good))
        if self.early is not None:
            self.trial.monitor.say(str(self.early))
            processes.from_first(functools.partial(stopping.save, self.trial.folder, self.early))
        self.metrics.write(step, scalars)
        self.evaluated.add(step)
        if self.early is not None:
            for kept in self.stores:
                kept.discard_after(self.good)
        elif limits:
            self.good = step
            self.checkpoints.pin(step)
        return bool(limits) and self.early is None

    def save(self, current: state.TrainState) -> None:
        if self.averages is not None:
            self.averages.wait()  # a run resumed here will not pass earlier snapshots again
        self.checkpoints.save(current, {"ledger": self.ledger.as_json()})
        self.ledger.save(self.trial.folder / "ledger.json")
        self.settle()

    def store(self, snapshot: snapshots.Snapshot) -> None:
        """Write the averages of this step."""
        assert self.averages is not None
        self.averages.save(snapshot, snapshots.meta(self.trial.cfg))
        self.settle()

    def settle(self) -> None:
        """Of several processes, finish writing before the next trial's files: orbax's threads would meet in any order."""
        if processes.count() > 1:
            self.wait()

    def wait(self) -> None:
        for kept in self.stores:
            kept.wait()


@contextmanager
def _clock(runs: Sequence[_Run], cause: str) -> Iterator[None]:
    """Charge the block's seconds to every trial: each had a device for that long."""
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.ledger.time(cause))
        yield


@dataclass(frozen=True)
class Fate:
    """How a trial ended before the others, if it did.

    Attributes:
      diverged: its loss was not finite.
      early: it left a limit of train.stop_when.
    """

    diverged: loop.Diverged | None
    early: stopping.Stopped | None


@dataclass
class Clock:
    """Steps that this process has counted; agreed stops (`processes.preempted`) need numbers that only rise."""

    steps: int = 0


def train(
    program: Program, trials: Sequence[Trial], begin: int, say: Callable[[str], None], counted: Clock
) -> tuple[str, list[Fate]]:
    """Train up to `program.width` trials side by side from step `begin`, which all their folders have a checkpoint of.

    The order of `loop.train`: evaluate, checkpoint, next batch, step, log.

    Returns:
      Name of the signal that stopped them, or "", and for each trial how it diverged or left a limit, if it did: the
      others go on.

    Raises:
      UserError: a folder belongs to another run or cannot be written.
      TooLarge: a trial does not fit a device; nothing was trained.
    """
    with stop_on_signal(say) as stop, ExitStack() as stack:
        runs = [_Run(trial, program.abstract, begin, stack) for trial in trials]
        with _clock(runs, "start"):
            stopped = _steps(program, runs, begin, stop, say, stack, counted)
        with _clock(runs, "checkpoint"):
            for run in runs:
                run.wait()
    for run in runs:
        run.ledger.save(run.trial.folder / "ledger.json")
    return stopped, [Fate(run.failure, run.early) for run in runs]


def _steps(
    program: Program,
    runs: list[_Run],
    begin: int,
    stop: StopRequest,
    say: Callable[[str], None],
    stack: ExitStack,
    counted: Clock,
) -> str:
    # Places beyond the trials repeat the first one, unread: the program stays the same for every part of a sweep.
    slots = [place if place < len(runs) else 0 for place in range(program.width)]
    chosen = [runs[slot].trial for slot in slots]
    steps = chosen[0].cfg.train.steps
    readers: dict[int, Reader] = {}
    for slot in sorted({slots[place] for place in program.here}):
        trial = runs[slot].trial
        readers[slot] = stack.enter_context(closing(make_reader(trial.cfg, trial.subset)))
    any_reader = next(iter(readers.values()))

    numbers = program.numbers(chosen)
    if begin:
        current = program.stack(runs[0].restored, lambda place: runs[slots[place]].restored)
        for run in runs:
            run.restored = None
    else:
        current = program.fresh(*numbers)
    resident = program.stack(
        program.resident(any_reader), lambda place: program.resident(readers[slots[place]])
    )

    def next_rows(step: int) -> state.Arrays:
        batches = {slot: reader.batch(step) for slot, reader in readers.items()}
        rows: state.Arrays = program.stack(next(iter(batches.values())), lambda place: batches[slots[place]])
        return rows

    update = None
    if begin < steps:
        known = program.is_compiled
        with _clock(runs, "compile"):
            update = program.compiled(*numbers, current, resident, next_rows(begin))
        if not known:
            say(f"train step of the cells compiled; {runs[0].ledger.seconds['compile']:.0f} s in all")

    pending: list[Any] = []

    def fetch() -> None:
        """Hand the metrics that are still on the devices to each trial's log."""
        with _clock(runs, "train"):
            for values in to_host(pending):
                for place, run in enumerate(runs):
                    if not run.over:
                        run.log.add({name: value[place] for name, value in values.items()})
        pending.clear()

    def flush(which: Sequence[_Run], step: int) -> list[_Run]:
        fetch()
        for run in which:
            run.flush(step)
        return [run for run in which if not run.over]

    def measure(which: Sequence[_Run], step: int) -> None:
        which = [run for run in which if step not in run.evaluated and run.trial.evaluator is not None]
        if judged := [run for run in which if run.trial.cfg.train.stop_when]:
            flush(judged, step)  # a state that diverged is not to be judged
            which = [run for run in which if not run.over]
        if which:
            with _clock(runs, "evaluate"):
                ema = to_host(current.ema)
                good = [run for run in which if run.measure(_slice(ema, runs.index(run)), step)]
            if good:
                save(good, step)

    def save(which: Sequence[_Run], step: int) -> None:
        if which := flush(which, step):
            with _clock(runs, "checkpoint"):
                whole = to_host(current)
                for run in which:
                    run.save(_slice(whole, runs.index(run)))

    def store(step: int) -> None:
        due = [run for run in runs if run.every and step and step % run.every == 0 and not run.over]
        if due := flush(due, step) if due else []:
            with _clock(runs, "checkpoint"):
                whole = to_host(snapshots.snapshot(current))
                for run in due:
                    run.store(_slice(whole, runs.index(run)))

    def due(every: str, step: int) -> list[_Run]:
        found = []
        for run in runs:
            n = getattr(run.trial.cfg.train, every)
            if not run.over and n and step % n == 0:
                found.append(run)
        return found

    step = begin
    if begin == 0 and (first := [run for run in runs if run.trial.cfg.train.stop_when]):
        save(first, 0)
    while step < steps and not all(run.over for run in runs):
        if step:
            measure(due("eval_every", step), step)
        if step > begin and (saving := due("save_every", step)):
            save(saving, step)
        store(step)
        with _clock(runs, "data"):
            rows = next_rows(step)
        with _clock(runs, "train"):
            assert update is not None
            current, values = update(*numbers, current, resident, rows)
            pending.append(values)
            step += 1
            if logging := due("log_every", step):
                flush(logging, step)
        counted.steps += 1
        if stop.due(counted.steps):
            break
    alive = flush(runs, step)
    if not stop.signal:
        measure(alive, step)
    save([run for run in alive if not run.over], step)
    store(step)
    return stop.signal

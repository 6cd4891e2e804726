"""The only loop with side effects.

Its order is a contract: evaluate on the old state, checkpoint state and clock together, next batch, step,
log. A checkpoint at step k therefore stands after the evaluation at k and before batch k, and a resumed
run repeats nothing and skips nothing. With `train.stop_when` every evaluation within the limits is
checkpointed too, so that one beyond them can go back (`mdiff.train.stopping`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config, processes
from mdiff.data.reader import make_reader
from mdiff.data.split import Subset, save_subset
from mdiff.errors import UserError
from mdiff.nets.denoiser import Model
from mdiff.train import checkpoint, mesh, snapshots, state, stopping, workdir
from mdiff.train.ledger import Ledger
from mdiff.train.metrics import Metrics
from mdiff.train.preemption import StopRequest, stop_on_signal
from mdiff.train.program import train_program
from mdiff.trees import nbytes, size
from mdiff.types import Array, Evaluator, Objective, Params


class Diverged(UserError):
    """A loss or gradient was not finite.

    Attributes:
      step: the step that was not finite, counted from 1.
    """

    shared = True  # the loss is one number

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Monitor(Protocol):
    """What watches a run: the command line's progress bar, or nothing."""

    def progress(self, task: str, done: int, total: int, scalars: Mapping[str, float]) -> None:
        """`done` of `total` parts of `task` are finished; `scalars` are the newest values, if any."""

    def say(self, message: str) -> None:
        """One line for the user."""


@dataclass(frozen=True)
class Outcome:
    """How a training run ended.

    Attributes:
      state: the state it ended in.
      stopped: name of the signal that came, or ""; the run is unfinished then, unless `early` says why it ended.
      early: why `train.stop_when` ended it, or None.
    """

    state: state.TrainState
    stopped: str
    early: stopping.Stopped | None = None


def train(
    cfg: config.Config,
    model: Model,
    objective: Objective,
    subset: Subset,
    folder: Path,
    monitor: Monitor,
    evaluator: Evaluator | None = None,
    init_from: Params | None = None,
    guard: Callable[[], None] | None = None,
) -> Outcome:
    """Train, or go on training, the run in `folder`.

    Args:
      cfg: the experiment.
      model: its network and process.
      objective: per-example loss.
      subset: training images and the order of an epoch.
      folder: the run's folder; holds config, checkpoints, metrics, ledger.
      monitor: told about progress.
      evaluator: called on (averaged parameters, step) every `train.eval_every` steps and at the end.
      init_from: parameters to start from instead of fresh ones (fine-tuning); ignored on resume.
      guard: called before every save, on the first process; raises `UserError` when the folder is no longer ours.

    Returns:
      The final state and whether a signal ended the run early.

    Raises:
      UserError: the folder belongs to another run or cannot be written; the loss is not finite.
    """
    device_mesh = processes.together(lambda: mesh.make_mesh(cfg.mesh))
    program = processes.together(lambda: train_program(cfg, model, objective, device_mesh))
    abstract, every = program.abstract, cfg.train.ema_every
    snapshot_bytes = nbytes(abstract.profiles) * (cfg.train.steps // every) if every else 0
    resuming, averaged = processes.from_first(
        lambda: [
            workdir.check(folder, cfg, nbytes(abstract), snapshot_bytes),
            bool(every) or snapshots.stored(folder),
        ]
    )
    places = mesh.batch_places(device_mesh, cfg.train.batch)

    ledger = processes.together(lambda: Ledger.load(folder / "ledger.json") if resuming else Ledger())
    with (
        stop_on_signal(monitor.say) as stop,
        ledger.time("start"),
        closing(make_reader(cfg, subset, places)) as reader,
        checkpoint.open_run(folder, cfg.train) as checkpoints,
        snapshots.Snapshots(folder) if averaged else nullcontext() as averages,
    ):
        stores = [checkpoints] if averages is None else [checkpoints, averages]
        early = agreed(lambda: stopping.load(folder, cfg.train))
        if early is not None:
            monitor.say(f"{early}; raise train.stop_when to go on")
            return _early(early, checkpoints, stores, abstract, monitor, stop)
        newest = max(checkpoints.steps(), default=0)
        processes.from_first(lambda: stopping.check_run(folder, cfg.train, newest))
        processes.from_first(lambda: stopping.forget(folder))
        restored = checkpoints.restore(abstract, monitor.say)
        current = program.fresh() if restored is None else restored[0]
        if restored is None and init_from is not None:
            current = _with_params(current, init_from)
        workdir.write(folder, cfg, model.shape, size(current.params))
        save_subset(folder / "subset.json", subset, cfg.data)
        begin = int(current.step)
        for kept in stores:
            kept.discard_after(begin)
        if begin:
            monitor.say(f"resuming at step {begin}")

        resident = mesh.place(reader.resident, mesh.replicated(device_mesh))

        def next_rows(step: int) -> state.Arrays:
            """The global batch of `step`, of which each process reads its own rows."""
            return mesh.place_batch(reader.batch(step), places, cfg.train.batch, device_mesh)

        if begin < cfg.train.steps:
            with ledger.time("compile"):
                update = program.step.lower(current, resident, next_rows(begin)).compile()
            monitor.say(f"train step compiled; {ledger.seconds['compile']:.0f} s in all")

        with Metrics(folder, begin) as metrics:
            log = Log(cfg, metrics, ledger, monitor)
            evaluated = set(processes.from_first(lambda: sorted(metrics.evaluated)))
            # The last state measured; where the limits are younger than the run, the one they begin with.
            limits, good = cfg.train.stop_when, max(evaluated & set(checkpoints.steps()), default=begin)
            checkpoints.pin(good)

            def measure(step: int) -> stopping.Stopped | None:
                nonlocal good
                if evaluator is None or step in evaluated:
                    return None
                with ledger.time("evaluate"):
                    scalars = evaluator(current.ema, step)
                if limits:
                    log.flush(step)  # a state that diverged is not to be judged
                found = agreed(lambda: stopping.exceeded(limits, scalars, step, good))
                if found is not None:
                    # The record before the row and before anything is discarded: after a kill it all is done or none.
                    if guard is not None:
                        processes.from_first(guard)
                    processes.from_first(functools.partial(stopping.save, folder, found))
                metrics.write(step, scalars)
                evaluated.add(step)
                if limits and found is None:
                    good = step
                    checkpoints.pin(step)
                    save(step)
                return found

            def save(step: int) -> None:
                log.flush(step)
                if guard is not None:
                    processes.from_first(guard)
                with ledger.time("checkpoint"):
                    if averages is not None:
                        averages.wait()  # a run resumed here will not pass earlier snapshots again
                    checkpoints.save(current, {"ledger": ledger.as_json()})
                    ledger.save(folder / "ledger.json")
                    metrics.flush()

            def store(step: int) -> None:
                if averages is not None and every and step and step % every == 0:
                    log.flush(step)
                    with ledger.time("checkpoint"):
                        averages.save(snapshots.snapshot(current), snapshots.meta(cfg))

            try:
                if limits and begin == 0:
                    save(0)
                for step in range(begin, cfg.train.steps):
                    # Also at the first step: a signal that came with it left it unmeasured.
                    if step and cfg.train.eval_every and step % cfg.train.eval_every == 0:
                        early = measure(step)
                        if early is not None:
                            break
                    if step > begin and step % cfg.train.save_every == 0:
                        save(step)
                    store(step)  # also at the first step, whose snapshot a kill may have left unwritten
                    with ledger.time("data"):
                        rows = next_rows(step)
                    with ledger.time("train"):
                        current, values = update(current, resident, rows)
                        log.add(values)
                        if (step + 1) % cfg.train.log_every == 0:
                            log.flush(step + 1)
                    if stop.due(step + 1):
                        break
                done = int(current.step)
                log.flush(done)
                stopped = stop.signal
                if not stopped and early is None:
                    early = measure(done)
                if early is None:
                    save(done)
                    store(done)
            except Diverged as error:
                # A state whose own next step is not finite is no good one: going on from it fails again.
                for kept in stores:
                    kept.discard_after(error.step - 2)
                raise
        if early is not None:
            monitor.say(str(early))
            ledger.save(folder / "ledger.json")
            return _early(early, checkpoints, stores, abstract, monitor, stop)
        with ledger.time("checkpoint"):
            for kept in stores:
                kept.wait()
    ledger.save(folder / "ledger.json")
    return Outcome(current, stopped)


def agreed(ask: Callable[[], stopping.Stopped | None]) -> stopping.Stopped | None:
    """The first process's answer, on all."""

    def first() -> dict[str, Any] | None:
        answer = ask()
        return None if answer is None else asdict(answer)

    found = processes.from_first(first)
    return None if found is None else stopping.Stopped(**found)


def _early(
    early: stopping.Stopped,
    checkpoints: checkpoint.Checkpoints,
    stores: list[Any],
    abstract: Any,
    monitor: Monitor,
    stop: StopRequest,
) -> Outcome:
    """Go back to the last state within all limits."""
    for kept in stores:
        kept.discard_after(early.kept)
    restored = checkpoints.restore(abstract, monitor.say)
    if restored is None:
        raise UserError(f"{checkpoints.folder}: checkpoint {early.kept} is gone; train in a new --workdir")
    return Outcome(restored[0], stop.signal, early)


class Log:
    """Collects metrics on the device and fetches them late: on log steps and before checkpoints."""

    def __init__(self, cfg: config.Config, metrics: Metrics, ledger: Ledger, monitor: Monitor) -> None:
        self._cfg, self._metrics, self._ledger, self._monitor = cfg, metrics, ledger, monitor
        self._pending: list[dict[str, Array]] = []

    def add(self, values: dict[str, Array]) -> None:
        self._pending.append(values)

    def flush(self, step: int) -> None:
        """Write the means since the last flush.

        Raises:
          Diverged: a loss or gradient was not finite. No later state reaches a checkpoint, since every
            save flushes first.
        """
        if not self._pending:
            return
        with self._ledger.time("train"):
            fetched = jax.device_get(self._pending)
        self._pending = []
        first = step - len(fetched)
        for place, values in enumerate(fetched):
            if not all(math.isfinite(value) for value in values.values()):
                cfg, bad = self._cfg.train, first + place + 1
                what = ", ".join(f"{name} = {float(value):g}" for name, value in sorted(values.items()))
                raise Diverged(
                    f"{what} at step {bad}: training diverged; the last good checkpoint is kept; "
                    f"lower train.lr (now {cfg.lr}) or train.clip (now {cfg.clip})",
                    bad,
                )
        self._ledger.images += len(fetched) * self._cfg.train.batch
        scalars = {name: float(np.mean([row[name] for row in fetched])) for name in fetched[0]}
        speed = self._ledger.as_json()["images_per_second"]
        self._metrics.write(step, {**scalars, "images_per_second": speed})
        self._monitor.progress("train", step, self._cfg.train.steps, {**scalars, "images_per_second": speed})


def _with_params(fresh: state.TrainState, params: Params) -> state.TrainState:
    """A fresh state that starts from `params`, kept in the fresh state's shardings."""

    def place(old: Array, new: Array) -> Array:
        # A copy each, since params and averages are donated separately.
        return jax.jit(jnp.copy, out_shardings=old.sharding)(new)

    return replace(
        fresh,
        params=jax.tree.map(place, fresh.params, params),
        ema=jax.tree.map(place, fresh.ema, params),
        profiles={name: jax.tree.map(place, old, params) for name, old in fresh.profiles.items()},
    )

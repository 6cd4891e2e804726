"""A sweep: many trainings from one command, each an ordinary run in `cells/NAME`, as one resumable job.

Small models are trained side by side, one per device (`mdiff.train.side_by_side`); large ones one after another
with all devices each. Then every cell is sampled and audited. `sweep.json` says at any time how each cell fares.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
from rich.console import Console
from rich.table import Table

from mdiff import config, processes
from mdiff.errors import UserError
from mdiff.objectives import ambient
from mdiff.recipes import experiment
from mdiff.recipes.cells import Axes, Cell, Record
from mdiff.train import checkpoint, loop, mesh, side_by_side
from mdiff.train.preemption import stop_on_signal
from mdiff.train.trials import Program, TooLarge, Trial, device_bytes, shapes, state_bytes

Mode: TypeAlias = Literal["auto", "yes", "no"]

ROOM = 4
"""auto: side by side if a device holds so many times a cell's state. The compiled program is asked again."""
WRITE_EVERY = 2.0
"""Seconds between two records of a cell's step."""


@dataclass(frozen=True)
class Plan:
    """A sweep that may begin: nothing is written yet.

    Attributes:
      folder: of the sweep.
      cells: in order.
      made: the experiment of each cell that can be one.
      problems: what is wrong with each of the others, as one line.
      record: how they fare so far.
    """

    folder: Path
    cells: list[Cell]
    made: dict[str, experiment.Experiment]
    problems: dict[str, str]
    record: Record

    def where(self, name: str) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / name


def plan(base: config.Config, axes: Axes, folder: Path, mode: Mode = "auto") -> Plan:
    """Make every cell's experiment, so that mistakes surface before any training.

    Args:
      base: the config that the cells share.
      axes: the varied fields and their values (`cells.parse_over`).
      folder: of the sweep.
      mode: train side by side or not.

    Raises:
      UserError: no cell can be an experiment, the folder holds another sweep, or there is but one device.
    """
    if mode == "yes" and len(jax.devices()) == 1:
        raise UserError("--side-by-side yes: there is 1 device; leave it at auto, or give more devices")
    if mode == "yes" and base.mesh.fsdp != 1:
        raise UserError(
            f"--side-by-side yes: mesh.fsdp = {base.mesh.fsdp} splits each cell over devices; set it to 1"
        )
    record = Record(folder / "sweep.json", base, axes)
    made: dict[str, experiment.Experiment] = {}
    problems: dict[str, str] = {}
    subsets: dict[str, Any] = {}
    for cell in record.asked:
        try:
            found = processes.together(lambda cfg=cell.config: _prepare(cfg, mode))  # type: ignore[misc]
        except UserError as error:
            problems[cell.name] = str(error)
            continue
        data = json.dumps(config.to_json(cell.config.data))
        made[cell.name] = replace(found, subset=subsets.setdefault(data, found.subset))  # held once
    if not made:
        raise UserError(next(iter(problems.values())))
    return Plan(folder, record.asked, made, problems, record)


def _prepare(cfg: config.Config, mode: Mode) -> experiment.Experiment:
    made = experiment.prepare(cfg)
    if mode == "no" or len(jax.devices()) == 1:
        mesh.check_batch(cfg.train.batch, mesh.make_mesh(cfg.mesh), cfg.train.accumulate)
    return made


class _Board:
    """What the cells report, on one bar and in the record."""

    def __init__(self, plan: Plan, monitor: loop.Monitor) -> None:
        self.monitor, self._record = monitor, plan.record
        self._names = list(plan.made)
        self._written = time.monotonic()

    def step(self, name: str, done: int, scalars: Mapping[str, float]) -> None:
        cell = self._record.cells[name]
        cell |= {"state": "training", "step": done}
        if "loss" in scalars:
            cell["loss"] = scalars["loss"]
        if time.monotonic() - self._written > WRITE_EVERY:
            self._record.save()
            self._written = time.monotonic()
        self.show(scalars)

    def show(self, scalars: Mapping[str, float] | None = None) -> None:
        """Steps of all cells; a failed one has no more to do."""
        cells = [self._record.cells[name] for name in self._names]
        done = [min(cell["step"], cell["steps"]) for cell in cells]
        total = [
            at if cell["state"] == "failed" else cell["steps"] for cell, at in zip(cells, done, strict=True)
        ]
        self.monitor.progress("train", sum(done), sum(total), scalars or {})

    def ended(self) -> None:
        cells = [self._record.cells[name] for name in self._names]
        over = sum(cell["state"] in ("trained", "measured", "failed") for cell in cells)
        self.monitor.progress("cells", over, len(cells), {})


@dataclass(frozen=True)
class _CellMonitor:
    """One cell's part of the board."""

    name: str
    board: _Board

    def progress(self, task: str, done: int, total: int, scalars: Mapping[str, float]) -> None:
        """See `mdiff.train.loop.Monitor`."""
        if task == "train":
            self.board.step(self.name, done, scalars)

    def say(self, message: str) -> None:
        """See `mdiff.train.loop.Monitor`."""
        self.board.monitor.say(f"{self.name}: {message}")


def run(
    sweep: Plan, monitor: loop.Monitor, *, mode: Mode, evaluate: bool, again_failed: bool, resume: str
) -> int:
    """Train the cells that are not trained, measure those that are not measured, and say how all ended.

    Args:
      sweep: from `plan`.
      monitor: told about progress.
      mode: side by side, one after another, or whichever suits.
      evaluate: sample and audit each trained cell.
      again_failed: try failed cells again.
      resume: the line that says how to go on with this sweep.

    Returns:
      The exit code: 0 when all cells ended well or a signal stopped them after they saved, 1 when one failed.

    Raises:
      UserError: a folder cannot be written or belongs to another run: that is no cell's fault.
    """
    record = sweep.record
    for name, problem in sweep.problems.items():
        record.set(name, state="failed", reason=problem)
    for name in sweep.made:
        cell = record.cells[name]
        if cell["state"] == "failed" and (again_failed or "step" not in cell):
            record.set(name, state="waiting", reason=None)
        elif cell["state"] in ("trained", "measured") and not _is_trained(sweep, name):
            record.set(name, state="waiting")
    record.save()
    board = _Board(sweep, monitor)
    board.ended()
    stopped = _train(sweep, board, mode)
    if not stopped and evaluate:
        stopped = _measure(sweep, monitor)
    if stopped:
        done = sum(record.cells[cell.name]["state"] in ("trained", "measured") for cell in sweep.cells)
        monitor.say(f"{stopped}: saved; {done} of {len(sweep.cells)} cells are trained")
        monitor.say(resume)
        return 0
    return _conclude(sweep, monitor)


def _is_trained(sweep: Plan, name: str) -> bool:
    """Does the folder still hold what the record says, and is no more asked for?"""
    cell = sweep.record.cells[name]
    there = processes.from_first(lambda: (sweep.where(name) / "checkpoints" / str(cell["step"])).is_dir())
    return there and cell["step"] >= cell["steps"]


# ------------------------------------------------------------------------------------------- training


def _train(sweep: Plan, board: _Board, mode: Mode) -> str:
    """Train what is waiting; the name of the signal that stopped it, or ""."""
    waiting = [name for name in sweep.made if sweep.record.cells[name]["state"] in ("waiting", "training")]
    if not waiting:
        return ""
    saved = {name: _saved(sweep, name) for name in waiting}
    counted = side_by_side.Clock()
    for name in waiting:
        sweep.record.cells[name]["step"] = saved[name][-1]
    for group, begin in _groups(sweep, board, waiting, saved, mode):
        stopped = None
        if len(group) > 1 or mode == "yes":
            stopped = _together(sweep, board, group, begin, mode, counted)
        if stopped is None:
            stopped = _in_turn(sweep, board, group)
        if stopped:
            return stopped
    return ""


def _saved(sweep: Plan, name: str) -> list[int]:
    """Steps a cell can go on from, oldest first; 0 is the beginning."""
    folder = sweep.where(name)
    if not processes.from_first(lambda: (folder / "checkpoints").is_dir()):
        return [0]
    with checkpoint.open_run(folder, sweep.made[name].config.train) as found:
        return [0, *(step for step in found.steps() if not found.damage(step))]


def _trial(sweep: Plan, board: _Board, name: str) -> Trial:
    made = sweep.made[name]
    return Trial(
        name=name,
        cfg=made.config,
        model=made.model,
        objective=ambient.make,
        subset=made.subset,
        folder=sweep.where(name),
        monitor=_CellMonitor(name, board),
        evaluator=experiment.memorization_curve(made),
    )


def _groups(
    sweep: Plan, board: _Board, names: Sequence[str], saved: Mapping[str, list[int]], mode: Mode
) -> list[tuple[list[str], int]]:
    """Cells that can be trained side by side, and the step each group begins at; a group of one is trained alone."""
    if mode == "no" or len(jax.devices()) == 1:
        return [([name], saved[name][-1]) for name in names]
    alike: dict[str, list[str]] = {}
    alone: list[str] = []
    for name in names:
        cfg = sweep.made[name].config
        trial = _trial(sweep, board, name)
        small = cfg.mesh.fsdp == 1 and ROOM * state_bytes(trial) <= device_bytes()
        if saved[name][-1] >= cfg.train.steps or (mode == "auto" and not small):
            alone.append(name)
        else:
            alike.setdefault(shapes(trial), []).append(name)
    found: list[tuple[list[str], int]] = []
    for group in alike.values():
        begun = [name for name in group if sweep.record.cells[name]["state"] == "training"]
        found += at_one_step(begun, saved, max(sweep.made[name].config.train.save_every for name in group))
        found += at_one_step([name for name in group if name not in begun], saved, 0)
    return found + [([name], saved[name][-1]) for name in alone]


def at_one_step(
    names: Sequence[str], saved: Mapping[str, list[int]], most: int
) -> list[tuple[list[str], int]]:
    """Cells by the step they go on from; the few that a kill left one save ahead are taken back to the others.

    Args:
      names: cells.
      saved: steps each can go on from, oldest first.
      most: steps that a cell may lose.
    """
    parts: list[tuple[list[str], int]] = []
    for name in sorted(names, key=lambda name: saved[name][-1]):  # stable
        if parts:
            group, begin = parts[-1]
            if begin in saved[name] and saved[name][-1] - begin <= most:
                group.append(name)
                continue
        parts.append(([name], saved[name][-1]))
    return parts


def _together(
    sweep: Plan, board: _Board, names: list[str], begin: int, mode: Mode, counted: side_by_side.Clock
) -> str | None:
    """Train a group side by side; as `_train`, or None when it does not fit and is to be trained otherwise."""
    devices, record = len(jax.devices()), sweep.record
    trials = [_trial(sweep, board, name) for name in names]
    width = devices if processes.count() > 1 else min(devices, len(names))
    program = Program(trials, width)
    board.monitor.say(f"{len(names)} cells side by side on {width} devices")
    for first in range(0, len(trials), width):
        part = trials[first : first + width]
        for trial in part:
            record.cells[trial.name]["state"] = "training"
        record.save()
        try:
            stopped, failures = side_by_side.train(program, part, begin, board.monitor.say, counted)
        except TooLarge as error:
            if mode == "yes":
                raise
            board.monitor.say(str(error))
            return None
        except jax.errors.JaxRuntimeError as error:
            if not _is_memory(error) or mode == "yes":
                raise
            board.monitor.say(f"side by side: {_line(error)}; one after another instead")
            return None
        for trial, failure in zip(part, failures, strict=True):
            if failure is not None:
                record.set(trial.name, state="failed", step=failure.step, reason=str(failure))
            elif not stopped:
                record.set(trial.name, state="trained", step=trial.cfg.train.steps)
        record.save()
        board.ended()
        board.show()
        if stopped:
            return stopped
    return ""


def _in_turn(sweep: Plan, board: _Board, names: Sequence[str]) -> str:
    """Train cells one after another, each on all devices."""
    record = sweep.record
    for name in names:
        if record.cells[name]["state"] in ("trained", "measured", "failed"):
            continue
        made = sweep.made[name]
        record.set(name, state="training")
        try:
            cfg = made.config
            mesh.check_batch(cfg.train.batch, mesh.make_mesh(cfg.mesh), cfg.train.accumulate)
        except UserError as error:
            record.set(name, state="failed", reason=str(error))
            continue
        try:
            outcome = experiment.train(made, sweep.where(name), _CellMonitor(name, board))
        except loop.Diverged as error:
            record.set(name, state="failed", step=error.step, reason=str(error))
        except jax.errors.JaxRuntimeError as error:
            if not _is_memory(error) or processes.count() > 1:  # the others wait in a computation
                raise
            record.set(name, state="failed", reason=_line(error))
        else:
            step = int(outcome.state.step)
            record.set(name, step=step, state="training" if outcome.stopped else "trained")
            if outcome.stopped:
                return outcome.stopped
            del outcome  # its state would take memory beside the next one's
        board.ended()
        board.show()
    return ""


def _is_memory(error: Exception) -> bool:
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ------------------------------------------------------------------------------------------ measuring


def _measured_as(made: experiment.Experiment, step: int) -> str:
    """What a measurement depends on, shortly."""
    rules = experiment.audit_rules(made.config)
    text = json.dumps([step, config.to_json(made.config.sample), config.to_json(rules)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _measure(sweep: Plan, monitor: loop.Monitor) -> str:
    """Sample and audit the trained cells, one after another; as `_train`."""
    record = sweep.record
    trained = [name for name in sweep.made if record.cells[name]["state"] in ("trained", "measured")]
    with stop_on_signal(monitor.say) as stop:
        for number, name in enumerate(trained):
            made, folder, cell = sweep.made[name], sweep.where(name), record.cells[name]
            stamp = _measured_as(made, cell["step"])
            if cell.get("measured_as") != stamp or not processes.from_first((folder / "audit.json").is_file):
                quiet = _Quiet(name, monitor)
                experiment.sample(made, folder, quiet)
                processes.from_first(lambda folder=folder: _forget(folder))
                found = experiment.audit(made, folder, quiet).estimates
                shown = {
                    side: asdict(value) if (value := found[side]) is not None else None
                    for side in ("memorized", "control")
                }
                record.set(name, state="measured", measured_as=stamp, **shown)
            elif cell["state"] != "measured":
                record.set(name, state="measured")
            monitor.progress("measure", number + 1, len(trained), {})
            if stop.due(number + 1) and number + 1 < len(trained):
                return stop.signal
    return ""


def _forget(folder: Path) -> None:
    """Other probes' results are of earlier generations."""
    for path in folder.glob("probe_*"):
        path.unlink()


@dataclass(frozen=True)
class _Quiet:
    """Passes on what a measurement says, but not its bars."""

    name: str
    monitor: loop.Monitor

    def progress(self, task: str, done: int, total: int, scalars: Mapping[str, float]) -> None:
        """See `mdiff.train.loop.Monitor`."""

    def say(self, message: str) -> None:
        """See `mdiff.train.loop.Monitor`."""
        self.monitor.say(f"{self.name}: {message}")


# ----------------------------------------------------------------------------------------- in the end


def _conclude(sweep: Plan, monitor: loop.Monitor) -> int:
    cells = {cell.name: sweep.record.cells[cell.name] for cell in sweep.cells}
    measured = [name for name, cell in cells.items() if cell["state"] == "measured"]
    failed = {name: cell["reason"] for name, cell in cells.items() if cell["state"] == "failed"}
    if processes.is_first():
        Console().print(_table(cells))
    for name, reason in failed.items():
        monitor.say(f"failed: {name}: {reason}")
    if failed:
        monitor.say("failed cells are left alone by the next call; --again-failed True tries them again")
    if measured:
        runs = (
            [f"{shlex.quote(str(sweep.folder / 'cells'))}/*"]
            if set(p.name for p in (sweep.folder / "cells").iterdir()) == set(measured)
            else [shlex.quote(str(sweep.where(name))) for name in measured]
        )
        page = shlex.quote(str(sweep.folder / "report"))
        monitor.say(f"on one page: mdiff report {' '.join(runs)} --out {page}")
    return 1 if failed else 0


def _table(cells: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(
        title=f"{len(cells)} cells", caption="memorized and control: % of generations, with interval"
    )
    for column in ("cell", "state", "steps", "loss", "memorized", "control"):
        table.add_column(column, justify="left" if column in ("cell", "state") else "right")

    def rate(value: Mapping[str, float] | None) -> str:
        if not value:
            return ""
        return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"

    for name, cell in cells.items():
        loss = f"{cell['loss']:.4f}" if cell.get("loss") is not None else ""
        numbers = (str(cell["step"]), loss, rate(cell.get("memorized")), rate(cell.get("control")))
        table.add_row(name, cell["state"], *numbers)
    return table

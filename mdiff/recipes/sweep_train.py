"""How the cells of a sweep are trained: side by side where they fit, one after another where not."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from mdiff import processes
from mdiff.errors import UserError
from mdiff.objectives import damaged
from mdiff.recipes import experiment
from mdiff.recipes.sweep_plan import Mode, Plan
from mdiff.train import checkpoint, loop, mesh, side_by_side
from mdiff.train.trials import Program, TooLarge, Trial, device_bytes, kind, shapes, state_bytes

ROOM = 4
"""auto: side by side if a device holds so many times a cell's state. The compiled program is asked again."""
WRITE_EVERY = 2.0
"""Seconds between two records of a cell's step."""


class Board:
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
class CellMonitor:
    """One cell's part of the board."""

    name: str
    board: Board

    def progress(self, task: str, done: int, total: int, scalars: Mapping[str, float]) -> None:
        """See `mdiff.train.loop.Monitor`."""
        if task == "train":
            self.board.step(self.name, done, scalars)

    def say(self, message: str) -> None:
        """See `mdiff.train.loop.Monitor`."""
        self.board.monitor.say(f"{self.name}: {message}")


def train(sweep: Plan, board: Board, mode: Mode) -> str:
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


def _trial(sweep: Plan, board: Board, name: str) -> Trial:
    made = sweep.made[name]
    return Trial(
        name=name,
        cfg=made.config,
        model=made.model,
        objective=damaged.make,
        subset=made.subset,
        folder=sweep.where(name),
        monitor=CellMonitor(name, board),
        evaluator=experiment.memorization_curve(made),
    )


def _groups(
    sweep: Plan, board: Board, names: Sequence[str], saved: Mapping[str, list[int]], mode: Mode
) -> list[tuple[list[str], int]]:
    """Cells that share a program, and the step each group begins at; a group of one is trained alone.

    On several devices they are trained side by side; on one in turn, by the program of the first.
    """
    if mode == "no":
        return [([name], saved[name][-1]) for name in names]
    one = len(jax.devices()) == 1
    alike: dict[str, list[str]] = {}
    alone: list[str] = []
    for name in names:
        cfg = sweep.made[name].config
        trial = _trial(sweep, board, name)
        small = cfg.mesh.fsdp == 1 and ROOM * state_bytes(trial) <= device_bytes()
        if saved[name][-1] >= cfg.train.steps or (mode == "auto" and not small):
            alone.append(name)
        else:
            what = shapes(trial) + (kind(trial.cfg) if one else "")
            alike.setdefault(what, []).append(name)
    found: list[tuple[list[str], int]] = []
    for group in alike.values():
        if len(group) == 1:
            alone += group
            continue
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
    sweep: Plan, board: Board, names: list[str], begin: int, mode: Mode, counted: side_by_side.Clock
) -> str | None:
    """Train a group side by side; as `train`, or None when it does not fit and is to be trained otherwise."""
    devices, record = len(jax.devices()), sweep.record
    trials = [_trial(sweep, board, name) for name in names]
    width = devices if processes.count() > 1 else min(devices, len(names))
    program = Program(trials, width)
    how = f"side by side on {width} devices" if width > 1 else "in turn, with one program"
    board.monitor.say(f"{len(names)} cells {how}")
    for first in range(0, len(trials), width):
        part = trials[first : first + width]
        for trial in part:
            record.cells[trial.name]["state"] = "training"
        record.save()
        try:
            stopped, fates = side_by_side.train(program, part, begin, board.monitor.say, counted)
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
        for trial, fate in zip(part, fates, strict=True):
            if fate.diverged is not None:
                record.set(trial.name, state="failed", step=fate.diverged.step, reason=str(fate.diverged))
            elif fate.early is not None:
                record.set(trial.name, state="trained", step=fate.early.kept, early=str(fate.early))
            elif not stopped:
                record.set(trial.name, state="trained", step=trial.cfg.train.steps, early=None)
        record.save()
        board.ended()
        board.show()
        if stopped:
            return stopped
    return ""


def _in_turn(sweep: Plan, board: Board, names: Sequence[str]) -> str:
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
            outcome = experiment.train(made, sweep.where(name), CellMonitor(name, board))
        except loop.Diverged as error:
            record.set(name, state="failed", step=error.step, reason=str(error))
        except jax.errors.JaxRuntimeError as error:
            if not _is_memory(error) or processes.count() > 1:  # the others wait in a computation
                raise
            record.set(name, state="failed", reason=_line(error))
        else:
            step, early = int(outcome.state.step), outcome.early and str(outcome.early)
            over = early or not outcome.stopped
            record.set(name, step=step, state="trained" if over else "training", early=early)
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

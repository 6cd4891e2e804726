"""A sweep: many trainings from one command, each an ordinary run in `cells/NAME`, as one resumable job.

Small models are trained side by side, one per device (`mdiff.train.side_by_side`); large ones one after another
with all devices each. Then every cell is sampled and audited. `sweep.json` says at any time how each cell fares.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mdiff import config, processes
from mdiff.recipes import experiment
from mdiff.recipes.sweep_plan import Mode, Plan, plan
from mdiff.recipes.sweep_train import Board, train
from mdiff.train import loop, stopping
from mdiff.train.preemption import stop_on_signal

__all__ = ["Mode", "Plan", "plan", "run"]


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
        if cell["state"] == "failed" and again_failed:
            record.set(name, state="waiting", reason=None)
        elif cell["state"] in ("trained", "measured") and not _is_trained(sweep, name):
            record.set(name, state="waiting")
    record.save()
    board = Board(sweep, monitor)
    board.ended()
    stopped = train(sweep, board, mode)
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
    cell, folder = sweep.record.cells[name], sweep.where(name)
    there = processes.from_first(lambda: (folder / "checkpoints" / str(cell["step"])).is_dir())
    settings = sweep.made[name].config.train
    return there and (
        cell["step"] >= cell["steps"]
        or processes.from_first(lambda: stopping.load(folder, settings) is not None)
    )


# ------------------------------------------------------------------------------------------ measuring


def _measured_as(made: experiment.Experiment, step: int) -> str:
    """What a measurement depends on, shortly."""
    rules = experiment.audit_rules(made.config)
    text = json.dumps([step, config.to_json(made.config.sample), config.to_json(rules)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _measure(sweep: Plan, monitor: loop.Monitor) -> str:
    """Sample and audit the trained cells, one after another; as `sweep_train.train`."""
    record = sweep.record
    trained = [name for name in sweep.made if record.cells[name]["state"] in ("trained", "measured")]
    with stop_on_signal(monitor.say) as stop:
        for number, name in enumerate(trained):
            made, folder, cell = sweep.made[name], sweep.where(name), record.cells[name]
            stamp = _measured_as(made, cell["step"])
            if cell.get("measured_as") != stamp or not processes.from_first((folder / "audit.json").is_file):
                quiet = _Quiet(name, monitor)
                experiment.sample(made, folder, quiet)
                processes.from_first(functools.partial(_forget, folder))
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

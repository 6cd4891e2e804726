"""Runs followed on the terminal, from their files alone: what trains need not know that it is watched."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mdiff.errors import UserError
from mdiff.files import modified
from mdiff.train import metrics, stopping

_BLOCKS = "▁▂▃▄▅▆▇█"
_BEFORE = {"checkpoints", "stderr.log", "tensorboard"}  # what a run has before its config.json
_PATIENCE, _LEAST = 5, 60.0  # log intervals, and seconds, without a row before a run looks stalled


@dataclass(frozen=True)
class Snapshot:
    """What a run's files say at one moment.

    Attributes:
      name: as given on the command line.
      state: "waiting", "starting", "training", "stalled?", "trained", or "stopped early" by train.stop_when.
      step: newest logged step.
      steps: steps in all.
      losses: newest losses, oldest first.
      speed: images per second of training steps.
      left: estimated seconds to the last step, or None.
      age: seconds since the newest row, or None.
      measured: newest measurement while training: step, and all of its numbers, such as memorized, memorized_low, gap.
      seconds: by cause, of the ledger.
      checkpoint: newest complete checkpoint.
      audited: whether there is an audit.json.
      note: one line more.
    """

    name: str
    state: str
    step: int = 0
    steps: int = 0
    losses: tuple[float, ...] = ()
    speed: float | None = None
    left: float | None = None
    age: float | None = None
    measured: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    checkpoint: int | None = None
    audited: bool = False
    note: str = ""

    @property
    def done(self) -> bool:
        return self.state in ("trained", "stopped early")


def look(folder: Path, now: float) -> Snapshot:
    """Reads one run.

    Args:
      folder: the run's folder; it need not exist yet.
      now: seconds since the epoch.

    Raises:
      UserError: the folder holds something else, or a file of the run is damaged.
    """
    name = str(folder)
    if not folder.exists():
        return Snapshot(name, "waiting", note="no such folder yet")
    if not folder.is_dir():
        raise UserError(f"RUNS {folder}: is a file; give the --workdir of a training run")
    if not (folder / "config.json").is_file():
        entries = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if set(entries) <= _BEFORE:
            return Snapshot(name, "waiting", note="no config.json yet")
        inside = sorted(path.parent.as_posix() for path in folder.glob("*/config.json"))
        fix = f"did you mean {' '.join(inside[:4])}" if inside else "give the --workdir of a training run"
        raise UserError(f"RUNS {folder}: holds no training run (no config.json); {fix}")
    train, batch = _settings(folder / "config.json")
    rows = [row for row in metrics.read(folder / "metrics.jsonl") if isinstance(row.get("step"), int)]
    ledger = _ledger(folder / "ledger.json")
    losses = [row for row in rows if "loss" in row]
    points = [row for row in rows if row.get("eval/memorized") is not None]
    step, steps = (losses[-1]["step"] if losses else 0), int(train["steps"])
    speed = losses[-1].get("images_per_second") if losses else None
    seconds = ledger.get("seconds") or {}
    age = None
    if rows:
        with contextlib.suppress(FileNotFoundError):  # between two looks a restarted run may replace it
            age = max(0.0, now - modified(folder / "metrics.jsonl"))
    saved = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    checkpoint = max(saved, default=None)
    early = stopping.read(folder)
    trained = step >= steps and (checkpoint is None or checkpoint >= steps)
    quiet = max(_LEAST, _PATIENCE * int(train["log_every"]) * batch / speed) if speed else math.inf
    if early is not None:
        state = "stopped early"
    elif trained or (checkpoint is not None and checkpoint >= steps):
        state = "trained"
    elif not losses:
        state = "starting"
    else:
        state = "stalled?" if age is not None and age > quiet else "training"
    # Evaluations and checkpoints come on top of training steps, in the proportion they had so far.
    worked = {
        cause: s for cause, s in seconds.items() if cause in ("data", "train", "evaluate", "checkpoint")
    }
    overhead = sum(worked.values()) / worked["train"] if worked.get("train") else 1.0
    return Snapshot(
        name=name,
        state=state,
        step=step,
        steps=steps,
        losses=tuple(row["loss"] for row in losses),
        speed=speed,
        left=None if not speed or early or state == "trained" else (steps - step) * batch / speed * overhead,
        age=age,
        measured={} if not points else _point(points[-1]),
        seconds=seconds,
        checkpoint=checkpoint,
        audited=(folder / "audit.json").is_file(),
        note="" if early is None else str(early),
    )


def watch(
    folders: Sequence[Path],
    every: float = 2.0,
    once: bool = False,
    console: Console | None = None,
    sleep: Callable[[float], Any] = time.sleep,
) -> None:
    """Show `folders` until all are trained; one frame when `once`, or when the output is no terminal.

    Raises:
      UserError: no folder, one given twice, `every` is not above 0, or see `look`.
    """
    if not folders:
        raise UserError("RUNS: 0 given; give the --workdir of one or more training runs")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("RUNS: a folder is given twice; give each once")
    if not (math.isfinite(every) and every > 0):
        raise UserError(f"--every {every:g}: give seconds above 0")
    console = console or Console()
    snapshots = [look(folder, time.time()) for folder in folders]
    if once and not any(folder.exists() for folder in folders):
        raise UserError(
            f"{folders[0]}: no such folder; give the --workdir of a training run, or watch without --once"
        )
    if once or not console.is_terminal:
        console.print(frame(snapshots, console.width))
        return
    with Live(frame(snapshots, console.width), console=console, auto_refresh=False) as live:
        while not all(snapshot.done for snapshot in snapshots):
            sleep(every)
            snapshots = [look(folder, time.time()) for folder in folders]
            live.update(frame(snapshots, console.width), refresh=True)


def frame(snapshots: Sequence[Snapshot], width: int = 80) -> RenderableType:
    """One picture of all runs."""
    return Group(*(part for snapshot in snapshots for part in _panel(snapshot, width)))


def sparkline(values: Sequence[float], width: int) -> str:
    """The newest part of a positive series on a logarithmic scale, block means where there are too many.

    Values that are not finite and positive are left out.
    """
    logs = [math.log(value) for value in values if math.isfinite(value) and value > 0]
    if not logs or width < 1:
        return ""
    size = -(-len(logs) // width)
    means = [sum(part) / len(part) for i in range(0, len(logs), size) if (part := logs[i : i + size])]
    low, span = min(means), max(means) - min(means)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(top * (x - low) / span) if span > 0 else 0] for x in means)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _settings(path: Path) -> tuple[dict[str, Any], int]:
    """(train section, batch) of a run's config.json."""
    try:
        train = json.loads(path.read_text(encoding="utf-8"))["config"]["train"]
        return train | {"steps": int(train["steps"]), "log_every": int(train["log_every"])}, int(
            train["batch"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); restore it, or watch another run") from None


def _ledger(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {"seconds": {str(cause): float(s) for cause, s in tree["seconds"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); delete it to start the clock anew") from None


def _point(row: dict[str, Any]) -> dict[str, float]:
    found = {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
    return {"step": row["step"], **{name: value for name, value in found.items() if value is not None}}


_COLORS = {
    "waiting": "dim",
    "starting": "cyan",
    "training": "green",
    "stalled?": "bold red",
    "trained": "blue",
    "stopped early": "blue",
}


def _panel(run: Snapshot, width: int) -> list[RenderableType]:
    state = f"[{_COLORS[run.state]}]{run.state}[/]"
    head = f"[bold]{escape(run.name)}[/]  {state}"
    if run.audited:
        head += "  audited"
    parts: list[RenderableType] = [Text.from_markup(head)]
    if run.note:
        parts.append(Text(f"  {run.note}", "dim"))
    if run.steps:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column()
        for name, value in _lines(run, max(10, width - 16)):
            grid.add_row(name, value)
        parts.append(Padding(grid, (0, 0, 0, 2)))
    return [*parts, Text()]


def _lines(run: Snapshot, width: int) -> list[tuple[str, RenderableType]]:
    step: RenderableType = Text(f"{run.step:,} of {run.steps:,}")
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        step,
        ProgressBar(
            run.steps,
            min(run.step, run.steps),
            width=max(8, min(30, width - 30)),
            complete_style="green",
            finished_style="blue",
        ),
    )
    lines: list[tuple[str, RenderableType]] = [("step", bar)]
    known = [loss for loss in run.losses if loss is not None and math.isfinite(loss)]
    if known:
        lines.append(("loss", Text(f"{known[-1]:.4g}  {sparkline(known, min(40, width - 12))}")))
    speed = [f"{run.speed:,.1f} images/s"] if run.speed else []
    if run.left is not None:
        speed.append(f"{duration(run.left)} left")
    if run.age is not None and not run.done:
        speed.append(f"newest row {duration(run.age)} old")
    if speed:
        lines.append(("speed", Text(", ".join(speed), "red" if run.state == "stalled?" else "")))
    if run.measured:
        lines.append(("memorized", Text(_rates(run.measured))))
    if "gap" in run.measured:
        lines.append(("loss gap", Text(_gap(run.measured))))
    if run.checkpoint is not None:
        lines.append(("checkpoint", Text(f"step {run.checkpoint:,}")))
    if total := sum(run.seconds.values()):
        spent = sorted(run.seconds.items(), key=lambda item: -item[1])
        shares = [f"{cause} {100 * s / total:.0f} %" for cause, s in spent if s >= 0.005 * total]
        lines.append(("time", Text(f"{duration(total)}: {', '.join(shares)}")))
    return lines


def _gap(point: dict[str, float]) -> str:
    """Held-out over training error, and at which noise level it is largest."""
    text = f"{point['gap']:.3g}"
    if "gap_low" in point and "gap_high" in point:
        text += f" [{point['gap_low']:.3g}, {point['gap_high']:.3g}]"
    each = {name: value for name, value in point.items() if name.startswith("gap@")}
    if each:
        most = max(each, key=lambda name: each[name])
        text += f", largest at σ = {most.removeprefix('gap@')}: {each[most]:.3g}"
    return text


def _rates(point: dict[str, float]) -> str:
    def one(name: str) -> str:
        text = f"{100 * point[name]:.1f} %"
        if f"{name}_low" in point and f"{name}_high" in point:
            text += f" [{100 * point[f'{name}_low']:.1f}, {100 * point[f'{name}_high']:.1f}]"
        return text

    text = one("memorized")
    if "control" in point:
        text += f", control {one('control')}"
    count = f", n = {point['n']:.0f}" if "n" in point else ""
    return f"{text} at step {point['step']:,.0f}{count}"

"""The demo: a standard and an ambient twin on the same few faces, side by side.

The twins differ in one field, the ambient cutoff. Each runs in its own process on its own cores, as any
`mdiff train` and `mdiff eval` would, so an interrupted demo resumes. The parent draws their progress.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from mdiff import config
from mdiff.console import make_progress, note
from mdiff.errors import UserError
from mdiff.files import check_writable, write_json

STANDARD = config.Config(
    name="standard",
    data=config.Data(source="faces", size=16, n=50, heldout=50),
    net=config.Net(channels=32, mults=(1, 2), blocks=1, attention=(), patch=2),
    loss=config.Loss(p_mean=-0.8),
    train=config.Train(
        steps=1500,
        batch=32,
        lr=3e-3,
        ema_halflife=2000,
        log_every=25,
        save_every=250,
        eval_every=250,
        eval_samples=64,
    ),
    sample=config.Sample(n=256, steps=18, batch=64),
)
AMBIENT = replace(STANDARD, name="ambient", loss=replace(STANDARD.loss, cutoff=1.0))
TWINS = {"standard": STANDARD, "ambient": AMBIENT}

STOPPED = 3
"""Exit code of a worker that saved because a signal asked it to."""


class LineMonitor:
    """A worker's progress as JSON lines on stdout, for the parent."""

    def progress(self, task: str, done: int, total: int, scalars: Mapping[str, float]) -> None:
        """See `mdiff.train.loop.Monitor`."""
        print(json.dumps({"task": task, "done": done, "total": total, "note": note(scalars)}), flush=True)

    def say(self, message: str) -> None:
        """See `mdiff.train.loop.Monitor`."""
        print(json.dumps({"say": message}), flush=True)


def worker(name: str, folder: Path, steps: int | None) -> int:
    """Train, sample and audit one twin; what the child process runs."""
    from mdiff.recipes import experiment

    cfg = TWINS[name]
    if steps is not None:
        cfg = replace(cfg, train=replace(cfg.train, steps=steps))
    monitor = LineMonitor()
    try:
        made = experiment.prepare(cfg)
        if experiment.train(made, folder, monitor).stopped:
            return STOPPED
        experiment.sample(made, folder, monitor)
        experiment.audit(made, folder, monitor)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    return 0


def _cores(count: int) -> list[set[int]]:
    """The cores this process may use, dealt out to `count` workers; shared when there are too few."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < count:
        return [set(available)] * count
    return [set(available[place::count]) for place in range(count)]


def _start(name: str, folder: Path, steps: int | None, cores: set[int]) -> subprocess.Popen[str]:
    """One worker, confined to `cores` before it imports jax, which sizes its thread pool by them."""
    code = (
        "import ctypes, json, os, sys; name, folder, steps, cores = json.loads(sys.argv[1]);"
        "ctypes.CDLL(None).prctl(1, 9);"  # PR_SET_PDEATHSIG: a killed parent leaves no worker behind
        "os.sched_setaffinity(0, cores);"
        "from pathlib import Path; from mdiff.recipes.demo import worker;"
        "sys.exit(worker(name, Path(folder), steps))"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stderr.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code, json.dumps([name, str(folder), steps, sorted(cores)])],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the parent, which tells the workers once
        )


@dataclass
class _Worker:
    """A twin's process, what it said last, and the bars it fills."""

    name: str
    process: subprocess.Popen[str]
    error: str = ""

    def follow(self, progress: Progress) -> None:
        """Show what the process reports until it ends; runs in a thread of its own."""
        tasks: dict[str, TaskID] = {}
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if "error" in event:
                self.error = event["error"]
            elif "say" in event:
                progress.console.print(f"{self.name}: {event['say']}", markup=False, highlight=False)
            else:
                task, total = event["task"], event["total"]
                if task not in tasks:
                    tasks[task] = progress.add_task(f"{self.name} {task}", total=total, note="")
                progress.update(tasks[task], completed=event["done"], note=event["note"])

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def _watch(workers: list[_Worker], console: Console) -> str:
    """Wait for the workers; a signal, or one worker's failure, asks the others to save and stop.

    Returns:
      The name of the signal that stopped them, or "".
    """
    stopped = ""

    def forward(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = signal.Signals(number).name
        for worker in workers:
            worker.stop(number)

    handled = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, forward) for number in handled}
    try:
        with make_progress(console) as progress:
            threads = [threading.Thread(target=worker.follow, args=(progress,)) for worker in workers]
            for thread in threads:
                thread.start()
            while any(worker.process.poll() is None for worker in workers):
                if any(worker.process.poll() for worker in workers):
                    for worker in workers:
                        worker.stop()
                time.sleep(0.2)
            for thread in threads:
                thread.join()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for worker in workers:
            worker.stop(signal.SIGKILL)
    return stopped


def run(out: Path, steps: int | None = None, again: bool = False) -> dict[str, float] | None:
    """Run or resume both twins in `out/standard` and `out/ambient`.

    Returns:
      `seconds` in all and `peak_rss_gb` (both workers ran at once, so their peaks add up), or None when
      a signal stopped the twins after they saved.

    Raises:
      UserError: `out` holds something else, or a worker failed.
    """
    clock = out / "clock.json"
    if out.exists() and not (clock.is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"--out {out}: holds something other than a demo; choose another folder")
    check_writable(out, "--out")
    if again and out.exists():
        shutil.rmtree(out)
    seconds, finished = 0.0, None
    if clock.is_file():
        stored = json.loads(clock.read_text())
        seconds, finished = stored["seconds"], stored["finished"]
    wanted = steps if steps is not None else STANDARD.train.steps
    console = Console(stderr=True)
    if finished == wanted:
        console.print("this demo is complete; --again starts it over", markup=False)
    else:
        write_json(clock, {"seconds": seconds, "finished": None})
        begin = time.perf_counter()
        cores = _cores(len(TWINS))
        workers = [
            _Worker(name, _start(name, out / name, steps, own))
            for name, own in zip(TWINS, cores, strict=True)
        ]
        stopped = _watch(workers, console)
        # Before and after training there is nothing to save, so there a signal simply ends a worker.
        fine = (0, STOPPED, -signal.SIGTERM, -signal.SIGINT)
        failed = [worker for worker in workers if worker.process.returncode not in fine]
        seconds += time.perf_counter() - begin
        write_json(clock, {"seconds": seconds, "finished": None if failed or stopped else wanted})
        if failed:
            first = next((worker for worker in failed if worker.error), failed[0])
            log = out / first.name / "stderr.log"
            reason = first.error or f"the worker ended with code {first.process.returncode}; see {log}"
            raise UserError(f"{first.name} twin: {reason}")
        if stopped:
            console.print(f"{stopped}: both twins saved; resume with: mdiff demo --out {out}", markup=False)
            return None
    peaks = [json.loads((out / name / "ledger.json").read_text())["peak_rss_gb"] for name in TWINS]
    return {"seconds": round(seconds, 1), "peak_rss_gb": round(sum(peaks), 2)}

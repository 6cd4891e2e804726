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
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mdiff import config
from mdiff.console import make_progress, note
from mdiff.errors import UserError
from mdiff.files import write_json

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
            return 3
        experiment.sample(made, folder, monitor)
        experiment.audit(made, folder, monitor)
    except UserError as error:
        monitor.say(f"error: {error}")
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
        "import os, sys; os.sched_setaffinity(0, eval(sys.argv[4]));"
        "from mdiff import cpu; cpu.tune();"
        "from pathlib import Path; from mdiff.recipes.demo import worker;"
        "sys.exit(worker(sys.argv[1], Path(sys.argv[2]), eval(sys.argv[3])))"
    )
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", code, name, str(folder), repr(steps), repr(cores)],
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr.log").open("w"),
        text=True,
        start_new_session=True,  # Ctrl-C reaches the parent, which tells the workers once
    )


def run(out: Path, steps: int | None = None, again: bool = False) -> dict[str, float] | None:
    """Run or resume both twins in `out/standard` and `out/ambient`.

    Returns:
      `seconds` in all and `peak_rss_gb` (both workers ran at once, so their peaks add up), or None when
      a signal stopped the twins after they saved.

    Raises:
      UserError: `out` holds something else, or a worker failed.
    """
    if again and out.exists():
        if not (out / "standard").is_dir():
            raise UserError(f"--out {out}: is not a demo; delete it yourself if you mean it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    clock = out / "clock.json"
    spent = json.loads(clock.read_text())["seconds"] if clock.is_file() else 0.0
    begin = time.perf_counter()
    console = Console(stderr=True)
    workers = {
        name: _start(name, out / name, steps, cores)
        for (name, cores) in zip(TWINS, _cores(len(TWINS)), strict=True)
    }
    stopped: list[str] = []

    def forward(number: int, frame: object) -> None:
        stopped.append(signal.Signals(number).name)
        for process in workers.values():
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    errors: list[str] = []
    try:
        with make_progress(console) as progress:

            def follow(name: str, process: subprocess.Popen[str]) -> None:
                tasks: dict[str, object] = {}
                assert process.stdout is not None
                for line in process.stdout:
                    event = json.loads(line)
                    if "say" in event:
                        (errors.append if event["say"].startswith("error: ") else progress.console.print)(
                            f"{name}: {event['say']}"
                        )
                        continue
                    if event["task"] not in tasks:
                        tasks[event["task"]] = progress.add_task(
                            f"{name} {event['task']}", total=event["total"], note=""
                        )
                    progress.update(tasks[event["task"]], completed=event["done"], note=event["note"])  # type: ignore[arg-type]

            threads = [threading.Thread(target=follow, args=item, daemon=True) for item in workers.items()]
            for thread in threads:
                thread.start()
            for process in workers.values():
                process.wait()
            for thread in threads:
                thread.join()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in workers.values():
            if process.poll() is None:
                process.kill()
        seconds = spent + time.perf_counter() - begin
        write_json(clock, {"seconds": seconds})
    codes = {name: process.returncode for name, process in workers.items()}
    if stopped:
        console.print(f"{stopped[0]}: both twins saved; resume with: mdiff demo --out {out}", markup=False)
        return None
    if any(codes.values()):
        failed = next(name for name, code in codes.items() if code)
        reason = (
            errors[0]
            if errors
            else f"{failed}: worker ended with code {codes[failed]}; see {out / failed / 'stderr.log'}"
        )
        raise UserError(f"demo: {reason}")
    peaks = [json.loads((out / name / "ledger.json").read_text())["peak_rss_gb"] for name in TWINS]
    return {"seconds": round(seconds, 1), "peak_rss_gb": round(sum(peaks), 2)}

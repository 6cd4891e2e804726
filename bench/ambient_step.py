"""What ambient training costs: its step against the standard one, and a sweep's wall time against its steps.

Usage: python bench/ambient_step.py [--config configs/faces.py] [--pairs 40] [--steps 10] [--cells 12] [--cell-steps 400]

Steps: both programs are compiled in one process; blocks of steps alternate, in turning order, and each pair gives one ratio.
Sweep: `mdiff sweep` over cutoff x seed on one device without measurements; its wall time, with everything from the start
of the process, over the sum of cells x steps x median step of the standard program, timed beside it before and after.
Writes bench/results/ambient_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdiff import config
from mdiff.data.reader import make_reader
from mdiff.objectives import ambient
from mdiff.recipes import experiment
from mdiff.train import mesh
from mdiff.train.program import train_program

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "ambient_step.json"
AMBIENT = {
    "cutoff 1": {"cutoff": 1.0},
    "cutoff 1, share 0.5": {"cutoff": 1.0, "share": 0.5},
    "per image": {"cutoff": 1.0, "cutoff_of": {}, "clean_share": 0.5, "buffer": "redraw"},
}


def stepper(cfg: config.Config) -> Callable[[int], float]:
    """A function that runs so many steps of `cfg` and says how many seconds one took."""
    made = experiment.prepare(cfg)
    on = mesh.make_mesh(cfg.mesh)
    program = train_program(cfg, made.model, ambient.make(made.model, cfg), on)
    reader = make_reader(cfg, made.subset)
    places = mesh.batch_places(on, cfg.train.batch)
    resident = mesh.place(reader.resident, mesh.replicated(on))
    state, at = program.fresh(), 0

    def run(count: int) -> float:
        nonlocal state, at
        begin = time.perf_counter()
        for _ in range(count):
            rows = mesh.place_batch(reader.batch(at), places, cfg.train.batch, on)
            state, values = program.step(state, resident, rows)
            at += 1
        jax.block_until_ready((state, values))
        return (time.perf_counter() - begin) / count

    run(3)
    return run


def interval(ratios: list[float]) -> dict[str, float]:
    """Median, with the 95 % interval of a bootstrap."""
    draws = np.random.Generator(np.random.Philox(0)).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
    return {"median": statistics.median(ratios), "low": float(low), "high": float(high), "pairs": len(ratios)}


def steps(cfg: config.Config, pairs: int, count: int) -> dict[str, Any]:
    """Ratio of each kind of ambient step to the standard step."""
    plain = stepper(cfg)
    found = {}
    for name, fields in AMBIENT.items():
        other = stepper(replace(cfg, loss=replace(cfg.loss, **fields)))
        ratios = []
        for pair in range(pairs):
            if pair % 2:
                first, second = plain(count), other(count)
            else:
                second, first = other(count), plain(count)
            ratios.append(second / first)
        found[name] = interval(ratios)
        print(name, found[name], flush=True)
    return found


def sweep(path: Path, cfg: config.Config, cells: int, count: int) -> dict[str, Any]:
    """Wall time of a sweep over the sum of its cells' steps."""
    seeds = ",".join(map(str, range(cells // 4)))
    words = [
        "--config",
        str(path),
        "--over",
        f"seed={seeds}",
        "loss.cutoff=0.25,0.5,1,2",
        "--loss.share",
        "0.5",
    ]
    words += [
        "--train.steps",
        str(count),
        "--train.save-every",
        str(count),
        "--eval",
        "False",
        "--train.eval-every",
        "0",
    ]
    words += ["--train.eval-samples", "8", "--train.eval-levels"]
    run = stepper(replace(cfg, loss=replace(cfg.loss, cutoff=1.0, share=0.5)))
    solo = [run(20) for _ in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mdiff.cli", "sweep", "--workdir", folder, *words]
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        wall = time.perf_counter() - begin
        ledgers = [json.loads(each.read_text()) for each in sorted(Path(folder).glob("cells/*/ledger.json"))]
    solo += [run(20) for _ in range(10)]
    step = statistics.median(solo)
    made = 4 * (cells // 4)
    spent = {
        cause: round(sum(each["seconds"].get(cause, 0.0) for each in ledgers), 1)
        for cause in ("compile", "train", "evaluate", "checkpoint", "start")
    }
    return {
        "cells": made,
        "steps": count,
        "median_step_seconds": step,
        "wall_seconds": wall,
        "ratio": wall / (made * count * step),
        "seconds_by_cause": spent,
        "command": shlex.join(["mdiff", "sweep", *words]),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=str(ROOT / "configs" / "faces.py"))
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--cell-steps", type=int, default=400)
    parser.add_argument("--only", choices=("steps", "sweep"))
    options = parser.parse_args()
    cfg = config.load(options.config)
    tree = json.loads(OUT.read_text()) if OUT.is_file() else {}
    if options.only != "sweep":
        tree["step"] = steps(cfg, options.pairs, options.steps)
    if options.only != "steps":
        tree["sweep"] = sweep(Path(options.config), cfg, options.cells, options.cell_steps)
        print(tree["sweep"])
    tree |= {
        "config": Path(options.config).name,
        "command": shlex.join(["python", "bench/ambient_step.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}",
        "load": os.getloadavg(),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()

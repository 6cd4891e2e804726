"""Seconds per training step with and without an XLA:CPU flag, in interleaved pairs.

The flag doubles the speed of single convolution kernel gradients in some settings; whole steps were slower with
it (docs/results.md), so mdiff does not set it.

Usage: python bench/xla_flag.py [--config configs/faces.py] [--pairs 5] [--steps 20] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"

WORKER = """
import json, sys, time, jax
from pathlib import Path
from mdiff import config
from mdiff.data.reader import make_reader
from mdiff.objectives import ambient
from mdiff.recipes import experiment
from mdiff.train import mesh, optim, program, state
made = experiment.prepare(config.load(sys.argv[1]))
cfg, devices = made.config, mesh.make_mesh(config.Mesh())
optimizer = optim.make_optimizer(cfg.train)
fresh, _ = state.plan_state(made.model, optimizer, 0, devices)
reader = make_reader(cfg, made.subset)
current, pool = fresh(), jax.device_put(reader.resident, mesh.replicated(devices))
objective = ambient.make(made.model, cfg)
step = jax.jit(state.make_step(objective, optimizer, program.make_batch_fn(cfg), cfg.train, 0), donate_argnums=0)
def run(count):
    global current
    begin = time.perf_counter()
    for i in range(count):
        current, metrics = step(current, pool, reader.batch(i))
    jax.block_until_ready(current)
    return (time.perf_counter() - begin) / count
run(2)
print("ready", flush=True)
for line in sys.stdin:
    print(run(int(line)), flush=True)
"""


def start(config: str, flags: dict[str, str], threads: int) -> subprocess.Popen[str]:
    environment = {**os.environ, **flags}
    code = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{threads}])\n" + WORKER
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    worker = subprocess.Popen([sys.executable, "-c", code, config], env=environment, **pipes)
    assert worker.stdout is not None
    assert worker.stdout.readline().strip() == "ready"
    return worker


def measure(worker: subprocess.Popen[str], steps: int) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(steps, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/faces.py")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    os.environ.pop("XLA_FLAGS", None)
    flagged = {"XLA_FLAGS": FLAG}
    workers = {
        name: start(options.config, flags, options.threads)
        for name, flags in (("with", flagged), ("without", {}))
    }
    pairs = [
        {name: measure(worker, options.steps) for name, worker in workers.items()}
        for _ in range(options.pairs)
    ]
    for worker in workers.values():
        worker.terminate()
    ratios = [pair["without"] / pair["with"] for pair in pairs]
    result = {
        "config": options.config,
        "threads": options.threads,
        "seconds_with": round(statistics.median(pair["with"] for pair in pairs), 4),
        "seconds_without": round(statistics.median(pair["without"] for pair in pairs), 4),
        "median_ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

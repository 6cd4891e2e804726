"""What a guided sampling step costs beside its parts: the model's forward pass, and the classifier's forward and backward pass.

Usage: python bench/guided_step.py [--config configs/side_digits8.py] [--batch 256] [--method ddim] [--rounds 40] [--steps 5]

All three are compiled in one process; blocks of calls take turns, in turning order, and each round gives one ratio, step /
(forward + gradient). Parameters are fresh: time does not depend on them. The loop is the sampler's own, so the step's
dispatch is in it. Writes bench/results/guided_step.json; the aim is a ratio of 1.15 at most.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ambient_step import interval

from mdiff import config
from mdiff.keys import key
from mdiff.nets.classifier import make_classifier
from mdiff.nets.denoiser import make_model
from mdiff.recipes import guided
from mdiff.side import Side

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "guided_step.json"
CLASSES = 100
CHANNELS = {"digits": 1, "faces": 1, "mnist5k": 1}

Parts = dict[str, Callable[[int], float]]


def timed(call: Callable[[], Any]) -> Callable[[int], float]:
    """A function that makes so many calls and says how many seconds one took."""

    def run(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            out = call()
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / count

    run(3)
    return run


def parts(cfg: config.Config, attack: Side, method: str, batch: int) -> Parts:
    """step, forward and gradient."""
    model = make_model(cfg, CHANNELS.get(cfg.data.source, 3))
    guide = make_classifier(attack.classifier, model.process, model.shape, CLASSES, model.sigma_data)
    params, told = (jax.jit(lambda net=net: net.init(key(0, "init")))() for net in (model, guide))
    index = jnp.arange(batch, dtype=jnp.int32)
    label, scale = index % CLASSES, jnp.full(batch, 3.0)
    sampling = replace(attack.sample, method=method, seed=0, n=1, batch=1)
    programs = guided._programs(model, sampling, guide, None)
    walk, rows = programs.begin(params, index, None, seed=0)
    t = jnp.full(batch, model.process.time(jnp.float32(1.0)))
    xt = jnp.copy(walk.state.u) / model.process.sigma_max  # the step's own arrays are donated
    when, _ = programs.steps[len(programs.steps) // 2]

    def step() -> Any:
        nonlocal walk
        walk = programs.step(params, told, walk, when, rows, label, scale, last=False)
        return walk

    forward = jax.jit(lambda params, xt, t: model.denoiser(params)(xt, t, None))
    gradient = jax.jit(jax.grad(lambda xt, told, t, label: guide.log_prob(told, xt, t, label).sum()))
    return {
        "step": timed(step),
        "forward": timed(functools.partial(forward, params, xt, t)),
        "gradient": timed(functools.partial(gradient, xt, told, t, label)),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=str(ROOT / "configs" / "side_digits8.py"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--method", default="ddim", choices=("ddim", "euler", "dpmpp2m"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    runs = parts(config.load(options.config), Side(), options.method, options.batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name in np.roll(list(runs), number):
            seconds[name].append(runs[name](options.steps))
    ratios = [
        step / (forward + gradient)
        for step, forward, gradient in zip(
            *(seconds[name] for name in ("step", "forward", "gradient")), strict=True
        )
    ]
    tree = {
        "ratio": interval(ratios),
        "median_seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "batch": options.batch,
        "method": options.method,
        "config": Path(options.config).name,
        "command": shlex.join(["python", "bench/guided_step.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}",
        "load": os.getloadavg(),
    }
    print(json.dumps(tree, indent=1))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How long a training step waits for its batch, in memory and from disk, for a network of the demo's size.

Each run is the real training loop; the numbers are its ledger's: the share of the loop's seconds that went to
getting the next batch, and the seconds per step, which also show what reading ahead costs the computation
where both share the cores. Runs of the two modes alternate; the table shows medians.

Usage: python bench/data_wait.py [--steps 300] [--rounds 3] [--batch 32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mdiff import config
from mdiff.data import source
from mdiff.data.split import split
from mdiff.nets.denoiser import make_model
from mdiff.objectives import ambient
from mdiff.recipes.demo import STANDARD
from mdiff.train import loop

SETS = {"faces": (16, 50), "mnist5k": (28, 4000), "emoji": (32, 4000)}
TARGET = 0.02


class Silent:
    """A monitor that shows nothing."""

    def progress(self, task: str, done: int, total: int, scalars: Mapping[str, float]) -> None:
        pass

    def say(self, message: str) -> None:
        pass


def measure(cfg: config.Config) -> tuple[float, float, float]:
    """Milliseconds per step, milliseconds per step of waiting for data, and the latter's share."""
    data = cfg.data
    images = source.load(data.source, data.size, split=data.split, reading=data.reading)
    model, subset = make_model(cfg, images.x.shape[-1]), split(data, images)
    with tempfile.TemporaryDirectory() as folder:
        if loop.train(cfg, model, ambient.make(model, cfg), subset, Path(folder), Silent()).stopped:
            raise SystemExit("stopped by a signal")
        seconds = json.loads((Path(folder) / "ledger.json").read_text())["seconds"]
    wait, whole = seconds["data"], seconds["data"] + seconds["train"]
    return 1e3 * whole / cfg.train.steps, 1e3 * wait / cfg.train.steps, wait / whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    options = parser.parse_args()

    train = replace(
        STANDARD.train, steps=options.steps, batch=options.batch, save_every=10**9, eval_every=0, log_every=25
    )
    kinds: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for _ in range(options.rounds):
        for name, (size, n) in SETS.items():
            for reading in ("memory", "disk"):
                data = replace(STANDARD.data, source=name, size=size, n=n, heldout=0, reading=reading)
                result = measure(replace(STANDARD, data=data, train=train))
                kinds.setdefault((name, reading), []).append(result)
    table = Table("set", "size", "reading", "ms/step", "waiting, ms", "share", f"< {TARGET:.0%}")
    for (name, reading), results in kinds.items():
        step, wait, share = (statistics.median(column) for column in zip(*results, strict=True))
        met = "yes" if share < TARGET else "no"
        table.add_row(
            name, str(SETS[name][0]), reading, f"{step:.2f}", f"{wait:.3f}", f"{100 * share:.2f} %", met
        )
    Console().print(table)


if __name__ == "__main__":
    main()

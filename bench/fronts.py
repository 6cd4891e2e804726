"""The fronts of quality against memorization in results/ambient/: sweeps over the ambient cutoff, then `mdiff front`.

Usage: python bench/fronts.py NAME [RUNS] [--list], names as in `FRONTS`; runs go to RUNS (runs/fronts/NAME). Interrupted, the
same command goes on. Set OMP_NUM_THREADS=1 and XLA_FLAGS=--xla_cpu_multi_thread_eigen=false to keep it on one core.
`--planned` trains nothing: it writes results/ambient/planned.json, every cell of the fronts that were not run here.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "ambient"


class Front(NamedTuple):
    """A front: its config, and the varied and the fixed fields of each of its sweeps.

    Attributes:
      config: file in configs/.
      sweeps: folder name -> words after `mdiff sweep --over`.
      out: folder in results/ambient.
      cost: what it takes, where it was run; empty where it was not.
    """

    config: str
    sweeps: dict[str, list[str]]
    out: str
    cost: str = ""


def _cutoffs(seeds: str, cutoffs: str, *fixed: str) -> dict[str, list[str]]:
    """Standard training, and every cutoff with the law's own and half of the draws above it."""
    over = [f"seed={seeds}", f"loss.cutoff={cutoffs}"]
    return {
        "plain": [f"seed={seeds}", "--loss.cutoff", "0", *fixed],
        "natural": [*over, *fixed],
        "half": [*over, "--loss.share", "0.5", *fixed],
    }


def _sizes(steps: dict[int, int], seeds: str, cutoffs: str) -> dict[str, list[str]]:
    """The same for several numbers of training images, each with its steps: equally many epochs."""
    found = {}
    for n, many in steps.items():
        for part, words in _cutoffs(seeds, cutoffs, "--data.n", str(n), "--train.steps", str(many)).items():
            found[f"n{n}-{part}"] = words
    return found


FRONTS = {
    "digits8": Front(
        "front_digits8.py",
        {
            **_cutoffs("0,1,2", "0.25,0.5,1,2,4"),
            # The noise levels of the share alone, with clean images above the cutoff too.
            "control": ["seed=0,1,2", "loss.cutoff=1", "--loss.share", "0.5", "--loss.clean", "always"],
        },
        ".",
        "36 cells; see front.json for the seconds of each",
    ),
    "faces32": Front(
        "front_faces32.py",
        {
            "plain": ["seed=0,1", "--loss.cutoff", "0"],
            "half": ["seed=0,1", "loss.cutoff=0.5,1,2", "--loss.share", "0.5"],
        },
        "faces32",
        "8 cells; see faces32/front.json for the seconds of each",
    ),
    "mnist28": Front(
        "front_mnist28.py",
        _sizes({100: 6_000, 300: 18_000, 1000: 60_000}, "0,1,2", "0.25,0.5,1,2,4"),
        "mnist28",
    ),
    # 40,000 epochs for every n, as arXiv 2310.02664.
    "cifar10": Front(
        "front_cifar10.py",
        _sizes({300: 24_000, 1000: 80_000, 3000: 240_000}, "0,1,2", "0.2,0.4,1,2,4"),
        "cifar10",
    ),
    # 30 M images for n = 300, as arXiv 2502.21278; its useful range of cutoffs and beyond.
    "ffhq64": Front(
        "front_ffhq64.py",
        _sizes({300: 117_000, 1000: 390_000, 3000: 1_170_000}, "0,1,2", "0.2,0.4,0.5,1,2,4,10"),
        "ffhq64",
    ),
}


def commands(name: str, runs: Path) -> list[list[str]]:
    """The command lines of a front, in order."""
    front = FRONTS[name]
    found = []
    for part, words in front.sweeps.items():
        config = ROOT / "configs" / front.config
        found.append(["sweep", "--config", str(config), "--workdir", str(runs / part), "--over", *words])
    found.append(["front", *(str(runs / part) for part in front.sweeps), "--out", str(OUT / front.out)])
    return found


def planned() -> None:
    """Write every cell of the fronts that were not run."""
    tree = {}
    for name, front in FRONTS.items():
        if front.cost:
            continue
        cells = []
        for part, words in front.sweeps.items():
            axes = [word for word in words if "=" in word]
            fixed = dict(zip(*[iter(words[len(axes) :])] * 2, strict=True))
            names = [axis.split("=")[0] for axis in axes]
            for values in itertools.product(*(axis.split("=")[1].split(",") for axis in axes)):
                given = {**dict(zip(names, values, strict=True)), **{k[2:]: v for k, v in fixed.items()}}
                fields = {field: json.loads(value) for field, value in given.items()}
                cells.append(
                    {"sweep": part, "fields": fields, "state": "not run", "memorized": None, "quality": None}
                )
        tree[name] = {
            "config": f"configs/{front.config}",
            "command": f"python bench/fronts.py {name}",
            "cells": cells,
        }
    (OUT / "planned.json").write_text(json.dumps(tree, indent=1) + "\n")


def main() -> int:
    """Run what the command line names."""
    words = sys.argv[1:]
    if words == ["--planned"]:
        planned()
        return 0
    if not words or words[0] not in FRONTS:
        print(
            f"usage: python bench/fronts.py NAME [RUNS]; names: {', '.join(FRONTS)}; or --planned",
            file=sys.stderr,
        )
        return 2
    runs = Path(words[1]) if len(words) > 1 else ROOT / "runs" / "fronts" / words[0]
    for command in commands(words[0], runs):
        code = subprocess.run([sys.executable, "-m", "mdiff.cli", *command], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

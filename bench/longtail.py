"""What dropping the images seen once costs a denoiser, by noise level: results/ambient/longtail.json and .png.

A mixture with Zipf's weights, three widths of its components; see mdiff/probes/longtail.py. About 10 minutes on one core.

Usage: python bench/longtail.py [--repeats 20]   or, to draw the committed numbers again, --draw
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from mdiff.config import from_json
from mdiff.files import strict, write_atomically, write_json
from mdiff.probes.longtail import LongTail, World, seen_share, simulate, tau, zipf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parent.parent / "results" / "ambient"
WIDTHS = (0.005, 0.05, 0.2)
SIGMAS = np.geomspace(0.005, 20.0, 15)
COLOURS = ("#0072b2", "#d55e00", "#009e73")


def draw(found: list[LongTail], path: Path) -> None:
    """Three panels over the noise level: the gap, the gap over the optimum, and what merges."""
    figure, (absolute, relative, merged) = plt.subplots(1, 3, figsize=(12.6, 3.9), layout="constrained")
    for result, colour in zip(found, COLOURS, strict=True):
        label = f"width {result.world.width:g}"
        sigmas = [level.sigma for level in result.levels]
        for axes, name in ((absolute, "gap"), (relative, "relative")):
            values = [getattr(level, name) for level in result.levels]
            axes.plot(sigmas, [v.value for v in values], "o-", ms=3, color=colour, label=label)
            # A limit of 0 or less has no place on a logarithmic axis: the band then leaves the picture below.
            low = [max(v.low, 1e-12) for v in values]
            axes.fill_between(sigmas, low, [v.high for v in values], color=colour, alpha=0.2, lw=0)
    predicted = found[0].predicted.value
    absolute.axhline(predicted, color="0.3", ls="--", lw=1)
    absolute.text(20, predicted * 1.35, r"Feldman: $\tau_1 \Sigma\,d^2$", ha="right", color="0.3", fontsize=9)
    absolute.set(ylabel="loss of dropping singletons", ylim=(1e-6, 0.3))
    relative.axhline(1, color="0.3", ls=":", lw=1)
    relative.text(20, 1.3, "the optimum's", ha="right", color="0.3", fontsize=9)
    relative.set(ylabel="the same over the optimum's loss", ylim=(1e-4, 1e4))
    absolute.set_yscale("log")
    relative.set_yscale("log")
    absolute.legend(frameon=False, fontsize=9, loc="lower right")
    levels = found[0].levels
    sigmas = [level.sigma for level in levels]
    merged.plot(sigmas, [level.components.value for level in levels], "o-", ms=3, color="0.2")
    merged.set(yscale="log", ylabel="components that can be told apart", ylim=(0.9, 200))
    beside = merged.twinx()
    beside.plot(sigmas, [level.apart.value for level in levels], "s--", ms=3, color="#cc79a7")
    beside.set(ylim=(0, 1.04))
    beside.set_ylabel("total variation to the nearest", color="#cc79a7")
    beside.tick_params(axis="y", colors="#cc79a7")
    for axes in (absolute, relative, merged):
        axes.set(xscale="log", xlabel="noise level σ")
        axes.grid(alpha=0.25, lw=0.5)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def tree(found: list[LongTail], seconds: float) -> dict[str, Any]:
    """All of it for machines."""
    law = zipf(50_000)
    return {
        "command": "python bench/longtail.py",
        "seconds": round(seconds),
        "zipf_50000": {
            "n_tau_1": 50_000 * tau(law, 50_000),
            "seen_once": seen_share(law, 50_000),
        },
        "results": [asdict(result) for result in found],
    }


def main() -> None:
    """Simulates, writes both files and prints a line per noise level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=World().repeats, help="independent populations")
    parser.add_argument("--draw", action="store_true", help="only draw longtail.png from longtail.json")
    args = parser.parse_args()
    if args.draw:
        stored = json.loads((OUT / "longtail.json").read_text())["results"]
        return draw([from_json(LongTail, result) for result in stored], OUT / "longtail.png")
    begin = time.perf_counter()
    found = []
    for width in WIDTHS:
        found.append(simulate(World(width=width, repeats=args.repeats), SIGMAS.tolist()))
        print(
            f"width {width}: seen once {found[-1].singletons:.3f}, Feldman's value {found[-1].predicted:.4f}"
        )
        for level in found[-1].levels:
            print(
                f"  sigma {level.sigma:8.4f}  optimum {level.optimum.value:.3e}  gap {level.gap:.3e}  "
                f"relative {level.relative:.3e}  components {level.components.value:6.1f}",
                flush=True,
            )
    write_json(OUT / "longtail.json", strict(tree(found, time.perf_counter() - begin)))
    draw(found, OUT / "longtail.png")


if __name__ == "__main__":
    main()

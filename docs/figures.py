"""The gallery's figures, drawn from the committed numbers in docs/measured/.

Usage: python docs/figures.py                  draw docs/images/*.png
       python docs/figures.py --demo runs/demo  first take the demo's numbers from a run of `make demo`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mdiff.probes import results
from mdiff.train import metrics

HERE = Path(__file__).parent
BINS = np.linspace(0, 1, 41)
TWINS = ("standard", "ambient")
COLOURS = {"standard": "#3b5b92", "ambient": "#c0643c"}


def collect(folder: Path) -> dict:
    """What the figures show of a demo: the curve along training, ratios and similarity curves."""
    found = {}
    for name in TWINS:
        audit = results.load(folder / name)
        rows = [row for row in metrics.read(folder / name / "metrics.jsonl") if "eval/memorized" in row]
        ends = ("", "_low", "_high")
        found[name] = {
            "step": [row["step"] for row in rows],
            "memorized": [[round(row[f"eval/memorized{end}"], 4) for end in ends] for row in rows],
            "control": [[round(row[f"eval/control{end}"], 4) for end in ends] for row in rows],
            "n": int(rows[-1]["eval/n"]),
            "ratio": np.histogram(audit.rows["ratio"], BINS)[0].tolist(),
            "control_ratio": np.histogram(audit.rows["control_ratio"], BINS)[0].tolist(),
            "rms": {side: {k: np.round(c[k], 4).tolist() for k in ("tau", "ams", "ums")}
                    for side, c in audit.curves["rms"].items()},
        }  # fmt: skip
    return found


def along_training(demo: dict) -> plt.Figure:
    """Memorized fraction and control against training step, both twins."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for name in TWINS:
        value, low, high = np.array(demo[name]["memorized"]).T
        axis.plot(demo[name]["step"], value, "o-", color=COLOURS[name], label=name)
        axis.fill_between(demo[name]["step"], low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        axis.plot(
            demo[name]["step"],
            np.array(demo[name]["control"])[:, 0],
            ":",
            color=COLOURS[name],
            label=f"{name}, control",
        )
    axis.set(xlabel="training step", ylabel="memorized", ylim=(-0.03, 1.03))
    axis.legend(frameon=False)
    return figure


def ratios(demo: dict) -> plt.Figure:
    """How the ratio d1/d2 spreads against training and held-out faces, both twins."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, name in zip(axes, TWINS, strict=True):
        axis.stairs(demo[name]["ratio"], BINS, fill=True, color=COLOURS[name], label="training faces")
        axis.stairs(demo[name]["control_ratio"], BINS, color="black", label="held-out faces")
        axis.axvline(1 / 3, color="0.5", linestyle="--")
        axis.set(title=name, xlabel="distance to nearest / to next different")
    axes[0].set_ylabel("generations")
    axes[0].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.6, 0.95))
    return figure


def cutoffs(sweep: dict) -> plt.Figure:
    """Memorized fraction against the ambient cutoff, two seeds."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for place, (seed, rows) in enumerate(sweep["seeds"].items()):
        value, low, high = np.array([row["memorized"] for row in rows]).T
        x = np.arange(len(rows)) + 0.08 * (place - 0.5)
        axis.errorbar(x, value, (value - low, high - value), fmt="o-", capsize=3, label=f"seed {seed}")
        axis.set_xticks(np.arange(len(rows)), [f"{row['cutoff']:g}" for row in rows])
    axis.set(xlabel="loss.cutoff (0: plain training)", ylabel="memorized, %", ylim=(0, 103))
    axis.legend(frameon=False)
    return figure


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    source = parser.parse_args().demo
    if source is not None:
        (HERE / "measured/demo.json").write_text(json.dumps(collect(source), indent=None) + "\n")
    demo = json.loads((HERE / "measured/demo.json").read_text())
    sweep = json.loads((HERE / "measured/cutoffs.json").read_text())
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    for name, figure in (
        ("training", along_training(demo)),
        ("ratios", ratios(demo)),
        ("cutoffs", cutoffs(sweep)),
    ):
        figure.savefig(HERE / f"images/{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()

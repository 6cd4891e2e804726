"""Detectors against planted truth on the shipped model: results/nemo/detectors.json and duplicates.json.

Usage: python bench/detectors.py [RUNS]

Runs `mdiff detect --demo` into RUNS (runs/detectors), with one-step detectors at the sampler's first noise level, and again, for
those that take one, at level 5; keeps the numbers without the prompts' scores. About 25 minutes on one CPU core; goes on where
it was interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mdiff import cli
from mdiff.files import write_json

OUT = Path(__file__).resolve().parent.parent / "results" / "nemo"
LEVEL = "5"
ONE_STEP = (
    "seed_agreement", "seed_agreement_mean", "attention_entropy", "attention_entropy_3", "denoising_confidence",
    "edge_consistency", "score_norm", "flipd", "sharpness",
)  # fmt: skip
KEPT = ("command", "target", "settings", "truth", "verdict", "detectors", "left_out", "versions")


def main(runs: Path) -> None:
    found = {}
    for name, more in {
        "first": [],
        f"sigma={LEVEL}": ["--sigma", LEVEL, "--detectors", *ONE_STEP],
    }.items():
        folder = runs / name
        if cli.main(["detect", "--demo", "--out", str(folder), *more]):
            sys.exit(2)
        tree = json.loads((folder / "detect.json").read_text())
        found[name] = {key: tree[key] for key in KEPT}
        if name == "first":
            rows = [
                {key: row[key] for key in ("prompt", "kind", "copies", "recited")} for row in tree["prompts"]
            ]
            write_json(
                OUT / "duplicates.json",
                {
                    "command": tree["command"],
                    "target": tree["target"],
                    "curve": tree["curve"],
                    "prompts": [row for row in rows if row["recited"] is not None],
                },
            )
    write_json(OUT / "detectors.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/detectors"))

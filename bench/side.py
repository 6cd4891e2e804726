"""The evidence for extraction by a surrogate condition in results/side/: who leaks, the model or the classifier?

Usage: python bench/side.py PART [RUNS], with PART one of

    models     the targets: two disjoint halves of the data, and one run for every kind of label; 3 seeds
    crossed    each half's model under each half's classifier, compared with either half and with images of neither
    controls   classifiers that know nothing, are not told the noise, or stand alone; attacker's knowledge; membership
    evidence   detectors, return rates, implicit labels, distances to the empirical optimum
    labels     what labels do to memorization, and label noise as a mitigation
    summary    every claim with its interval, results/side/summary.json

in this order; each writes results/side/PART.json (and crossed lambda.json). Runs go to RUNS (runs/side). Interrupted, the same command
goes on. Set OMP_NUM_THREADS=1 and XLA_FLAGS=--xla_cpu_multi_thread_eigen=false to keep it on one core.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from side_common import (
    ATTACK,
    HALVES,
    SEEDS,
    TARGET,
    attack,
    images,
    over_seeds,
    slim,
    synthetic,
    write,
)
from side_evidence import evidence
from side_labels import labels
from side_summary import summary

from mdiff.console import Monitor
from mdiff.probes import extraction, pareto, robustness
from mdiff.recipes import classified, classify, guided, side_scores
from mdiff.recipes import side as recipe
from mdiff.recipes.ascent import ascent
from mdiff.recipes.side_scores import Strength
from mdiff.types import Estimate, to_uint8

ROOT = Path(__file__).resolve().parent.parent

# -------------------------------------------------------------------------------------------- models

LABELLED = {
    "labels": (["data.labels=own,clusters,random,redrawn"], ["--net.classes", "10"]),
    "unique": (["data.labels=unique"], ["--net.classes", "100"]),
    "random": (["net.classes=2,50"], ["--data.labels", "random"]),
    "noise": (["data.label_noise=0.2,0.5"], ["--net.classes", "10"]),
}
"""Sweeps of labelled models: what is varied, what is fixed."""


def models(runs: Path) -> None:
    """Train the targets."""
    for seed in SEEDS:
        fixed = ["--seed", str(seed), "--data.seed", str(seed)]
        sweeps = {"halves": ([f"data.skip={','.join(map(str, HALVES.values()))}"], []), **LABELLED}
        for name, (over, also) in sweeps.items():
            words = [
                "sweep",
                "--config",
                str(TARGET),
                "--workdir",
                str(runs / f"{name}{seed}"),
                "--over",
                *over,
            ]
            subprocess.run([sys.executable, "-m", "mdiff.cli", *words, *also, *fixed], check=True)


# ------------------------------------------------------------------------------------------- crossed


def crossed(runs: Path, monitor: Monitor) -> None:
    """Who leaks: every model under every classifier, against every half."""
    arms: dict[str, dict[float, list[Strength]]] = {}
    picks, curve = [], []
    for seed in SEEDS:
        sets, audit = images(runs, seed), ATTACK.audit
        references = {name: sets[name] for name in ("A", "B", "C")}
        attacks = {name: attack(runs, seed, name, monitor) for name in HALVES}
        for model in HALVES:
            target, folder = attacks[model]
            for source in HALVES:
                classifier, params = classify.load(attacks[source][1] / "classifier", monitor)
                place = folder if source == model else runs / f"side{seed}" / f"{model}_under_{source}"
                files = recipe.extract(target, ATTACK, classifier, params, place, monitor)
                found = side_scores.measure(files, synthetic(folder), references, "C", audit, sets["R"])
                monitor.say(f"seed {seed}: model {model} under classifier {source} measured")
                for one in found:
                    arms.setdefault(f"{model} under {source}", {}).setdefault(one.scale, []).append(one)
                if source == model:
                    pick = {
                        "seed": seed,
                        "half": model,
                        "chosen": side_scores.chosen(found, ATTACK.quality_floor),
                    }
                    picks.append({**pick, "oracle": side_scores.oracle(found, model)})
                    curve += [{"seed": seed, "half": model, **slim(one, model)} for one in found]
    rows = []
    for arm, by_scale in arms.items():
        for scale, found in by_scale.items():
            for reference in HALVES:
                rows.append(
                    {
                        "arm": arm,
                        "scale": scale,
                        "against": reference,
                        **over_seeds([one.scores[reference] for one in found]),
                    }
                )
    write("crossed", {"claim": CLAIM, "picks": picks, "rows": rows})
    write("lambda", {"picks": picks, "cells": curve, "rows": lambda_rows(arms), **gains(arms)})


CLAIM = (
    "memorized_excess of 'B under A' against A is the share of generations of a model that never saw A, under a classifier "
    "that knows A's model, that copy A, less the share that copies C, which neither saw: above zero, the classifier leaks"
)


def lambda_rows(arms: Mapping[str, Mapping[float, Sequence[Strength]]]) -> list[dict[str, Any]]:
    """Memorization and quality over the strength, of models under their own classifiers; 3 seeds of 2 halves."""
    rows = []
    for scale in arms["A under A"]:
        pairs = [(one, name) for name in HALVES for one in arms[f"{name} under {name}"][scale]]
        row: dict[str, Any] = {"scale": scale}
        for key in ("memorized", "memorized_excess", "coverage", "area_excess"):
            row[key] = asdict(pareto.over_seeds([one.scores[name].estimates[key] for one, name in pairs]))
        for key in ("energy", "precision", "recall"):
            row[key] = asdict(pareto.over_seeds([one.quality[key] for one, _ in pairs]))
        row["grouped"] = asdict(pareto.over_seeds([one.repetition.grouped for one, _ in pairs]))
        rows.append(row)
    return rows


def gains(arms: Mapping[str, Mapping[float, Sequence[Strength]]]) -> dict[str, Any]:
    """Strength 8 less unguided, and the best strength less the highest, paired by model: 3 seeds of 2 halves."""

    def cells(scale: float, key: str) -> dict[int, Estimate]:
        found = [(one, name) for name in HALVES for one in arms[f"{name} under {name}"][scale]]
        return {
            place: one.quality[key] if key in one.quality else one.scores[name].estimates[key]
            for place, (one, name) in enumerate(found)
        }

    def paired(first: float, second: float, key: str) -> Any:
        found = pareto.difference(cells(first, key), cells(second, key))
        return None if found is None else asdict(found)

    scales = sorted(arms["A under A"])
    best = max(scales, key=lambda scale: np.mean([e.value for e in cells(scale, "memorized").values()]))
    return {
        "gain": {key: paired(0.0, 8.0, key) for key in ("memorized", "coverage", "energy", "recall")},
        "best": best,
        "fall": paired(scales[-1], best, "memorized"),
    }


# ------------------------------------------------------------------------------------------- controls

KNOWN = {
    "clusters": ("own generations", {}),
    "soft": ("own generations", {"surrogate": {"soft": 0.1}}),
    "network": ("own generations, and the model's features", {"surrogate": {"features": "network"}}),
    "shuffled": ("own generations, labels dealt at random", {"surrogate": {"teacher": "shuffled"}}),
    "untimed": ("own generations, the classifier not told the noise", {"classifier": {"timed": False}}),
    "oracle": ("the training images and their classes", {"surrogate": {"teacher": "oracle"}}),
}
"""Attacker -> what it knows, and how its settings differ from `ATTACK`."""
FEW = (0.0, 2.0, 8.0, 32.0)
"""Strengths of the controls."""
ONCE = ("soft", "network")
"""Attackers of one seed only."""


def controls(runs: Path, monitor: Monitor) -> None:
    """Classifiers that know nothing, are not told the noise, or stand alone; and what else an attacker might know."""
    found: dict[str, dict[float, list[Strength]]] = {}
    members: dict[str, list[Estimate]] = {}
    robust, alone = [], []
    for seed in SEEDS:
        sets = images(runs, seed)
        references = {name: sets[name] for name in ("A", "C")}
        methods = {}
        for arm, (_, fields) in KNOWN.items():
            if seed and arm in ONCE:
                continue
            parts = {part: replace(getattr(ATTACK, part), **given) for part, given in fields.items()}
            cfg = replace(ATTACK, scales=ATTACK.scales if arm == "clusters" else FEW, **parts)
            _, folder = attack(runs, seed, "A", monitor, cfg, "" if arm == "clusters" else f"_{arm}")
            files = {scale: guided.path_of(folder / "guided", scale) for scale in FEW}
            measured = side_scores.measure(files, synthetic(folder), references, "C", ATTACK.audit, sets["R"])
            for one in measured:
                found.setdefault(arm, {}).setdefault(one.scale, []).append(one)
            methods["unguided"] = measured[0].scores
            methods[arm] = next(one for one in measured if one.scale == 8.0).scores
            classifier, params = classify.load(folder / "classifier", monitor)
            members.setdefault(arm, []).append(
                classified.membership(classifier, params, sets["A"], sets["R"])
            )
            if arm == "clusters":
                index = np.arange(256, dtype=np.int32)
                made = ascent(classifier, params, index, index % classifier.classes, seed=seed)
                alone.append(extraction.score(to_uint8(made), references, ATTACK.audit, control="C"))
            monitor.say(f"seed {seed}: {arm} measured")
        robust.append(
            {"seed": seed, **robustness.to_json(robustness.compare(methods, "unguided", reference="A"))}
        )
    rows = [
        {
            "attacker": arm,
            "knows": KNOWN[arm][0],
            "scale": scale,
            **over_seeds([one.scores["A"] for one in each]),
            "energy": asdict(pareto.over_seeds([one.quality["energy"] for one in each])),
        }
        for arm, by_scale in found.items()
        for scale, each in by_scale.items()
    ]
    rows.append(
        {
            "attacker": "ascent",
            "knows": "the classifier alone, no diffusion model",
            "scale": None,
            **over_seeds([one["A"] for one in alone]),
        }
    )
    membership = {
        arm: {**asdict(pareto.over_seeds(each)), "seeds": [asdict(one) for one in each]}
        for arm, each in members.items()
    }
    # Which differences stand at how many of all thresholds, without the differences themselves.
    for each in robust:
        for curves in each["thresholds"].values():
            for curve in curves.values():
                del curve["difference"], curve["tau"]
    at = {
        arm: {seed: one.scores["A"].estimates["memorized"] for seed, one in enumerate(by[8.0])}
        for arm, by in found.items()
    }
    differences = {
        f"{first} over {second}": asdict(paired)
        for first, second in (("clusters", "shuffled"), ("clusters", "untimed"), ("oracle", "clusters"))
        if (paired := pareto.difference(at[second], at[first]))
    }
    every = [each["thresholds"]["clusters"]["cosine"]["above"] for each in robust]
    shares = pareto.over_seeds([Estimate(x, x, x, 1) for x in every], limits=(0.0, 1.0))
    write(
        "controls",
        {
            "rows": rows,
            "differences": differences,
            "membership": membership,
            "shares of thresholds": asdict(shares),
            "robustness": robust,
        },
    )


PARTS: dict[str, Callable[[Path, Monitor], None]] = {
    "models": lambda runs, monitor: models(runs),
    "crossed": crossed,
    "controls": controls,
    "evidence": evidence,
    "labels": labels,
    "summary": summary,
}


def main() -> int:
    """Run what the command line names."""
    words = sys.argv[1:]
    if not words or words[0] not in PARTS:
        print(f"usage: python bench/side.py PART [RUNS]; parts: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    runs = Path(words[1]) if len(words) > 1 else ROOT / "runs" / "side"
    begin = time.time()
    with Monitor() as monitor:
        PARTS[words[0]](runs, monitor)
    print(f"{words[0]}: {time.time() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The modes of NeMo's search beside a plain sequential PyTorch loop (bench/nemo_peer.py), paired, in one run.

Usage: python bench/nemo_sweep.py [--prompts 3] [--rounds 5] [--tests 60] [--seeds 6] [--out FILE]

Ours searches the value neurons of the model that comes with mdiff on a few memorized prompts; before, a search of
one prompt in each mode compiles, which is reported apart. Then, round by round in turning order, a block of the peer's tests stands beside each search of
all prompts, and each round gives one ratio for each mode. N is the number of candidates refined: the initial sets of exact mode.

    exact      neurons per second, ours / peer: the peer's seconds per test x N / ours
    fast, gradient, gradient refined    seconds for the same question: the peer's seconds per test x N of exact / ours

`ours_s` and `peer_s` are medians of seconds per prompt: the search from D2 to D4, without the text's and the whole network's
first look, which both sides make once. The sequential algorithm tests initial sets and layers too, and then fewer neurons:
`tests_ratio` ("by tests") counts the peer's tests as it would make them. `bits` is log2 of the number of ways to choose the
neurons found among the candidates: about what a search by yes-or-no tests needs if it knows nothing about them but how many.
Writes bench/results/nemo_sweep.json; the aims stand beside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import nemo_peer
import numpy as np
import torch
from ambient_step import interval

from mdiff import config, flops
from mdiff.console import Monitor
from mdiff.errors import UserError
from mdiff.nemo import Nemo
from mdiff.probes import units
from mdiff.probes.first_step import FirstStep
from mdiff.probes.found import Found
from mdiff.recipes import nemo, prompts, text_target
from mdiff.train import mesh
from mdiff.trees import named_leaves

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "nemo_sweep.json"
AIMS = {"exact": 1.5, "fast": 5.0, "gradient": 20.0, "gradient, refined": 20.0}
MOST = 1.1
"""Evaluations of exact mode per candidate."""
ORDINARY = 60


def varied(asked: prompts.Prompts) -> np.ndarray:
    """Places of prompts: one of each number of copies, most copies first, then a second of each, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for copies in asked.copies.tolist():
        turns.append(seen[copies])
        seen[copies] += 1
    return np.lexsort((-asked.copies, turns))


class Ours:
    """The searches of one set of memorized prompts.

    Args:
      count: how many prompts, see `varied`.
      seeds: of each.
    """

    def __init__(self, count: int, seeds: int) -> None:
        self.monitor = Monitor(quiet=True)
        on = config.Mesh(data=1)
        self.cfg = Nemo(sigma=nemo_peer.SIGMA, seeds=seeds, batch=4)
        self.target = text_target.shipped(on)
        model, params, subset = self.target.model, self.target.params, self.target.subset
        self.units = units.discover(model, self.cfg.layers)
        self.first = FirstStep(model, params, self.units, self.cfg, mesh.make_mesh(on))
        ordinary = prompts.of_heldout(subset).take(np.arange(ORDINARY))
        self.calibration = nemo.calibrate(self.first, ordinary, self.cfg, self.monitor)
        asked = prompts.of_training(subset)
        asked = asked.take(varied(asked)[: 4 * count])
        memorized = self.first.look(asked.tokens).kept(self.calibration.tau).any(1)
        self.asked = asked.take(np.flatnonzero(memorized)[:count])
        if len(self.asked) < count:
            raise UserError(
                f"--prompts {count}: {len(self.asked)} of the {len(asked)} looked at are memorized; give fewer"
            )

    def search(self, mode: Any, count: int | None = None) -> nemo.Search:
        """All prompts, or the first ones, in one mode, nothing remembered."""
        asked = self.asked.take(np.arange(len(self.asked) if count is None else count))
        cfg = replace(self.cfg, mode=mode.split(",")[0], refine="refined" in mode)
        return nemo.search(self.first, asked, self.calibration, cfg, self.monitor)

    def size(self) -> dict[str, int]:
        """Parameters and work of the U-Net; the peer's text is embedded before."""
        model, params, seeds = self.target.model, self.target.params, self.cfg.seeds
        text = jax.eval_shape(lambda params: model.condition(params, {}, n=seeds), params)
        xt, t = (
            jax.ShapeDtypeStruct((seeds, *model.shape), jnp.float32),
            jax.ShapeDtypeStruct((seeds,), jnp.float32),
        )
        work = flops.count(
            lambda params, xt, t, text: model.apply(params, xt, t, text)[0].x0, params, xt, t, text
        )
        inside = [leaf.size for name, leaf in named_leaves(params) if name.startswith("net/")]
        return {"parameters": sum(inside), "flops": work.total, "neurons": len(self.units)}


def overlap(exact: Sequence[Found], other: Sequence[Found]) -> list[dict[str, Any]]:
    """For each prompt how the neurons differ: IoU, and how many one side alone has."""
    rows = []
    for one, two in zip(exact, other, strict=True):
        a, b = set(one.refined), set(two.refined)
        iou = len(a & b) / len(a | b) if a | b else 1.0
        rows.append({"iou": iou, "difference": len(a ^ b), "exact": len(a), "found": len(b)})
    return rows


def row(
    mode: str,
    found: Sequence[Found],
    exact: Sequence[Found],
    seconds: Mapping[str, Sequence[float]],
    machine: str,
) -> dict[str, Any]:
    """One line of the result."""
    candidates, prompts = sum(len(one.initial) for one in exact), len(exact)
    # What the sequential algorithm tests: every decision of exact mode, each by a forward pass.
    tests = sum(len(one.decisions) for one in exact)
    evaluations = sum(one.evaluations for one in found)
    ours, peer = np.array(seconds["ours"]), np.array(seconds["peer"])
    ratio = interval((peer * candidates / ours).tolist())
    tree: dict[str, Any] = {
        "name": mode,
        "ours_s": float(np.median(ours)) / prompts,
        "peer_s": float(np.median(peer)) * candidates / prompts,
        "ratio": ratio["median"],
        "ratio_low": ratio["low"],
        "ratio_high": ratio["high"],
        "aim": AIMS[mode],
        "met": ratio["median"] >= AIMS[mode],
        "runs": len(ours),
        "machine": machine,
        "peer_s_per_test": float(np.median(peer)),
        "tests": tests,
        "tests_ratio": float(np.median(peer * tests / ours)),
        "N": candidates,
        "evaluations": evaluations,
        "evaluations_per_N": evaluations / candidates,
        "bits": sum(math.log2(math.comb(len(one.initial), len(one.refined))) for one in exact),
        "ours_s_per_evaluation": float(np.median(ours)) / evaluations,
        "rounds": sum(one.rounds for one in found),
        "neurons": [len(one.refined) for one in found],
        "initial": [len(one.initial) for one in found],
        "evaluations_of_prompts": [one.evaluations for one in found],
        "reason": [one.reason for one in found],
        "score": [one.score for one in found],
        "disagreement": overlap(exact, found),
    }
    if mode == "exact":
        tree |= {"evaluations_aim": MOST, "evaluations_met": evaluations <= MOST * candidates}
    return tree


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For reading."""
    lines = [
        f"{'mode':17} {'ours s':>8} {'peer s':>8} {'ratio':>6} {'aim':>5}  {'':6} {'by tests':>8} "
        f"{'evals':>6} {'/N':>6} {'bits':>6} {'rounds':>6} "
        f"{'ms each':>8} {'IoU with exact':>15} {'differ':>6}"
    ]
    for one in rows:
        shared, differ = ([each[key] for each in one["disagreement"]] for key in ("iou", "difference"))
        lines.append(
            f"{one['name']:17} {one['ours_s']:8.2f} {one['peer_s']:8.2f} {one['ratio']:6.1f} {one['aim']:5.1f}  "
            f"{'met' if one['met'] else 'missed':6} {one['tests_ratio']:8.1f} "
            f"{one['evaluations']:6} {one['evaluations_per_N']:6.2f} {one['bits']:6.0f} "
            f"{one['rounds']:6} {1e3 * one['ours_s_per_evaluation']:8.2f} {statistics.mean(shared):15.2f} {sum(differ):6}"
        )
        if "evaluations_aim" in one:
            met = "met" if one["evaluations_met"] else "missed"
            lines.append(f"{'':17} evaluations per N at most {one['evaluations_aim']}: {met}")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, for the result file."""
    variants = nemo_peer.trials(options.seeds, options.tests // 3)
    threads, layout = min(variants, key=variants.__getitem__)
    peer, ours = nemo_peer.Peer(options.seeds, layout), Ours(options.prompts, options.seeds)
    sizes = {
        "ours": ours.size(),
        "peer": {"parameters": peer.parameters, "flops": peer.flops(), "neurons": sum(peer.sizes)},
    }
    compiling: dict[str, float] = {}
    found: dict[str, tuple[Found, ...]] = {}
    for mode in AIMS:
        cold, warm = (ours.search(mode, 1).seconds for _ in range(2))
        compiling[mode] = cold - warm
    nemo_peer.seconds_per_test(peer, 5, threads)
    seconds: dict[str, dict[str, list[float]]] = {mode: {"ours": [], "peer": []} for mode in AIMS}
    for number in range(options.rounds):
        for turn, mode in enumerate(np.roll(list(AIMS), number).tolist()):
            sides = ("ours", "peer") if (number + turn) % 2 else ("peer", "ours")
            for side in sides:
                if side == "ours":
                    made = ours.search(mode)
                    seconds[mode]["ours"].append(made.seconds)
                    found[mode] = made.found
                else:
                    seconds[mode]["peer"].append(nemo_peer.seconds_per_test(peer, options.tests, threads))
    cores = os.cpu_count()
    machine = f"{platform.machine()}, {cores} cores, jax {jax.__version__}, torch {torch.__version__}"
    return {
        "rows": [row(mode, found[mode], found["exact"], seconds[mode], machine) for mode in AIMS],
        "compile_seconds": compiling,
        "prompts": [ours.asked.row(place) for place in range(len(ours.asked))],
        "tau": ours.calibration.tau,
        "sizes": sizes,
        "peer": {
            "chosen": nemo_peer.named((threads, layout)),
            "ms_per_test": {nemo_peer.named(key): 1e3 * value for key, value in variants.items()},
            "diffusers": diffusers.__version__,
        },
        "seconds": seconds,
        "command": shlex.join(["python", "bench/nemo_sweep.py", *sys.argv[1:]]),
        "load": os.getloadavg(),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tests", type=int, default=60, help="of the peer in one block")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if min(options.prompts, options.rounds) < 1 or options.seeds < 2 or options.tests < 3:
        parser.error("--prompts and --rounds must be 1 or more, --seeds 2, --tests 3")
    try:
        tree = measure(options)
    except UserError as error:
        parser.error(str(error))
    for side, size in tree["sizes"].items():
        print(
            f"{side:5} {size['parameters']:,} parameters, {size['flops']:,} FLOPs a test, {size['neurons']} neurons"
        )
    print(
        f"peer: {tree['peer']['chosen']}, of",
        {k: round(v, 1) for k, v in tree["peer"]["ms_per_test"].items()},
    )
    print("compilation:", {mode: round(took, 1) for mode, took in tree["compile_seconds"].items()}, "seconds")
    print(table(tree["rows"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()

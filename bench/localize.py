"""Where the shipped model's recitals pass, results/nemo/localize.json: the questions NeMo's reviewers asked, on planted truth.

Usage: python bench/localize.py [PART ...] [--workdir RUN] [--few] [--out FILE], with PART among

    modes       exact, fast and gradient search: neurons, evaluations, seconds of D1 to D4, disagreement; images with each set off,
                beside the same number of random and of weight x activation (Wanda-style) neurons, and all initial ones
    stability   the same search from other noises, and from the shallow layers on
    tau         neurons and images for tau = mean + k std
    transfer    neurons of half of the prompts on the other half
    factors     the found neurons' activations multiplied by .75 to -1
    tokens      statistics over words, the end token, or padding
    components  necessity and sufficiency of each component and stage of the network at equal fractions
    ordinary    what the same neurons do to attention outputs of ordinary prompts
    dose        copies over the number of leading neurons switched off: how few are enough

all of them, in this order, when none is named; `stability` to `ordinary` need `modes`. Each writes its part of the file when it
is done. One process on two CPU cores needs about 40 minutes. `--workdir` asks a run of yours instead of the shipped model, `--few`
only twelve of its prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.console import Monitor
from mdiff.fields import to_json
from mdiff.files import strict, write_json
from mdiff.nemo import Nemo
from mdiff.probes import found, intervals, localize, recited
from mdiff.probes import units as units_of
from mdiff.probes.first_step import FirstStep
from mdiff.probes.found import Found
from mdiff.probes.units import Units, ablate
from mdiff.recipes import nemo, nemo_verify, prompts, recite, text_target
from mdiff.recipes.prompts import Prompts
from mdiff.train import mesh

OUT = Path(__file__).resolve().parent.parent / "results" / "nemo" / "localize.json"
BASE = Nemo(sigma=5.0, seeds=6)
IMAGES, GUIDANCE, SEED = 4, 3.0, 2
LEAST = 30
"""Copies of the verbatim prompts that are searched; templates are all."""
FRACTION = 0.25
"""Of each layer's neurons that are switched off, or alone left on, in `components`."""
COMPONENTS = {
    "text encoder": "^text/",
    "queries": "cross/query_gate",
    "keys": "cross/key_gate",
    "values": "cross/value_gate",
    "convolutions": r"^net/[^/]+/(hidden|out)_gate",
    "feed-forward": "feed/hidden_gate",
}
STAGES = {"down": "^net/enc", "middle": "^net/mid", "up": "^net/dec"}


class Lab:
    """The model, its prompts, and what everything is compared with."""

    def __init__(self, monitor: Monitor, workdir: Path | None = None, few: bool = False) -> None:
        self.monitor = monitor
        mesh_ = config.Mesh()
        self.target = text_target.of_run(workdir, mesh_, monitor) if workdir else text_target.shipped(mesh_)
        self.on = mesh.make_mesh(config.Mesh())
        trained = prompts.of_training(self.target.subset)
        self.asked = trained.take((trained.copies >= LEAST) & (trained.kind != "unique"))
        self.ordinary = prompts.of_heldout(self.target.subset)
        verbatim = np.flatnonzero(self.asked.kind == "verbatim")
        template = np.flatnonzero(self.asked.kind == "template")
        self.some = self.asked.take(np.r_[verbatim[:: max(1, len(verbatim) // 8)][:8], template[:4]])
        if few:
            self.asked = self.some
        self.train = np.asarray(self.target.subset.train.x)

    def first(self, layers: str = BASE.layers, cfg: Nemo = BASE) -> FirstStep:
        layer = units_of.discover(self.target.model, layers)
        return FirstStep(self.target.model, self.target.params, layer, cfg, self.on)

    def search(self, asked: Prompts, cfg: Nemo) -> tuple[nemo.Search, nemo.Calibration, FirstStep, float]:
        """A search of its own, after one prompt that compiles; with its seconds."""
        first = self.first(cfg=cfg)
        calibration = nemo.calibrate(first, self.ordinary, cfg, self.monitor)
        nemo.search(first, asked.take(np.arange(1)), calibration, cfg, self.monitor)
        begun = time.perf_counter()
        search = nemo.search(first, asked, calibration, cfg, self.monitor)
        return search, calibration, first, time.perf_counter() - begun

    def drawer(self, layers: Units) -> Callable[[Prompts, np.ndarray], dict[str, np.ndarray]]:
        """`(prompts, factor [P,N]) -> ` share of copies, share nearest to the own image [P], and the images."""
        sample = dataclasses.replace(self.target.config.sample, guidance=GUIDANCE, seed=SEED)
        draw = recite.make(self.target.model, layers, sample)

        def drawn(asked: Prompts, factor: np.ndarray) -> dict[str, np.ndarray]:
            images = draw(self.target.params, asked.tokens, factor, np.arange(IMAGES))
            seen = recited.verdicts(images, asked.own, self.train, self.target.config.audit)
            return {"copies": seen.share, "nearest": (seen.ratio < 1).mean(1), "images": images}

        return drawn


def estimate(values: np.ndarray) -> dict[str, Any]:
    """Mean over prompts, with an interval that resamples them."""
    return dataclasses.asdict(
        intervals.bootstrap(intervals.mean(np.asarray(values, float)), len(values), n_resamples=1000, seed=0)
    )


def by_kind(asked: Prompts, values: np.ndarray) -> dict[str, Any]:
    kinds = {kind: estimate(values[asked.kind == kind]) for kind in ("verbatim", "template")}
    return {"all": estimate(values), **kinds}


def sizes(records: Sequence[Found]) -> np.ndarray:
    return np.array([len(each.refined) for each in records])


def off_of(layers: Units, records: Sequence[Found]) -> np.ndarray:
    return np.stack([layers.off(each.refined) for each in records])


def whole_seen(lab: Lab, first: FirstStep, asked: Prompts, tau: float) -> None:
    """Makes `first.evaluate` score these prompts, all seeds that are kept (all, where none is)."""
    looked = first.look(asked.tokens)
    kept = looked.kept(tau)
    first.prompts(looked, kept | ~kept.any(1, keepdims=True))


# ---------------------------------------------------------------------------- the parts


def modes(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    runs: dict[str, nemo.Search] = {}
    rows: dict[str, Any] = {}
    for mode in ("exact", "fast", "gradient", "gradient, refined"):
        cfg = dataclasses.replace(BASE, mode=mode.split(",")[0], refine="refined" in mode)  # type: ignore[arg-type]
        search, calibration, first, seconds = lab.search(lab.asked, cfg)
        runs[mode] = search
        begun = time.perf_counter()
        first.look(lab.asked.tokens)
        look = (time.perf_counter() - begun) / len(lab.asked)
        second = seconds_of_outliers(search.looked.activation, search.found, calibration, cfg)
        rows[mode] = {
            "seconds": seconds,
            "D1_seconds_per_prompt": look,
            "by_kind": {
                kind: stages(search.found, seconds, look, second, lab.asked.kind == kind)
                for kind in ("verbatim", "template")
            },
            "neurons": by_kind(lab.asked, sizes(search.found)),
            "initial": by_kind(lab.asked, np.array([len(each.initial) for each in search.found])),
            "evaluations": sum(each.evaluations for each in search.found),
            "reached_tau": sum(each.reason == "below tau" for each in search.found),
            "violations": sum(each.violations for each in search.found),
        }
        if mode != "exact":
            each = [found.disagreement(a, b) for a, b in zip(runs["exact"].found, search.found, strict=True)]
            rows[mode]["iou_with_exact"] = by_kind(lab.asked, np.array([one.iou for one in each]))
            rows[mode]["same_as_exact"] = sum(one.same for one in each)
    exact, layers = runs["exact"].found, first.units
    whole_seen(lab, first, lab.asked, calibration.tau)
    union = found.frequency(exact, len(layers)) > 0
    random, beside = nemo_verify.controls(exact, layers.layer, union, BASE.control_seed)
    sets = {
        "whole": np.zeros_like(random),
        "exact": off_of(layers, exact),
        "fast": off_of(layers, runs["fast"].found),
        "gradient": off_of(layers, runs["gradient"].found),
        "gradient, refined": off_of(layers, runs["gradient, refined"].found),
        "initial (not refined)": np.stack([layers.off(each.initial) for each in exact]),
        "random, as many": random,
        "weight x activation, as many": wanda(
            lab, layers, runs["exact"].looked.activation, calibration, sizes(exact)
        ),
        "union": np.broadcast_to(union, random.shape),
    }
    drawn = lab.drawer(layers)
    images = {}
    for name, off in sets.items():
        seen = drawn(lab.asked, np.where(off, BASE.factor, 1.0))
        score = np.ones(len(off)) if name == "whole" else first.evaluate(np.arange(len(off)), off)
        images[name] = {
            "neurons": float(off.sum(1).mean()),
            "first_step": by_kind(lab.asked, score),
            "copies": by_kind(lab.asked, seen["copies"]),
            "nearest_own": by_kind(lab.asked, seen["nearest"]),
        }
        print(name, images[name]["copies"]["all"], images[name]["nearest_own"]["all"], flush=True)
    return {
        "prompts": [lab.asked.row(i) for i in range(len(lab.asked))],
        "neurons_searched": len(layers),
        "tau": calibration.to_json(),
        "runs": rows,
        "networks": images,
        "random_beside": {way: beside.count(way) for way in nemo_verify.BESIDE},
        "exact": [dataclasses.asdict(dataclasses.replace(each, decisions=())) for each in exact],
    }


def seconds_of_outliers(
    activation: np.ndarray, records: Sequence[Found], calibration: nemo.Calibration, cfg: Nemo
) -> np.ndarray:
    """[P]: looking up the outliers (D2) of every threshold down to the last one tried; gradient mode tries none."""
    out, steps = [], localize.thetas(cfg)
    for row, record in zip(activation, records, strict=True):
        begun = time.perf_counter()
        for i, theta in enumerate(steps):
            if theta >= record.theta:
                localize.outliers(row, calibration.neurons, theta, i * cfg.top, cfg.two_sided)
        out.append(time.perf_counter() - begun)
    return np.array(out)


def stages(
    records: Sequence[Found], seconds: float, look: float, second: np.ndarray, chosen: np.ndarray
) -> dict[str, Any]:
    """Medians per prompt: evaluations of D3 and D4, and their seconds by the run's seconds per evaluation."""
    each = [record for record, here in zip(records, chosen, strict=True) if here]
    one = seconds / max(1, sum(record.evaluations for record in records))
    third = np.array([sum(d.stage in ("initial", "ranked") for d in record.decisions) for record in each])
    fourth = np.array([record.evaluations for record in each]) - third
    return {
        "prompts": len(each),
        "D1_seconds": look,
        "D2_seconds": float(np.median(second[chosen])),
        "D3_evaluations": float(np.median(third)),
        "D3_seconds": float(np.median(third)) * one,
        "D4_evaluations": float(np.median(fourth)),
        "D4_seconds": float(np.median(fourth)) * one,
        "seconds_per_evaluation": one,
        "initial": float(np.median([len(record.initial) for record in each])),
        "refined": float(np.median([len(record.refined) for record in each])),
    }


def wanda(
    lab: Lab, layers: Units, activation: np.ndarray, calibration: nemo.Calibration, count: np.ndarray
) -> np.ndarray:
    """bool [P,N]: the `count` [P] neurons of largest weight times activation."""
    more = wanda_worth(lab, layers, activation, calibration)
    return np.stack([layers.off(np.argsort(-row)[:n]) for row, n in zip(more, count, strict=True)])


def wanda_worth(lab: Lab, layers: Units, activation: np.ndarray, calibration: nemo.Calibration) -> np.ndarray:
    """[P,N]: weight times activation above that of ordinary prompts (after arXiv 2306.11695, eq. 1)."""
    weight = np.concatenate([norms(lab, name) for name in layers.names])
    return weight * (activation - calibration.neurons.mean)


def norms(lab: Lab, name: str) -> np.ndarray:
    """[C], norms of the rows of the map that reads a layer of value neurons."""
    at: Any = lab.target.params["net"]
    for part in name.removeprefix("net/").split("/")[:-1]:
        at = at[part]
    return np.linalg.norm(np.asarray(at["out"]["map"]["kernel"]), axis=1)


def exact_of(past: dict[str, Any], lab: Lab) -> list[Found]:
    """The exact records of `lab.some`, from the part `modes`."""
    at = {row["prompt"]: i for i, row in enumerate(past["modes"]["prompts"])}
    load = [Found.load(past["modes"]["exact"][at[text]]) for text in lab.some.text]
    return [dataclasses.replace(each, prompt=i) for i, each in enumerate(load)]


def stability(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    base, out = exact_of(past, lab), {}
    for name, other in {
        "noises": dataclasses.replace(BASE, seed=11),
        "order": dataclasses.replace(BASE, order="shallow"),
    }.items():
        search, *_ = lab.search(lab.some, other)
        mean, each = found.stability([base, list(search.found)])
        n, size = past["modes"]["neurons_searched"], (sizes(base) + sizes(search.found)) / 2
        out[name] = {
            "iou": dataclasses.asdict(mean),
            "each": each.tolist(),
            "iou_by_chance": float(np.mean(size / (2 * n - size))),
            "neurons": sizes(search.found).tolist(),
        }
    return {"neurons": sizes(base).tolist(), **out}


def tau(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for k in (-1.0, 0.0, 1.0, 2.0):
        cfg = dataclasses.replace(BASE, mode="fast", tau_sigmas=k)
        search, calibration, first, seconds = lab.search(lab.some, cfg)
        seen = lab.drawer(first.units)(lab.some, np.where(off_of(first.units, search.found), 0.0, 1.0))
        out[f"{k:g}"] = {
            "tau": calibration.tau,
            "false_positives": dataclasses.asdict(calibration.false_positives),
            "neurons": by_kind(lab.some, sizes(search.found)),
            "score": float(np.mean([each.score for each in search.found if each.initial])),
            "copies": by_kind(lab.some, seen["copies"]),
            "nearest_own": by_kind(lab.some, seen["nearest"]),
            "seconds": seconds,
        }
    return out


def transfer(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    records = [Found.load(each) for each in past["modes"]["exact"]]
    layers = units_of.discover(lab.target.model, BASE.layers)
    splits = []
    for seed in range(20):
        known = np.zeros(len(records), bool)
        known[np.random.default_rng(seed).permutation(len(records))[: len(records) // 2]] = True
        splits.append((known, found.transfer(records, known, layers.layer)))
    first, asked = lab.first(), lab.asked
    whole_seen(lab, first, asked, past["modes"]["tau"]["tau"])
    known, one = splits[0]
    others, size = np.flatnonzero(~known), int(np.median(sizes(records)))
    counts = found.frequency([r for r, k in zip(records, known, strict=True) if k], len(layers))
    sets = {
        "union of the other half": layers.off(one.union),
        "its most frequent, as many as one prompt's": layers.off(np.argsort(-counts, kind="stable")[:size]),
    }
    drawn, images = lab.drawer(layers), {}
    for name, off in sets.items():
        rows = np.broadcast_to(off, (len(others), len(off)))
        seen = drawn(asked.take(others), np.where(rows, 0.0, 1.0))
        images[name] = {
            "neurons": int(off.sum()),
            "first_step": estimate(first.evaluate(others, rows)),
            "copies": estimate(seen["copies"]),
            "nearest_own": estimate(seen["nearest"]),
        }
    return {
        "splits": len(splits),
        "covered_by_layer": dict(
            zip(layers.names, np.nanmean([t.covered for _, t in splits], 0).tolist(), strict=True)
        ),
        "overlap_by_layer": dict(
            zip(layers.names, np.mean([t.overlap for _, t in splits], 0).tolist(), strict=True)
        ),
        "union": float(np.mean([len(t.union) for _, t in splits])),
        "complete": float(np.mean([t.complete.value for _, t in splits])),
        "undiscovered_prompts": images,
    }


def factors(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    layers = units_of.discover(lab.target.model, BASE.layers)
    off, drawn, out = off_of(layers, exact_of(past, lab)), lab.drawer(layers), {}
    for factor in (0.75, 0.5, 0.25, 0.0, -0.5, -1.0):
        seen = drawn(lab.some, np.where(off, factor, 1.0))
        out[f"{factor:g}"] = {
            "copies": by_kind(lab.some, seen["copies"]),
            "nearest_own": by_kind(lab.some, seen["nearest"]),
        }
    return out


def tokens(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    base, out = exact_of(past, lab), {}
    for which in ("words", "end", "padding"):
        search, *_ = lab.search(lab.some, dataclasses.replace(BASE, mode="fast", tokens=which))  # type: ignore[arg-type]
        pairs = zip(base, search.found, strict=True)
        out[which] = {
            "neurons": by_kind(lab.some, sizes(search.found)),
            "initial": by_kind(lab.some, np.array([len(each.initial) for each in search.found])),
            "evaluations": float(np.median([each.evaluations for each in search.found])),
            "iou_with_all": estimate(np.array([found.iou(a.refined, b.refined) for a, b in pairs])),
        }
    return {"all": {"neurons": by_kind(lab.some, sizes(base))}, **out}


def components(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    """First-step similarity with the leading or random neurons of each layer off (necessity), or with all but them off (sufficiency)."""
    out, rng = {}, np.random.default_rng(0)
    for component, pattern in COMPONENTS.items():
        first = lab.first(pattern)
        whole_seen(lab, first, lab.some, past["modes"]["tau"]["tau"])
        rows = np.arange(len(lab.some))
        worth = first.gradient(rows)
        layer, kinds = first.units.layer, {"whole network": np.ones(len(first.units.names), bool)}
        for stage, where in STAGES.items():
            here = np.array([name.startswith(where[1:]) for name in first.units.names])
            if here.any():
                kinds[stage] = here
        for stage, here in kinds.items():
            lead = leading(worth, layer, here)
            chance = leading(rng.random(worth.shape), layer, here)
            inside = here[layer]
            tests = {
                "top off": lead,
                "random off": chance,
                "all off": np.broadcast_to(inside, lead.shape),
                "only top on": inside & ~lead,
                "only random on": inside & ~chance,
            }
            out[f"{component}, {stage}"] = {
                "neurons": int(inside.sum()),
                **{name: estimate(first.evaluate(rows, np.array(off))) for name, off in tests.items()},
            }
        print(component, json.dumps(strict(out[f"{component}, whole network"])), flush=True)
    return {"fraction": FRACTION, "similarity": out}


def leading(worth: np.ndarray, layer: np.ndarray, here: np.ndarray) -> np.ndarray:
    """bool [P,N]: the FRACTION of largest worth in each of the layers `here`."""
    out = np.zeros(worth.shape, bool)
    for number in np.flatnonzero(here):
        inside = np.flatnonzero(layer == number)
        count = round(FRACTION * len(inside))
        best = inside[np.argsort(-worth[:, inside], axis=1)[:, :count]]
        np.put_along_axis(out, best, True, axis=1)
    return out


def ordinary(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    """Cosine similarity of cross-attention outputs, and SSIM of first steps, on ordinary prompts with neurons off."""
    records = [Found.load(each) for each in past["modes"]["exact"]]
    first = lab.first()
    layers, asked = first.units, lab.ordinary.take(np.arange(40))
    whole_seen(lab, first, asked, 2.0)
    counts, size = found.frequency(records, len(layers)), int(np.median(sizes(records)))
    rng, top = np.random.default_rng(0), np.argsort(-counts, kind="stable")
    sets = {
        "top": layers.off(top[:size]),
        "random": layers.off(rng.choice(top[size:], size, replace=False)),
        "union": counts > 0,
    }
    out: dict[str, Any] = {"neurons": size}
    for name, off in sets.items():
        near = attention_outputs(lab, first, asked.tokens, off)
        rows = np.broadcast_to(off, (len(asked), len(off)))
        out[name] = {
            "attention_cosine": {layer: estimate(values) for layer, values in near.items()},
            "first_step": estimate(first.evaluate(np.arange(len(asked)), rows)),
        }
    return out


def attention_outputs(
    lab: Lab, first: FirstStep, token: np.ndarray, off: np.ndarray
) -> dict[str, np.ndarray]:
    """[P] for each layer: mean cosine of what attention hands on, with and without the neurons."""
    model = lab.target.model

    @jax.jit
    def outputs(factor: jax.Array, row: jax.Array) -> dict[str, jax.Array]:
        gates = first.units.gates(factor)
        cond = first._text(lab.target.params, row, gates["text"])
        taps = model.apply(
            lab.target.params, first.xt, first.t, cond, gates["net"], taps=("*/cross/map", "*/cross/value")
        )[1]
        out = {}
        for name in [each for each in taps if each.endswith("/map")]:
            weights, value = taps[name], taps[name.removesuffix("map") + "value"]
            heads = value.reshape(*value.shape[:2], weights.shape[1], -1)
            out[name] = jnp.einsum("bhqk,bkhd->bqhd", weights, heads).reshape(
                *weights.shape[::2][:1], weights.shape[2], -1
            )
        return out

    found_: dict[str, list[float]] = {}
    for row in token:
        a, b = outputs(jnp.ones(len(off)), row), outputs(ablate(jnp.asarray(off)), row)
        for name in a:
            dot = jnp.sum(a[name] * b[name], -1)
            norm = jnp.linalg.norm(a[name], axis=-1) * jnp.linalg.norm(b[name], axis=-1)
            found_.setdefault(name, []).append(float(jnp.mean(dot / jnp.maximum(norm, 1e-12))))
    return {name: np.array(values) for name, values in found_.items()}


def dose(lab: Lab, past: dict[str, Any]) -> dict[str, Any]:
    """With 1 to N neurons off, in the order of three rankings: first-step similarity, copies, own image nearest."""
    first = lab.first()
    layers, asked, rows = first.units, lab.some, np.arange(len(lab.some))
    calibration = nemo.calibrate(first, lab.ordinary, BASE, lab.monitor)
    looked = first.look(asked.tokens)
    whole_seen(lab, first, asked, calibration.tau)
    rng, drawn = np.random.default_rng(0), lab.drawer(layers)
    worth = {
        "gradient": first.gradient(rows),
        "weight x activation": wanda_worth(lab, layers, looked.activation, calibration),
        "random": rng.random((len(asked), len(layers))),
    }
    out: dict[str, Any] = {"neurons_searched": len(layers), "tau": calibration.tau, "prompts": len(asked)}
    for name, by in worth.items():
        order, out[name] = np.argsort(-by, axis=1), {}
        for count in [*(2**i for i in range(20) if 2**i < len(layers)), len(layers)]:
            off = np.stack([layers.off(row[:count]) for row in order])
            seen = drawn(asked, np.where(off, 0.0, 1.0))
            out[name][str(count)] = {
                "first_step": estimate(first.evaluate(rows, off)),
                "copies": estimate(seen["copies"]),
                "nearest_own": estimate(seen["nearest"]),
            }
    return out


PARTS = (modes, stability, tau, transfer, factors, tokens, components, ordinary, dose)


def main() -> None:
    known = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(known))
    parser.add_argument("--workdir", type=Path, help="a trained run; the shipped model when not given")
    parser.add_argument("--few", action="store_true", help="twelve prompts")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    for name in args.parts:
        if name not in known:
            sys.exit(f"{name}: no part; give some of {', '.join(known)}")
    if args.workdir and args.out == OUT:
        sys.exit(
            f"--workdir {args.workdir}: give it a file of its own, --out FILE; {OUT.name} is the shipped model's"
        )
    past = json.loads(args.out.read_text()) if args.out.exists() else {}
    with Monitor(quiet=True) as monitor:
        lab = Lab(monitor, args.workdir, args.few)
        for name in args.parts or known:
            begun = time.perf_counter()
            past[name] = known[name](lab, past)
            past[name]["minutes"] = (time.perf_counter() - begun) / 60
            past["about"] = {
                "command": "python bench/localize.py"
                + " --workdir RUN" * bool(args.workdir)
                + " --few" * args.few,
                "model": lab.target.identity,
                "net": to_json(lab.target.config.net),
                "settings": to_json(BASE),
                "images": {"each": IMAGES, "guidance": GUIDANCE, "seed": SEED},
                "machine": "2-core Xeon, Python 3.11, jax 0.10.2",
            }
            write_json(args.out, strict(past))
            print(f"{name}: {past[name]['minutes']:.1f} minutes", flush=True)
            jax.clear_caches()  # programs of all parts together are more than a process may map


if __name__ == "__main__":
    main()

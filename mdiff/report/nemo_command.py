"""`mdiff nemo`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mdiff import commands, config, job
from mdiff.errors import UserError
from mdiff.fields import to_json
from mdiff.files import absolute, check_writable, strict, write_atomically, write_json
from mdiff.probes import found, stamped, units
from mdiff.probes.first_step import FirstStep
from mdiff.recipes import nemo, nemo_verify, prompts, text_target
from mdiff.recipes.nemo import Calibration, Search
from mdiff.recipes.nemo_verify import Verified
from mdiff.recipes.prompts import Prompts
from mdiff.recipes.text_target import TextTarget
from mdiff.report import nemo_page
from mdiff.train import mesh as meshes
from mdiff.train import workdir
from mdiff.types import Estimate

ORDINARY = 24
"""Ordinary prompts whose images are compared with the union of found neurons off and on."""


def execute(args: commands.NemoArgs, settings: dict[str, Any], command: str) -> int:
    """The command, with its arguments parsed.

    Args:
      args: what it was given.
      settings: what all processes of a job must have been started with.
      command: its line, for the record.
    """
    nemo.check(args.fields)
    if args.images < 1:
        raise UserError(f"--images {args.images}: must be 1 or more")
    out = folder_of(args.workdir, args.demo, args.out, "nemo")
    with job.join("nemo", args.processes, settings) as this:

        def prepare() -> tuple[TextTarget, FirstStep, Prompts, Prompts]:
            check_writable(out, "--out")
            target = open_target(args.workdir, args.demo, args.fields.mesh, this.monitor)
            layers = units.discover(target.model, args.fields.layers)
            first = FirstStep(
                target.model, target.params, layers, args.fields, meshes.make_mesh(target.config.mesh)
            )
            return target, first, *_prompts(args, target)

        target, first, asked, ordinary = this.prepare(out, prepare)
        out.mkdir(parents=True, exist_ok=True)
        calibration = nemo.calibrate(first, ordinary, args.fields, this.monitor)
        search = nemo.search(
            first, asked, calibration, args.fields, this.monitor, out / nemo.FOUND, this.check
        )
        sample = replace(target.config.sample, guidance=args.guidance, seed=args.sample_seed)
        train = np.asarray(target.subset.train.x)
        begun = time.monotonic()
        parts: dict[str, Verified] = {}
        union = found.frequency(search.found, len(first.units)) > 0
        memorized = asked.take(search.memorized)
        if len(memorized):
            records = [each for each, known in zip(search.found, search.memorized, strict=True) if known]
            parts["memorized"] = nemo_verify.verify(
                target.model, target.params, first.units, memorized, records, train, args.fields, sample,
                target.config.audit, args.images, this.monitor, union,
            )  # fmt: skip
        drawing = time.monotonic() - begun
        if not this.first:
            return 0
        if args.export is not None:
            from mdiff.recipes import prune

            prune.export(target, first.units, np.flatnonzero(union), args.export, args.fields.factor)
            this.monitor.say(f"pruned run: {absolute(args.export)}")
    tree = _tree(args, command, target, first, asked, calibration, search, parts, drawing)
    arrays = _arrays(target, asked, search, parts, first)
    data, stamp = stamped.pack(arrays)
    write_atomically(out / "nemo.npz", lambda part: part.write_bytes(data))
    write_json(out / "nemo.json", strict({**tree, "arrays": stamp}))
    page = nemo_page.write(out)
    console = Console()
    console.print(_table(tree))
    for line in tree["verdict"]:
        console.print(line, markup=False, highlight=False)
    console.print(f"page: {absolute(page)}", soft_wrap=True, markup=False)
    return 0


def folder_of(run: Path | None, demo: bool, out: Path | None, name: str) -> Path:
    """Where results go.

    Raises:
      UserError: neither a run nor --demo, or both.
    """
    if (run is None) != demo:
        raise UserError(
            "--workdir: give the folder of a run, or --demo for the model that comes with mdiff"
            if run is None
            else f"--demo: takes the model that comes with mdiff; leave out --workdir {run}"
        )
    return out or (Path("runs") / f"demo_{name}" if run is None else run / name)


def open_target(run: Path | None, demo: bool, on: config.Mesh, monitor: Any) -> TextTarget:
    """The model that is asked."""
    return text_target.shipped(on) if run is None else text_target.of_run(run, on, monitor)


def _prompts(args: commands.NemoArgs, target: TextTarget) -> tuple[Prompts, Prompts]:
    trained = prompts.of_training(target.subset)
    if args.prompts is None:
        asked = trained.take(trained.kind != "unique")
        if not len(asked):
            raise UserError(
                "--prompts: the run has no planted duplicates (data.ladder); give a file with one prompt a line"
            )
    else:
        given = prompts.of_file(args.prompts, target.tokenizer, truncate=args.truncate)
        asked = prompts.known(given, trained)
    if args.ordinary is None:
        return asked, prompts.of_heldout(target.subset)
    return asked, prompts.of_file(args.ordinary, target.tokenizer, truncate=args.truncate)


def _tree(
    args: commands.NemoArgs,
    command: str,
    target: TextTarget,
    first: FirstStep,
    asked: Prompts,
    calibration: Calibration,
    search: Search,
    parts: Mapping[str, Verified],
    drawing: float,
) -> dict[str, Any]:
    """All numbers for machines."""
    layers, rows = first.units, []
    shares = parts["memorized"].share if "memorized" in parts else {}
    nearest = parts["memorized"].nearest if "memorized" in parts else {}
    changed = parts["memorized"].changed if "memorized" in parts else {}
    place = np.cumsum(search.memorized) - 1
    for index, record in enumerate(search.found):
        known = bool(search.memorized[index])
        rows.append(
            {
                **asked.row(index),
                "memorized": known,
                "similarity": float(search.looked.score[index]),
                "kept": int(search.kept[index].sum()),
                "initial": layers.by_layer(record.initial),
                "neurons": layers.by_layer(record.refined),
                "theta": _number(record.theta),
                "top": record.top,
                "tau_ref": _number(record.tau_ref),
                "score_initial": _number(record.score_initial),
                "score": _number(record.score),
                "reason": record.reason,
                "evaluations": record.evaluations,
                "rounds": record.rounds,
                "close": len(record.close),
                "copies_of_own": {name: _number(each[place[index]]) for name, each in shares.items()}
                if known
                else {},
                "nearest_own": {name: _number(each[place[index]]) for name, each in nearest.items()}
                if known
                else {},
                "similar_to_whole": {name: float(each[place[index]].mean()) for name, each in changed.items()}
                if known
                else {},
            }
        )
    memorized, audit = asked.take(search.memorized), target.config.audit
    groups, near = (_groups(memorized, each, audit) for each in (shares, nearest))
    frequency = found.frequency(search.found, len(layers))
    return {
        "format": nemo_page.READS,
        "command": command,
        "target": {**target.identity, "train": len(target.subset.train), "prompts": len(asked)},
        "settings": to_json(args.fields),
        "sampling": {
            "images": args.images,
            "guidance": args.guidance,
            "seed": args.sample_seed,
            "confidence": target.config.audit.confidence,
        },
        "calibration": calibration.to_json(),
        "layers": [
            {"name": name, "neurons": size} for name, size in zip(layers.names, layers.sizes, strict=True)
        ],
        "prompts": rows,
        "union": layers.by_layer(np.flatnonzero(frequency).tolist()),
        "groups": groups,
        "nearest": near,
        "beside": {way: parts["memorized"].beside.count(way) for way in nemo_verify.BESIDE} if parts else {},
        "seconds": {"search": search.seconds, "images": drawing},
        "evaluations": sum(each.evaluations for each in search.found),
        "calls": first.calls,
        "verdict": verdict(asked, calibration, search, groups, near, int((frequency > 0).sum()), len(layers)),
        "versions": workdir.versions(),
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _groups(
    known: Prompts, shares: Mapping[str, np.ndarray], audit: config.Audit
) -> dict[str, dict[str, Any]]:
    out = {}
    for kind in ("verbatim", "template"):
        chosen = known.kind == kind
        if shares and chosen.any():
            rates = nemo_verify.rates(shares, chosen, audit)
            out[kind] = {name: asdict(each) for name, each in rates.items()}
    return out


def _arrays(
    target: TextTarget, asked: Prompts, search: Search, parts: Mapping[str, Verified], first: FirstStep
) -> dict[str, np.ndarray]:
    """What the page shows pictures of."""
    arrays: dict[str, np.ndarray] = {
        "train": np.asarray(target.subset.train.x),
        "frequency": found.frequency(search.found, len(first.units)),
        "layer": first.units.layer,
        "memorized": search.memorized,
    }
    for name, images in (parts["memorized"].arms if "memorized" in parts else {}).items():
        arrays[f"images_{name}"] = images
    return arrays


def verdict(
    asked: Prompts,
    calibration: Calibration,
    search: Search,
    groups: Mapping[str, Mapping[str, Any]],
    nearest: Mapping[str, Mapping[str, Any]],
    union: int,
    neurons: int,
) -> list[str]:
    """What came out, in sentences."""
    known = int(search.memorized.sum())
    lines = [
        f"{known} of {len(asked)} prompts look memorized: two seeds agree by more than tau = {calibration.tau:.3f}, "
        f"which {_percent(calibration.false_positives)} of fresh ordinary prompts do."
    ]
    if not known:
        lines.append("No prompt has a kept seed: not memorized, and nothing was searched.")
        return lines
    sizes = [len(each.refined) for each in search.found if each.initial]
    cut = sum(each.reason == "below tau" for each in search.found)
    middle = f"{np.median(sizes):g}" if sizes else "no"
    every = ": all that were searched, so what the union does says nothing about these prompts"
    lines.append(
        f"The first step of {cut} of them is cut below tau; a median of {middle} of {neurons} neurons is enough, "
        f"{union} in all prompts together{every * (union == neurons)}."
    )
    for kind, rates in groups.items():
        whole, own, random = (Estimate(**rates[name]) for name in ("whole", "own", "random"))
        lines.append(
            f"{kind.capitalize()}: {_percent(whole)} of images are copies with all neurons on, {_percent(own)} with the "
            f"prompt's own off, {_percent(random)} with as many random ones off."
        )
        spoiled = Estimate(**nearest[kind]["own"])
        lines.append(
            f"With the prompt's own off, its training image is still the nearest to {_percent(spoiled)} of the {kind} images: "
            "those are spoiled, not forgotten."
        )
    lines.append(
        "The neurons say where these prompts pass; other prompts may reach an image on another path."
    )
    return lines


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _table(tree: Mapping[str, Any]) -> Table:
    table = Table(title=f"{tree['target']['name']}: neurons of {len(tree['prompts'])} prompts")
    for name in ("prompt", "copies", "similarity", "initial", "neurons", "left", "copies on", "off"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    shown = [row for row in tree["prompts"] if row["memorized"]]
    for row in shown[:30]:
        shares = row["copies_of_own"]
        table.add_row(
            row["prompt"][:40],
            str(row["copies"]),
            f"{row['similarity']:.3f}",
            str(sum(map(len, row["initial"].values()))),
            str(sum(map(len, row["neurons"].values()))),
            "" if row["score"] is None else f"{row['score']:.3f}",
            *("" if shares.get(name) is None else f"{100 * shares[name]:.0f} %" for name in ("whole", "own")),
        )
    return table

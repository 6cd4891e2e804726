"""`mdiff side`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mdiff import commands, job
from mdiff.data.split import Subset
from mdiff.errors import UserError
from mdiff.fields import to_json
from mdiff.files import absolute, check_writable, strict, write_atomically, write_json
from mdiff.probes import clusters as clustering
from mdiff.probes import detectors, stamped
from mdiff.recipes import classified, classify, measure, side, side_scores
from mdiff.recipes.runs import Experiment
from mdiff.recipes.side_scores import Strength
from mdiff.report import side_page
from mdiff.train import workdir
from mdiff.types import Estimate


def execute(args: commands.SideArgs, settings: dict[str, Any], command: str) -> int:
    """The command, with its arguments parsed.

    Args:
      args: what it was given.
      settings: what all processes of a job must have been started with.
      command: its line, for the record.
    """
    side.check(args.fields)
    out = args.workdir / "side" if args.out is None else args.out
    with job.join("side", args.processes, settings) as this:

        def prepare() -> tuple[side.Target, Experiment]:
            found = side.of_run(args.workdir, args.fields, this.monitor)
            side.check_target(found[0], args.fields)
            _known(args, found[1].subset)
            check_writable(out, "--out")
            return found

        target, made = this.prepare(out, prepare)
        known = _known(args, made.subset)
        try:
            labelled, files = side.attack(target, args.fields, out, this.monitor, this.check, known)
        except side.Stopped as stopped:
            this.monitor.say(f"{stopped}: saved what was trained so far")
            this.monitor.say(f"resume with: {command}")
            return 0
        if not this.first:
            return 0
        rules = measure.audit_rules(replace(made.config, audit=args.fields.audit))
        heldout = made.subset.heldout if len(made.subset.heldout) > 1 else None
        references = {"train": np.asarray(made.subset.train.x)}
        if heldout is not None:
            references["heldout"] = np.asarray(heldout.x)
        control = None if heldout is None else "heldout"
        unguided = side.synthesize(target, args.fields, out, this.monitor)
        strengths = side_scores.measure(
            files, unguided, references, control, rules, None if heldout is None else references["heldout"]
        )
        tree = _tree(args, command, target, labelled, out, strengths, made.subset)
        arrays = _arrays(strengths, made.subset)
    data, stamp = stamped.pack(arrays)
    write_atomically(out / "side.npz", lambda part: part.write_bytes(data))
    tree["arrays"] = stamp
    write_json(out / "side.json", strict(tree))
    page = side_page.write(out)
    console = Console()
    console.print(_table(strengths, tree["chosen"], tree["oracle"]))
    for line in tree["verdict"]:
        console.print(line, markup=False, highlight=False)
    console.print(f"page: {absolute(page)}", soft_wrap=True, markup=False)
    return 0


def _known(args: commands.SideArgs, subset: Subset) -> tuple[np.ndarray, np.ndarray] | None:
    """What only the oracle is given."""
    if args.fields.surrogate.teacher != "oracle":
        return None
    if subset.train.label is None:
        raise UserError(
            "surrogate.teacher = 'oracle': the training images have no labels; set surrogate.teacher to clusters"
        )
    return np.asarray(subset.train.x), np.asarray(subset.train.label)


def _tree(
    args: commands.SideArgs,
    command: str,
    target: side.Target,
    labelled: side.Surrogate,
    out: Path,
    strengths: Sequence[Strength],
    subset: Subset,
) -> dict[str, Any]:
    """All numbers for machines; what an attacker knows first."""
    chosen = side_scores.chosen(strengths, args.fields.quality_floor)
    oracle = side_scores.oracle(strengths, "train")
    members, calibrated = None, None
    if not args.fields.adapter.rank:
        calibrated = json.loads((out / "classifier" / "calibration.json").read_text())
    if calibrated is not None and len(subset.heldout):
        classifier, params = classify.load(out / "classifier")
        members = classified.membership(
            classifier, params, np.asarray(subset.train.x), np.asarray(subset.heldout.x)
        )
    known = {} if labelled.clusters is None else clustering.to_json(labelled.clusters)
    return {
        "format": side_page.READS,
        "command": command,
        "target": {**target.identity, "train": len(subset.train), "heldout": len(subset.heldout)},
        "settings": to_json(args.fields),
        "surrogate": {
            "teacher": args.fields.surrogate.teacher,
            "classes": labelled.classes,
            "images": len(labelled.images),
            "clusters": known,
        },
        "classifier": calibrated,
        "membership": None if members is None else asdict(members),
        "chosen": chosen,
        "oracle": oracle,
        "strengths": [side_scores.to_json(one) for one in strengths],
        "detector": _detector(strengths, chosen),
        "verdict": verdict(strengths, chosen, oracle, members),
        "versions": workdir.versions(),
    }


def _detector(strengths: Sequence[Strength], chosen: float) -> dict[str, Any] | None:
    """Does the surrogate gap tell copies from other generations at the chosen strength?"""
    one = next(each for each in strengths if each.scale == chosen)
    copies = one.scores["train"].columns["memorized"]
    if not np.isfinite(one.gap).all() or not 0 < copies.sum() < len(copies):
        return None
    found = detectors.detect({"gap": one.gap}, copies)["gap"]
    return {
        "name": found.name,
        "auroc": asdict(found.auroc),
        "found": asdict(found.found),
        "base": asdict(found.base),
        "precision": {str(k): asdict(each) for k, each in found.precision.items()},
    }


def _arrays(strengths: Sequence[Strength], subset: Subset) -> dict[str, np.ndarray]:
    """What the page shows pictures of: by strength, and the training images."""
    arrays: dict[str, np.ndarray] = {"train": np.asarray(subset.train.x), "train_id": subset.train.id}
    for one in strengths:
        columns = one.scores["train"].columns
        for name in ("nearest", "ratio", "memorized"):
            arrays[f"{name}_{one.scale:g}"] = columns[name]
    return arrays


def verdict(
    strengths: Sequence[Strength], chosen: float, oracle: float, members: Estimate | None
) -> list[str]:
    """What came out, in sentences, each with its interval."""
    by_scale = {one.scale: one for one in strengths}
    picked = by_scale[chosen]

    def copies(one: Strength) -> str:
        return (
            f"{_percent(one.scores['train'].estimates['memorized'])} of {one.scores.n} generations are copies"
        )

    lines = []
    if 0.0 in by_scale:
        lines.append(f"Unguided, {copies(by_scale[0.0])} of training images.")
    if chosen:
        lines.append(
            f"Guided at strength {chosen:g}, chosen without training images, {copies(picked)}, of "
            f"{_count(picked.scores['train'].estimates['coverage'])}."
        )
    else:
        lines.append(
            "No strength repeats more than the model alone within the quality floor: none is chosen."
        )
    excess = picked.scores["train"].estimates.get("memorized_excess")
    if excess is None:
        lines.append("There are no held-out images: how many copies the rule finds by chance is unknown.")
    else:
        lines.append(f"That is {_percent(excess)} beyond what the same rule finds among held-out images.")
    if oracle != chosen:
        lines.append(f"The most copies are at strength {oracle:g}: {copies(by_scale[oracle])}.")
    if members is not None:
        lines.append(
            f"The classifier's confidence alone tells training from held-out images with an AUROC of {members:.3f}."
        )
    return lines


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _count(coverage: Estimate) -> str:
    return f"{round(coverage.value * coverage.n)} of {coverage.n} different training images"


def _table(strengths: Sequence[Strength], chosen: float, oracle: float) -> Table:
    table = Table(title="Extraction by strength of the guidance", title_justify="left")
    for name in ("strength", "copies", "excess", "images", "repeats", "energy", ""):
        table.add_column(name, justify="right")
    for one in strengths:
        found = one.scores["train"].estimates
        marks = [word for word, scale in (("chosen", chosen), ("most", oracle)) if scale == one.scale]
        table.add_row(
            f"{one.scale:g}",
            _percent(found["memorized"]),
            _percent(found["memorized_excess"]) if "memorized_excess" in found else "unknown",
            f"{round(found['coverage'].value * found['coverage'].n)}",
            f"{100 * one.repetition.grouped.value:.1f} %",
            f"{one.quality['energy'].value:.3f}" if one.quality else "unknown",
            ", ".join(marks),
        )
    return table

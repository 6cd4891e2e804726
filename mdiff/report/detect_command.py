"""`mdiff detect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mdiff import commands, config, job
from mdiff.fields import to_json
from mdiff.files import absolute, check_writable, strict, write_atomically, write_json
from mdiff.probes import prompted_run, rates, recited, stamped, units
from mdiff.probes.prompted import needs
from mdiff.recipes import prompts, recite
from mdiff.recipes.prompts import Prompts
from mdiff.recipes.text_target import TextTarget
from mdiff.report import detect_page
from mdiff.report.nemo_command import folder_of, open_target
from mdiff.train import mesh as meshes
from mdiff.train import workdir

GROUPS = {"both": "all", "verbatim": "verbatim", "template": "template"}
DRAWN, SHOWN = 8, 24
"""Images drawn of each prompt to see whether it recites, and prompts whose images are shown."""
KNOWN, UNKNOWN = 0.5, 0.1
"""A prompt is memorized when more than KNOWN of its images are copies, and not when fewer than UNKNOWN are; others are left out."""


def execute(args: commands.DetectArgs, settings: dict[str, Any], command: str) -> int:
    """The command, with its arguments parsed; arguments as of `nemo_command.execute`."""
    if args.list:
        _list(args)
        return 0
    out = folder_of(args.workdir, args.demo, args.out, "detect")
    with job.join("detect", args.processes, settings) as this:

        def prepare() -> tuple[TextTarget, Prompts, tuple[Any, ...], dict[str, str]]:
            check_writable(out, "--out")
            target = open_target(args.workdir, args.demo, config.Mesh(), this.monitor)
            prompted_run.check(target.model, args.fields)
            chosen, left_out = prompted_run.choose(target.model, args.fields)
            return target, _prompts(args, target), tuple(chosen), left_out

        target, asked, chosen, left_out = this.prepare(out, prepare)
        out.mkdir(parents=True, exist_ok=True)
        on = meshes.make_mesh(target.config.mesh)
        images, verdicts = _recite(target, asked, this.monitor)
        truth = _truth(asked, verdicts)
        scored = {}
        for place, detector in enumerate(chosen):
            scored[detector.name] = prompted_run.run(
                target.model, target.params, detector, asked.tokens, args.fields, on=on
            )
            this.monitor.progress("detectors", place + 1, len(chosen), {})
        if not this.first:
            return 0
    return _write(args, command, out, target, asked, truth, verdicts, images, scored, left_out)


def _list(args: commands.DetectArgs) -> None:
    table = Table(title="detectors of memorized prompts")
    rows = needs(args.fields)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def _prompts(args: commands.DetectArgs, target: TextTarget) -> Prompts:
    trained = prompts.of_training(target.subset)
    if args.prompts is not None:
        given = prompts.of_file(args.prompts, target.tokenizer, truncate=args.truncate)
        return prompts.known(given, trained)
    return prompts.join(trained, prompts.of_heldout(target.subset)) if len(target.subset.heldout) else trained


def _recite(target: TextTarget, asked: Prompts, monitor: Any) -> tuple[np.ndarray, recited.Verdicts | None]:
    """Images of every prompt that has training images of its own, and whether they are copies."""
    known = np.array([bool(own) for own in asked.own])
    if not known.any():
        return np.zeros((0, 0, *target.model.shape), np.uint8), None
    sample = replace(target.config.sample, seed=target.config.sample.seed + 1)
    here, done = asked.take(known), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        monitor.progress("images", done, len(here), {})

    everything = units.discover(target.model, "cross/value_gate")
    draw = recite.make(target.model, everything, sample, advance)
    on = np.ones((len(here), len(everything)), np.float32)
    images = draw(target.params, here.tokens, on, np.arange(DRAWN))
    train = np.asarray(target.subset.train.x)
    return images, recited.verdicts(images, here.own, train, target.config.audit)


def _truth(asked: Prompts, verdicts: recited.Verdicts | None) -> np.ndarray:
    """[P]: "verbatim", "template", "none", or "" for what is neither."""
    truth = np.where(asked.kind == "heldout", "none", "").astype("<U8")
    known = np.flatnonzero([bool(own) for own in asked.own])
    for place, share in zip(known, () if verdicts is None else verdicts.share, strict=True):
        kind = "template" if asked.kind[place] == "template" else "verbatim"
        truth[place] = kind if share > KNOWN else "none" if share < UNKNOWN else ""
    return truth


def _write(
    args: commands.DetectArgs,
    command: str,
    out: Path,
    target: TextTarget,
    asked: Prompts,
    truth: np.ndarray,
    verdicts: recited.Verdicts | None,
    images: np.ndarray,
    scored: Mapping[str, prompted_run.Scored],
    left_out: Mapping[str, str],
) -> int:
    cfg, rows, arrays = args.fields, [], {"train": np.asarray(target.subset.train.x)}
    about = {row["name"]: row for row in needs(cfg)}
    for name, found in scored.items():
        groups: dict[str, Any] = dict.fromkeys(GROUPS.values())
        measured = rates.evaluate(
            name, found.suspicion, truth,
            false_alarms=cfg.false_alarms, confidence=cfg.confidence, n_resamples=cfg.bootstrap,
        )  # fmt: skip
        for group, rate in measured.items():
            positives = int(
                ((truth == group) | ((group == "both") & np.isin(truth, ("verbatim", "template")))).sum()
            )
            negatives = int((truth == "none").sum())
            if not positives or not negatives:
                continue
            groups[GROUPS[group]] = {
                "auroc": asdict(rate.auroc),
                "tpr_nearest": asdict(rate.nearest.share),
                "tpr_below": asdict(rate.below.share),
                "positives": positives,
                "negatives": negatives,
            }
            arrays[f"roc_{name}_{GROUPS[group]}_fpr"] = np.asarray(rate.false)
            arrays[f"roc_{name}_{GROUPS[group]}_tpr"] = np.asarray(rate.true)
        rows.append(
            {
                "name": name,
                "sign": found.sign,
                "needs": about[name],
                "seconds": found.seconds,
                "groups": groups,
            }
        )
    known = np.flatnonzero([bool(own) for own in asked.own])
    share = {int(p): float(s) for p, s in zip(known, () if verdicts is None else verdicts.share, strict=True)}
    planted = np.isin(asked.kind[known], ("verbatim", "unique"))
    curve = None
    if verdicts is not None and len(set(asked.copies[known][planted])) > 1:
        curve = recited.curve(
            asked.copies[known][planted], verdicts.copy[planted], target.config.audit
        ).to_json()
    if len(images):
        strongest = np.argsort(-asked.copies[known], kind="stable")[:SHOWN]
        arrays |= {"images": images[strongest], "image_prompt": known[strongest]}
    data, stamp = stamped.pack(arrays)
    tree: dict[str, Any] = {
        "format": detect_page.READS,
        "command": command,
        "target": {**target.identity, "train": len(target.subset.train), "prompts": len(asked)},
        "settings": to_json(cfg),
        "detectors": rows,
        "left_out": dict(left_out),
        "prompts": [
            {
                **asked.row(i),
                "recited": share.get(i),
                "truth": str(truth[i]),
                "scores": {name: float(found.mean[i]) for name, found in scored.items()},
            }
            for i in range(len(asked))
        ],
        "truth": (
            f"memorized: more than {KNOWN:.0%} of {DRAWN} images are copies of the prompt's own; not: fewer than {UNKNOWN:.0%}, "
            "or a held-out caption; others count for neither"
        ),
        "curve": curve,
        "verdict": _verdict(rows, truth, curve),
        "versions": workdir.versions(),
        "arrays": stamp,
    }
    write_atomically(out / "detect.npz", lambda part: part.write_bytes(data))
    write_json(out / "detect.json", strict(tree))
    page = detect_page.write(out)
    console = Console()
    for line in tree["verdict"]:
        console.print(line, markup=False, highlight=False)
    console.print(f"page: {absolute(page)}", soft_wrap=True, markup=False)
    return 0


def _verdict(rows: list[dict[str, Any]], truth: np.ndarray, curve: Mapping[str, Any] | None) -> list[str]:
    """What came out, in sentences."""
    counts = {kind: int((truth == kind).sum()) for kind in ("verbatim", "template", "none")}
    lines = [
        f"{counts['verbatim']} prompts recite one image and {counts['template']} a template; {counts['none']} do not."
    ]
    measured = [row for row in rows if row["groups"]["all"]]
    if measured:
        best = max(measured, key=lambda row: row["groups"]["all"]["auroc"]["value"])
        found = best["groups"]["all"]["auroc"]
        lines.append(
            f"Best detector: {best['name']}, AUROC {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]."
        )
    if curve is not None:
        r50 = curve["r50"]
        lines.append(
            f"Half of the generations are copies at {r50['value']:.1f} copies [{r50['low']:.1f}, {r50['high']:.1f}]."
        )
    return lines

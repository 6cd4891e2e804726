"""`mdiff detect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mdiff import commands, config, job
from mdiff.errors import UserError
from mdiff.fields import to_json
from mdiff.files import absolute, check_writable, strict, write_atomically, write_json
from mdiff.probes import prompted_run, rates, stamped
from mdiff.probes.prompted import needs
from mdiff.recipes import detect, prompts
from mdiff.recipes.prompts import Prompts
from mdiff.recipes.text_target import TextTarget
from mdiff.report import detect_page
from mdiff.report.nemo_command import folder_of, open_target
from mdiff.train import mesh as meshes
from mdiff.train import workdir

GROUPS = {"both": "all", "verbatim": "verbatim", "template": "template"}
SHOWN = 24
"""Prompts whose images are shown."""


def execute(args: commands.DetectArgs, settings: dict[str, Any], command: str) -> int:
    """The command, with its arguments parsed; arguments as of `nemo_command.execute`."""
    if args.list:
        _list(args)
        return 0
    for name, least in (("images", 1), ("unknown", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
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
        identity = {"target": target.identity, "prompts": list(asked.text)}
        kept, on = detect.Parts(out / "parts", identity, this.check), meshes.make_mesh(target.config.mesh)
        drawn = detect.draw(target, asked, args.images, args.image_guidance, kept, this.monitor)
        scored = detect.score(target, asked, chosen, args.fields, kept, this.monitor, on)
        if not this.first:
            return 0
    return _write(args, command, out, target, asked, drawn, scored, left_out)


def _list(args: commands.DetectArgs) -> None:
    table = Table(title="detectors of memorized prompts")
    rows = needs(args.fields)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def _prompts(args: commands.DetectArgs, target: TextTarget) -> Prompts:
    if args.prompts is None:
        return detect.of_model(target.subset, args.unknown, args.fields.seed)
    given = prompts.of_file(args.prompts, target.tokenizer, truncate=args.truncate)
    return prompts.known(given, prompts.of_training(target.subset))


def _write(
    args: commands.DetectArgs,
    command: str,
    out: Path,
    target: TextTarget,
    asked: Prompts,
    drawn: detect.Recited,
    scored: Mapping[str, prompted_run.Scored],
    left_out: Mapping[str, str],
) -> int:
    cfg, rows, arrays = args.fields, [], {"train": np.asarray(target.subset.train.x)}
    truth, curve = drawn.truth(asked), drawn.curve(asked, target.config.audit)
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
                "what": about[name]["what"],
                "sign": found.sign,
                "needs": about[name],
                "seconds": found.seconds,
                "groups": groups,
            }
        )
    share = {int(p): float(s) for p, s in zip(drawn.place, drawn.share, strict=True)}
    if len(drawn.images):
        strongest = np.argsort(-asked.copies[drawn.place], kind="stable")[:SHOWN]
        arrays |= {"images": drawn.images[strongest], "image_prompt": drawn.place[strongest]}
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
            f"memorized: more than {detect.KNOWN:.0%} of {args.images} images are copies of the prompt's own; not: fewer than "
            f"{detect.UNKNOWN:.0%}, "
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

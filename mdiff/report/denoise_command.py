"""`mdiff denoise`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdiff import commands
from mdiff.console import Monitor
from mdiff.errors import UserError
from mdiff.files import absolute, check_writable, strict, write_atomically, write_json, write_text
from mdiff.recipes import denoising
from mdiff.recipes.denoising import Denoised, Denoising
from mdiff.report import denoising_figures
from mdiff.report.front_figures import png, svg
from mdiff.train import workdir
from mdiff.types import Estimate


def execute(args: commands.DenoiseArgs, command: str) -> int:
    """The command, with its arguments parsed.

    Args:
      args: what it was given.
      command: its line, for the record.
    """
    folders = _named(args.runs, args.names)
    settings = denoising.Settings(args.levels, args.draws, args.n, args.images, args.seed, args.confidence)
    denoising.check(settings)
    _check_out(args.out)
    check_writable(args.out, "--out")
    with Monitor() as monitor:
        found = denoising.compare(folders, settings, monitor)
    write_json(args.out / "denoising.json", strict(tree(found, command)))
    curves = denoising_figures.curves(found)
    write_text(args.out / "denoising.svg", svg(curves))
    for name, figure in (("denoising", curves), ("denoising_images", denoising_figures.pictures(found))):
        content = png(figure)
        write_atomically(args.out / f"{name}.png", functools.partial(Path.write_bytes, data=content))
    console = Console()
    for each in (_gaps(found), _sharpness(found)):
        console.print(each)
    for line in notes(found):
        console.print(line, markup=False, highlight=False)
    console.print(
        f"written: {absolute(args.out / 'denoising.json')}, and pictures", soft_wrap=True, markup=False
    )
    return 0


def tree(found: Denoising, command: str) -> dict[str, Any]:
    """All numbers for machines; lists go by noise level, as `levels` does."""
    settings, first = found.settings, found.runs[0].config.data
    return {
        "format": 1,
        "command": command,
        "source": first.source,
        "size": first.size,
        "levels": settings.levels,
        "draws": settings.draws,
        "seed": settings.seed,
        "confidence": settings.confidence,
        "same_train_images": found.shared,
        "heldout_ids": found.heldout.tolist(),
        "real": {"total_variation": asdict(found.variation), "high_frequency_share": found.high},
        "runs": [_run(run) for run in found.runs],
        "notes": notes(found),
        "versions": workdir.versions(),
    }


def _run(run: Denoised) -> dict[str, Any]:
    cfg = run.config
    sides = {
        name: {
            "error": _estimates(side.error),
            "error_over_first": None if side.over_first is None else _estimates(side.over_first),
            "total_variation": _estimates(side.variation),
            "high_frequency_share": _estimates(side.high),
        }
        for name, side in (("train", run.train), ("heldout", run.heldout))
    }
    return {
        "name": run.name,
        "folder": str(run.folder),
        "step": run.step,
        "n": cfg.data.n,
        "seed": cfg.seed,
        "process": cfg.process.kind,
        "cutoffs": cfg.loss.levels,
        "share": cfg.loss.share,
        "train_ids": run.ids.tolist(),
        "gap": _estimates(run.gap.ratio),
        "gap_overall": asdict(run.gap.overall),
        **sides,
    }


def _estimates(values: Sequence[Estimate]) -> list[dict[str, Any]]:
    return [asdict(value) for value in values]


def notes(found: Denoising) -> list[str]:
    """What the numbers rest on, and where each run stands out, in sentences."""
    count, levels = len(found.runs[0].ids), found.settings.levels
    which = (
        f"{count} images that all runs were trained on"
        if found.shared
        else "images of each run's own training set, since the sets share fewer than 2"
    )
    lines = [
        f"Errors are of {which}, and of {len(found.heldout)} that none was trained on; "
        f"{found.settings.draws} draw{'s' * (found.settings.draws > 1)} of noise each, the same for all runs."
    ]
    for run in found.runs:
        worst = max(range(len(levels)), key=lambda i: run.gap.ratio[i].value)
        lines.append(
            f"{run.name}: the gap is largest at noise level {levels[worst]:g}, {run.gap.ratio[worst]:.3g}; at "
            f"{levels[-1]:g} its answers have {run.heldout.variation[-1]:.3f} of the images' total variation."
        )
    return lines


def _table(title: str, found: Denoising) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("level", justify="right")
    for run in found.runs:
        table.add_column(Text(run.name), justify="right")
    return table


def _gaps(found: Denoising) -> Table:
    table = _table("Held-out over training error, by noise level", found)
    for i, level in enumerate(found.settings.levels):
        table.add_row(f"{level:g}", *(Text(f"{run.gap.ratio[i]:.3g}") for run in found.runs))
    return table


def _sharpness(found: Denoising) -> Table:
    table = _table("Total variation of the answers to held-out images, over that of the images", found)
    for i, level in enumerate(found.settings.levels):
        table.add_row(f"{level:g}", *(Text(f"{run.heldout.variation[i]:.3f}") for run in found.runs))
    return table


def _named(folders: Sequence[Path], names: Sequence[str]) -> dict[str, Path]:
    """The runs by name: those given, or else the folders' own."""
    if not folders:
        raise UserError("RUNS: 0 given; give one or more folders of mdiff train")
    if len({absolute(folder) for folder in folders}) < len(folders):
        raise UserError("RUNS: a folder is given twice; give each once")
    if names:
        if len(names) != len(folders):
            raise UserError(f"--names: {len(names)} for {len(folders)} runs; give one per run")
        if twice := next((name for name in names if names.count(name) > 1 or not name.strip()), None):
            raise UserError(f"--names {twice}: is given twice; give each run its own")
        return dict(zip(names, folders, strict=True))
    own = [folder.resolve().name for folder in folders]
    if len(set(own)) < len(own):
        own = [str(folder) for folder in folders]
    return dict(zip(own, folders, strict=True))


def _check_out(out: Path) -> None:
    """Refuses a place inside a run or among the cells of a sweep, where it would be taken for one."""
    for place in (absolute(out), *absolute(out).parents):
        if (place / "config.json").is_file():
            raise UserError(f"--out {out}: lies in the run {place}; choose a folder outside of it")
        if place.name == "cells" and (place.parent / "sweep.json").is_file():
            raise UserError(f"--out {out}: lies among the cells of a sweep; choose a folder beside them")

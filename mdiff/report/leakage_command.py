"""`mdiff leakage`."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdiff import commands, config
from mdiff.data import source
from mdiff.data.split import Subset, load_subset, split
from mdiff.errors import UserError
from mdiff.files import check_writable, locate, strict, write_json
from mdiff.probes import leakage as probe
from mdiff.probes.leakage import Bound, Budget, Leakage
from mdiff.train import workdir

LEVELS = (0.4, 1.0, 2.0, 4.0)


def execute(args: commands.LeakageArgs, command: str) -> int:
    """The command, with its arguments parsed.

    Args:
      args: what it was given.
      command: its line, for the record.
    """
    _check(args)
    cfg, subset, total = _of_source(args) if args.workdir is None else _of_run(args)
    spent = None if args.workdir is None else probe.budget(cfg, subset)
    levels = args.cutoff or (LEVELS if spent is None else tuple(level for level, _ in spent.levels))
    if not levels:
        raise UserError(
            f"--workdir {args.workdir}: {_why_none(cfg)}: no bound; give --cutoff for what one would do"
        )
    # 2 is the price of mirroring before the noise.
    draws = {1, 2, *args.draws} | ({round(spent.epochs), spent.isometries} if spent is not None else set())
    found = probe.leakage(
        subset.train.x,
        tuple(dict.fromkeys(levels)),
        sorted(m for m in draws if m >= 1),
        args.covariance,
        args.candidates or total,
        args.confidence,
    )
    lines = _closing(found, spent)
    console = Console()
    console.print(_opening(found, cfg), markup=False, highlight=False)
    for table in (_bounds(found, args.confidence), _guesses(found), _costs(found)):
        console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    if args.out is not None:
        write_json(args.out, strict(_tree(found, spent, cfg, command) | {"notes": lines}))
        console.print(f"written: {args.out}", soft_wrap=True, markup=False)
    return 0


def _check(args: commands.LeakageArgs) -> None:
    """Refuses what cannot be answered before anything is read."""
    if args.workdir is None and args.source is None:
        raise UserError("--source: is missing; give a data set, or --workdir for the budget of a run")
    for name in ("source", "size", "n", "seed") if args.workdir is not None else ():
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name} {getattr(args, name)}: --workdir brings its own; leave one of them away"
            )
    if args.n is not None and args.n < 2:
        raise UserError(f"--n {args.n}: too few images for a covariance; give 2 or more")
    if args.candidates is not None and args.candidates < 2:
        raise UserError(f"--candidates {args.candidates}: leave nothing to find out; give 2 or more")
    if not 0 < args.confidence < 1:
        raise UserError(f"--confidence {args.confidence:g}: must be between 0 and 1, such as 0.95")
    probe.check(args.cutoff, args.draws)
    if args.out is not None:
        if args.out.suffix != ".json":
            raise UserError(f"--out {args.out}: is no .json file; give one")
        check_writable(args.out.parent, "--out")


def _of_source(args: commands.LeakageArgs) -> tuple[config.Config, Subset, int]:
    """The images that a run with these fields would train on, and how many its source has."""
    assert args.source is not None
    images = source.load(args.source, args.size, "--source")
    if args.n is not None and args.n > len(images):
        raise UserError(
            f"--n {args.n}: {images.name!r} has {len(images)} images; give {len(images)} or fewer"
        )
    n = len(images) if args.n is None else args.n
    data = config.Data(source=args.source, size=images.x.shape[1], n=n, heldout=0, seed=args.seed or 0)
    return config.Config(data=data), split(data, images), len(images)


def _of_run(args: commands.LeakageArgs) -> tuple[config.Config, Subset, int]:
    """The images of a run, from its record, and how many its source has."""
    assert args.workdir is not None
    folder = locate(args.workdir)
    cfg = workdir.read(folder).config
    data = cfg.data
    images = source.load(data.source, data.size, split=data.split, reading=data.reading)
    return cfg, load_subset(folder / "subset.json", images), len(images)


def _why_none(cfg: config.Config) -> str:
    if not cfg.loss.ambient:
        return "was trained without a cutoff"
    if cfg.loss.clean == "always":
        return "has loss.clean = always, a control that sees clean images at all levels"
    return "sees every image clean at some time, or has two cutoffs for one noise"


# ------------------------------------------------------------------------------------- in words and tables


def _opening(found: Leakage, cfg: config.Config) -> str:
    return (
        f"{cfg.data.source}: {found.images} images of {found.size} values. Covariance: {found.covariance}, from "
        f"{found.used} images"
        + (f", weight of the identity {found.shrinkage:.3g}." if found.covariance == "shrunk" else ".")
    )


def _once(found: Leakage) -> list[Bound]:
    """The bounds with one draw of the noise, one per cutoff."""
    return [bound for bound in found.bounds if bound.draws == 1]


def _bounds(found: Leakage, confidence: float) -> Table:
    """What one copy of each image tells, one row per cutoff."""
    title = "What one noisy copy tells about its image, at most, in nats"
    table = Table(title=Text(title), title_justify="left")
    for name in ("cutoff", f"nats [{confidence:.0%}]", "bits", "per value"):
        table.add_column(Text(name), justify="right")
    for name in (f"all {found.images}", f"1 of {found.candidates}"):
        table.add_column(name, justify="right")
    for bound in _once(found):
        table.add_row(
            f"{bound.cutoff:g}",
            Text(f"{bound.nats:.4g}"),
            f"{bound.bits:.4g}",
            f"{bound.per_value:.3g}",
            f"{bound.total:.4g}",
            f"{bound.capped:.4g}",
        )
    return table


def _guesses(found: Leakage) -> Table:
    """The same in nats by how the covariance is guessed."""
    table = Table(title=Text("The same by covariance"), title_justify="left")
    table.add_column("cutoff", justify="right")
    for name in (*probe.COVARIANCES, "any law in [-1, 1]"):
        table.add_column(Text(name), justify="right")
    for bound in _once(found):
        nats = [*(bound.others[name] for name in probe.COVARIANCES), bound.unknown_law]
        table.add_row(f"{bound.cutoff:g}", *(f"{value:.4g}" for value in nats))
    return table


def _costs(found: Leakage) -> Table:
    """Nats per image, one row per cutoff and one column per number of draws."""
    title = "Nats, had the noise been drawn so many times"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("cutoff", justify="right")
    at = {(bound.cutoff, bound.draws): bound.nats.value for bound in found.bounds}
    draws = list(dict.fromkeys(bound.draws for bound in found.bounds))
    for m in draws:
        table.add_column(f"{m}", justify="right")
    for level in (bound.cutoff for bound in _once(found)):
        table.add_row(f"{level:g}", *(f"{at[level, m]:.4g}" for m in draws))
    return table


def _of_draws(spent: Budget | None) -> str:
    text = (
        "mdiff draws once, for good, and augments the copy, which tells nothing new. Mirroring half of the images before "
        "noise that is drawn for each version is 2 draws; k versions are k draws; noise anew in each epoch, one per epoch"
    )
    if spent is None:
        return text + "."
    versions = f", its flips and shifts make {spent.isometries} versions" if spent.isometries > 1 else ""
    return text + f": this run has {spent.epochs:.4g} epochs{versions}."


def _closing(found: Leakage, spent: Budget | None) -> list[str]:
    """What the tables add up to, and what they leave out."""
    lines = [
        f"An attacker who chooses among {found.candidates} pictures learns at most ln {found.candidates} = "
        f"{math.log(found.candidates):.3g} nats. Below cutoff {found.identifies_below:.3g} one copy can tell that much."
    ]
    lines.append(_of_draws(spent))
    if spent is not None:
        lines += _of_budget(found, spent)
    lines.append(
        "This run never sees a clean image: the bound holds for all that the model can say."
        if spent is not None and spent.whole
        else "The bound is of what is learned from the copies, above the cutoff. Below it clean images are trained on, unless "
        "loss.clean is never: nothing here bounds what they give away."
    )
    return lines


def _of_budget(found: Leakage, spent: Budget) -> list[str]:
    """A run's own cutoffs, added up."""
    one = {bound.cutoff: bound.nats.value for bound in _once(found)}
    lines = []
    if spent.levels:
        parts = ", ".join(f"{count} at cutoff {level:g}" for level, count in spent.levels)
        lines.append(
            f"This run has one copy each of {sum(count for _, count in spent.levels)} images: {parts}."
        )
    if spent.levels and all(level in one for level, _ in spent.levels):
        total = sum(count * one[level] for level, count in spent.levels)
        lines.append(
            f"All these copies together: at most {total:.4g} nats, the same after any number of epochs."
        )
    if spent.clean:
        lines.append(
            f"No bound for {spent.clean} images, which are trained on without a cutoff at some time."
        )
    if spent.exposed:
        lines.append(
            f"No bound for {spent.exposed} images, whose one noise is used at two cutoffs: the two copies give the image away."
        )
    if spent.levels:
        lines.append(
            "Another run of the same seed and another cutoff has copies with the same noise: publish one of the two, "
            "since x + s n and x + t n give x away."
        )
    return lines


def _tree(found: Leakage, spent: Budget | None, cfg: config.Config, command: str) -> dict[str, Any]:
    """All of it for machines; nats unless a name says otherwise."""
    bounds = [
        asdict(bound) | {"bits": bound.bits, "per_value": bound.per_value, "total": bound.total}
        for bound in found.bounds
    ]
    return {
        "format": 1,
        "command": command,
        "source": cfg.data.source,
        **asdict(found),
        "bounds": bounds,
        "run": None if spent is None else asdict(spent),
    }

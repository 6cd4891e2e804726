"""`mdiff front`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdiff import commands, config
from mdiff.arguments import parse
from mdiff.errors import UserError
from mdiff.files import absolute, check_writable


def execute(args: commands.FrontArgs, command: str) -> int:
    """The command, with its arguments parsed.

    Args:
      args: what it was given.
      command: its line, for the record.
    """
    select = _selected(args.select)
    from rich.console import Console

    from mdiff.report.front import collect
    from mdiff.report.front_cells import read_cells
    from mdiff.report.front_page import table, write_front

    cells = read_cells(args.folders, select)
    _check_out(args.out, [cell.folder for cell in cells])
    found = collect(cells, args.quality, args.memorized, args.reference)
    check_writable(args.out, "--out")
    tree = write_front(args.out, found, title=args.title, command=command)
    console = Console()
    for front in found.fronts:
        console.print(table(front, found))
    for paragraph in tree["verdict"]:
        console.print(paragraph, markup=False, highlight=False)
    console.print(f"page: {absolute(args.out / 'front.html')}", soft_wrap=True, markup=False)
    return 0


def _selected(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`field=a,b` texts as field -> values, each read as the command line reads it."""
    from mdiff.recipes.cells import get

    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        field, equals, values = text.partition("=")
        field = field.removeprefix("--").replace("-", "_")
        if not equals or not field or not all(values.split(",")):
            raise UserError(f"--select {text}: give field=a,b,c, such as loss.cutoff=0,1")
        if field in found:
            raise UserError(f"--select {field}: is given twice; give all its values at once")
        many = isinstance(get(config.Config(), field), tuple | dict)
        read = []
        for value in values.split(","):
            line = [f"--{field}", *((value.split(":") if value != "none" else []) if many else [value])]
            read.append(get(parse(commands.SweepValue, line, "mdiff front --select").fields, field))
        found[field] = tuple(read)
    return found


def _check_out(out: Path, runs: Sequence[Path]) -> None:
    """Refuses a place inside a run or among the cells of a sweep, where it would be taken for one."""
    taken = {absolute(folder) for folder in runs}
    for place in (absolute(out), *absolute(out).parents):
        if place in taken:
            raise UserError(f"--out {out}: lies in the run {place}; choose a folder outside of it")
        if place.name == "cells" and (place.parent / "sweep.json").is_file():
            raise UserError(f"--out {out}: lies among the cells of a sweep; choose a folder beside them")

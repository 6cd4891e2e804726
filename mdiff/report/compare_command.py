"""`mdiff compare`."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from mdiff import commands
from mdiff.errors import UserError
from mdiff.files import check_writable, strict, write_json
from mdiff.probes import results
from mdiff.probes.compare import compare as paired


def execute(args: commands.CompareArgs) -> int:
    """The command, with its arguments parsed."""
    if args.out is not None and args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: is no .json file; give one")
    first, second = (results.load(folder) for folder in args.runs)
    found, level = paired(first, second), second.config.confidence
    if args.out is not None:
        check_writable(args.out.parent, "--out")
        tree = {
            "format": 1,
            "first": str(args.runs[0]),
            "second": str(args.runs[1]),
            "confidence": level,
            "second_minus_first": {name: asdict(value) for name, value in found.items()},
        }
        write_json(args.out, strict(tree))
    table = Table(
        title=f"{args.runs[1]} minus {args.runs[0]}",
        caption=f"paired over generations; {100 * level:g} % intervals",
    )
    for column in ("measure", "difference", "low", "high", "n"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, value in found.items():
        table.add_row(name, *(f"{x:+.4f}" for x in (value.value, value.low, value.high)), str(value.n))
    Console().print(table)
    return 0

"""`mdiff judge export` and `mdiff judge import`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mdiff import commands
from mdiff.arguments import parse
from mdiff.errors import UserError
from mdiff.files import absolute, check_writable


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parts = {"export": _judge_export, "import": _judge_import}
    if not arguments:
        raise UserError("judge: nothing to do; give judge export or judge import, see mdiff judge --help")
    if arguments[0] in ("-h", "--help"):
        print("usage: mdiff judge export RUN [OPTIONS]\n       mdiff judge import RUN ANSWERS.json [...]\n")
        print(
            "export writes a page on which a person judges the most copy-like pairs; import reads the answers."
        )
        print("Each has --help.")
        return 0
    if arguments[0] not in parts:
        raise UserError(f"judge {arguments[0]}: unknown; give judge export or judge import")
    return parts[arguments[0]](arguments[1:])


def _judge_export(arguments: Sequence[str]) -> int:
    args = parse(commands.JudgeExportArgs, arguments, "mdiff judge export")
    if args.out is not None:
        check_writable(args.out, "--out")
    from mdiff.report.judge import export

    page, sheet = export(args.workdir, args.top, args.controls, args.seed, args.out)
    print(f"{sheet.top} pairs and {sheet.controls} controls, shuffled: {absolute(page)}")
    print(f"then: mdiff judge import {shlex.quote(str(args.workdir))} ANSWERS.json")
    return 0


def _judge_import(arguments: Sequence[str]) -> int:
    args = parse(commands.JudgeImportArgs, arguments, "mdiff judge import")
    from rich.console import Console

    from mdiff.probes import records, results, verdicts
    from mdiff.report.page import probe_table

    audited = results.load(args.workdir)
    found = verdicts.verdicts(audited, [verdicts.read_answers(path) for path in args.answers])
    path = records.save(found, args.workdir)
    console = Console()
    console.print(probe_table(found))
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(f"written: {path}; mdiff report {args.workdir} shows it", soft_wrap=True, markup=False)
    return 0

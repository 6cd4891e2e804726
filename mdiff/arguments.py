"""Command lines over typed dataclasses (tyro), with errors of one line that name the nearest field."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from mdiff.errors import UserError

T = TypeVar("T")


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`, before the rest is parsed."""
    for place, argument in enumerate(arguments):
        if argument == f"--{name}" and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None


def parse(
    cls: type[T],
    arguments: Sequence[str],
    prog: str,
    defaults: dict[str, Any] | None = None,
    *,
    flags: bool = False,
) -> T:
    """Parse `arguments` into the dataclass `cls`; `--help` prints every field and exits 0.

    Args:
      cls: a dataclass; nested fields are written `--train.steps 500`.
      arguments: without the command's name.
      prog: the command, for help.
      defaults: field values that replace the dataclass's own defaults.
      flags: booleans are bare flags (`--png`); else they take a value, as config fields do.

    Raises:
      UserError: an option is unknown, lacks a value or has one of the wrong type.
    """
    values: dict[str, Any] = {
        field.name: tyro.MISSING if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    }
    values |= defaults or {}
    output = io.StringIO()
    wanted_help = any(argument in ("-h", "--help") for argument in arguments)
    try:
        with contextlib.ExitStack() as quiet:
            if not wanted_help:
                quiet.enter_context(contextlib.redirect_stderr(output))
                quiet.enter_context(contextlib.redirect_stdout(output))
            return tyro.cli(
                cls,
                args=list(arguments),
                prog=prog,
                description=cls.__doc__,
                default=cls(**values),
                config=() if flags else (tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(cls, arguments, prog, output.getvalue())) from None


def _options(cls: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": int, …}` for a dataclass type."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        unnamed = typing.get_origin(hint) is typing.Annotated and name == "fields"
        bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(bare):
            found |= _options(bare, prefix if unnamed else f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = bare
    return found


def _one_line(cls: Any, arguments: Sequence[str], prog: str, printed: str) -> str:
    """What was wrong, in one line: our own words for an unknown option, else tyro's first paragraph."""
    known = _options(cls)
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                tails = {option.split(".")[-1]: option for option in known}
                near = near or [
                    tails[tail] for tail in difflib.get_close_matches(name.split(".")[-1], tails, n=1)
                ]
                hint = f"the nearest is --{near[0]}" if near else f"see {prog} --help"
                return f"--{name}: unknown option; {hint}"
    flat = " ".join(re.sub(r"[│╰╯╭╮]", " ", re.sub(r"[─-]{8,}", " § ", printed)).split())
    for found in (
        re.search(r"Error parsing (--[\w.-]+: .*?) (?:§|$)", flat),
        re.search(r"(Missing from [^§]*?)(?: [A-Z][^§]*)? (?:§|$)", flat),
    ):
        if found:
            return f"{found[1]}; see {prog} --help"
    sections = [section.strip() for section in flat.split("§") if section.strip()]
    return f"{sections[min(1, len(sections) - 1)]}; see {prog} --help"

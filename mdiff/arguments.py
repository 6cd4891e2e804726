"""Command lines over typed dataclasses (tyro), with errors of one line that name the nearest field."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

import tyro
from tyro import constructors

from mdiff import files
from mdiff.errors import UserError

T = TypeVar("T")

_REGISTRY = constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _path(info: constructors.PrimitiveTypeInfo) -> constructors.PrimitiveConstructorSpec[PurePath] | None:
    """Paths, of which those on object stores are no `pathlib.Path`: it would make gs:// one slash."""
    if info.type is not Path:
        return None
    return constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: files.locate(texts[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [str(path)],
    )


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
    _refuse_twice(cls, arguments)
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
                registry=_REGISTRY,
                config=() if flags else (tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        missing = [name for name, value in values.items() if value is tyro.MISSING]
        raise UserError(_problem(cls, arguments, missing, flags) + f"; see {prog} --help") from None


# ------------------------------------------------------------------- what was wrong, in our own words


def _options(cls: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """`({"train.steps": int, …}, {positional name: type})` of a dataclass type."""
    named: dict[str, Any] = {}
    positional: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
        bare = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(bare):
            unnamed = bool(marks) and name == "fields"
            named |= _options(bare, prefix if unnamed else f"{prefix}{name}.")[0]
        elif marks:
            positional[name] = bare
        else:
            named[f"{prefix}{name}"] = bare
    return named, positional


def _problem(cls: Any, arguments: Sequence[str], missing: Sequence[str], flags: bool) -> str:
    """The first thing wrong with a command line that the parser refused."""
    named, positional = _options(cls)
    loose: list[str] = []
    given = set()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not _is_option(argument):
            loose.append(argument)
            continue
        shown, _, inline = argument.partition("=")
        name = shown[2:].replace("-", "_")
        if name not in named:
            return f"{shown}: unknown option; {_nearest(name, named)}"
        given.add(name)
        least, most = _arity(named[name], flags)
        values = [inline] if "=" in argument else []
        while rest and len(values) < most and not _is_option(rest[0]):
            values.append(rest.pop(0))
        wanted = _wanted(named[name])
        if len(values) < least:
            return f"{shown}: has no value; give {wanted}"
        if bad := [value for value in values if not _fits(named[name], value)]:
            return f"{shown} {' '.join(values)}: {bad[0]!r} does not fit; give {wanted}"
        if typing.get_origin(named[name]) is dict and len(values) % 2:
            return f"{shown} {' '.join(values)}: {len(values)} values; give {wanted}"
    for name, hint in positional.items():
        least, most = _arity(hint, flags)
        if name in missing and len(loose) < max(1, least):
            return f"{name.upper()}: {len(loose)} given; give {_wanted(hint)}"
        taken, loose = loose[: int(min(most, len(loose)))], loose[int(min(most, len(loose))) :]
        if bad := [value for value in taken if not _fits(hint, value)]:
            return f"{name.upper()} {bad[0]!r}: does not fit; give {_wanted(hint)}"
    if loose:
        return f"{loose[0]!r}: belongs to no option; options are written --name value"
    for name in missing:
        if name not in given and name not in positional:
            return f"--{name.replace('_', '-')}: is missing; give {_wanted(named[name])}"
    return "these options do not fit together"


def _refuse_twice(cls: Any, arguments: Sequence[str]) -> None:
    """A mapping is written `--data.duplicates 7 5 8 2`; of a key given twice the last would silently win."""
    known, _ = _options(cls)
    for place, argument in enumerate(arguments):
        if _is_option(argument) and typing.get_origin(known.get(argument[2:].replace("-", "_"))) is dict:
            given = itertools.takewhile(lambda each: not _is_option(each), arguments[place + 1 :])
            keys = list(given)[::2]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise UserError(f"{argument}: {twice[0]} is given twice; give it once")


def _is_option(argument: str) -> bool:
    return argument.startswith("-") and not re.fullmatch(r"-(\d|\.\d|inf|nan).*|-", argument)


def _nearest(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    tails = {option.split(".")[-1]: option for option in known}
    near = near or [tails[tail] for tail in difflib.get_close_matches(name.split(".")[-1], tails, n=1)]
    return f"the nearest is --{near[0].replace('_', '-')}" if near else "it is not an option here"


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(origin, arguments), with `X | None` as X."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint, typing.get_args(hint)


def _arity(hint: Any, flags: bool) -> tuple[int, float]:
    """How many values an option takes: (least, most)."""
    origin, inner = _parts(hint)
    if origin is bool:
        return (0, 0) if flags else (1, 1)
    if origin is dict or (origin is tuple and inner[-1] is Ellipsis):
        return 0, float("inf")
    return (len(inner), len(inner)) if origin is tuple else (1, 1)


_WORDS = {
    int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path",
}  # fmt: skip


def _wanted(hint: Any) -> str:
    origin, inner = _parts(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is dict:
        return f"pairs such as 3 10 ({_WORDS[inner[0]]}, {_WORDS[inner[1]]})"
    if origin is tuple and inner[-1] is Ellipsis:
        return f"one or more values, each {_WORDS[inner[0]]}"
    if origin is tuple:
        return f"{len(inner)} values, each {_WORDS[inner[0]]}"
    return _WORDS.get(origin, "a value")


def _fits(hint: Any, value: str) -> bool:
    origin, inner = _parts(hint)
    if origin is typing.Literal:
        return value in map(str, inner)
    if origin is bool:
        return value in ("True", "False")
    kinds = inner if origin in (tuple, dict) else (origin,)
    pattern = {int: r"[+-]?\d[\d_]*", float: r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)"}
    expected = [pattern[kind] for kind in kinds if kind in pattern]
    return not expected or value == "None" or any(re.fullmatch(p, value, re.I) for p in expected)

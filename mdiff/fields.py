"""Dataclasses of plain values: to JSON, from JSON with the first mistake named, and what holds for every number."""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from typing import Any

import pydantic

from mdiff.errors import UserError


@functools.cache  # building one takes longer than using it
def _adapter(cls: Any) -> Any:
    return pydantic.TypeAdapter(cls)


def to_json(config: Any) -> dict[str, Any]:
    """A config (or any dataclass of plain values) as JSON-ready dicts and lists."""
    kind: Any = type(config)
    return _adapter(kind).dump_python(config, mode="json", fallback=str, warnings=False)


def from_json(cls: type, tree: dict[str, Any], where: str = "config") -> Any:
    """The inverse of `to_json`.

    Raises:
      UserError: a field is unknown or of the wrong type; the message names the first one.
    """
    _forbid_unknown(cls, tree, where)
    try:
        return _adapter(cls).validate_python(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {name} = {first['input']!r}: {first['msg']}") from None


def _forbid_unknown(cls: type, tree: dict[str, Any], where: str) -> None:
    known = {f.name: f for f in fields(cls)}
    for name, value in tree.items():
        if name not in known:
            raise UserError(
                f"{where}: unknown field {name!r}; this version of mdiff knows {', '.join(known)}"
            )
        default = known[name].default
        if hasattr(default, "__dataclass_fields__") and isinstance(value, dict):
            _forbid_unknown(type(default), value, f"{where}.{name}")


def check_values(tree: Any, name: str = "") -> None:
    """What holds for every field of a config, or of a part called `name`: numbers are finite, seeds 32 bits wide.

    Raises:
      UserError: the first field that is not.
    """
    for part in fields(tree):
        value, full = getattr(tree, part.name), f"{name}.{part.name}" if name else part.name
        if hasattr(value, "__dataclass_fields__"):
            check_values(value, full)
        elif part.name == "seed" and not 0 <= value < 2**32:
            raise UserError(f"{full} = {value}: give a seed from 0 to {2**32 - 1}")
        elif any(isinstance(each, float) and not math.isfinite(each) for each in (value, *_items(value))):
            raise UserError(f"{full} = {value}: give a finite number")


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()

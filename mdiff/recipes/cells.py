"""The cells of a sweep: the product of the values of some fields of one config, and the record of how each fares.

A field is varied as `field=a,b,c`. What the command line separates by spaces, a value separates by colons: two
values of a list of numbers are `net.mults=1:2,2:2`, two values of pairs `data.duplicates=7:5,7:5:9:3`; `none` is the
empty list.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mdiff import config, processes
from mdiff.errors import UserError
from mdiff.files import write_json

STATES = ("waiting", "training", "trained", "measured", "failed")
MAX_NAME = 120  # characters; file systems take 255 bytes

_MAY_CHANGE = {
    "mesh": None,
    "sample": None,
    "audit": None,
    "train": ("steps", *config.AROUND),
}
"""Fields of the base config that the same sweep may go on with otherwise: they do not change a training step."""

Axes = dict[str, tuple[Any, ...]]
"""The values of each varied field, in the order given."""


@dataclass(frozen=True)
class Cell:
    """One point of a sweep.

    Attributes:
      name: of its folder, and in reports: "cutoff=0.5,seed=1".
      fields: its value of each varied field.
      config: its whole config.
    """

    name: str
    fields: dict[str, Any]
    config: config.Config


def parse_over(over: Sequence[str], base: config.Config, value: Callable[[str, list[str]], Any]) -> Axes:
    """The axes that `field=a,b,c` texts describe.

    Args:
      over: one text per field.
      base: says which fields take several words.
      value: `(field, words) -> value`, as the command line would read `--field words`.

    Raises:
      UserError: a text is malformed, a field or a value is given twice, a field does not change training, or
        what `value` raises.
    """
    if not over:
        raise UserError("--over: nothing to vary; give one or more field=a,b,c such as seed=0,1,2")
    axes: Axes = {}
    for text in over:
        field, equals, values = text.partition("=")
        field = field.removeprefix("--").replace("-", "_")
        if not equals or not field:
            raise UserError(f"--over {text}: give field=a,b,c, such as seed=0,1,2")
        if field in axes:
            raise UserError(f"--over {field}: is given twice; give all its values at once")
        if field == "name" or field.split(".")[0] in ("mesh", "sample", "audit"):
            raise UserError(f"--over {field}: does not change what is trained; give --{field} to all cells")
        found: list[Any] = []
        for word in values.split(","):
            if not word:
                raise UserError(f"--over {text}: a value is empty; give {field}=a,b,c")
            parsed = value(field, _words(base, field, word))
            if parsed in found:
                raise UserError(f"--over {text}: {word} is there twice; give each value once")
            found.append(parsed)
        axes[field] = tuple(found)
    return axes


def _words(base: config.Config, field: str, text: str) -> list[str]:
    """One value as the words of a command line."""
    many = isinstance(get(base, field), tuple | dict)
    return ([] if text == "none" else text.split(":")) if many else [text]


def get(tree: Any, field: str) -> Any:
    """The value of a dotted field, None when there is no such field."""
    for part in field.split("."):
        tree = getattr(tree, part, None)
    return tree


def put(tree: Any, field: str, value: Any) -> Any:
    """`tree` with a dotted field replaced."""
    first, _, rest = field.partition(".")
    return replace(tree, **{first: put(getattr(tree, first), rest, value) if rest else value})


def product(base: config.Config, axes: Axes) -> list[Cell]:
    """All cells, the last field varying fastest."""
    short = {field: field.rsplit(".", 1)[-1] for field in axes}
    twice = {name for name in short.values() if list(short.values()).count(name) > 1}
    cells: list[Cell] = []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        shown = [
            f"{field if short[field] in twice else short[field]}={_text(fields[field])}" for field in axes
        ]
        name, cfg = _folder_name(",".join(shown)), base
        for field, value in fields.items():
            cfg = put(cfg, field, value)
        cells.append(Cell(name, fields, replace(cfg, name=name)))
    return cells


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ":".join(f"{name}:{each}" for name, each in value.items()) or "none"
    if isinstance(value, tuple):
        return ":".join(map(_text, value)) or "none"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _folder_name(text: str) -> str:
    """`text` as the name of a folder; what had to be changed or cut keeps its identity in a short hash."""
    safe = re.sub(r"[^\w.,=+:-]", "-", text, flags=re.ASCII).replace(":", "_")
    if len(safe) <= MAX_NAME and safe == text.replace(":", "_"):
        return safe
    return f"{safe[: MAX_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Record:
    """`sweep.json`: what the sweep is, and how each of its cells fares; written whole at every change.

    Attributes:
      asked: the cells of this call, in order.
      cells: of each cell, also of earlier calls, its fields, state, step, steps, loss, reason, and when measured
        memorized and control.
    """

    def __init__(self, path: Path, base: config.Config, axes: Axes) -> None:
        """Open the sweep at `path`, or begin it; the cells of `axes` join those that are there.

        Raises:
          UserError: the file is damaged, or that of another sweep.
        """
        self._path, self._base = path, config.to_json(base)
        stored = processes.from_first(lambda: self._load(list(axes)))
        self._varied: list[str] = stored["varied"]  # in the order of the first call, which made the names
        self.asked = product(base, {field: axes[field] for field in self._varied})
        self.cells: dict[str, dict[str, Any]] = stored["cells"]
        for cell in self.asked:
            tree = config.to_json(cell.config)
            fields = {field: _dig(tree, field) for field in cell.fields}
            found = self.cells.setdefault(cell.name, {"fields": fields, "state": "waiting", "step": 0})
            found["steps"] = cell.config.train.steps

    def _load(self, varied: list[str]) -> dict[str, Any]:
        if not self._path.is_file():
            folder = self._path.parent
            if (folder / "config.json").exists():
                raise UserError(f"--workdir {folder}: holds a run of mdiff train; choose another folder")
            return {"varied": varied, "cells": {}}
        try:
            tree = json.loads(self._path.read_text())
            cells, theirs, base = tree["cells"], list(tree["varied"]), tree["base"]
            assert isinstance(cells, dict) and isinstance(base, dict)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(
                f"{self._path}: damaged ({error!r}); move it away, the cells stay as they are"
            ) from None
        if sorted(theirs) != sorted(varied):
            raise UserError(
                f"--over varies {', '.join(varied)}: the sweep in {self._path.parent} varies {', '.join(theirs)}; "
                "vary the same fields, or choose a new --workdir"
            )
        what = processes.first_difference(_fixed(base, varied), _fixed(self._base, varied))
        if what:
            raise UserError(
                f"--workdir {self._path.parent}: holds another sweep ({what}); choose a new --workdir, or go on "
                "with its config"
            )
        return {"varied": theirs, "cells": cells}

    def set(self, name: str, **changes: Any) -> None:
        """Change entries of a cell; None removes one."""
        cell = self.cells[name]
        for entry, value in changes.items():
            if value is None:
                cell.pop(entry, None)
            else:
                cell[entry] = value
        self.save()

    def save(self) -> None:
        """Write the file; of several processes the first does."""
        if processes.is_first():
            tree = {"format": 1, "varied": self._varied, "base": self._base, "cells": self.cells}
            write_json(self._path, tree)


def _dig(tree: Any, field: str) -> Any:
    for part in field.split("."):
        tree = tree[part]
    return tree


def _fixed(tree: dict[str, Any], varied: Sequence[str]) -> dict[str, Any]:
    """A config's JSON without what may change between two commands of one sweep."""
    kept: dict[str, Any] = {}
    for name, part in tree.items():
        if not isinstance(part, dict):
            if name not in varied:
                kept[name] = part
            continue
        free = _MAY_CHANGE.get(name, ())
        if free is not None:
            kept[name] = {
                key: value for key, value in part.items() if key not in free and f"{name}.{key}" not in varied
            }
    return kept

"""Settings of a front: cells that differ in seed alone, their names, and the standard training each is held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mdiff.config import AROUND, Config
from mdiff.report.front_cells import Cell

_SETTLED = ("name", "seed", "mesh", "audit")
"""Parts of a config in which the cells of one setting may differ, or in which all cells were checked to agree."""
_AMBIENT = (
    "cutoff",
    "cutoff_of",
    "cutoff_stages",
    "share",
    "clean",
    "clean_share",
    "weight",
    "max_gain",
    "buffer",
    "consistency",
    "consistency_steps",
)
"""Fields of `loss` that say nothing when there is no cutoff."""


@dataclass(frozen=True)
class Setting:
    """Cells that differ in seed alone.

    Attributes:
      name: such as "cutoff 0.5, share 0.5".
      series: the same without the cutoff: settings of one series differ in cutoff alone.
      cutoff: the highest noise level from which copies are trained on; 0 for none.
      values: its value of every field in which settings of its front differ, and of cutoff and share.
      standard: no cutoff at all.
      copies: noisy copies are trained on.
      cells: all of them, by seed, measured or not.
      baseline: name of the standard setting that agrees in all else; "" for none, and for a standard one.
    """

    name: str
    series: str
    cutoff: float
    values: dict[str, Any]
    standard: bool
    copies: bool
    cells: tuple[Cell, ...]
    baseline: str

    @property
    def measured(self) -> dict[int, Cell]:
        """Its measured cells by seed; of two with one seed the first."""
        found: dict[int, Cell] = {}
        for cell in self.cells:
            if cell.run is not None:
                found.setdefault(cell.config.seed, cell)
        return found


def group(cells: Sequence[Cell]) -> list[Setting]:
    """The settings of the cells of one front, standard training first, then by series and cutoff."""
    keyed: dict[str, list[Cell]] = {}
    for cell in cells:
        keyed.setdefault(json.dumps(_key(cell.config), sort_keys=True), []).append(cell)
    members = sorted(
        keyed.values(), key=lambda part: all(cell.run is None for cell in part)
    )  # measured ones first
    flat = [_key(part[0].config) for part in members]
    varied = [field for field in flat[0] if any(tree[field] != flat[0][field] for tree in flat)]
    names: list[str] = []
    for part in members:
        short = _name(part[0].config, varied)
        names.append(_name(part[0].config, varied, whole=True) if short in names else short)
    bases = {
        _without_ambient(tree): name
        for tree, name, part in zip(reversed(flat), reversed(names), reversed(members), strict=True)
        if not part[0].config.loss.ambient
    }
    found = [
        _setting(part, name, varied, bases.get(_without_ambient(tree), ""))
        for part, name, tree in zip(members, names, flat, strict=True)
    ]
    order = {
        series: place for place, series in enumerate(sorted({one.series for one in found}, key=_natural))
    }
    return sorted(found, key=lambda one: (not one.standard, order[one.series], one.cutoff))


def _setting(cells: Sequence[Cell], name: str, varied: Sequence[str], baseline: str) -> Setting:
    cfg = cells[0].config
    rest = [field for field in varied if field != "loss.cutoff"]
    return Setting(
        name=name,
        series="standard" if not cfg.loss.ambient else _name(cfg, rest, cutoff=False) or "ambient",
        cutoff=max(cfg.loss.levels, default=0.0),
        values={field: _key(cfg)[field] for field in dict.fromkeys(["loss.cutoff", "loss.share", *varied])},
        standard=not cfg.loss.ambient,
        copies=cfg.loss.copies,
        cells=tuple(sorted(cells, key=lambda cell: cell.config.seed)),
        baseline="" if not cfg.loss.ambient else baseline,
    )


def _key(cfg: Config) -> dict[str, Any]:
    """The fields that make a setting, by dotted name."""
    flat: dict[str, Any] = {}
    for part, tree in asdict(cfg).items():
        if part not in _SETTLED:
            flat |= {f"{part}.{name}": value for name, value in tree.items()}
    # Not `stop_when`: it decides which state of the run is kept.
    for field in ("data.reading", *(f"train.{name}" for name in AROUND if name != "stop_when")):
        del flat[field]
    return flat


def _without_ambient(flat: Mapping[str, Any]) -> str:
    """What a setting and its standard training have in common."""
    left_out = {"sample.until", *(f"loss.{name}" for name in _AMBIENT)}
    return json.dumps(
        {field: value for field, value in flat.items() if field not in left_out}, sort_keys=True
    )


def _name(cfg: Config, varied: Sequence[str], *, cutoff: bool = True, whole: bool = False) -> str:
    flat = _key(cfg)
    parts = []
    if cutoff and (whole or cfg.loss.cutoff or not cfg.loss.ambient):
        parts.append(f"cutoff {cfg.loss.cutoff:g}")
    for field in varied:
        section, short = field.split(".")
        moot = section == "loss" and short in _AMBIENT and not cfg.loss.ambient
        if field == "loss.cutoff" or (moot and not whole):
            continue
        if field == "loss.share" and not flat[field]:
            parts.append("law's share")
        else:
            parts.append(f"{short} {text(flat[field])}")
    return ", ".join(parts)


def text(value: Any) -> str:
    """A config's value as a reader writes it."""
    if isinstance(value, Mapping):
        return ":".join(f"{name}:{text(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ":".join(map(text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _natural(series: str) -> tuple[bool, str]:
    return series != "law's share", series

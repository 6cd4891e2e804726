"""`front.json`: every cell and setting in one list each, and per front what belongs to it as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mdiff import __version__
from mdiff.files import strict
from mdiff.report.front import Front, Fronts, Point
from mdiff.report.front_cells import Cell, Measure
from mdiff.report.front_settings import Setting

FORMAT = 1
"""Of `front.json`; raised when a field changes its meaning."""


def as_json(found: Fronts, verdicts: Sequence[Sequence[str]], command: str) -> dict[str, Any]:
    """What `front.json` holds; a number that is unknown is null.

    Args:
      found: from `front.collect`.
      verdicts: paragraphs for each front.
      command: that made it.
    """
    seconds = {cell.name: _seconds(cell) for cell in found.cells}
    total = [sum(each.values()) for each in seconds.values() if each]
    return strict(
        {
            "format": FORMAT,
            "command": command,
            "quality": _measure(found.quality),
            "memorized": _measure(found.memorized),
            "verdict": [paragraph for each in verdicts for paragraph in each],
            "cells": [_cell(cell, found, seconds[cell.name]) for cell in found.cells],
            "settings": [_setting(one, front) for front in found.fronts for one in front.settings],
            "fronts": [
                {
                    "name": front.name,
                    "n": front.n,
                    "confidence": front.confidence,
                    "on_front": [name for name, point in front.means.items() if point.on_front],
                    "baseline": [one.name for one in front.settings if one.standard],
                    "hypervolume": asdict(front.area),
                    "along": _along_json(front),
                    "verdict": list(verdict),
                }
                for front, verdict in zip(found.fronts, verdicts, strict=True)
            ],
            "seconds": sum(total) if total else None,
            "versions": {"front": __version__, "cells": _versions(found.cells)},
        }
    )


def _measure(one: Measure) -> dict[str, Any]:
    return {
        "measure": one.key,
        "label": one.label,
        "unit": "share" if one.kind == "rate" else "",
        "better": one.better,
    }


def _cell(cell: Cell, found: Fronts, seconds: dict[str, float]) -> dict[str, Any]:
    front = next((front for front in found.fronts if any(cell in one.cells for one in front.settings)), None)
    point = front.cells.get(cell.name) if front else None
    setting = next((one.name for one in front.settings if cell in one.cells), None) if front else None
    return {
        "name": cell.name,
        "folder": str(cell.folder),
        "setting": setting,
        "fields": cell.fields,
        **_identity(cell),
        "seed": cell.config.seed,
        "state": cell.state,
        "reason": cell.reason or None,
        "steps": point.step if point else None,
        **_point(point),
        "seconds": {"total": sum(seconds.values()), **seconds} if seconds else None,
    }


def _identity(cell: Cell) -> dict[str, Any]:
    loss = cell.config.loss
    return {"cutoff": loss.cutoff, "share": loss.share, "n": cell.config.data.n}


def _point(point: Point | None) -> dict[str, Any]:
    names = ("memorized", "quality", "control", "on_front", "dominated_by")
    if point is None:
        return dict.fromkeys(names)
    numbers = {name: getattr(point, name) for name in names[:3]}
    return {name: one and asdict(one) for name, one in numbers.items()} | {
        "on_front": point.on_front,
        "dominated_by": list(point.dominated_by),
    }


def _setting(one: Setting, front: Front) -> dict[str, Any]:
    point, change = front.means.get(one.name), front.changes.get(one.name)
    states = [cell.state for cell in one.cells]
    return {
        "name": one.name,
        "front": front.name,
        **_identity(one.cells[0]),
        "fields": one.values,
        "seeds": sorted(one.measured),
        "cells": [cell.name for cell in one.cells],
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "steps": point.step if point else None,
        **_point(point),
        "probability_on_front": point.chance if point else None,
        "baseline": one.baseline or None,
        "minus_baseline": asdict(change) if change else None,
    }


def _along_json(front: Front) -> dict[str, Any]:
    standard = {one.name for one in front.settings if one.standard}
    return {
        "generations": front.along_of or None,
        "why_none": front.no_along or None,
        "standard_on_front": [
            {"setting": point.name, "step": point.step}
            for point in front.along
            if point.on_front and point.name in standard
        ],
        "points": [
            {"setting": point.name, "step": point.step}
            | {"memorized": asdict(point.memorized), "quality": asdict(point.quality)}
            | {"on_front": point.on_front, "probability_on_front": point.chance}
            for point in front.along
        ],
    }


def _seconds(cell: Cell) -> dict[str, float]:
    return dict(cell.run.ledger.get("seconds") or {}) if cell.run is not None else {}


def _versions(cells: Sequence[Cell]) -> dict[str, str]:
    """Versions by package; several where the cells differ."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        stored = (cell.run.record.get("versions") or {}) if cell.run is not None else {}
        for package, version in stored.items():
            found.setdefault(package, []).append(str(version))
    return {package: "; ".join(dict.fromkeys(versions)) for package, versions in found.items()}

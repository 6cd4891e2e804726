"""`front.json`, `front.html` and the pictures, written from the cells' result files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mdiff.errors import UserError
from mdiff.files import locate, write_atomically, write_json, write_text
from mdiff.report import front_figures, front_json, front_samples, front_words, parts, words
from mdiff.report.front import Front, Fronts, Point
from mdiff.report.front_cells import Cell, Measure
from mdiff.report.front_settings import Setting
from mdiff.report.html import encode
from mdiff.types import Estimate

_ABSENT = {"value": "", "interval": "", "sort": None}


def write_front(out: Path, found: Fronts, *, title: str, command: str) -> dict[str, Any]:
    """Write `front.json`, `front.html`, `front.svg`, `front.png` and, where there are pictures, `front_samples.png`.

    Of several fronts each has its own picture of samples, numbered from 1.

    Args:
      out: folder; made when it does not exist.
      found: from `front.collect`.
      title: heading of the page.
      command: that made it.

    Returns:
      What was written to `front.json`.

    Raises:
      UserError: `out` cannot be written.
    """
    out = locate(out)
    verdicts = [front_words.verdict(front, found) for front in found.fronts]
    tree = front_json.as_json(found, verdicts, command)
    drawn = front_figures.plane(found)
    pictures = {"front.svg": front_figures.svg(drawn).encode(), "front.png": front_figures.png(drawn)}
    strips: list[tuple[str, bytes]] = []
    for front in found.fronts:
        strip = front_samples.samples(found, front)
        if strip is not None:
            strips.append((front.name, front_figures.png(strip, dots=170)))
    numbers = [""] if len(found.fronts) == 1 else [f"_{i + 1}" for i in range(len(strips))]
    pictures |= {f"front_samples{i}.png": content for i, (_, content) in zip(numbers, strips, strict=False)}
    html = _html(found, tree, title, pictures["front.svg"], strips)
    try:
        for name, content in pictures.items():
            write_atomically(out / name, lambda part, content=content: part.write_bytes(content))  # type: ignore[misc]
        for stale in sorted(out.glob("front_samples*.png")):
            if stale.name not in pictures:  # an earlier command's, of other fronts
                stale.unlink()
        write_text(out / "front.html", html)
        write_json(out / "front.json", tree)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    return tree


def table(front: Front, found: Fronts) -> Table:
    """The settings of one front for the terminal."""
    heading = (
        f"Means over seeds, and the share of draws on the front{f': {front.name}' if front.name else ''}"
    )
    made = Table(title=Text(heading), title_justify="left", box=box.SIMPLE, pad_edge=False)
    made.add_column("setting")
    for column in (found.memorized.key, found.quality.key, "on front"):
        made.add_column(column, justify="right", no_wrap=True)
    for one in front.settings:
        point = front.means.get(one.name)
        cells = ["–"] * 3
        if point is not None:
            cells = [
                front_words.number(point.memorized, found.memorized),
                front_words.number(point.quality, found.quality),
                f"{'yes' if point.on_front else 'no'}, {words.percent(point.chance or 0.0)}",
            ]
        seeds = "" if len(one.measured) == len(one.cells) else f" ({_seeds(one)} seeds)"
        made.add_row(Text(one.name + seeds), *map(Text, cells))
    return made


def _html(
    found: Fronts, tree: Mapping[str, Any], title: str, plane: bytes, strips: Sequence[tuple[str, bytes]]
) -> str:
    level = f"{100 * found.fronts[0].confidence:g}\N{NO-BREAK SPACE}%"
    return parts.render(
        "front.html",
        "front.json",
        title=title,
        facts=_facts(found),
        verdict=tree["verdict"],
        plane=encode("image/svg+xml", plane),
        samples=[{"name": name, "uri": encode("image/png", content)} for name, content in strips],
        level=level,
        fronts=[_front_view(front, found) for front in found.fronts],
        quality=found.quality.label,
        memorized=found.memorized.label,
        cells=[_cell_row(cell, found, tree["cells"][i]) for i, cell in enumerate(found.cells)],
        legend=front_words.legend((found.memorized, found.quality)),
        provenance=_provenance(tree),
    )


def _facts(found: Fronts) -> str:
    states = [cell.state for cell in found.cells]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    data = found.cells[0].config.data
    return f"{data.source} at {data.size}×{data.size}; {len(found.cells)} cells: {counts}"


def _front_view(front: Front, found: Fronts) -> dict[str, Any]:
    on = [point for point in front.along if point.on_front]
    return {
        "name": front.name,
        "rows": [_setting_row(one, front, found) for one in front.settings],
        "along": [
            {"name": point.name, "step": point.step, **_numbers(point, found), "chance": _chance(point)}
            for point in sorted(on, key=lambda point: found.quality.sign * point.quality.value)
        ],
        "along_all": len(front.along),
        "along_of": front.along_of,
    }


def _setting_row(one: Setting, front: Front, found: Fronts) -> dict[str, Any]:
    point, change = front.means.get(one.name), front.changes.get(one.name)
    return {
        "name": one.name,
        "seeds": _seeds(one),
        "on": bool(point and point.on_front),
        "place": "–" if point is None else "yes" if point.on_front else "dominated",
        **_numbers(point, found),
        "control": _number(point.control, "rate") if point else _ABSENT,
        "chance": _chance(point) if point else _ABSENT,
        "less": _change(change.memorized, found.memorized) if change else _ABSENT,
        "worse": _change(change.quality, found.quality) if change else _ABSENT,
    }


def _cell_row(cell: Cell, found: Fronts, entry: Mapping[str, Any]) -> dict[str, Any]:
    point = next((front.cells[cell.name] for front in found.fronts if cell.name in front.cells), None)
    seconds = (entry["seconds"] or {}).get("total")
    by = ", ".join(point.dominated_by[:1]) if point else cell.reason
    more = len(point.dominated_by) - 1 if point else 0
    return {
        "name": cell.name,
        "seed": cell.config.seed,
        "state": cell.state,
        "steps": point.step if point and point.step is not None else "",
        "on": bool(point and point.on_front),
        "place": "–" if point is None else "yes" if point.on_front else "dominated",
        "by": by + (f" and {more} more" if more > 0 else ""),
        "seconds": _ABSENT
        if seconds is None
        else {"value": f"{seconds:.0f}", "interval": "", "sort": seconds},
        **_numbers(point, found),
    }


def _numbers(point: Point | None, found: Fronts) -> dict[str, Any]:
    if point is None:
        return {"memorized": _ABSENT, "quality": _ABSENT}
    return {
        "memorized": _number(point.memorized, found.memorized.kind),
        "quality": _number(point.quality, found.quality.kind),
    }


def _number(value: Estimate | None, kind: str) -> dict[str, Any]:
    if value is None or not math.isfinite(value.value):
        return _ABSENT
    text, interval = words.shown(value, kind)
    return {"value": text, "interval": interval, "sort": value.value}


def _change(value: Estimate, measure: Measure) -> dict[str, Any]:
    text = front_words.difference(value, measure).removesuffix(" percentage points")
    head, _, interval = text.partition(" ")
    return {"value": head, "interval": interval, "sort": value.value}


def _chance(point: Point) -> dict[str, Any]:
    chance = point.chance or 0.0
    return {"value": words.percent(chance), "interval": "", "sort": chance}


def _seeds(one: Setting) -> str:
    measured, every = len(one.measured), len(one.cells)
    return str(measured) if measured == every else f"{measured} of {every}"


def _provenance(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("command", tree["command"])]
    if tree["seconds"] is not None:
        rows.append(("seconds of all cells", f"{tree['seconds']:,.0f}"))
    for front in tree["fronts"]:
        quality, memorized = front["hypervolume"]["reference"]
        name = "reference of the area" + (f", {front['name']}" if front["name"] else "")
        rows.append((name, f"quality {words.distance(quality)}, memorization {words.distance(memorized)}"))
    rows += [(package, version) for package, version in tree["versions"]["cells"].items()]
    return [(name, json.dumps(value) if not isinstance(value, str) else value) for name, value in rows]

"""What pages of one command's result file have in common: reading it, numbers as cells, figures with captions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from mdiff import __version__
from mdiff.errors import UserError
from mdiff.probes import stamped
from mdiff.report import figures, words
from mdiff.report.html import data_uri, embedded_json, encode, environment, read_asset, script
from mdiff.types import Estimate

Row = Mapping[str, Any]
"""A part of a result file; a number with an interval in it is `{value, low, high, n}`, and null is NaN."""

_LARGE, _LOSSLESS = 176, 144  # pixels: what is wider than the second is shrunk to the first

ABSENT: Row = {"value": "", "interval": "", "sort": None}
"""The cell of a number that was not measured."""


class Captioned(NamedTuple):
    """An SVG document, its caption, and the text that stands for it where it is not seen."""

    svg: str
    caption: str
    alt: str


def read(
    path: Path, form: int, needed: set[str], command: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A result file, and the arrays beside it that belong to it.

    Args:
      path: such as OUT/side.json; the arrays are in OUT/side.npz.
      form: the "format" that the page reads.
      needed: keys it must have.
      command: what makes it.

    Raises:
      UserError: one of the two is missing, damaged, of another format, or not of the other.
    """
    again = f"; run {command} again, which makes it anew"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run {command}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: is damaged{again}") from None
    if not isinstance(tree, dict) or tree.get("format") != form:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise UserError(f"{path}: format {found}, this version reads {form}{again}")
    missing = sorted(needed - set(tree))
    if missing:
        raise UserError(f"{path}: is damaged, it has no {missing[0]}{again}")
    arrays = path.with_suffix(".npz")
    if not arrays.is_file():
        raise UserError(f"{arrays}: no such file{again}")
    return tree, stamped.read(arrays, tree["arrays"], str(path), again)


def render(template: str, file: str, **values: Any) -> str:
    """A page made of a template that extends base.html.

    Args:
      template: its name.
      file: name of the result file.
      values: what the template shows; `title`, `facts` and `verdict` among them.
    """
    return (
        environment()
        .get_template(template)
        .render(
            css=Markup(read_asset("page.css")),
            code=script(read_asset("page.js")),
            data=embedded_json({"runs": [], "sliders": {}}),
            version=__version__,
            file=file,
            **values,
        )
    )


def captioned(figure: Figure, caption: str, alt: str, file: str) -> Captioned:
    """A figure of numbers that are in the result file of that name."""
    with matplotlib.rc_context(figures.style()):
        return Captioned(figures.svg(figure).svg, caption, f"{alt}; the numbers are in {file}")


def uris(plots: Sequence[Captioned]) -> list[dict[str, str]]:
    """Figures as the template takes them."""
    return [
        {"uri": encode("image/svg+xml", plot.svg.encode()), "caption": plot.caption, "alt": plot.alt}
        for plot in plots
    ]


def estimate(value: Row) -> Estimate:
    """A number of a result file, null as NaN."""
    ends = {name: math.nan if value[name] is None else value[name] for name in ("value", "low", "high")}
    return Estimate(**ends, n=value["n"])


def number(value: Row | None, kind: str) -> Row:
    """A number with its interval as a cell: of kind "rate" in per cent, of kind "score" with three decimals."""
    if value is None or value["value"] is None:
        return ABSENT
    if kind == "score":
        text, interval = f"{estimate(value)}".split(" ", 1)
        return {
            "value": text,
            "interval": interval if words.bounded(estimate(value)) else "",
            "sort": value["value"],
        }
    text, interval = words.shown(estimate(value), kind)
    return {"value": text, "interval": interval, "sort": value["value"]}


def plain(value: float | None, text: str = "") -> Row:
    """A number without interval as a cell; `text` is how it is written, else three digits."""
    if value is None:
        return ABSENT
    return {"value": text or words.distance(value), "interval": "", "sort": value}


def sheet(images: np.ndarray, name: str, text: str) -> dict[str, Any]:
    """A sheet of images uint8 [N,H,W,C] with what stands below it."""
    canvas = montage(images)
    pixels = max(canvas.shape[:2]) <= _LOSSLESS
    return {"name": name, "text": text, "uri": data_uri(canvas, _LARGE, _LOSSLESS), "pixels": pixels}


def montage(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W,C] in rows of two, with white gaps; a single image as it is."""
    n, height, width, channels = images.shape
    across, gap = min(n, 2), max(1, width // 16)
    down = -(-n // across)
    canvas = np.full((down * (height + gap) - gap, across * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // across) * (height + gap), (i % across) * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return canvas


def flat(settings: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Every field with its value, parts as part.field."""
    out: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            out += flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            out.append((f"{prefix}{name}", ", ".join(_text(each) for each in value)))
        else:
            out.append((f"{prefix}{name}", _text(value)))
    return out


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if value.is_integer() else words.distance(value)
    return str(value)

"""What a probe found: the form all probes share, in memory and on disk.

`probe_NAME.json` holds everything small, `probe_NAME.npz` the arrays. A page or a table needs nothing else.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mdiff.errors import UserError
from mdiff.files import is_writer, locate, strict, write_atomically, write_text
from mdiff.probes import stamped
from mdiff.types import Estimate

FORMAT = 1
"""Of `probe_NAME.json`; raised when a field changes its meaning."""


Better = Literal["lower", "higher", ""]
"""Which direction of a number is good; "" for neither."""


@dataclass(frozen=True)
class Measure:
    """One number of a probe.

    Attributes:
      key: its name in files, such as "ssim_excess".
      label: its name for a reader.
      estimate: value, interval and denominator; None when it could not be measured (the note says why). An
        interval that is unknown has NaN limits.
      unit: "%" (the estimate is a share, 0.03 for 3 %), "images", "RMS" (per pixel on [0, 1]) or "".
      better: which direction is good.
      note: one plain sentence: what the number says, and what it does not.
    """

    key: str
    label: str
    estimate: Estimate | None
    unit: str = ""
    better: Better = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values (text, numbers, None) under column names."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


class Series(NamedTuple):
    """One line of a curve: y [n] over the curve's x, with the limits of its interval where it has one."""

    name: str
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Curve:
    """Lines over one x axis."""

    title: str
    x_label: str
    x: list[float]
    series: list[Series]


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
      probe: its name in `probes.registry`.
      title: its name for a reader.
      space: where distances were measured: "pixels", or the name of a feature space.
      rows: the numbers, most important first.
      tables: such as the numbers per class.
      curves: such as rates over thresholds.
      arrays: per generation or per image; their meaning is in the probe's docstring.
      notes: what these numbers cannot say, one sentence each.
      config: the settings that were used.
    """

    probe: str
    title: str
    space: str
    rows: list[Measure]
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Measure:
        """The measure of this key."""
        for row in self.rows:
            if row.key == key:
                return row
        raise KeyError(f"{key}; {self.probe} has {', '.join(row.key for row in self.rows)}")


def save(result: ProbeResult, folder: str | Path) -> Path:
    """Writes `probe_NAME.npz` (where there are arrays), then `probe_NAME.json`; each whole or not at all.

    The JSON is strict: an unknown limit is null. It holds the digest of its npz, so that `load` notices a
    pair that does not belong together.

    Returns:
      The path of the JSON.

    Raises:
      UserError: the folder cannot be written.
    """
    path = locate(folder) / f"probe_{result.probe}.json"
    stamp = None
    try:
        if result.arrays:
            data, stamp = stamped.pack(result.arrays)
            write_atomically(path.with_suffix(".npz"), lambda part: part.write_bytes(data))
        tree = {
            "format": FORMAT,
            "probe": result.probe,
            "title": result.title,
            "space": result.space,
            "measures": [_measure(row) for row in result.rows],
            "tables": [asdict(table) for table in result.tables],
            "curves": [
                {**asdict(curve), "series": [line._asdict() for line in curve.series]}
                for curve in result.curves
            ],
            "notes": result.notes,
            "config": result.config,
            "arrays": stamp,
        }
        write_text(path, json.dumps(strict(tree), indent=1, allow_nan=False) + "\n")
        if stamp is None and is_writer():
            path.with_suffix(".npz").unlink(missing_ok=True)  # an earlier result's
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose a folder that can be written") from None
    return path


def load(folder: str | Path, probe: str) -> ProbeResult:
    """The inverse of `save`.

    Raises:
      UserError: no such result there, or its files are damaged or not of one result.
    """
    path = locate(folder) / f"probe_{probe}.json"
    again = "; run the probe again"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run mdiff eval or mdiff audit with --probes {probe}")
    tree = stamped.read_json(path, FORMAT, again)
    try:
        return ProbeResult(
            probe=tree["probe"],
            title=tree["title"],
            space=tree["space"],
            rows=[_row(row) for row in tree["measures"]],
            tables=[Table(**table) for table in tree["tables"]],
            curves=[_curve(curve) for curve in tree["curves"]],
            arrays=_arrays(path.with_suffix(".npz"), tree["arrays"], again),
            notes=tree["notes"],
            config=tree["config"],
        )
    except KeyError as missing:
        raise UserError(f"{path}: its result has no {missing.args[0]!r}{again}") from None
    except TypeError as error:
        raise UserError(f"{path}: {error}{again}") from None


def load_all(folder: str | Path) -> dict[str, ProbeResult]:
    """Every probe's result in a folder, by name; none gives an empty dict."""
    names = sorted(path.stem.removeprefix("probe_") for path in locate(folder).glob("probe_*.json"))
    return {name: load(folder, name) for name in names}


def _measure(row: Measure) -> dict[str, Any]:
    one = row.estimate
    number = dict.fromkeys(("value", "low", "high", "n")) if one is None else asdict(one)
    return {
        "key": row.key,
        "label": row.label,
        **number,
        "unit": row.unit,
        "better": row.better,
        "note": row.note,
    }


def _row(tree: dict[str, Any]) -> Measure:
    estimate = None
    if tree["value"] is not None:
        low, high = _numbers([tree["low"], tree["high"]])
        estimate = Estimate(tree["value"], low, high, tree["n"])
    return Measure(tree["key"], tree["label"], estimate, tree["unit"], tree["better"], tree["note"])


def _curve(tree: dict[str, Any]) -> Curve:
    lines = [
        Series(line["name"], *(_numbers(line[name]) for name in ("y", "low", "high")))
        for line in tree["series"]
    ]
    return Curve(tree["title"], tree["x_label"], tree["x"], lines)


def _numbers(values: list[Any] | None) -> Any:
    return None if values is None else [math.nan if x is None else x for x in values]


def _arrays(path: Path, stamp: str | None, again: str) -> dict[str, np.ndarray]:
    if stamp is None:
        return {}
    if not path.is_file():
        raise UserError(f"{path}: no such file{again}")
    return stamped.read(path, stamp, "its JSON", again)

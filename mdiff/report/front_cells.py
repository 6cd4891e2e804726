"""The cells of a front: read from the files of sweeps and runs, chosen, and refused where they do not compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mdiff.config import Config, from_json
from mdiff.errors import UserError
from mdiff.files import absolute, locate
from mdiff.recipes.cells import get
from mdiff.report import words
from mdiff.report.collect import Run, read_run
from mdiff.types import Estimate

MEASURED, UNFINISHED, NOT_RUN, FAILED = "measured", "unfinished", "not run", "failed"
"""What became of a cell."""

_STATES = {"waiting": NOT_RUN, "training": UNFINISHED, "trained": UNFINISHED, "failed": FAILED}
_QUALITY = ("energy_heldout", "energy_train", "kernel_heldout", "kernel_train")
_MEMORIZED = ("memorized", "excess", "calibrated", "calibrated_excess", "unique")
_SIDES = {"quality": _QUALITY, "memorized": _MEMORIZED}
_SHARES = ("memorized", "calibrated", "unique")
_IMAGES = ("n", "duplicates", "planted_flips", "planted_crops")
"""Fields of `data` by which the cells of one command may differ in images: they have a front each."""
_TREATMENT = ("reading", "flip", "shift", "augment", "degrade", "degrade_by")
"""Fields of `data` that leave the images what they are: part of how a model is trained."""
_FREE_RULES = ("chunk", "bootstrap", "seed", "flips")


@dataclass(frozen=True, eq=False)
class Cell:
    """One training of a front.

    Attributes:
      name: of the cell, with its sweep's where needed.
      folder: of its run.
      fields: its value of each field that its sweep varied.
      config: its whole config.
      state: measured, unfinished, not run or failed.
      reason: why it failed.
      run: its result files; None unless measured.
    """

    name: str
    folder: Path
    fields: dict[str, Any]
    config: Config
    state: str
    reason: str = ""
    run: Run | None = None


@dataclass(frozen=True)
class Measure:
    """One of the two numbers of a point.

    Attributes:
      key: as given: a number of the audit, or PROBE.MEASURE.
      label: its name for a reader.
      kind: "rate" or "distance", how it is shown.
      better: "lower" or "higher".
      limits: between which it lies by its nature.
    """

    key: str
    label: str
    kind: str
    better: str
    limits: tuple[float, float]

    @property
    def sign(self) -> float:
        """What makes the smaller the better."""
        return 1.0 if self.better == "lower" else -1.0

    def of(self, run: Run) -> Estimate | None:
        """The number of one run, if it has it."""
        probe, _, key = self.key.rpartition(".")
        if not probe:
            return run.estimates.get(key)
        found = run.probes.get(probe)
        return next((row.estimate for row in found.rows if row.key == key), None) if found else None


# --------------------------------------------------------------------------------------------- reading


def read_cells(folders: Sequence[Path], select: Mapping[str, Sequence[Any]] | None = None) -> list[Cell]:
    """All cells of sweeps and runs.

    Args:
      folders: of `mdiff sweep`, `mdiff train`, or cells of a sweep.
      select: dotted field -> values: cells with another value are left out.

    Raises:
      UserError: a folder is none of these, cannot be read or is given twice, or no cell is left or measured.
    """
    if not folders:
        raise UserError("FOLDERS: 0 given; give one or more folders of mdiff sweep or mdiff train")
    parts = [(folder, _read_one(folder)) for folder in map(locate, folders)]
    places = [str(absolute(cell.folder)) for _, part in parts for cell in part]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise UserError(f"{twice[0]}: is given twice; give each sweep and each run once")
    cells = _named(parts)
    kept = [
        cell
        for cell in cells
        if all(get(cell.config, field) in values for field, values in (select or {}).items())
    ]
    if not kept:
        raise UserError(
            f"--select: none of the {len(cells)} cells has these values; without --select all are listed"
        )
    if not any(cell.state == MEASURED for cell in kept):
        states = [cell.state for cell in kept]
        said = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        raise UserError(
            f"{folders[0]}: no measured cells ({said}); train and measure them with mdiff sweep, or mdiff eval"
        )
    return kept


def _read_one(folder: Path) -> list[Cell]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one of mdiff sweep or mdiff train")
    if (folder / "sweep.json").is_file():
        return _read_sweep(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no sweep.json or config.json in it; give a folder of mdiff sweep or mdiff train"
        )
    if not (folder / "audit.json").is_file():
        return [Cell(folder.name, folder, {}, _stored(folder / "config.json"), UNFINISHED)]
    return [_measured(folder.name, folder, {})]


def _read_sweep(folder: Path) -> list[Cell]:
    path = folder / "sweep.json"
    found = []
    for name, entry in _entries(path):
        values, place = entry["fields"], folder / "cells" / name
        if entry["state"] == "measured":
            found.append(_measured(name, place, values))
        else:
            cfg = from_json(Config, entry["config"], str(path))
            found.append(Cell(name, place, values, cfg, _STATES[entry["state"]], entry["reason"]))
    return found


def _entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name, fields, state, reason and the JSON of the config of each cell of a `sweep.json`."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for name, entry in tree["cells"].items():
            if entry["state"] not in (*_STATES, "measured"):
                raise ValueError(f"{name} is {entry['state']!r}")
            values, reason = dict(entry["fields"]), str(entry.get("reason", ""))
            whole = _with(tree["base"], values)
            found.append(
                (name, {"fields": values, "state": entry["state"], "reason": reason, "config": whole})
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({error!r}); run the same mdiff sweep again, or give its cells one by one"
        ) from None
    return found


def _with(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's JSON with dotted fields replaced."""
    tree = json.loads(json.dumps(base))
    for field, value in values.items():
        *parents, last = field.split(".")
        part = tree
        for name in parents:
            part = part[name]
        part[last] = value
    return tree


def _measured(name: str, folder: Path, values: dict[str, Any]) -> Cell:
    run = read_run(name, folder)
    if not run.config:
        raise UserError(
            f"{folder}: has an audit but no config.json; a front is made of runs of mdiff train or sweep"
        )
    return Cell(
        name, folder, values, from_json(Config, run.config, str(folder / "config.json")), MEASURED, "", run
    )


def _stored(path: Path) -> Config:
    try:
        return from_json(Config, json.loads(path.read_text(encoding="utf-8"))["config"], str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); restore it, or leave this run out") from None


def _named(parts: Sequence[tuple[Path, list[Cell]]]) -> list[Cell]:
    """All cells; where two sweeps have a cell of one name, all names begin with the sweep's."""
    names = [cell.name for _, part in parts for cell in part]
    if len(set(names)) == len(names):
        return [cell for _, part in parts for cell in part]
    sources = [folder.name for folder, _ in parts]
    whole = len(set(sources)) < len(sources)
    return [
        Cell(
            f"{folder if whole else folder.name}/{cell.name}",
            *(getattr(cell, f.name) for f in fields(Cell)[1:]),
        )
        for folder, part in parts
        for cell in part
    ]


# ---------------------------------------------------------------------------- what may stand on one axis


def images_of(cell: Cell) -> str:
    """What tells the training images of a cell from those of others in a command; cells alike share a front."""
    tree = asdict(cell.config.data)
    return json.dumps({name: tree[name] for name in _IMAGES}, sort_keys=True)


def find_measure(side: str, key: str, cells: Sequence[Cell]) -> Measure:
    """What `--quality` or `--memorized` names.

    Args:
      side: "quality" or "memorized".
      key: a number of the audit, or PROBE.MEASURE.
      cells: some measured.

    Raises:
      UserError: no cell has it, some cells lack it, or it does not say which direction is better.
    """
    measured = [cell for cell in cells if cell.run is not None]
    known = _known(side, measured)
    if key not in known:
        raise UserError(f"--{side} {key}: no cell has it; there are {', '.join(known) or 'none'}")
    found = known[key]
    for cell in measured:
        assert cell.run is not None
        if found.of(cell.run) is None:
            raise UserError(
                f"--{side} {key}: {cell.name} does not have it; measure it there with mdiff eval, or leave it out "
                "with --select"
            )
    return found


def _known(side: str, measured: Sequence[Cell]) -> dict[str, Measure]:
    """Every measure that some cell has and that can be one side of a front."""
    runs = [cell.run for cell in measured if cell.run is not None]
    free = (float("-inf"), float("inf"))
    known = {}
    for name in _SIDES[side]:
        if any(name in run.estimates for run in runs):
            about, share = words.measure(name), (0.0, 1.0) if name in _SHARES else free
            known[name] = Measure(name, about.label, about.kind, "lower", share)
    for run in runs:
        for probe, result in run.probes.items():
            for row in result.rows:
                if row.estimate is not None and row.better and (side == "quality" or row.better == "lower"):
                    kind = "rate" if row.unit == "%" else "distance"
                    known.setdefault(
                        f"{probe}.{row.key}", Measure(f"{probe}.{row.key}", row.label, kind, row.better, free)
                    )
    return known


def check_alike(cells: Sequence[Cell], measures: Sequence[Measure]) -> None:
    """Can these cells share a page, and those of one set of training images a front?

    Raises:
      UserError: other data, held-out images, rules or numbers of generations.
    """
    measured = [cell for cell in cells if cell.run is not None]
    first = measured[0]
    for cell in cells:
        one, two = (_outside(each) for each in (first, cell))
        if name := next((name for name in one if one[name] != two[name]), None):
            raise UserError(
                f"data.{name}: {one[name]!r} in {first.name} and {two[name]!r} in {cell.name}; cells of other data "
                "cannot share one axis of quality: give them a front each, or --select one"
            )
    heldout: dict[str, tuple[Cell, str]] = {}
    for cell in measured:
        before, seen = heldout.setdefault(images_of(cell), (cell, _heldout(cell)))
        if seen != _heldout(cell):
            raise UserError(
                f"{cell.folder}: its held-out images are not those of {before.name}; quality cannot be compared, give "
                "them a front each"
            )
        _check_rules(before, cell, measures)


def _outside(cell: Cell) -> dict[str, Any]:
    """The fields of `data` in which all cells must agree."""
    tree = asdict(cell.config.data)
    return {name: value for name, value in tree.items() if name not in _IMAGES + _TREATMENT}


def _heldout(cell: Cell) -> str:
    """What the held-out images are: of a run all of them, of an audit alone those it used."""
    assert cell.run is not None
    stored = (cell.run.subset.get("heldout") or {}).get("sha256")
    return str(stored or (cell.run.audit.get("digests") or {}).get("heldout", ""))


def _check_rules(first: Cell, cell: Cell, measures: Sequence[Measure]) -> None:
    assert first.run is not None and cell.run is not None
    one, two = (each.run.audit.get("config") or {} for each in (first, cell) if each.run)
    for name in one:
        if name not in _FREE_RULES and one[name] != two.get(name):
            raise UserError(
                f"audit.{name}: {one[name]} in {first.name} and {two.get(name)} in {cell.name}; measure both with one "
                "value (mdiff eval)"
            )
    for measure in measures:
        a, b = measure.of(first.run), measure.of(cell.run)
        assert a is not None and b is not None
        if a.n != b.n and measure.key != "unique":
            raise UserError(
                f"{measure.key}: of {a.n} generations in {first.name} and of {b.n} in {cell.name}; points of other "
                "numbers cannot share a front: sample equally many (mdiff eval), or --select"
            )

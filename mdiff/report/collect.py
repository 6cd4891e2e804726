"""Read a run folder's result files into one frozen `Run`, and nothing else.

Only `audit.json` must be there. Any other file may be missing, and what it would have told is then left
out: nothing is computed twice here, and nothing is guessed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mdiff.errors import UserError
from mdiff.files import locate, strict
from mdiff.probes import records, verdicts
from mdiff.probes.records import ProbeResult
from mdiff.probes.results import FORMAT
from mdiff.train import metrics, stopping
from mdiff.types import Estimate

MEMORIZATION = ("memorized", "control", "excess")


@dataclass(frozen=True)
class Run:
    """What one run folder says.

    Attributes:
      name: how the report calls it.
      folder: where it was read from.
      audit: `audit.json`, whole.
      estimates: its numbers by name.
      arrays: `audit.npz` (empty when there is none).
      record: `config.json`: config, digest, versions (empty when there is none).
      subset: `subset.json`: ids and sha256 of the images (empty when there is none).
      losses: rows {"step", "loss"} of `metrics.jsonl`, one per step, by step.
      points: rows {"step", "memorized", "memorized_low", …} measured while training, by step.
      ledger: `ledger.json` (empty when there is none).
      evaluation: `evaluation.json`: step sampled, how, versions (empty when there is none).
      probes: every `probe_NAME.json`, by name.
      early: `stopped.json`: why training ended early (empty when it did not).
    """

    name: str
    folder: Path
    audit: dict[str, Any]
    estimates: dict[str, Estimate]
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]
    subset: dict[str, Any]
    losses: list[dict[str, Any]]
    points: list[dict[str, Any]]
    ledger: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, ProbeResult] = field(default_factory=dict)
    early: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The training config, or {}."""
        return self.record.get("config") or {}

    def setting(self, path: str) -> Any:
        """A field of the training config by dotted name, or None."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def rule(self, name: str) -> float | None:
        """A field of the audit's own config, such as `ratio` or `confidence`, or None."""
        value = (self.audit.get("config") or {}).get(name)
        return float(value) if isinstance(value, int | float) else None

    @property
    def steps(self) -> int | None:
        """The step the generations come from; without a record of it the last step logged or configured."""
        if self.evaluation.get("step") is not None:
            return self.evaluation["step"]
        return self.losses[-1]["step"] if self.losses else self.setting("train.steps")

    @property
    def quality(self) -> tuple[Estimate, str, Estimate | None] | None:
        """(energy distance, what it is measured to, the floor), to held-out images when there are any."""
        floor = self.estimates.get("energy_floor")
        for reference in ("heldout", "train"):
            if (found := self.estimates.get(f"energy_{reference}")) is not None:
                return found, {"heldout": "held-out", "train": "train"}[reference], floor
        return None


def read_run(name: str, folder: Path) -> Run:
    """Read one run folder.

    Args:
      name: how the report calls the run.
      folder: a run's or an audit's folder.

    Raises:
      UserError: no such folder, no `audit.json` in it, or a file in it that cannot be read.
    """
    folder = locate(folder)
    remedy = f"make it with `mdiff eval --workdir {folder} --probes audit`"
    if not folder.is_dir():
        raise UserError(f"run {name!r}: {folder} is not a folder; give the --workdir of a training run")
    if not (folder / "audit.json").is_file():
        raise UserError(f"run {name!r}: {folder} has no audit.json; {remedy}")
    audit = _read_json(folder / "audit.json", remedy)
    if (found := audit.get("format", FORMAT)) != FORMAT:
        raise UserError(f"{folder / 'audit.json'}: format {found}, this version reads {FORMAT}; {remedy}")
    entries = audit.get("estimates")
    if not isinstance(entries, Mapping) or entries.get("memorized") is None:
        raise UserError(f"{folder / 'audit.json'}: no estimate 'memorized'; {remedy}")
    losses, points = _read_metrics(folder / "metrics.jsonl")
    arrays = _read_arrays(folder / "audit.npz", audit.get("arrays"), remedy)
    probes = records.load_all(folder)
    if "verdicts" in probes and not verdicts.belongs(probes["verdicts"], audit.get("digests") or {}, arrays):
        del probes["verdicts"]
        left_out = "the human verdicts here are about an earlier audit and left out: judge this one"
        audit["notes"] = [*(audit.get("notes") or []), left_out]
    return Run(
        name=name,
        folder=folder,
        audit=audit,
        estimates={k: found for k, v in entries.items() if (found := _estimate(folder, k, v, remedy))},
        arrays=arrays,
        record=_read_json(folder / "config.json"),
        subset=_read_json(folder / "subset.json"),
        losses=losses,
        points=points,
        ledger=_read_json(folder / "ledger.json"),
        evaluation=_read_json(folder / "evaluation.json"),
        probes=probes,
        early=_early(folder),
    )


def _early(folder: Path) -> dict[str, Any]:
    found = stopping.read(folder)
    return {} if found is None else {**asdict(found), "text": str(found)}


def as_json(run: Run) -> dict[str, Any]:
    """What `report.json` holds for one run."""
    quality, reference, floor = run.quality or (None, None, None)
    estimates = {name: _plain(value) for name, value in run.estimates.items()}
    points = [
        {"step": row["step"]} | {key: row[key] for key in row if key != "step" and row[key] is not None}
        for row in run.points
    ]
    return {
        **{name: estimates.pop(name, None) for name in MEMORIZATION},
        "quality": None if quality is None else _plain(quality) | {"floor": floor.value if floor else None},
        "quality_reference": reference,
        "estimates": estimates,
        "counts": run.audit.get("counts"),
        "percentiles": run.audit.get("percentiles"),
        "feature": run.audit.get("feature"),
        "notes": run.audit.get("notes") or [],
        "probes": {name: probe_json(found) for name, found in run.probes.items()},
        "digest": run.record.get("digest"),
        "config": {
            "source": run.setting("data.source"),
            "size": run.setting("data.size"),
            "n": run.setting("data.n"),
            "parameters": run.record.get("parameters", run.ledger.get("parameters")),
            "steps": run.setting("train.steps"),
            "step": run.steps,
            "cutoff": run.setting("loss.cutoff"),
        },
        "versions": run.record.get("versions") or {},
        "sha256": hashes(run.subset),
        "digests": run.audit.get("digests") or {},
        "stopped": {k: v for k, v in run.early.items() if k != "text"} or None,
        "ledger": run.ledger or None,
        "folder": str(run.folder),
        "curve": sorted(
            run.losses + points,
            key=lambda row: row["step"],
        ),
    }


def probe_json(found: ProbeResult) -> dict[str, Any]:
    """A probe's result as its file has it, without what only says how it is stored."""
    absent = dict.fromkeys(("value", "low", "high", "n"))
    return {
        "title": found.title,
        "space": found.space,
        "measures": [
            {"key": row.key, "label": row.label}
            | (absent if row.estimate is None else _plain(row.estimate))
            | {"unit": row.unit, "better": row.better, "note": row.note}
            for row in found.rows
        ],
        "tables": [asdict(table) for table in found.tables],
        "curves": [
            {"title": curve.title, "x_label": curve.x_label, "x": curve.x}
            | {"series": [line._asdict() for line in curve.series]}
            for curve in found.curves
        ],
        "notes": found.notes,
        "config": found.config,
    }


def hashes(subset: Mapping[str, Any]) -> dict[str, str]:
    """Every sha256 in `subset.json`, by the dotted name it stands under."""
    found: dict[str, str] = {}

    def walk(tree: Any, path: str) -> None:
        if isinstance(tree, Mapping):
            for name, value in tree.items():
                walk(value, f"{path}.{name}" if path else str(name))
        elif isinstance(tree, str) and "sha256" in path:
            found[path] = tree

    walk(subset, "")
    return found


def _plain(value: Estimate) -> dict[str, Any]:
    return {"value": value.value, "low": value.low, "high": value.high, "n": value.n}


def _estimate(folder: Path, name: str, entry: Any, remedy: str) -> Estimate | None:
    """One number; None when it was not measured. A limit that is null in the file is NaN."""
    if entry is None or (
        isinstance(entry, Mapping) and entry.get("value", "") is None and name != "memorized"
    ):
        return None
    if isinstance(entry, Mapping) and {"value", "low", "high", "n"} <= set(entry):
        numbers = [entry["value"], entry["n"]]
        # The rule's own rate always has an interval; a bootstrap of very few rows may have none.
        optional = [x for x in (entry["low"], entry["high"]) if x is not None or name == "memorized"]
        if all(_is_number(x) for x in numbers + optional):
            low, high = (math.nan if entry[x] is None else float(entry[x]) for x in ("low", "high"))
            return Estimate(float(entry["value"]), low, high, int(entry["n"]))
    raise UserError(f"{folder / 'audit.json'}: estimates.{name} is not value, low, high and n; {remedy}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_json(path: Path, remedy: str = "delete it or restore it") -> dict[str, Any]:
    """The object in `path`, NaN as None; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); {remedy}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__} where an object is needed; {remedy}")
    return tree


def _read_arrays(path: Path, stamp: str | None, remedy: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        if stamp is not None:
            raise UserError(f"{path}: is missing; {remedy}")
        return {}
    try:
        content = path.read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); {remedy}") from None
    if stamp is not None and hashlib.sha256(content).hexdigest() != stamp:
        raise UserError(f"{path}: is not the one audit.json was saved with; {remedy}")
    for kind in ("top", "random"):
        shown = [f"{kind}_{part}" for part in ("generated", "nearest", "index")]
        if not all(name in arrays for name in shown):
            continue
        left, right, index = (arrays[name] for name in shown)
        fits = left.ndim == 4 and left.shape == right.shape and index.shape == left.shape[:1]
        if not fits or left.dtype != np.uint8 or right.dtype != np.uint8 or left.shape[3] not in (1, 3):
            raise UserError(
                f"{path}: {kind}_generated is {left.dtype}{left.shape}, not uint8 K,H,W,C; {remedy}"
            )
    return arrays


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(loss rows, measurement rows). A later row of a step replaces an earlier one, as a resumed run does."""
    try:
        rows = metrics.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); delete the broken line") from None
    losses: dict[int, dict[str, Any]] = {}
    points: dict[int, dict[str, Any]] = {}
    for row in map(strict, rows):
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            continue
        step = int(row["step"])
        if "loss" in row:
            losses[step] = {"step": step, "loss": row["loss"]}
        if _is_number(row.get("eval/memorized")):
            measured = {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
            points[step] = {"step": step, **measured}
    return [losses[step] for step in sorted(losses)], [points[step] for step in sorted(points)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

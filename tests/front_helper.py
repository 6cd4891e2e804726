"""Sweeps as they lie on disk after training, made without training: real files, numbers as asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mdiff import config
from mdiff.probes import audit as audits
from mdiff.probes import intervals, records, results
from mdiff.recipes import cells
from mdiff.train import workdir
from mdiff.train.ledger import Ledger
from mdiff.types import Estimate

GENERATIONS = 40
BASE = config.Config(
    name="tiny",
    data=config.Data(source="digits", size=8, n=24, heldout=24),
    train=config.Train(steps=300, eval_every=100, eval_samples=32),
    sample=config.Sample(n=GENERATIONS, batch=GENERATIONS),
)

Numbers = Callable[[config.Config], tuple[float, float]]
"""(memorized share, energy distance) of a cell."""


@functools.cache
def audited(generations: int = GENERATIONS) -> results.AuditResult:
    """A real audit of small images: a third of the generations are training images."""
    rng = np.random.default_rng(0)
    known, other = (rng.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8) for _ in range(2))
    made = rng.integers(0, 256, (generations, 8, 8, 1), dtype=np.uint8)
    made[: generations // 3] = known[: generations // 3] if generations // 3 <= 24 else known[0]
    return audits.audit(made, known, other, config.Audit(bootstrap=20))


def write_cell(
    folder: Path,
    cfg: config.Config,
    memorized: float,
    energy: float,
    *,
    along: Mapping[int, tuple[float, float]] | None = None,
    generations: int = GENERATIONS,
    heldout: str = "same",
    width: float = 0.01,
) -> None:
    """One run's files: config, audit, metrics, subset, ledger, evaluation."""
    hits = round(memorized * generations)
    found = audited(generations)
    estimates = found.estimates | {
        "memorized": intervals.wilson(hits, generations),
        "energy_heldout": Estimate(energy, energy - width, energy + width, generations),
    }
    rules = replace(cfg.audit, bootstrap=20)
    results.save(replace(found, estimates=estimates, config=rules), folder)
    workdir.write(folder, cfg, (8, 8, 1), 100)
    rows: list[dict[str, float]] = [{"step": 100, "loss": 1.0}]
    for step, (share, distance) in (along or {}).items():
        n = cfg.train.eval_samples
        one = intervals.wilson(round(share * n), n)
        rows.append(
            {"step": step, "eval/memorized": one.value, "eval/memorized_low": one.low}
            | {"eval/memorized_high": one.high, "eval/quality": distance, "eval/n": float(n)}
            | {"eval/quality_low": distance - width, "eval/quality_high": distance + width}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "subset.json").write_text(json.dumps({"heldout": {"ids": [1], "sha256": heldout}}))
    Ledger({"train": 4.0, "compile": 1.5}).save(folder / "ledger.json")
    (folder / "evaluation.json").write_text(json.dumps({"step": cfg.train.steps}))


def write_sweep(
    folder: Path,
    axes: Mapping[str, Sequence[Any]],
    numbers: Numbers,
    *,
    base: config.Config = BASE,
    states: Mapping[str, str] | None = None,
    along: Callable[[config.Config], Mapping[int, tuple[float, float]]] | None = None,
    **more: Any,
) -> list[str]:
    """A sweep whose cells have the numbers given; `states` names cells that are not measured."""
    folder.mkdir(parents=True)
    record = cells.Record(folder / "sweep.json", base, {name: tuple(values) for name, values in axes.items()})
    for cell in record.asked:
        state = (states or {}).get(cell.name, "measured")
        if state == "measured":
            memorized, energy = numbers(cell.config)
            course = along(cell.config) if along else None
            write_cell(folder / "cells" / cell.name, cell.config, memorized, energy, along=course, **more)
        reason = "loss.share = 0.5: needs a loss.cutoff above 0" if state == "failed" else None
        record.set(cell.name, state=state, step=cell.config.train.steps, reason=reason)
    return [cell.name for cell in record.asked]


def add_probe(
    folder: Path, name: str, key: str, value: float, better: records.Better, n: int = GENERATIONS
) -> None:
    """A probe's result beside a cell's audit."""
    row = records.Measure(key, key.capitalize(), Estimate(value, value - 0.05, value + 0.05, n), "", better)
    records.save(records.ProbeResult(name, name.capitalize(), "pixels", [row]), folder)

"""What a sweep is going to do, before anything is written."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax

from mdiff import config, processes
from mdiff.errors import UserError
from mdiff.recipes import experiment
from mdiff.recipes.cells import Axes, Cell, Record
from mdiff.train import mesh

Mode: TypeAlias = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Plan:
    """A sweep that may begin: nothing is written yet.

    Attributes:
      folder: of the sweep.
      cells: in order.
      made: the experiment of each cell that can be one.
      problems: what is wrong with each of the others, as one line.
      record: how they fare so far.
    """

    folder: Path
    cells: list[Cell]
    made: dict[str, experiment.Experiment]
    problems: dict[str, str]
    record: Record

    def where(self, name: str) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / name


def plan(base: config.Config, axes: Axes, folder: Path, mode: Mode = "auto") -> Plan:
    """Make every cell's experiment, so that mistakes surface before any training.

    Args:
      base: the config that the cells share.
      axes: the varied fields and their values (`cells.parse_over`).
      folder: of the sweep.
      mode: train side by side or not.

    Raises:
      UserError: no cell can be an experiment, the folder holds another sweep, or there is but one device.
    """
    if mode == "yes" and len(jax.devices()) == 1:
        raise UserError("--side-by-side yes: there is 1 device; leave it at auto, or give more devices")
    if mode == "yes" and base.mesh.fsdp != 1:
        raise UserError(
            f"--side-by-side yes: mesh.fsdp = {base.mesh.fsdp} splits each cell over devices; set it to 1"
        )
    record = Record(folder / "sweep.json", base, axes)
    made: dict[str, experiment.Experiment] = {}
    problems: dict[str, str] = {}
    subsets: dict[str, Any] = {}
    for cell in record.asked:
        try:
            found = processes.together(lambda cfg=cell.config: _prepare(cfg, mode))  # type: ignore[misc]
        except UserError as error:
            problems[cell.name] = str(error)
            continue
        # Labels may depend on their number (`mdiff.data.labels`), so it is part of what the images are.
        data = json.dumps([config.to_json(cell.config.data), cell.config.net.classes])
        made[cell.name] = replace(found, subset=subsets.setdefault(data, found.subset))  # held once
    if not made:
        raise UserError(next(iter(problems.values())))
    return Plan(folder, record.asked, made, problems, record)


def _prepare(cfg: config.Config, mode: Mode) -> experiment.Experiment:
    made = experiment.prepare(cfg)
    if mode == "no" or len(jax.devices()) == 1:
        mesh.check_batch(cfg.train.batch, mesh.make_mesh(cfg.mesh), cfg.train.accumulate)
    return made

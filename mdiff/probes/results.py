"""An audit's result: in memory, and on disk as `audit.json` with `audit.npz` beside it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mdiff
from mdiff.config import Audit, from_json, to_json
from mdiff.errors import UserError
from mdiff.files import locate, strict, write_atomically, write_text
from mdiff.probes import stamped
from mdiff.types import Estimate

FORMAT = 1
"""Of `audit.json`; raised when a field changes its meaning."""

_COLUMNS = (
    "nearest_id",
    "nearest_index",
    "flipped",
    "d1",
    "d2",
    "ratio",
    "memorized",
    "calibrated",
    "calibrated_copy",
    "cosine",
    "cosine_id",
    "cosine_index",
)
_PICTURES = tuple(f"{a}_{b}" for a in ("top", "random") for b in ("index", "generated", "nearest"))
_IDS = {"ids": "train_ids", "control_ids": "heldout_ids"}


@dataclass(frozen=True)
class AuditResult:
    """What `audit` found. Distances are RMS per pixel on [0, 1]; `control_…` is against held-out images.

    Attributes:
      rows: arrays [Q], one entry per generation: nearest_id, nearest_index, flipped, d1, d2, ratio,
        memorized, calibrated, calibrated_copy, cosine, cosine_id, cosine_index, and the same with the
        prefix `control_`. Indices are into the set as given.
      estimates: memorized, control, excess (memorized - control, paired), calibrated, calibrated_control,
        calibrated_excess, unique (different training images with a memorized generation, over all
        different training images), energy_train, energy_heldout, energy_floor (train against held-out),
        kernel_train, kernel_heldout, kernel_floor. None where there is no held-out set.
      curves: `curves[space][side]` with space "cosine" or "rms" (distance) and side "train" or
        "heldout": the lists of `similarity.ams_ums`.
      percentiles: `percentiles[what][side]` at the levels `percentiles["level"]["all"]`, with what "d1",
        "ratio" or "cosine"; d1 also has "background": held-out images to their nearest training image.
      counts: denominators: generated, train, train_clusters, neighbours (used), heldout (used),
        heldout_given, heldout_clusters, unique, quality_generated.
      notes: what these numbers cannot say, one sentence each.
      config: the rules.
      feature: name of the space of cosine, energy and kernel.
      hits: int [R], memorized generations of each training image.
      ids: `ids` [R] of the training images and `control_ids` of the held-out ones used.
      digests: of the pixels of `train` and `heldout`.
      draws: bootstrap draws [B] of the energy and kernel distances, for joint intervals.
      pictures: uint8 top_generated, top_nearest (mirrored where the match is), top_index (smallest ratio
        first), and the same random_….
    """

    rows: dict[str, np.ndarray]
    estimates: dict[str, Estimate | None]
    curves: dict[str, dict[str, dict[str, list[float]]]]
    percentiles: dict[str, dict[str, list[float]]]
    counts: dict[str, int | None]
    notes: list[str]
    config: Audit
    feature: str
    hits: np.ndarray
    ids: dict[str, np.ndarray]
    digests: dict[str, str]
    draws: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]


def save(result: AuditResult, folder: str | Path) -> None:
    """Writes `audit.npz` (arrays) and `audit.json` (everything small); each whole or not at all.

    The JSON is strict (a NaN limit is null) and holds the digest of its npz, so that `load` notices a pair
    that does not belong together. Arrays: the rows by name,
    hits, train_ids, heldout_ids, the pictures by name, and `draws_NAME`.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = locate(folder)
    arrays: dict[str, Any] = {**result.rows, "hits": result.hits, **result.pictures}
    arrays |= {_IDS[name]: values for name, values in result.ids.items()}
    arrays |= {f"draws_{name}": values for name, values in result.draws.items()}
    data, stamp = stamped.pack(arrays)
    tree = {
        "format": FORMAT,
        "version": mdiff.__version__,
        "arrays": stamp,
        "estimates": {name: value and asdict(value) for name, value in result.estimates.items()},
        "counts": result.counts,
        "notes": result.notes,
        "feature": result.feature,
        "digests": result.digests,
        "config": to_json(result.config),
        "percentiles": result.percentiles,
        "curves": result.curves,
    }
    text = json.dumps(strict(tree), indent=1, allow_nan=False)
    try:
        write_atomically(folder / "audit.npz", lambda part: part.write_bytes(data))
        write_text(folder / "audit.json", text)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose a folder that can be written") from None


def load(folder: str | Path) -> AuditResult:
    """The inverse of `save`.

    Raises:
      UserError: no audit there, or its files are damaged or not of one audit.
    """
    folder = locate(folder)
    for name in ("audit.json", "audit.npz"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; run the audit first")
    again = "; run the audit again"
    try:
        tree = json.loads((folder / "audit.json").read_text())
    except ValueError:
        raise UserError(f"{folder / 'audit.json'}: not JSON{again}") from None
    if tree.get("format") != FORMAT:
        found = tree.get("format")
        raise UserError(f"{folder / 'audit.json'}: format {found}, this version reads {FORMAT}{again}")
    arrays = stamped.read(folder / "audit.npz", tree.get("arrays"), "its audit.json", again)
    columns = [prefix + name for prefix in ("", "control_") for name in _COLUMNS]
    try:
        return AuditResult(
            rows={name: arrays[name] for name in columns if name in arrays},
            estimates={
                name: value and Estimate(**_numbers(value)) for name, value in tree["estimates"].items()
            },
            curves=tree["curves"],
            percentiles=tree["percentiles"],
            counts=tree["counts"],
            notes=tree["notes"],
            config=from_json(Audit, tree["config"], "audit"),
            feature=tree["feature"],
            hits=arrays["hits"],
            ids={name: arrays[stored] for name, stored in _IDS.items() if stored in arrays},
            digests=tree["digests"],
            draws={name[6:]: values for name, values in arrays.items() if name.startswith("draws_")},
            pictures={name: arrays[name] for name in _PICTURES},
        )
    except KeyError as missing:
        raise UserError(f"{folder / 'audit.json'}: its audit has no {missing.args[0]!r}{again}") from None


def _numbers(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in tree.items()}

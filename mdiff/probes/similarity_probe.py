"""The similarity probe: how near generations come to training images, by four measures that err differently.

Worst-tile L2 does not count a shared background; SSIM and MS-SSIM compare structure; the perceptual hash survives
recompression and small changes. Each is taken to the nearest training and to the nearest held-out image. The
threshold of each is set on held-out images, so that at most 1 % of the generations are nearer than it to one they
cannot have copied; the excess over that is what copying explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mdiff.config import Audit, to_json
from mdiff.features.pixel import flatten
from mdiff.probes import hashing, intervals, quality, sets, structure, tiles
from mdiff.probes.neighbours import nearest_with_flips
from mdiff.probes.records import Curve, Measure, ProbeResult, Series, Table
from mdiff.probes.sets import Progress, Side

FALSE_ALARMS = 0.01
"""Share of generations that may pass against held-out images."""
CANDIDATES = 10
"""Nearest images by L2 among which SSIM and MS-SSIM look for the best."""
LEVELS = (1, 5, 25, 50, 75, 95, 99)
"""Percentiles in the table."""


@dataclass(frozen=True)
class _Kind:
    key: str
    label: str
    unit: str
    sign: int  # 1: a distance; -1: a similarity
    grid: np.ndarray  # thresholds of the curve
    note: str


_KINDS = (
    _Kind(
        "tile",
        "worst-tile L2",
        "RMS",
        1,
        np.round(np.arange(1, 61) / 100, 2),
        "the largest distance over tiles is below it, so that every part of the image agrees",
    ),
    _Kind(
        "ssim",
        "SSIM",
        "",
        -1,
        np.round(np.arange(0, 101, 2) / 100, 2),
        f"local structure agrees; looked for among the {CANDIDATES} images nearest by L2 only",
    ),
    _Kind(
        "ms_ssim",
        "MS-SSIM",
        "",
        -1,
        np.round(np.arange(0, 101, 2) / 100, 2),
        f"structure agrees at several scales; looked for among the {CANDIDATES} images nearest by L2 only",
    ),
    _Kind(
        "phash",
        "perceptual hash",
        "bits",
        1,
        np.arange(0, 33).astype(float),
        "few of 64 bits differ, which survives recompression but is coarse: unrelated images can be near",
    ),
)


def threshold(control: np.ndarray, sign: int, share: float = FALSE_ALARMS) -> float:
    """The threshold that at most this share of the control passes, strictly.

    Args:
      control: [Q] values against held-out images.
      sign: 1 for distances (a value passes below the threshold), -1 for similarities (above).
      share: of the control; with fewer than 1 / share values none passes.
    """
    return float(sign * np.sort(sign * np.asarray(control, np.float64))[int(share * len(control))])


def run(
    generated: np.ndarray,
    train: np.ndarray,
    heldout: np.ndarray | None,
    config: Audit,
    *,
    train_ids: np.ndarray | None = None,
    heldout_ids: np.ndarray | None = None,
    labels: dict[str, np.ndarray] | None = None,
    progress: Progress | None = None,
) -> ProbeResult:
    """Measures how near generations come to training images.

    Args:
      generated: [Q,H,W,C] uint8, or float in [-1, 1].
      train: [R,H,W,C].
      heldout: [S,H,W,C] or None: thresholds, control and excess are then absent.
      config: `flips`, `confidence`, `chunk` and `seed` are used.
      train_ids: int [R].
      heldout_ids: int [S].
      labels: not used.
      progress: called before each stage and at the end.

    Returns:
      Per measure the share of generations past the threshold, its control and the excess. Arrays [Q], for each
      kind of `tile`, `ssim`, `ms_ssim` and `phash`: KIND_train and KIND_heldout (the value), KIND_train_id and
      KIND_heldout_id (of the image that has it), KIND_copy (past the threshold).

    Raises:
      UserError: bad images or settings, see `sets.read`.
    """
    given = sets.read(generated, train, heldout, config, train_ids, heldout_ids)
    report = progress or (lambda what, done, total: None)
    kinds = [k for k in _KINDS if k.key != "ms_ssim" or structure.scales(given.generated.shape) > 1]
    stages = 2 * len(given.sides) + (given.heldout is not None)
    arrays: dict[str, np.ndarray] = {}
    for i, side in enumerate(given.sides.values()):
        report(f"{side.name}: tiles and hashes", 2 * i, stages)
        found = _tiles(given.generated, side, config) | _hashes(given.generated, side)
        report(f"{side.name}: structure", 2 * i + 1, stages)
        found |= _structure(given.generated, side, config)
        for kind in kinds:
            value, index = found[kind.key]
            arrays[f"{kind.key}_{side.name}"] = value
            arrays[f"{kind.key}_{side.name}_id"] = side.ids[index]
    background: dict[str, np.ndarray] = {}
    if given.heldout is not None:
        report("held-out against training", stages - 1, stages)
        held = quality.thinned(given.heldout.images, config.seed)
        found = _tiles(held, given.train, config) | _hashes(held, given.train)
        found |= _structure(held, given.train, config)
        background = {kind.key: found[kind.key][0] for kind in kinds}

    rows: list[Measure] = []
    limits: list[list[object]] = []
    for kind in kinds:
        rows += _measures(kind, arrays, config, limits)
    tile = arrays["tile_train"]
    rows.append(
        Measure(
            "tile_paper",
            f"worst-tile L2 at most {tiles.COPY}",
            intervals.wilson(int((tile <= tiles.COPY).sum()), len(tile), config.confidence),
            "%",
            "lower",
            "the paper's fixed threshold, made for 512 x 512 images; flat or dark images pass it unrelated",
        )
    )
    tables = [_percentiles(kinds, arrays, background)]
    if limits:
        tables.append(Table("Thresholds", ["measure", "threshold", "unit", "false alarms"], limits))
    report("done", stages, stages)
    return ProbeResult(
        probe="similarity",
        title="Similarity to training images",
        space="pixels",
        rows=rows,
        tables=tables,
        curves=[_curve(kind, arrays, config) for kind in kinds],
        arrays=arrays,
        notes=given.notes + _notes(given, kinds),
        config=to_json(config) | {"false_alarms": FALSE_ALARMS, "candidates": CANDIDATES},
    )


Found = dict[str, tuple[np.ndarray, np.ndarray]]


def _tiles(queries: np.ndarray, side: Side, config: Audit) -> Found:
    near = tiles.nearest_tiles(queries, side.images, flips=config.flips, chunk=config.chunk)
    return {"tile": (near.dist[:, 0], near.index[:, 0])}


def _hashes(queries: np.ndarray, side: Side) -> Found:
    mirrored = hashing.phash(side.images[:, :, ::-1]) if side.config.flips else None
    found = hashing.nearest_hash(hashing.phash(queries), hashing.phash(side.images), mirrored)
    return {"phash": found}


def _structure(queries: np.ndarray, side: Side, config: Audit) -> Found:
    near = nearest_with_flips(flatten(queries), side.rows, side.mirrored, CANDIDATES, config.chunk)
    best, at = structure.best_of(queries, side.images, near.index, near.flipped)
    return {"ssim": (best.ssim, at.ssim), "ms_ssim": (best.ms_ssim, at.ms_ssim)}


def _measures(
    kind: _Kind, arrays: dict[str, np.ndarray], config: Audit, limits: list[list[object]]
) -> list[Measure]:
    """Share, control and excess of one measure; adds its threshold to `limits` and its verdicts to `arrays`."""
    value, control = arrays[f"{kind.key}_train"], arrays.get(f"{kind.key}_heldout")
    if control is None:
        return [
            Measure(
                f"{kind.key}_excess",
                f"{kind.label}: excess",
                None,
                "%",
                "lower",
                "absent: the threshold is set on held-out images, and there are none",
            )
        ]
    limit, n, level = threshold(control, kind.sign), len(value), config.confidence
    verdict, alarm = kind.sign * value < kind.sign * limit, kind.sign * control < kind.sign * limit
    arrays[f"{kind.key}_copy"] = verdict
    limits.append([kind.label, limit, kind.unit, f"{int(alarm.sum())} of {n}"])
    rule = f"{'below' if kind.sign > 0 else 'above'} {limit:.3g}{' bits' if kind.unit == 'bits' else ''}"
    return [
        Measure(
            f"{kind.key}_excess",
            f"{kind.label}: excess",
            intervals.newcombe(verdict, alarm, level),
            "%",
            "lower",
            f"past the threshold against training less against held-out images; {kind.note}",
        ),
        Measure(
            f"{kind.key}_copies",
            f"{kind.label} {rule}, training",
            intervals.wilson(int(verdict.sum()), n, level),
            "%",
            "lower",
            "generations past the threshold; includes false alarms",
        ),
        Measure(
            f"{kind.key}_control",
            f"{kind.label} {rule}, held-out",
            intervals.wilson(int(alarm.sum()), n, level),
            "%",
            "",
            f"false alarms; the threshold is set so that they are at most {100 * FALSE_ALARMS:.0f} %",
        ),
    ]


def _percentiles(
    kinds: list[_Kind], arrays: dict[str, np.ndarray], background: dict[str, np.ndarray]
) -> Table:
    rows = []
    for kind in kinds:
        for name, values in (
            ("generated to nearest training", arrays[f"{kind.key}_train"]),
            ("generated to nearest held-out", arrays.get(f"{kind.key}_heldout")),
            ("held-out to nearest training", background.get(kind.key)),
        ):
            if values is not None:
                rows.append([kind.label, name, *(float(x) for x in np.percentile(values, LEVELS))])
    return Table("Distributions", ["measure", "pairs", *(f"{p} %" for p in LEVELS)], rows)


def _curve(kind: _Kind, arrays: dict[str, np.ndarray], config: Audit) -> Curve:
    lines = []
    for name, label in (("train", "training"), ("heldout", "held-out")):
        values = arrays.get(f"{kind.key}_{name}")
        if values is None:
            continue
        rates = [
            intervals.wilson(int(np.sum(kind.sign * values <= kind.sign * x)), len(values), config.confidence)
            for x in kind.grid
        ]
        lines.append(Series(label, *([getattr(r, end) for r in rates] for end in ("value", "low", "high"))))
    word = {"tile": "RMS per pixel", "phash": "different bits"}.get(kind.key, kind.label)
    rule = "at most" if kind.sign > 0 else "at least"
    return Curve(
        f"Generations within a threshold: {kind.label}", f"{rule} ({word})", kind.grid.tolist(), lines
    )


def _notes(given: sets.Sets, kinds: list[_Kind]) -> list[str]:
    n, shape = len(given.generated), given.generated.shape
    parts, size = tiles.grid(shape), structure.window(shape)
    notes = [
        f"worst tile of {parts} x {parts}",
        f"SSIM is looked for among the {min(CANDIDATES, len(given.train.images))} training (and as many held-out) "
        "images nearest by L2: a better one farther away is missed",
    ]
    if size < structure.WINDOW:
        notes.append(f"SSIM's window is {size} pixels instead of {structure.WINDOW}: the images are small")
    if len(kinds) < len(_KINDS):
        notes.append("MS-SSIM is absent: at this size there is room for one scale only, where it is SSIM")
    else:
        notes.append(f"MS-SSIM uses {structure.scales(shape)} of {len(structure.EXPONENTS)} scales")
    if given.heldout is None:
        return [*notes, "no held-out images: how often a measure fires by chance is unknown"]
    notes.append(
        "thresholds are set on the same held-out comparisons that the control counts, so the control is at "
        f"most {100 * FALSE_ALARMS:.0f} % by construction, and without any copying the excess is about 1/{n} above 0"
    )
    needed = math.ceil(1 / FALSE_ALARMS)
    if n < needed:
        notes.append(
            f"{n} generations allow no false alarm: the threshold is the nearest held-out comparison; "
            f"give at least {needed}"
        )
    held, count = len(given.heldout.images), len(given.train.images)
    if held < count:
        notes.append(
            f"{held} held-out images against {count} training images: nearest held-out images are farther for "
            "that alone, thresholds are lenient and the excess is too high"
        )
    return notes

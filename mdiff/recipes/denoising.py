"""What trained denoisers answer at each noise level, side by side (arXiv 2502.21278, figure 3).

All runs get the same noisy images x0 + sigma n, whatever their noise law: images of one source that none of them was
trained on, and images that all of them were trained on. Where the training sets share too few, each run gets its own.
By noise level and run:

    error        mean over pixels of (D(x_t, sigma) - x0)^2, on images trained on and held out, and their ratio, the gap
    sharpness    total variation and share of high frequencies of D(x_t, sigma), over those of the images themselves

The noise belongs to the image (`probes.gap.fixed_noise`), so another run, or one more, changes no number of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdiff import config
from mdiff.data import source
from mdiff.data.source import Images
from mdiff.data.stream import permutation
from mdiff.errors import UserError
from mdiff.files import locate
from mdiff.probes import gap as gaps
from mdiff.probes import sharpness
from mdiff.probes.gap import Gap
from mdiff.recipes import answers
from mdiff.recipes.answers import Rows
from mdiff.recipes.runs import Experiment, load_params, reopen
from mdiff.train import loop
from mdiff.types import Estimate, to_float

LOWEST, HIGHEST, COUNT = 0.02, 80.0, 12
"""Range and number of the noise levels when none are given; the range is cut to that of the runs."""
_DATA = ("source", "split", "size")


@dataclass(frozen=True)
class Settings:
    """How denoisers are compared.

    Attributes:
      levels: noise levels (EDM's sigma); none: 12 levels from 0.02 to 80, even in their logarithm.
      draws: of noise per image and level.
      n: images of each side, at most.
      shown: images in the picture.
      seed: of the choice of images and of their noise.
      confidence: level of the intervals.
    """

    levels: tuple[float, ...] = ()
    draws: int = 4
    n: int = 256
    shown: int = 8
    seed: int = 0
    confidence: float = 0.95


@dataclass(frozen=True)
class Side:
    """What a denoiser answers on one set of images, one entry per noise level.

    Attributes:
      error: mean squared error.
      over_first: that error over the first run's on the same images, paired; None where the images differ.
      variation: total variation over that of the clean images.
      high: share of high frequencies over that of the clean images.
    """

    error: list[Estimate]
    over_first: list[Estimate] | None
    variation: list[Estimate]
    high: list[Estimate]


@dataclass(frozen=True)
class Denoised:
    """One run's answers.

    Attributes:
      name: how the comparison calls the run.
      folder: where it is.
      config: its configuration.
      step: of its checkpoint.
      gap: held-out over training error by noise level.
      train: on images it was trained on.
      heldout: on images that no run was trained on.
      ids: of the images of `train`.
      pictures: float32 [L,K,H,W,C], its answers to the shown images.
    """

    name: str
    folder: Path
    config: config.Config
    step: int
    gap: Gap
    train: Side
    heldout: Side
    ids: np.ndarray
    pictures: np.ndarray


@dataclass(frozen=True)
class Denoising:
    """The comparison.

    Attributes:
      settings: how it was made, with the levels used.
      runs: one per run, in the order given.
      heldout: ids of the images that no run was trained on.
      shared: were all runs trained on the images of their `train`?
      variation: mean total variation of the clean held-out images.
      high: their share of high frequencies.
      clean: float32 [K,H,W,C], the shown images.
      noisy: float32 [L,K,H,W,C], the same with noise, x0 + sigma n.
      trained: bool [K], which of them all runs were trained on.
    """

    settings: Settings
    runs: list[Denoised]
    heldout: np.ndarray
    shared: bool
    variation: Estimate
    high: float
    clean: np.ndarray
    noisy: np.ndarray
    trained: np.ndarray


def compare(folders: Mapping[str, Path], settings: Settings, monitor: loop.Monitor) -> Denoising:
    """Ask each run's denoiser about the same noisy images.

    Args:
      folders: runs by name, trained on images of one source and size.
      settings: levels, draws and images.
      monitor: is told how far it is.

    Raises:
      UserError: a setting is out of range, a folder is no trained run, or the runs do not go together.
    """
    check(settings)
    made = {name: _open(folder) for name, folder in folders.items()}
    levels = _levels(made, folders, settings.levels)
    _check_together(made, folders)
    # All weights are found before anything is computed.
    loaded = {
        name: load_params(
            locate(folders[name]), monitor, ema=made[name].config.sample.ema, on=made[name].config.mesh
        )
        for name in made
    }
    unseen = _unseen(made, settings)
    seen, shared = _seen(made, settings)
    shown, trained = _shown(seen if shared else [], unseen, settings.shown)

    asked: list[tuple[Rows, Rows]] = []
    pictures = []
    for done, (name, each) in enumerate(made.items()):
        params = loaded[name][0]
        parts = [
            answers.answer_rows(each.model, params, images, levels, settings.draws, settings.seed)
            for images in (seen[0 if shared else done], unseen)
        ]
        asked.append((parts[0], parts[1]))
        pictures.append(answers.pictures(each.model, params, shown, levels, settings.seed))
        monitor.progress("denoise", done + 1, len(made), {})
    real = [answers.clean_rows(images) for images in (*seen, unseen)]
    runs = []
    for i, (name, each) in enumerate(made.items()):
        ours, theirs = asked[i]
        own = seen[0 if shared else i]
        runs.append(
            Denoised(
                name=name,
                folder=folders[name],
                config=each.config,
                step=loaded[name][1],
                gap=gaps.gap(ours["error"], theirs["error"], levels, settings.confidence),
                train=_side(
                    ours, asked[0][0] if shared else None, real[0 if shared else i], settings.confidence
                ),
                heldout=_side(theirs, asked[0][1], real[-1], settings.confidence),
                ids=own.id,
                pictures=pictures[i][0],
            )
        )
    return Denoising(
        settings=replace(settings, levels=levels),
        runs=runs,
        heldout=unseen.id,
        shared=shared,
        variation=sharpness.mean(real[-1]["variation"], settings.confidence),
        high=float(real[-1]["high"].mean() / real[-1]["all"].mean()) if real[-1]["all"].any() else math.nan,
        clean=np.asarray(to_float(np.asarray(shown.x))),
        noisy=pictures[0][1],
        trained=trained,
    )


# ------------------------------------------------------------------------------------------- the settings


def check(settings: Settings) -> None:
    """Raises UserError for the first setting that is out of range."""
    for name, least in (("draws", 1), ("n", 2), ("shown", 1), ("seed", 0)):
        if (value := getattr(settings, name)) < least:
            raise UserError(f"--{_FLAGS.get(name, name)} {value}: give {least} or more")
    if settings.n < settings.shown:
        raise UserError(f"--images {settings.shown}: more than --n {settings.n}; give {settings.n} or fewer")
    if not 0 < settings.confidence < 1:
        raise UserError(f"--confidence {settings.confidence:g}: must be between 0 and 1, such as 0.95")
    for level in settings.levels:
        if not (math.isfinite(level) and level > 0):
            raise UserError(f"--levels {level:g}: noise levels are above 0")
        if settings.levels.count(level) > 1:
            raise UserError(f"--levels {level:g}: is given twice; give each once")


_FLAGS = {"shown": "images"}


def _open(folder: Path) -> Experiment:
    if not (locate(folder) / "config.json").is_file():
        raise UserError(
            f"RUNS {folder}: no run here (no config.json); give a folder of mdiff train, or a sweep's cells/NAME"
        )
    return reopen(locate(folder))


def _levels(
    made: Mapping[str, Experiment], folders: Mapping[str, Path], given: tuple[float, ...]
) -> tuple[float, ...]:
    """The noise levels asked for, rising; each within the range of every run."""
    ranges = {
        name: (each.config.process.sigma_min, each.config.process.sigma_max) for name, each in made.items()
    }
    for level in given:
        for name, (low, high) in ranges.items():
            if not low <= level <= high:
                raise UserError(
                    f"--levels {level:g}: {folders[name]} works from {low:g} to {high:g}; give levels within"
                )
    if given:
        return tuple(sorted(given))
    low = max(LOWEST, *(low for low, _ in ranges.values()))
    high = min(HIGHEST, *(high for _, high in ranges.values()))
    if not low < high:
        raise UserError(
            "RUNS: their noise ranges (process.sigma_min to sigma_max) do not overlap; give others"
        )
    # Rounded for who reads them, and inside the range again.
    return tuple(min(max(float(f"{level:.3g}"), low), high) for level in np.geomspace(low, high, COUNT))


def _check_together(made: Mapping[str, Experiment], folders: Mapping[str, Path]) -> None:
    names = list(made)
    first = made[names[0]].config.data
    for name in names[1:]:
        for field in _DATA:
            ours, theirs = getattr(first, field), getattr(made[name].config.data, field)
            if ours != theirs:
                raise UserError(
                    f"RUNS {folders[name]}: data.{field} = {theirs!r}, that of {folders[names[0]]} is {ours!r}; "
                    "give runs on images of one source and size"
                )


# --------------------------------------------------------------------------------------------- the images


def _chosen(images: Images, settings: Settings) -> Images:
    """At most n of them, drawn by seed; the first ones stay when n grows."""
    images = images.take(permutation(settings.seed, "denoise", 0, len(images))[: settings.n])
    return replace(images, x=np.asarray(images.x))


def _unseen(made: Mapping[str, Experiment], settings: Settings) -> Images:
    """Images of the source that no run was trained on, nor a twin of them."""
    data = next(iter(made.values())).config.data
    images = source.load(data.source, data.size, split=data.split, reading=data.reading)
    trained = np.isin(images.id, np.concatenate([each.subset.origin for each in made.values()]))
    if images.family is not None:
        trained = np.isin(images.family, images.family[trained])
    rest = np.flatnonzero(~trained)
    if len(rest) < 2:
        raise UserError(
            f"RUNS: of {data.source!r} {len(rest)} images were trained on by none of the runs, and 2 or more are "
            "needed; give runs with a smaller data.n"
        )
    return _chosen(images.take(rest), settings)


def _seen(made: Mapping[str, Experiment], settings: Settings) -> tuple[list[Images], bool]:
    """Images that all runs were trained on; where there are fewer than 2, images of each run's own."""
    sets = [each.subset.train for each in made.values()]
    own = [set(images.id[images.id >= 0].tolist()) for images in sets]  # those below 0 are planted
    common = set.intersection(*own)
    shared = len(common) >= 2

    def some(images: Images, ids: set[int]) -> Images:
        places = np.flatnonzero(np.isin(images.id, sorted(ids)))
        return _chosen(images.take(places[np.argsort(images.id[places])]), settings)

    if shared:
        return [some(sets[0], common)], True
    return [some(images, ids) for images, ids in zip(sets, own, strict=True)], False


def _shown(seen: Sequence[Images], unseen: Images, count: int) -> tuple[Images, np.ndarray]:
    """The images of the picture, half of them trained on where all runs share some, and which those are."""
    half = min(count // 2, len(seen[0])) if seen else 0
    rest = unseen.take(np.arange(min(count - half, len(unseen))))
    if not half:
        return rest, np.zeros(len(rest), bool)
    first = seen[0].take(np.arange(half))

    def both(name: str) -> Any:
        parts = [getattr(images, name) for images in (first, rest)]
        return None if any(part is None for part in parts) else np.concatenate(parts)

    images = Images(
        first.name, both("x"), both("id"), both("label"), vector=both("vector"), tokens=both("tokens")
    )
    return images, np.arange(len(images)) < half


def _side(found: Rows, first: Rows | None, real: Rows, confidence: float) -> Side:
    def by_level(measure: Callable[[int], Estimate]) -> list[Estimate]:
        return [measure(i) for i in range(len(found["error"]))]

    return Side(
        error=by_level(lambda i: sharpness.mean(found["error"][i], confidence)),
        over_first=None
        if first is None
        else by_level(lambda i: sharpness.ratio(found["error"][i], first["error"][i], confidence)),
        variation=by_level(lambda i: sharpness.ratio(found["variation"][i], real["variation"], confidence)),
        high=by_level(
            lambda i: sharpness.ratio_of_shares(
                found["high"][i], found["all"][i], real["high"], real["all"], confidence
            )
        ),
    )

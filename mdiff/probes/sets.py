"""The sets of images a probe is given: checked, and each real set made ready to be compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.features import spaces
from mdiff.features.pixel import flatten, mirror
from mdiff.probes.neighbours import cluster_near_duplicates, median_pair_distance
from mdiff.types import to_uint8

Progress = Callable[[str, int, int], None]
"""`(what is being done, steps done, steps in all)`."""


@dataclass(frozen=True)
class Side:
    """One set of real images.

    Attributes:
      name: "train" or "heldout".
      images: [R,H,W,C] as given.
      ids: [R].
      origin: [R], index in the set as given.
      config: the rules.
    """

    name: str
    images: np.ndarray
    ids: np.ndarray
    origin: np.ndarray
    config: Audit

    @cached_property
    def rows(self) -> np.ndarray:
        """float32 [R,D] in [-1, 1]."""
        return flatten(self.images)

    @cached_property
    def mirrored(self) -> np.ndarray | None:
        """float32 [R,D] of the mirrored images; None when flips do not count."""
        return flatten(mirror(self.images)) if self.config.flips else None

    @cached_property
    def threshold(self) -> float:
        """RMS distance on [0, 1] up to which two images are one."""
        return self.config.near_duplicate * median_pair_distance(self.rows, seed=self.config.seed)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [R], clusters of near-duplicates."""
        return cluster_near_duplicates(self.rows, self.threshold, self.config.chunk, self.mirrored)

    @property
    def clusters(self) -> int:
        """How many different images there are."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Sets:
    """Everything a probe compares.

    Attributes:
      generated: [Q,H,W,C] uint8, or float clipped to [-1, 1].
      sides: by the prefix of their columns: "" the training images, "control_" the held-out ones if any.
      notes: what was done to the images, one sentence each.
    """

    generated: np.ndarray
    sides: dict[str, Side]
    notes: list[str]

    @property
    def train(self) -> Side:
        """The training images."""
        return self.sides[""]

    @property
    def heldout(self) -> Side | None:
        """The held-out images."""
        return self.sides.get("control_")


def read(
    generated: np.ndarray,
    train: np.ndarray,
    heldout: np.ndarray | None,
    config: Audit,
    train_ids: np.ndarray | None = None,
    heldout_ids: np.ndarray | None = None,
) -> Sets:
    """Checks everything a probe is given.

    Args:
      generated: [Q,H,W,C] uint8, or float in [-1, 1]; floats outside are clipped, as in an image file.
      train: [R,H,W,C] uint8, or float in [-1, 1].
      heldout: [S,H,W,C]; more than R are cut to R, drawn by `config.seed`. None where there are none.
      config: the rules.
      train_ids: int [R], default 0..R-1.
      heldout_ids: int [S], default 0..S-1.

    Raises:
      UserError: a setting is out of range, or a set is empty, not finite, of another image shape or range,
        or has fewer than two images.
    """
    check(config)
    notes: list[str] = []
    generated = _images("generated", generated, None)
    train = _images("train", train, generated)
    if heldout is not None:
        heldout = _images("heldout", heldout, generated)
    generated = _clipped(generated, notes)
    sides = {"": _side("train", train, train_ids, config, None)}
    if heldout is not None:
        sides["control_"] = _side("heldout", heldout, heldout_ids, config, len(train))
    return Sets(generated, sides, notes)


def against(
    generated: np.ndarray, references: Mapping[str, np.ndarray], control: str | None, config: Audit
) -> Sets:
    """`read` for any number of reference sets by their names, which are also the keys of the sides.

    Args:
      generated: as in `read`.
      references: name -> [R,H,W,C], each checked like training images.
      control: the name of the one that nothing was trained on; it is cut to the smallest of the others.
      config: the rules.

    Raises:
      UserError: as in `read`; no reference, or none of the control's name.
    """
    check(config)
    others = [name for name in references if name != control]
    if not others or (control is not None and control not in references):
        given = ", ".join(references) or "none"
        raise UserError(
            f"references: {given}, with control {control!r}; give the control and one or more others"
        )
    notes: list[str] = []
    generated = _images("generated", generated, None)
    checked = {name: _images(name, images, generated) for name, images in references.items()}
    smallest = min(len(checked[name]) for name in others)
    sides = {
        name: _side(name, images, None, config, smallest if name == control else None)
        for name, images in checked.items()
    }
    return Sets(_clipped(generated, notes), sides, notes)


def reference(images: np.ndarray, config: Audit, name: str = "train", most: int | None = None) -> Side:
    """One set of real images [R,H,W,C] alone, unchecked; cut to `most` as `read` cuts a control."""
    return _side(name, images, None, config, most)


def check(config: Audit) -> None:
    """Raises UserError for the first setting that is out of range."""
    for name in ("neighbours", "bootstrap", "chunk"):
        if getattr(config, name) < 1:
            raise UserError(f"audit.{name} = {getattr(config, name)}; give at least 1")
    for name in ("ratio", "confidence"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"audit.{name} = {getattr(config, name)}; give a number between 0 and 1")
    for name in ("alpha", "calibrated"):
        if not getattr(config, name) > 0:
            raise UserError(f"audit.{name} = {getattr(config, name)}; give a number above 0")
    if config.seed < 0:
        raise UserError(f"audit.seed = {config.seed}; give 0 or more")
    if not config.near_duplicate >= 0:
        raise UserError(f"audit.near_duplicate = {config.near_duplicate}; give 0 or more")
    spaces.check(config)


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Images as uint8."""
    return images if images.dtype == np.uint8 else to_uint8(images)


def digest(images: np.ndarray) -> str:
    """Of the pixels, as uint8."""
    return hashlib.sha256(np.ascontiguousarray(as_bytes(images)).tobytes()).hexdigest()[:16]


def _images(what: str, images: np.ndarray, like: np.ndarray | None) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.size == 0:
        raise UserError(
            f"{what}: shape {images.shape}; give at least one image as [N, height, width, channels]"
        )
    if like is not None and images.shape[1:] != like.shape[1:]:
        ours, theirs = ("x".join(map(str, x.shape[1:])) for x in (images, like))
        raise UserError(f"{what}: images are {ours} but generated ones are {theirs}; resize one to the other")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{what}: dtype {images.dtype}; give uint8, or float in [-1, 1]")
    broken = sum(not np.isfinite(image).all() for image in images)
    if broken:
        raise UserError(f"{what}: {broken} of {len(images)} images have NaN or infinite pixels; remove them")
    if like is not None and np.abs(images).max() > 1.01:
        low, high = images.min(), images.max()
        raise UserError(f"{what}: values from {low:.3g} to {high:.3g}; give uint8, or float in [-1, 1]")
    return images


def _clipped(generated: np.ndarray, notes: list[str]) -> np.ndarray:
    if generated.dtype == np.uint8:
        return generated
    outside = float(np.mean([np.mean(np.abs(image) > 1.01) for image in generated]))
    if outside > 0.01:
        notes.append(f"{100 * outside:.0f} % of the generated pixels lie outside [-1, 1] and were clipped")
    return np.clip(generated, -1.0, 1.0)


def _side(name: str, images: np.ndarray, ids: np.ndarray | None, config: Audit, most: int | None) -> Side:
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    if ids.shape != (len(images),):
        raise UserError(f"{name}_ids: shape {ids.shape} for {len(images)} images; give one id per image")
    if len(images) < 2:
        raise UserError(f"{name}: {len(images)} image; the ratio rule needs at least 2")
    origin = np.arange(len(images))
    if most is not None and len(images) > most:
        generator = np.random.Generator(np.random.Philox(config.seed))
        origin = np.sort(generator.choice(len(images), most, replace=False))
        images, ids = images[origin], ids[origin]
    return Side(name, images, ids, origin, config)

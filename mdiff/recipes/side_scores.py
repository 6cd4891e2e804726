"""What an attack's generations are worth, strength by strength: the auditor's part of SIDE, and the choice of the strength.

The attacker may see `Strength.repetition` and `Strength.beside`, which compare generations with each other. The rest compares
them with real images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdiff.config import Audit
from mdiff.features.spaces import make_features
from mdiff.files import strict
from mdiff.probes import extraction, manifold, quality, repetition
from mdiff.probes.extraction import Scores
from mdiff.probes.repetition import Quality, Repetition
from mdiff.recipes import guided
from mdiff.types import Estimate


@dataclass(frozen=True)
class Strength:
    """The generations at one strength.

    Attributes:
      scale: the strength; 0 is the model alone.
      scores: against the reference sets.
      repetition: of the generations among themselves.
      beside: where they lie, beside unguided ones.
      quality: against held-out images, on the same generations: `energy` (distance), `precision`, `recall`; empty without any.
      images: uint8 [n,H,W,C].
      label: int [n], the cluster asked for.
      gap: float [n], the surrogate gap; NaN at strength 0.
    """

    scale: float
    scores: Scores
    repetition: Repetition
    beside: Quality
    quality: dict[str, Estimate]
    images: np.ndarray
    label: np.ndarray
    gap: np.ndarray


def measure(
    files: Mapping[float, Path],
    unguided: np.ndarray,
    references: Mapping[str, np.ndarray],
    control: str | None,
    rules: Audit,
    heldout: np.ndarray | None = None,
) -> list[Strength]:
    """Scores of every strength, weakest first.

    Args:
      files: strength -> file, of `recipes.side.extract`.
      unguided: uint8 [U,H,W,C], the images that the surrogate was made of.
      references: name -> [R,H,W,C], as of `extraction.score`.
      control: the name of the set that nothing was trained on.
      rules: the audit's.
      heldout: images that quality is measured against; the control by default, None without one.

    Returns:
      One per strength. An image that is not finite is no copy and counts among the generations.
    """
    own = make_features(rules, unguided)  # the attacker has no other images to fit a space on
    base = np.asarray(own(unguided), np.float64)
    real = references[control] if heldout is None and control is not None else heldout
    found = []
    for scale in sorted(files):
        columns = guided.load(files[scale])
        images, label = columns["x"], columns["label"]
        found.append(
            Strength(
                scale,
                extraction.score(images, references, rules, control=control, prompts=label),
                repetition.repetition(images, label, rules, unguided, features=own),
                repetition.quality(np.asarray(own(images), np.float64), base, confidence=rules.confidence),
                {} if real is None else _quality(images, real, rules),
                images,
                label,
                columns["gap"],
            )
        )
    return found


def _quality(images: np.ndarray, real: np.ndarray, rules: Audit) -> dict[str, Estimate]:
    """Distances to held-out images in a space fitted on those, the same for all strengths."""
    space = make_features(rules, real)
    rows, reference = (
        np.asarray(space(quality.thinned(each, rules.seed)), np.float64) for each in (images, real)
    )
    covered = manifold.support(rows, reference, n_resamples=1, confidence=rules.confidence)
    energy = quality.energy_distance(
        rows, reference, n_resamples=rules.bootstrap, confidence=rules.confidence, seed=rules.seed
    )
    return {"energy": energy, "precision": covered.precision, "recall": covered.recall}


def chosen(strengths: Sequence[Strength], floor: float) -> float:
    """The strength that an attacker takes: the most repetition among those whose images are still good."""
    return repetition.choose(
        {one.scale: one.repetition.grouped.value for one in strengths},
        {one.scale: one.beside.precision.value for one in strengths},
        floor,
        spread={one.scale: one.beside.spread for one in strengths},
    )


def oracle(strengths: Sequence[Strength], reference: str) -> float:
    """The strength at which most generations are copies, which takes the training images to know."""
    return max(
        strengths, key=lambda one: (one.scores[reference].estimates["memorized"].value, -one.scale)
    ).scale


def to_json(one: Strength) -> dict[str, Any]:
    """All its numbers as plain JSON."""
    return strict(
        {
            "scale": one.scale,
            "scores": extraction.to_json(one.scores),
            "repetition": {
                name: asdict(value) if isinstance(value, Estimate) else value
                for name, value in vars(one.repetition).items()
            },
            "beside_unguided": {"precision": asdict(one.beside.precision), "spread": one.beside.spread},
            "quality": {name: asdict(value) for name, value in one.quality.items()},
        }
    )

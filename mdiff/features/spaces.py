"""Feature spaces by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.features.pixel import Features, PixelPCA, flatten
from mdiff.features.random import RandomConv

SPACES: dict[str, Any] = {"pixel": PixelPCA, "random": RandomConv}
"""Name -> class with `fit(images, components) -> Features`."""

_FIT_ROWS = 1024  # images of each side that a space is fitted on


def check(config: Audit) -> None:
    """Raises UserError for a space that does not exist, or fewer than 1 component."""
    if config.features not in SPACES:
        raise UserError(f"audit.features = {config.features!r}: no such space; give {' or '.join(SPACES)}")
    if config.components < 1:
        raise UserError(f"audit.components = {config.components}; give at least 1")


def make_features(config: Audit, train: np.ndarray, heldout: np.ndarray | None = None) -> Features:
    """The space `config.features` names, with `config.components` dimensions (or as many as the images span).

    It is fitted on equally many training and held-out images, evenly spaced over each set, so that neither
    side is favoured, and never on generations, so that all runs on one data set share it.

    Args:
      config: names the space.
      train: [R,H,W,C] uint8, or float in [-1, 1].
      heldout: [S,H,W,C], or None.

    Raises:
      UserError: no such space, or all images are equal.
    """
    check(config)
    sides = [train] if heldout is None else [train, heldout]
    most = min(_FIT_ROWS, min(map(len, sides)))
    picked = [side[np.linspace(0, len(side) - 1, most).astype(int)] for side in sides]
    if len({images.dtype for images in picked}) > 1:  # uint8 beside float: bring both to floats
        picked = [_floats(images) for images in picked]
    return SPACES[config.features].fit(np.concatenate(picked), config.components)


def _floats(images: np.ndarray) -> np.ndarray:
    return flatten(images).reshape(images.shape)

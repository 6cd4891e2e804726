"""The noise cutoff of every training image at every step: one for all, one per image, or one per stage of training.

A cutoff of 0 means that the image is clean: it is trained on at all noise levels, as without ambient training.
"""

from __future__ import annotations

import numpy as np

from mdiff import config
from mdiff.data.stream import permutation
from mdiff.errors import UserError


def of_images(cfg: config.Config, origin: np.ndarray) -> np.ndarray:
    """Cutoffs float32 [N] of the training images, without stages.

    A copy that was planted (flipped, cropped) has the cutoff of the image it was made from.

    Args:
      cfg: uses loss.cutoff, cutoff_of, clean_share, and data.seed for the draw of the clean images.
      origin: int [N], ids of the training images, or of those they were made from (`split.Subset.origin`).

    Raises:
      UserError: loss.cutoff_of names an image that is not trained on.
    """
    loss = cfg.loss
    found = np.full(len(origin), loss.cutoff, np.float32)
    if loss.clean_share:
        known = np.unique(origin)
        clean = known[permutation(cfg.data.seed, "clean", 0, len(known))][
            : round(loss.clean_share * len(known))
        ]
        found[np.isin(origin, clean)] = 0.0
    for image, level in loss.cutoff_of.items():
        at = origin == image
        if not at.any():
            raise UserError(
                f"loss.cutoff_of: image {image} is not trained on; give ids of training images (subset.json lists them)"
            )
        found[at] = level
    return found


def stage(cfg: config.Config, step: int) -> float | None:
    """The cutoff of all images at `step` (from 0); None without stages."""
    stages = cfg.loss.cutoff_stages
    return stages[max(first for first in stages if first <= step)] if stages else None

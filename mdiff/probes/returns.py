"""Is a copy stored in the diffusion model? Noise it, denoise it without guidance, and see whether it comes back.

A hit of a guided attack may come from the guide. Raised to noise level sigma and denoised by the model alone, an image
that the model knows by heart comes back from higher noise than one it does not know: R(sigma), the share that come back
as copies of the same image. At low noise everything comes back, so R is read beside two controls at the same noise
levels: held-out images, which the model cannot know, and guided generations that are no copies, each of which should
come back as itself.

"As a copy" is the audit's ratio rule (arXiv 2310.02664, section 2), and "the same" is the same cluster of near-duplicates.
The rule compares with the next image of the reference set, so sets of one size make rates comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.features.pixel import flatten
from mdiff.probes import intervals, sets, similarity
from mdiff.types import Estimate


@dataclass(frozen=True)
class Group:
    """Images that were noised and denoised.

    Attributes:
      back: [L,N,H,W,C] what they became from each of L noise levels, uint8 or float in [-1, 1].
      home: int [N], index into `reference` of the image that each should come back to.
      reference: [R,H,W,C] the set it is compared with: the training images for hits; for controls the group itself, or as
        many held-out images as there are training images.
    """

    back: np.ndarray
    home: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Returns:
    """Return rates.

    Attributes:
      levels: L noise levels (EDM's sigma), as given.
      home: group -> at each level the share that came back as a copy of the image it should come back to.
      training: group -> at each level the share that came back as a copy of any training image; for a control, how often
        the model pulls what it does not know to what it knows.
    """

    levels: tuple[float, ...]
    home: dict[str, list[Estimate]]
    training: dict[str, list[Estimate]]


def returns(
    groups: Mapping[str, Group], levels: tuple[float, ...], train: np.ndarray, rules: Audit
) -> Returns:
    """Return rates of groups of images, each rate with Wilson's interval over the images.

    Args:
      groups: name -> images, such as hits, heldout and others; one without images has rates NaN in [0, 1].
      levels: L noise levels.
      train: [R,H,W,C] the training images.
      rules: the audit's: `ratio`, `near_duplicate`, `flips`, `confidence`.

    Raises:
      UserError: a group has other shapes than it should, or an index outside of its reference.
    """
    side = sets.reference(train, rules)
    home, training = {}, {}
    for name, group in groups.items():
        _check(name, group, len(levels))
        own = sets.reference(group.reference, rules, name)
        home[name] = [_rate(came_back(images, group.home, own), rules) for images in group.back]
        training[name] = [_rate(_copies(images, side)[0], rules) for images in group.back]
    return Returns(tuple(levels), home, training)


def came_back(images: np.ndarray, home: np.ndarray, side: sets.Side) -> np.ndarray:
    """bool [N]: is each image [N,H,W,C] a copy of the one at `home` [N] in the reference set?"""
    copy, nearest = _copies(images, side)
    return copy & (side.labels[nearest] == side.labels[np.asarray(home, np.int64)])


def _copies(images: np.ndarray, side: sets.Side) -> tuple[np.ndarray, np.ndarray]:
    """Is each image a copy of one in the set, bool [N], and which is nearest, int [N]?"""
    if not len(images):
        return np.zeros(0, bool), np.zeros(0, np.int64)
    rows, chunk = flatten(images), side.config.chunk
    near = similarity.nearest_with_flips(rows, side.rows, side.mirrored, 8, chunk)
    found = similarity.ratio_test(
        rows, side.rows, side.labels, mirrored=side.mirrored, neighbours=near, chunk=chunk, what=side.name
    )
    return found.ratio < side.config.ratio, near.index[:, 0]


def _rate(verdicts: np.ndarray, rules: Audit) -> Estimate:
    return intervals.wilson(int(verdicts.sum()), len(verdicts), rules.confidence)


def _check(name: str, group: Group, levels: int) -> None:
    shape, home = group.back.shape, np.asarray(group.home)
    if len(shape) != 5 or shape[0] != levels or home.shape != shape[1:2]:
        raise UserError(
            f"{name}: {shape} images and {home.shape} homes for {levels} levels; give [levels, images, ...] and one "
            "home per image"
        )
    if len(home) and (home.min() < 0 or home.max() >= len(group.reference)):
        raise UserError(
            f"{name}: homes {home.min()} to {home.max()} in a reference of {len(group.reference)}; give indices into it"
        )

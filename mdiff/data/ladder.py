"""Planted truth for text-to-image memorization: which captions have an image to recite, and how often it was seen.

Three kinds of training images are drawn from a source with captions and families:

- *verbatim*: an image and its caption repeated so many times, by rung (`data.ladder`: copies -> images);
- *template*: a whole family, images of one layout with a varying part, all under the caption of its plainest member
  (the one with the shortest caption), so that the caption says the layout and not the part (`data.templates`,
  `data.template_copies` of each image);
- *unique*: the rest of `data.n`, once each.

Verbatim, unique and held-out images are alone in their families, have captions of their own without numbers (the emoji whose
names are numbers name nothing), and none is nearer to another than `APART` of the median distance of two images: what is
recited is then recited because of its copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mdiff import config as config_lib
from mdiff.data.source import Images
from mdiff.data.stream import permutation
from mdiff.errors import UserError

APART = 0.35
"""Least distance of two images, in medians of the distance of two."""
FAMILY = (3, 12)
"""Fewest and most members of a family that serves as a template."""


class Template(NamedTuple):
    """A family trained on under one caption.

    Attributes:
      caption: of all its members.
      ids: its members.
    """

    caption: str
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Ladder:
    """What was drawn, by place in the source.

    Attributes:
      train: int [n] training images: rungs with most copies first, then templates, then unique ones.
      copies: int [n] how often each is seen in an epoch.
      heldout: int [m].
      templates: the families.
    """

    train: np.ndarray
    copies: np.ndarray
    heldout: np.ndarray
    templates: tuple[Template, ...]


def check(cfg: config_lib.Data, images: Images) -> None:
    """Raises UserError when `cfg` asks for a ladder that cannot be, or for one in part."""
    if not cfg.ladder:
        if cfg.templates:
            raise UserError(f"data.templates = {cfg.templates}: belong to a ladder; set data.ladder too")
        return
    name = f"data.ladder = {cfg.ladder}"
    if images.caption is None or images.family is None:
        raise UserError(f"{name}: {images.name!r} has no captions and families; set data.source to emoji")
    for copies, count in cfg.ladder.items():
        if copies < 2 or count < 1:
            raise UserError(f"{name}: rungs are copies, 2 or more, -> images, 1 or more")
    if cfg.duplicates or cfg.planted_flips or cfg.planted_crops:
        raise UserError(f"{name}: plants copies itself; leave duplicates and planted_* empty")
    if cfg.skip:
        raise UserError(f"{name}: data.skip = {cfg.skip} does not go with it; set it to 0")
    if cfg.templates < 0 or cfg.template_copies < 1:
        raise UserError(
            f"data.templates = {cfg.templates}, data.template_copies = {cfg.template_copies}: "
            "must be 0 or more, and 1 or more"
        )


def draw(cfg: config_lib.Data, images: Images) -> Ladder:
    """Draws by seed.

    Args:
      cfg: uses n, heldout, seed, ladder, templates and template_copies.
      images: the whole set, with captions and families.

    Raises:
      UserError: the set has not so many images, or n is below what ladder and templates take.
    """
    assert images.caption is not None and images.family is not None
    numbers, first, counts = np.unique(images.family, return_index=True, return_counts=True)
    order = permutation(cfg.seed, "families", 0, len(numbers))
    numbers, first, counts = numbers[order], first[order], counts[order]
    fits = (counts >= FAMILY[0]) & (counts <= FAMILY[1])
    chosen = numbers[fits][: cfg.templates]
    if len(chosen) < cfg.templates:
        raise UserError(
            f"data.templates = {cfg.templates}: {images.name!r} has {len(chosen)} families of {FAMILY[0]} to "
            f"{FAMILY[1]} images; set it to {len(chosen)} or fewer"
        )
    members = [np.flatnonzero(images.family == family) for family in chosen]
    templates = tuple(
        Template(min((images.caption[i] for i in each), key=len), tuple(int(i) for i in images.id[each]))
        for each in members
    )
    rungs = [copies for copies, count in sorted(cfg.ladder.items(), reverse=True) for _ in range(count)]
    taken = len(rungs) + sum(map(len, members))
    unique = cfg.n - taken
    if unique < 0:
        raise UserError(
            f"data.n = {cfg.n}: ladder and templates take {taken} images; set it to {taken} or more"
        )
    wanted = len(rungs) + unique + cfg.heldout
    alone = _apart(images, [int(i) for i in first[counts == 1]], wanted)
    if len(alone) < wanted:
        raise UserError(
            f"data.n = {cfg.n} and data.heldout = {cfg.heldout}: {images.name!r} has {len(alone)} images without "
            f"near-duplicates, and {wanted} are needed; set data.n to {cfg.n - wanted + len(alone)} or fewer"
        )
    cut = len(rungs), len(rungs) + unique
    parts = [alone[: cut[0]], *members, alone[cut[0] : cut[1]]]
    copies = [*rungs, *[cfg.template_copies] * sum(map(len, members)), *[1] * unique]
    return Ladder(np.concatenate(parts).astype(int), np.array(copies), alone[cut[1] :].astype(int), templates)


def _apart(images: Images, candidates: list[int], wanted: int) -> np.ndarray:
    """The first `wanted` candidates that have a name, and are near none of those before them."""
    assert images.caption is not None
    named = [i for i in candidates if not any(letter.isdigit() for letter in images.caption[i])]
    x = np.asarray(images.x[named], np.float32).reshape(len(named), -1) / 127.5
    squares = (x**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0))
    least = APART * np.median(distances[np.triu_indices(len(named), 1)])
    kept: list[int] = []
    captions: set[str] = set()
    for place, image in enumerate(named):
        if len(kept) == wanted:
            break
        caption = images.caption[image].casefold()
        if caption not in captions and not (distances[place, kept] < least).any():
            kept.append(place)
            captions.add(caption)
    return np.array(named)[kept]


def caption(images: Images, templates: tuple[Template, ...]) -> Images:
    """`images` with the members of each template under its caption."""
    if not templates:
        return images
    assert images.caption is not None
    of = {member: template.caption for template in templates for member in template.ids}
    named = (of.get(int(i), own) for i, own in zip(images.id, images.caption, strict=True))
    return replace(images, caption=tuple(named))

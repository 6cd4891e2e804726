"""What a labelled model is told about its images, beside the truth (arXiv 2310.02664, section 4).

Labels that say nothing about an image still name it: a fixed random label parts the training set into C groups, and a unique one
names each image. Drawn anew at every visit the same labels carry no information about the image at all, so the difference
between the two is what naming does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mdiff import config as config_lib
from mdiff.data.source import Images
from mdiff.data.split import Subset
from mdiff.data.stream import uniforms
from mdiff.errors import UserError


def check(cfg: config_lib.Config) -> None:
    """Raises UserError when the label fields do not fit each other or the network."""
    data, classes = cfg.data, cfg.net.classes
    if data.labels not in ("own", "clusters", "random", "redrawn", "unique"):
        raise UserError(f"data.labels = {data.labels!r}: must be own, clusters, random, redrawn or unique")
    if not 0 <= data.label_noise <= 1:
        raise UserError(f"data.label_noise = {data.label_noise}: must be in [0, 1], a share of the images")
    if not classes:
        for name, plain in (("labels", "own"), ("label_noise", 0.0)):
            if getattr(data, name) != plain:
                raise UserError(
                    f"data.{name} = {getattr(data, name)!r}: the network has no labels; set net.classes to their number"
                )
    if data.label_noise and data.labels in ("random", "redrawn", "unique"):
        raise UserError(
            f"data.label_noise = {data.label_noise}: {data.labels} labels say nothing that noise could take away; "
            "set it to 0, or data.labels to own or clusters"
        )


def relabel(cfg: config_lib.Config, subset: Subset) -> Subset:
    """The subset with the labels that the network is trained with.

    A planted flip or crop has the label of the image it was made from, except when labels are unique. Held-out images
    get labels by the same rule; none when labels are unique, since theirs do not exist.

    Args:
      cfg: uses data.labels, data.label_noise, data.seed and net.classes.
      subset: from `split` or `load_subset`.

    Raises:
      UserError: there are no labels of that kind, or more of them than net.classes.
    """
    classes, kind = cfg.net.classes, cfg.data.labels
    if not classes:
        return subset
    if kind == "own":
        _check_own(classes, subset)
        train, heldout = subset.train.label, subset.heldout.label
    elif kind == "clusters":
        train, heldout = _clusters(subset, classes, cfg.data.seed)
    elif kind == "unique":
        if classes != len(subset.train):
            raise UserError(
                f"net.classes = {classes}: unique labels of {len(subset.train)} training images; "
                f"set net.classes to {len(subset.train)}"
            )
        train, heldout = np.arange(classes, dtype=np.int32), None
    else:
        train, heldout = (_random(cfg.data.seed, ids, classes) for ids in (subset.origin, subset.heldout.id))
    if cfg.data.label_noise:
        assert train is not None
        train = _noisy(train, subset.origin, classes, cfg.data)
    return replace(subset, train=_with(subset.train, train), heldout=_with(subset.heldout, heldout))


def _with(images: Images, label: np.ndarray | None) -> Images:
    return replace(images, label=None if label is None else np.asarray(label, np.int32))


def _check_own(classes: int, subset: Subset) -> None:
    name, label = subset.train.name, subset.train.label
    found = -1
    for side in (subset.train, subset.heldout):
        if label is not None and side.label is not None and len(side):
            found = max(found, int(side.label.max()))
    if found < 0 or found >= classes:
        have = "has no labels" if found < 0 else f"has labels up to {found}"
        fix = (
            "set net.classes to 0, or data.labels to random"
            if found < 0
            else f"set net.classes to {found + 1}"
        )
        raise UserError(f"net.classes = {classes}: {name!r} {have}; {fix}")


def _clusters(subset: Subset, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """k-means of the training pixels (best of 10 starts), and the nearest centre of each held-out image."""
    from sklearn.cluster import KMeans

    rows, others = (
        np.asarray(side.x, np.float64).reshape(len(side), int(np.prod(side.x.shape[1:]))) / 255
        for side in (subset.train, subset.heldout)
    )
    distinct = len(np.unique(rows, axis=0))
    if distinct < classes:
        raise UserError(
            f"net.classes = {classes}: clusters of {distinct} different training images; set net.classes to "
            f"{distinct} or fewer"
        )
    found = KMeans(classes, n_init=10, random_state=seed).fit(rows)
    return found.labels_, found.predict(others) if len(others) else np.zeros(0, np.int32)


def _random(seed: int, ids: np.ndarray, classes: int) -> np.ndarray:
    """Uniform labels int32 [N], each a function of (seed, id)."""
    return np.array([int(uniforms(seed, "labels", (int(i), 0), 1)[0] * classes) for i in ids], np.int32)


def _noisy(label: np.ndarray, ids: np.ndarray, classes: int, data: config_lib.Data) -> np.ndarray:
    """A share of the labels replaced; an image replaced at one share is so at every higher one, by the same label."""
    drawn = np.array([uniforms(data.seed, "label noise", (int(i), 0), 2) for i in ids]).reshape(-1, 2)
    other = (drawn[:, 1] * classes).astype(np.int32)
    return np.where(drawn[:, 0] < data.label_noise, other, label)

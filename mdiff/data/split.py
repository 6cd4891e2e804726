"""Which images are trained on, which are held out, and how often each one is seen.

This is the ground truth of every audit, so it is written to the run: ids, planted duplicates and a hash
of the pixels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdiff import config as config_lib
from mdiff.data.source import Images
from mdiff.data.stream import permutation
from mdiff.errors import UserError
from mdiff.files import write_json


@dataclass(frozen=True, eq=False)
class Subset:
    """Training images, held-out images, and what an epoch walks over.

    Attributes:
      train: the n training images, each once.
      heldout: images that are never trained on: the audit's control.
      slots: int32 [S] indices into `train`; an image with k planted copies occurs k times.
    """

    train: Images
    heldout: Images
    slots: np.ndarray


def split(config: config_lib.Data, images: Images) -> Subset:
    """Draws training and held-out images by seed.

    One permutation of the set is drawn from the seed; the first n are trained on and the next `heldout`
    are held out. So the training images of a smaller n are the first of those of a larger one.

    Args:
      config: uses n, heldout, seed and duplicates.
      images: the whole set.

    Raises:
      UserError: n, heldout or duplicates do not fit the set.
    """
    total = len(images)
    if config.n < 2:
        raise UserError(f"data.n = {config.n}: too few training images; set data.n to 2 or more")
    if config.heldout < 0:
        raise UserError(f"data.heldout = {config.heldout}: is negative; set data.heldout to 0 or more")
    if config.n > total:
        raise UserError(
            f"data.n = {config.n}: {images.name!r} has {total} images; set data.n to {total} or fewer"
        )
    if config.n + config.heldout > total:
        raise UserError(
            f"data.n = {config.n} and data.heldout = {config.heldout}: {images.name!r} has {total} images; "
            f"set data.heldout to {total - config.n} or fewer"
        )
    order = permutation(config.seed, "split", 0, total)
    train = images.take(order[: config.n])
    heldout = images.take(order[config.n : config.n + config.heldout])
    return Subset(train, heldout, _slots(config.duplicates, train.id))


def _slots(duplicates: dict[int, int], ids: np.ndarray) -> np.ndarray:
    place = {int(i): k for k, i in enumerate(ids)}
    copies = np.ones(len(ids), np.int64)
    for image, count in duplicates.items():
        if image not in place:
            some = ", ".join(str(i) for i in sorted(place)[:5])
            raise UserError(
                f"data.duplicates = {{{image}: {count}}}: no training image has id {image}; "
                f"training ids are {some}{', …' if len(place) > 5 else ''}"
            )
        if count < 1:
            raise UserError(
                f"data.duplicates = {{{image}: {count}}}: an image is trained on at least once; "
                "set 1 or more copies"
            )
        copies[place[image]] = count
    return np.repeat(np.arange(len(ids), dtype=np.int32), copies)


def _sha256(images: Images) -> str:
    return hashlib.sha256(np.ascontiguousarray(images.x).tobytes()).hexdigest()


def save_subset(path: str | Path, subset: Subset, config: config_lib.Data) -> None:
    """Writes which images were trained on and held out, as JSON, whole or not at all.

    The hashes are of the pixels, uint8 [n,H,W,C] in C order, in the order of the ids.

    Args:
      path: the file; its folder exists.
      subset: from `split`.
      config: what it was drawn by.

    Raises:
      UserError: the file cannot be written.
    """
    path = Path(path)
    tree: dict[str, Any] = {
        "source": config.source,
        "size": config.size,
        "seed": config.seed,
        "shape": list(subset.train.x.shape[1:]),
        "duplicates": {str(i): copies for i, copies in config.duplicates.items()},
    }
    for name, images in (("train", subset.train), ("heldout", subset.heldout)):
        tree[name] = {"ids": images.id.tolist(), "sha256": _sha256(images), "files": images.files}
    try:
        write_json(path, tree)
    except OSError as error:
        raise UserError(
            f"{str(path)!r}: cannot be written ({error.strerror}); choose a writable workdir with space left"
        ) from error


def load_subset(path: str | Path, images: Images) -> Subset:
    """The subset that `save_subset` recorded, taken from `images` and checked against its hashes.

    Args:
      path: the file.
      images: the set it was drawn from, loaded with the same source and size.

    Raises:
      UserError: no such file, not such a file, or the images are not those it was written for.
    """
    where = repr(str(path))
    try:
        tree = json.loads(Path(path).read_text())
        ids = {name: np.array(tree[name]["ids"], np.int32) for name in ("train", "heldout")}
        hashes = {name: str(tree[name]["sha256"]) for name in ("train", "heldout")}
        duplicates = {int(i): int(copies) for i, copies in tree["duplicates"].items()}
        source, size = tree["source"], tree["size"]
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read ({error.strerror}); give a workdir of mdiff train"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: is damaged or another file; delete it and run mdiff train again, which writes it anew"
        ) from error
    place = {int(i): k for k, i in enumerate(images.id)}
    parts = {}
    for name, wanted in ids.items():
        missing = [int(i) for i in wanted if int(i) not in place]
        if not missing:
            parts[name] = images.take(np.array([place[int(i)] for i in wanted], np.int64))
        if missing or _sha256(parts[name]) != hashes[name]:
            raise UserError(
                f"{where}: {images.name!r} does not hold the recorded {name} images; "
                f"load the source {source!r} at size {size} as it was when this was written"
            )
    return Subset(parts["train"], parts["heldout"], _slots(duplicates, parts["train"].id))

"""Which images are trained on, which are held out, and how often each one is seen.

This is the ground truth of every audit, so it is written to the run: ids, planted copies, and a hash of the
pixels (of a sample of them where the images stay on disk).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from mdiff import config as config_lib
from mdiff.data import captions, ladder
from mdiff.data.disk import DiskImages
from mdiff.data.plant import Planted, as_json, check, from_json, plan, plant
from mdiff.data.source import Images
from mdiff.data.stream import permutation
from mdiff.errors import UserError
from mdiff.files import locate, write_json


@dataclass(frozen=True, eq=False)
class Subset:
    """Training images, held-out images, and what an epoch walks over.

    Attributes:
      train: the n training images, each once, then the planted flips and crops.
      heldout: images that are never trained on: the audit's control.
      slots: int32 [S] indices into `train`; an image with k duplicates occurs k times.
      planted: how the last images of `train` were made.
      templates: families trained on under one caption (`mdiff.data.ladder`).
      tokenizer: of a text model, once its captions are tokens (`mdiff.data.captions`).
    """

    train: Images
    heldout: Images
    slots: np.ndarray
    planted: tuple[Planted, ...] = ()
    templates: tuple[ladder.Template, ...] = ()
    tokenizer: captions.Tokenizer | None = None

    @property
    def copies(self) -> np.ndarray:
        """int [len(train)]: how often each training image is seen in an epoch."""
        return np.bincount(self.slots, minlength=len(self.train))

    @property
    def origin(self) -> np.ndarray:
        """int32 [len(train)]: the id of the source's image that each training image is, or was made from."""
        of = {each.id: each.of for each in self.planted}
        return np.array([of.get(int(i), int(i)) for i in self.train.id], np.int32)


def split(config: config_lib.Data, images: Images) -> Subset:
    """Draws training and held-out images by seed, and plants copies.

    One permutation of the set is drawn from the seed; after `skip` of its images, n are trained on and the next
    `heldout` are held out. So the training images of a smaller n are the first of those of a larger one, and two
    runs that differ in `skip` by n or more share none.

    Where the set knows families (images that are the same but for, say, skin tone), no held-out image may have a
    twin among the training images. Whole families are dealt to the two sides first, by seed and whatever their
    size, in the proportion of n to heldout; then each side's images are drawn. Passing over held-out
    candidates whose family is trained on would leave the large families to the training side, and a
    control with another law is none.

    With config.reading "memory" the drawn images are in memory afterwards, wherever `images` are.

    Args:
      config: uses n, skip, heldout, seed, reading, duplicates, planted_flips and planted_crops; n counts originals.
      images: the whole set.

    Raises:
      UserError: n, heldout or the planted copies do not fit the set.
    """
    total = len(images)
    if config.n < 2:
        raise UserError(f"data.n = {config.n}: too few training images; set data.n to 2 or more")
    if config.heldout < 0:
        raise UserError(f"data.heldout = {config.heldout}: is negative; set data.heldout to 0 or more")
    if config.skip < 0:
        raise UserError(f"data.skip = {config.skip}: is negative; set data.skip to 0 or more")
    total -= config.skip
    less = f" after data.skip = {config.skip}" if config.skip else ""
    if config.n > total:
        raise UserError(
            f"data.n = {config.n}: {images.name!r} has {total} images{less}; set data.n to {total} or fewer"
        )
    if config.n + config.heldout > total:
        raise UserError(
            f"data.n = {config.n} and data.heldout = {config.heldout}: {images.name!r} has {total} images{less}; "
            f"set data.heldout to {total - config.n} or fewer"
        )
    ladder.check(config, images)
    if config.ladder:
        return _climb(config, images)
    order = permutation(config.seed, "split", 0, len(images))
    first, rest = order[config.skip : config.skip + config.n], order[config.skip + config.n :]
    if images.family is not None:
        if config.skip:
            raise UserError(
                f"data.skip = {config.skip}: {images.name!r} has families, whose members could come to both halves; "
                "set data.skip to 0"
            )
        first, rest = _by_family(images.family, order, config)
        for field, wanted, found in (("n", config.n, len(first)), ("heldout", config.heldout, len(rest))):
            if found < wanted:
                raise UserError(
                    f"data.n = {config.n} and data.heldout = {config.heldout}: {images.name!r} has families, and "
                    f"those dealt to this side have {found} images; set data.{field} to {found} or fewer"
                )
        first = first[: config.n]
    in_memory = config.reading == "memory"
    train = _drawn(images, first, in_memory)
    heldout = _drawn(images, rest[: config.heldout], in_memory)
    planted = plan(config, train)
    slots = _slots(config.duplicates, train.id, len(planted))
    return Subset(plant(train, planted), heldout, slots, planted)


def _climb(config: config_lib.Data, images: Images) -> Subset:
    """The training images of a ladder, under their captions, and held-out ones."""
    drawn = ladder.draw(config, images)
    in_memory = config.reading == "memory"
    train = ladder.caption(_drawn(images, drawn.train, in_memory), drawn.templates)
    slots = np.repeat(np.arange(len(drawn.train), dtype=np.int32), drawn.copies)
    return Subset(train, _drawn(images, drawn.heldout, in_memory), slots, (), drawn.templates)


def _by_family(
    family: np.ndarray, order: np.ndarray, config: config_lib.Data
) -> tuple[np.ndarray, np.ndarray]:
    """`order` [N] parted into candidates for training and for holding out, no family on both sides."""
    numbers = np.unique(family)
    dealt = numbers[permutation(config.seed, "families", 0, len(numbers))]
    count = round(len(numbers) * config.n / (config.n + config.heldout))
    trained = np.isin(family[order], dealt[:count])
    return order[trained], order[~trained]


def _drawn(images: Images, places: np.ndarray, in_memory: bool) -> Images:
    taken = images.take(places)
    return replace(taken, x=np.asarray(taken.x)) if in_memory else taken


def _slots(duplicates: dict[int, int], ids: np.ndarray, planted: int) -> np.ndarray:
    """`ids` of the originals, and how many images were planted behind them."""
    place = {int(i): k for k, i in enumerate(ids)}
    copies = np.ones(len(ids) + planted, np.int64)
    for image, count in duplicates.items():
        check("data.duplicates", image, count, set(place))
        copies[place[image]] = count
    return np.repeat(np.arange(len(copies), dtype=np.int32), copies)


def _sha256(images: Images) -> str:
    return hashlib.sha256(np.ascontiguousarray(images.x).tobytes()).hexdigest()


def save_subset(path: str | Path, subset: Subset, config: config_lib.Data) -> None:
    """Writes which images were trained on and held out, as JSON, whole or not at all.

    The hashes are of the pixels, uint8 [n,H,W,C] in C order, in the order of the ids. Images that stay on
    disk are not hashed each: the record holds a fingerprint of their set instead.

    Args:
      path: the file; its folder exists.
      subset: from `split`.
      config: what it was drawn by.

    Raises:
      UserError: the file cannot be written.
    """
    path = locate(path)
    counted = zip(subset.train.id, subset.copies, strict=True)
    climbed = {int(i): int(n) for i, n in counted if n > 1} if config.ladder else {}
    tree: dict[str, Any] = {
        "source": config.source,
        "size": config.size,
        "seed": config.seed,
        "shape": list(subset.train.x.shape[1:]),
        "duplicates": {str(i): copies for i, copies in (config.duplicates or climbed).items()},
        "planted": [as_json(each) for each in subset.planted],
        "templates": [each._asdict() for each in subset.templates],
        "tokenizer": None if subset.tokenizer is None else subset.tokenizer.to_json(),
    }
    on_disk = isinstance(subset.train.x, DiskImages)
    if on_disk:
        tree["fingerprint"] = cast(DiskImages, subset.train.x).fingerprint()
    for name, images in (("train", subset.train), ("heldout", subset.heldout)):
        hashed = {} if on_disk else {"sha256": _sha256(images)}
        tree[name] = {"ids": images.id.tolist(), **hashed, "files": images.files}
    try:
        write_json(path, tree)
    except OSError as error:
        raise UserError(
            f"{str(path)!r}: cannot be written ({error.strerror}); choose a writable workdir with space left"
        ) from error


def load_subset(path: str | Path, images: Images) -> Subset:
    """The subset that `save_subset` recorded, taken from `images` and checked against its hashes.

    Images that were read from disk stay there; all others are in memory afterwards.

    Args:
      path: the file.
      images: the set it was drawn from, loaded with the same source, split and size.

    Raises:
      UserError: no such file, not such a file, or the images are not those it was written for.
    """
    where = repr(str(path))
    damaged = UserError(
        f"{where}: is damaged or another file; delete it and run mdiff train again, which writes it anew"
    )
    try:
        tree = json.loads(locate(path).read_text())
        ids = {name: np.array(tree[name]["ids"], np.int32) for name in ("train", "heldout")}
        fingerprint = tree.get("fingerprint")
        hashes = {} if fingerprint else {name: str(tree[name]["sha256"]) for name in ids}
        duplicates = {int(i): int(copies) for i, copies in tree["duplicates"].items()}
        planted = tuple(from_json(each) for each in tree.get("planted", ()))
        templates = tuple(
            ladder.Template(each["caption"], tuple(map(int, each["ids"])))
            for each in tree.get("templates", ())
        )
        kept = tree.get("tokenizer")
        tokenizer = None if kept is None else captions.from_json(kept)
        source, size = tree["source"], tree["size"]
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read ({error.strerror}); give a workdir of mdiff train"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error

    def other(what: str) -> UserError:
        return UserError(
            f"{where}: {images.name!r} does not hold the recorded {what} images; "
            f"load the source {source!r} at size {size} as it was when this was written"
        )

    if fingerprint and not (isinstance(images.x, DiskImages) and images.x.fingerprint() == fingerprint):
        raise other("set of")
    place = {int(i): k for k, i in enumerate(images.id)}
    made = {each.id for each in planted}
    parts = {}
    for name, wanted in ids.items():
        originals = [int(i) for i in wanted if int(i) not in made]
        if not set(originals) <= place.keys():
            raise other(name)
        parts[name] = _drawn(images, np.array([place[i] for i in originals], np.int64), not fingerprint)
        if name == "train":
            slots = _slots(duplicates, parts[name].id, len(planted))
            try:
                parts[name] = plant(parts[name], planted)
            except (KeyError, ValueError) as error:  # made from no training image, or a window outside it
                raise damaged from error
        if hashes and _sha256(parts[name]) != hashes[name]:
            raise other(name)
    train = ladder.caption(parts["train"], templates)
    return Subset(train, parts["heldout"], slots, planted, templates, tokenizer)

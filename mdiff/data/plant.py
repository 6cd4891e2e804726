"""Planted copies: mirror images and small crops of training images, beside the originals.

In a data set found in the world a copy is another file, so a planted copy is a training image of its own:
it has its own id and, in ambient training, its own noise. Which image it was made from is recorded.
Ids of sources are never negative; planted copies are numbered -1, -2, … and so never meet them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from mdiff import config as config_lib
from mdiff.data.disk import DiskImages
from mdiff.data.source import Images
from mdiff.data.stream import uniforms
from mdiff.errors import UserError

MOST = 100_000
"""Copies of one image that may be planted."""
CROP = (0.85, 0.95)
"""Smallest and largest share of each side that a crop keeps."""


@dataclass(frozen=True)
class Planted:
    """One planted copy.

    Attributes:
      id: its id, negative.
      of: id of the image it was made from.
      kind: mirrored left-right, or a window resized back to the whole.
      box: of a crop, the window (left, top, right, bottom) in pixels, not rounded to whole ones.
    """

    id: int
    of: int
    kind: Literal["flip", "crop"]
    box: tuple[float, float, float, float] | None = None


def plan(config: config_lib.Data, train: Images) -> tuple[Planted, ...]:
    """The copies a config asks for: flips, then crops, each in order of the original's id.

    Windows depend on (data.seed, id of the original, number of the copy) alone.

    Raises:
      UserError: an id is not a training image's, or a count is not 1 or more.
    """
    height, width = train.x.shape[1:3]
    known = {int(i) for i in train.id}
    asked: list[tuple[int, Literal["flip", "crop"], tuple[float, float, float, float] | None]] = []
    for field, kind, counts in (
        ("planted_flips", "flip", config.planted_flips),
        ("planted_crops", "crop", config.planted_crops),
    ):
        for image, count in sorted(counts.items()):
            check(f"data.{field}", image, count, known)
            for number in range(count):
                box = None if kind == "flip" else _window(config.seed, image, number, height, width)
                asked.append((image, cast(Literal["flip", "crop"], kind), box))
    return tuple(Planted(-1 - place, *each) for place, each in enumerate(asked))


def check(field: str, image: int, count: int, known: set[int]) -> None:
    """Raises UserError when `image` is not one of the training ids `known`, or `count` is below 1."""
    if image not in known:
        some = ", ".join(str(i) for i in sorted(known)[:5])
        raise UserError(
            f"{field} = {{{image}: {count}}}: no training image has id {image}; "
            f"training ids are {some}{', …' if len(known) > 5 else ''}"
        )
    if count < 1:
        what = "an image is trained on at least once" if field == "data.duplicates" else "adds no copy"
        raise UserError(f"{field} = {{{image}: {count}}}: {what}; set 1 or more copies")
    if count > MOST:
        raise UserError(f"{field} = {{{image}: {count}}}: more copies than {MOST} of one image; set fewer")


def _window(seed: int, image: int, number: int, height: int, width: int) -> tuple[float, float, float, float]:
    share, left, top = uniforms(seed, "crop", (image, number), 3)
    share = CROP[0] + (CROP[1] - CROP[0]) * share
    left, top = (1 - share) * width * left, (1 - share) * height * top
    return float(left), float(top), float(left + share * width), float(top + share * height)


def copy(image: np.ndarray, planted: Planted) -> np.ndarray:
    """The planted copy of `image`, uint8 [H,W,C] both; crops are resized by Lanczos, as sources are."""
    if planted.kind == "flip":
        return image[:, ::-1]
    height, width, channels = image.shape
    plane = Image.fromarray(image[..., 0] if channels == 1 else image)
    resized = plane.resize((width, height), Image.Resampling.LANCZOS, box=planted.box)
    return np.asarray(resized).reshape(image.shape)


def plant(train: Images, planted: tuple[Planted, ...]) -> Images:
    """`train` followed by the planted copies, which share all but pixels and id with their originals.

    Raises:
      KeyError: a copy is made from an image that is not in `train`.
      ValueError: a window is not inside the image.
    """
    if not planted:
        return train
    place = {int(i): k for k, i in enumerate(train.id)}
    originals = train.take(np.array([place[each.of] for each in planted]))
    copies = np.stack([copy(image, each) for image, each in zip(originals.x, planted, strict=True)])
    on_disk = isinstance(train.x, DiskImages)
    return replace(
        train,
        x=train.x.append(copies) if on_disk else np.concatenate([train.x, copies]),  # type: ignore[attr-defined]
        id=np.concatenate([train.id, np.array([each.id for each in planted], np.int32)]),
        **{
            name: _joined(getattr(train, name), getattr(originals, name))
            for name in ("label", "files", "caption", "family", "vector", "tokens")
        },
    )


def _joined(first: Any, second: Any) -> Any:
    if first is None:
        return None
    return first + second if isinstance(first, tuple) else np.concatenate([first, second])


def as_json(planted: Planted) -> dict[str, Any]:
    """For `subset.json`."""
    tree: dict[str, Any] = {"id": planted.id, "of": planted.of, "kind": planted.kind}
    return tree if planted.box is None else {**tree, "box": list(planted.box)}


def from_json(tree: dict[str, Any]) -> Planted:
    """The inverse of `as_json`.

    Raises:
      KeyError, TypeError, ValueError: it is not such a tree.
    """
    kind, box = tree["kind"], tree.get("box")
    if kind not in ("flip", "crop") or (kind == "crop") != (box is not None):
        raise ValueError(kind)
    corners = None if box is None else cast(tuple[float, float, float, float], tuple(map(float, box)))
    if corners is not None and len(corners) != 4:
        raise ValueError(box)
    return Planted(int(tree["id"]), int(tree["of"]), kind, corners)

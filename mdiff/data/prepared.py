"""Data sets that TFDS has prepared on this machine, under any name; nothing is downloaded.

`tfds build NAME --file_format=array_record` prepares one (most builders need TensorFlow for that, reading
does not). It is looked for in `$TFDS_DATA_DIR`, `~/tensorflow_datasets` and mdiff's own cache.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError
from PIL import Image

from mdiff.data import builders
from mdiff.data.disk import DiskImages, DiskLabels
from mdiff.data.source import NAME, Images, convert, resize
from mdiff.errors import UserError

FORMAT = "array_record"
VERSION = re.compile(r"\d+\.\d+\.\d+")
DAMAGE = (OSError, RuntimeError, ValueError, KeyError, IndexError, ParseError, DecodeError)
IMAGE_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def roots() -> list[Path]:
    """The folders that prepared sets are looked for in, in this order."""
    named = os.environ.get("TFDS_DATA_DIR")
    usual = Path.home() / "tensorflow_datasets"
    return [*([Path(named).expanduser()] if named else []), usual, builders.cache_dir()]


def is_set(folder: Path) -> bool:
    """Does the folder itself hold a prepared set?"""
    return os.path.isfile(folder / "dataset_info.json") and os.path.isfile(folder / "features.json")


def find(name: str, where: str) -> Path | None:
    """The folder of prepared set `name`, "name", "name/config" or either with ":1.0.0"; None if there is none.

    The first of `roots` that has it counts, and there the newest version.

    Raises:
      UserError: the set is there in other configs or versions only, or in several configs.
    """
    parts = NAME.fullmatch(name)
    if parts is None:
        return None
    base, config, version = parts["name"], parts["config"], parts["version"]
    for root in roots():
        held = dict(_held(root / base))
        fits = {key: path for key, path in held.items() if key[0] == (config or key[0])}
        configs = sorted({key[0] for key in fits})
        if len(configs) > 1:
            raise UserError(
                f"{where}: prepared in several configs in {root}; write one of "
                + ", ".join(f"{base}/{each}" for each in configs)
            )
        chosen = [key for key in fits if version in (None, key[1])]
        if chosen:
            return fits[max(chosen, key=lambda key: tuple(map(int, key[1].split("."))))]
        if held:
            there = ", ".join(f"{base}{'/' if key[0] else ''}{key[0]}:{key[1]}" for key in sorted(held))
            raise UserError(f"{where}: not prepared in {root}, which has {there}; write one of these")
    return None


def _held(folder: Path) -> Iterator[tuple[tuple[str, str], Path]]:
    """((config or "", version), folder) of every prepared set below `folder`."""
    for path in _folders(folder):
        if VERSION.fullmatch(path.name) and is_set(path):
            yield ("", path.name), path
        else:
            for below in _folders(path):
                if VERSION.fullmatch(below.name) and is_set(below):
                    yield (path.name, below.name), below


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:  # not there, or closed to us: nothing that could be read
        return []


def load(folder: Path, source: str, size: int | None, split: str, where: str) -> Images:
    """A prepared set whose images stay on disk; ids are positions in the split.

    Images that are not square are cropped to their middle square, then resized to size x size.

    Args:
      folder: holds dataset_info.json.
      source: what the user called it.
      size: pixels along each side; None keeps the images as they are, all of one size.
      split: such as "train" or "train[:10%]".
      where: what error messages start with.

    Raises:
      UserError: no such split, no images in it, not in array_record format, or damaged.
    """
    records = TfdsRecords(folder, source, size, split, where)
    label = cast(np.ndarray, DiskLabels(records)) if records.label else None
    return Images(
        source, cast(np.ndarray, DiskImages(records)), np.arange(len(records), dtype=np.int32), label
    )


class TfdsRecords:
    """The records of a prepared set by position; see `mdiff.data.disk.Records`."""

    def __init__(self, folder: Path, source: str, size: int | None, split: str, where: str) -> None:
        self._where, self._size = where, size
        self._damaged = UserError(
            f"{where}: the prepared set in {folder} is damaged; delete that folder and prepare it anew"
        )
        try:
            with builders.quiet():
                builder = tfds.builder_from_directory(folder)
                info, features = builder.info, builder.info.features
        except (*DAMAGE, TypeError, AttributeError) as error:
            raise self._damaged from error
        command = f"tfds build {info.name} --file_format={FORMAT}"
        found = "no format" if info.file_format is None else info.file_format.value
        if found != FORMAT:
            raise UserError(
                f"{where}: is prepared as {found}, which cannot be read in any order; prepare it anew with "
                f"`{command} --overwrite`"
            )
        self.name, self.version, self.split = info.full_name.rsplit("/", 1)[0], str(info.version), split
        self._image, channels = _image_feature(features, where)
        self.label, self.classes = _label_feature(features)
        try:
            examples = info.splits[split].num_examples
        except (KeyError, ValueError) as error:
            raise UserError(
                f"data.split = {split!r}: {source!r} has the splits {', '.join(info.splits)}; name one of them"
            ) from error
        if examples < 1:
            raise UserError(f"data.split = {split!r}: of {source!r} holds no images; name another split")
        # What is not wanted is left undecoded, except where TFDS cannot leave it (nested features).
        keep = {self._image} if isinstance(features[self._image], tfds.features.Image) else set()
        plain = {k for k, f in features.items() if not isinstance(f, tfds.features.FeaturesDict)}
        skip = {k: tfds.decode.SkipDecoding() for k in plain if k != self._image or k in keep}
        try:
            with builders.quiet():
                self._source = builder.as_data_source(split=split, decoders=skip)
        except DAMAGE as error:
            raise self._damaged from error
        self._channels = channels
        self.shape = cast(tuple[int, int, int], self._decode(0, self._rows(np.array([0]))[0]).shape)

    def __len__(self) -> int:
        return len(self._source)

    def images(self, positions: np.ndarray) -> np.ndarray:
        out = np.empty((len(positions), *self.shape), np.uint8)
        for place, row in enumerate(self._rows(positions)):
            image = self._decode(int(positions[place]), row)
            if image.shape != self.shape:
                height, width = image.shape[:2]
                raise UserError(
                    f"{self._where}: its first image is {self.shape[1]}x{self.shape[0]} pixels and image "
                    f"{positions[place]} is {width}x{height}; give the size to resize them to"
                )
            out[place] = image
        return out

    def labels(self, positions: np.ndarray) -> np.ndarray:
        return np.array([row[self.label] for row in self._rows(positions)], np.int32)

    def _rows(self, positions: np.ndarray) -> list[dict[str, Any]]:
        try:
            return list(self._source.__getitems__([int(p) for p in positions]))
        except DAMAGE as error:
            raise self._damaged from error

    def _decode(self, position: int, row: dict[str, Any]) -> np.ndarray:
        """The image of a record, uint8 [H,W,C] as wanted."""
        stored = row[self._image]
        if isinstance(stored, np.ndarray):
            image = stored
        else:
            # Not TFDS's own decoder: it takes OpenCV where that is installed, with other pixels for a JPEG.
            what = f"record {position}"
            try:
                with Image.open(io.BytesIO(stored)) as opened:
                    image = convert(opened, what, self._where)
            except IMAGE_DAMAGE as error:
                raise UserError(
                    f"{self._where}: {what} holds no readable image; prepare the set anew"
                ) from error
        if image.shape[2] < self._channels:
            image = np.repeat(image, self._channels, axis=2)
        if self._size is None:
            return image
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return resize(image[top : top + side, left : left + side], self._size, self._where)


def _image_feature(features: tfds.features.FeaturesDict, where: str) -> tuple[str, int]:
    """Name of the image feature and its channels, 1 or 3."""
    pictures = {name: f for name, f in features.items() if isinstance(f, tfds.features.Image)}
    if not pictures:  # sets prepared without an encoder hold plain arrays
        pictures = {
            name: f
            for name, f in features.items()
            if type(f) is tfds.features.Tensor
            and f.np_dtype == np.uint8
            and len(f.shape) == 3
            and f.shape[-1] in (1, 3)
        }
    if not pictures:
        raise UserError(
            f"{where}: no images among its features {', '.join(sorted(features))}; name an image set"
        )
    if len(pictures) > 1 and "image" not in pictures:
        raise UserError(
            f"{where}: several images in each example, {', '.join(sorted(pictures))}, and none is called image; "
            "prepare a set with one"
        )
    name = "image" if "image" in pictures else next(iter(pictures))
    return name, 1 if pictures[name].shape[-1] == 1 else 3


def _label_feature(features: tfds.features.FeaturesDict) -> tuple[str, int]:
    """Name of the label feature, or "", and the number of classes, 0 if unknown."""
    classes = {name: f for name, f in features.items() if isinstance(f, tfds.features.ClassLabel)}
    if "label" in classes or len(classes) == 1:
        name = "label" if "label" in classes else next(iter(classes))
        return name, classes[name].num_classes or 0
    if "label" in features:
        other = features["label"]
        whole = type(other) in (tfds.features.Scalar, tfds.features.Tensor) and other.shape == ()
        if whole and np.issubdtype(other.np_dtype, np.integer):
            return "label", 0
    return "", 0

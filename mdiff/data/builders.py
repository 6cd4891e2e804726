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

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from PIL import Image

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


def _png(image: np.ndarray) -> io.BytesIO:
    """One grey image, uint8 [H, W, 1], as PNG; TFDS would encode an array with TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "PNG")
    file.seek(0)
    return file


# TFDS looks for a builder's checksum file through a package it does not declare (importlib_resources,
# tensorflow/datasets#11212). Nothing is downloaded here, so there are no checksums to look for.
_NO_DOWNLOADS = None


class Faces(tfds.core.GeneratorBasedBuilder):
    """100 grey photographs of faces, 25x25."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = _NO_DOWNLOADS

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(shape=(25, 25, 1), encoding_format="png"), "id": np.int32}
        return tfds.core.DatasetInfo(
            builder=self,
            description="The face crops of scikit-image's subset of Labeled Faces in the Wild.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, image in enumerate(faces()):
            yield i, {"image": _png(image), "id": i}


class Digits(tfds.core.GeneratorBasedBuilder):
    """1797 grey handwritten digits, 8x8, with labels."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = _NO_DOWNLOADS

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "id": np.int32,
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Scikit-learn's handwritten digits (test part of the UCI set).",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, (image, label) in enumerate(zip(*digits(), strict=True)):
            yield i, {"image": _png(image), "id": i, "label": int(label)}


BUILDERS: dict[str, type[tfds.core.GeneratorBasedBuilder]] = {"faces": Faces, "digits": Digits}

# sha256 of each set's pixel bytes in order of id: a name means the same pixels on every machine.
PIXELS = {
    "faces": "b3835cf486a325e955b0295b567593a83a960761ef0302b748b7bb050ca20d27",
    "digits": "b41ca9fd335466eee997366c2e6f6bbe0a1b4582afe091fc4eba35f4a254182f",
}


def cache_dir() -> Path:
    """The folder of prepared sets: `$MDIFF_DATA_DIR`, else `~/.cache/mdiff/tfds`."""
    named = os.environ.get("MDIFF_DATA_DIR")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "mdiff" / "tfds"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides TFDS's banner, progress bars and hints; errors still come as exceptions."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def prepare(name: str) -> Path:
    """Prepares built-in set `name` unless it is there, and returns its folder.

    Args:
      name: a key of `BUILDERS`.

    Raises:
      UserError: the cache folder cannot be written.
    """
    root = cache_dir()
    builder = BUILDERS[name]
    final = root / name / str(builder.VERSION)
    if (final / "dataset_info.json").is_file():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".prepare-", dir=root))
        try:
            with _quiet():
                builder(data_dir=scratch, file_format="array_record").download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
            final.parent.mkdir(exist_ok=True)
            _publish(scratch / name / final.name, final)
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


def read(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A built-in set in order of id, prepared on first use.

    Args:
      name: a key of `BUILDERS`.

    Returns:
      Images, uint8 [N, H, W, 1], and labels, int32 [N], or None for a set without labels.

    Raises:
      UserError: the cache folder cannot be written, or what it holds is damaged.
    """
    folder = prepare(name)
    damaged = UserError(
        f"MDIFF_DATA_DIR = {str(cache_dir())!r}: the prepared set in {folder} is damaged; delete that folder"
    )
    try:
        with _quiet():
            source = tfds.builder_from_directory(folder).as_data_source(split="train")
            rows = sorted((source[i] for i in range(len(source))), key=lambda row: row["id"])
    except (OSError, RuntimeError, ValueError, KeyError, ParseError) as error:
        raise damaged from error
    x = np.stack([row["image"] for row in rows])
    if hashlib.sha256(x.tobytes()).hexdigest() != PIXELS[name]:
        raise damaged
    return x, np.array([row["label"] for row in rows], np.int32) if "label" in rows[0] else None

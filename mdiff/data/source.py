"""Images by built-in name, from a folder, an `.npz` file or a prepared TFDS set: one type for all of them."""

from __future__ import annotations

import difflib
import os
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from mdiff.errors import UserError
from mdiff.types import to_uint8

LARGEST = 4096
"""Pixels along a side that images may be resized to."""
BUILTIN = ("faces", "digits", "mnist5k", "emoji")
NAME = re.compile(r"(?P<name>[a-z]\w*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?", re.ASCII)
"""What a TFDS set is called: "cifar10", "imagenet_resized/64x64", "imagenet2012:5.1.0"."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tiff", ".tif")


@dataclass(frozen=True, eq=False)
class Images:
    """A set of images on the host.

    Attributes:
      name: where they came from: a built-in name, a path or a TFDS name.
      x: uint8 [N,H,W,C]; C is 1 (grey) or 3 (RGB). Of a TFDS set it may be a `mdiff.data.disk.DiskImages`,
        which reads what is indexed.
      id: int32 [N], unique, none negative (planted copies, see `mdiff.data.plant`, count down from -1).
      label: int32 [N] classes, or None.
      files: [N] paths below the folder they were read from, or None.
      caption: [N] what each shows, in words, or None.
      family: int32 [N]; images of one number are the same up to a known variation, such as skin tone, and
        every other image has a number of its own. None if nothing is known.
      vector: float32 [N,V], the vector condition of each image, or None.
      tokens: int32 [N,L], the caption as the network reads it (`mdiff.data.captions`), or None.
    """

    name: str
    x: np.ndarray
    id: np.ndarray
    label: np.ndarray | None = None
    files: tuple[str, ...] | None = None
    caption: tuple[str, ...] | None = None
    family: np.ndarray | None = None
    vector: np.ndarray | None = None
    tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: np.ndarray) -> Images:
        """The images at positions `indices` [M], in that order; they keep their ids."""

        def of(column: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if column is None else tuple(column[i] for i in indices)

        return replace(
            self,
            x=self.x.take(indices, axis=0),
            id=self.id[indices],
            label=None if self.label is None else self.label[indices],
            files=of(self.files),
            caption=of(self.caption),
            family=None if self.family is None else self.family[indices],
            vector=None if self.vector is None else self.vector[indices],
            tokens=None if self.tokens is None else self.tokens[indices],
        )


def load(
    source: str,
    size: int | None = None,
    field: str = "data.source",
    *,
    split: str = "train",
    reading: Literal["memory", "disk"] = "memory",
) -> Images:
    """Loads a set of images.

    A folder gives its images in natural order of name (img2 before img10), id = position. If it holds
    none itself but its subfolders do, each subfolder is a class, numbered in natural order. EXIF
    orientation is applied, alpha is composited on white, 16 bits become 8. An `.npz` gives `x`, else
    `images`, else its only array, and optionally `label`, `id`, `family` and `vector`; floats are rounded to
    8 bits. Any other name is that of a TFDS set prepared on this machine, or its folder (see
    `mdiff.data.prepared`): its images are cropped to their middle square, and stay on disk until indexed or
    until `mdiff.data.split` has drawn from them.

    Args:
      source: a name in `BUILTIN`, a folder of images, an `.npz` file, or a prepared TFDS set. Where a folder
        has a built-in name, write ./faces for the folder.
      size: images are resized to size x size by Lanczos, widened when shrinking so that it does not
        alias. It keeps more of the detail that tells near images apart than a box average does, and is
        what EDM's data set tool resizes with (arXiv 2206.00364); its overshoot is clipped to 0..255.
      field: what error messages call `source`.
      split: of a TFDS set, such as "train" or "train[:10%]"; other sources have no split but "train".
      reading: "disk" keeps built-in sets on disk too, and refuses folders and `.npz` files.

    Raises:
      UserError: nothing there, not images, unreadable, of several sizes, to be resized but not square, or
        without the wanted split.
    """
    where = f"{field} = {source!r}"
    if size is not None and size < 1:
        raise UserError(f"{where}: cannot resize to {size}x{size} pixels; set the size to 1 or more")
    if size is not None and size > LARGEST:
        raise UserError(f"{where}: cannot resize to {size}x{size} pixels; set the size to {LARGEST} or less")
    # os.path answers False where pathlib raises: names that are too long, or below a closed folder.
    path = Path(os.path.expanduser(source))
    if source in BUILTIN:
        if os.path.isdir(path):
            raise UserError(f"{where}: a built-in set and a folder here; write ./{source} for the folder")
        _only_train(source, split)
        return _builtin(source, size, reading, where)
    if source and os.path.isfile(path / "dataset_info.json"):
        from mdiff.data import prepared

        return prepared.load(path, source, size, split, where)
    if source and os.path.exists(path):
        _only_train(source, split)
        if reading == "disk":
            raise UserError(
                f"data.reading = 'disk': {source!r} is no TFDS set; set data.reading to memory, or prepare one"
            )
        if os.path.isdir(path):
            return _from_folder(path, source, size, where)
        if not os.path.isfile(path) or path.suffix.lower() != ".npz":
            raise UserError(
                f"{where}: is neither a folder nor an .npz file; give the folder the images are in"
            )
        images = _from_npz(path, source, where)
        return images if size is None else replace(images, x=_resize_all(images.x, size, where))
    return _from_name(source, size, split, where)


def _only_train(source: str, split: str) -> None:
    if split != "train":
        raise UserError(f"data.split = {split!r}: {source!r} has no splits; set data.split to train")


def _builtin(source: str, size: int | None, reading: str, where: str) -> Images:
    # TFDS takes half a second to import; folders and .npz files do without.
    from mdiff.data import builders

    columns = builders.read(source, size)
    x = columns.pop("x")
    ids = np.arange(len(x), dtype=np.int32)
    if reading == "memory":
        return Images(source, x if size is None else _resize_all(x, size, where), ids, **columns)
    from mdiff.data import prepared

    folder = builders.prepare(source, builders.config_name(source, size))
    on_disk = prepared.load(folder, source, size, "train", where).x
    return Images(source, on_disk.take(builders.places(folder), axis=0), ids, **columns)


def _from_name(source: str, size: int | None, split: str, where: str) -> Images:
    """A TFDS set by name, or the error that nothing has this name."""
    near = difflib.get_close_matches(source, BUILTIN, n=1)
    hints = [f"did you mean {near[0]!r}?" if near else f"built-in sets are {', '.join(BUILTIN)}"]
    if NAME.fullmatch(source):
        from mdiff.data import prepared

        folder = prepared.find(source, where)
        if folder is not None:
            return prepared.load(folder, source, size, split, where)
        looked = ", ".join(str(root) for root in prepared.roots())
        hints.append(
            f"for a TFDS set run `tfds build {source} --file_format={prepared.FORMAT}` (looked in {looked})"
        )
    raise UserError(
        f"{where}: no such folder, .npz file, built-in set or prepared TFDS set; {'; '.join(hints)}"
    )


def _resize_all(x: np.ndarray, size: int, where: str) -> np.ndarray:
    return np.stack([resize(image, size, where) for image in x])


def resize(image: np.ndarray, size: int, where: str) -> np.ndarray:
    """uint8 [H,W,C], H = W, to [size,size,C] by Lanczos; errors start with `where`."""
    height, width, channels = image.shape
    if height != width:
        raise UserError(
            f"{where}: its images are {width}x{height} pixels; crop them square to get {size}x{size}"
        )
    if height == size:
        return image
    plane = Image.fromarray(image[..., 0] if channels == 1 else image)
    return np.asarray(plane.resize((size, size), Image.Resampling.LANCZOS)).reshape(size, size, channels)


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _image_files(folder: Path) -> list[Path]:
    files = (f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    return sorted((f for f in files if f.is_file()), key=_natural)


def _from_folder(folder: Path, source: str, size: int | None, where: str) -> Images:
    try:
        files, label = _image_files(folder), None
        subfolders = (f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
        classes = [found for sub in sorted(subfolders, key=_natural) if (found := _image_files(sub))]
        if files and classes:
            raise UserError(
                f"{where}: has {len(files)} images of its own and {sum(map(len, classes))} in subfolders such as "
                f"{classes[0][0].parent.name!r}; give a folder with one or the other"
            )
        if classes:
            files = [file for found in classes for file in found]
            label = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found) for found in classes])
    except OSError as error:
        raise UserError(f"{where}: cannot be listed ({error.strerror}); check its permissions") from error
    if not files:
        raise UserError(
            f"{where}: no images in this folder; put {', '.join(s[1:] for s in SUFFIXES)} files there"
        )
    arrays: list[np.ndarray] = []
    first = (0, 0)
    for file in files:
        image = _read_image(file, where)
        height, width = image.shape[:2]
        first = first if arrays else (width, height)
        if (width, height) != first:
            raise UserError(
                f"{where}: {_below(files[0], folder)!r} is {first[0]}x{first[1]} pixels and "
                f"{_below(file, folder)!r} is {width}x{height}; resize them to one size"
            )
        arrays.append(image if size is None else resize(image, size, where))
    channels = max(image.shape[2] for image in arrays)
    x = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in arrays])
    names = tuple(_below(file, folder) for file in files)
    return Images(source, x, np.arange(len(x), dtype=np.int32), label, names)


def _below(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _read_image(file: Path, where: str) -> np.ndarray:
    """One file as uint8 [H,W,1] if it is grey, else [H,W,3]."""
    try:
        with Image.open(file) as opened:
            # An MPO is a photograph with previews behind it; any other file of several frames is ambiguous.
            frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
            if frames > 1:
                raise UserError(f"{where}: {file.name!r} holds {frames} frames; save one image per file")
            return convert(ImageOps.exif_transpose(opened), file.name, where)
    # What Pillow raises for damaged files depends on the format's decoder; OSError covers most of them.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise UserError(
            f"{where}: {file.name!r} cannot be read ({_reason(error)}); replace or delete it"
        ) from error


def convert(image: Image.Image, name: str, where: str) -> np.ndarray:
    """A Pillow image as uint8 [H,W,1] if it is grey, else [H,W,3]; errors call it `name`."""
    if image.mode == "F":
        raise UserError(f"{where}: {name!r} holds floats; save it as 8-bit, or the whole set as .npz")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise UserError(
                f"{where}: {name!r} has grey values {wide.min()}..{wide.max()}; save it as 8 or 16 bits"
            )
        return np.round(wide / 257).astype(np.uint8)[..., None]
    # A palette says nothing about colour; whether it is grey shows in the pixels.
    grey, palette = image.mode in ("1", "L", "LA", "La"), image.mode.startswith("P")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    pixels = np.asarray(image.convert("RGB"))
    if grey or (palette and (pixels == pixels[..., :1]).all()):
        return pixels[..., :1]
    return pixels


def _from_npz(path: Path, source: str, where: str) -> Images:
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise UserError(f"{where}: is a single array; save it with np.savez(path, x=images)")
        with opened as arrays:
            content = {name: np.asarray(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{where}: cannot be read ({_reason(error)}); save it anew with np.savez(path, x=images)"
        ) from error
    x = _pixels(_main_array(content, where), where)
    label, ids = content.get("label"), content.get("id")
    if label is not None:
        label = _integers(label, len(x), "label", where)
    ids = np.arange(len(x), dtype=np.int32) if ids is None else _integers(ids, len(x), "id", where)
    if len(np.unique(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise UserError(
            f"{where}: id {values[counts > 1][0]} occurs more than once; make the array id unique"
        )
    family, vector = content.get("family"), content.get("vector")
    if family is not None:
        family = _integers(family, len(x), "family", where)
    if vector is not None:
        vector = _vectors(vector, len(x), where)
    return Images(source, x, ids, label, family=family, vector=vector)


def _main_array(content: dict[str, np.ndarray], where: str) -> np.ndarray:
    others = [name for name in content if name not in ("label", "id", "family", "vector")]
    for name in ("x", "images", *(others if len(others) == 1 else ())):
        if name in content:
            return content[name]
    raise UserError(f"{where}: holds arrays {sorted(content)}; name the one with the images x")


def _pixels(x: np.ndarray, where: str) -> np.ndarray:
    """uint8 [N,H,W,C] from uint8 or float [N,H,W] or [N,H,W,C]."""
    shape = x.shape
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise UserError(f"{where}: images of shape {shape}; save [N,H,W], [N,H,W,1] or [N,H,W,3]")
    if 0 in shape:
        raise UserError(f"{where}: images of shape {shape} are empty; save at least one image")
    if x.dtype == np.uint8:
        return x
    if not np.issubdtype(x.dtype, np.floating):
        raise UserError(f"{where}: images of type {x.dtype}; save uint8 or scale to [-1, 1]")
    if not np.isfinite(x).all():
        raise UserError(f"{where}: images with NaN or infinite pixels; remove those images")
    low, high = float(x.min()), float(x.max())
    if low < -1 or high > 1 or low >= 0:
        raise UserError(f"{where}: {x.dtype} images in [{low:g}, {high:g}]; save uint8 or scale to [-1, 1]")
    return to_uint8(x)


def _integers(values: np.ndarray, n: int, name: str, where: str) -> np.ndarray:
    """int32 [n], none negative."""
    if values.shape != (n,) or not np.issubdtype(values.dtype, np.integer):
        raise UserError(
            f"{where}: array {name} has shape {values.shape} and type {values.dtype}; save {n} integers"
        )
    if values.min() < 0 or values.max() > np.iinfo(np.int32).max:
        raise UserError(
            f"{where}: array {name} is in {values.min()}..{values.max()}; save values in 0..2**31-1"
        )
    return values.astype(np.int32)


def _vectors(values: np.ndarray, n: int, where: str) -> np.ndarray:
    """float32 [n,V], all finite."""
    if values.ndim != 2 or len(values) != n or not values.shape[1] or values.dtype.kind not in "fiu":
        raise UserError(
            f"{where}: array vector has shape {values.shape} and type {values.dtype}; save floats [{n},V]"
        )
    with np.errstate(over="ignore"):
        out = values.astype(np.float32)
    if not np.isfinite(out).all():
        raise UserError(f"{where}: array vector has values that are no finite float32; remove those images")
    return out


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

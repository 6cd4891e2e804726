"""Images from folders and `.npz` files, and how they are resized."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import noise_images, one_line
from PIL import Image

from mdiff.data.source import load
from mdiff.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MDIFF_DATA_DIR", str(folder))
        yield folder


# Folders and .npz files


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_round_trip(tmp_path, channels):
    x = noise_images(12, 5, 7, channels)
    for i, image in enumerate(x):
        Image.fromarray(image.squeeze()).save(tmp_path / f"img{i}.{'PNG' if i % 2 else 'bmp'}")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._img0.png").write_text("left behind by a Mac")
    images = load(str(tmp_path))
    np.testing.assert_array_equal(images.x, x)
    assert images.files is not None
    assert images.files[9:11] == ("img9.PNG", "img10.bmp")
    assert images.label is None
    taken = images.take(np.array([10, 2]))
    assert taken.files == ("img10.bmp", "img2.bmp")
    np.testing.assert_array_equal(taken.id, [10, 2])
    np.testing.assert_array_equal(taken.x, x[[10, 2]])


def test_subfolders_are_classes(tmp_path):
    x = noise_images(5, 4, 4, 1)
    for i, name in enumerate(["c10/a", "c2/b", "c2/a10", "c2/a9", "c10/b"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(x[i, ..., 0]).save(tmp_path / f"{name}.png")
    (tmp_path / "empty").mkdir()
    images = load(str(tmp_path))
    assert images.files == ("c2/a9.png", "c2/a10.png", "c2/b.png", "c10/a.png", "c10/b.png")
    np.testing.assert_array_equal(images.x, x[[3, 2, 1, 0, 4]])
    assert images.label is not None
    np.testing.assert_array_equal(images.label, [0, 0, 0, 1, 1])
    Image.fromarray(x[0, ..., 0]).save(tmp_path / "top.png")
    with pytest.raises(UserError, match=r"1 images of its own and 5 in subfolders such as 'c2'"):
        load(str(tmp_path))  # dropping either kind in silence would falsify a denominator


def test_kinds_of_pixels(tmp_path):
    """Each kind of file against the pixels it was made from by hand."""
    grey = noise_images(1, 6, 6)[0]

    def only(image: Image.Image, suffix: str = "png", **options) -> np.ndarray:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        image.save(folder / f"a.{suffix}", **options)
        return load(str(folder)).x[0]

    wide = grey.astype(np.uint16) * 257
    wide[0, 0], wide[0, 1] = 65535, 128  # 128 / 257 rounds to 0, 129 / 257 to 1
    wide[0, 2] = 129
    expected = grey.copy()
    expected[0, :3] = 255, 0, 1
    for suffix in ("png", "tiff"):
        np.testing.assert_array_equal(only(Image.fromarray(wide), suffix)[..., 0], expected)
    np.testing.assert_array_equal(only(Image.fromarray(grey), "gif")[..., 0], grey)
    bits = Image.fromarray(np.where(grey > 127, 255, 0).astype(np.uint8)).convert("1")
    np.testing.assert_array_equal(only(bits)[..., 0], np.where(grey > 127, 255, 0))
    # Alpha a over white: (a v + (255 - a) 255) / 255.
    alpha = noise_images(1, 6, 6, seed=1)[0].astype(float)
    over = (alpha * grey + (255 - alpha) * 255) / 255
    la = only(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha.astype(np.uint8))]))
    assert la.shape == (6, 6, 1)
    assert np.abs(la[..., 0] - over).max() <= 1
    rgba = only(Image.merge("RGBA", [Image.fromarray(grey)] * 3 + [Image.fromarray(alpha.astype(np.uint8))]))
    assert rgba.shape == (6, 6, 3)
    assert np.abs(rgba - over[..., None]).max() <= 1
    # A palette of two colours, and one of two greys.
    for colours, channels in (([255, 0, 0, 0, 0, 255], 3), ([9, 9, 9, 200, 200, 200], 1)):
        indexed = Image.fromarray((grey > 127).astype(np.uint8)).convert("P")
        indexed.putpalette(colours)
        shown = np.array(colours, np.uint8).reshape(2, 3)[(grey > 127).astype(int)]
        np.testing.assert_array_equal(only(indexed), shown[..., :channels])
    # EXIF orientation 6: shown after a quarter turn clockwise.
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(only(Image.fromarray(grey), exif=exif)[..., 0], np.rot90(grey, -1))


def test_grey_beside_colour_becomes_rgb(tmp_path):
    grey, colour = noise_images(1, 4, 4)[0], noise_images(1, 4, 4, 3)[0]
    Image.fromarray(grey).save(tmp_path / "1.png")
    Image.fromarray(colour).save(tmp_path / "2.png")
    x = load(str(tmp_path)).x
    np.testing.assert_array_equal(x[0], np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(x[1], colour)


def test_npz_round_trip(tmp_path):
    x, label, ids = noise_images(4, 5, 6, 3), np.array([1, 0, 1, 2]), np.array([7, 3, 9, 100])
    np.savez(tmp_path / "a.npz", x=x, label=label, id=ids, other=np.zeros(3))
    images = load(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(images.x, x)
    np.testing.assert_array_equal(images.label, label)
    np.testing.assert_array_equal(images.id, ids)
    assert images.id.dtype == np.int32
    assert len(images) == 4
    vector, family = np.arange(8).reshape(4, 2), np.array([5, 5, 1, 0])
    np.savez(tmp_path / "a.npz", x, vector=vector, family=family)
    images = load(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(images.vector, vector)
    assert images.vector.dtype == np.float32
    np.testing.assert_array_equal(images.family, family)
    np.savez(tmp_path / "b.npz", images=x[..., 0])
    np.testing.assert_array_equal(load(str(tmp_path / "b.npz")).x, x[..., :1])
    np.savez_compressed(tmp_path / "c.npz", x[..., 0] / 127.5 - 1)
    np.testing.assert_array_equal(load(str(tmp_path / "c.npz")).x, x[..., :1])


def lanczos(n: int, size: int) -> np.ndarray:
    """[size, n] weights of the Lanczos-3 kernel widened by n / size, in float64 from its definition."""
    scale = n / size
    widen = max(scale, 1.0)
    distance = (np.arange(n)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / widen
    weight = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weight / weight.sum(1, keepdims=True)


@pytest.mark.parametrize(("name", "size"), [("faces", 16), ("digits", 16)])
def test_resize_is_antialiased_lanczos(name, size):
    small, full = load(name, size), load(name)
    some = full.x[:20, ..., 0].astype(np.float64)
    rows = lanczos(some.shape[1], size)
    # Pillow rounds and clips to 8 bits between its two passes as well.
    truth = np.clip(some @ rows.T, 0, 255)
    truth = np.clip(np.einsum("sh,nhw->nsw", rows, truth), 0, 255)
    assert small.x.shape == (len(full), size, size, 1)
    assert np.abs(small.x[:20, ..., 0] - truth).max() < 2.5
    np.testing.assert_array_equal(small.id, full.id)


def test_folder_is_resized_like_an_npz(tmp_path):
    x = noise_images(3, 9, 9, 3)
    for i, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    np.savez(tmp_path / "a.npz", x=x)
    np.testing.assert_array_equal(load(str(tmp_path), 4).x, load(str(tmp_path / "a.npz"), 4).x)


def test_bad_sources(tmp_path):
    with one_line("data.source = 'fcaes'", "did you mean 'faces'?"):
        load("fcaes")
    with one_line("--train = '/no/such/place'", "faces, digits"):
        load("/no/such/place", field="--train")
    for odd in ("", "~nobody/x", "x" * 5000, "line\nbreak", "nul\0byte"):
        with one_line("data.source = ", "no such folder"):
            load(odd)
    (tmp_path / "a.txt").write_text("hello")
    with one_line(repr(str(tmp_path / "a.txt")), "neither a folder nor an .npz"):
        load(str(tmp_path / "a.txt"))
    with one_line(repr(str(tmp_path)), "no images in this folder", "png"):
        load(str(tmp_path))
    with one_line("data.source = 'faces'", "0x0"):
        load("faces", 0)


def test_bad_folders(tmp_path):
    def folder(**files: np.ndarray | bytes) -> str:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        for name, content in files.items():
            if isinstance(content, bytes):
                (place / f"{name}.png").write_bytes(content)
            else:
                Image.fromarray(content).save(place / f"{name}.png")
        return str(place)

    grey = noise_images(1, 32, 32)[0]
    place = folder(a=grey, b=grey[:, :20])
    with one_line(repr(place), "'a.png' is 32x32", "'b.png' is 20x32"):
        load(place)
    place = folder(a=grey[:, :20])
    assert load(place).x.shape == (1, 32, 20, 1)
    with one_line(repr(place), "20x32", "16x16", "square"):
        load(place, 16)
    whole = io.BytesIO()
    Image.fromarray(grey).save(whole, "PNG")
    for content in (b"", b"text", whole.getvalue()[:300]):
        place = folder(a=grey, b=content)
        with one_line(repr(place), "'b.png' cannot be read"):
            load(place)
    place = Path(folder())
    Image.fromarray(grey).save(place / "a.gif", save_all=True, append_images=[Image.fromarray(grey.T)])
    with one_line("'a.gif' holds 2 frames", "one image per file"):
        load(str(place))
    place = Path(folder())
    Image.fromarray(grey.astype(np.float32)).save(place / "a.tiff")
    with one_line("'a.tiff' holds floats"):
        load(str(place))
    place = Path(folder())
    Image.fromarray(grey.astype(np.int32) * 1000).save(place / "a.tiff")
    with one_line("'a.tiff' has grey values"):
        load(str(place))


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x": np.zeros((3, 4), np.uint8)}, ["(3, 4)", "[N,H,W]"]),
        ({"x": np.zeros((3, 4, 4, 2), np.uint8)}, ["(3, 4, 4, 2)"]),
        ({"x": np.zeros((3, 3, 8, 8), np.uint8)}, ["(3, 3, 8, 8)"]),
        ({"x": np.zeros((0, 4, 4), np.uint8)}, ["(0, 4, 4)", "at least one"]),
        ({"x": np.zeros((3, 4, 4), np.int64)}, ["int64", "save uint8 or scale to [-1, 1]"]),
        ({"x": np.zeros((3, 4, 4), bool)}, ["bool", "save uint8"]),
        ({"x": np.linspace(0, 1, 48).reshape(3, 4, 4)}, ["[0, 1]", "save uint8 or scale to [-1, 1]"]),
        ({"x": np.linspace(-1, 1.01, 48).reshape(3, 4, 4)}, ["[-1, 1.01]", "save uint8 or scale"]),
        ({"x": np.full((3, 4, 4), np.nan)}, ["NaN or infinite"]),
        ({"x": np.full((3, 4, 4), -np.inf)}, ["NaN or infinite"]),
        ({"a": np.zeros((3, 4, 4), np.uint8), "b": np.zeros(3)}, ["['a', 'b']", "name the one"]),
        ({}, ["holds arrays []"]),
        ({"x": np.array([None, 1], object)}, ["cannot be read", "np.savez"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "id": np.array([1, 5, 5])}, ["id 5 occurs more than once"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "id": np.array([1, 2])}, ["array id", "(2,)", "3 integers"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "id": np.array([1, 2, 2**31])}, ["array id", "2147483648"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "label": np.zeros(3)}, ["array label", "float64"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "family": np.zeros(2, int)}, ["array family", "(2,)"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "vector": np.zeros(3)}, ["array vector", "(3,)", "[3,V]"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "vector": np.zeros((3, 0))}, ["array vector", "(3, 0)"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "vector": np.full((3, 2), "a")}, ["array vector", "<U1"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "vector": np.full((3, 2), 1e300)}, ["array vector", "finite"]),
        ({"x": np.zeros((3, 4, 4), np.uint8), "label": np.array([0, -1, 0])}, ["array label", "-1..0"]),
    ],
)
def test_bad_npz(tmp_path, arrays, parts):
    path = str(tmp_path / "a.npz")
    np.savez(path, **arrays)
    with one_line("data.source = ", repr(path), *parts):
        load(path)


def test_damaged_files_are_user_errors(tmp_path):
    """Cuts and flipped bits anywhere: the file still loads, or one line says that it does not."""
    rng = np.random.default_rng(0)
    archive, picture = io.BytesIO(), io.BytesIO()
    np.savez_compressed(archive, x=noise_images(2, 4, 4), id=np.array([4, 5]))
    Image.fromarray(noise_images(1, 16, 16, 3)[0]).save(picture, "JPEG")
    (tmp_path / "pictures").mkdir()
    messages = []
    for whole, file, place in (
        (archive.getvalue(), tmp_path / "a.npz", tmp_path / "a.npz"),
        (picture.getvalue(), tmp_path / "pictures" / "a.jpg", tmp_path / "pictures"),
    ):
        for trial in range(150):
            broken = bytearray(whole)
            broken[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            file.write_bytes(broken[: rng.integers(len(whole))] if trial % 3 == 0 else broken)
            try:
                load(str(place))
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 60
    assert not [message for message in messages if "\n" in message]
    np.save(tmp_path / "b.npy", noise_images(2, 4, 4))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with one_line("single array", "np.savez"):
        load(str(tmp_path / "b.npz"))
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as file:
        file.writestr("x", b"not an array")
    with one_line("shape ()"):
        load(str(tmp_path / "c.npz"))

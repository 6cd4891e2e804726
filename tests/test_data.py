"""Sources, subsets, the batch as a function of (seed, step), and the one noisy copy of each image."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from mdiff import keys
from mdiff.config import Data
from mdiff.data import builders, degrade, source, stream
from mdiff.data.source import Images, load
from mdiff.data.split import load_subset, save_subset, split
from mdiff.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MDIFF_DATA_DIR", str(folder))
        yield folder


@contextlib.contextmanager
def one_line(*parts: str):
    """Expects a UserError of one line that holds every part."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def noise_images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def image_set(n: int, *shape: int) -> Images:
    return Images("made", noise_images(n, *(shape or (4, 4, 1))), np.arange(n, dtype=np.int32))


def python(code: str, *args: str, env: dict[str, str] | None = None, wait: bool = True):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# Built-in sets


def test_digits_are_sklearns():
    from sklearn.datasets import load_digits

    digits = load("digits")
    truth = load_digits()
    assert digits.x.shape == (1797, 8, 8, 1)
    assert digits.x.dtype == np.uint8
    assert digits.x.max() == 255
    np.testing.assert_array_equal(np.round(digits.x[..., 0] / 255 * 16), truth.images)
    np.testing.assert_array_equal(digits.label, truth.target)
    np.testing.assert_array_equal(digits.id, np.arange(1797))


def test_faces_are_the_first_hundred_crops():
    import skimage

    faces = load("faces")
    truth = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")
    assert faces.x.shape == (100, 25, 25, 1)
    assert faces.label is None
    assert np.abs(faces.x[..., 0] / 255.0 - truth[:100]).max() <= 0.5 / 255 + 1e-9
    # The crops are aligned, so faces look like their mean; the other hundred crops of the file do not.
    mean = truth[:100].mean(0).ravel()
    likeness = np.array([np.corrcoef(crop.ravel(), mean)[0, 1] for crop in truth])
    assert np.median(likeness[:100]) > 0.5
    assert np.median(likeness[100:]) < 0.2


def test_no_tensorflow_and_no_chatter(tmp_path):
    code = (
        "import sys\n"
        "class Spy:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'tensorflow': print('asked for', name)\n"
        "sys.meta_path.insert(0, Spy())\n"
        "from mdiff.data import source, stream, split\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "for _ in range(2): assert len(source.load('faces')) == 100\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'tensorflow']\n"
    )
    status, out, err = python(code, env={"MDIFF_DATA_DIR": str(tmp_path / "new" / "cache")})
    assert (status, out, err) == (0, "", "")
    assert sorted(p.name for p in (tmp_path / "new" / "cache").iterdir()) == ["faces"]


READ = """
import hashlib, pathlib, sys, time
from mdiff.data import builders
ready = pathlib.Path(sys.argv[1])
(ready / sys.argv[2]).touch()
while len(list(ready.iterdir())) < 2: time.sleep(0.002)
print(hashlib.sha256(builders.read("digits")[0].tobytes()).hexdigest())
"""


def test_two_processes_prepare_at_once(tmp_path):
    (tmp_path / "ready").mkdir()
    env = {"MDIFF_DATA_DIR": str(tmp_path / "cache")}
    pair = [python(READ, str(tmp_path / "ready"), name, env=env, wait=False) for name in "ab"]
    results = [process.communicate(timeout=120) for process in pair]
    digest = hashlib.sha256(builders.digits()[0].tobytes()).hexdigest()
    assert [out.strip() for out, _ in results] == [digest, digest], results
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["digits"]


def test_second_to_finish_keeps_the_first(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "who").write_text(folder.name)
    builders._publish(second, first)
    assert (first / "who").read_text() == "first"


def test_killed_while_preparing(tmp_path, monkeypatch):
    code = (
        "import os, signal\n"
        "from mdiff.data import builders\n"
        "png, calls = builders._png, []\n"
        "def kill(image):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 50: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return png(image)\n"
        "builders._png = kill\n"
        "builders.read('faces')\n"
    )
    status, _, _ = python(code, env={"MDIFF_DATA_DIR": str(tmp_path)})
    assert status == -9
    assert not (tmp_path / "faces").exists()
    monkeypatch.setenv("MDIFF_DATA_DIR", str(tmp_path))
    assert len(load("faces")) == 100


@pytest.mark.parametrize("damage", ["truncate", "delete", "json", "other pixels"])
def test_damaged_cache(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("MDIFF_DATA_DIR", str(tmp_path))
    folder = builders.prepare("faces")
    (record,) = folder.glob("*.array_record*")
    if damage == "truncate":
        os.truncate(record, 100_000)
    elif damage == "delete":
        record.unlink()
    elif damage == "json":
        (folder / "dataset_info.json").write_text('{"na')
    else:
        monkeypatch.setitem(builders.PIXELS, "faces", "0" * 64)
    with one_line("MDIFF_DATA_DIR", str(folder), "delete that folder"):
        load("faces")


@pytest.mark.parametrize("place", ["/proc/mdiff", "file/below"])
def test_unwritable_cache(tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    folder = str(tmp_path / place)  # an absolute place stays as it is
    monkeypatch.setenv("MDIFF_DATA_DIR", folder)
    with one_line("MDIFF_DATA_DIR", folder, "set MDIFF_DATA_DIR to a folder you can write to"):
        load("faces")


def test_prepared_cache_needs_no_writing(cache, monkeypatch):
    load("faces")
    monkeypatch.setattr(builders.tempfile, "mkdtemp", lambda **_: pytest.fail("wrote to the cache"))
    assert len(load("faces")) == 100


def test_cache_dir(monkeypatch):
    monkeypatch.delenv("MDIFF_DATA_DIR")
    monkeypatch.setenv("HOME", "/somewhere")
    assert builders.cache_dir() == Path("/somewhere/.cache/mdiff/tfds")


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


# Subsets


def test_split_is_stable_disjoint_and_seeded():
    images = image_set(200)
    small = split(Data(n=50, heldout=20), images)
    large = split(Data(n=60, heldout=140), images)
    np.testing.assert_array_equal(small.train.id, large.train.id[:50])
    np.testing.assert_array_equal(small.heldout.id[:10], large.train.id[50:])
    assert sorted([*large.train.id, *large.heldout.id]) == list(range(200))
    np.testing.assert_array_equal(large.train.x, images.x[large.train.id])
    np.testing.assert_array_equal(large.slots, np.arange(60))
    other = split(Data(n=60, heldout=0, seed=1), images)
    assert len(other.heldout) == 0
    # Two independent draws of 60 from 200 share 18 on average (hypergeometric, s.d. 3.0).
    assert len(set(other.train.id) & set(large.train.id)) < 33


def test_split_draws_every_image_equally_often():
    images = image_set(10)
    counts = np.zeros(10)
    for seed in range(500):
        counts[split(Data(n=3, heldout=0, seed=seed), images).train.id] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_bad_splits():
    images = image_set(20)
    with one_line("data.n = 21", "20 images", "set data.n to 20"):
        split(Data(n=21, heldout=0), images)
    with one_line("data.n = 15", "data.heldout = 6", "20 images", "set data.heldout to 5"):
        split(Data(n=15, heldout=6), images)
    with one_line("data.n = 1"):
        split(Data(n=1, heldout=0), images)
    with one_line("data.heldout = -1"):
        split(Data(n=4, heldout=-1), images)
    chosen = split(Data(n=4, heldout=4), images)
    unseen, seen = int(chosen.heldout.id[0]), int(chosen.train.id[0])
    with one_line(f"data.duplicates = {{{unseen}: 2}}", str(min(chosen.train.id))):
        split(Data(n=4, heldout=4, duplicates={unseen: 2}), images)
    for copies in (0, -3):
        with one_line(f"data.duplicates = {{{seen}: {copies}}}", "1 or more"):
            split(Data(n=4, heldout=4, duplicates={seen: copies}), images)


def test_subset_record(tmp_path):
    images = image_set(30)
    first, second = (int(i) for i in split(Data(n=10, heldout=5), images).train.id[:2])
    config = Data(n=10, heldout=5, duplicates={first: 4, second: 1})
    subset = split(config, images)
    path = tmp_path / "subset.json"
    save_subset(path, subset, config)
    assert [p.name for p in tmp_path.iterdir()] == ["subset.json"]
    tree = json.loads(path.read_text())
    assert tree["train"]["ids"] == subset.train.id.tolist()
    pixels = b"".join(images.x[i].tobytes() for i in subset.heldout.id)
    assert tree["heldout"]["sha256"] == hashlib.sha256(pixels).hexdigest()
    assert tree["duplicates"] == {str(first): 4, str(second): 1}
    assert tree["source"] == "faces"
    again = load_subset(path, images)
    for name in ("train", "heldout"):
        np.testing.assert_array_equal(getattr(again, name).x, getattr(subset, name).x)
        np.testing.assert_array_equal(getattr(again, name).id, getattr(subset, name).id)
    np.testing.assert_array_equal(again.slots, subset.slots)
    changed = images.x.copy()
    changed[subset.heldout.id[2], 0, 0, 0] ^= 1
    with one_line("subset.json", "heldout", "'faces'"):
        load_subset(path, Images("made", changed, images.id))
    with one_line("subset.json", "train"):
        load_subset(path, images.take(np.arange(3)))
    for text in ("", "[]", "{}", '{"train": {"ids": ["a"]}}', path.read_text()[:100]):
        (tmp_path / "bad.json").write_text(text)
        with one_line("bad.json", "damaged or another file"):
            load_subset(tmp_path / "bad.json", images)
    with one_line("none.json", "cannot be read"):
        load_subset(tmp_path / "none.json", images)
    with one_line("/proc/subset.json", "cannot be written"):
        save_subset("/proc/subset.json", subset, config)


# Batches


@pytest.mark.parametrize(("n", "batch"), [(7, 3), (7, 7), (5, 13), (50, 32), (2, 1)])
def test_epochs_cover_every_slot_once(n, batch):
    slots = np.arange(n, dtype=np.int32)
    walk = np.concatenate([stream.indices(3, step, batch, slots) for step in range(4 * n)])
    assert walk.dtype == np.int32
    epochs = walk[: len(walk) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.broadcast_to(slots, epochs.shape))
    if n > 7:
        assert len(np.unique(epochs, axis=0)) == len(epochs)


def test_batches_are_a_function_of_seed_and_step():
    slots = np.arange(11, dtype=np.int32)
    there = [stream.indices(5, step, 4, slots) for step in range(20)]
    stream._epoch.cache_clear()
    for step in reversed(range(20)):
        np.testing.assert_array_equal(stream.indices(5, step, 4, slots), there[step])
    # Position, not batch, is what counts: two batches of 4 are one of 8.
    np.testing.assert_array_equal(stream.indices(5, 3, 8, slots), np.concatenate(there[6:8]))
    assert (
        np.concatenate([stream.indices(6, s, 4, slots) for s in range(20)]) != np.concatenate(there)
    ).any()
    late = stream.indices(5, 10**9, 4, slots)
    np.testing.assert_array_equal(late, stream.indices(5, 10**9, 4, slots))


def test_every_order_is_equally_likely():
    """All 24 orders of four slots, over epochs and over seeds, and no memory of the epoch before."""
    by_epoch = [stream.permutation(0, "epoch", epoch, 4) @ [1, 4, 16, 64] for epoch in range(2400)]
    by_seed = [stream.permutation(seed, "epoch", 0, 4) @ [1, 4, 16, 64] for seed in range(2400)]
    for drawn in (by_epoch, by_seed):
        orders, counts = np.unique(drawn, return_counts=True)
        assert len(orders) == 24
        assert stats.chisquare(counts).pvalue > 1e-3
    repeats = int(np.sum(np.array(by_epoch[1:]) == np.array(by_epoch[:-1])))
    assert stats.binomtest(repeats, 2399, 1 / 24).pvalue > 1e-3
    # Training batches and the draw of the subset never share an order.
    assert (stream.permutation(0, "epoch", 0, 50) != stream.permutation(0, "split", 0, 50)).any()


def test_planted_duplicates_are_seen_as_often_as_planted():
    images = image_set(20)
    a, b = (int(i) for i in split(Data(n=6, heldout=6), images).train.id[[1, 4]])
    subset = split(Data(n=6, heldout=6, duplicates={a: 5, b: 3}), images)
    assert len(subset.slots) == 6 + 4 + 2
    walk = np.concatenate([stream.indices(0, step, 8, subset.slots) for step in range(3 * 12 // 4)])
    seen = dict(zip(*np.unique(subset.train.id[walk], return_counts=True), strict=True))
    epochs = len(walk) // 12
    assert seen == {int(i): epochs * {a: 5, b: 3}.get(int(i), 1) for i in subset.train.id}


# The fixed noisy copy (T7, T8)

SIGMA = 0.7
X = noise_images(40, 6, 6, 1)
IDS = np.arange(100, 140, dtype=np.int32)


@pytest.fixture(scope="module")
def batch_of():
    jitted = jax.jit(stream.device_batch, static_argnames=("flip", "cutoff"))

    def make(index, key=None, *, x=X, ids=IDS, flip=False, cutoff=SIGMA, noise_seed=1):
        key = jax.random.key(0) if key is None else key
        out = jitted(
            jnp.asarray(x),
            jnp.asarray(ids),
            jnp.asarray(index, np.int32),
            key,
            flip=flip,
            cutoff=cutoff,
            noise_seed=noise_seed,
        )
        return {name: np.asarray(value) for name, value in out.items()}

    return make


def test_clean_batch(batch_of):
    out = batch_of([3, 1, 3], cutoff=0.0)
    assert set(out) == {"x", "id"}
    assert out["x"].dtype == np.float32
    np.testing.assert_allclose(out["x"], X[[3, 1, 3]].astype(np.float64) / 255 * 2 - 1, atol=1e-6)
    np.testing.assert_array_equal(out["id"], [103, 101, 103])
    labelled = stream.device_batch(
        jnp.asarray(X),
        jnp.asarray(IDS),
        jnp.array([3, 1]),
        jax.random.key(0),
        flip=False,
        cutoff=0.0,
        noise_seed=0,
        labels=jnp.arange(40) * 2,
    )
    np.testing.assert_array_equal(labelled["label"], [6, 2])


def test_without_cutoff_nothing_is_drawn():
    trace = jax.make_jaxpr(
        lambda key: stream.device_batch(
            jnp.asarray(X), jnp.asarray(IDS), jnp.arange(4), key, flip=False, cutoff=0.0, noise_seed=0
        )
    )(jax.random.key(0))
    assert not re.search("random|erf|threefry", str(trace))


def test_copy_is_fixed_per_image(batch_of):
    """T7: bit for bit the same in any epoch, order, batch size and share of the batch."""
    whole = batch_of(np.arange(40))["y"]
    rng = np.random.default_rng(0)
    for size in (1, 64):
        index = rng.integers(0, 40, size)
        key = jax.random.key(size)
        np.testing.assert_array_equal(batch_of(index, key)["y"], whole[index])
    for step in (0, 1, 50):
        index = stream.indices(0, step, 40, np.arange(40, dtype=np.int32))
        np.testing.assert_array_equal(batch_of(index)["y"], whole[index])
        shares = np.concatenate([batch_of(index[:1])["y"], batch_of(index[1:])["y"]])
        np.testing.assert_array_equal(shares, whole[index])
    # The id decides, not the place in the training set.
    order = rng.permutation(40)
    np.testing.assert_array_equal(batch_of(np.arange(40), x=X[order], ids=IDS[order])["y"], whole[order])
    other = batch_of(np.arange(40), noise_seed=2)["y"]
    assert (other != whole).mean() > 0.99


def test_copy_is_fixed_across_processes():
    code = (
        "import jax, numpy as np, jax.numpy as jnp, hashlib\n"
        "from mdiff.data.degrade import noisy_copy\n"
        "y = noisy_copy(jnp.zeros((3, 4, 4, 1)), jnp.array([9, 2, 5]), 1.0, 7)\n"
        "print(np.asarray(y).tobytes().hex())\n"
    )
    status, out, err = python(code, env={"PYTHONHASHSEED": "12345"})
    assert status == 0, err
    here = degrade.noisy_copy(jnp.zeros((2, 4, 4, 1)), jnp.array([5, 9]), 1.0, 7)
    there = np.frombuffer(bytes.fromhex(out.strip()), np.float32).reshape(3, 4, 4, 1)
    np.testing.assert_array_equal(there[[2, 0]], here)


def test_noise_is_unit_gaussian_and_independent():
    ids = jnp.arange(400)
    noise = np.asarray(degrade.noisy_copy(jnp.zeros((400, 8, 8, 1)), ids, SIGMA, 0)).reshape(400, -1)
    assert stats.kstest(noise.ravel() / SIGMA, "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise)[np.triu_indices(400, 1)]
    # 79,800 correlations of 64 independent normals: standard deviation 1/8, and none near 1.
    assert abs(correlation.std() * 8 - 1) < 0.05
    assert np.abs(correlation).max() < 0.75
    own = SIGMA * jax.random.normal(keys.key(0, "degradation", 5), (8, 8, 1)).reshape(-1)
    np.testing.assert_allclose(noise[5], own, atol=1e-6)
    # Its own stream: not the numbers another use draws from the same seed and id.
    other = jax.random.normal(keys.key(0, "train", 5), (8, 8, 1)).reshape(-1)
    assert abs(np.corrcoef(noise[5], other)[0, 1]) < 0.5
    x = jnp.full((2, 8, 8, 1), 0.25)
    shifted = degrade.noisy_copy(x, jnp.array([3, 3]), SIGMA, 0)
    np.testing.assert_allclose(np.asarray(shifted).reshape(2, -1), noise[[3, 3]] + 0.25, atol=1e-6)


def test_flip_moves_the_finished_copy(batch_of):
    """T8: x and y are mirrored together, and y is the mirror of the one copy bit for bit."""
    index = np.arange(40)
    plain = batch_of(index)
    flips = []
    for seed in range(25):
        out = batch_of(index, jax.random.key(seed), flip=True)
        flipped = (out["x"] != plain["x"]).any(axis=(1, 2, 3))
        for name in ("x", "y"):
            expected = np.where(flipped[:, None, None, None], plain[name][:, :, ::-1], plain[name])
            np.testing.assert_array_equal(out[name], expected)
        flips.append(flipped)
    coins = np.array(flips)
    assert stats.binomtest(int(coins.sum()), coins.size, 0.5).pvalue > 1e-3
    # One coin per example: neither shared by a batch nor fixed for an image.
    assert coins.mean(0).min() > 0
    assert coins.mean(0).max() < 1
    assert coins.mean(1).min() > 0
    assert coins.mean(1).max() < 1


def test_averaging_the_copies_reveals_nothing(batch_of):
    """T8, leak: over k epochs with flips undone the noise of the mean stays sigma, not sigma / sqrt(2)."""
    index, clean = np.arange(40), batch_of(np.arange(40), cutoff=0.0)["x"]
    right, wrong = [], []
    for seed in range(16):
        out = batch_of(index, jax.random.key(seed), flip=True)
        flipped = (out["x"] != clean).any(axis=(1, 2, 3))[:, None, None, None]
        right.append(np.where(flipped, out["y"][:, :, ::-1], out["y"]))
        # What the released code does: augment, then add the stored noise.
        late = out["x"] + (batch_of(index)["y"] - clean)
        wrong.append(np.where(flipped, late[:, :, ::-1], late))
    assert abs(np.std(np.mean(right, 0) - clean) / SIGMA - 1) < 0.06
    assert np.std(np.mean(wrong, 0) - clean) / SIGMA < 0.85


def test_builtin_names_agree():
    assert set(source.BUILTIN) == set(builders.BUILDERS) == set(builders.PIXELS)

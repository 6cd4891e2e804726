"""Which images are trained on and held out, planted copies, and the batch as a function of (seed, step)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import image_set, noise_images, one_line
from scipy import stats

from mdiff.config import Data
from mdiff.data import stream
from mdiff.data.source import Images
from mdiff.data.split import load_subset, save_subset, split

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


def in_families(n: int, family: list[int]) -> Images:
    return replace(image_set(n), family=np.array(family, np.int32))


def test_no_family_is_on_both_sides():
    family = np.arange(60) // 3  # twenty families of three
    images = in_families(60, family)
    for seed in range(20):
        config = Data(n=10, heldout=15, seed=seed)
        subset = split(config, images)
        assert subset.train.family is not None and subset.heldout.family is not None
        assert not set(subset.train.family) & set(subset.heldout.family)
        assert (len(subset.train), len(subset.heldout)) == (10, 15)
    with one_line("data.n = 2", "data.heldout = 4", "have 3 images", "set data.heldout to 3"):
        split(Data(n=2, heldout=4), in_families(6, [0, 0, 0, 1, 1, 1]))
    everything = split(Data(n=60, heldout=0), images)
    assert len(everything.heldout) == 0


def test_both_sides_have_one_law_of_families():
    """Large families are as likely to be held out as trained on."""
    family = np.concatenate(
        [np.repeat(np.arange(20), 6), np.arange(20, 140)]
    )  # half of 240 images are in large ones
    images = in_families(240, family)
    shares = []
    for seed in range(200):
        subset = split(Data(n=60, heldout=60, seed=seed), images)
        shares.append([np.mean(side.family < 20) for side in (subset.train, subset.heldout)])
    train, heldout = np.transpose(shares)
    assert abs((train - heldout).mean()) < 4 * (train - heldout).std() / np.sqrt(200)
    assert abs(train.mean() - 0.5) < 0.03
    assert abs(heldout.mean() - 0.5) < 0.03


def test_everything_that_comes_with_an_image_is_taken_along():
    n = 6
    images = Images(
        "made",
        noise_images(n, 4, 4, 1),
        np.arange(n, dtype=np.int32),
        np.arange(n, dtype=np.int32) * 2,
        tuple(f"{i}.png" for i in range(n)),
        tuple(f"picture {i}" for i in range(n)),
        np.arange(n, dtype=np.int32) * 3,
        np.arange(n, dtype=np.float32)[:, None] / 4,
    )
    taken = images.take(np.array([4, 1]))
    assert taken.caption == ("picture 4", "picture 1")
    assert taken.files == ("4.png", "1.png")
    np.testing.assert_array_equal(taken.label, [8, 2])
    np.testing.assert_array_equal(taken.family, [12, 3])
    np.testing.assert_array_equal(taken.vector, [[1.0], [0.25]])
    a, b = (int(i) for i in split(Data(n=3, heldout=0), images).train.id[:2])
    subset = split(Data(n=3, heldout=0, planted_flips={a: 1}, planted_crops={b: 1}), images)
    for place, of in ((3, a), (4, b)):
        assert subset.train.caption[place] == f"picture {of}"
        assert subset.train.files[place] == f"{of}.png"
        assert subset.train.label[place] == 2 * of
        assert subset.train.family[place] == 3 * of
        assert subset.train.vector[place, 0] == of / 4


# Planted copies


def test_planted_copies_are_training_images_of_their_own():
    images = image_set(30, 8, 8, 3)
    a, b, c = (int(i) for i in split(Data(n=6, heldout=5), images).train.id[:3])
    config = Data(n=6, heldout=5, duplicates={a: 4}, planted_flips={b: 2, a: 1}, planted_crops={c: 2})
    subset, plain = split(config, images), split(Data(n=6, heldout=5), images)
    np.testing.assert_array_equal(subset.train.id[:6], plain.train.id)
    np.testing.assert_array_equal(subset.heldout.id, plain.heldout.id)
    np.testing.assert_array_equal(subset.train.id[6:], [-1, -2, -3, -4, -5])
    first, second = sorted((a, b))
    flips = [first] * (2 if first == b else 1) + [second] * (2 if second == b else 1)
    np.testing.assert_array_equal(subset.origin, [*plain.train.id, *flips, c, c])
    place = {int(i): k for k, i in enumerate(subset.train.id)}
    for i in (-1, -2, -3):
        origin = subset.origin[place[i]]
        np.testing.assert_array_equal(subset.train.x[place[i]], images.x[origin][:, ::-1])
    assert (subset.train.x[9] != subset.train.x[10]).any()
    # Seen once an epoch each; the duplicates are still repeats of the original.
    np.testing.assert_array_equal(np.bincount(subset.slots), [4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert len({int(i) for i in subset.train.id}) == 11


def test_crops_are_windows_resized_back():
    """Against Lanczos weights of the window in float64, on both axes; and the window's size and spread."""
    size = 16
    images = image_set(4, size, size, 1)
    chosen = [int(i) for i in split(Data(n=3, heldout=0), images).train.id]
    subset = split(Data(n=3, heldout=0, planted_crops=dict.fromkeys(chosen, 40)), images)
    boxes = []
    for place, each in enumerate(subset.planted, start=3):
        assert each.kind == "crop" and each.box is not None
        left, top, right, bottom = each.box
        boxes.append(each.box)
        assert min(left, top) >= 0 and max(right, bottom) <= size
        assert right - left == pytest.approx(bottom - top)
        rows, columns = window(size, top, bottom), window(size, left, right)
        origin = images.x[each.of, ..., 0].astype(np.float64)
        truth = np.clip(rows @ np.clip(origin @ columns.T, 0, 255), 0, 255)
        assert np.abs(subset.train.x[place, ..., 0] - truth).max() < 2.5
    edges = np.array(boxes)
    share = (edges[:, 2] - edges[:, 0]) / size
    assert stats.kstest(share, stats.uniform(0.85, 0.10).cdf).pvalue > 1e-3
    for low in (edges[:, 0], edges[:, 1]):
        assert stats.kstest(low / (size * (1 - share)), "uniform").pvalue > 1e-3
    assert len({box for box in boxes}) == 120
    # A window depends on seed, image and number alone: fewer copies, or other images, leave it as it is.
    fewer = split(Data(n=3, heldout=0, planted_crops={chosen[1]: 2}), images)
    kept = [each.box for each in subset.planted if each.of == chosen[1]][:2]
    assert [each.box for each in fewer.planted] == kept
    other = split(Data(n=3, heldout=0, seed=1, planted_crops={}), images)
    assert other.planted == ()


def window(n: int, low: float, high: float) -> np.ndarray:
    """[n, n] Lanczos-3 weights that take the window from low to high of n pixels to n pixels."""
    scale = (high - low) / n
    distance = np.arange(n)[None] + 0.5 - (low + (np.arange(n)[:, None] + 0.5) * scale)
    weight = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weight / weight.sum(1, keepdims=True)


@pytest.mark.parametrize("field", ["planted_flips", "planted_crops"])
def test_bad_planted_copies(field):
    images = image_set(20)
    chosen = split(Data(n=4, heldout=4), images)
    unseen, seen = int(chosen.heldout.id[0]), int(chosen.train.id[0])
    with one_line(f"data.{field} = {{{unseen}: 2}}", "no training image", str(min(chosen.train.id))):
        split(Data(n=4, heldout=4, **{field: {unseen: 2}}), images)
    for copies in (0, -3):
        with one_line(f"data.{field} = {{{seen}: {copies}}}", "1 or more"):
            split(Data(n=4, heldout=4, **{field: {seen: copies}}), images)
    with one_line("data.duplicates = {-1: 2}", "no training image has id -1"):
        split(Data(n=4, heldout=4, duplicates={-1: 2}, **{field: {seen: 1}}), images)


def test_planted_copies_are_recorded(tmp_path):
    images = image_set(30, 8, 8, 1)
    a, b = (int(i) for i in split(Data(n=10, heldout=5), images).train.id[:2])
    config = Data(n=10, heldout=5, duplicates={a: 2}, planted_flips={a: 1}, planted_crops={b: 2})
    subset = split(config, images)
    path = tmp_path / "subset.json"
    save_subset(path, subset, config)
    tree = json.loads(path.read_text())
    assert [(each["id"], each["of"], each["kind"]) for each in tree["planted"]] == [
        (-1, a, "flip"), (-2, b, "crop"), (-3, b, "crop")
    ]  # fmt: skip
    assert tree["train"]["ids"] == [*subset.train.id[:10].tolist(), -1, -2, -3]
    pixels = np.concatenate([images.x[subset.train.id[:10]], subset.train.x[10:]])
    assert tree["train"]["sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    again = load_subset(path, images)
    assert again.planted == subset.planted
    np.testing.assert_array_equal(again.train.x, subset.train.x)
    np.testing.assert_array_equal(again.origin, subset.origin)
    np.testing.assert_array_equal(again.slots, subset.slots)
    # A record from before there were planted copies.
    old = split(Data(n=10, heldout=5), images)
    save_subset(path, old, Data(n=10, heldout=5))
    tree = json.loads(path.read_text())
    del tree["planted"]
    path.write_text(json.dumps(tree))
    np.testing.assert_array_equal(load_subset(path, images).train.x, old.train.x)
    for broken in (
        3,
        [3],
        [{"id": -1}],
        [{"id": -1, "of": a, "kind": "turn"}],
        [{"id": -1, "of": a, "kind": "crop"}],
    ):
        path.write_text(json.dumps({**tree, "planted": broken}))
        with one_line("subset.json", "damaged or another file"):
            load_subset(path, images)
    outside = {"id": -1, "of": a, "kind": "crop", "box": [0, 0, 9, 9]}
    for broken in ({"id": -1, "of": 999, "kind": "flip"}, outside):
        ids = {**tree["train"], "ids": [*tree["train"]["ids"], -1]}
        path.write_text(json.dumps({**tree, "train": ids, "planted": [broken]}))
        with one_line("subset.json", "damaged or another file"):
            load_subset(path, images)


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
    assert tree["planted"] == []
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

"""The audit on sets whose memorized fraction is known, its files, and paired comparison."""

import dataclasses
import json

import numpy as np
import pytest

from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.probes import quality
from mdiff.probes.audit import audit, load, save
from mdiff.probes.compare import compare

FAST = Audit(bootstrap=200, components=8)


def draw(rng, n, size=8):
    """Smooth random images [n,size,size,1] in [-1, 1]: all from one law."""
    coarse = rng.normal(size=(n, 4, 4))
    return np.tanh(0.7 * np.kron(coarse, np.ones((size // 4, size // 4))))[..., None].astype(np.float32)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    return rng, draw(rng, 50), draw(rng, 50)


def copies(rng, train, n, noise=0.02):
    index = rng.integers(0, len(train), n)
    return index, np.clip(train[index] + noise * rng.normal(size=(n, *train.shape[1:])), -1, 1)


def test_known_fraction_of_copies(world):
    _, train, heldout = world
    rng = np.random.default_rng(1)
    index, copied = copies(rng, train, 60)
    generated = np.concatenate([copied, draw(rng, 140)])
    ids = np.arange(50) * 7 + 3
    found = audit(generated, train, heldout, FAST, train_ids=ids, heldout_ids=np.arange(50) + 1000)
    one = found.estimates
    assert found.rows["memorized"][:60].all()
    assert one["memorized"].value == pytest.approx(0.3, abs=0.02)
    assert one["calibrated"].value == pytest.approx(0.3, abs=0.02)
    assert one["memorized"].n == 200
    assert one["control"].high <= 0.05
    assert 0.2 < one["excess"].low < one["excess"].value < one["excess"].high
    assert one["excess"].value == pytest.approx(one["memorized"].value - one["control"].value)
    np.testing.assert_array_equal(found.rows["nearest_index"][:60], index)
    np.testing.assert_array_equal(found.rows["nearest_id"][:60], ids[index])
    np.testing.assert_array_equal(found.rows["cosine_id"][:60], ids[index])
    assert (found.rows["control_nearest_id"] >= 1000).all()
    np.testing.assert_array_equal(
        found.hits, np.bincount(found.rows["nearest_index"][found.rows["memorized"]], minlength=50)
    )
    assert one["unique"].value == np.count_nonzero(found.hits) / 50
    assert one["unique"].n == found.counts["train_clusters"] == 50
    assert found.feature == "pca8-pixel"
    # noise of 0.02 on [-1, 1] is 0.01 on [0, 1] (a little less where clipped)
    assert np.median(found.rows["d1"][:60]) == pytest.approx(0.01, rel=0.15)
    assert any("cannot show rates below 1.5 %" in note for note in found.notes)


def test_fresh_draws_have_no_excess(world):
    _, train, heldout = world
    generated = draw(np.random.default_rng(2), 200)
    found = audit(generated, train, heldout, FAST)
    for name in ("excess", "calibrated_excess"):
        assert found.estimates[name].low < 0 < found.estimates[name].high
    for name in ("energy_train", "energy_heldout", "energy_floor", "kernel_train", "kernel_heldout"):
        assert found.estimates[name].low < 0 < found.estimates[name].high
    for name in ("d1", "ratio", "cosine"):
        left, right = found.percentiles[name]["train"][2], found.percentiles[name]["heldout"][2]
        assert left == pytest.approx(right, rel=0.1)


def test_quality_tells_a_wrong_law_from_the_right_one(world):
    _, train, heldout = world
    generated = 0.2 * draw(np.random.default_rng(3), 100)
    found = audit(generated, train, heldout, FAST).estimates
    for kind in ("energy", "kernel"):
        assert found[f"{kind}_heldout"].low > max(found[f"{kind}_floor"].high, 0)


def test_curves_are_consistent_with_the_rows(world):
    _, train, heldout = world
    rng = np.random.default_rng(4)
    found = audit(copies(rng, train, 80)[1], train, heldout, FAST)
    for space, column in (("cosine", "cosine"), ("rms", "d1")):
        for side, prefix in (("train", ""), ("heldout", "control_")):
            curve = found.curves[space][side]
            best, tau = found.rows[prefix + column], np.array(curve["tau"])
            passed = best[:, None] <= tau if space == "rms" else best[:, None] >= tau
            np.testing.assert_allclose(curve["ams"], passed.mean(0))
            assert (np.array(curve["ums"]) <= curve["ams"]).all()
    assert found.curves["cosine"]["train"]["tau"][0] == 0.3
    assert found.curves["cosine"]["train"]["tau"][-1] == 1.0


def test_near_duplicates_do_not_hide_memorization(world):
    _, train, heldout = world
    rng = np.random.default_rng(5)
    twins = np.clip(train[:10] + 0.01 * rng.normal(size=train[:10].shape), -1, 1)
    doubled = np.concatenate([train, twins])
    generated = copies(rng, train[:10], 64, noise=0.01)[1]
    clustered = audit(generated, doubled, heldout, FAST)
    plain = audit(generated, doubled, heldout, dataclasses.replace(FAST, near_duplicate=0.0))
    assert clustered.estimates["memorized"].value == 1.0
    assert plain.estimates["memorized"].value < 0.1
    assert clustered.counts["train_clusters"] == clustered.estimates["unique"].n == 50
    assert clustered.estimates["unique"].value == 0.2
    assert any("60 training images are 50 different ones" in note for note in clustered.notes)


def test_mirrored_copies_are_found_with_flips_only(world):
    _, train, heldout = world
    rng = np.random.default_rng(6)
    index, copied = copies(rng, train, 64)
    mirrored = copied[:, :, ::-1]
    without = audit(mirrored, train, heldout, FAST)
    found = audit(mirrored, train, heldout, dataclasses.replace(FAST, flips=True))
    assert without.estimates["memorized"].value < 0.1
    assert not without.rows["flipped"].any()
    assert found.estimates["memorized"].value == 1.0
    assert found.rows["flipped"].all()
    np.testing.assert_array_equal(found.rows["nearest_index"], index)
    np.testing.assert_array_equal(found.rows["cosine_index"], index)
    shown = found.pictures["top_nearest"].astype(int) - found.pictures["top_generated"]
    assert np.abs(shown).mean() < 5  # shown in the orientation that matches


def test_without_heldout_nothing_is_invented(world):
    _, train, _ = world
    found = audit(draw(np.random.default_rng(7), 30), train, None, FAST)
    absent = {name for name, value in found.estimates.items() if value is None}
    assert absent == {
        "control",
        "excess",
        "calibrated_control",
        "calibrated_excess",
        "energy_heldout",
        "energy_floor",
        "kernel_heldout",
        "kernel_floor",
    }
    assert not any(name.startswith("control_") for name in found.rows)
    assert set(found.curves["rms"]) == {"train"}
    assert any("no held-out images" in note for note in found.notes)


def test_a_larger_heldout_set_is_cut_to_the_training_size(world):
    _, train, heldout = world
    rng = np.random.default_rng(8)
    large = np.concatenate([heldout, draw(rng, 70)])
    found = audit(large[100:110], train, large, FAST)
    assert (found.counts["heldout"], found.counts["heldout_given"]) == (50, 120)
    at = found.rows["control_nearest_index"]
    exact = found.rows["control_d1"] < 1e-6
    np.testing.assert_array_equal(at[exact], np.arange(100, 110)[exact])
    assert exact.any()
    # all matches pass the widest threshold, and no two of these images are near-duplicates
    far = audit(heldout, train, large, FAST)
    near = far.rows["control_nearest_index"][far.rows["control_d1"] <= 0.4]
    assert far.curves["rms"]["heldout"]["unique"][-1] == len(np.unique(near))
    small = audit(draw(rng, 20), train, heldout[:20], FAST)
    assert small.counts["heldout"] == 20
    assert any("20 held-out images against 50" in note for note in small.notes)


def test_training_images_among_the_heldout_are_reported(world):
    _, train, heldout = world
    leaky = np.concatenate([heldout[:47], train[:3]])
    found = audit(draw(np.random.default_rng(9), 20), train, leaky, FAST)
    assert any(note.startswith("3 of 50 held-out images are near-duplicates") for note in found.notes)


def test_bytes_and_floats_agree(world):
    _, train, heldout = world
    rng = np.random.default_rng(10)
    as_bytes = [np.uint8(np.round((x + 1) * 127.5)) for x in (copies(rng, train, 40)[1], train, heldout)]
    floats = [np.float32(x / 127.5 - 1) for x in as_bytes]
    one, two = audit(*as_bytes, FAST), audit(*floats, FAST)
    np.testing.assert_array_equal(one.rows["nearest_index"], two.rows["nearest_index"])
    np.testing.assert_allclose(one.rows["d1"], two.rows["d1"], atol=1e-6)
    assert one.digests == two.digests
    np.testing.assert_array_equal(one.pictures["top_generated"], two.pictures["top_generated"])


def test_exact_copies(world):
    _, train, heldout = world
    found = audit(train[:12], train, heldout, FAST)
    assert (found.rows["ratio"] == 0).all()
    assert (found.rows["calibrated"] == 0).all()
    assert found.curves["cosine"]["train"]["ams"][-1] == 1.0


def test_another_feature_space_can_be_plugged_in(world):
    _, train, heldout = world

    class Mean:
        name = "row-means"

        def __call__(self, images):
            return np.asarray(images, np.float64).mean((2, 3))

    generated = draw(np.random.default_rng(11), 20)
    found = audit(generated, train, heldout, FAST, features=Mean())
    a, b = Mean()(generated), Mean()(train)
    cos = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found.rows["cosine"], cos.max(1))
    assert found.feature == "row-means"
    assert found.estimates["energy_heldout"].value == pytest.approx(
        quality.energy_distance(a, Mean()(heldout), n_resamples=10).value
    )


def test_one_generation(world):
    _, train, heldout = world
    found = audit(train[:1], train, heldout, FAST)
    assert found.estimates["memorized"].n == 1
    assert found.estimates["energy_train"] is None
    assert found.estimates["energy_floor"] is not None


BLANK = np.zeros((4, 8, 8, 1), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generated": BLANK[:0]}, "generated: shape"),
        ({"generated": BLANK[..., 0]}, "generated: shape"),
        ({"generated": BLANK + np.nan}, "generated: 4 of 4 images have NaN"),
        ({"generated": BLANK.astype(int)}, "generated: dtype int64"),
        (
            {"generated": np.zeros((4, 16, 16, 1), np.float32)},
            "train: images are 8x8x1 but generated ones are 16x16x1",
        ),
        ({"train": BLANK[:1]}, "train: 1 image; .* at least 2"),
        ({"train": BLANK}, "train: .* two distinct images"),
        ({"heldout": BLANK}, "heldout: .* two distinct images"),
        ({"train": BLANK + 255}, "train: values from 255 to 255; give uint8"),
        ({"heldout": np.zeros((4, 8, 8, 3), np.float32)}, "heldout: images are 8x8x3"),
        ({"train_ids": np.arange(3)}, "train_ids: shape"),
        ({"config": Audit(confidence=95)}, "audit.confidence = 95"),
        ({"config": Audit(bootstrap=0)}, "audit.bootstrap = 0"),
        ({"config": Audit(near_duplicate=9.0)}, "lower audit.near_duplicate"),
    ],
)
def test_bad_input_is_one_line(world, change, message):
    _, train, heldout = world
    given = {"generated": heldout[:4], "train": train, "heldout": heldout, "config": FAST} | change
    with pytest.raises(UserError, match=message) as error:
        audit(**given)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def result(world):
    _, train, heldout = world
    rng = np.random.default_rng(12)
    generated = np.concatenate([copies(rng, train, 40)[1], draw(rng, 60)])
    return audit(generated, train, heldout, FAST)


def test_a_result_survives_saving(result, tmp_path):
    save(result, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["audit.json", "audit.npz"]
    back = load(tmp_path / "run")
    for field in dataclasses.fields(result):
        one, two = getattr(result, field.name), getattr(back, field.name)
        if isinstance(one, dict) and any(isinstance(value, np.ndarray) for value in one.values()):
            assert sorted(one) == sorted(two)
            for name in one:
                np.testing.assert_array_equal(one[name], two[name])
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, two)
        else:
            assert one == two, field.name


def test_the_file_is_strict_json_with_every_key(result, tmp_path):
    broken = dataclasses.replace(
        result,
        estimates=result.estimates
        | {"energy_train": dataclasses.replace(result.estimates["energy_train"], low=float("nan"))},
    )
    save(broken, tmp_path)

    def refuse(word):
        raise AssertionError(word)

    tree = json.loads((tmp_path / "audit.json").read_text(), parse_constant=refuse)
    assert tree["estimates"]["energy_train"]["low"] is None
    assert set(tree["estimates"]["memorized"]) == {"value", "low", "high", "n"}
    assert set(tree) >= {
        "estimates",
        "curves",
        "percentiles",
        "counts",
        "notes",
        "config",
        "feature",
        "version",
    }
    with np.load(tmp_path / "audit.npz") as arrays:
        assert arrays["top_generated"].dtype == np.uint8
        assert arrays["top_generated"].shape == arrays["top_nearest"].shape == (64, 8, 8, 1)
        assert arrays["random_generated"].shape == (32, 8, 8, 1)
        ratio = arrays["ratio"][arrays["top_index"]]
        assert (np.diff(ratio) >= 0).all()
        assert ratio[-1] <= np.sort(arrays["ratio"])[63]
        assert arrays["hits"].sum() == arrays["memorized"].sum()


def test_damaged_or_mixed_files_are_refused(result, tmp_path):
    with pytest.raises(UserError, match=r"no audit\.json; run the audit first"):
        load(tmp_path)
    save(result, tmp_path)
    text, data = (tmp_path / "audit.json").read_text(), (tmp_path / "audit.npz").read_bytes()
    (tmp_path / "audit.npz").write_bytes(data[:-9])
    with pytest.raises(UserError, match="does not belong"):
        load(tmp_path)
    (tmp_path / "audit.json").write_text(text[:100])
    with pytest.raises(UserError, match="not JSON"):
        load(tmp_path)


def test_a_folder_that_cannot_be_written(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a folder"):
        save(result, tmp_path / "file")


def test_compare_pairs_generations(world):
    _, train, heldout = world
    rng = np.random.default_rng(13)
    _, copied = copies(rng, train, 120)
    fresh = draw(rng, 120)
    fewer = np.where((np.arange(120) < 40)[:, None, None, None], copied, fresh)
    a, b = audit(copied, train, heldout, FAST), audit(fewer, train, heldout, FAST)
    found = compare(a, b)
    assert found["memorized"].value == pytest.approx(-80 / 120, abs=0.02)
    assert found["memorized"].high < -0.5
    assert found["d1"].low > 0
    assert found["log_ratio"].low > 0
    assert found["cosine"].high < 0
    assert found["d1"].value == pytest.approx(b.rows["d1"].mean() - a.rows["d1"].mean())
    assert found["control"].low <= 0 <= found["control"].high
    # memorizing makes a sample closer to the training images
    assert found["energy_train"].value > 0
    energies = [x.estimates["energy_train"].value for x in (a, b)]
    assert found["energy_train"].value == pytest.approx(energies[1] - energies[0])
    assert all(x.low <= x.value <= x.high for x in found.values())
    back = compare(b, a)
    for name, value in found.items():
        flipped = (-back[name].value, -back[name].high, -back[name].low)
        assert (value.value, value.low, value.high) == pytest.approx(flipped, abs=1e-12)


def test_a_joint_bootstrap_is_narrower_than_two_intervals(world):
    _, train, heldout = world
    rng = np.random.default_rng(14)
    first = draw(rng, 80)
    second = np.clip(first + 0.05 * rng.normal(size=first.shape), -1, 1)
    a, b = audit(first, train, heldout, FAST), audit(second, train, heldout, FAST)
    joint = compare(a, b)["energy_heldout"]
    single = a.estimates["energy_heldout"]
    assert joint.high - joint.low < 0.3 * (single.high - single.low)
    other = dataclasses.replace(b, config=dataclasses.replace(b.config, seed=5))
    assert "energy_heldout" not in compare(a, other)


def test_compare_refuses_what_is_not_paired(world):
    _, train, heldout = world
    generated = draw(np.random.default_rng(15), 20)
    a = audit(generated, train, heldout, FAST)
    cases = [
        (audit(generated[:10], train, heldout, FAST), "20 generations against 10"),
        (audit(generated, train[::-1], heldout, FAST), "train images differ"),
        (audit(generated, train, heldout, FAST, train_ids=np.arange(50) + 1), "train images differ"),
        (audit(generated, train, heldout[::-1], FAST), "heldout images differ"),
        (audit(generated, train, None, FAST), "only one audit has heldout"),
        (audit(generated, train, heldout, dataclasses.replace(FAST, ratio=0.5)), "audit.ratio is"),
    ]
    for b, message in cases:
        with pytest.raises(UserError, match=message):
            compare(a, b)


def test_progress_is_reported(world):
    _, train, heldout = world
    seen = []
    audit(train[:4], train, heldout, FAST, progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert seen[-1][1] == seen[-1][2]


def test_random_features_and_unknown_ones(world):
    _, train, heldout = world
    generated = draw(np.random.default_rng(30), 30)
    config = dataclasses.replace(FAST, features="random")
    found = audit(generated, train, heldout, config)
    assert found.feature == "pca8-random"
    plain = audit(generated, train, heldout, FAST)
    np.testing.assert_array_equal(found.rows["ratio"], plain.rows["ratio"])
    assert (found.rows["cosine"] != plain.rows["cosine"]).any()
    with pytest.raises(UserError, match=r"audit\.features = 'dino': no such space; give pixel or random"):
        audit(generated, train, heldout, dataclasses.replace(FAST, features="dino"))

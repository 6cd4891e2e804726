"""The probes on sets whose truth is known, their files, and bad input."""

import dataclasses
import json
import math

import numpy as np
import pytest

from mdiff.config import Audit
from mdiff.errors import UserError
from mdiff.probes import records, registry, similarity_probe
from mdiff.probes.records import Curve, Measure, ProbeResult, Series, Table
from mdiff.types import Estimate

FAST = Audit(bootstrap=50, components=8)
SIZE = 16


def draw(rng, n):
    """Smooth random images [n,16,16,1] in [-1, 1], all from one law."""
    coarse = rng.normal(size=(n, 8, 8))
    return np.tanh(0.9 * np.kron(coarse, np.ones((2, 2))))[..., None].astype(np.float32)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    return draw(rng, 40), draw(rng, 40)


def copies(rng, train, n, noise=0.03):
    index = rng.integers(0, len(train), n)
    return index, np.clip(train[index] + noise * rng.normal(size=(n, *train.shape[1:])), -1, 1)


@pytest.fixture(scope="module")
def found(world):
    """All probes on 60 copies among 200 generations, and the images copied."""
    train, heldout = world
    rng = np.random.default_rng(1)
    index, copied = copies(rng, train, 60)
    generated = np.concatenate([copied, draw(rng, 140)])
    ids = {"train_ids": np.arange(40) * 3 + 5, "heldout_ids": np.arange(40) + 1000}
    results = {
        name: run(generated, train, heldout, FAST, **ids) for name, (run, _) in registry.PROBES.items()
    }
    return index, results


def test_similarity_finds_the_planted_copies(found):
    index, results = found
    result = results["similarity"]
    for kind in ("tile", "ssim", "phash"):
        excess, control = result[f"{kind}_excess"].estimate, result[f"{kind}_control"].estimate
        assert excess.value == pytest.approx(0.3, abs=0.02), kind
        assert control.value <= 0.01
        assert excess.low > 0.2
        assert result.arrays[f"{kind}_copy"][:60].all()
        np.testing.assert_array_equal(result.arrays[f"{kind}_train_id"][:60], index * 3 + 5)
        assert (result.arrays[f"{kind}_heldout_id"] >= 1000).all()
    assert "ms_ssim_excess" not in [row.key for row in result.rows]
    assert any("MS-SSIM is absent" in note for note in result.notes)
    curve = next(c for c in result.curves if "SSIM" in c.title)
    at = curve.x.index(0.9)
    train, held = (line.y[at] for line in curve.series)
    assert train == np.mean(result.arrays["ssim_train"] >= 0.9)
    assert held == 0


def test_yields_count_the_planted_images(found):
    index, results = found
    result = results["yields"]
    different = len(np.unique(index))
    assert result["copies"].estimate.value == pytest.approx(0.3, abs=0.01)
    assert result["copies_control"].estimate.value == 0
    assert result["copies_excess"].estimate.low > 0.2
    assert result["different"].estimate.value == pytest.approx(different)
    assert result["coverage"].estimate.value == pytest.approx(different / 40)
    assert result["coverage"].estimate.n == 40
    np.testing.assert_array_equal(result.arrays["hits"], np.bincount(index, minlength=40))
    once, twice = (np.sum(np.bincount(index) == n) for n in (1, 2))
    chao = different + 199 / 200 * once * (once - 1) / (2 * (twice + 1))
    assert result["chao1"].estimate.value == pytest.approx(min(chao, 40))
    assert not result.arrays["authentic"][:60].any()
    assert result["authentic_excess"].estimate.low > 0.1
    table = next(t for t in result.tables if "copies" in t.columns)
    assert sum(row[1] for row in table.rows) == 40
    last = result.curves[0].series[0]
    assert last.y[-1] == pytest.approx(different)
    assert np.all(np.diff(last.y) > 0)


def test_quality_of_the_right_law_and_of_a_wrong_one(found, world):
    train, heldout = world
    right = found[1]["quality"]
    assert right.space == "pca8-pixel"
    for name in ("frechet", "kid", "energy"):
        assert right[f"{name}_heldout"].estimate.low < 0.05
        assert right[f"{name}_floor"].estimate.low < 0 < right[f"{name}_floor"].estimate.high
    labels = {"generated": np.arange(80) % 2, "train": np.arange(40) % 2, "heldout": np.arange(40) % 2}
    generated = 0.2 * draw(np.random.default_rng(2), 80)
    wrong = registry.find("quality")(generated, train, heldout, FAST, labels=labels)
    for name in ("frechet", "kid", "energy"):
        assert wrong[f"{name}_heldout"].estimate.low > right[f"{name}_heldout"].estimate.value
        assert wrong[f"{name}_heldout"].estimate.low > wrong[f"{name}_floor"].estimate.value
    assert wrong["recall_heldout"].estimate.value < 0.5 < wrong["recall_floor"].estimate.value
    table = next(t for t in wrong.tables if t.title.startswith("Per class"))
    assert [row[:3] for row in table.rows] == [[0, 40, 20], [1, 40, 20]]
    assert all(value is not None for row in table.rows for value in row)


def test_a_memorizer_is_caught_by_all(world):
    train, heldout = world
    _, generated = copies(np.random.default_rng(3), train, 120, 0.0)
    yields = registry.find("yields")(generated, train, heldout, FAST)
    assert yields["copies"].estimate.value == 1
    assert yields["authentic"].estimate.value == 0
    close = registry.find("similarity")(generated, train, heldout, FAST)
    for kind in ("tile", "ssim", "phash"):
        assert close[f"{kind}_copies"].estimate.value == 1
    quality = registry.find("quality")(generated, train, heldout, FAST)
    assert quality["kid_train"].estimate.value < quality["kid_heldout"].estimate.value


def test_flips_count_when_asked_for(world):
    train, heldout = world
    index, generated = copies(np.random.default_rng(4), train[:, :, ::-1], 100)
    for flips in (False, True):
        config = dataclasses.replace(FAST, flips=flips)
        close = registry.find("similarity")(generated, train, heldout, config)
        for kind in ("tile", "ssim", "phash"):
            assert (close[f"{kind}_excess"].estimate.value > 0.9) == flips, kind
        result = registry.find("yields")(generated, train, heldout, config)
        assert (result["copies"].estimate.value > 0.9) == flips
    bands = next(t for t in result.tables if "band" in t.columns)
    high = dict(zip(bands.columns, next(r for r in bands.rows if r[:2] == ["train", "high"]), strict=True))
    assert high["AMS"] == 1
    assert high["UMS"] == pytest.approx(len(np.unique(index)) / 100)


@pytest.mark.parametrize(
    ("control", "sign", "limit", "passing"),
    [
        (np.arange(200.0), 1, 2.0, 2),
        (np.arange(200.0), -1, 197.0, 2),
        (np.arange(50.0), 1, 0.0, 0),  # too few for one alarm
        (np.zeros(300), 1, 0.0, 0),  # ties: none may pass rather than all
        (np.repeat([0.0, 5.0], [1, 199]), 1, 5.0, 1),
    ],
)
def test_threshold_lets_at_most_one_percent_pass(control, sign, limit, passing):
    found = similarity_probe.threshold(control, sign)
    assert found == limit
    assert np.sum(sign * control < sign * found) == passing <= 0.01 * len(control)


def test_without_heldout_images_control_is_absent_and_said_so(world):
    train, _ = world
    generated = draw(np.random.default_rng(5), 30)
    for name in registry.PROBES:
        result = registry.find(name)(generated, train, None, FAST)
        absent = [row for row in result.rows if row.estimate is None]
        assert absent
        assert all("held-out" in row.note for row in absent)
        assert any("no held-out images" in note for note in result.notes)


def numbers(result):
    for row in result.rows:
        if row.estimate is not None:
            yield row.estimate.value
    for table in result.tables:
        yield from (x for row in table.rows for x in row if isinstance(x, float))
    for curve in result.curves:
        for line in curve.series:
            yield from line.y


@pytest.mark.parametrize("case", ["constant", "one", "few", "tiny", "colour"])
def test_odd_sets_give_no_silent_nan(case):
    rng = np.random.default_rng(6)
    train, heldout, generated = draw(rng, 12), draw(rng, 12), draw(rng, 12)
    if case == "constant":
        generated = np.full_like(generated, 0.3)
    elif case == "one":
        generated = generated[:1]
    elif case == "few":
        train, heldout, generated = train[:4], heldout[:4], generated[:4]
    elif case == "tiny":
        train, heldout, generated = (rng.uniform(-1, 1, (12, 3, 5, 1)) for _ in range(3))
    elif case == "colour":
        train, heldout, generated = (
            rng.integers(0, 256, (n, 24, 22, 3)).astype(np.uint8) for n in (12, 30, 12)
        )
    for name in registry.PROBES:
        result = registry.find(name)(generated, train, heldout, FAST)
        values = list(numbers(result))
        assert values, name
        assert all(math.isfinite(v) for v in values), name
        for row in result.rows:
            assert row.estimate is not None or row.note.startswith("absent"), row
        if (case, name) == ("few", "quality"):
            assert result["precision_heldout"].estimate is None
            assert "needs at least 6" in result["precision_heldout"].note
        if (case, name) == ("colour", "similarity"):
            assert result["ms_ssim_excess"].estimate is not None


def test_a_class_with_too_few_images_is_named(world):
    train, heldout = world
    generated = draw(np.random.default_rng(7), 40)
    labels = {"generated": np.arange(40) % 3, "heldout": np.where(np.arange(40) < 4, 2, np.arange(40) % 2)}
    result = registry.find("quality")(generated, train, heldout, FAST, labels=labels)
    table = next(t for t in result.tables if t.title.startswith("Per class"))
    assert [row[0] for row in table.rows] == [0, 1, 2]
    assert table.rows[2][3:] == [None] * (len(table.columns) - 3)
    assert None not in table.rows[0]
    assert any(note.endswith("have no numbers: 2") for note in result.notes)


def test_mistakes_are_one_line(world):
    train, heldout = world
    generated = draw(np.random.default_rng(8), 10)
    broken = generated.copy()
    broken[3, 0, 0, 0] = np.nan
    cases = [
        ((broken, train, heldout), {}, FAST, "generated: 1 of 10 images have NaN"),
        ((generated, train[:1], None), {}, FAST, "train: 1 image; "),
        (
            (generated[:, :8], train, heldout),
            {},
            FAST,
            "train: images are 16x16x1 but generated ones are 8x16x1",
        ),
        ((generated, train, heldout), {"train_ids": np.arange(3)}, FAST, "train_ids: shape"),
        ((generated, train, heldout), {}, dataclasses.replace(FAST, features="inception"), "audit.features"),
        ((generated, train, heldout), {}, dataclasses.replace(FAST, confidence=2.0), "audit.confidence"),
    ]
    for images, options, config, message in cases:
        for name in registry.PROBES:
            with pytest.raises(UserError, match=message) as error:
                registry.find(name)(*images, config, **options)
            assert "\n" not in str(error.value)
    for labels in (np.arange(3), np.zeros(10)):
        with pytest.raises(UserError, match=r"labels\.generated"):
            registry.find("quality")(generated, train, heldout, FAST, labels={"generated": labels})
    alone = registry.find("quality")(generated, train, heldout, FAST, labels={"generated": np.zeros(10, int)})
    assert any(note.startswith("no numbers per class") for note in alone.notes)
    with pytest.raises(UserError, match="give one of similarity, yields, quality"):
        registry.find("similarty")
    same = np.repeat(train[:1], 5, axis=0)
    for name in ("yields", "quality"):
        with pytest.raises(UserError, match=r"equal|near-duplicates of one"):
            registry.find(name)(generated, same, None, FAST)


def test_random_features_are_used_when_named(world):
    train, heldout = world
    config = dataclasses.replace(FAST, features="random")
    generated = draw(np.random.default_rng(9), 30)
    assert registry.find("quality")(generated, train, heldout, config).space == "pca8-random"
    assert "pca8-random" in registry.find("yields")(generated, train, heldout, config).space


def test_progress_is_reported_in_order(world):
    train, heldout = world
    for name in registry.PROBES:
        seen: list[tuple[int, int]] = []
        keep = seen.append
        run = registry.find(name)
        run(
            train[:8], train, heldout, FAST, progress=lambda what, done, total, keep=keep: keep((done, total))
        )
        assert [d for d, _ in seen] == sorted(d for d, _ in seen)
        assert seen[0][0] == 0
        assert seen[-1][0] == seen[-1][1]


def small():
    return ProbeResult(
        probe="mine",
        title="Mine",
        space="pixels",
        rows=[
            Measure("a", "A", Estimate(0.5, 0.25, math.nan, 7), "%", "lower", "says a"),
            Measure("b", "B", None, "", "", "absent: why"),
        ],
        tables=[Table("T", ["x", "y"], [["one", 1.5], ["two", None]])],
        curves=[
            Curve(
                "C", "n", [1.0, 2.0], [Series("s", [0.5, 0.6], [0.1, 0.2], [0.9, 1.0]), Series("t", [0, 1])]
            )
        ],
        arrays={"hits": np.arange(5), "flag": np.array([True, False])},
        notes=["a note"],
        config={"k": 5},
    )


def test_files_give_back_what_was_written(tmp_path, found):
    for result in (small(), *found[1].values()):
        path = records.save(result, tmp_path)
        assert path.name == f"probe_{result.probe}.json"
        back = records.load(tmp_path, result.probe)
        assert repr(back.rows) == repr(result.rows)  # NaN is not equal to itself
        assert repr(back.curves) == repr(result.curves)
        for name in ("title", "space", "tables", "notes"):
            assert getattr(back, name) == getattr(result, name), name
        assert set(back.arrays) == set(result.arrays)
        for name, values in result.arrays.items():
            np.testing.assert_array_equal(back.arrays[name], values)
    assert list(records.load_all(tmp_path)) == ["mine", "quality", "similarity", "yields"]
    tree = json.loads((tmp_path / "probe_mine.json").read_text())
    assert tree["measures"][0] == {
        "key": "a",
        "label": "A",
        "value": 0.5,
        "low": 0.25,
        "high": None,
        "n": 7,
        "unit": "%",
        "better": "lower",
        "note": "says a",
    }
    assert tree["measures"][1]["value"] is None
    assert tree["format"] == 1
    assert not list(tmp_path.glob(".*"))
    assert small()["b"].label == "B"
    with pytest.raises(KeyError, match="mine has a, b"):
        small()["c"]


def test_damaged_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file; run mdiff eval"):
        records.load(tmp_path, "mine")
    records.save(small(), tmp_path)
    path, arrays = tmp_path / "probe_mine.json", tmp_path / "probe_mine.npz"
    good, data = path.read_text(), arrays.read_bytes()
    for text, message in (
        ("{", "not JSON"),
        ("[]", "format None"),
        (good.replace('"format": 1', '"format": 9'), "format 9"),
        (good.replace('"title": "Mine"', '"titel": 1'), "no 'title'"),
        (good.replace('"columns"', '"column"'), "column"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            records.load(tmp_path, "mine")
    path.write_text(good)
    arrays.write_bytes(data[:-9])
    with pytest.raises(UserError, match="does not belong"):
        records.load(tmp_path, "mine")
    arrays.unlink()
    with pytest.raises(UserError, match="no such file"):
        records.load(tmp_path, "mine")
    records.save(small(), tmp_path)
    records.save(dataclasses.replace(small(), arrays={}), tmp_path)
    assert not arrays.exists()  # an earlier result's arrays do not stay behind
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a folder"):
        records.save(small(), tmp_path / "file")

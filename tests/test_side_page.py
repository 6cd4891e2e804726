"""The page of an attack: what it shows is what the files hold."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdiff.errors import UserError
from mdiff.fields import to_json
from mdiff.probes import clusters as clustering
from mdiff.probes import stamped
from mdiff.report import side_page
from mdiff.side import Side

SCALES, N, DRAWN, TRAIN = (0.0, 2.0, 8.0), 10, 24, 5


def est(value, low=None, high=None, n=N):
    return {"value": value, "low": low, "high": high, "n": n}


def curve(places):
    tau = [0.3, 0.6, 0.9]
    found = {"tau": tau}
    for name in places:
        found |= {name: [0.9, 0.5, 0.1], f"{name}_low": [0.8, 0.4, 0.0], f"{name}_high": [1.0, 0.6, None]}
    return {"cosine": found}


def strength(scale, control):
    rates = {
        "memorized": est(0.1 + scale / 100, 0.02, 0.4),
        "coverage": est(0.4, 0.1, 0.8, TRAIN),
        "unique_per_generation": est(0.2, 0.05, 0.5),
        "unique_per_prompt": est(1.5, 0.5, 2.5, 2),
        "chao1": est(3.0, 2.0, 5.0),
    }
    if control:
        rates |= {"memorized_control": est(0.03, 0.0, 0.2), "memorized_excess": est(0.07, -0.1, 0.35)}
        rates |= {"coverage_control": est(0.0, 0.0, 0.4, TRAIN)}
    train = {
        "different": TRAIN,
        "estimates": rates,
        "curves": curve(("ams", "excess") if control else ("ams",)),
    }
    sides = {"train": train} | ({"heldout": {"curves": curve(("ams",))}} if control else {})
    return {
        "scale": scale,
        "scores": {
            "control": "heldout" if control else None,
            "references": sides,
            "notes": ["10 generations cannot show rates below 27.8 %"],
            "audit": {"confidence": 0.9},
        },
        "repetition": {"grouped": est(0.2, 0.1, 0.5), "excess": est(0.123, 0.1, 0.2)},
        "beside_unguided": {"precision": est(0.9, 0.6, 1.0), "spread": 0.8},
        "quality": {"energy": est(0.456, 0.3, 0.5), "precision": est(0.7, 0.4, 0.9), "recall": est(0.6)}
        if control
        else {},
    }


def attack(out: Path, *, chosen=2.0, oracle=8.0, control=True, classifier=True, clustered=True, name="run"):
    """A small made-up attack: every pixel is random, and each array different."""
    rng = np.random.Generator(np.random.Philox(3))
    out.mkdir()
    (out / "guided").mkdir()
    images = lambda n: rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)  # noqa: E731
    arrays = {"train": images(TRAIN), "train_id": np.array([70, 71, 72, 73, 74], np.int32)}
    for i, scale in enumerate(SCALES):
        order = rng.permutation(N) if scale == 0 else np.arange(N)  # rows may lie in another order than ids
        columns = {"x": images(N), "id": order, "label": np.arange(N) % 2, "finite": np.ones(N, bool)}
        columns["gap"] = np.full(N, i, np.float32)
        np.savez(out / "guided" / f"scale_{scale:g}.npz", **columns)
        arrays[f"nearest_{scale:g}"] = rng.integers(0, TRAIN, N)
        arrays[f"ratio_{scale:g}"] = ratio = rng.uniform(0.1, 0.9, N)
        arrays[f"memorized_{scale:g}"] = ratio < 0.5
    clusters = {}
    if clustered:
        np.savez(out / "synthetic.npz", x=images(DRAWN), id=np.arange(DRAWN))
        labels = np.where(np.arange(DRAWN) % 4 == 1, 0, 1)
        found = clustering.Clusters(
            labels, np.eye(2), np.array([0.8, 0.2, 0.75]), np.array([0.7, 0.1, 0.6]), np.array([6, 2, 16]),
            np.array([True, False, True]), 1.0, "pca2-pixel",
        )  # fmt: skip
        clustering.save(found, out)
        clusters = clustering.to_json(found)
    data, stamp = stamped.pack(arrays)
    (out / "side.npz").write_bytes(data)
    settings = to_json(Side(scales=SCALES))
    settings["sample"]["n"] = N
    settings["surrogate"]["n"] = 30
    settings["adapter"]["rank"] = 0 if classifier else 4
    measured = {"levels": [0.01, 1.0], "accuracy": [est(0.9, 0.7, 1.0), est(0.5, 0.3, 0.7)]}
    measured["ece"] = [est(0.1, 0.0, 0.2), est(0.2, 0.1, None)]
    tree = {
        "format": 1,
        "command": "mdiff side --workdir x",
        "target": {"name": name, "step": 1200, "train": TRAIN, "heldout": 6 if control else 0},
        "settings": settings,
        "surrogate": {
            "teacher": "clusters" if clustered else "model",
            "classes": 2,
            "images": DRAWN,
            "clusters": clusters,
        },
        "classifier": measured if classifier else None,
        "membership": est(0.61, 0.55, 0.66) if classifier and control else None,
        "chosen": chosen,
        "oracle": oracle,
        "strengths": [strength(scale, control) for scale in SCALES],
        "detector": {
            "auroc": est(0.812, 0.7, 0.9),
            "base": est(0.3, 0.1, 0.6),
            "precision": {"5": est(0.8, 0.4, 0.9)},
        },
        "verdict": ["First sentence.", "Second <sentence>."],
        "versions": {"mdiff": "0"},
        "arrays": stamp,
    }
    (out / "side.json").write_text(json.dumps(tree))
    return out, arrays


def pictures(html):
    """Every inlined raster image, in the page's order."""
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def plots(html):
    return [
        base64.b64decode(one).decode() for one in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)
    ]


def stored(out, scale):
    with np.load(out / "guided" / f"scale_{scale:g}.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out, arrays = attack(tmp_path_factory.mktemp("page") / "side")
    return out, arrays, side_page.write(out).read_text()


# ------------------------------------------------------------------------------------------ pictures


def test_each_copy_stands_beside_its_training_image_and_its_own_unguided_sample(made):
    out, arrays, html = made
    guided, plain = stored(out, 2.0), stored(out, 0.0)
    nearest, ratio, copied = (arrays[f"{key}_2"] for key in ("nearest", "ratio", "memorized"))
    shown = pictures(html)[2:]  # two clusters come before
    best = shown[: len(shown) - 3 * N]  # all N generations are among the random ones
    index = [int(np.flatnonzero((guided["x"] == one).all((1, 2, 3)))[0]) for one in best[::3]]
    assert len(index) == max(6, copied.sum()) and sorted(index) == sorted(set(index))
    for i, twin, unguided in zip(index, best[1::3], best[2::3], strict=True):
        np.testing.assert_array_equal(twin, arrays["train"][nearest[i]])
        np.testing.assert_array_equal(unguided, plain["x"][np.flatnonzero(plain["id"] == i)[0]])
    first = index[: len(set(nearest[copied]))]  # the best of each training image, before any second
    assert set(nearest[first]) == set(nearest[copied])
    assert all(ratio[i] == ratio[copied & (nearest == nearest[i])].min() for i in first)
    assert list(ratio[first]) == sorted(ratio[first])
    assert html.count('class="copied"') == 2 * copied.sum()
    for i, one in enumerate(shown[len(best) :: 3]):
        np.testing.assert_array_equal(one, guided["x"][i])  # all of them, by number


def test_copies_come_first_and_one_for_each_training_image_before_a_second():
    nearest = np.array([0, 0, 1, 2, 0, 3])
    ratio = np.array([0.1, 0.2, 0.3, 0.25, 0.05, np.nan])
    copied = np.array([True, True, True, False, False, False])  # number 4 is near its image, and no copy
    np.testing.assert_array_equal(side_page.strongest(nearest, ratio, copied), [0, 2, 1, 3, 4])
    np.testing.assert_array_equal(side_page.strongest(nearest, ratio, copied, least=1), [0, 2, 1])
    np.testing.assert_array_equal(side_page.strongest(nearest, ratio, copied, most=2), [0, 2])
    none = side_page.strongest(nearest, ratio, np.zeros(6, bool), least=3)
    np.testing.assert_array_equal(none, [4, 3, 2])


def test_the_sheet_shows_members_of_each_kept_cluster_the_largest_first(made):
    out, _, html = made
    with np.load(out / "synthetic.npz") as file:
        images = file["x"]
    sheet = pictures(html)[:2]
    members = [np.flatnonzero(np.arange(DRAWN) % 4 != 1)[:8], np.flatnonzero(np.arange(DRAWN) % 4 == 1)]
    for strip, index in zip(sheet, members, strict=True):
        assert strip.shape == (4, 5 * len(index) - 1, 3)  # one white pixel between
        for place, i in enumerate(index):
            np.testing.assert_array_equal(strip[:, 5 * place : 5 * place + 4], images[i])
    assert "18 images (16 its own), cohesion 0.75" in html and "6 images, cohesion 0.80" in html
    assert "2 of 3 clusters" in html and "width: 75.0%" in html


# ------------------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_the_file(made):
    html = made[2]
    for text in ("12.0\N{NO-BREAK SPACE}%", "[2.0, 40.0]", "1.50", "[0.50, 2.50]", "0.456", "0.123"):
        assert text in html, text
    assert "90\N{NO-BREAK SPACE}% intervals" in html  # the audit's, not 95 %
    assert "30 unguided images" in html and "24 of these images" in html
    assert "0.812 [0.700, 0.900]" in html and "Of its 5 most suspicious 80.0" in html
    assert "0.610 [0.550, 0.660]" in html
    assert "rates below 27.8 %." in html and "Second &lt;sentence&gt;." in html
    table = html[html.index('aria-label="Copies by strength"') :]
    rows = re.findall(
        r'<tr( class="on")?><th scope="row" data-sort="[\d.]+">(\d+)(?: <span[^>]*>([^<]*))?', table
    )
    assert rows[:3] == [("", "0", "the model alone"), (' class="on"', "2", "chosen"), (' class="on"', "8", "most copies")]  # fmt: skip


def test_plots_mark_the_strengths(made, tmp_path):
    drawn = plots(made[2])
    assert len(drawn) == 11
    assert sum("<!-- chosen: 2 -->" in one and "<!-- most copies: 8 -->" in one for one in drawn) == 6
    same = plots(side_page.write(attack(tmp_path / "same", chosen=8.0)[0]).read_text())
    assert sum("<!-- chosen and most copies: 8 -->" in one for one in same) == 6
    none = side_page.write(attack(tmp_path / "none", chosen=0.0)[0]).read_text()
    assert not any("chosen" in one for one in plots(none)) and "the attacker would choose none" in none
    assert "The strongest copies at strength 8" in none


def test_the_page_asks_for_nothing_and_runs_its_own_script_only(made):
    html = made[2]
    outside = re.sub(r"data:[a-z+/]+;base64,[^\"]+", "", html)
    assert not re.search(r"https?://|//\w|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")", outside)
    code = re.search(r"<script>(.*?)</script>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.replace("&#39;", "'")


# -------------------------------------------------------------------------------------- other attacks


def test_a_hostile_name_is_text(tmp_path):
    html = side_page.write(attack(tmp_path / "a", name="<script>alert(1)</script>$x_")[0]).read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html


def test_without_heldout_images_nothing_is_made_up(tmp_path):
    html = side_page.write(attack(tmp_path / "a", control=False)[0]).read_text()
    assert "no held-out images" in html and "by chance" in html and len(plots(html)) == 3 + 4 + 1
    assert "held-out control" not in "".join(plots(html))


def test_adapters_and_other_teachers_leave_their_parts_out(tmp_path):
    html = side_page.write(attack(tmp_path / "a", classifier=False)[0]).read_text()
    assert "no classifier to measure" in html and "rank 4" in html
    out, _ = attack(tmp_path / "b", clustered=False)
    html = side_page.write(out).read_text()
    assert "the attacked model itself" in html and "The surrogate condition" not in html


def test_the_model_alone_is_shown_once(tmp_path):
    html = side_page.write(attack(tmp_path / "a", chosen=0.0, oracle=0.0)[0]).read_text()
    assert "without guidance" not in html and len(pictures(html)) % 2 == 0


# -------------------------------------------------------------------------------------- wrong inputs


def _shorter(path):
    with np.load(path) as file:
        columns = {name: file[name] for name in file.files}
    np.savez(path, **{name: column[:-1] for name, column in columns.items()})


def _without(path, key):
    tree = json.loads(path.read_text())
    del tree[key]
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("side.json", Path.unlink, "run mdiff side"),
        ("side.json", lambda path: path.write_text("{"), "damaged"),
        ("side.json", lambda path: path.write_text("[]"), "format None"),
        ("side.json", lambda path: _without(path, "detector"), "detector"),
        ("side.npz", Path.unlink, "no such file"),
        ("side.npz", lambda path: path.write_bytes(b"other"), "does not belong"),
        ("synthetic.npz", Path.unlink, "no such file"),
        ("synthetic.npz", _shorter, "holds 23 images where side.json counts 24"),
        ("clusters.npz", Path.unlink, "no such file"),
        ("guided/scale_2.npz", Path.unlink, "no such file"),
        ("guided/scale_2.npz", lambda path: path.write_bytes(path.read_bytes()[:200]), "damaged"),
        ("guided/scale_2.npz", lambda path: path.write_bytes(b""), "damaged"),
        ("guided/scale_0.npz", _shorter, "holds 9 images where side.json counts 10"),
        ("guided/scale_0.npz", lambda path: np.savez(path, x=np.zeros(N)), "damaged"),
    ],
)
def test_missing_and_damaged_files_are_one_line(tmp_path, file, change, said):
    out, _ = attack(tmp_path / "side")
    change(out / file)
    with pytest.raises(UserError) as caught:
        side_page.write(out)
    text = str(caught.value)
    assert said in text and Path(file).name in text and "\n" not in text
    assert not (out / "side.html").exists()

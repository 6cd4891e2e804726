"""The page of detectors: what it shows is what the files hold."""

import base64
import io
import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from sklearn.metrics import roc_curve

from mdiff.errors import UserError
from mdiff.fields import to_json
from mdiff.nemo import Detect
from mdiff.probes import stamped
from mdiff.report import detect_figures, detect_page

COPIES = (1, 3, 10, 30, 100)
SIDE, G, TRAIN = 6, 5, 12
NAMES = {"weak": (1, 0.2), "strong": (-1, 3.0), "middle": (1, 1.0)}
"""Detector -> sign, and how far it tells memorized prompts from others."""


def est(value, low=None, high=None, n=8):
    return {"value": value, "low": low, "high": high, "n": n}


def prompts(known, rng):
    rows = []
    for i in range(20):
        copies = COPIES[i % 5] if i < 10 else 0
        kind = "heldout" if i >= 10 else "template" if i % 5 == 3 else "verbatim"
        mine = copies >= 10
        scores = {name: sign * (mine * far + rng.normal()) for name, (sign, far) in NAMES.items()}
        rows.append(
            {
                "prompt": f"prompt <{i}>",
                "kind": kind if known else "given",
                "copies": copies if known else 0,
                "own": ([1, 2, 3] if kind == "template" else [i] if copies else []) if known else [],
                "recited": (0.2 * COPIES.index(copies) if copies else 0.0) if known else None,
                "scores": scores,
            }
        )
    return rows


def detection(out: Path, *, known=True, images=True, name="run", seconds=0.0123, **other):
    """A small made-up detection: "strong" is best of all memorized prompts, "middle" of templates."""
    rng = np.random.Generator(np.random.Philox(4))
    out.mkdir(exist_ok=True)
    rows, arrays, detectors = prompts(known, rng), {}, []
    level = {"weak": 0.6, "strong": 0.987, "middle": 0.8}
    for detector, (sign, _) in NAMES.items():
        groups = dict.fromkeys(("all", "verbatim", "template"))
        for group in groups if known else ():
            kinds = ("verbatim", "template") if group == "all" else (group,)
            chosen = [
                row for row in rows if row["copies"] == 0 or (row["copies"] >= 10 and row["kind"] in kinds)
            ]
            truth = [row["copies"] > 0 for row in chosen]
            fpr, tpr, _ = roc_curve(truth, [sign * row["scores"][detector] for row in chosen])
            arrays |= {f"roc_{detector}_{group}_fpr": fpr, f"roc_{detector}_{group}_tpr": tpr}
            auroc = level[detector] if group != "template" else 1 - level[detector] / 2
            groups[group] = {
                "auroc": est(auroc, auroc - 0.1, min(auroc + 0.1, 1.0)),
                "tpr_nearest": est(0.456, 0.2, 0.7),
                "tpr_below": est(None) if detector == "weak" else est(0.345, 0.1, 0.6),
                "positives": sum(truth),
                "negatives": len(truth) - sum(truth),
            }
        needs = {"attention": detector == "weak", "jvp": False, "guidance": True, "calls": 36}
        detectors.append(
            {
                "name": detector,
                "what": f"what {detector} is",
                "sign": sign,
                "needs": needs,
                "seconds": seconds,
                "groups": groups,
            }
        )
    curve = {
        "rungs": {str(copies): est(0.2 * i, 0.1 * i, 0.25 * i, 2) for i, copies in enumerate(COPIES)},
        "r50": est(17.3, 9.1, None),
        "slope": est(2.5, 1.5, 3.5),
        "low": 1,
        "high": 100,
    }
    if images:
        arrays |= {
            "images": rng.integers(0, 256, (2, G, SIDE, SIDE, 3), dtype=np.uint8),
            "image_prompt": np.array([4, 12]),
            "train": rng.integers(0, 256, (TRAIN, SIDE, SIDE, 3), dtype=np.uint8),
        }
    data, stamp = stamped.pack(arrays)
    (out / "detect.npz").write_bytes(data)
    tree = {
        "format": 1,
        "command": "mdiff detect --workdir x",
        "target": {"name": name, "step": 1200, "train": TRAIN, "prompts": len(rows)},
        "settings": to_json(Detect(confidence=0.9, false_alarms=0.02)),
        "detectors": detectors,
        "prompts": rows,
        "truth": "Memorized: half of the generations are copies.",
        "curve": curve if known else None,
        "verdict": ["First sentence.", "Second <sentence>."],
        "versions": {"mdiff": "0"},
        "arrays": stamp,
    }
    (out / "detect.json").write_text(json.dumps({**tree, **other}))
    return out, tree, arrays


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out, tree, arrays = detection(tmp_path_factory.mktemp("page") / "detect")
    return tree, arrays, detect_page.write(out).read_text()


def pictures(html):
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def plots(html):
    return [base64.b64decode(one).decode() for one in re.findall(r"svg\+xml;base64,([^\"]+)", html)]


def table(html, label):
    """Texts of the body's rows, cell by cell."""
    part = html[html.index(f'aria-label="{label}"') :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    return [
        [
            " ".join(unescape(re.sub(r"<[^>]+>", " ", cell)).split())
            for cell in re.findall(r"<t[hd].*?</t[hd]>", one, re.S)
        ]
        for one in re.findall(r"<tr.*?</tr>", body, re.S)
    ]


# ------------------------------------------------------------------------------------------- numbers


def test_the_best_detector_comes_first(made):
    html = made[2]
    rows = table(html, "AUROC")
    assert [row[0] for row in rows] == ["strong what strong is", "middle what middle is", "weak what weak is"]
    assert rows[0][1:] == ["0.987 [0.887, 1.000]", "0.987 [0.887, 1.000]", "0.506 [0.406, 0.606]", "0.0123"]
    found = table(html, "Found")
    assert found[0] == ["strong", *["45.6 % [20.0, 70.0]"] * 3, *["34.5 % [10.0, 60.0]"] * 3]
    assert found[2][4:] == ["–"] * 3
    for text in ("All: 6 memorized against 10 other", "Verbatim: 4 memorized", "Template: 2 memorized"):
        assert text in html, text
    assert "Intervals: 90\N{NO-BREAK SPACE}%" in html
    assert "2\N{NO-BREAK SPACE}% false alarms" in html and "one false alarm is 10 %" in html


def test_needs_are_stated_for_each(made):
    rows = table(made[2], "What each needs")
    assert rows[0] == ["strong", "smaller", "–", "–", "yes", "36", "0.0123"]
    assert rows[2] == ["weak", "larger", "yes", "–", "yes", "36", "0.0123"]


def test_prompts_are_listed_by_what_they_recite(made):
    tree, _, html = made
    rows = table(html, "All prompts")
    assert len(rows) == 20 and [row[3] for row in rows[:3]] == ["80.0 %", "80.0 %", "60.0 %"]
    place = {row["prompt"]: row for row in tree["prompts"]}
    shares = [place[row[0]]["recited"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    still = [place[row[0]]["scores"]["strong"] for row in rows if place[row[0]]["recited"] == 0]
    assert still == sorted(still)  # smaller is more suspicious
    assert float(rows[0][4].replace("−", "-")) == pytest.approx(
        place[rows[0][0]]["scores"]["strong"], rel=1e-2
    )


def test_the_curve_is_told_with_its_open_end(made):
    html = made[2]
    assert "r50 = 17.3 copies [9.1, no upper end]" in html and "extrapolation" not in html
    assert table(html, "Copies by rung")[3] == ["30", "2", "60.0 % [30.0, 75.0]"]


def test_what_lies_outside_of_the_copies_is_called_so(tmp_path):
    out, tree, _ = detection(tmp_path / "a")
    tree["curve"]["r50"] = est(1234.5, 400.0, None)
    (out / "detect.json").write_text(json.dumps(tree))
    assert "1 to 100 copies there are: an extrapolation" in detect_page.write(out).read_text()
    tree["curve"]["r50"] = est(None)
    (out / "detect.json").write_text(json.dumps(tree))
    assert "do not say at how many copies" in detect_page.write(out).read_text()


# -------------------------------------------------------------------------------------------- figures


def lines(monkeypatch):
    """What is drawn as lines from now on: (x, y) by their colour."""
    drawn, plot = [], Axes.plot

    def watched(self, x, y, *rest, **named):
        drawn.append((named.get("color"), np.asarray(x, float), np.asarray(y, float)))
        return plot(self, x, y, *rest, **named)

    monkeypatch.setattr(Axes, "plot", watched)
    return drawn


def test_roc_curves_are_the_stored_ones_on_both_axes(made, monkeypatch):
    tree, arrays, _ = made
    drawn = lines(monkeypatch)
    ordered = detect_page.best_first(tree["detectors"])
    assert len(detect_figures.roc(ordered, arrays, "all", 0.01)) == 2
    by = [(x, y) for ink, x, y in drawn if ink == detect_figures.COLORS[0]]
    fpr, tpr = (arrays[f"roc_strong_all_{end}"] for end in ("fpr", "tpr"))
    np.testing.assert_array_equal(by[0][0], fpr)
    np.testing.assert_array_equal(by[0][1], tpr)
    x, y = by[1]
    assert x[0] == x[1] == 0.05 and y[0] == 0 and x[-1] == y[-1] == 1  # 10 other prompts: half of one
    assert y[1] == tpr[fpr <= 0.05].max() and (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()
    for corner in np.flatnonzero(fpr > 0):
        top = tpr[fpr == fpr[corner]].max()
        assert y[x == fpr[corner]] == pytest.approx(top)


def test_the_fitted_curve_is_half_at_r50_and_grows(made, monkeypatch):
    tree, *_ = made
    drawn = lines(monkeypatch)
    detect_figures.recited(tree["curve"], tree["prompts"])
    x, y = next((x, y) for ink, x, y in drawn if ink == detect_figures.FIT and x.size == 200)
    assert np.interp(np.log(17.3), np.log(x), y) == pytest.approx(0.5, abs=1e-3)
    ten = np.interp(np.log(173 / 10**0.5), np.log(x), y)  # half a decade above
    assert np.log(ten / (1 - ten)) == pytest.approx(2.5 / 2, abs=0.01)


def test_scores_stand_over_their_copies(made, monkeypatch):
    tree, *_ = made
    drawn = lines(monkeypatch)
    found = detect_figures.scores(detect_page.best_first(tree["detectors"]), tree["prompts"])
    assert [plot.alt.split()[0] for plot in found] == ["strong", "middle", "weak"]
    assert "smaller numbers" in found[0].caption and "larger numbers" in found[1].caption
    mine = np.concatenate([y for _, _, y in drawn[:3]])
    assert sorted(mine) == sorted(row["scores"]["strong"] for row in tree["prompts"])


def test_every_group_has_its_figures(made):
    assert len(plots(made[2])) == 3 * 2 + 1 + 3


def test_prompts_show_their_training_images_and_generations(made):
    _, arrays, html = made
    own, generated, other = pictures(html)
    np.testing.assert_array_equal(own, arrays["train"][4])
    for sheet, images in ((generated, arrays["images"][0]), (other, arrays["images"][1])):
        np.testing.assert_array_equal(sheet[7:, :6], images[2])
        np.testing.assert_array_equal(sheet[:6, 7:], images[1])


# ---------------------------------------------------------------------------------- other detections


def test_prompts_without_truth_are_ranked_and_nothing_is_made_up(tmp_path):
    html = detect_page.write(detection(tmp_path / "a", known=False, images=False)[0]).read_text()
    assert "No detector was evaluated" in html and "AUROC" not in html and not plots(html)
    assert "is not known here" in html and "r50" not in html and len(table(html, "All prompts")) == 20
    assert table(html, "All prompts")[0][1:4] == ["given", "–", "–"]


def test_one_group_alone(tmp_path):
    out, tree, _ = detection(tmp_path / "a", seconds=None)
    for one in tree["detectors"]:
        one["groups"]["template"] = None
    tree["detectors"][1]["groups"] = dict.fromkeys(("all", "verbatim", "template"))
    (out / "detect.json").write_text(json.dumps(tree))
    html = detect_page.write(out).read_text()
    assert "AUROC, template" not in html and len(plots(html)) == 4 + 1 + 3
    assert table(html, "AUROC")[-1] == ["strong what strong is", "–", "–", "–"]


def test_hostile_names_are_text(tmp_path):
    bad = "<script>alert(1)</script>$x_"
    html = detect_page.write(detection(tmp_path / "a", name=bad)[0]).read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "prompt &lt;3&gt;" in html and "Second &lt;sentence&gt;." in html


# -------------------------------------------------------------------------------------- wrong inputs


def _without(path, key):
    tree = json.loads(path.read_text())
    del tree[key]
    path.write_text(json.dumps(tree))


def _repack(path, change):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    data, stamp = stamped.pack(arrays)
    path.write_bytes(data)
    owner = path.with_suffix(".json")
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "arrays": stamp}))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("detect.json", Path.unlink, "run mdiff detect"),
        ("detect.json", lambda path: path.write_text("{"), "damaged"),
        ("detect.json", lambda path: path.write_text("3"), "format None"),
        ("detect.json", lambda path: _without(path, "curve"), "curve"),
        ("detect.npz", Path.unlink, "no such file"),
        ("detect.npz", lambda path: path.write_bytes(b"other"), "does not belong"),
        ("detect.npz", lambda path: _repack(path, lambda all: all.pop("train")), "has no train"),
        (
            "detect.npz",
            lambda path: _repack(path, lambda all: all.pop("roc_weak_all_tpr")),
            "no roc_weak_all_tpr",
        ),
        (
            "detect.npz",
            lambda path: _repack(path, lambda all: all.update(image_prompt=np.arange(3))),
            "has images of 2 prompts and 3 names",
        ),
    ],
)
def test_missing_and_damaged_files_are_one_line(tmp_path, file, change, said):
    out, *_ = detection(tmp_path / "detect")
    change(out / file)
    with pytest.raises(UserError) as caught:
        detect_page.write(out)
    text = str(caught.value)
    assert said in text and Path(file).name in text and "\n" not in text
    assert not (out / "detect.html").exists()

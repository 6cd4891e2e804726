"""The page of a search for neurons: what it shows is what the files hold."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdiff.errors import UserError
from mdiff.fields import to_json
from mdiff.nemo import Nemo
from mdiff.probes import stamped
from mdiff.report import nemo_figures, nemo_page

LAYERS = {"net/enc8_0/cross/value_gate": 80, "net/mid8_0/cross/value_gate": 24}
ARMS = ("whole", "own", "union", "random")
PLANTED = (
    ("verbatim", 300),
    ("verbatim", 100),
    ("template", 60),
    ("verbatim", 3),
    ("given", 0),
    ("verbatim", 30),
)
"""Kind and copies of the prompts; the fourth has no kept seed."""
SIDE, TRAIN, G = 6, 9, 5


def est(value, low=None, high=None, n=3):
    return {"value": value, "low": low, "high": high, "n": n}


def row(i, kind, copies, known, layers):
    """One prompt as `mdiff nemo` writes it; its neurons are 3i and 70 of the first layer, and i of the second."""
    own = [] if kind == "given" else [0, 1, 2] if kind == "template" else [3 + i]
    first, second = list(layers)[:2]
    found = {first: [3 * i, 70], second: [i]}
    shares = {name: None if kind == "given" else 1.0 - 0.2 * k for k, name in enumerate(ARMS)}
    return {
        "prompt": f"prompt <{i}> & more",
        "kind": kind,
        "copies": copies,
        "own": own,
        "memorized": known,
        "similarity": 0.9 - 0.1 * i,
        "kept": 7 if known else 0,
        "initial": {first: list(range(20 + i))} if known else {},
        "neurons": found if known else {},
        "theta": 2.75 if known else None,
        "top": 1 if known else 0,
        "tau_ref": 0.412 if known else None,
        "score_initial": 0.3 if known else None,
        "score": 0.387 if known else None,
        "reason": "below tau" if known else "not memorized",
        "evaluations": 1234 if known else 0,
        "rounds": 30,
        "close": 0,
        "copies_of_own": shares if known else {},
        "similar_to_whole": {name: 0.5 for name in ARMS} if known else {},
    }


def search(out: Path, *, memorized=True, settings=Nemo(), layers=LAYERS, name="run", **other):
    """A small made-up search: every pixel is random, and each image different."""
    rng = np.random.Generator(np.random.Philox(5))
    out.mkdir(exist_ok=True)
    rows = [row(i, kind, copies, memorized and i != 3, layers) for i, (kind, copies) in enumerate(PLANTED)]
    known = [each for each in rows if each["memorized"]]
    layer = np.repeat(np.arange(len(layers)), list(layers.values()))
    starts = dict(zip(layers, np.cumsum([0, *layers.values()]), strict=False))
    frequency = np.zeros(len(layer), int)
    for each in known:
        for place, index in each["neurons"].items():
            frequency[starts[place] + np.array(index)] += 1
    images = lambda *n: rng.integers(0, 256, (*n, SIDE, SIDE, 3), dtype=np.uint8)  # noqa: E731
    arrays = {
        "train": images(TRAIN),
        "frequency": frequency,
        "layer": layer,
        "memorized": np.array([each["memorized"] for each in rows]),
    }
    if known:
        arrays |= {f"images_{arm}": images(len(known), G) for arm in ARMS}
    data, stamp = stamped.pack(arrays)
    (out / "nemo.npz").write_bytes(data)
    rates = {arm: est(0.9 - 0.25 * k, 0.6 - 0.2 * k, 0.95 - 0.2 * k) for k, arm in enumerate(ARMS)}
    rates |= {f"{arm} - whole": est(-0.123, -0.3, -0.05) for arm in ARMS[1:]}
    union = {place: np.flatnonzero(frequency[layer == k]).tolist() for k, place in enumerate(layers)}
    tree = {
        "format": 1,
        "command": "mdiff nemo --workdir x",
        "target": {"step": 1200, "digest": "abc", "name": name, "train": TRAIN, "prompts": len(rows)},
        "settings": to_json(settings),
        "sampling": {"images": G, "guidance": 3.0, "seed": 7, "confidence": 0.9},
        "calibration": {
            "tau": 0.4321,
            "mean": 0.3,
            "std": 0.1,
            "scores": rng.normal(0.3, 0.1, 40).tolist(),
            "fresh": rng.normal(0.32, 0.1, 39).tolist(),
            "false_positives": est(0.179, 0.08, 0.34, 39),
        },
        "layers": [{"name": place, "neurons": size} for place, size in layers.items()],
        "prompts": rows,
        "union": {place: index for place, index in union.items() if index},
        "groups": {"verbatim": rates, "template": rates} if known else {},
        "nearest": {"verbatim": rates, "template": rates} if known else {},
        "beside": {"union": 0, "own": len(known), "any layer": 0, "none": 0} if known else {},
        "seconds": {"search": 12.34, "images": 56.7},
        "evaluations": 5 * 1234 if known else 0,
        "calls": 321,
        "verdict": ["First sentence.", "Second <sentence>."],
        "versions": {"mdiff": "0"},
        "arrays": stamp,
    }
    (out / "nemo.json").write_text(json.dumps({**tree, **other}))
    return out, tree, arrays


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out, tree, arrays = search(tmp_path_factory.mktemp("page") / "nemo")
    return tree, arrays, nemo_page.write(out).read_text()


def pictures(html):
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def table(html, label):
    """Texts of the body's rows, cell by cell."""
    part = html[html.index(f'aria-label="{label}"') :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    rows = re.findall(r"<tr.*?</tr>", body, re.S)
    return [
        [
            unescape(re.sub(r"<[^>]+>", " ", cell)).split()
            for cell in re.findall(r"<t[hd].*?</t[hd]>", one, re.S)
        ]
        for one in rows
    ]


# ------------------------------------------------------------------------------------------ pictures


def test_each_prompt_shows_its_training_image_and_the_same_noise_in_each_network(made):
    tree, arrays, html = made
    shown = iter(pictures(html))
    known = [each for each in tree["prompts"] if each["memorized"]]
    for i in (0, 1, 4, 2, 3):  # by kind: verbatim, template, given; the places among the memorized ones
        own = known[i]["own"]
        if len(own) == 1:
            np.testing.assert_array_equal(next(shown), arrays["train"][own[0]])
        elif own:
            sheet = next(shown)
            for place, image in zip([(0, 0), (0, 7), (7, 0)], own, strict=True):
                here = sheet[place[0] : place[0] + SIDE, place[1] : place[1] + SIDE]
                np.testing.assert_array_equal(here, arrays["train"][image])
            assert (sheet[7:, 7:] == 255).all()
        for arm in ARMS:
            sheet = next(shown)
            np.testing.assert_array_equal(sheet[7:, 7:], arrays[f"images_{arm}"][i, 3])  # the fourth of five
            np.testing.assert_array_equal(sheet[:6, :6], arrays[f"images_{arm}"][i, 0])
    assert next(shown, None) is None and "not known" in html
    assert html.index("<h3>Verbatim</h3>") < html.index("<h3>Template</h3>") < html.index("<h3>Given</h3>")


def test_the_most_recited_prompts_come_first():
    shares = [0.5, 1.0, None, 1.0]
    known = [
        {"copies_of_own": {"whole": share}, "similarity": alike}
        for share, alike in zip(shares, [0.9, 0.3, 0.99, 0.4], strict=True)
    ]
    assert nemo_page.strongest(known) == [3, 1, 0, 2]
    assert nemo_page.strongest([{"copies_of_own": {}, "similarity": None}]) == [0]


def test_what_does_not_fit_is_folded_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(nemo_page, "OPEN", 1)
    monkeypatch.setattr(nemo_page, "FOLDED", 1)
    out, *_ = search(tmp_path / "a")
    html = nemo_page.write(out).read_text()
    assert "1 more</summary>" in html and "1 further prompts" in html
    assert len(pictures(html)) == 5 * 2 + 5 + 4


# ------------------------------------------------------------------------------------- layers, neurons


def test_the_map_has_one_cell_for_each_found_neuron_in_its_place(made):
    _, arrays, html = made
    maps = re.findall(r'<dd>(<svg role="img".*?</svg>)</dd>', html, re.S)
    assert len(maps) == 2
    for number, (svg, (name, size)) in enumerate(zip(maps, LAYERS.items(), strict=True)):
        counts = arrays["frequency"][arrays["layer"] == number]
        drawn = np.zeros(size, int)
        for x, y, i, n in re.findall(
            r'class="found" x="(\d+)" y="(\d+)".*?neuron (\d+): in (\d+) prompts?<', svg
        ):
            assert int(i) == 64 * int(y) + int(x)
            drawn[int(i)] = int(n)
        np.testing.assert_array_equal(drawn, counts)
        empty = re.findall(r'class="empty"(?: y="\d+")? width="(\d+)" height="(\d+)"', svg)
        assert sum(int(w) * int(h) for w, h in empty) == size  # as many cells as neurons
        assert f"{name}: {int((counts > 0).sum())} of {size} neurons found" in svg


@pytest.mark.parametrize(
    ("sizes", "columns"), [([16] * 34, 16), ([64, 128], 64), ([320, 320, 640, 640, 1280, 1280, 1280], 128)]
)
def test_wide_layers_take_lines_and_narrow_ones_do_not(sizes, columns):
    layer = np.repeat(np.arange(len(sizes)), sizes)
    frequency = np.arange(len(layer)) % 7
    made = nemo_figures.layers(
        [{"name": f"l{i}", "neurons": n} for i, n in enumerate(sizes)], layer, frequency
    )
    for size, one in zip(sizes, made, strict=True):
        assert f'viewBox="0 0 {columns} {-(-size // columns)}"' in one["svg"]
    assert sum(one["found"] for one in made) == (frequency > 0).sum()


def test_a_neuron_of_more_prompts_is_darker():
    shades = [nemo_figures.shade(count, 9) for count in range(1, 10)]
    assert shades == sorted(set(shades)) and shades[0] > 0.2 and shades[-1] == pytest.approx(1.0)
    assert nemo_figures.shade(1, 1) == 1.0


# ------------------------------------------------------------------------------------------- numbers


def test_every_prompt_has_its_row(made):
    html = made[2]
    rows = table(html, "All prompts")
    assert len(rows) == len(PLANTED)
    first = [" ".join(cell) for cell in rows[0]]
    assert first[:7] == ["prompt <0> & more", "verbatim", "below tau", "300", "0.900", "7 of 10", "20"]
    assert first[7].startswith("3 net/enc8_0/cross/value_gate 0, 70 net/mid8_0/cross/value_gate 0")
    assert first[8:] == ["2.75", "0.412", "0.387", "1,234", "100 %", "80 %", "60 %", "40 %"]
    unknown = [" ".join(cell) for cell in rows[3]]
    assert unknown[2] == "not memorized" and unknown[6:] == ["–"] * 10 and unknown[4] == "0.600"
    assert [" ".join(cell) for cell in rows[4]][12:] == ["–"] * 4  # no training image, no copies
    assert 'data-sort="1234"' in html and 'data-sort="0.387"' in html


def test_numbers_are_those_of_the_file(made):
    html = made[2]
    for text in (
        "17.9\N{NO-BREAK SPACE}%",
        "[8.0, 34.0]",
        "−12.3\N{NO-BREAK SPACE}%",
        "[−30.0, −5.0]",
        "90\N{NO-BREAK SPACE}% intervals",
    ):
        assert text in html, text
    assert "5 of 6 prompts look memorized" in html and "Second &lt;sentence&gt;." in html
    assert "39 fresh ordinary prompts" in html and "6,170 scores in 321 calls, 12.3 s" in html
    assert "apart from the prompt&#39;s own, as too few others are left (5 prompts)" in html
    drawn = [base64.b64decode(one).decode() for one in re.findall(r"svg\+xml;base64,([^\"]+)", html)]
    assert len(drawn) == 4 and any("<!-- tau = 0.432 -->" in one for one in drawn)


def test_bars_are_as_high_as_the_rates(monkeypatch):
    from matplotlib.axes import Axes

    heights, whiskers, bar, plot = [], [], Axes.bar, Axes.plot

    def watched(self, x, height, *rest, **named):
        heights.append(height)
        return bar(self, x, height, *rest, **named)

    def lined(self, x, y, *rest, **named):
        whiskers.append(list(y))
        return plot(self, x, y, *rest, **named)

    monkeypatch.setattr(Axes, "bar", watched)
    monkeypatch.setattr(Axes, "plot", lined)
    rates = {"whole": est(0.9, 0.8, 1.0), "own": est(0.1, 0.0, 0.3), "random": est(None)}
    assert nemo_figures.copies({"verbatim": rates}) is not None
    assert heights == [0.9, 0.1] and whiskers == [[0.8, 1.0], [0.0, 0.3]]


def test_decisions_come_from_where_they_are_written_with_this_search_s_values():
    made = nemo_page.decisions(to_json(replace(Nemo(), tau_sigmas=1.75, two_sided=False)))
    told = " ".join(each["traps"] + " " + each["text"] for each in made)
    assert all(re.search(rf"\bT{i}\b", told) for i in range(1, 16))
    by = {each["what"]: each for each in made}
    assert (
        "tau_sigmas = 1.75" in by["Calibration"]["here"] and "calibrate_on = max" in by["Calibration"]["here"]
    )
    assert by["Outliers"]["here"] == "two_sided = no"
    assert "measure = ssim" in by["Similarity"]["here"] and "T14" in by["Similarity"]["text"]
    assert not any("`" in each["text"] or "\n" in each["text"] for each in made)


def test_close_decisions_are_told(tmp_path):
    out, tree, _ = search(tmp_path / "a")
    for each in tree["prompts"][:2]:
        each["close"] = 2
    (out / "nemo.json").write_text(json.dumps(tree))
    assert "threshold 4 times" in nemo_page.write(out).read_text()


def test_the_page_asks_for_nothing_and_runs_its_own_script_only(made):
    html = made[2]
    outside = re.sub(r"data:[a-z+/]+;base64,[^\"]+", "", html)
    outside = outside.replace("url(#cell)", "")  # a part of the page itself
    assert not re.search(r"https?://|//\w|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")", outside)
    code = re.search(r"<script>(.*?)</script>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.replace("&#39;", "'")


# -------------------------------------------------------------------------------------- other searches


def test_without_a_memorized_prompt_there_is_a_page(tmp_path):
    html = nemo_page.write(search(tmp_path / "a", memorized=False)[0]).read_text()
    assert "None of 6 prompts has a kept seed" in html and not pictures(html)
    assert html.count("<td>not memorized</td>") == 6 and "0 of 104 neurons were found" in html
    assert "Copies with neurons off" not in html and "random neurons were" not in html.lower()


def test_hostile_names_are_text(tmp_path):
    bad = "<script>alert(1)</script>$x_"
    html = nemo_page.write(
        search(tmp_path / "a", name=bad, layers={bad: 80, "net/mid8_0/cross/value_gate": 24})[0]
    )
    text = html.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_scores_that_are_missing_leave_gaps(tmp_path):
    out, tree, _ = search(tmp_path / "a")
    tree["prompts"][0] |= {"similarity": None, "score": None}
    tree["calibration"]["false_positives"] = est(None)
    tree["sampling"].pop("confidence")
    (out / "nemo.json").write_text(json.dumps(tree))
    first = table(nemo_page.write(out).read_text(), "All prompts")[0]
    assert first[4] == ["–"] and first[10] == ["–"]


# -------------------------------------------------------------------------------------- wrong inputs


def _change(path, **other):
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))


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
    _change(path.with_suffix(".json"), arrays=stamp)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("nemo.json", Path.unlink, "run mdiff nemo"),
        ("nemo.json", lambda path: path.write_text("{"), "damaged"),
        ("nemo.json", lambda path: path.write_text("[]"), "format None"),
        ("nemo.json", lambda path: _change(path, format=2), "format 2, this version reads 1"),
        ("nemo.json", lambda path: _without(path, "groups"), "groups"),
        ("nemo.npz", Path.unlink, "no such file"),
        ("nemo.npz", lambda path: path.write_bytes(b"other"), "does not belong"),
        ("nemo.npz", lambda path: _repack(path, lambda all: all.pop("images_own")), "has no images_own"),
        (
            "nemo.npz",
            lambda path: _repack(path, lambda all: all.update(frequency=np.zeros(3, int))),
            "has 3 rows of frequency where nemo.json counts 104",
        ),
    ],
)
def test_missing_and_damaged_files_are_one_line(tmp_path, file, change, said):
    out, *_ = search(tmp_path / "nemo")
    change(out / file)
    with pytest.raises(UserError) as caught:
        nemo_page.write(out)
    text = str(caught.value)
    assert said in text and Path(file).name in text and "\n" not in text
    assert not (out / "nemo.html").exists()

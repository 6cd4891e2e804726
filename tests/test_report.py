"""The report says what the result files say: on files made by hand, checked against hand-worked text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mdiff import config as configs
from mdiff.errors import UserError
from mdiff.probes import records
from mdiff.probes.audit import audit as run_audit
from mdiff.probes.audit import save
from mdiff.report import explore, figures, words
from mdiff.report.collect import Run, read_run
from mdiff.report.page import probe_tables, terminal_table, write_report
from mdiff.types import Estimate

NBSP = "\N{NO-BREAK SPACE}"


def est(value: float, low: float, high: float, n: int = 256) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


ESTIMATES = {
    "memorized": est(0.7616, 0.7058, 0.8096),
    "control": est(0.0, 0.0, 0.0148),
    "excess": est(0.7616, 0.7011, 0.8096),
    "unique": est(0.94, 0.838, 0.979, 50),
    "energy_heldout": est(0.21, 0.18, 0.24),
    "energy_train": est(0.1, 0.09, 0.11),
    "energy_floor": est(0.12, 0.1, 0.14, 50),
}
AMBIENT = ESTIMATES | {
    "memorized": est(0.0, 0.0, 0.0148),
    "excess": est(0.0, -0.0148, 0.0148),
    "energy_heldout": est(0.27, 0.25, 0.29),
}


def curve(values: list[float]) -> dict[str, list[float]]:
    tree = {"tau": [0.3, 0.6, 0.9]}
    for kind in ("ams", "ums"):
        tree |= {kind: values, f"{kind}_low": values, f"{kind}_high": values}
    return tree


def make(
    folder: Path,
    estimates: dict[str, Any] = ESTIMATES,
    *,
    cutoff: float = 0.0,
    pixels: int = 16,
    channels: int = 1,
    drop: tuple[str, ...] = (),
) -> Path:
    """A run folder in the format of training and audit, without the parts named in `drop`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    ratio = np.linspace(0.99, 0.01, 40)  # the last generations are the most copy-like
    arrays: dict[str, np.ndarray] = {
        "ratio": ratio,
        "control_ratio": np.linspace(0.7, 1.0, 40),
        "d1": ratio / 10,
        "memorized": ratio < 1 / 3,
        "nearest_id": np.arange(40) + 100,
        "flipped": np.arange(40) == 39,
    }
    # The top ones are stored out of order: the page must sort.
    for kind, index in (("top", np.array([30, 39, 35, 20])), ("random", np.array([3, 38]))):
        shape = (len(index), pixels, pixels, channels)
        arrays[f"{kind}_generated"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{kind}_nearest"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{kind}_index"] = index
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{k: v for k, v in arrays.items() if k not in drop})
    audit = {
        "format": 1,
        "arrays": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "estimates": estimates,
        "counts": {"generated": 256, "train": 50, "heldout": None},
        "percentiles": {"level": {"all": [5.0, 95.0]}, "d1": {"train": [0.01, 0.2]}},
        "curves": {
            "cosine": {"train": curve([1, 0.9, 0.7]), "heldout": curve([1, 0.3, 0.0])},
            "rms": {"train": curve([0.2, 0.9, 1.0])},
        },
        "notes": ["256 generations cannot show rates below 1.2 %"],
        "feature": "pca32-pixel",
        "digests": {"train": "0123456789abcdef"},
        "config": configs.to_json(configs.Audit()),
    }
    config = configs.Config(loss=configs.Loss(cutoff=cutoff))
    rows: list[dict[str, Any]] = [{"step": step, "loss": 40 / step} for step in (50, 100, 150)]
    rows.insert(
        2, {"step": 100, "eval/memorized": 0.25, "eval/memorized_low": 0.1, "eval/memorized_high": 0.4}
    )
    files: dict[str, bytes] = {
        "audit.npz": buffer.getvalue(),
        "audit.json": json.dumps({k: v for k, v in audit.items() if k not in drop}).encode(),
        "config.json": json.dumps(
            {
                "config": configs.to_json(config),
                "digest": configs.digest(config),
                "versions": {"mdiff": "0.1.0", "jax": "0.10.2"},
            }
        ).encode(),
        "subset.json": json.dumps({"train": {"ids": [1, 2], "sha256": "feed" * 16}}).encode(),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "ledger.json": json.dumps(
            {"seconds": {"train": 140.0, "compile": 12.5}, "images_per_second": 180.0, "peak_rss_gb": 1.4}
        ).encode(),
    }
    for name, content in files.items():
        if name not in drop:
            (folder / name).write_bytes(content)
    return folder


class Page(HTMLParser):
    """Tags, attributes and text; fails on a tag closed out of order."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def report(tmp_path: Path, runs: dict[str, Path], **extra: Any) -> tuple[dict[str, Any], Page]:
    out = tmp_path / "out"
    returned = write_report(out, runs, title="Faces", extra=extra)
    written = json.loads((out / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written == returned
    return written, Page((out / "report.html").read_text())


def fake(name: str, estimates: dict[str, Any], **config: Any) -> Run:
    numbers = {k: Estimate(**v) for k, v in estimates.items()}
    rules = {"config": {"confidence": 0.95}}
    return Run(name, Path(name), rules, numbers, {}, {"config": config}, {}, [], [], {})


def told(*runs: Run) -> str:
    return " ".join(words.verdict(runs)).replace(NBSP, " ")


# Numbers as text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.7616, "76.2 %"), (1.0, "100.0 %"), (0.0, "0.0 %"), (0.0004, "<0.1 %"), (-0.02, "−2.0 %")],
)
def test_percent(value: float, text: str) -> None:
    assert words.percent(value).replace(NBSP, " ") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.21, "0.210"), (0.012345, "0.0123"), (12.0, "12.0"), (123.4, "123"), (0.0, "0"), (1e-7, "1.00e−07")],
)
def test_distance_has_three_digits(value: float, text: str) -> None:
    assert words.distance(value) == text


def test_a_number_and_its_interval_have_equal_decimals() -> None:
    assert words.shown(Estimate(0.0005, -0.0015, 0.0025, 9), "distance") == ("0.00050", "[−0.00150, 0.00250]")
    assert words.shown(Estimate(0.21, 0.18, 0.24, 9), "distance") == ("0.210", "[0.180, 0.240]")
    assert words.shown(Estimate(0.5, 0.05, 1.0, 9), "rate")[1] == "[5.0, 100.0]"
    assert words.shown(Estimate(0.5, float("nan"), 1.0, 9), "rate")[1] == ""


def test_cumulative_counts_what_is_at_or_below() -> None:
    values = np.random.default_rng(1).uniform(size=3000)
    x, y = figures.cumulative(values)
    assert len(x) <= 401
    assert (x[0], y[0], y[-1]) == (0.0, 0.0, 1.0)
    np.testing.assert_allclose(y[1:], [(values <= at).mean() for at in x[1:]])


# The verdict


def test_verdict_memorizes_and_costs_quality() -> None:
    said = told(fake("standard", ESTIMATES), fake("ambient", AMBIENT))
    assert "“standard” memorizes: 76.2 % of its 256 generations are copies" in said
    assert "(95 % interval 70.6 to 81.0 %), against 0.0 % for held-out images" in said
    assert "“ambient” shows no memorization: none of its 256 generations" in said
    assert "cannot rule out a rate up to 1.5 %" in said
    assert "“ambient” memorizes less than “standard”: 0.0 % against 76.2 %, and the intervals do not" in said
    assert "lower memorization comes with worse quality" in said
    assert "0.270 [0.250, 0.290] against 0.210 [0.180, 0.240]" in said


def test_verdict_does_not_depend_on_the_order_of_the_runs() -> None:
    said = told(fake("ambient", AMBIENT), fake("standard", ESTIMATES))
    assert "“ambient” memorizes less than “standard”: 0.0 % against 76.2 %" in said
    assert "comes with worse quality" in said


def test_verdict_better_quality_and_quality_not_shown() -> None:
    better = AMBIENT | {"energy_heldout": est(0.15, 0.14, 0.16)}
    assert "comes with better quality" in told(fake("a", ESTIMATES), fake("b", better))
    same = AMBIENT | {"energy_heldout": est(0.25, 0.23, 0.27)}
    said = told(fake("a", ESTIMATES), fake("b", same))
    assert "comes with no difference in quality that these intervals show" in said
    assert "worse quality" not in said


def test_verdict_overlapping_memorization_ranks_nobody() -> None:
    close = ESTIMATES | {"memorized": est(0.7, 0.64, 0.75)}
    said = told(fake("a", ESTIMATES), fake("b", close))
    assert "No difference in memorization between “a” and “b” is shown" in said
    assert "70.6 to 81.0 % and 64.0 to 75.0 %, overlap" in said
    assert "memorizes less" not in said


def test_verdict_prefers_paired_differences() -> None:
    """Overlapping intervals, but a paired difference that is not zero: the verdict follows the latter."""
    close = ESTIMATES | {"memorized": est(0.7, 0.64, 0.75), "energy_heldout": est(0.23, 0.2, 0.26)}
    runs = [fake("a", ESTIMATES), fake("b", close)]
    difference = {
        "memorized": Estimate(-0.0616, -0.1, -0.02, 256),
        "energy_heldout": Estimate(0.02, 0.005, 0.035, 256),
    }
    said = " ".join(words.verdict(runs, {"b": difference})).replace(NBSP, " ")
    assert "“b” memorizes less than “a”: 70.0 % against 76.2 %" in said
    assert "“b” minus “a” is −6.2 [−10.0, −2.0] percentage points" in said
    assert "comes with worse quality" in said
    assert "paired difference 0.0200 [0.0050, 0.0350]" in said
    assert "mdiff compare" not in said
    nothing = {
        "memorized": Estimate(-0.06, -0.13, 0.01, 256),
        "energy_heldout": Estimate(0.1, -0.1, 0.3, 256),
    }
    said = " ".join(words.verdict(runs, {"b": nothing}))
    assert "No difference in memorization" in said
    assert "Nor is there a difference in quality" in said


def test_paired_differences_are_on_the_page_of_real_audits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, heldout = rng.integers(0, 256, (2, 12, 8, 8, 1), dtype=np.uint8)
    copies = train[rng.integers(0, 12, 40)]
    fresh = rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    rules = configs.Audit(bootstrap=100)
    for name, generated in (("copier", copies), ("fresh", fresh)):
        save(run_audit(generated, train, heldout, rules), tmp_path / name)
    tree, page = report(tmp_path, {name: tmp_path / name for name in ("copier", "fresh")})
    change = tree["differences"]["fresh minus copier"]["memorized"]
    assert change["value"] == -1.0
    assert change["high"] < -0.8
    assert "Paired differences: fresh minus copier" in page.text


def test_verdict_with_leaked_or_swapped_heldout_images(tmp_path: Path) -> None:
    """A control that holds copies of the training images, or is what was copied, is named as such."""
    rng = np.random.default_rng(0)
    train, other = rng.integers(0, 256, (2, 12, 8, 8, 1), dtype=np.uint8)
    rules = configs.Audit(bootstrap=50)
    save(run_audit(train, train, np.concatenate([train[:6], other[:6]]), rules), tmp_path / "leak")
    said = " ".join(report(tmp_path, {"leak": tmp_path / "leak"})[0]["verdict"])
    assert "6 of the held-out images are near-duplicates of training images" in said
    assert "trust the excess" not in said
    assert "never" not in said
    save(run_audit(other, train, other, rules), tmp_path / "swap")
    said = " ".join(report(tmp_path, {"swap": tmp_path / "swap"})[0]["verdict"])
    assert "were the two sets swapped" in said
    assert "no memorization" not in said


def test_verdict_chance_hits_are_not_memorization() -> None:
    chance = ESTIMATES | {
        "memorized": est(0.02, 0.008, 0.045),
        "control": est(0.015, 0.005, 0.04),
        "excess": est(0.005, -0.02, 0.03),
    }
    said = told(fake("a", chance))
    assert "“a” shows no memorization beyond chance" in said
    assert "−2.0 to 3.0 %, includes zero" in said
    assert "were the two sets swapped" in told(fake("a", chance | {"excess": est(-0.05, -0.08, -0.01)}))
    loose = ESTIMATES | {"control": est(0.2, 0.15, 0.25)}
    assert "The control of “a” is high" in told(fake("a", loose))


def test_verdict_without_control_and_beside_the_floor() -> None:
    bare = {k: ESTIMATES[k] for k in ("memorized", "energy_train")}
    said = told(fake("a", bare))
    assert "Without a held-out control" in said
    assert "energy distance to the training images is 0.1" in said
    assert "farther from held-out images" in told(fake("a", ESTIMATES))
    assert "closer to held-out" in told(fake("a", ESTIMATES | {"energy_heldout": est(0.05, 0.04, 0.06)}))
    assert "cannot be told from" in told(fake("a", ESTIMATES | {"energy_heldout": est(0.13, 0.11, 0.2)}))


def test_verdict_warns_of_unequal_runs() -> None:
    a = fake("a", ESTIMATES, train={"steps": 2000}, loss={"cutoff": 0.0})
    b = fake("b", AMBIENT, train={"steps": 1500}, loss={"cutoff": 1.0})
    said = told(a, b)
    assert "number of steps (2,000 and 1,500)" in said
    assert "at the last step of each; a run that learns more slowly also memorizes later" in said
    fewer = AMBIENT | {"memorized": est(0.0, 0.0, 0.05, 64)}
    assert "number of generations (256 and 64)" in told(fake("a", ESTIMATES), fake("b", fewer))
    assert "Caution" not in told(fake("a", ESTIMATES), fake("b", AMBIENT))


# report.json and the terminal


def test_report_json_of_twins(tmp_path: Path) -> None:
    runs = {"standard": make(tmp_path / "s"), "ambient": make(tmp_path / "a", AMBIENT, cutoff=1.0)}
    tree, page = report(tmp_path, runs)
    assert tree["runs"] == ["standard", "ambient"]
    assert tree["seconds"] == 305.0  # 2 (140 + 12.5)
    assert tree["peak_rss_gb"] == 1.4
    assert tree["versions"] == {"mdiff": "0.1.0", "jax": "0.10.2"}
    for name, numbers in (("standard", ESTIMATES), ("ambient", AMBIENT)):
        entry = tree[name]
        assert {k: entry[k] for k in ("memorized", "control", "excess")} == {
            k: numbers[k] for k in ("memorized", "control", "excess")
        }
        assert entry["quality"] == numbers["energy_heldout"] | {"floor": 0.12}
        assert entry["quality_reference"] == "held-out"
        assert entry["estimates"]["unique"] == numbers["unique"]
        assert entry["curve"] == [
            {"step": 50, "loss": 0.8},
            {"step": 100, "loss": 0.4},
            {"step": 100, "memorized": 0.25, "memorized_low": 0.1, "memorized_high": 0.4},
            {"step": 150, "loss": 40 / 150},
        ]
    assert [tree[name]["config"]["cutoff"] for name in tree["runs"]] == [0.0, 1.0]
    assert tree["standard"]["sha256"] == {"train.sha256": "feed" * 16}
    assert "run" not in tree
    assert "76.2 %" in page.text
    assert "feed" * 16 in page.text
    assert page.text.count("256 generations cannot show rates") == 1  # one note of both runs
    assert "different losses" in page.text
    assert "after 150 steps" in page.text  # as logged, not the 2,000 of the config


def test_caller_knows_the_wall_clock_and_the_command(tmp_path: Path) -> None:
    tree, page = report(tmp_path, {"a": make(tmp_path / "a")}, seconds=512.0, command="make <demo>", cpus=2)
    assert tree["seconds"] == 512.0
    assert tree["run"] == tree["a"]
    assert tree["extra"] == {"command": "make <demo>", "cpus": 2}
    assert "make <demo>" in page.text


def test_audit_alone(tmp_path: Path) -> None:
    """No training run, no held-out images: only what is there is shown."""
    energy = ESTIMATES["energy_train"]
    numbers = {"memorized": ESTIMATES["memorized"], "energy_train": energy, "control": None}
    drop = ("config.json", "subset.json", "metrics.jsonl", "ledger.json", "control_ratio", "percentiles")
    tree, page = report(tmp_path, {"them": make(tmp_path / "a", numbers, drop=drop)})
    entry = tree["run"]
    assert (entry["control"], entry["excess"], entry["digest"], entry["curve"]) == (None, None, None, [])
    assert entry["quality"] == {**energy, "floor": None}
    assert entry["quality_reference"] == "train"
    assert (tree["seconds"], tree["peak_rss_gb"], tree["versions"]) == (None, None, {})
    assert "Quality: energy distance to train" in page.text
    for absent in ("Control", "Excess", "Seconds by cause", "Loss and memorized", "steps", "digest"):
        assert absent not in page.text


def test_sections_without_files_are_hidden(tmp_path: Path) -> None:
    whole = report(tmp_path, {"a": make(tmp_path / "a")})[1].text
    for heading in ("Pictures", "Curves", "Limits", "drawn at random", "Percentiles"):
        assert heading in whole
    drop = ("audit.npz", "arrays", "curves", "notes", "metrics.jsonl", "percentiles")
    bare = report(tmp_path, {"a": make(tmp_path / "b", drop=drop)})[1].text
    for heading in ("Pictures", "Curves", "Limits", "drawn at random", "Percentiles"):
        assert heading not in bare


LEAN = ("curves", "metrics.jsonl", "ratio", "control_ratio")
"""Parts that only add figures, left out where a test is not about them."""


def test_an_estimate_without_interval_is_shown_and_never_compared(tmp_path: Path) -> None:
    open_ended = ESTIMATES | {"energy_heldout": est(0.21, 0, 0) | {"low": None, "high": None}}
    tree, page = report(
        tmp_path, {"a": make(tmp_path / "a", open_ended, drop=LEAN), "b": make(tmp_path / "b", drop=LEAN)}
    )
    assert tree["a"]["quality"]["low"] is None
    assert "no interval" in page.text
    assert "Their quality has no interval, so it is not compared" in page.text
    assert "worse" not in " ".join(tree["verdict"])


def test_terminal_table_has_every_number(tmp_path: Path) -> None:
    runs = {"standard": make(tmp_path / "s", drop=LEAN), "[red]x": make(tmp_path / "a", AMBIENT, drop=LEAN)}
    tree, _ = report(tmp_path, runs)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(terminal_table(tree))
    text = console.export_text().replace(NBSP, " ")
    assert "[red]x" in text
    for cell in (
        "76.2 % [70.6, 81.0] (n = 256)",
        "0.210 [0.180, 0.240] (n = 256)",
        "94.0 % [83.8, 97.9] (n = 50)",
    ):
        assert cell in text


# The page


def assert_only_our_script(html: str, page: Page) -> None:
    """One inlined script, which the page's policy names by its hash, and one element of data."""
    assert [attrs.get("type") for attrs in page.all("script")] == ["application/json", None]
    code = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(code) == 1
    digest = base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def embedded(tmp_path: Path) -> dict[str, Any]:
    """The data in the page."""
    html = (tmp_path / "out" / "report.html").read_text()
    return json.loads(re.findall(r'id="data">(.*?)</script>', html, re.S)[0])


def test_page_is_self_contained_and_accessible(tmp_path: Path) -> None:
    _, page = report(tmp_path, {"a": make(tmp_path / "a"), "b": make(tmp_path / "b", AMBIENT)})
    html = (tmp_path / "out" / "report.html").read_text()
    assert len(html.encode()) < 3e6
    assert_only_our_script(html, page)
    for _, attrs in page.tags:
        for name in ("src", "href"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert "url(" not in html.split("</style>")[0]
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\b *\(", html.split("</main>")[1])
    assert "@import" not in html
    images = page.all("img")
    assert len(images) > 20
    assert all(attrs.get("alt") for attrs in images)
    assert all("scope" in attrs for attrs in page.all("th"))
    for attrs in images:
        kind, content = str(attrs["src"]).split(";base64,")
        raw = base64.b64decode(content, validate=True)
        if kind == "data:image/svg+xml":
            ElementTree.fromstring(raw)
        else:
            Image.open(io.BytesIO(raw)).verify()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_exact_and_sorted_by_ratio(tmp_path: Path, channels: int) -> None:
    folder = make(tmp_path / "a", channels=channels)
    _, page = report(tmp_path, {"a": folder})
    shown = [attrs for attrs in page.all("img") if str(attrs["alt"]).startswith("Generation ")]
    order = [int(re.findall(r"\d+", str(attrs["alt"]))[0]) for attrs in shown]
    assert order == [39, 35, 30, 20, 3, 38]  # ratio falls with the index; random ones keep their order
    with np.load(folder / "audit.npz") as arrays:
        first = arrays["top_generated"][list(arrays["top_index"]).index(39)]
    raw = base64.b64decode(str(shown[0]["src"]).split(",")[1])
    pixels = np.asarray(Image.open(io.BytesIO(raw)))
    np.testing.assert_array_equal(pixels.reshape(first.shape), first)
    # ratio < 1/3 holds for indices 27 and above: 39, 35, 30 of the top and 38 of the random ones.
    assert [attrs.get("class") for attrs in page.all("li")][:6] == ["copied"] * 3 + [None, None, "copied"]
    assert page.text.count("● memorized ratio") == 4
    assert page.text.count("○ not flagged") == 2
    assert page.text.count("139 mirrored") == 1


def test_large_pictures_stay_small(tmp_path: Path) -> None:
    """Noise is the worst case for compression; four pictures of 256 x 256 would be 800 kB as PNG."""
    report(tmp_path, {"a": make(tmp_path / "a", pixels=256, channels=3, drop=LEAN)})
    assert (tmp_path / "out" / "report.html").stat().st_size < 8e5


@pytest.mark.parametrize(
    "name", ["<b>bold</b>", "$\\frac{", "_hidden", '"><script>alert(1)</script>', "日本"]
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_inert(tmp_path: Path, name: str) -> None:
    tree, page = report(tmp_path, {name: make(tmp_path / "a", drop=("curves", "ratio", "control_ratio"))})
    assert tree["runs"][0] == name
    assert name in page.text
    assert_only_our_script((tmp_path / "out" / "report.html").read_text(), page)
    assert embedded(tmp_path)["runs"][0]["name"] == name
    assert "bold" not in page.words  # as it would be, were <b> a tag


def test_figures_show_the_control_only_when_there_is_one(tmp_path: Path) -> None:
    run = read_run("a", make(tmp_path / "a"))
    with_control, without = (figures.similarity([run], space, "ams") for space in ("cosine", "rms"))
    assert with_control is not None
    assert without is not None
    assert with_control.svg.count("stroke-dasharray") == 2  # the curve, and its entry in the legend
    assert without.svg.count("stroke-dasharray") == 0
    assert figures.similarity([run], "absent", "ams") is None


def test_same_files_same_page(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    pages = []
    for name in ("one", "two"):
        write_report(tmp_path / name, {"a": folder}, title="t")
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_reads_what_the_audit_saves(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, heldout = rng.integers(0, 256, (2, 12, 8, 8, 1), dtype=np.uint8)
    generated = np.concatenate([train[:6], rng.integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)])
    rules = configs.Audit(bootstrap=50)
    save(run_audit(generated, train, heldout, rules), tmp_path / "a")
    tree, page = report(tmp_path, {"a": tmp_path / "a"})
    assert (tree["run"]["memorized"]["value"], tree["run"]["memorized"]["n"]) == (6 / 16, 16)
    assert tree["run"]["control"]["value"] == 0
    alts = [str(attrs["alt"]) for attrs in page.all("img")]
    top = [int(re.findall(r"\d+", alt)[0]) for alt in alts if alt.startswith("Generation ")][:6]
    assert sorted(top) == list(range(6))
    for heading in ("Similarity to the nearest image", "Distance to the nearest image", "Limits"):
        assert heading in page.text


# What can be moved, filtered and sorted


def test_sliders_hold_the_numbers_of_the_audit(tmp_path: Path) -> None:
    """Every mark is the number in audit.json, every text the same number, every count right."""
    rng = np.random.default_rng(0)
    train, heldout = rng.integers(0, 256, (2, 12, 8, 8, 1), dtype=np.uint8)
    runs = {}
    for name, copies in (("a", 6), ("b", 2)):
        fresh = rng.integers(0, 256, (16 - copies, 8, 8, 1), dtype=np.uint8)
        generated = np.concatenate([train[:copies], fresh])
        save(run_audit(generated, train, heldout, configs.Audit(bootstrap=20)), tmp_path / name)
        runs[name] = tmp_path / name
    _, page = report(tmp_path, runs)
    sliders = embedded(tmp_path)["sliders"]
    assert set(sliders) == {"ratio", "cosine", "rms"}
    for space in ("cosine", "rms"):
        slider = sliders[space]
        for row in slider["rows"]:
            tree = json.loads((runs["ab"[row["run"]]] / "audit.json").read_text())["curves"][space]
            curve = tree[{"training images": "train", "held-out images": "heldout"}[row["side"]]]
            assert slider["at"] == curve["tau"]
            assert row["marks"][f"{space}-ams"] == curve["ams"]
            assert row["marks"][f"{space}-ums"] == curve["ums"]
            assert row["n"] == 16
            for k in range(len(slider["at"])):
                low, high = (f"{100 * curve[f'ams_{end}'][k]:.1f}" for end in ("low", "high"))
                shown = f"{100 * curve['ams'][k]:.1f} % [{low}, {high}]"
                assert row["cells"][0][k].replace(NBSP, " ") == shown
                assert row["cells"][2][k] == str(int(curve["unique"][k]))
    slider = sliders["ratio"]
    assert slider["text"][slider["start"]] == "1/3"
    for row in slider["rows"]:
        with np.load(runs["ab"[row["run"]]] / "audit.npz") as arrays:
            values = arrays["ratio" if row["side"] == "training images" else "control_ratio"]
        for cut, share in zip(slider["at"], row["marks"]["ratio"], strict=True):
            assert share == sum(value < cut for value in values) / 16
    by_run = {(row["run"], row["side"]): row["marks"]["ratio"][slider["start"]] for row in slider["rows"]}
    assert by_run == {
        (0, "training images"): 6 / 16, (0, "held-out images"): 0,
        (1, "training images"): 2 / 16, (1, "held-out images"): 0,
    }  # fmt: skip
    assert "training images37.5 % [18.5, 61.4]16" in page.text  # as it stands before the script runs


def test_marks_lie_on_the_curve(tmp_path: Path) -> None:
    """The recorded place of the axes maps (τ, value) to the end of the drawn curve, in the SVG's own points."""
    run = read_run("a", make(tmp_path / "a", drop=("control_ratio",)))
    plot = figures.similarity([run], "rms", "ams")  # from (0.3, 0.2) over (0.6, 0.9) to (0.9, 1)
    assert plot is not None
    _, _, width, height = map(float, re.findall(r'viewBox="([^"]+)"', plot.svg)[0].split())
    left, right, bottom, top = plot.box
    expected = [
        (
            width * (left + (right - left) * (x - plot.x[0]) / (plot.x[1] - plot.x[0])),
            height * (1 - bottom - (top - bottom) * (y - plot.y[0]) / (plot.y[1] - plot.y[0])),
        )
        for x, y in ((0.3, 0.2), (0.6, 0.9), (0.9, 1.0))
    ]
    paths = re.findall(r'<path d="([^"]+)"', plot.svg)
    drawn = [
        np.array([pair.split() for pair in re.findall(r"[-\d.]+ [-\d.]+", path)], float)
        for path in paths
        if path.count("L") == 2
    ]
    assert any(line.shape == (3, 2) and np.allclose(line, expected, atol=0.1) for line in drawn)


def test_every_generation_is_on_the_page(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", drop=("curves", "metrics.jsonl"))
    _, page = report(tmp_path, {"a": folder})
    run = embedded(tmp_path)["runs"][0]
    pairs = run["pairs"]
    assert pairs["total"] == 40
    assert pairs["index"] == list(range(39, -1, -1))  # the ratio falls with the index
    with np.load(folder / "audit.npz") as arrays:
        np.testing.assert_allclose(pairs["ratio"], arrays["ratio"][::-1], rtol=1e-3)
        np.testing.assert_allclose(pairs["d1"], arrays["d1"][::-1], rtol=1e-3)
        assert pairs["memorized"] == [int(x) for x in arrays["memorized"][::-1]]
        assert pairs["id"] == (arrays["nearest_id"][::-1]).tolist()
    assert pairs["mirrored"] == [1] + [0] * 39
    assert "cosine" not in pairs  # an older audit without it
    assert run["pictures"] == {}  # all six are on the page already
    assert [attrs["data-index"] for attrs in page.all("li") if "data-index" in attrs][:4] == [
        "39", "35", "30", "20",
    ]  # fmt: skip


def test_pictures_beyond_the_static_ones_come_with_the_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, heldout, generated = rng.integers(0, 256, (3, 70, 4, 4, 1), dtype=np.uint8)
    result = run_audit(generated, train, heldout, configs.Audit(bootstrap=20))
    save(replace(result, curves={}), tmp_path / "a")
    _, page = report(tmp_path, {"a": tmp_path / "a"})
    shown = {attrs["data-index"] for attrs in page.all("li") if "data-index" in attrs}
    more = embedded(tmp_path)["runs"][0]["pictures"]
    assert not shown & set(more)
    with np.load(tmp_path / "a" / "audit.npz") as arrays:
        stored = {str(i) for i in [*arrays["top_index"], *arrays["random_index"]]}
        assert shown | set(more) == stored
        index = int(next(iter(more)))
        kind = "top" if index in arrays["top_index"] else "random"
        place = list(arrays[f"{kind}_index"]).index(index)
        for uri, part in zip(more[str(index)], ("generated", "nearest"), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
            np.testing.assert_array_equal(pixels, arrays[f"{kind}_{part}"][place][..., 0])


def test_rows_on_the_page_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore, "ROWS", 5)
    pairs = explore.pairs(read_run("a", make(tmp_path / "a")))
    assert pairs is not None
    assert (pairs["total"], pairs["index"]) == (40, [39, 38, 37, 36, 35])


def test_controls_wait_for_the_script(tmp_path: Path) -> None:
    """Without JavaScript nothing is shown that does nothing, and sorting has numbers to sort by."""
    drop = ("curves", "metrics.jsonl")
    runs = {"a": make(tmp_path / "a", drop=drop), "b": make(tmp_path / "b", AMBIENT, drop=drop)}
    _, page = report(tmp_path, runs)
    for attrs in page.all("form"):
        assert "hidden" in attrs
        assert "data-js" in attrs
    assert all("hidden" in attrs for attrs in page.all("button") if attrs.get("class") == "more")
    tables = [attrs for attrs in page.all("table") if "sortable" in str(attrs.get("class"))]
    assert len(tables) >= 2
    sort = [attrs["data-sort"] for attrs in page.all("td") if "data-sort" in attrs]
    assert sort[:2] == ["0.7616", "0.0"]
    assert "@media print" in (tmp_path / "out" / "report.html").read_text()


# Probes


def probe(name: str = "yields", value: float | None = 0.25, **more: Any) -> records.ProbeResult:
    number = None if value is None else Estimate(value, value - 0.05, value + 0.05, 40)
    return records.ProbeResult(
        probe=name,
        title="How <many>",
        space="pixels",
        rows=[
            records.Measure("rate", "a rate", number, "%", "lower", "says this; not that"),
            records.Measure("count", "images", Estimate(12.0, float("nan"), float("nan"), 40), "images"),
            records.Measure("gone", "class rate", None, "%", "", "one class is missing"),
        ],
        tables=[records.Table("By class", ["class", "n", "rate"], [["dog", 1200, 0.5], ["cat", 3, None]])],
        curves=[records.Curve("Growth", "generations", [1.0, 2.0], [records.Series("seen", [1.0, 2.0])])],
        notes=["a limit"],
        **more,
    )


def test_probes_are_sections_with_the_runs_side_by_side(tmp_path: Path) -> None:
    runs = {name: make(tmp_path / name, drop=LEAN) for name in ("a", "b", "c")}
    records.save(probe(), runs["a"])
    records.save(probe(value=None), runs["b"])
    tree, page = report(tmp_path, runs)
    html = (tmp_path / "out" / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    for part in (
        "How &lt;many&gt; Measured in: pixels. Not run for c.",
        "A rate 25.0 % [20.0, 30.0] n = 40 absent – Says this; not that. Lower is better.",
        "Images 12.0 images no interval n = 40 12.0 images no interval n = 40 –",
        "Class rate absent absent – One class is missing.",
        "By class run class n rate a dog 1,200 0.500 a cat 3 – b dog 1,200 0.500 b cat 3 –",
        "A limit.",
    ):
        assert text.count(part) == 1, part
    assert sum(attrs.get("alt") == "Growth" for attrs in page.all("img")) == 1
    entry = tree["a"]["probes"]["yields"]
    assert entry["measures"][0] == {
        "key": "rate", "label": "a rate", "value": 0.25, "low": 0.2, "high": 0.3, "n": 40,
        "unit": "%", "better": "lower", "note": "says this; not that",
    }  # fmt: skip
    assert entry["measures"][1]["low"] is None
    assert entry["curves"][0]["series"][0]["y"] == [1.0, 2.0]
    assert tree["c"]["probes"] == {}
    console = Console(width=100, record=True, file=io.StringIO())
    for table in probe_tables(tree):
        console.print(table)
    shown = console.export_text().replace(NBSP, " ")
    assert "25.0 % [20.0, 30.0] (n = 40)" in shown
    assert "absent" in shown


def test_damaged_probe_results_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", drop=LEAN)
    path = records.save(probe(), folder)
    path.write_text(path.read_text()[:50])
    refuse(tmp_path, {"a": folder}, str(path), "not JSON")


# metrics.jsonl


def test_metrics_of_an_interrupted_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    rows = ['{"step": 50, "loss": 1.0}', '{"step": 100, "loss": 9.0}', '{"step": 100, "loss": 0.5}']
    (folder / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 150, "loss": NaN}', '{"step": 2']))
    tree, _ = report(tmp_path, {"a": folder})
    assert tree["a"]["curve"] == [
        {"step": 50, "loss": 1.0},
        {"step": 100, "loss": 0.5},
        {"step": 150, "loss": None},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(["{broken", *rows]))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is damaged"):
        read_run("a", folder)


# Bad input


def refuse(tmp_path: Path, runs: dict[str, Path], *expected: str) -> None:
    """One line that says all of `expected`; nothing is written."""
    with pytest.raises(UserError) as caught:
        write_report(tmp_path / "out", runs, title="t")
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert text in message
    assert not (tmp_path / "out").exists()


def test_no_audit_names_folder_and_command(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", drop=("audit.json",))
    command = f"mdiff eval --workdir {folder} --probes audit"
    refuse(tmp_path, {"good": make(tmp_path / "b"), "bad": folder}, "bad", "audit.json", command)
    refuse(tmp_path, {"bad": tmp_path / "nowhere"}, "bad", "nowhere")
    refuse(tmp_path, {}, "no run")
    refuse(tmp_path, {"verdict": make(tmp_path / "c")}, "verdict", "another name")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"estimates": {"memo', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "list"),
        (b'{"estimates": {}}', "memorized"),
        (b'{"estimates": {"memorized": {"value": 0.5, "low": 0.4, "high": 0.6}}}', "memorized"),
        (b'{"estimates": {"memorized": {"value": NaN, "low": 0, "high": 1, "n": 4}}}', "memorized"),
        (b'{"estimates": {"memorized": {"value": "0", "low": 0, "high": 1, "n": 4}}}', "memorized"),
        (b'{"format": 99, "estimates": {}}', "format 99"),
    ],
)
def test_unreadable_audit(tmp_path: Path, content: bytes, text: str) -> None:
    folder = make(tmp_path / "a")
    (folder / "audit.json").write_bytes(content)
    refuse(tmp_path, {"a": folder}, str(folder), text, f"mdiff eval --workdir {folder} --probes audit")


def test_unreadable_arrays(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    whole = (folder / "audit.npz").read_bytes()
    (folder / "audit.npz").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path, {"a": folder}, "audit.npz", "cannot be read")
    other = make(tmp_path / "b", pixels=8)
    (folder / "audit.npz").write_bytes((other / "audit.npz").read_bytes())
    refuse(tmp_path, {"a": folder}, "audit.npz", "not the one audit.json was saved with")
    wrong = make(tmp_path / "c", drop=("arrays",))
    with np.load(wrong / "audit.npz") as stored:
        arrays = dict(stored)
    np.savez(wrong / "audit.npz", **arrays | {"top_nearest": arrays["top_nearest"][:, :4]})
    refuse(tmp_path, {"a": wrong}, "audit.npz", "top_")


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make(tmp_path / "a", drop=LEAN), tmp_path / "out"
    write_report(out, {"a": folder}, title="old")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(out, {"a": folder}, title="new")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        write_report(tmp_path / "file" / "out", {"a": folder}, title="t")

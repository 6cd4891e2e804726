"""Human verdicts: the pairs shown, what the page gives away, and the arithmetic on the answers."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from mdiff import cli, config
from mdiff.data.split import save_subset
from mdiff.errors import UserError
from mdiff.probes import records, results, verdicts
from mdiff.probes.audit import audit
from mdiff.probes.results import AuditResult
from mdiff.probes.verdicts import Answers, Sheet, choose, read_answers
from mdiff.recipes import experiment
from mdiff.report.judge import export
from mdiff.report.page import write_report
from mdiff.train import workdir

RULES = config.Audit(bootstrap=200)


class Quiet:
    def progress(self, *_: Any) -> None: ...

    def say(self, message: str) -> None: ...


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """30 generations: 12 copies of training images, the others new."""
    rng = np.random.default_rng(0)
    train, heldout = rng.integers(0, 256, (2, 20, 8, 8, 1), dtype=np.uint8)
    copies = np.clip(train[:12].astype(int) + rng.integers(-20, 21, (12, 8, 8, 1)), 0, 255).astype(np.uint8)
    fresh = rng.integers(0, 256, (18, 8, 8, 1), dtype=np.uint8)
    return np.concatenate([copies, fresh])[rng.permutation(30)], train, heldout


@pytest.fixture(scope="module")
def found(sets: tuple[np.ndarray, ...]) -> AuditResult:
    return audit(*sets, RULES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder without training: 40 generations, 20 of them blurred training faces."""
    folder = tmp_path_factory.mktemp("run")
    cfg = config.Config(
        data=config.Data(source="faces", size=16, n=30, heldout=30),
        net=config.Net(channels=32, mults=(1,), blocks=1, attention=(), patch=2),
        audit=RULES,
    )
    made = experiment.prepare(cfg)
    workdir.write(folder, cfg, made.model.shape, 1)
    save_subset(folder / "subset.json", made.subset, cfg.data)
    rng = np.random.default_rng(0)
    train = made.subset.train.x.astype(int)
    copies = np.clip(train[:20] + rng.integers(-9, 10, train[:20].shape), 0, 255)
    fresh = rng.integers(0, 256, (20, *train.shape[1:]))
    np.savez(folder / "samples.npz", x=np.concatenate([copies, fresh]).astype(np.uint8), step=7)
    experiment.audit(made, folder, Quiet())
    return folder


def answers(sheet: Sheet, said: Any, judge: str = "A") -> Answers:
    return Answers(judge, tuple(said), sheet.top, sheet.controls, sheet.seed, sheet.digest, f"{judge}.json")


def wilson(hits: int, n: int) -> tuple[float, float, float]:
    interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return hits / n, interval.low, interval.high


def limits(estimate: Any) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


# The pairs


def test_pairs_are_the_lowest_ratios_and_controls_without_them(found: AuditResult) -> None:
    sheet = choose(found, top=10, controls=6, seed=3)
    assert (len(sheet), int(sheet.control.sum())) == (16, 6)
    assert len(set(sheet.generation.tolist())) == 16  # nothing is shown twice
    ratio, other = found.rows["ratio"], found.rows["control_ratio"]
    by_ratio = sorted(range(30), key=lambda i: ratio[i])
    assert [int(i) for i in sheet.generation[~sheet.control][np.argsort(sheet.rank[~sheet.control])]] == (
        by_ratio[:10]
    )
    rest = sorted(by_ratio[10:], key=lambda i: other[i])[:6]
    assert [int(i) for i in sheet.generation[sheet.control][np.argsort(sheet.rank[sheet.control])]] == rest
    for place in range(16):
        i, prefix = sheet.generation[place], "control_" if sheet.control[place] else ""
        assert sheet.match[place] == found.rows[f"{prefix}nearest_index"][i]
        assert sheet.flagged[place] == (not sheet.control[place] and ratio[i] < RULES.ratio)


def test_the_order_is_shuffled_by_seed(found: AuditResult) -> None:
    one, same, other = (choose(found, 10, 6, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.generation, same.generation)
    assert one.digest == same.digest != other.digest
    assert set(one.generation) == set(other.generation)
    assert list(one.generation) != list(other.generation)
    first = choose(found, 15, 15, 0).control[:15]
    assert 3 <= first.sum() <= 12  # controls do not stand together


def test_numbers_of_pairs(found: AuditResult, sets: tuple[np.ndarray, ...]) -> None:
    assert (choose(found).top, choose(found).controls) == (20, 10)
    alone = audit(sets[0], sets[1], None, RULES)
    assert (choose(alone).top, choose(alone).controls) == (30, 0)
    for top, controls, words in (
        (25, 6, "--top 25, --controls 6: the audit has 30"),
        (0, 1, "--top 0"),
        (5, -1, "-1"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            choose(found, top, controls)
    with pytest.raises(UserError, match="no held-out images"):
        choose(alone, 5, 2)


# The arithmetic


def test_rates_of_one_judge(found: AuditResult) -> None:
    """All flagged pairs but two are copies, one of them unsure; one control is called a copy."""
    sheet = choose(found, 15, 10)
    flagged, plain, control = (
        np.flatnonzero(x) for x in (sheet.flagged, ~sheet.flagged & ~sheet.control, sheet.control)
    )
    assert (len(flagged), len(plain), len(control)) == (12, 3, 10)
    said: list[str | None] = ["no"] * 25
    for i in flagged[2:]:
        said[i] = "yes"
    said[flagged[0]] = "unsure"
    said[plain[0]] = said[control[0]] = "yes"
    said[control[1]] = None
    result = verdicts.verdicts(found, [answers(sheet, said)])
    assert limits(result["precision"].estimate) == pytest.approx(wilson(10, 12))
    assert limits(result["missed"].estimate) == pytest.approx(wilson(1, 3))
    assert limits(result["false_alarms"].estimate) == pytest.approx(wilson(1, 9))
    assert limits(result["unsure"].estimate) == pytest.approx(wilson(1, 24))
    assert "12 of 12 flagged" in result["precision"].note
    assert any("1 of 25 pairs are unanswered by A" in note for note in result.notes)
    assert any("one judge" in note for note in result.notes)
    line = result.curves[0].series[0]
    by_rank = {int(sheet.rank[i]): said[i] == "yes" for i in range(25) if not sheet.control[i]}
    for k in range(1, 16):
        hits = sum(by_rank[rank] for rank in range(k))
        assert line.low is not None
        assert line.high is not None
        assert (line.y[k - 1], line.low[k - 1], line.high[k - 1]) == pytest.approx(wilson(hits, k))


def test_kappa_of_a_worked_example() -> None:
    """Cohen's example of proposals: 20 both yes, 15 both no, 5 and 10 split: po 0.7, pe 0.5, kappa 0.4."""
    first = [0] * 25 + [1] * 25
    second = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    kappa, n = verdicts._kappa(np.array(first), np.array(second), 0.95, RULES)
    assert n == 50
    assert kappa is not None
    assert kappa.value == pytest.approx(0.4)
    # Fleiss, Cohen and Everitt 1969: the large-sample standard error here is 0.127.
    assert kappa.low == pytest.approx(0.4 - 1.96 * 0.127, abs=0.06)
    assert kappa.high == pytest.approx(0.4 + 1.96 * 0.127, abs=0.06)
    first[0], second[-1] = -1, -1  # unanswered pairs are left out
    assert verdicts._kappa(np.array(first), np.array(second), 0.95, RULES)[1] == 48
    assert verdicts._kappa(np.zeros(5), np.zeros(5), 0.95, RULES) == (None, 5)
    opposite = verdicts._kappa(np.array([0, 1] * 10), np.array([1, 0] * 10), 0.95, RULES)[0]
    assert opposite is not None
    assert opposite.value == pytest.approx(-1)


def test_two_and_three_judges(found: AuditResult) -> None:
    sheet = choose(found, 12, 6)
    everything, nothing = ["yes"] * 18, ["no"] * 18
    both = verdicts.verdicts(found, [answers(sheet, everything), answers(sheet, nothing, "B")])
    precision = both["precision"].estimate
    assert precision is not None
    assert precision.value == 0  # a tie is not more than half
    assert both["kappa"].estimate is not None
    half = [None, *everything[1:]]
    three = verdicts.verdicts(
        found, [answers(sheet, everything), answers(sheet, nothing, "B"), answers(sheet, half, "C")]
    )
    alarms = three["false_alarms"].estimate
    assert alarms is not None
    expected = 6 - int(sheet.control[0])  # the first pair has one yes of two
    assert (alarms.value * 6, alarms.n) == (pytest.approx(expected), 6)
    assert [table.title for table in three.tables] == ["By judge", "Agreement of two judges"]
    assert len(three.tables[1].rows) == 3
    assert [row[0] for row in three.tables[0].rows] == ["A", "B", "C"]
    assert "kappa" not in {row.key for row in three.rows}
    two = verdicts.verdicts(
        found, [answers(sheet, everything), replace(answers(sheet, half), path="x/y.json")]
    )
    assert two.config["judges"] == ["A (A)", "A (y)"]


# The file


def test_answers_file(tmp_path: Path, found: AuditResult) -> None:
    sheet = choose(found, 5, 2)
    good = {
        "format": 1, "sheet": sheet.digest, "top": 5, "controls": 2, "seed": 0, "judge": " Eve ",
        "answers": ["yes", None, "no", "unsure", "no", "no", "yes"],
    }  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps(good))
    read = read_answers(path)
    assert (read.judge, read.said[1], read.top) == ("Eve", None, 5)
    path.write_text(json.dumps(good | {"judge": ""}))
    assert read_answers(path).judge == "a"
    for wrong, words in (
        (json.dumps(good)[:40], "not JSON"),
        ("[]", "not an answers file"),
        (json.dumps(good | {"format": 2}), "not an answers file of format 1"),
        (json.dumps(good | {"answers": ["yes"]}), "1 answers for 7 pairs"),
        (json.dumps(good | {"answers": "yes"}), "no list of answers"),
        (json.dumps(good | {"answers": ["maybe", *good["answers"][1:]]}), "answer 1 is 'maybe'"),  # type: ignore[index]
        (json.dumps(good | {"top": "5"}), "top"),
        (json.dumps(good | {"sheet": None}), "sheet"),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            read_answers(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_answers(tmp_path / "none.json")


def test_answers_to_something_else(found: AuditResult, sets: tuple[np.ndarray, ...]) -> None:
    sheet = choose(found, 5, 2)
    said = ["yes"] * 7
    mine = answers(sheet, said)
    other = audit(sets[0][::-1], *sets[1:], RULES)
    with pytest.raises(UserError, match="another audit"):
        verdicts.verdicts(other, [mine])
    with pytest.raises(UserError, match="another page"):
        verdicts.verdicts(found, [mine, answers(choose(found, 5, 2, seed=1), said, "B")])
    with pytest.raises(UserError, match="same judge and answers"):
        verdicts.verdicts(found, [mine, replace(mine, path="copy.json")])
    with pytest.raises(UserError, match="no pair is answered"):
        verdicts.verdicts(found, [answers(sheet, [None] * 7)])
    with pytest.raises(UserError, match="none given"):
        verdicts.verdicts(found, [])
    # Intervals, and the threshold of the rule, may change after the judging.
    again = audit(*sets, replace(RULES, bootstrap=50, ratio=0.5))
    assert verdicts.verdicts(again, [mine]).config["ratio"] == 0.5


# The page


def known(html: str) -> dict[str, Any]:
    return json.loads(re.findall(r'id="known">(.*?)</script>', html)[0])


def pictures(html: str) -> list[np.ndarray]:
    uris = re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))) for uri in uris]


def test_page_shows_the_pictures_and_gives_nothing_away(run: Path, tmp_path: Path) -> None:
    page, sheet = export(run, top=12, controls=8, out=tmp_path)
    html = page.read_text()
    assert (sheet.top, sheet.controls) == (12, 8)
    assert known(html) == {"format": 1, "sheet": sheet.digest, "top": 12, "controls": 8, "seed": 0}
    shown = pictures(html)
    assert len(shown) == 40
    with np.load(run / "samples.npz") as stored:
        generated = stored["x"]
    subset = experiment.reopen(run).subset
    for place in range(20):
        beside = (subset.heldout if sheet.control[place] else subset.train).x[sheet.match[place]]
        np.testing.assert_array_equal(shown[2 * place], generated[sheet.generation[place]][..., 0])
        np.testing.assert_array_equal(shown[2 * place + 1], beside[..., 0])
    # Apart from pictures and numbers, all pairs are the same text.
    items = re.findall(r"<li .*?</li>", html, re.S)
    assert len(items) == 20
    bare = {re.sub(r"\d+", "", re.sub(r'src="[^"]*"', "", item)) for item in items}
    assert len(bare) == 1
    text = re.sub(r'src="[^"]*"', "", html).split("<ol>")[1].split("</ol>")[0]
    for word in ("ratio", "control", "held", "train", "0."):
        assert word not in text
    assert html.count("<script") == 2
    assert "http" not in text


def test_export_and_import_on_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["judge", "export", str(run), "--top", "24", "--out", str(tmp_path)]) == 0
    assert "24 pairs and 12 controls" in capsys.readouterr().out
    tree = known((tmp_path / "judge.html").read_text())
    sheet = choose(results.load(run), 24, 12)
    said = ["yes" if flag else "no" for flag in sheet.flagged]
    for judge, flips in (("A", 0), ("B", 6)):
        mine = [("no" if a == "yes" else "yes") if i < flips else a for i, a in enumerate(said)]
        (tmp_path / f"{judge}.json").write_text(json.dumps(tree | {"judge": judge, "answers": mine}))
    files = [str(tmp_path / f"{judge}.json") for judge in "AB"]
    assert cli.main(["judge", "import", str(run), *files]) == 0
    assert "Human verdicts" in capsys.readouterr().out
    stored = records.load(run, "verdicts")
    assert int(sheet.flagged.sum()) == 20
    missed = int(sheet.flagged[:6].sum())
    estimate = stored["precision"].estimate
    assert estimate is not None
    assert limits(estimate) == pytest.approx(wilson(20 - missed, 20))
    np.testing.assert_array_equal(stored.arrays["generation"], sheet.generation)
    report = write_report(tmp_path / "page", {"r": run}, title="t")
    assert report["r"]["probes"]["verdicts"]["measures"][0]["value"] == pytest.approx((20 - missed) / 20)
    assert "Human verdicts" in (tmp_path / "page" / "report.html").read_text()
    # The same verdicts beside another audit are left out, and the page says so.
    other = tmp_path / "other"
    changed = results.load(run)
    results.save(replace(changed, rows=changed.rows | {"ratio": changed.rows["ratio"][::-1]}), other)
    records.save(stored, other)
    report = write_report(tmp_path / "page", {"r": other}, title="t")
    assert report["r"]["probes"] == {}
    assert any("earlier audit" in note for note in report["r"]["notes"])
    # Answers of another audit are refused, and nothing is written.
    changed_digest = json.loads((tmp_path / "A.json").read_text()) | {"sheet": "0" * 16}
    (tmp_path / "A.json").write_text(json.dumps(changed_digest))
    before = (run / "probe_verdicts.json").read_bytes()
    assert cli.main(["judge", "import", str(run), files[0]]) == 2
    assert "another audit" in capsys.readouterr().err
    assert (run / "probe_verdicts.json").read_bytes() == before


def test_samples_drawn_after_the_audit_are_refused(run: Path, tmp_path: Path) -> None:
    with np.load(run / "samples.npz") as stored:
        images = stored["x"]
    saved = (run / "samples.npz").read_bytes()
    try:
        np.savez(run / "samples.npz", x=images[::-1], step=7)
        with pytest.raises(UserError, match="not the images that were audited"):
            export(run, out=tmp_path)
        (run / "samples.npz").unlink()
        with pytest.raises(UserError, match=r"no samples\.npz"):
            export(run, out=tmp_path)
    finally:
        (run / "samples.npz").write_bytes(saved)
    assert not list(tmp_path.iterdir())


def test_audit_of_folders_has_its_stored_pictures_only(found: AuditResult, tmp_path: Path) -> None:
    results.save(found, tmp_path / "audit")
    page, sheet = export(tmp_path / "audit")
    assert page == tmp_path / "audit" / "judge.html"
    assert (sheet.top, sheet.controls) == (30, 0)
    shown = pictures(page.read_text())
    place = {int(i): k for k, i in enumerate(found.pictures["top_index"])}
    for k, i in enumerate(sheet.generation):
        np.testing.assert_array_equal(shown[2 * k + 1], found.pictures["top_nearest"][place[int(i)]][..., 0])
    with pytest.raises(UserError, match="--controls 2"):
        export(tmp_path / "audit", controls=2)
    with pytest.raises(UserError, match=r"no audit\.json"):
        export(tmp_path)

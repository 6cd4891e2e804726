"""What the page and the terminal show of measurements while training, on rows made by hand; and runs that ended early."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from test_report import make as make_run
from test_watch import NOW, row, shown
from test_watch import make as make_training

from mdiff.errors import UserError
from mdiff.report import along_figures, figures
from mdiff.report.collect import as_json, read_run
from mdiff.report.page import write_report
from mdiff.report.watch import look
from mdiff.train import stopping

EARLY = stopping.Stopped(step=30, measure="gap", value=1.5, limit=1.4, kept=20)


def point(step, gap, **levels):
    """One measurement, whose interval is 10 % to either side."""
    ends = {f"eval/{name}{end}": at for name, value in (("gap", gap), ("excess", gap / 10)) for end, at in (
        ("", value), ("_low", 0.9 * value), ("_high", 1.1 * value))}  # fmt: skip
    return {"step": step, "eval/memorized": 0.0, **ends, **{f"eval/{k}": v for k, v in levels.items()}}


ROWS = [
    point(10, 1.0, **{"gap@2": 1.0, "gap@0.1": 1.1, "gap@10": 1.0}),
    point(20, 1.2, **{"gap@2": 1.1, "gap@0.1": 1.5, "gap@10": 1.0}),
    point(
        30, 1.5, **{"gap@2": 1.2, "gap@0.1": float("nan")}
    ),  # other levels since then, and one that is no number
]


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    return read_run("run", folder)


@pytest.fixture
def drawn(monkeypatch):
    """Figures as matplotlib has them, instead of as documents."""
    monkeypatch.setattr(figures, "svg", lambda figure: figure)


def test_measures_are_drawn_with_their_intervals(run, drawn):
    other = replace(run, name="other", points=[])
    panels = along_figures.measures([run, other]).axes
    assert [axes.get_ylabel() for axes in panels] == ["excess (RMS per pixel)", "loss gap"]  # no quality here
    excess, gap = panels
    np.testing.assert_allclose(gap.lines[0].get_xydata(), [(10, 1.0), (20, 1.2), (30, 1.5)])
    np.testing.assert_allclose(excess.lines[0].get_ydata(), [0.1, 0.12, 0.15])
    band = gap.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.9, 1.65))
    assert gap.get_yscale() == "log" and excess.get_yscale() == "linear"
    assert [text.get_text() for text in excess.get_legend().get_texts()] == ["run"]


def test_the_gap_by_noise_level_one_line_per_step(run, drawn):
    axes = along_figures.levels([run]).axes[0]
    lines = [line.get_xydata() for line in axes.lines[:-1]]  # the last one is at 1
    np.testing.assert_allclose(lines[0], [(0.1, 1.1), (2, 1.0), (10, 1.0)])  # by level, not by name
    np.testing.assert_allclose(lines[1], [(0.1, 1.5), (2, 1.1), (10, 1.0)])
    np.testing.assert_allclose(lines[2], [(0.1, np.nan), (2, 1.2), (10, np.nan)])
    assert axes.get_xscale() == axes.get_yscale() == "log"
    dark = [np.sum(line.get_color()[:3]) for line in axes.lines[:-1]]
    assert dark == sorted(dark, reverse=True)  # later is darker


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_panel_per_run(run, drawn, count):
    runs = [replace(run, name=f"run {i}") for i in range(count)]
    panels = [axes for axes in along_figures.levels(runs).axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == (
        [] if count == 1 else [f"run {i}" for i in range(min(count, 6))]
    )


def test_one_measured_step_and_none(run, drawn):
    once = replace(run, points=run.points[:1])
    assert len(along_figures.levels([once]).axes) == 1  # no scale of steps
    bare = replace(run, points=[{"step": 5, "memorized": 0.1}])
    assert along_figures.levels([bare]) is None and along_figures.measures([bare]) is None
    assert along_figures.measures([replace(run, points=[])]) is None


def test_a_run_that_ended_early_on_the_page(run, drawn, monkeypatch):
    assert as_json(run)["stopped"] is None and "kept" not in run.early
    stopping.save(run.folder, EARLY)
    ended = read_run("run", run.folder)
    assert as_json(ended)["stopped"] == {"step": 30, "measure": "gap", "value": 1.5, "limit": 1.4, "kept": 20}
    for figure in (along_figures.measures([ended]), figures.training([ended])):
        marks = [line for axes in figure.axes for line in axes.lines if line.get_linestyle() == ":"]
        assert len(marks) == len(figure.axes) and all(set(line.get_xdata()) == {20} for line in marks)
        assert "kept by early stopping" in [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    monkeypatch.undo()
    tree = write_report(run.folder, {"mine": run.folder}, title="t")
    page = (run.folder / "report.html").read_text()
    assert "gap 1.5 at step 30 is above 1.4: stopped early; the state of step 20 is kept" in page
    assert "Along training" in page
    assert [each["gap"] for each in tree["run"]["curve"] if "gap" in each] == [1.0, 1.2, 1.5]
    (run.folder / stopping.FILE).write_text("[]")
    with pytest.raises(UserError, match=r"stopped.json: damaged .*; delete it"):
        read_run("run", run.folder)


def test_watch_shows_the_gap_and_an_early_end(tmp_path):
    folder = make_training(tmp_path / "r", [row(50), ROWS[1] | {"step": 50}], age=1e6)
    found = look(folder, NOW)
    assert found.state == "stalled?"
    assert "loss gap" in shown(found) and "1.2 [1.08, 1.32], largest at σ = 0.1: 1.5" in shown(found)
    stopping.save(folder, EARLY)
    found = look(folder, NOW)
    assert found.done and found.left is None
    assert "stopped early" in shown(found, width=120)
    assert "gap 1.5 at step 30 is above 1.4: stopped early; the state of step 20 is kept" in shown(
        found, width=120
    )
    bare = make_training(
        tmp_path / "s", [row(50), {"step": 50, "eval/memorized": 0.1, "eval/gap": float("nan")}]
    )
    assert "largest" not in shown(look(bare, NOW))

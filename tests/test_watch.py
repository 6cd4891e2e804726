"""`mdiff watch` reads what training writes, while it is being written; times and rates worked out by hand."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mdiff import cli, config
from mdiff.console import Monitor, make_progress
from mdiff.errors import UserError
from mdiff.report import watch as watching
from mdiff.report.watch import duration, frame, look, sparkline, watch

NOW = 1_700_000_000.0


def make(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    steps: int = 1000,
    saved: tuple[int, ...] = (),
    age: float = 1.0,
) -> Path:
    """A run of batch 32 that logs every 50 steps, whose newest row is `age` seconds old."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = config.Config(train=config.Train(steps=steps, batch=32, log_every=50))
    (folder / "config.json").write_text(json.dumps({"config": config.to_json(cfg)}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(folder / "metrics.jsonl", (NOW - age, NOW - age))
    for step in saved:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return folder


def row(step: int, loss: float | None = 0.5, speed: float = 160.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "images_per_second": speed}


def shown(*snapshots: watching.Snapshot, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(frame(snapshots, width))
    return console.export_text()


def test_a_run_in_the_middle(tmp_path: Path) -> None:
    point = {"step": 250, "eval/memorized": 0.25, "eval/memorized_low": 0.16, "eval/memorized_high": 0.37}
    control = {"eval/control": 0.0, "eval/control_low": 0.0, "eval/control_high": 0.057, "eval/n": 64}
    folder = make(
        tmp_path / "r", [row(50, 2.0), row(200, 1.0), point | control, row(400, 0.125)], saved=(250,)
    )
    (folder / "ledger.json").write_text(
        json.dumps({"seconds": {"train": 60.0, "evaluate": 30.0, "start": 30.0}})
    )
    found = look(folder, NOW)
    assert (found.state, found.step, found.steps, found.checkpoint) == ("training", 400, 1000, 250)
    assert found.losses == (2.0, 1.0, 0.125)
    # 600 steps of 32 images at 160 images/s are 120 s; evaluations add half as much as training takes.
    assert found.left == pytest.approx(180)
    assert found.age == pytest.approx(1)
    text = shown(found)
    for part in (
        "400 of 1,000", "0.125", "160.0 images/s", "3 min 00 s left", "newest row 1 s old",
        "25.0 % [16.0, 37.0], control 0.0 % [0.0, 5.7] at step 250, n = 64", "step 250",
        "2 min 00 s: train 50 %, evaluate 25 %, start 25 %",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("age", "speed", "state"),
    [(59, 160.0, "training"), (61, 160.0, "stalled?"), (400, 16.0, "training"), (501, 16.0, "stalled?")],
)
def test_stalled_when_much_older_than_the_log_interval(
    tmp_path: Path, age: float, speed: float, state: str
) -> None:
    """50 steps of 32 images at 16 images/s are 100 s: five intervals are 500 s; a minute is always granted."""
    assert look(make(tmp_path / "r", [row(50, speed=speed)], age=age), NOW).state == state


def test_states(tmp_path: Path) -> None:
    assert look(make(tmp_path / "new", []), NOW).state == "starting"
    assert look(make(tmp_path / "end", [row(1000)], saved=(500,)), NOW).state == "training"  # not saved yet
    assert look(make(tmp_path / "done", [row(1000)], saved=(500, 1000), age=1e6), NOW).done
    assert look(make(tmp_path / "bare", [row(1000)], age=1e6), NOW).done  # its checkpoints were removed
    assert look(make(tmp_path / "quit", [row(400)], saved=(400,), age=1e6), NOW).state == "stalled?"
    (tmp_path / "done" / "audit.json").write_text("{}")
    text = shown(look(tmp_path / "done", NOW))
    assert "audited" in text
    assert "old" not in text


def test_a_file_that_is_being_written(tmp_path: Path) -> None:
    folder = make(tmp_path / "r", [row(50), row(100)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 150, "los')
    assert look(folder, NOW).step == 100
    (folder / "metrics.jsonl").write_text("")
    assert look(folder, NOW).state == "starting"
    (folder / "metrics.jsonl").write_text('{"broken\n{"step": 100, "loss": 1}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        look(folder, NOW)


def test_losses_that_are_not_numbers(tmp_path: Path) -> None:
    folder = make(tmp_path / "r", [row(50, None), row(100, 0.3)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 150, "loss": NaN}\n')
    assert "0.3" in shown(look(folder, NOW))


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    assert look(tmp_path / "soon", NOW).state == "waiting"
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    assert look(tmp_path / "begun", NOW).state == "waiting"
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("")
    make(tmp_path / "demo" / "ambient", [])
    (tmp_path / "demo" / "clock.json").write_text("{}")
    make(tmp_path / "damaged", [])
    (tmp_path / "damaged" / "config.json").write_text('{"config": {}}')
    make(tmp_path / "ledger", [row(50)])
    (tmp_path / "ledger" / "ledger.json").write_text('{"seconds": 3}')
    for name, words in (
        ("file", "is a file"),
        ("photos", "no training run"),
        ("demo", f"did you mean {tmp_path.as_posix()}/demo/ambient"),
        ("damaged", "damaged"),
        ("ledger", "damaged"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            look(tmp_path / name, NOW)
        assert "\n" not in str(caught.value)


def test_sparkline() -> None:
    """On a logarithmic scale 1, 10, 100 are evenly spaced: lowest, middle, highest block."""
    assert sparkline([1, 10, 100], 10) in ("▁▄█", "▁▅█")
    assert sparkline([100, 10, 1], 10)[0] == "█"
    assert sparkline([3, 3], 10) == "▁▁"
    assert sparkline([1, float("nan"), -1, 0, 100], 10) == "▁█"
    assert sparkline([], 10) == ""
    falling = sparkline([2.0**-k for k in range(1000)], 30)
    assert len(falling) <= 30
    assert list(falling) == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3600, "1 h 00 min"), (7500, "2 h 05 min"),
     (273600, "3 d 4 h")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_follows_until_all_are_trained(tmp_path: Path) -> None:
    """The second run begins late; each look finds more; the last frame shows both as trained."""
    make(tmp_path / "a", [row(1000)], saved=(1000,))
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        made = len(waits) * 500
        make(tmp_path / "b", [row(step) for step in range(50, made + 1, 50)], saved=(made,))
        assert len(waits) < 5

    console = Console(width=80, height=60, file=io.StringIO(), force_terminal=True, record=True)
    watch([tmp_path / "a", tmp_path / "b"], every=7, console=console, sleep=sleep)
    assert waits == [7, 7]
    text = console.export_text()
    assert "waiting" in text
    assert "500 of 1,000" in text
    assert "1,000 of 1,000" in text.rsplit("/b", 1)[1]


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "r", [row(400)])
    assert cli.main(["watch", str(folder), str(tmp_path / "later")]) == 0  # stdout is no terminal: one frame
    out = capsys.readouterr().out
    assert out.count("400 of 1,000") == 1
    assert "no such folder yet" in out
    for arguments, words in (
        ([], "RUNS: 0 given"),
        ([str(folder), str(folder)], "given twice"),
        ([str(folder), "--every", "0"], "--every 0"),
        ([str(folder), "--every", "nan"], "--every nan"),
        ([str(tmp_path)], "no training run"),
    ):
        assert cli.main(["watch", *arguments]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "look", interrupted)
    assert cli.main(["watch", str(folder)]) == 130


def test_progress_without_a_terminal_is_sparse_lines() -> None:
    console = Console(file=io.StringIO(), width=200)
    clock = [0.0]
    progress = make_progress(console)
    progress.get_time = lambda: clock[0]
    task = progress.add_task("train", total=2000, note="")
    slow = progress.add_task("slow", total=10, note="")
    for done in range(0, 2001, 50):  # 0.5 s per call: a tenth of the task takes 2 s, lines come every 5 s
        clock[0] += 0.5
        progress.update(task, completed=done, note=f"loss {done}")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert 3 <= len(lines) <= 6
    assert lines[-1].startswith("train: 2000 of 2000, loss 2000")
    assert "\x1b" not in console.file.getvalue()
    for _ in range(30):  # five minutes without progress: a sign of life per minute
        clock[0] += 10
        progress.update(slow, completed=1)
    assert 4 <= console.file.getvalue().count("slow: 1 of 10") <= 6


def test_monitor_prints_the_end_of_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor() as monitor:
        for done in (0, 1, 2):
            monitor.progress("sample", done, 2, {})
    assert capsys.readouterr().err.splitlines() == ["sample: 2 of 2"]

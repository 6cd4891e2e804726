"""`mdiff detect` and `mdiff nemo` on the model that comes with mdiff: it recites, so what they say can be checked."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from child_env import ROOT, child_env
from jax.experimental.compilation_cache import compilation_cache

from mdiff import config
from mdiff.cli import main
from mdiff.console import Monitor
from mdiff.probes import first_step, units
from mdiff.probes.found import Found
from mdiff.recipes import nemo_verify, prompts, recite, text_target
from mdiff.report import nemo_command
from mdiff.types import Estimate

ASKED = ("pause button", "a cat that nobody trained on", "oil drum")
"""Trained on 100 times, never, and 30 times."""
SMALL = ("--seeds", "3", "--sigma", "5", "--mode", "gradient", "--images", "2", "--tau", "0.62")
ORDINARY = 16
"""Held-out captions that calibrate."""


def nemo(out, asked, *more) -> int:
    return main(["nemo", "--demo", "--prompts", str(asked), "--out", str(out), *small(asked), *more])


def small(asked) -> tuple[str, ...]:
    return (*SMALL, "--ordinary", str(asked.parent / "ordinary.txt"))


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Every search compiles the same programs; fewer of them, as the network is cut in one place instead of four."""
    cuts, first_step.CUTS = first_step.CUTS, 1
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()
    yield
    first_step.CUTS = cuts
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def asked(target, tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "prompts.txt"
    (path.parent / "ordinary.txt").write_text("\n".join(prompts.of_heldout(target.subset).text[:ORDINARY]))
    path.write_text("\n".join(ASKED) + "\n\n")
    return path


@pytest.fixture(scope="module")
def done(asked, tmp_path_factory):
    """A whole search, with its pruned run."""
    out = tmp_path_factory.mktemp("nemo")
    assert nemo(out / "found", asked, "--export", str(out / "pruned")) == 0
    return out, json.loads((out / "found" / "nemo.json").read_text())


@pytest.fixture(scope="module")
def target():
    return text_target.shipped(config.Mesh())


def test_the_shipped_model_is_the_one_described(target):
    assert sum(np.asarray(leaf).size for leaf in jax.tree.leaves(target.params)) < 2.6e6
    folder = ROOT / "mdiff" / "checkpoints" / text_target.SHIPPED
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    trained = prompts.of_training(target.subset)
    assert len(target.subset.train) == 595 and set(trained.kind) == {"verbatim", "template", "unique"}
    assert {c: int((trained.copies == c).sum()) for c in (300, 100, 30, 10, 3)} == {
        300: 3,
        100: 8,
        30: 12,
        10: 12,
        3: 12,
    }


def test_a_damaged_shipped_model_is_noticed(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "mdiff" / "checkpoints" / text_target.SHIPPED, folder)
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    with pytest.raises(text_target.UserError, match="is damaged; reinstall"):
        text_target.load(folder)


def test_recited_prompts_are_found_and_cut(done):
    rows = {row["prompt"]: row for row in done[1]["prompts"]}
    often, never, seldom = (rows[text] for text in ASKED)
    assert often["copies"] == 100 and seldom["copies"] == 30 and never["copies"] == 0
    for row in (often, seldom):
        assert row["memorized"] and row["reason"] == "below tau" and row["score"] <= row["tau_ref"]
        assert 0 < sum(map(len, row["neurons"].values())) < 80
        assert row["copies_of_own"]["whole"] == 1.0 and row["copies_of_own"]["own"] == 0.0
        assert row["copies_of_own"]["random"] > row["copies_of_own"]["own"]
        near = row["similar_to_whole"]
        assert near["whole"] == pytest.approx(1) and near["own"] < near["random"] - 0.05
    assert never["similarity"] < often["similarity"]
    page = (done[0] / "found" / "nemo.html").read_text()
    assert "pause button" in page and "Own image nearest" in page


def test_a_prompt_without_kept_seed_is_not_memorized(done):
    row = done[1]["prompts"][1]
    assert row["prompt"] == ASKED[1] and row["similarity"] < done[1]["calibration"]["tau"] == 0.62
    assert not row["memorized"] and row["reason"] == "not memorized"
    assert row["neurons"] == {} and row["evaluations"] == 0 and row["score"] is None


def test_a_killed_search_goes_on_with_the_prompt_it_was_on(done, asked, tmp_path):
    whole = (done[0] / "found" / "found.jsonl").read_text().splitlines()
    out = tmp_path / "again"
    out.mkdir()
    cut = [*whole[:2], whole[2][: len(whole[2]) // 2]]  # the settings, one prompt, and half a line
    (out / "found.jsonl").write_text("\n".join(cut))
    assert nemo(out, asked) == 0
    lines = (out / "found.jsonl").read_text().splitlines()
    assert lines[:2] == whole[:2] and len(lines) == len(whole)
    mine, theirs = (
        {Found.load(json.loads(line)).prompt: json.loads(line) for line in part[1:]}
        for part in (lines, whole)
    )
    assert {p: row["refined"] for p, row in mine.items()} == {p: row["refined"] for p, row in theirs.items()}


def test_another_search_does_not_write_over_this_one(done, asked, tmp_path, capsys):
    out = tmp_path / "other"
    shutil.copytree(done[0] / "found", out)
    assert nemo(out, asked, "--tau-sigmas", "2") == 2
    assert "is of another search; give another --out, or delete it" in capsys.readouterr().err
    (out / "found.jsonl").write_text("{}\nnonsense\n")
    assert nemo(out, asked) == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_pruned_run_answers_as_the_gated_network(done, target):
    with Monitor(quiet=True) as monitor:
        pruned = text_target.of_run(done[0] / "pruned", config.Mesh(), monitor)
    layers = units.discover(target.model, "cross/value_gate")
    numbers = [layers.number(name, i) for name, each in done[1]["union"].items() for i in each]
    trained = prompts.of_training(target.subset)
    tokens, on = trained.tokens[:2], np.ones((2, len(layers)))
    sample = config.Sample(method="ddim", steps=3, guidance=3.0)
    draw = recite.make(target.model, layers, sample)
    gated = draw(target.params, tokens, np.where(layers.off(numbers), 0.0, on), np.arange(2))
    whole = draw(target.params, tokens, on, np.arange(2))
    plain = recite.make(pruned.model, layers, sample)(pruned.params, tokens, on, np.arange(2))
    assert np.abs(gated.astype(int) - plain.astype(int)).max() <= 1
    assert np.abs(gated.astype(int) - whole.astype(int)).max() > 1
    assert json.loads((done[0] / "pruned" / "pruned.json").read_text())["neurons"] == done[1]["union"]


def child(out, asked, *more, devices=1):
    """A search of the first prompt alone, in a process of its own."""
    alone = asked.parent / "alone.txt"
    alone.write_text(ASKED[0])
    args = ["nemo", "--demo", "--prompts", str(alone), "--out", str(out), *small(asked), *more]
    code = f"import sys; from mdiff.cli import main; sys.exit(main({args!r}))"
    env = {**child_env(asked.parent), "JAX_NUM_CPU_DEVICES": str(devices)}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=env, **said)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_processes_of_four_devices_find_the_same_neurons(done, asked, tmp_path):
    address = ("--processes.coordinator", f"127.0.0.1:{free_port()}", "--processes.count", "2")
    args = ("--mesh.trial", "8", "--batch", "1", *address)
    both = [child(tmp_path / "both", asked, *args, "--processes.index", str(i), devices=4) for i in range(2)]
    said = [one.communicate(timeout=600)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    theirs = done[1]["prompts"][0]
    mine = json.loads((tmp_path / "both" / "nemo.json").read_text())["prompts"][0]
    assert mine["neurons"] == theirs["neurons"] or mine["close"] or theirs["close"]
    for arm in ("whole", "own"):  # random neurons avoid the union, which is of more prompts there
        assert mine["copies_of_own"][arm] == theirs["copies_of_own"][arm]


WRONG = {
    "neither": (["nemo"], "--workdir: give the folder of a run, or --demo"),
    "both": (["nemo", "--demo", "--workdir", "x"], "--demo: takes the model that comes with mdiff"),
    "layers": (["nemo", "--demo", "--layers", "value_gat$"], "matches no layer; layers are named like"),
    "pattern": (["nemo", "--demo", "--layers", "("], "is no regular expression"),
    "seeds": (["nemo", "--demo", "--seeds", "1"], "nemo.seeds = 1: must be 2 or more"),
    "theta": (["nemo", "--demo", "--theta-min", "9"], "theta falls from the first to the last"),
    "tau": (["nemo", "--demo", "--tau", "2"], "nemo.tau = 2.0: is a similarity"),
    "images": (["nemo", "--demo", "--images", "0"], "--images 0: must be 1 or more"),
    "absent": (["nemo", "--demo", "--prompts", "nowhere.txt"], "--prompts nowhere.txt: No such file"),
    "detector": (
        ["detect", "--demo", "--detectors", "nose"],
        "'nose' is no detector; give some of noise_gap_1",
    ),
    "unknown": (["detect", "--demo", "--unknown", "-1"], "--unknown -1: must be 0 or more"),
    "window": (["nemo", "--demo", "--similarity.measure", "ms_ssim"], "11"),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message and "\n" not in message and message.startswith("mdiff: ")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_wrong_prompts_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text, expected in (
        ("", "has no prompt; write one a line"),
        ("cat " * 40, "tokens, and the model takes 22"),
    ):
        (tmp_path / "p.txt").write_text(text)
        assert main(["nemo", "--demo", "--prompts", "p.txt"]) == 2
        message = capsys.readouterr().err.strip()
        assert expected in message and "\n" not in message
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\xff")
    assert main(["detect", "--demo", "--prompts", "p.txt"]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["p.txt"]


def test_detectors_on_given_prompts(asked, tmp_path, capsys):
    out = tmp_path / "detect"
    arguments = [
        "detect",
        "--demo",
        "--prompts",
        str(asked),
        "--out",
        str(out),
        "--seeds",
        "2",
        "--images",
        "1",
    ]
    arguments += ["--sigma", "5", "--detectors", "seed_agreement", "noise_gap_1"]
    assert main(arguments) == 0
    tree = json.loads((out / "detect.json").read_text())
    often, never, seldom = tree["prompts"]
    assert often["recited"] == seldom["recited"] == 1.0 and never["recited"] is None
    assert often["truth"] == seldom["truth"] == "verbatim" and never["truth"] == ""
    assert often["scores"]["seed_agreement"] > never["scores"]["seed_agreement"]
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert len(kept) == 3  # the images and two detectors
    assert main(arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()} == kept
    next(iter((out / "parts").iterdir())).write_bytes(b"PK nonsense")
    assert main(arguments) == 2
    assert "is damaged; delete it, and it is made again" in capsys.readouterr().err


def test_list_of_detectors(capsys):
    assert main(["detect", "--list"]) == 0
    out = capsys.readouterr().out
    assert "flipd" in out


def test_rates_of_a_network():
    audit = config.Audit(bootstrap=50)
    share = {"whole": np.ones(10), "own": np.zeros(10), "random": np.r_[np.nan, np.linspace(0, 1, 9)]}
    found = nemo_verify.rates(share, np.ones(10, bool), audit)
    assert found["own"].value == 0 and 0.2 < found["own"].high < 0.35  # Wilson's: 0 of 10
    assert (
        found["own - whole"].value == -1
        and found["own - whole"].low == -1
        and found["own - whole"].high < -0.3
    )
    assert found["random"].n == 9 and found["random"].value == pytest.approx(0.5)
    assert "whole - whole" not in found


def test_random_neurons_fall_back():
    layer = np.repeat([0, 1], 10)
    records = [
        Found(0, "exact", refined=(0, 1)),
        Found(1, "exact", refined=tuple(range(6))),
        Found(2, "exact", refined=tuple(range(11))),
    ]
    narrow = np.isin(np.arange(20), [0, 1, 2])
    off, beside = nemo_verify.controls(records, layer, narrow, 0)
    assert beside == ("union", "any layer", "none")
    assert off.sum(1).tolist() == [2, 6, 0]
    for row, each in zip(off, records, strict=True):
        assert not row[list(each.refined)].any()
    assert not off[0][narrow].any() and not off[0][10:].any()
    assert nemo_verify.controls(records[:1], layer, np.arange(20) < 10, 0)[1] == ("own",)


def test_the_verdict_says_when_the_union_is_everything():
    """Then it takes the text away altogether, and what it does is no finding about these prompts."""
    records = tuple(
        Found(i, "gradient", initial=n, refined=n, reason="below tau") for i, n in enumerate([(0, 1), (2, 3)])
    )
    search = SimpleNamespace(memorized=np.array([True, True]), found=records)
    rate = asdict(Estimate(0.5, 0.2, 0.8, 2))
    groups = {"verbatim": {"whole": rate, "own": rate, "random": rate}}
    calibration = SimpleNamespace(tau=0.6, false_positives=Estimate(0.1, 0.0, 0.2, 10))
    for neurons, said in ((4, True), (5, False)):
        lines = nemo_command.verdict(
            range(2), calibration, search, groups, {"verbatim": {"own": rate}}, 4, neurons
        )
        assert f"a median of 2 of {neurons} neurons is enough, 4 in all prompts together" in lines[1]
        assert ("all that were searched" in lines[1]) == said

"""A text model from the command line: trained, resumed, trained on two devices, sampled, measured.

All of it happens in one process of two simulated devices, whose compiler is told to be quick.
"""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import numpy_text
import pytest
from child_env import child_env

from mdiff.data.builders import cache_dir
from mdiff.data.captions import END, PAD, START
from mdiff.keys import keys
from mdiff.recipes import runs

CONFIG = """
from mdiff.config import Config, Data, Loss, Net, Sample, Train

config = Config(
    name="tiny text",
    data=Data(source="emoji", size=8, n=20, heldout=4, ladder={5: 2, 3: 2}, templates=1, template_copies=2),
    net=Net(
        channels=8, mults=(1,), blocks=1, attention=(), cross=(8,), text=16, text_blocks=1, text_length=32,
        vocabulary=300, condition_dropout=0.3,
    ),
    loss=Loss(p_mean=0.0),
    train=Train(steps=4, batch=8, warmup=0, lr=0.02, ema_halflife=8, save_every=2, log_every=1, eval_samples=4, eval_levels=()),
    sample=Sample(n=24, batch=4, method="euler", steps=3, guidance=2.0),
)
"""

RUNS = """
import shutil, sys
from pathlib import Path
import jax, numpy as np
from mdiff import cli
from mdiff.nets.denoiser import make_model
from mdiff.train import checkpoint, mesh, optim, state, workdir
from mdiff.trees import named_leaves

base = Path(sys.argv[1])
real = mesh.make_mesh

def on(devices):
    mesh.make_mesh = lambda cfg, _=None: real(cfg, jax.devices()[:devices])

def mdiff(*arguments):
    assert cli.main(list(map(str, arguments))) == 0, arguments

def train(name, *more):
    mdiff("train", "--config", base / "tiny.py", "--workdir", base / name, *more)

assert len(jax.devices()) == 2
on(1)
train("whole")
train("parts", "--train.steps", 2)
start = (base / "parts/checkpoints/2/state/_METADATA").stat().st_mtime_ns
train("parts")
assert (base / "parts/checkpoints/2/state/_METADATA").stat().st_mtime_ns == start  # gone on from, not begun again
mdiff("sample", "--workdir", base / "whole")
shutil.copy(base / "whole/samples.npz", base / "sampled.npz")
mdiff("eval", "--workdir", base / "whole")
on(2)
train("two", "--mesh.fsdp", 2, "--mesh.shard-above", 0)
on(1)

stored = workdir.read(base / "whole")
model, cfg = make_model(stored.config, stored.shape[-1]), stored.config.train
plan = state.plan_state(model, optim.make_optimizer(cfg), stored.config.seed, real(stored.config.mesh, jax.devices()[:1]))
fresh = plan[0]()
for name in ("start", "whole", "parts", "two"):
    if name == "start":
        found = fresh
    else:
        with checkpoint.open_run(base / name, cfg) as opened:
            found, _ = opened.restore(plan[1], print)
    np.savez(base / f"{name}.npz", **{leaf: np.asarray(x) for leaf, x in named_leaves(found)})
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "tiny.py").write_text(CONFIG)
    env = child_env(folder) | {
        "JAX_NUM_CPU_DEVICES": "2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "MDIFF_DATA_DIR": str(cache_dir()),  # drawing all emoji takes too long for one test
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(folder)], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert "resuming at step 2" in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def made(base):
    """The finished run as its folder tells it."""
    return runs.reopen(base / "whole")


def leaves(base, name):
    with np.load(base / f"{name}.npz") as stored:
        return dict(stored)


def tree(flat, prefix):
    found = {}
    for name, leaf in flat.items():
        if name.startswith(prefix):
            *path, last = name.removeprefix(prefix).split("/")
            node = found
            for part in path:
                node = node.setdefault(part, {})
            node[last] = leaf
    return found


def losses(base, name):
    rows = map(json.loads, (base / name / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(base):
    whole, parts = leaves(base, "whole"), leaves(base, "parts")
    assert whole.keys() == parts.keys() and int(whole["step"]) == 4
    for name, leaf in whole.items():
        assert leaf.tobytes() == parts[name].tobytes(), name
    assert losses(base, "parts") == losses(base, "whole")


def test_two_devices_train_the_model_that_one_does(base):
    one, two = losses(base, "whole"), losses(base, "two")
    assert list(one) == list(two) == [1, 2, 3, 4]
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4), step
    start, whole, split = (leaves(base, name) for name in ("start", "whole", "two"))
    for name, fresh in start.items():
        if name.startswith("params/"):
            assert np.abs(whole[name] - fresh).max() > 0.02, (
                name
            )  # what is allowed is small beside what was learned
            np.testing.assert_allclose(split[name], whole[name], rtol=0, atol=1e-3, err_msg=name)


def test_tokens_that_were_seen_are_learned_and_no_others(base, made):
    start, whole = (leaves(base, name)["params/embedding/tokens/embedding"] for name in ("start", "whole"))
    learned = set(np.flatnonzero((start != whole).any(1)).tolist())
    seen = set(np.unique(made.subset.train.tokens).tolist())
    assert {START, END, PAD} < learned <= seen and len(learned) > len(seen) / 2


def test_samples_are_those_of_their_captions(base, made):
    """Sample i is the averaged network's, guided, under the caption of training image i, in float64."""
    averaged, index = tree(leaves(base, "whole"), "ema/"), np.arange(24)
    with np.load(base / "whole/samples.npz") as stored:
        ours, step = stored["x"], int(stored["step"])
    assert ours.shape == (24, 8, 8, 3) and step == 4
    every = keys(0, "sample", index)
    noise = np.float64(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 3)))(every))
    top, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    levels = [80, ((top + low) / 2) ** 7, 0.002, 0]
    null = np.array([START, END] + [PAD] * 30)

    def images(tokens):
        drawn = numpy_text.euler(averaged, made.config.net, noise, tokens, levels, 2.0, null)
        return np.clip((drawn + 1) * 127.5, 0, 255)

    tokens = made.subset.train.tokens[index % 20]
    others = made.subset.train.tokens[(index + 1) % 20]
    right, wrong = images(tokens), images(others)
    assert np.abs(ours - right).max() < 0.51  # rounding to whole grey levels
    differing = (tokens != others).any(1)
    assert differing.sum() == 24 - 5  # members of a template are under one caption
    assert np.abs(ours - wrong)[differing].max((1, 2, 3)).min() > 2


def test_sample_and_eval_leave_what_they_should(base):
    with np.load(base / "sampled.npz") as before, np.load(base / "whole/samples.npz") as after:
        np.testing.assert_array_equal(before["x"], after["x"])
    report = json.loads((base / "whole/report.json").read_text())
    assert report["run"]["memorized"]["n"] == 24
    assert (base / "whole/report.html").stat().st_size > 10_000

"""Whole processes: signals, kill -9, a full disk, several devices, through the command line."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from child_env import child_env

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split(
    "--net.channels 16 --net.mults 1 --net.blocks 1 --net.patch 4 --train.batch 8 --train.steps 30 "
    "--train.save-every 7 --train.log-every 5 --train.warmup 3 --train.eval-every 0 --train.eval-samples 8 "
    "--sample.steps 2 --sample.n 16 --sample.batch 4 --data.n 10 --data.heldout 10 "
    "--train.optimizer adamw --train.weight-decay 0.01 --train.schedule inverse_sqrt --train.ema-lengths 0.05 0.1 --train.ema-every 10"
)


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Compiled programs are shared between the processes of this file."""
    return child_env(tmp_path_factory.mktemp("shared"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mdiff.cli", *arguments]


def train_command(folder, *more: str) -> list[str]:
    return command(
        "train", "--config", str(ROOT / "configs/faces.py"), "--workdir", str(folder), *TINY, *more
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err and "Warning" not in err and ":absl:" not in err, err
    return out + err


def start(arguments, env, cwd=None) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def saved(folder: Path) -> list[int]:
    where = folder / "checkpoints"
    return sorted(int(p.name) for p in where.iterdir() if p.name.isdigit()) if where.is_dir() else []


def rows(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "loss" in row]


_READ = """
import sys, numpy as np, jax
from pathlib import Path
from mdiff import config
from mdiff.nets.denoiser import make_model
from mdiff.train import checkpoint, mesh, optim, state, workdir
from mdiff.trees import named_leaves
for where in sys.argv[1:]:
    folder, stored = Path(where), workdir.read(Path(where))
    model = make_model(stored.config, stored.shape[-1])
    optimizer = optim.make_optimizer(stored.config.train)
    lengths = stored.config.train.ema_lengths
    abstract = state.plan_state(model, optimizer, 0, mesh.make_mesh(config.Mesh()), lengths)[1]
    with checkpoint.open_run(folder, stored.config.train) as found:
        restored, meta = found.restore(abstract, print)
    leaves = {name.replace("/", "|"): np.asarray(leaf) for name, leaf in named_leaves(restored)}
    np.savez(folder / "state.npz", **leaves)
"""


def states(env, *folders: Path) -> list[dict[str, bytes]]:
    """Every leaf of the newest checkpoint of each run, as bytes."""
    finish(start([sys.executable, "-c", _READ, *map(str, folders)], env))
    found = []
    for folder in folders:
        with np.load(folder / "state.npz") as stored:
            found.append({name: stored[name].tobytes() for name in stored.files})
    return found


@pytest.fixture(scope="module")
def whole(env, tmp_path_factory):
    """A run of 30 steps, met by SIGTERM while it compiled for the first time."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(train_command(folder), env)
    wait_for(lambda: (folder / "subset.json").is_file(), process)  # written just before compiling
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved step 1 of 30" in finish(process)
    assert saved(folder) == [1]
    shown = finish(start(train_command(folder), env))
    assert "trained to step 30" in shown and f"mdiff eval --workdir {folder}" in shown
    assert rows(folder) == [1, 5, 7, 10, 14, 15, 20, 21, 25, 28, 30]
    return folder


def test_stopped_and_killed_runs_end_bit_identical(whole, env, tmp_path):
    # Ctrl-C, in a folder that needs quoting, resumed by the very line it prints.
    stopped = tmp_path / "stöpped run"
    process = start(train_command(stopped, "--train.steps", "3000"), env)
    wait_for(lambda: saved(stopped), process)
    process.send_signal(signal.SIGINT)
    shown = finish(process)
    assert "SIGINT: saved step" in shown
    line = next(line for line in shown.splitlines() if line.startswith("resume with: "))
    words = shlex.split(line.removeprefix("resume with: "))
    assert words[0] == "mdiff" and words[-2:] == ["--train.steps", "3000"]
    at = saved(stopped)[-1]
    assert f"saved step {at} of 3000" in shown

    # kill -9 at a random moment of the steps.
    killed = tmp_path / "killed"
    process = start(train_command(killed, "--train.steps", "3000"), env)
    wait_for(lambda: saved(killed), process)
    time.sleep(random.random() / 4)
    process.kill()
    process.wait()
    kept = saved(killed)[-1]
    (killed / "metrics.jsonl").open("a").write('{"step": 9999, "lo')

    # Both, and the whole run, are extended to one length.
    length = str(max(at, kept, 30) + 3)
    shown = finish(start(command(*words[1:-1], length), env))
    assert f"resuming at step {at}" in shown
    process = start(train_command(killed, "--train.steps", length), env)
    assert f"resuming at step {kept}" in finish(process)
    extended = tmp_path / "whole"
    shutil.copytree(whole, extended)
    finish(start(train_command(extended, "--train.steps", length), env))
    first, *others = states(env, extended, stopped, killed)
    assert all(other == first for other in others)
    for folder in (extended, stopped, killed):
        assert rows(folder) == sorted(set(rows(folder))) and rows(folder)[-1] == int(length)


def test_a_second_signal_kills(env, tmp_path):
    cold = {**env, "JAX_ENABLE_COMPILATION_CACHE": "false"}  # so that compiling lasts
    process = start(train_command(tmp_path / "run"), cold)
    wait_for(lambda: (tmp_path / "run/subset.json").is_file(), process)
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM and saved(tmp_path / "run") == []


def test_full_disk(whole, env, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("cannot mount here")
    try:
        shutil.copytree(whole, disk / "run")
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"\0" * (free - 300_000))
        size = sum(f.stat().st_size for f in (disk / "run/checkpoints/30").rglob("*") if f.is_file())
        assert size > 300_000
        shown = finish(start(train_command(disk / "run", "--train.steps", "33"), env), code=2)
        assert len([line for line in shown.splitlines() if line.startswith("mdiff: ")]) == 1
        assert saved(disk / "run") == saved(whole)
        (disk / "filler").unlink()
        finish(start(train_command(disk / "run", "--train.steps", "33"), env))
        assert saved(disk / "run")[-1] == 33
    finally:
        subprocess.run(["umount", disk], check=True)


def test_eval_goes_on_from_finished_batches(whole, env, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        shutil.copytree(whole, folder)
    finish(start(command("sample", "--workdir", str(once)), env))
    process = start(command("sample", "--workdir", str(twice)), env)
    wait_for(lambda: list(twice.glob("samples/*/000001.npy")) or (twice / "samples.npz").exists(), process)
    process.kill()
    process.communicate()
    parts = {p: p.stat().st_mtime_ns for p in twice.glob("samples/*/0*.npy")}
    # A finished batch is taken as it is: this one is marked.
    if parts:
        first = min(parts)
        np.save(first, 255 - np.load(first))
    finish(start(command("sample", "--workdir", str(twice)), env))
    with np.load(once / "samples.npz") as a, np.load(twice / "samples.npz") as b:
        assert a["x"].shape == (16, 16, 16, 1) and int(a["step"]) == 30
        marked = 4 if parts else 0
        np.testing.assert_array_equal(255 - a["x"][:marked], b["x"][:marked])
        np.testing.assert_array_equal(a["x"][marked:], b["x"][marked:])
        np.testing.assert_array_equal(a["id"], b["id"])
    assert not (twice / "samples").exists()


def test_eval_of_nothing_is_one_line(env, tmp_path):
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "nowhere"):
        shown = finish(start(command("eval", "--workdir", str(where)), env), code=2)
        assert shown.count("\n") == 1 and "no run here" in shown


_DEVICES = """
import sys
from pathlib import Path
from dataclasses import replace
import jax, numpy as np
import test_train as lab
from mdiff import config
from mdiff.train import mesh, loop
real_mesh, real_shardings = mesh.make_mesh, mesh.shardings
mesh.shardings = lambda shapes, device_mesh, **_: real_shardings(shapes, device_mesh, min_bytes=0)
out = Path(sys.argv[1])
assert len(jax.devices()) == 2

def run(name, devices, steps, **axes):
    mesh.make_mesh = lambda cfg, _=None: real_mesh(cfg, jax.devices()[:devices])
    cfg = replace(lab.training(steps=steps, log_every=1, ema_lengths=(0.1,)), mesh=config.Mesh(**axes))
    state = lab.run(out / name, cfg).state
    kernel = state.params["net"]["b"]["kernel"]
    assert len(kernel.sharding.device_set) == devices
    shard = kernel.addressable_shards[0].data.shape
    assert shard == ((16, 32) if axes.get("fsdp") == 2 else (16, 64)), shard
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (16, 64)]
    assert len(moments) == 2 and all(m.sharding == kernel.sharding for m in moments)
    assert state.profiles["0.1"]["net"]["b"]["kernel"].sharding == kernel.sharding
    return jax.device_get(state)

def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)

one = run("one", 1, 12)
close(one, run("data", 2, 12))
close(one, run("fsdp", 2, 12, fsdp=2))
run("there", 2, 7, fsdp=2)
close(one, run("there", 1, 12))
run("back", 1, 7)
close(one, run("back", 2, 12, fsdp=2))
start = lab.run(out / "start", lab.training(steps=1)).state
moved = max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(jax.device_get(start.params))))
assert moved > 0.02, moved  # what `close` allows is small beside what was learned
"""


def test_two_devices_equal_one_and_exchange_checkpoints(env, tmp_path):
    process = start([sys.executable, "-c", _DEVICES, str(tmp_path)], {**env, "JAX_NUM_CPU_DEVICES": "2"})
    finish(process)

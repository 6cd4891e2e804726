"""Jobs of several processes: real ones, on simulated devices, through the command line."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from child_env import child_env

from mdiff import config, processes
from mdiff.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split(
    "--net.channels 16 --net.mults 1 --net.blocks 1 --net.patch 4 --train.batch 8 --train.steps 4000 "
    "--train.save-every 5 --train.log-every 1 --train.warmup 3 --train.eval-every 0 --train.eval-samples 8 "
    "--sample.steps 2 --sample.n 24 --sample.batch 6 --data.n 10 --data.heldout 10"
)
SHARDED = ("--mesh.fsdp", "2", "--mesh.shard-above", "0")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return child_env(tmp_path_factory.mktemp("shared"))


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start_job(env, logs: Path, count: int, devices: int, arguments, differing=()) -> list[subprocess.Popen]:
    """`count` processes of `devices` devices; `differing` is added to the last one's arguments."""
    port, started = free_port(), []
    for index in range(count):
        more = list(differing) if index == count - 1 else []
        if count > 1:
            more += ["--processes.coordinator", f"127.0.0.1:{port}", "--processes.count", str(count)]
            more += ["--processes.index", str(index)]
        with (logs / f"{index}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "mdiff.cli", *arguments, *more],
                    env={**env, "JAX_NUM_CPU_DEVICES": str(devices)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def end_job(started: list[subprocess.Popen], logs: Path, code: int = 0) -> list[str]:
    """What each process said, without what the CPU's collectives say about themselves."""
    codes = [process.wait(timeout=600) for process in started]
    texts = [(logs / f"{index}.log").read_text() for index in range(len(started))]
    assert codes == [code] * len(started), texts
    noise = ("Gloo", "connected to", "preemption_notifier")  # of compiled libraries
    lines = [
        [
            line
            for line in text.splitlines()
            if line.strip(" 0123456789") and not any(word in line for word in noise)  # threads cut its lines
        ]
        for text in texts
    ]
    assert not any("Traceback" in text for text in texts), texts
    return ["\n".join(each) for each in lines]


def run_job(env, logs, count, devices, arguments, code=0, differing=()) -> list[str]:
    return end_job(start_job(env, logs, count, devices, arguments, differing), logs, code)


def train_args(folder: Path, *more: str) -> list[str]:
    return ["train", "--config", str(ROOT / "configs/faces.py"), "--workdir", str(folder), *TINY, *more]


def saved(folder: Path) -> list[int]:
    where = folder / "checkpoints"
    return sorted(int(p.name) for p in where.iterdir() if p.name.isdigit()) if where.is_dir() else []


def losses(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


_STATE = """
import sys, numpy as np
from pathlib import Path
from mdiff.console import Monitor
from mdiff.recipes.runs import load_params
from mdiff.trees import named_leaves
for where in sys.argv[1:]:
    params, step = load_params(Path(where), Monitor())
    leaves = {name.replace("/", "|"): np.asarray(leaf) for name, leaf in named_leaves(params)}
    np.savez(where + "/ema.npz", step=step, **leaves)
"""


@pytest.fixture(scope="module")
def preempted(env, tmp_path_factory):
    """A run of 2 processes x 2 devices, its state sharded, stopped by SIGTERM to one of them."""
    base = tmp_path_factory.mktemp("job")
    folder = base / "run"
    started = start_job(env, base, 2, 2, train_args(folder, *SHARDED))
    end = time.monotonic() + 200
    while not saved(folder):
        assert all(process.poll() is None for process in started), (base / "0.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    said = end_job(started, base)
    assert said[1] == ""  # one process does the talking
    assert f"SIGTERM: saved step {saved(folder)[-1]} of 4000" in said[0]
    assert "resume with, each process with its own --processes.index: mdiff train" in said[0]
    return folder


def test_a_preempted_job_resumes_on_other_shapes(env, preempted, tmp_path):
    at = saved(preempted)[-1]
    assert losses(preempted)[at] > 0  # the step all agreed on was logged before the save
    layout = json.loads((preempted / f"checkpoints/{at}/state/_METADATA").read_text())
    assert layout
    length = ("--train.steps", str(at + 3))
    ends = {}
    for count, devices in ((1, 4), (2, 2), (4, 1), (1, 1)):
        folder = tmp_path / f"{count}x{devices}"
        shutil.copytree(preempted, folder)
        mesh = SHARDED if count * devices > 1 else ()
        said = run_job(env, tmp_path, count, devices, train_args(folder, *length, *mesh))
        assert f"resuming at step {at}" in said[0]
        assert saved(folder)[-1] == at + 3
        ends[count, devices] = folder
    script = [sys.executable, "-c", _STATE, *map(str, ends.values())]
    subprocess.run(script, env=env, check=True, timeout=200)
    first = ends[1, 1]
    with np.load(first / "ema.npz") as alone:
        for shape, folder in ends.items():
            for step in range(at + 1, at + 4):
                assert losses(folder)[step] == pytest.approx(losses(first)[step], rel=1e-4), (shape, step)
            with np.load(folder / "ema.npz") as found:
                assert int(found["step"]) == at + 3
                for name in alone.files:
                    np.testing.assert_allclose(found[name], alone[name], atol=2e-4, err_msg=f"{shape} {name}")


def test_jobs_measure_as_one_process_does(env, preempted, tmp_path):
    names = ("audit", "similarity", "yields", "quality")
    folders = []
    for count, devices in ((1, 1), (2, 2)):
        folder = tmp_path / f"{count}x{devices}"
        shutil.copytree(preempted, folder)
        said = run_job(env, tmp_path, count, devices, ["eval", "--workdir", str(folder), "--probes", *names])
        assert "page: " in said[0] and not any(said[1:])
        folders.append(folder)
    one, two = folders
    with np.load(one / "samples.npz") as a, np.load(two / "samples.npz") as b:
        assert a["x"].shape == b["x"].shape == (24, 16, 16, 1)
        apart = np.abs(a["x"].astype(int) - b["x"])
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01  # rounding to whole grey levels
    for name in ("audit", *(f"probe_{name}" for name in names[1:])):
        if apart.max() == 0:
            assert (one / f"{name}.json").read_bytes() == (two / f"{name}.json").read_bytes(), name
        assert (two / f"{name}.json").is_file()
    assert not list(two.glob("**/*.tmp*")) and not (two / "lock.json").exists()


@pytest.mark.parametrize(
    ("count", "more", "differing", "line"),
    [
        (2, (), ("--train.batch", "16"), "process 1 was started with another config than process 0: fields.train.batch was 8, is 16"),
        (2, ("--mesh.fsdp", "3"), (), "mesh.fsdp = 3"),
        (2, ("--train.batch", "6"), (), "train.batch = 6: does not divide over 4 devices"),
        (2, ("--loss.cutoff", "900"), (), "loss.cutoff = 900"),
    ],
)  # fmt: skip
def test_bad_jobs_say_one_line_and_all_end(env, tmp_path, count, more, differing, line):
    said = run_job(env, tmp_path, count, 2, train_args(tmp_path / "run", *more), 2, differing)
    assert said[0].startswith("mdiff: ") and line in said[0] and "\n" not in said[0]
    assert not any(said[1:])
    assert not (tmp_path / "run").exists()


def test_a_job_that_does_not_fit_is_refused_before_it_begins(capsys):
    from mdiff.cli import main

    faces = ["train", "--config", str(ROOT / "configs/faces.py"), "--workdir", "nowhere"]
    for more, line in (
        (("--processes.count", "2"), "have no effect without processes.coordinator"),
        (("--processes.coordinator", "here"), "give HOST:PORT"),
        (("--processes.coordinator", "here:1", "--processes.count", "2"), "processes.index = -1"),
        (("--processes.coordinator", "here:1", "--processes.count", "2", "--processes.index", "2"), "from 0"),
        (("--processes.coordinator", "here:1", "--processes.launch", "single"), "leave one of them out"),
    ):  # fmt: skip
        assert main([*faces, *more]) == 2
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1


def test_clusters_are_told_by_their_environment():
    assert processes.detect({}) == ""
    assert processes.detect({"SLURM_JOB_ID": "1"}) == ""  # an allocation is not yet a step
    assert processes.detect({"TPU_WORKER_HOSTNAMES": "localhost"}) == ""  # one host


def test_alone_everything_is_first():
    assert processes.count() == 1 and processes.is_first()
    assert processes.gather(b"x") == [b"x"]
    assert processes.spread(3, lambda part: [np.full(2, part)])[2][0].tolist() == [2, 2]
    assert not processes.preempted(7)
    with pytest.raises(UserError, match="loss"):
        processes.check_same("config", {"loss": {"cutoff": 1}}) or processes.together(_fail)
    processes.join(config.Processes(launch="single"))


def _fail():
    raise UserError("loss")

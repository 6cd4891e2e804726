"""A run on an object store, from training over a signal and a resume to its page, against a server on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import gcs_server  # noqa: E402

RUN = "gs://bucket/runs/one"
TINY = [
    "--data.size",
    "8",
    "--data.n",
    "10",
    "--data.heldout",
    "10",
    "--net.channels",
    "16",
    "--net.mults",
    "1",
    "--net.blocks",
    "1",
    "--net.patch",
    "2",
    "--train.batch",
    "10",
    "--train.warmup",
    "3",
    "--train.save-every",
    "20",
    "--train.log-every",
    "5",
    "--train.eval-every",
    "0",
    "--train.eval-samples",
    "8",
    "--sample.n",
    "8",
    "--sample.steps",
    "2",
]


def names():
    return gcs_server.names("runs/one")


def content(name):
    return gcs_server.content("runs/one", name)


def start(tmp_path, *arguments):
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "mdiff.cli", *arguments],
        env={**os.environ, **shared, "PYTHONPATH": str(ROOT), "MDIFF_DATA_DIR": str(tmp_path / "data")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process, code=0):
    text = process.communicate(timeout=200)[0]
    assert process.returncode == code, text
    assert "Traceback" not in text
    return text


def test_train_stop_resume_and_eval_on_a_store(tmp_path, monkeypatch):
    server, address = gcs_server.start()
    for name, value in gcs_server.settings(address).items():
        monkeypatch.setenv(name, value)
    train = ["train", "--config", str(ROOT / "configs/faces.py"), "--workdir", RUN, *TINY]
    first = start(tmp_path, *train, "--train.steps", "100000")
    try:
        while not any(name.startswith("checkpoints/20/") and name.endswith("sums.json") for name in names()):
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGTERM)
    text = ended(first)
    assert f"--workdir {RUN}" in text.splitlines()[-1], "how to resume"
    assert {"config.json", "subset.json", "ledger.json", "metrics.jsonl"} <= set(names())
    assert "lock.json" not in names()
    step = max(int(name.split("/")[1]) for name in names() if name.startswith("checkpoints/"))
    rows = [json.loads(line)["step"] for line in content("metrics.jsonl").splitlines()]
    assert rows[-1] == step, "rows up to the checkpoint"

    # What a killed save leaves: a checkpoint without orbax's mark of completion.
    gcs_server.Handler.objects["bucket", f"runs/one/checkpoints/{step + 7}/state/x"] = (10**9, b"half")
    text = ended(start(tmp_path, *train, "--train.steps", str(step + 7)))
    assert f"resuming at step {step}" in text and f"trained to step {step + 7}" in text
    assert f"checkpoints/{step + 7}/state/x" not in names()

    evaluate = ["eval", "--workdir", RUN, "--probes", "audit", "similarity"]
    assert f"page: {RUN}/report.html" in ended(start(tmp_path, *evaluate))
    assert {"samples.npz", "audit.json", "audit.npz", "probe_similarity.json", "report.html"} <= set(names())
    assert not any(name.startswith("samples/") for name in names())
    server.shutdown()

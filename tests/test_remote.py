"""Folders on an object store, against a server on this machine; whole runs: parity/test_remote_run.py."""

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import gcs_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import files, lock
from mdiff.errors import UserError
from mdiff.train import metrics
from mdiff.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def server():
    started, address = gcs_server.start()
    settings = gcs_server.settings(address)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    yield started
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    started.shutdown()


@pytest.fixture
def bucket(server):
    gcs_server.Handler.objects.clear()
    return files.locate("gs://bucket/runs/one")


def names():
    return gcs_server.names("runs/one")


def content(name):
    return gcs_server.content("runs/one", name)


# --------------------------------------------------------------------------------------------- paths


def test_texts_of_paths(tmp_path):
    assert files.locate("runs/x") == Path("runs/x") and files.is_local(files.locate("runs/x"))
    remote = files.locate("gs://bucket/a")
    assert str(remote / "b") == "gs://bucket/a/b" and not files.is_local(remote)
    assert files.locate(remote) is remote and files.locate(tmp_path) is tmp_path
    assert str(files.absolute(remote)) == "gs://bucket/a"
    for text, fix in (("s3://bucket/a", "mount the bucket"), ("gs://", "has no bucket")):
        with pytest.raises(UserError, match=fix):
            files.locate(text)


def test_files_on_a_store(bucket, tmp_path):
    assert not bucket.exists() and list(files.below(bucket)) == []
    files.check_writable(bucket, "--workdir")
    assert names() == []
    files.write_json(bucket / "a.json", {"x": 1})
    files.write_atomically(bucket / "deep/er/b.npz", lambda part: np.savez(part, x=np.arange(3)))
    assert json.loads(content("a.json")) == {"x": 1}
    with (bucket / "deep/er/b.npz").open("rb") as opened, np.load(opened) as stored:
        assert stored["x"].tolist() == [0, 1, 2]
    assert sorted(map(str, files.below(bucket))) == [f"{bucket}/a.json", f"{bucket}/deep/er/b.npz"]
    assert abs(files.modified(bucket / "a.json") - 1767225600) < 2  # the server's stamp, 2026-01-01
    assert files.free_bytes(bucket) == float("inf") and files.free_bytes(tmp_path) > 0
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(bucket / "a.json", lambda part: part.write_text("half") / 0)
    assert json.loads(content("a.json")) == {"x": 1}, "a failed writer leaves the old object"
    files.remove(bucket / "deep")
    assert names() == ["a.json"]


def test_store_that_cannot_be_reached(monkeypatch, bucket):
    def refuse(*_):
        raise OSError(13, "denied")

    monkeypatch.setattr(type(bucket), "write_text", refuse)
    with pytest.raises(UserError, match=r"--workdir gs://bucket/runs/one: cannot be written.*credentials"):
        files.check_writable(bucket, "--workdir")


def test_another_processes_objects_are_seen(bucket):
    """No listing is remembered: a lock may appear at any time."""
    assert not (bucket / "a").exists() and not bucket.is_dir()
    gcs_server.Handler.objects["bucket", "runs/one/a"] = (10**9, b"first")
    assert (bucket / "a").read_text() == "first" and bucket.is_dir()
    gcs_server.Handler.objects["bucket", "runs/one/a"] = (10**9 + 1, b"longer than that")
    assert (bucket / "a").read_text() == "longer than that"
    del gcs_server.Handler.objects["bucket", "runs/one/a"]
    assert not (bucket / "a").exists()


# ---------------------------------------------------------------------------------------------- lock


def test_lock_on_a_store(bucket):
    with lock.hold(bucket, print, beat=0.3, settle=0.1) as held:
        assert names() == ["lock.json"]
        time.sleep(1)
        assert json.loads(content("lock.json"))["beats"] >= 1
        held.check()
        with (
            pytest.raises(UserError, match="is at work there"),
            lock.hold(bucket, print, beat=0.3, settle=0.1),
        ):
            pass
    assert names() == []


def test_silent_lock_on_a_store_is_taken_over(bucket):
    with lock.hold(bucket, print, beat=30, settle=0.0):
        tree = json.loads(content("lock.json"))
    files.write_json(bucket / "lock.json", {**tree, "host": "elsewhere"})
    said = []
    with lock.hold(bucket, said.append, beat=0.1, settle=0.0):
        assert json.loads(content("lock.json"))["host"] == tree["host"]
    assert "waiting" in said[0] and "took over" in said[1]


def test_of_two_that_write_at_once_the_last_one_wins(bucket):
    """The other one reads again, and sees it."""

    def late():
        while "lock.json" not in names():
            time.sleep(0.01)
        tree = {**json.loads(content("lock.json")), "token": "another", "pid": 7}
        gcs_server.Handler.objects["bucket", "runs/one/lock.json"] = (10**9, json.dumps(tree).encode())

    other = threading.Thread(target=late)
    other.start()
    with pytest.raises(UserError, match="process 7 on"), lock.hold(bucket, print, beat=30, settle=1.0):
        pass
    other.join()
    assert json.loads(content("lock.json"))["token"] == "another"


# ------------------------------------------------------------------------------------------- scalars


def test_metrics_reach_the_store_when_flushed_and_closed(bucket, monkeypatch):
    with metrics.Metrics(bucket, 0) as log:
        log.write(1, {"loss": 1.0})
        assert content("metrics.jsonl") == b"", "not for every row"
        log.flush()
        assert [row["step"] for row in metrics.read(bucket / "metrics.jsonl")] == [1]
        monkeypatch.setattr(metrics, "COPY_EVERY", 0.0)
        log.write(2, {"loss": 0.5})
        assert [row["step"] for row in metrics.read(bucket / "metrics.jsonl")] == [1, 2]
        monkeypatch.undo()
        log.write(3, {"loss": 0.3})
    with metrics.Metrics(bucket, 2):
        pass
    assert [row["step"] for row in metrics.read(bucket / "metrics.jsonl")] == [1, 2]
    boards = [name for name in names() if name.startswith("tensorboard/")]
    assert len(boards) == 2 and all(len(content(name)) > 0 for name in boards)


# --------------------------------------------------------------------------------------- checkpoints


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: jax.Array
    x: jax.Array


def state(step):
    return State(jnp.int32(step), jnp.arange(step, step + 5.0))


def test_checkpoints_on_a_store(bucket):
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
    )
    with Checkpoints(bucket / "checkpoints", keep=2) as kept:
        for step in (3, 5, 8):
            kept.save(state(step), {"at": step})
        kept.wait()
        assert kept.steps() == [5, 8]
        assert kept.whole(pytest.fail) == [5, 8]

    # What a killed save leaves: a folder without orbax's mark of completion.
    gcs_server.Handler.objects["bucket", "runs/one/checkpoints/9/state/x"] = (10**9, b"half")
    with Checkpoints(bucket / "checkpoints", keep=2) as kept:
        assert kept.steps() == [5, 8]
        kept.discard_after(8)
        assert not any("checkpoints/9" in name for name in names())
        found, meta = kept.restore(abstract, pytest.fail)
        assert int(found.step) == meta["at"] == 8 and found.x.tolist() == [8, 9, 10, 11, 12]
        kept.save(state(9), {"at": 9})

    # One that lost a file is passed over.
    gone = next(name for name in names() if name.startswith("checkpoints/9/state/") and "commit" not in name)
    del gcs_server.Handler.objects["bucket", f"runs/one/{gone}"]
    said = []
    with Checkpoints(bucket / "checkpoints", keep=2) as kept:
        assert int(kept.restore(abstract, said.append)[0].step) == 8
    assert "is missing" in said[0] and "using checkpoint 8" in said[1]

"""One live job per folder, with real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from mdiff import lock
from mdiff.errors import UserError

BEAT = 0.1
CHILD = """
import sys, time
from pathlib import Path
from mdiff import lock
from mdiff.errors import UserError

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
try:
    with lock.hold(folder, lambda message: print("said", message, flush=True), beat=0.1):
        print("held", flush=True)
        time.sleep(seconds)
        if "--fail" in sys.argv:
            raise UserError("failed")
except UserError as error:
    print("refused", error, flush=True)
"""


def child(folder, seconds, *more):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(seconds), *more], stdout=subprocess.PIPE, text=True
    )


@contextmanager
def killed_later(process):
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def stored(folder):
    return json.loads((folder / "lock.json").read_text())


def leave(folder, **changes):
    """A lock as another process would have left it: this one's own, with some facts changed."""
    folder.mkdir(exist_ok=True)
    with lock.hold(folder, print, beat=BEAT):
        tree = stored(folder)
    (folder / "lock.json").write_text(json.dumps({**tree, "token": "another", **changes}))


def test_second_live_process_is_refused_in_one_line(tmp_path):
    with killed_later(child(tmp_path, 30)) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, lock.hold(tmp_path, pytest.fail, beat=BEAT):
            pytest.fail("two jobs hold one lock")
        message = str(error.value)
        assert "\n" not in message
        assert f"process {first.pid} on " in message and f"--workdir {tmp_path}" in message
        assert "-c" in message and "since 20" in message  # the command, and the time
        assert stored(tmp_path)["pid"] == first.pid  # left as it was


def test_lock_of_a_killed_process_is_taken_over_at_once_and_said(tmp_path):
    with killed_later(child(tmp_path, 30)) as first:
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGKILL)
        while b"Z" not in Path(f"/proc/{first.pid}/stat").read_bytes().rpartition(b")")[2]:
            time.sleep(0.01)  # a zombie: nobody has waited for it yet, as in a container without init
        said = []
        began = time.monotonic()
        with lock.hold(tmp_path, said.append) as held:
            held.check()
            assert time.monotonic() - began < 5, "no beats to watch on the same machine"
            assert stored(tmp_path)["pid"] == os.getpid()
        assert len(said) == 1 and f"took over the lock of process {first.pid}" in said[0]
    assert not (tmp_path / "lock.json").exists()


def test_process_number_used_again_is_not_its_former_owner(tmp_path):
    with killed_later(child(tmp_path, 30)) as first:
        assert first.stdout.readline() == "held\n"
        text = (tmp_path / "lock.json").read_text()
        other = tmp_path / "other"
        other.mkdir()
        tree = json.loads(text)
        (other / "lock.json").write_text(json.dumps({**tree, "start": str(int(tree["start"]) - 1)}))
        with lock.hold(other, print, beat=BEAT):
            pass  # same number, another start: dead
        (other / "lock.json").write_text(text)
        with pytest.raises(UserError, match="at work"), lock.hold(other, print, beat=BEAT):
            pass  # the very process: alive


def test_own_process_number_from_before_a_container_restart(tmp_path):
    leave(tmp_path, start="1")
    with lock.hold(tmp_path, print):
        pass
    leave(tmp_path)  # even the start is ours, as on kernels that count from the container's
    said = []
    with lock.hold(tmp_path, said.append, beat=BEAT):
        pass
    assert "waiting" in said[0] and "took over" in said[1]


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"boot": "another"}, {"space": "pid:[1]"}])
def test_silent_job_elsewhere_is_waited_for_then_taken_over(tmp_path, where):
    leave(tmp_path, **where)
    said, began = [], time.monotonic()
    with lock.hold(tmp_path, said.append, beat=BEAT):
        assert lock.PATIENCE * BEAT <= time.monotonic() - began < 5
    assert said[0] == (
        f"locked: waiting up to 0 s to see whether process {os.getpid()} on "
        f"{where.get('host', os.uname().nodename)} is alive"
    )
    assert "took over" in said[1] and len(said) == 2


def test_beating_job_elsewhere_is_alive(tmp_path):
    leave(tmp_path, host="elsewhere")
    ended = threading.Event()

    def beat():
        for beats in range(1000):
            if ended.wait(BEAT):
                return
            tree = {**stored(tmp_path), "beats": beats}
            (tmp_path / "new").write_text(json.dumps(tree))
            (tmp_path / "new").replace(tmp_path / "lock.json")

    other = threading.Thread(target=beat)
    other.start()
    try:
        with (
            pytest.raises(UserError, match=r"on elsewhere .* is at work"),
            lock.hold(tmp_path, print, beat=BEAT),
        ):
            pass
    finally:
        ended.set()
        other.join()
    assert stored(tmp_path)["host"] == "elsewhere"


def test_job_elsewhere_that_ends_meanwhile_is_followed(tmp_path):
    leave(tmp_path, host="elsewhere")
    threading.Timer(2 * BEAT, (tmp_path / "lock.json").unlink).start()
    with lock.hold(tmp_path, print, beat=1.0):
        pass


def test_beats_go_on_while_held(tmp_path):
    with lock.hold(tmp_path, print, beat=BEAT) as held:
        before = stored(tmp_path)["beats"]
        time.sleep(5 * BEAT)
        assert stored(tmp_path)["beats"] >= before + 2
        held.check()


@pytest.mark.parametrize("dead", [False, True])
def test_of_eight_that_start_at_once_one_wins(tmp_path, dead):
    if dead:
        leave(tmp_path, pid=2**22 + 1)  # above the largest process number: nobody's
    racers = [child(tmp_path, 4) for _ in range(8)]
    lines = [process.communicate(timeout=60)[0] for process in racers]
    assert sum("held" in line for line in lines) == 1
    assert sum("refused" in line for line in lines) == 7
    assert not (tmp_path / "lock.json").exists()


def test_taken_over_while_suspended(tmp_path):
    """A job that slept while another one took its lock must not write any more."""
    with lock.hold(tmp_path, print, beat=BEAT) as held:
        theirs = {**stored(tmp_path), "token": "another", "host": "elsewhere", "pid": 7}
        (tmp_path / "lock.json").write_text(json.dumps(theirs))
        time.sleep(3 * BEAT)
        with pytest.raises(UserError, match="now belongs to process 7 on elsewhere"):
            held.check()
    assert stored(tmp_path)["host"] == "elsewhere"  # not released: it is not ours


def test_check_sees_it_before_the_next_beat_after_a_suspension(tmp_path, monkeypatch):
    with lock.hold(tmp_path, print, beat=30.0) as held:
        (tmp_path / "lock.json").unlink()
        held.check()  # beats are on time: not looked at
        now = time.monotonic()
        monkeypatch.setattr(lock.time, "monotonic", lambda: now + 100)
        with pytest.raises(UserError, match="is gone"):
            held.check()
    assert not (tmp_path / "lock.json").exists()


def test_released_on_errors_and_empty_folders_removed(tmp_path):
    folder = tmp_path / "a" / "b"

    def fail():
        with lock.hold(folder, print):
            assert (folder / "lock.json").is_file()
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (tmp_path / "a").exists()
    (tmp_path / "kept").write_text("")
    with lock.hold(tmp_path, print):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with killed_later(child(tmp_path, 0, "--fail")) as process:
        assert process.stdout.read() == "held\nrefused failed\n"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("damage", ["{", '{"host": "x"}', "[1]", "\x00\xff", '{"pid": 1'])
def test_damaged_lock_is_waited_for_then_taken_over(tmp_path, damage):
    (tmp_path / "lock.json").write_bytes(damage.encode("latin-1"))
    said = []
    with lock.hold(tmp_path, said.append, beat=BEAT):
        assert stored(tmp_path)["pid"] == os.getpid()
    assert "damaged" in said[0] and "took over" in said[1]


def test_empty_lock_is_nobodys(tmp_path):
    (tmp_path / "lock.json").write_text("")
    with lock.hold(tmp_path, pytest.fail, beat=60.0):
        pass


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--out .*file.*is a file"),
        lock.hold(tmp_path / "file" / "run", print, field="--out"),
    ):
        pass


def test_file_systems_without_flock_decide_by_reading_again(tmp_path, monkeypatch):
    """Then the last writer wins, and the others see it."""
    monkeypatch.setattr(lock, "_flock", lambda *_: False)

    def overwritten(seconds):
        if seconds == 0.5:
            leaving = {**stored(tmp_path), "token": "another", "pid": 7}
            (tmp_path / "lock.json").write_text(json.dumps(leaving))

    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", overwritten)
        with pytest.raises(UserError, match="process 7 on"), lock.hold(tmp_path, print, settle=0.5):
            pass
    assert stored(tmp_path)["pid"] == 7
    (tmp_path / "lock.json").unlink()
    with lock.hold(tmp_path, print, settle=0.0):
        pass

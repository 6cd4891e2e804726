"""One live job per folder: `lock.json` says who works in it, and beats while that job lives.

Who holds a lock is a text; taking, beating and releasing are the same act, `_swap`: replace the text by another
one, if it is still what it was. On a disk the swap is exclusive (`flock`), so of many that start at once exactly
one wins; on an object store the winner is whoever's text is still there a moment later.

Whether a holder lives is asked of the kernel when it is on this machine. Otherwise its beats are watched: clocks
of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import operator
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from mdiff.errors import UserError
from mdiff.files import check_writable, is_local

NAME = "lock.json"
BEAT = 10.0
"""Seconds between two beats of a lock."""
PATIENCE = 4
"""Beats that a silent lock is watched for before it counts as a dead job's."""
SETTLE = 2.0
"""Seconds after which a text on an object store is read again, to see whose it is."""

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
      host: its machine's name.
      boot: which boot of that machine, "" if unknown.
      space: in which of its process namespaces (containers), "" if unknown.
      pid: its process.
      start: when the kernel started that process, in clock ticks since boot: a process number used again differs.
      token: tells this lock from every other.
      since: when it was taken; for people.
      command: what was run; for people.
    """

    host: str
    boot: str
    space: str
    pid: int
    start: str
    token: str
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"


class Held:
    """A lock that this process holds, kept beating by a thread."""

    def __init__(self, path: Path, owner: Owner, field: str, beat: float) -> None:
        self._path, self._owner, self._field, self._beat = path, owner, field, beat
        self._beats = 0
        self._lost = False
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._live, name="mdiff lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Is the lock still ours? Costs nothing while the beats are on time.

        Raises:
          UserError: another job took it over, or someone deleted it: this process was suspended, say.
        """
        if time.monotonic() - self._last > 2 * self._beat:
            self._pulse()
        if self._lost:
            found = _read(self._path)
            owner = None if found is None else _parse(found)
            what = "is gone" if found is None else f"now belongs to {owner or 'another job'}"
            raise UserError(
                f"{self._field} {self._path.parent}: the lock of this job {what}, so another job may have gone "
                "on from here; stopped without saving; the same command resumes when the other one has ended"
            )

    def _live(self) -> None:
        while not self._ended.wait(self._beat) and not self._lost:
            self._pulse()

    def _pulse(self) -> None:
        with self._turn:
            if self._lost or self._ended.is_set():
                return
            # A store out of reach for a while is no lost lock: whose it is shows when it answers again.
            with contextlib.suppress(OSError):
                self._beats += 1
                self._lost = not _swap(self._path, self._ours, _text(self._owner, self._beats))
                self._last = time.monotonic()

    def _ours(self, found: str | None) -> bool:
        return found is not None and self._owner.token in found

    def release(self) -> None:
        """Stop beating and remove the lock, if it is still ours."""
        self._ended.set()
        with self._turn, contextlib.suppress(OSError):  # what stays behind is taken over by the next job
            _swap(self._path, self._ours, None)
        self._thread.join()


@contextmanager
def hold(
    folder: Path,
    say: Callable[[str], None],
    *,
    field: str = "--workdir",
    beat: float = BEAT,
    settle: float = SETTLE,
) -> Iterator[Held]:
    """Within the block, no other job works in `folder`. Of a job of many processes the first one calls this.

    A job that was killed leaves its lock behind, which is taken over: at once on the same machine, otherwise
    after it was silent for `PATIENCE` beats.

    Args:
      folder: made if it is not there, and removed again if it is then still empty.
      say: told about waiting and taking over.
      field: how the user named the folder.
      beat: seconds between two beats; the same for all jobs that may meet here.
      settle: seconds until a text on an object store is read again.

    Raises:
      UserError: a live job holds it, or the folder cannot be written.
    """
    check_writable(folder, field)
    made = [place for place in (folder, *folder.parents) if not place.exists()] if is_local(folder) else []
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = None
    try:
        held = _take(folder / NAME, say, field, beat, settle)
        yield held
    finally:
        if held is not None:
            held.release()
        with contextlib.suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _take(path: Path, say: Callable[[str], None], field: str, beat: float, settle: float) -> Held:
    mine = _myself()
    while True:
        found = _read(path)
        if found is not None and (owner := _live_owner(path, found, mine, say, beat)):
            raise _refusal(path, field, owner)
        if not _swap(path, partial(operator.eq, found), _text(mine, 0)):
            continue  # it changed meanwhile: look again
        if not _exclusive(path):
            time.sleep(settle)
            now = _read(path)
            if now != _text(mine, 0):
                raise _refusal(
                    path, field, str((now and _parse(now)) or "a job that started at the same time")
                )
        if found is not None:
            say(f"took over the lock of {_parse(found) or 'a damaged lock file'}, which has ended")
        return Held(path, mine, field, beat)


def _refusal(path: Path, field: str, owner: str) -> UserError:
    return UserError(
        f"{field} {path.parent}: {owner} is at work there; end it first (it saves on SIGTERM), or choose "
        f"another {field}"
    )


def _live_owner(path: Path, found: str, mine: Owner, say: Callable[[str], None], beat: float) -> str:
    """Who holds the lock with the text `found`, "" when that job is dead or has just ended."""
    owner = _parse(found)
    alive = None if owner is None else _alive(owner, mine)
    if alive is None:
        whom = f"process {owner.pid} on {owner.host}" if owner else f"the owner of {path} (damaged)"
        say(f"locked: waiting up to {PATIENCE * beat:.0f} s to see whether {whom} is alive")
        end = time.monotonic() + PATIENCE * beat
        while time.monotonic() < end and not alive:
            time.sleep(beat / 4)
            now = _read(path)
            if now is None:
                return ""
            alive, owner = now != found, _parse(now)
    return str(owner or "a job with a damaged lock file") if alive else ""


def _alive(owner: Owner, mine: Owner) -> bool | None:
    """Does that process run? None when this machine cannot know."""
    here = (owner.host, owner.boot, owner.space) == (mine.host, mine.boot, mine.space)
    if not here or not mine.boot:
        return None
    start = _start(owner.pid)
    if owner.pid == mine.pid:  # a restarted container counts from 1 again; its clock may too
        return False if start != owner.start else None
    if start is None:
        return None
    return start == owner.start


def _start(pid: int) -> str | None:
    """When the process was started; "" if there is none (or a dead one not yet buried), None if hidden from us."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return None
    state, *rest = stat.rpartition(")")[2].split()  # a command's name may hold spaces and brackets
    return "" if state in "ZXx" else rest[18]


def _myself() -> Owner:
    def read(get: Callable[[], str]) -> str:
        try:
            return get().strip()
        except OSError:  # not a Linux
            return ""

    pid = os.getpid()
    return Owner(
        host=socket.gethostname(),
        boot=read(lambda: Path("/proc/sys/kernel/random/boot_id").read_text()),
        space=read(lambda: os.readlink("/proc/self/ns/pid")),
        pid=pid,
        start=_start(pid) or "",
        token=secrets.token_hex(8),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def _text(owner: Owner, beats: int) -> str:
    return json.dumps({**asdict(owner), "beats": beats}, indent=1) + "\n"


def _parse(text: str) -> Owner | None:
    """The owner written in a lock, None when it is damaged."""
    try:
        tree = json.loads(text)
        return Owner(**{each.name: tree[each.name] for each in fields(Owner)})
    except (ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> str | None:
    """The text of a lock, None when there is none."""
    try:
        if not is_local(path):
            return path.read_text() or None
        with path.open(errors="replace") as file:
            _flock(file.fileno(), fcntl.LOCK_SH)
            return file.read() or None
    except FileNotFoundError:
        return None


def _swap(path: Path, expected: Callable[[str | None], bool], new: str | None) -> bool:
    """Replace the text by `new` if it is as expected; None stands for no text. Was it replaced?"""
    if not is_local(path):
        if not expected(_read(path)):
            return False
        path.unlink(missing_ok=True) if new is None else path.write_text(new)
        return True
    try:
        number = os.open(path, os.O_RDWR | (os.O_CREAT if expected(None) else 0), 0o666)
    except FileNotFoundError:
        return False
    with os.fdopen(number, "r+", errors="replace") as file:
        _flock(number, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(number), path.stat())
        except FileNotFoundError:  # released between open and flock
            same = False
        if not same or not expected(file.read() or None):
            return False
        if new is None:
            path.unlink()
        else:
            file.seek(0)
            file.write(new)
            file.truncate()
            file.flush()
            os.fsync(number)  # seen by other machines on a network disk
    return True


def _flock(number: int, kind: int) -> bool:
    """Exclude other processes from an open file; False on file systems that cannot."""
    try:
        fcntl.flock(number, kind)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False
    return True


def _exclusive(path: Path) -> bool:
    """Does `_swap` exclude other processes here?"""
    if not is_local(path):
        return False
    with path.open("rb") as file:
        return _flock(file.fileno(), fcntl.LOCK_SH)

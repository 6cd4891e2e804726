"""Many searches that ask for scores, run together: each batch holds the next tests of every open one.

A search is a generator that yields the sets it wants scored and is sent their scores. It reads like the sequential
algorithm and makes the same decisions in any company: only which sets share a call depends on that.

No score is asked for twice: those of a prompt are remembered, and that of the empty set is 1 (nothing is switched off,
and a map is as similar to itself as can be).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from mdiff.errors import UserError
from mdiff.nemo import Nemo
from mdiff.probes.found import Decision, Found

Evaluate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`(prompt int32 [K], off bool [K,N]) -> score float32 [K]`, for any K: similarity of whole and ablated network, the maximum over the
prompt's kept seeds. A pure function of each row; in a job of several processes the same on all."""


Search = Callable[["Tests", int], "Asked"]
"""`(tests, prompt) -> search`, which returns a `Found`."""

Asked = Generator[np.ndarray, np.ndarray, Any]
"""Yields sets bool [m,N], the likeliest to be needed first; is sent the scores of the first 1..m of them."""


@dataclass
class Tests:
    """The tests of one prompt's search: what is known, what was decided, and what it cost."""

    size: int
    """Neurons, N."""
    width: int
    """Sets of a prompt asked for in one round."""
    reach: int
    """Sets offered in case the batch has room."""
    known: dict[bytes, float] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    evaluations: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        self.known[self.key(self.off(()))] = 1.0

    @staticmethod
    def key(off: np.ndarray) -> bytes:
        return np.packbits(off).tobytes()

    def off(self, neurons: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool [N], true for these."""
        out = np.zeros(self.size, bool)
        out[np.asarray(neurons, int)] = True
        return out

    def score(self, off: np.ndarray) -> float:
        """The score of a set that is known."""
        return self.known[self.key(off)]

    def until(self, make: Callable[[int], np.ndarray], n: int, stop: Callable[[float], bool]) -> Asked:
        """The scores of sets make(0), make(1), ..., make(n - 1) up to and with the first that stops."""
        scores: list[float] = []
        while len(scores) < n:
            ahead: dict[bytes, np.ndarray] = {}
            for i in range(len(scores), min(len(scores) + self.reach, n)):
                off = make(i)
                score = self.known.get(self.key(off))
                if score is None:
                    ahead.setdefault(self.key(off), off)
                    continue
                if not ahead:
                    scores.append(score)
                if stop(score):
                    break
            if scores and stop(scores[-1]):
                break
            if ahead:
                got = yield np.stack(list(ahead.values()))
                self.rounds += 1
                self.evaluations += len(got)
                self.known.update((key, float(score)) for key, score in zip(ahead, got, strict=False))
        return scores

    def note(self, stage: str, index: int, score: float, threshold: float, passed: bool) -> None:
        """Logs a decision."""
        self.decisions.append(Decision(stage, int(index), score, threshold, passed))


@dataclass
class _Open:
    """A prompt whose search has begun, and the sets it asks for."""

    prompt: int
    asked: Asked
    sets: np.ndarray


def lockstep(
    searches: Iterable[tuple[int, Asked]], evaluate: Evaluate, *, rows: int, width: int = 1
) -> Iterator[Found]:
    """Runs many searches together: each batch holds the next sets of every open prompt.

    A prompt is opened when the batch has room for it, so at most `rows` are open. Room that no prompt is left to fill
    goes to more sets of the open ones, when `width` says that they may be computed ahead at all.

    Args:
      searches: prompts and their searches, in the order they are opened.
      evaluate: the score function.
      rows: sets in a batch.
      width: sets of one prompt in a batch.

    Yields:
      The record of each prompt, as soon as it is finished.

    Raises:
      UserError: a score is not finite.
    """
    waiting, queue = iter(searches), deque[_Open]()
    while True:
        batch: list[_Open] = []
        takes: list[int] = []
        room = rows
        while room:
            if not queue:
                finished = yield from _opened(waiting, queue)
                if finished:
                    break
            batch.append(queue.popleft())
            takes.append(min(width, len(batch[-1].sets), room))
            room -= takes[-1]
        if not batch:
            return
        for i, one in enumerate(batch if width > 1 else ()):
            more = min(len(one.sets) - takes[i], room // (len(batch) - i))
            takes[i] += more
            room -= more
        prompts = np.repeat([one.prompt for one in batch], takes).astype(np.int32)
        off = np.concatenate([one.sets[:take] for one, take in zip(batch, takes, strict=True)])
        scores = np.asarray(evaluate(prompts, off))
        if not np.isfinite(scores).all():
            bad = prompts[~np.isfinite(scores)][0]
            raise UserError(f"prompt {bad}: score is not finite; run in float32, or check the checkpoint")
        ends = np.cumsum(takes)
        for one, take, end in zip(batch, takes, ends, strict=True):
            try:
                one.sets = one.asked.send(scores[end - take : end])
            except StopIteration as stop:
                yield replace(stop.value, prompt=one.prompt)
            else:
                queue.append(one)


def _opened(waiting: Iterator[tuple[int, Asked]], queue: deque[_Open]) -> Generator[Found, None, bool]:
    """Opens the next prompt that asks for a score; true when none is left."""
    for prompt, asked in waiting:
        try:
            queue.append(_Open(prompt, asked, next(asked)))
            return False
        except StopIteration as stop:
            yield replace(stop.value, prompt=prompt)
    return True


def run(
    search: Search,
    evaluate: Evaluate,
    n: int,
    mode: str,
    cfg: Nemo,
    *,
    prompts: Sequence[int],
    memorized: np.ndarray | None = None,
    rows: int = 0,
) -> Iterator[Found]:
    """Searches prompts in lockstep.

    Args:
      search: makes the search of a prompt.
      evaluate: the score function.
      n: neurons.
      mode: for the records of prompts that need no search.
      cfg: `width` (0: 1 on CPU, 8 elsewhere) and `batch`.
      prompts: their numbers, in the order they are opened.
      memorized: bool [P], by number; the others are reported at once as not memorized.
      rows: sets in a batch, 0 for `cfg.batch`.

    Returns:
      The records, as they are finished.
    """
    width = cfg.width or (1 if jax.default_backend() == "cpu" else 8)
    rows = rows or cfg.batch
    if width < 1 or rows < 1:
        raise UserError(f"nemo.width = {width}, nemo.batch = {rows}: must be 1 or more (width 0: by device)")
    reach = max(width, rows) if width > 1 else 1
    wanted = [int(p) for p in prompts if memorized is None or memorized[p]]
    others = [Found(prompt=int(p), mode=mode) for p in prompts if not (memorized is None or memorized[p])]
    searches = ((p, search(Tests(n, width, reach), p)) for p in wanted)
    return itertools.chain(others, lockstep(searches, evaluate, rows=rows, width=width))

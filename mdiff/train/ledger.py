"""Where the seconds went: a clock by cause, kept across interruptions."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mdiff.errors import UserError
from mdiff.files import write_json


def peak_rss_gb() -> float:
    """Peak resident memory of this process so far, in GB (10^9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Ledger:
    """Seconds by cause (compile, data, train, evaluate, checkpoint, …) and images trained on.

    Causes do not nest: time spent in an inner cause is not charged to the outer one.
    """

    def __init__(self, seconds: dict[str, float] | None = None, images: int = 0, peak: float = 0.0) -> None:
        self.seconds = dict(seconds or {})
        self.images = images
        self._peak = peak
        self._running: list[str] = []
        self._since = time.perf_counter()

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """The ledger a former process of this run left, or an empty one.

        Raises:
          UserError: the file is damaged.
        """
        if not path.is_file():
            return cls()
        try:
            stored = json.loads(path.read_text())
            return cls(stored["seconds"], stored["images"], stored["peak_rss_gb"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); delete it to start the clock anew") from None

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._running:
            cause = self._running[-1]
            self.seconds[cause] = self.seconds.get(cause, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def time(self, cause: str) -> Iterator[None]:
        """Charge the block's seconds to `cause`."""
        self._settle()
        self._running.append(cause)
        try:
            yield
        finally:
            self._settle()
            self._running.pop()

    def as_json(self) -> dict[str, Any]:
        """What `save` writes; images/s counts seconds of training steps only."""
        self._settle()
        trained = self.seconds.get("train", 0.0)
        self._peak = max(self._peak, peak_rss_gb())
        return {
            "seconds": {cause: round(s, 3) for cause, s in self.seconds.items()},
            "images": self.images,
            "images_per_second": round(self.images / trained, 2) if trained else None,
            "peak_rss_gb": round(self._peak, 3),
        }

    def save(self, path: Path) -> None:
        """Write the ledger as JSON, atomically; on the first process of a job, whose clock it is."""
        write_json(path, self.as_json())

"""The first change to make to a program that does not fit: estimates from its measured parts, in a fixed order.

What is held shrinks with the devices it is sharded over; temporaries shrink with the rows a device works on at once,
and with recomputation. The factors of recomputation are rough; only compiling again says whether a change is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mdiff import config
from mdiff.plan import programs
from mdiff.plan.chips import Topology
from mdiff.plan.roofline import peak_bytes

REMAT = {"none": 1.0, "dots": 0.6, "blocks": 0.3}
"""Roughly what share of the temporaries is left."""


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
      flags: as given on the command line.
      peak: estimated bytes with it, on each chip.
      fits: is that below what a program may have?
    """

    flags: str
    peak: float
    fits: bool


def first_change(
    part: str, found: dict[str, Any], cfg: config.Config, topology: Topology, sweep: programs.Sweep
) -> Change | None:
    """The first change of the list that is estimated to fit, else the one that leaves least; None if it fits now."""
    chip = topology.chip
    peak = peak_bytes(found, topology)
    if chip is None or ("too_big" not in found and (peak or 0) <= chip.usable):
        return None
    held: dict[str, int] = found["holds"]
    state = sum(size for name, size in held.items() if name != "data")
    fixed = held.get("data", 0)
    # A program so large that the compiler gives no number is taken to need twice what there is.
    temporary = max((peak or 2 * chip.usable) - state - fixed, 0.0)
    tried = [
        Change(flags, size, size <= chip.usable)
        for flags, size in _candidates(part, cfg, topology, sweep, state, fixed, temporary)
    ]
    fitting = [change for change in tried if change.fits]
    return fitting[0] if fitting else min(tried, key=lambda change: change.peak, default=None)


def _candidates(
    part: str,
    cfg: config.Config,
    topology: Topology,
    sweep: programs.Sweep,
    state: float,
    fixed: float,
    temporary: float,
) -> Iterator[tuple[str, float]]:
    """(flags, estimated peak), the cheapest in speed first."""
    if part == "sweep":
        for chunk in _halves(sweep.chunk):
            yield f"--sweep.chunk {chunk}", state + fixed + temporary * chunk / sweep.chunk
    else:
        yield from _sharded(cfg, topology, state, fixed, temporary)
    if part == "sample":
        ways = topology.devices // cfg.mesh.trial
        for batch in _halves(cfg.sample.batch):
            if batch >= ways:
                yield f"--sample.batch {batch}", state + fixed + temporary * batch / cfg.sample.batch
    if part == "train":
        yield from _smaller_step(cfg, topology, state, fixed, temporary)
    if cfg.net.dtype == "float32":
        yield "--net.dtype bfloat16", state + fixed + temporary * 0.6


def _sharded(
    cfg: config.Config, topology: Topology, state: float, fixed: float, temporary: float
) -> Iterator[tuple[str, float]]:
    ways = cfg.mesh.fsdp
    most = topology.devices // max(1, cfg.mesh.trial)
    old = max(1, ways if ways > 0 else most)
    for new in (old * 2**k for k in range(1, 12)):
        if new <= most and most % new == 0:
            yield f"--mesh.data -1 --mesh.fsdp {new}", state * old / new + fixed + temporary


def _smaller_step(
    cfg: config.Config, topology: Topology, state: float, fixed: float, temporary: float
) -> Iterator[tuple[str, float]]:
    for remat in ("dots", "blocks"):
        factor = REMAT[remat] / REMAT[cfg.net.remat]
        if factor < 1:
            yield f"--net.remat {remat}", state + fixed + temporary * factor
    ways = topology.devices // max(1, cfg.mesh.trial)
    rows = cfg.train.batch // (ways * cfg.train.accumulate)
    parts = [2**k for k in range(1, 8) if rows % 2**k == 0]
    for more in parts:
        yield f"--train.accumulate {cfg.train.accumulate * more}", state + fixed + temporary / more
    if cfg.net.remat != "blocks":
        factor = REMAT["blocks"] / REMAT[cfg.net.remat]
        for more in parts:
            flags = f"--net.remat blocks --train.accumulate {cfg.train.accumulate * more}"
            yield flags, state + fixed + temporary * factor / more


def _halves(n: int) -> Iterator[int]:
    while n > 1:
        n //= 2
        yield n

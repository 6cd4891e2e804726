"""This process among those of one job.

All processes run the same program on the same config. What they compute on global arrays is one computation;
what they do on the host they all do, and only the first one writes files and prints (`is_first`). Facts of one
process that must hold for all travel through `gather`: every process has to call it, and in the same order.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mdiff import config
from mdiff.errors import UserError

T = TypeVar("T")

_SLURM = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")  # what jax asks for

CLUSTERS: Mapping[str, Callable[[Mapping[str, str]], bool]] = {
    "Open MPI": lambda env: "OMPI_MCA_orte_hnp_uri" in env or "PRTE_LAUNCHED" in env,
    "Slurm": lambda env: all(f"SLURM_{name}" in env for name in _SLURM),
    "Kubernetes": lambda env: "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env,
    "TPU pod": lambda env: (
        "," in env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
        or env.get("MEGASCALE_NUM_SLICES", "1") != "1"
    ),
}
"""What started a job of several processes, and how its environment shows. In the order asked."""


def detect(env: Mapping[str, str] = os.environ) -> str:
    """The cluster that started this process as part of a job, "" when none did."""
    return next((name for name, present in CLUSTERS.items() if present(env)), "")


def join(cfg: config.Processes, *, notices: bool = False) -> None:
    """Become part of the job; call before anything touches a device. Without a job it does nothing.

    Args:
      cfg: explicit numbers, or how to find them out.
      notices: SIGTERM is a preemption notice (`preempted`) instead of the end.

    Raises:
      UserError: the numbers do not fit together, or there is no job where one was insisted on.
    """
    explicit = bool(cfg.coordinator)
    _check(cfg)
    if cfg.launch == "single" or not (explicit or cfg.launch == "cluster" or detect()):
        return
    jax.config.update("jax_enable_preemption_service", notices)
    numbers: dict[str, Any] = {}
    if explicit:
        numbers = {
            "coordinator_address": cfg.coordinator,
            "num_processes": cfg.count,
            "process_id": cfg.index,
        }
    try:
        jax.distributed.initialize(**numbers)
    except (ValueError, RuntimeError) as error:  # what jax raises when it finds no cluster or no coordinator
        found = cfg.coordinator or detect() or "no cluster"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"processes: cannot join the job of {found} ({first}); give --processes.coordinator HOST:PORT, "
            "--processes.count and --processes.index, or --processes.launch single"
        ) from error


def _check(cfg: config.Processes) -> None:
    if not cfg.coordinator:
        if cfg.count or cfg.index != -1:
            raise UserError(
                f"processes.count = {cfg.count}, processes.index = {cfg.index}: have no effect without "
                "processes.coordinator; give it as HOST:PORT of process 0"
            )
        return
    host, _, port = cfg.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"processes.coordinator = {cfg.coordinator!r}: give HOST:PORT of process 0")
    if cfg.launch == "single":
        raise UserError("processes.launch = 'single': has no coordinator; leave one of them out")
    if cfg.count < 1 or not 0 <= cfg.index < cfg.count:
        raise UserError(
            f"processes.count = {cfg.count}, processes.index = {cfg.index}: with a coordinator give how many "
            "processes there are, and which one this is, from 0"
        )


def count() -> int:
    """How many processes the job has."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which one this is, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Does this process write the files and do the talking?"""
    return index() == 0


def preempted(step: int) -> bool:
    """Has a process been told to end, and is `step` the one all agreed to stop at?

    Every process calls it at every step. Always False outside a job, where signals are handled directly.
    """
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step)


def gather(value: bytes) -> list[bytes]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    lengths = multihost_utils.process_allgather(np.int32(len(value)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(value)] = np.frombuffer(value, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def shared_error(message: str) -> UserError:
    """An error that every process raises."""
    error = UserError(message)
    error.shared = True
    return error


def together(work: Callable[[], T]) -> T:
    """`work()` on every process; when it fails on one, all of them raise what the first one of these did.

    Raises:
      UserError: as `work` did here, or on another process, which is then named.
    """
    found: T | None = None
    mine: UserError | None = None
    try:
        found = work()
    except UserError as error:
        mine = error
    errors = [text.decode() for text in gather(str(mine or "").encode())]
    failed = [place for place, text in enumerate(errors) if text]
    if not failed:
        return found  # type: ignore[return-value]
    if mine is not None and len(set(errors)) == 1:
        mine.shared = True
        raise mine
    place = failed[0]
    raise shared_error(f"process {place}: {errors[place]}") from mine


def from_first(work: Callable[[], T]) -> T:
    """What `work()` returns on the first process, which alone calls it, in a thread; it must be plain JSON.

    Raises:
      UserError: on all processes, what `work` raised.
    """
    if count() == 1:
        return work()
    answer: dict[str, Any] = {}
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if is_first() else None
        while not answer:  # the others hear of it meanwhile: they would not wait for longer than 30 s
            if future is not None and wait_for([future], timeout=10).done:
                try:
                    answer = {"value": future.result()}
                except UserError as error:
                    answer = {"error": str(error)}
            answer = json.loads(gather(json.dumps(answer).encode())[0])
    if "error" in answer:
        raise shared_error(answer["error"])
    found: T = answer["value"]
    return found


def spread(n: int, work: Callable[[int], Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """`[work(0), …, work(n - 1)]`, each computed by one process and known to all.

    The parts are dealt out whole, so their results do not depend on the number of processes.
    """
    if count() == 1:
        return [list(work(part)) for part in range(n)]

    def mine() -> bytes:
        packed = io.BytesIO()
        arrays = {
            f"{part}/{place}": array
            for part in range(index(), n, count())
            for place, array in enumerate(work(part))
        }
        np.savez(packed, **arrays)  # type: ignore[arg-type]
        return packed.getvalue()

    results: dict[int, dict[int, np.ndarray]] = {}
    for packed in gather(together(mine)):
        with np.load(io.BytesIO(packed), allow_pickle=False) as stored:
            for name in stored.files:
                part, place = map(int, name.split("/"))
                results.setdefault(part, {})[place] = stored[name]
    return [[results[part][place] for place in sorted(results[part])] for part in range(n)]


def check_same(what: str, tree: Mapping[str, Any]) -> None:
    """Were all processes started with the same `tree` (plain JSON)?

    Raises:
      UserError: on all of them; names the first process and field that differ.
    """
    trees = [json.loads(text) for text in gather(json.dumps(tree, sort_keys=True).encode())]
    for place, other in enumerate(trees):
        if difference := first_difference(trees[0], other):
            raise shared_error(
                f"process {place} was started with another {what} than process 0: {difference}; start all "
                "processes with the same command"
            )


def first_difference(old: Any, new: Any, where: str = "") -> str:
    """The first field in which two JSON trees differ, as "a.b was 1, is 2"; "" when there is none."""
    for name in new:
        at = f"{where}{name}"
        if isinstance(new[name], dict) and isinstance(old.get(name), dict) and new[name] and old[name]:
            found = first_difference(old[name], new[name], f"{at}.")
            if found:
                return found
        elif json.dumps(old.get(name)) != json.dumps(new[name]):  # NaN is not itself
            return f"{at} was {old.get(name)}, is {new[name]}"
    return ""


def wait(name: str) -> None:
    """Block until every process is here."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)

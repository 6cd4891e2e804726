"""What one run of a program does: operations, traffic of the main memory, messages between devices."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mdiff.plan import hlo
from mdiff.plan.hlo import Computation, Instruction, Leaf, Program, total_bytes


@dataclass(frozen=True)
class Messages:
    """All collectives of one kind.

    Attributes:
      count: how often one runs.
      payload: bytes each device holds before (of an all-gather: after) them, summed.
      wire: bytes each device sends, by the ring algorithm (`hlo.wire_bytes`).
    """

    count: int = 0
    payload: int = 0
    wire: float = 0.0


@dataclass(frozen=True)
class Counted:
    """One run of a device's program.

    Attributes:
      flops: operations of matrix products and convolutions.
      bytes: read from and written to main memory.
      collectives: messages by kind.
      unknown_loops: loops that run an unknown number of times, counted once.
    """

    flops: int
    bytes: int
    collectives: Mapping[str, Messages]
    unknown_loops: int


def count(program: Program, *, loops_once: bool = False) -> Counted:
    """Count a program's work; with `loops_once` a loop's body counts once, as the compiler's own analysis has it."""
    counter = _Counter(program, loops_once)
    counter.visit(program.computations[program.entry], 1)
    return Counted(counter.flops, counter.bytes, dict(counter.collectives), counter.unknown)


class _Counter:
    def __init__(self, program: Program, loops_once: bool) -> None:
        self._program, self._once = program, loops_once
        self.flops = self.bytes = self.unknown = 0
        self.collectives: dict[str, Messages] = defaultdict(Messages)

    def visit(self, computation: Computation, times: int) -> None:
        """A computation whose instructions touch memory one by one."""
        seen: set[Any] = set()
        for each in computation.instructions:
            if each.opcode == "while":
                (body,) = each.called("body")
                rounds = 1 if self._once else hlo.trips(self._program, computation, each)
                self.unknown += rounds is None
                self.visit(self._program.computations[body], times * (1 if rounds is None else rounds))
            elif each.opcode == "conditional":
                self._costliest(each, times)
            elif each.opcode in ("call", "async-start"):
                for name in each.called("to_apply", "calls", "called_computation"):
                    self.visit(self._program.computations[name], times)
            else:
                self._inside(computation, each, times, seen)
                self.bytes += times * self._traffic(computation, each)

    def _inside(
        self, computation: Computation, each: Instruction, times: int, seen: set[Any], fused: bool = False
    ) -> None:
        """Operations and messages of an instruction, or of the group fused into it."""
        if each.opcode in ("fusion", "custom-call"):
            for name in each.called("calls", "called_computations"):
                inner = self._program.computations[name]
                for part in inner.instructions:
                    self._inside(inner, part, times, seen, fused=True)
            return
        self.flops += times * _flops(computation, each)
        kind = each.opcode.removesuffix("-start")
        if kind not in hlo.COLLECTIVES:
            return
        if fused:
            # One that runs beside several fused groups is written in each of them.
            same = (kind, _channel(each), each.shape[0].dims)
            if same in seen:
                return
            seen.add(same)
            if computation.name.startswith("all-reduce-scatter"):  # written as all-reduce and slice
                kind = "reduce-scatter"
        self._message(computation, each, kind, times)

    def _message(self, computation: Computation, each: Instruction, kind: str, times: int) -> None:
        group = hlo.group_size(each.attributes, self._program.devices)
        payload = sum(total_bytes(leaves) for leaves in computation.shapes(each))
        payload *= group if kind == "all-gather" else 1
        if group < 2 and kind != "collective-permute":
            return
        old = self.collectives[kind]
        wire = hlo.wire_bytes(kind, payload, group)
        self.collectives[kind] = Messages(
            old.count + times, old.payload + times * payload, old.wire + times * wire
        )

    def _costliest(self, each: Instruction, times: int) -> None:
        names = each.called("branch_computations", "true_computation", "false_computation")
        tried = []
        for name in names:
            branch = _Counter(self._program, self._once)
            branch.visit(self._program.computations[name], times)
            tried.append(branch)
        best = max(tried, key=lambda branch: (branch.flops, branch.bytes))
        self.flops += best.flops
        self.bytes += best.bytes
        self.unknown += best.unknown
        for kind, found in best.collectives.items():
            old = self.collectives[kind]
            self.collectives[kind] = Messages(
                old.count + found.count, old.payload + found.payload, old.wire + found.wire
            )

    def _traffic(self, computation: Computation, each: Instruction) -> int:
        """Bytes of main memory that an instruction reads and writes."""
        if each.opcode in _FREE or each.opcode.endswith("-done"):
            return 0
        operands = computation.shapes(each)
        if each.opcode == "fusion":
            inner = self._program.computations[each.called("calls")[0]]
            return _fused_traffic(inner, operands, each.shape)
        if each.opcode in ("copy-start", "slice-start"):
            # The value is (destination, source, …) or ((source), destination, …); what is moved has one size.
            source = operands[0][0]
            target = each.shape[0] if each.opcode == "copy-start" else each.shape[1]
            return target.bytes * ((target.space == 0) + (source.space == 0))
        return _one_traffic(each.opcode, operands, each.shape)


_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain", "iota",
}  # fmt: skip
_VIEWS = ("dynamic-slice", "slice", "gather")


def _one_traffic(opcode: str, operands: list[tuple[Leaf, ...]], out: tuple[Leaf, ...]) -> int:
    if opcode in _VIEWS:  # of what it slices, only the slice is read
        main = bool(operands) and operands[0][0].space == 0
        read = total_bytes(out) if main else 0
        return read + total_bytes(out, True) + sum(total_bytes(each, True) for each in operands[1:])
    if opcode in ("dynamic-update-slice", "scatter"):  # in place
        update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
        written = total_bytes(update) if out[0].space == 0 else 0
        return written + total_bytes(update, True)
    return total_bytes(out, True) + sum(total_bytes(each, True) for each in operands)


def _fused_traffic(inner: Computation, operands: list[tuple[Leaf, ...]], out: tuple[Leaf, ...]) -> int:
    """A fused group reads its operands and writes its results; those it slices or updates in place, in part."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    for each in inner.instructions:
        for name in each.operands:
            users[name].append(each)
    parameters = {
        int(each.operands[0]): each.name for each in inner.instructions if each.opcode == "parameter"
    }
    read = 0
    for place, leaves in enumerate(operands):
        if all(leaf.space for leaf in leaves):
            continue
        whole = total_bytes(leaves, True)
        read += min(whole, _read(parameters.get(place, ""), users, whole))
    written, root = total_bytes(out, True), inner.root
    results = [inner.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) == len(out):
        written = sum(
            _written(inner, result) for result, leaf in zip(results, out, strict=True) if leaf.space == 0
        )
    return read + written


def _read(name: str, users: Mapping[str, list[Instruction]], whole: int) -> int:
    """How much of the fused parameter `name` is read."""
    total = 0
    for user in users.get(name, []):
        if user.opcode == "bitcast":
            total += _read(user.name, users, whole)
        elif user.opcode in _VIEWS and user.operands[0] == name:
            total += total_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # in place: what is not overwritten is not touched
        else:
            return whole
    return total


def _written(inner: Computation, result: Instruction) -> int:
    while result.opcode in ("bitcast", "copy", "convert") and result.operands[0] in inner.by_name:
        before = inner.by_name[result.operands[0]]
        if before.opcode not in ("bitcast", "dynamic-update-slice"):
            break
        result = before
    if result.opcode == "dynamic-update-slice":
        return total_bytes(inner.by_name[result.operands[1]].shape)
    return total_bytes(result.shape)


def _flops(computation: Computation, each: Instruction) -> int:
    if each.opcode not in ("dot", "convolution"):
        return 0
    left, right = (shape[0] for shape in computation.shapes(each)[:2])
    if each.opcode == "dot":
        return hlo.dot_flops(each.shape[0], left, each.attributes)
    return hlo.convolution_flops(each.shape[0], left, right, each.attributes)


def _channel(each: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", each.attributes)
    return found[1] if found else ""

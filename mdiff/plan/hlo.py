"""Reading the text of an optimized program (HLO): its operations, its memory traffic, its messages.

The compiler's own `cost_analysis` counts the body of a loop once; here a loop counts as often as it runs. All
numbers are those of one device, since the text is its program.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

from mdiff.flops import pairs

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64,
    "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """One array of a value: its type, its dimensions, and where it lies (0 is the device's main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles; 0 for tokens and the like."""
        return prod(self.dims) * BITS.get(self.dtype, 0) // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    shape: tuple[Leaf, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, *names: str) -> list[str]:
        """The computations that the attributes `names` name."""
        found: list[str] = []
        for name in names:
            for group, single in re.findall(rf"\b{name}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.attributes):
                found += [part.strip().lstrip("%") for part in (group or single).split(",") if part.strip()]
        return found


@dataclass(frozen=True)
class Computation:
    """A function of the program: the entry, a loop's body, a fused group."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        return next((each for each in self.instructions if each.root), self.instructions[-1])

    def shapes(self, instruction: Instruction) -> list[tuple[Leaf, ...]]:
        """The shapes of an instruction's operands."""
        return [self.by_name[name].shape for name in instruction.operands if name in self.by_name]


@dataclass(frozen=True)
class Program:
    """A parsed program."""

    entry: str
    computations: Mapping[str, Computation]
    devices: int


# ------------------------------------------------------------------------------------------ parsing

_COMMENT = re.compile(r"/\*.*?\*/")
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->\s.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    header = text.split("\n", 1)[0]
    partitions = re.search(r"num_partitions=(\d+)", header)
    replicas = re.search(r"replica_count=(\d+)", header)
    devices = int(partitions[1]) if partitions else int(replicas[1]) if replicas else 1
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    lines: list[Instruction] = []
    for raw in text.splitlines():
        line = _COMMENT.sub("", raw)
        if head := _HEAD.match(line):
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(lines))
        elif name and (match := _LINE.match(line)):
            lines.append(_instruction(bool(match[1]), match[2], match[3]))
    return Program(entry, computations, devices)


def _instruction(root: bool, name: str, rest: str) -> Instruction:
    shape, rest = _split_shape(rest)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    operands = tuple(part.split()[-1].lstrip("%") for part in _top_level(rest[:end]))
    if opcode == "constant":
        return Instruction(name, opcode, shape, (), rest[:end], root)
    return Instruction(name, opcode, shape, operands, rest[end + 1 :], root)


def _split_shape(text: str) -> tuple[tuple[Leaf, ...], str]:
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return _leaves(text[:end]), text[end:].lstrip()
    shape, _, rest = text.partition(" ")
    return _leaves(shape), rest


def _leaves(text: str) -> tuple[Leaf, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Leaf(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _closing(text: str) -> int:
    """Where the bracket that was open before `text` closes."""
    depth = 1
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return place
    return len(text)


def _top_level(text: str) -> Iterator[str]:
    """The comma-separated parts of `text` outside brackets."""
    depth, start = 0, 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    if text[start:].strip():
        yield text[start:]


# --------------------------------------------------------------------------- loops and computations


def trips(program: Program, where: Computation, loop: Instruction) -> int | None:
    """How often the `while` in `where` runs: as the compiler noted it, or as its counter says; else None.

    The counter's start, step and bound are read from the program. Not every loop counts by one: a product that is
    spread over devices step by step does two steps per round. A start that cannot be read is taken to be 0, that
    of `lax.scan`.
    """
    if noted := re.search(r"known_trip_count[\"']?\s*[:=]\s*\{\s*\"?n\"?\s*[:=]\s*\"?(\d+)", loop.attributes):
        return int(noted[1])
    condition, body = (program.computations[loop.called(name)[0]] for name in ("condition", "body"))
    given = where.by_name.get(loop.operands[0])
    starts = given.operands if given is not None and given.opcode == "tuple" else ()

    def start(place: int) -> int | None:
        form = _form(program, where, starts[place], {}) if place < len(starts) else None
        return form[1] if form is not None and form[0] is None else None

    kept = {
        place: value
        for place, name in enumerate(body.root.operands)
        if _form(program, body, name, {}) == (place, 0) and (value := start(place)) is not None
    }
    bound = _bound(program, condition, kept)
    if bound is None or bound[0] >= len(body.root.operands):
        return None
    counter, last = bound
    after = _form(program, body, body.root.operands[counter], kept)
    if after is None or after[0] != counter or after[1] < 1:
        return None
    return max(0, -(-(last - (start(counter) or 0)) // after[1]))


Form: TypeAlias = tuple[int | None, int]
"""A whole number of a loop: (element of the loop's tuple it starts from, or None, and what is added to it)."""


def _form(
    program: Program,
    computation: Computation,
    name: str,
    kept: Mapping[int, int],
    given: Sequence[Callable[[], Form | None]] = (),
    element: int | None = None,
) -> Form | None:
    """The form of the value `name`, or of one element of it; None if it is none.

    `kept` are elements of the loop's tuple that never change; `given` tell the forms of a fused group's parameters.
    """
    each = computation.by_name.get(name)
    if each is None or (element is None and not any(_whole(leaf) for leaf in each.shape)):
        return None

    def of(other: str, part: int | None = None) -> Form | None:
        return _form(program, computation, other, kept, given, part)

    if each.opcode == "constant":
        return (None, int(each.attributes)) if re.fullmatch(r"-?\d+", each.attributes.strip()) else None
    if each.opcode == "parameter":
        if given:
            return given[int(each.operands[0])]()
        return None if element is None else (None, kept[element]) if element in kept else (element, 0)
    if each.opcode == "get-tuple-element":
        place = re.search(r"index=(\d+)", each.attributes)
        return of(each.operands[0], int(place[1])) if place else None
    if each.opcode == "tuple":
        return None if element is None else of(each.operands[element])
    if each.opcode in ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "broadcast"):
        return of(each.operands[0])
    if each.opcode == "fusion":
        inner = program.computations[each.called("calls")[0]]
        known = [functools.partial(of, operand) for operand in each.operands]
        return _form(program, inner, inner.root.name, kept, known, element)
    if each.opcode in ("add", "subtract"):
        left, right = (of(operand) for operand in each.operands)
        if left is None or right is None or (left[0] is not None and right[0] is not None):
            return None
        if each.opcode == "add":
            return (right[0] if left[0] is None else left[0], left[1] + right[1])
        return None if right[0] is not None else (left[0], left[1] - right[1])
    return None


def _whole(leaf: Leaf) -> bool:
    """Is it one whole number?"""
    return leaf.dims in ((), (1,)) and leaf.dtype in ("s32", "u32", "s64", "u64")


def _bound(
    program: Program,
    condition: Computation,
    kept: Mapping[int, int],
    given: Sequence[Callable[[], Form | None]] = (),
) -> tuple[int, int] | None:
    """(element, N) of a condition "element < N"."""
    root = condition.root
    if root.opcode == "fusion":
        inner = program.computations[root.called("calls")[0]]
        known = [functools.partial(_form, program, condition, name, kept) for name in root.operands]
        return _bound(program, inner, kept, known)
    if root.opcode != "compare":
        return None
    left, right = (_form(program, condition, name, kept, given) for name in root.operands)
    if "direction=GT" in root.attributes:
        left, right = right, left
    elif "direction=LT" not in root.attributes:
        return None
    if left is None or right is None or left[0] is None or right[0] is not None:
        return None
    return left[0], right[1] - left[1]


# ------------------------------------------------------------------------------------- one instruction


def dot_flops(out: Leaf, left: Leaf, attributes: str) -> int:
    """Two operations per multiply-add of a `dot`."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2 * prod(out.dims) * prod(left.dims[axis] for axis in axes)


def convolution_flops(out: Leaf, left: Leaf, right: Leaf, attributes: str) -> int:
    """Two operations per multiply-add of a `convolution`; products with padding or with dilation's zeros are none.

    On TPU matrix products too are written as convolutions, with batch axes as dilated spatial ones.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert found is not None, f"convolution without dim_labels: {attributes[:80]}"
    labels = found.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    products = 1
    for axis in range(len(labels[0]) - 2):

        def of(name: str, default: str, axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        products *= pairs(
            left.dims[labels[0].index(str(axis))],
            out.dims[labels[2].index(str(axis))],
            int(of("size", "1")),
            int(of("stride", "1")),
            int(of("pad", "0_0").split("_")[0]),
            int(of("lhs_dilate", "1")),
            int(of("rhs_dilate", "1")),
        )
    batch, features = out.dims[labels[2].index("b")], out.dims[labels[2].index("f")]
    return 2 * batch * features * right.dims[labels[1].index("i")] * products


COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


def group_size(attributes: str, devices: int) -> int:
    """Over how many devices one collective runs: the size of its first replica group."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        total = 1
        for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2]):
            total *= int(part) if part else sizes[axis]
        return total
    return devices


def wire_bytes(kind: str, payload: int, group: int) -> float:
    """Bytes that each device of a group of `group` sends, by the ring algorithm.

    `payload` is what each device holds before (all-reduce, reduce-scatter, all-to-all, permute) or after
    (all-gather). An all-reduce sends 2 (n - 1) / n of it, a permute or broadcast all of it, the others (n - 1) / n.
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return float(payload)
    return (2 if kind == "all-reduce" else 1) * payload * (group - 1) / group


def total_bytes(leaves: Sequence[Leaf], main_only: bool = False) -> int:
    """Bytes of all arrays, or of those in the device's main memory."""
    return sum(leaf.bytes for leaf in leaves if not (main_only and leaf.space))

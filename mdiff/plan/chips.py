"""TPU chips and the slices they come in; every number with the page it is from.

Peaks are those of bfloat16 products with float32 sums, which is also how float32 convolutions and matrix products
run on TPU by default (`jax.default_matmul_precision`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mdiff.errors import UserError

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: as in a topology, such as "v5e".
      flops: peak operations per second, bfloat16.
      hbm: bytes of main memory.
      usable: bytes of it that the compiler (libtpu 0.0.42) lets a program have.
      hbm_rate: bytes per second between main memory and the chip.
      ici_rate: bytes per second that the chip sends to its neighbours over all its links together.
      axes: of the torus.
      host: chips per host.
      largest: chips of the largest slice (or, of v4, of a pod).
      example: a topology of this chip.
      sources: of the numbers.
    """

    name: str
    flops: float
    hbm: float
    usable: float
    hbm_rate: float
    ici_rate: float
    axes: int
    host: int
    largest: int
    example: str
    sources: tuple[str, ...]


_DOCS = "https://docs.cloud.google.com/tpu/docs/"

CHIPS: Mapping[str, Chip] = {
    # The docs give no ICI rate for v4; the paper has 6 links of 50 GB/s (table 4).
    "v4": Chip(
        "v4", 275e12, 32 * GIB, 30.75 * GIB, 1200e9, 300e9, 3, 4, 4096, "v4:4x4x8",
        (_DOCS + "v4", "https://arxiv.org/abs/2304.01433"),
    ),
    "v5e": Chip("v5e", 197e12, 16 * GB, 15.75 * GIB, 819e9, 200e9, 2, 4, 256, "v5e:4x4", (_DOCS + "v5e",)),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 95.74 * GIB, 2765e9, 600e9, 3, 4, 6144, "v5p:4x4x8", (_DOCS + "v5p",)),
    "v6e": Chip("v6e", 918e12, 32 * GB, 31.25 * GIB, 1638e9, 400e9, 2, 4, 256, "v6e:4x4", (_DOCS + "v6e",)),
}  # fmt: skip
"""The docs state the interconnect's rate in both directions together; a chip sends at half of it."""


@dataclass(frozen=True)
class Topology:
    """Devices that a program is compiled for.

    Attributes:
      name: as given.
      kind: a name in `CHIPS`, or "cpu".
      shape: chips along each axis of the torus; of "cpu" the number of devices.
      chip: its numbers; None for "cpu", whose machine is not known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    chip: Chip | None

    @property
    def devices(self) -> int:
        """How many chips (or simulated devices) there are."""
        return prod(self.shape)

    @property
    def hosts(self) -> int:
        """How many machines they sit in."""
        return 1 if self.chip is None else max(1, self.devices // self.chip.host)

    def options(self) -> dict[str, Any]:
        """Arguments of `jax.experimental.topologies.get_topology_desc` beside the name."""
        if self.devices == 1:
            return {"chips_per_host_bounds": (1, 1, 1)}
        # Two cores of a v4 or v5p chip work as one device, as they do by default where the chips are.
        return {"chip_config_name": "megacore"} if self.kind in ("v4", "v5p") else {}


def parse(text: str) -> Topology:
    """A topology such as "v5e:4x4", "v4:2x2x2" or "cpu:8".

    Raises:
      UserError: the chip is unknown, or no slice of it has this shape.
    """
    known = ", ".join([*(chip.example for chip in CHIPS.values()), "cpu:8"])
    match = re.fullmatch(r"(\w+):(\d{1,4}(?:x\d{1,4})*)", text)
    if match is None or match[1] not in (*CHIPS, "cpu"):
        raise UserError(f"--topology {text}: unknown; chips and shapes are written {known}")
    kind, shape = match[1], tuple(int(side) for side in match[2].split("x"))
    if kind == "cpu":
        if len(shape) != 1 or not 1 <= shape[0] <= 1024:
            raise UserError(f"--topology {text}: give one number of devices from 1 to 1024, such as cpu:8")
        return Topology(text, kind, shape, None)
    chip = CHIPS[kind]
    _check_shape(text, chip, shape)
    return Topology(text, kind, shape, chip)


def _check_shape(text: str, chip: Chip, shape: tuple[int, ...]) -> None:
    if len(shape) != chip.axes:
        raise UserError(f"--topology {text}: {chip.name} has {chip.axes} axes; write it as {chip.example}")
    if chip.axes == 2 and shape == (1, 1):
        return
    if any(side < 1 for side in shape) or shape[0] % 2 or shape[1] % 2:
        raise UserError(
            f"--topology {text}: a host has 2x2 chips, so the first two sides are even; such as {chip.example}"
        )
    if prod(shape) > chip.largest:
        raise UserError(
            f"--topology {text}: {prod(shape)} chips, and the largest slice of {chip.name} has {chip.largest}; "
            f"give a smaller one, such as {chip.example}"
        )

"""From what a program does to how long it takes at least, and what that costs.

The time of a call is the longest of three: its operations at the chip's peak, its traffic at the rate of main
memory, its messages at the rate of the links. That assumes that all three overlap fully and that each runs at its
stated rate: no program is faster, most are slower (roofline model, Williams et al., CACM 52(4), 2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mdiff.plan.chips import Chip, Topology


@dataclass(frozen=True)
class Roofline:
    """The least time of one call.

    Attributes:
      compute: seconds for the operations at peak.
      hbm: seconds for the traffic of main memory.
      ici: seconds for the messages, all links of a chip sending at once.
      intensity: operations per byte of main memory.
      balance: operations per byte at which compute and memory take equally long on this chip.
    """

    compute: float
    hbm: float
    ici: float
    intensity: float
    balance: float

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.hbm, self.ici)

    @property
    def bound(self) -> str:
        """Which one it is."""
        return max(("compute", "hbm", "ici"), key=lambda name: float(getattr(self, name)))


def roofline(part: dict[str, Any], chip: Chip) -> Roofline:
    """Of one part of a plan, as its process measured it."""
    counted = part["counted"]
    wire = sum(each["wire"] for each in counted["collectives"].values())
    return Roofline(
        compute=counted["flops"] / chip.flops,
        hbm=counted["bytes"] / chip.hbm_rate,
        ici=wire / chip.ici_rate,
        intensity=counted["flops"] / max(1, counted["bytes"]),
        balance=chip.flops / chip.hbm_rate,
    )


def peak_bytes(part: dict[str, Any], topology: Topology) -> float | None:
    """Main memory that a call takes on one chip: arguments + outputs - aliased + temporaries, and on TPU the program.

    Of a program that does not fit it is what the compiler says it would need, or None.
    """
    if "too_big" in part:
        needed: float | None = part["too_big"]["needed"]
        return needed
    sizes = part["memory"]
    program = sizes["program"] if topology.chip else 0
    total: float = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"] + program
    return total


def estimate(part: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """What follows from a measured part: memory against the chip's, time, MFU, rate and cost of the whole run."""
    peak = peak_bytes(part, topology)
    found: dict[str, Any] = {"peak": peak}
    chip = topology.chip
    if chip is None:
        return found
    found |= {
        "usable": chip.usable,
        "hbm": chip.hbm,
        "fits": "too_big" not in part and (peak or 0) <= chip.usable,
    }
    if "counted" not in part:
        return found
    roof = roofline(part, chip)
    hours = roof.seconds * part["calls"] / 3600
    return found | {
        "seconds": {
            "compute": roof.compute,
            "hbm": roof.hbm,
            "ici": roof.ici,
            "roofline": roof.seconds,
            "bound": roof.bound,
        },
        "intensity": roof.intensity,
        "balance": roof.balance,
        "mfu": part["flops"]["model"] / (roof.seconds * chip.flops),
        "units_per_second": part["units_per_call"] / roof.seconds,
        "hours": hours,
        "chip_hours": hours * topology.devices,
    }

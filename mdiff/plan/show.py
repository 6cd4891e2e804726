"""A plan on the terminal: one table per part, in 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = tuple[str, str, str]

TITLES = {"train": "one training step", "sample": "one batch of samples", "sweep": "one sweep over neurons"}


REPEATED = 0.05
"""Share of operations beyond the jaxpr's above which the table says that chips repeat work."""


def show(plan: dict[str, Any], parts: Sequence[str]) -> None:
    """Print the parts of a plan."""
    console = Console()
    for part in dict.fromkeys(parts):
        if part in plan["parts"]:
            console.print(table(plan, part))


def table(plan: dict[str, Any], part: str) -> Table:
    """The table of one part; all sizes and counts are per chip unless they say otherwise."""
    found = plan["parts"][part]
    made = Table(
        title=f"{plan['config']['name']} on {plan['topology']}: {TITLES[part]}, per {_device(plan)}",
        caption=_caption(plan, found),
        width=100,
        title_justify="left",
        caption_justify="left",
    )
    made.add_column("", no_wrap=True)
    made.add_column("", justify="right", no_wrap=True)
    made.add_column("")
    for section in (_memory, _work, _messages, _time, _compilation):
        for name, value, note in section(plan, found):
            made.add_row(name, value, Text(note))
        made.add_section()
    return made


def _device(plan: dict[str, Any]) -> str:
    return "chip" if plan["chip"] else "simulated device"


def _caption(plan: dict[str, Any], found: dict[str, Any]) -> str:
    change = found["first_change"]
    if change is not None:
        able = "would fit" if change["fits"] else "is the largest saving, and not enough"
        return (
            f"Does not fit. First change: {change['flags']}, which {able} (estimated peak {size(change['peak'])}; "
            "compile again to be sure)."
        )
    if plan["chip"] is None:
        return "Simulated devices share this machine: no times are predicted."
    return "Fits." if found["estimate"]["fits"] else ""


def _memory(plan: dict[str, Any], found: dict[str, Any]) -> Iterator[Row]:
    notes = {"data": "training images and a batch's rows", "averages": "of the parameters, for sampling"}
    for name, held in found["holds"].items():
        yield name, size(held), notes.get(name, "")
    estimate = found["estimate"]
    if "memory" in found:
        sizes = found["memory"]
        held = sum(found["holds"].values())
        yield (
            "layout",
            size(sizes["arguments"] - held),
            "padding of the above, less what the program does not use",
        )
        yield "activations", size(sizes["temporaries"]), "all temporaries of the program"
        yield "outputs", size(sizes["outputs"] - sizes["aliased"]), "that do not take an argument's place"
        if plan["chip"]:
            yield "program", size(sizes["program"]), "its instructions, in the same memory"
    if plan["chip"]:
        usable = estimate["usable"]
        share = "" if estimate["peak"] is None else f"{estimate['peak'] / usable:.0%} of "
        yield "peak", size(estimate["peak"]), f"{share}{size(usable)} that the compiler lets a program have"
    else:
        yield "peak", size(estimate["peak"]), "arguments + outputs - aliased + temporaries"


def _work(_: dict[str, Any], found: dict[str, Any]) -> Iterator[Row]:
    flops = found["flops"]
    if "counted" not in found:
        yield "operations", f"{number(flops['analytic'])}FLOP", "from the jaxpr; nothing was compiled"
        return
    counted = found["counted"]
    off = counted["flops"] / flops["analytic"] - 1 if flops["analytic"] else 0.0
    note = f"compiled program; {off:+.2%} against the jaxpr"
    if off > REPEATED:
        note += ": chips repeat each other's work; try --mesh.fsdp 1"
    yield "operations", f"{number(counted['flops'])}FLOP", note
    extra = 1 - flops["model"] / flops["analytic"] if flops["analytic"] else 0.0
    note = (
        f"without the {extra:.0%} that are computed again" if extra > 0.005 else "nothing is computed again"
    )
    yield "of the model", f"{number(flops['model'])}FLOP", note
    yield "memory traffic", size(counted["bytes"]), "read and written in main memory"
    if counted["unknown_loops"]:
        yield "loops of unknown length", str(counted["unknown_loops"]), "counted once"


def _messages(_: dict[str, Any], found: dict[str, Any]) -> Iterator[Row]:
    kinds = found.get("counted", {}).get("collectives", {})
    if "counted" in found and not kinds:
        yield "collectives", "none", "the devices do not talk to each other"
    for kind, each in kinds.items():
        yield kind, f"{each['count']} x", f"{size(each['payload'])} in all, {size(each['wire'])} sent (ring)"


def _time(plan: dict[str, Any], found: dict[str, Any]) -> Iterator[Row]:
    estimate = found["estimate"]
    if "seconds" not in estimate:
        return
    seconds = estimate["seconds"]
    yield (
        "intensity",
        f"{estimate['intensity']:.0f}",
        f"FLOP per byte; this chip balances at {estimate['balance']:.0f}",
    )
    for name, note in (
        ("compute", "operations at peak, bfloat16"),
        ("hbm", "traffic of main memory at its rate"),
        ("ici", "messages over all links at once"),
    ):
        yield f"least time: {name}", duration(seconds[name]), note
    yield "roofline", duration(seconds["roofline"]), f"bound by {seconds['bound']}; assumes full overlap"
    yield "MFU at most", f"{estimate['mfu']:.1%}", "the model's operations at this time, of peak"
    unit = found["unit"]
    yield f"{unit}/s at most", f"{estimate['units_per_second']:,.0f}", "all chips together"
    run = f"{found['units']:,} {unit} in {found['calls']:,} call{'s' if found['calls'] > 1 else ''}"
    yield "whole run", duration(3600 * estimate["hours"]), f"{run}, at least"
    yield "cost", f"{estimate['chip_hours']:,.2f}", "chip-hours, at least"


def _compilation(_: dict[str, Any], found: dict[str, Any]) -> Iterator[Row]:
    yield (
        "compilation",
        duration(found["compile_seconds"]),
        f"took {size(found['compile_rss'])} of memory here, after {duration(found['lower_seconds'])} of tracing",
    )


def size(n: float | None) -> str:
    """Bytes in decimal units."""
    return "unknown" if n is None else f"{number(n)}B"


def number(n: float) -> str:
    """Three digits and a decimal prefix."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(n) >= 0.9995 * 10**power:
            return f"{n / 10**power:#.3g}".rstrip(".") + f" {prefix}"
    return f"{n:.0f} "


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= length:
            return f"{seconds / length:#.3g}".rstrip(".") + f" {unit}"
    return f"{seconds / 1e-6:.3g} us"

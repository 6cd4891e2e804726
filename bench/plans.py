"""Make the committed plans and the scaling table in results/plans/; finished parts are kept and not made again.

Usage: python bench/plans.py [NAME …], names as in `PLANS`, or "scaling"; all of them when none is given. Needs
`pip install libtpu`. One plan's training step takes half a minute (scanned blocks) to half an hour (U-Nets) to compile.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mdiff import config, files
from mdiff.arguments import parse
from mdiff.errors import UserError
from mdiff.plan import command, show

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "plans"
PAGE = ROOT / "docs" / "guides" / "plan.md"

PLANS: dict[str, list[str]] = {
    "imagenet64-dit-xl_v5e-16x16": [
        "--config", "configs/imagenet64_dit_xl.py", "--topology", "v5e:16x16", "--mesh.fsdp", "16",
    ],
    "imagenet64-dit-xl-sampling_v5e-16x16": [
        "--config", "configs/imagenet64_dit_xl.py", "--topology", "v5e:16x16", "--parts", "sample",
    ],
    "sd-shaped-neurons_v5e-4x4": [
        "--config", "configs/sd_shaped.py", "--topology", "v5e:4x4", "--channels", "4", "--parts", "sweep",
        "--sweep.chunk", "2",
    ],
    "cifar10-ddpmpp_v5e-2x4": ["--config", "configs/cifar10_ddpmpp.py", "--topology", "v5e:2x4"],
    "ffhq64-ncsnpp_v5e-8x8": [
        "--config", "configs/ffhq64_ncsnpp.py", "--topology", "v5e:8x8", "--parts", "train",
    ],
}  # fmt: skip

SLICES = {"v5e:2x4": 8, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}
WEAK, STRONG = 16, 512
"""Images per chip of the weak table; images per step of the strong one."""


def arguments(given: list[str]) -> command.PlanArgs:
    """The command's arguments, with paths from the repository's root."""
    full = [str(ROOT / each) if each.startswith("configs/") else each for each in given]
    default = config.load(full[full.index("--config") + 1])
    return parse(command.PlanArgs, full, "mdiff plan", {"fields": default})


def make(given: list[str], out: Path) -> dict[str, Any]:
    """One plan, written to `out`."""
    args = arguments([*given, "--out", str(out)])
    plan, _ = command.start(args)
    command.make(plan, args.parts, out, lambda line: print(f"{out.stem}: {line}", flush=True))
    return plan


def scaling() -> None:
    """DiT-XL's training step over four slices: as many images per chip (weak), or per step (strong)."""
    rows: dict[str, list[dict[str, Any]]] = {"weak": [], "strong": []}
    for kind, table in rows.items():
        for slice_, chips in SLICES.items():
            batch = WEAK * chips if kind == "weak" else STRONG
            out = OUT / ".scaling" / f"{kind}-{slice_.replace(':', '-')}.json"
            plan = make(
                [
                    "--config", "configs/imagenet64_dit_xl.py", "--topology", slice_, "--mesh.fsdp", "8",
                    "--train.batch", str(batch), "--parts", "train",
                ],
                out,
            )  # fmt: skip
            part = plan["parts"]["train"]
            estimate = part["estimate"]
            table.append(
                {
                    "topology": slice_,
                    "chips": chips,
                    "batch": batch,
                    "peak_bytes": estimate["peak"],
                    "seconds": estimate.get("seconds"),
                    "mfu": estimate.get("mfu"),
                    "images_per_second": estimate.get("units_per_second"),
                    "wire_bytes": _sent(part["counted"]),
                    "compile_seconds": part["compile_seconds"],
                }
            )
    files.write_json(
        OUT / "scaling.json",
        {
            "config": "configs/imagenet64_dit_xl.py",
            "mesh.fsdp": 8,
            "images_per_chip": WEAK,
            "batch": STRONG,
            **rows,
        },
    )


def tables() -> str:
    """The plans that are there, as tables of docs/guides/plan.md."""
    head = "| plan | part | peak (GB) | operations (TFLOP) | against the jaxpr | messages sent (GB) | least time | bound by | MFU at most | chip-hours at least | compiled in |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name in PLANS:
        path = OUT / f"{name}.json"
        parts = json.loads(path.read_text())["parts"] if path.is_file() else {}
        for part, found in parts.items():
            estimate, counted = found["estimate"], found["counted"]
            off = counted["flops"] / found["flops"]["analytic"] - 1
            lines.append(
                f"| {name} | {part} | {estimate['peak'] / 1e9:.2f} | {counted['flops'] / 1e12:,.3f} | {off:+.2%} | "
                f"{_sent(counted) / 1e9:.2f} | {show.duration(estimate['seconds']['roofline'])} | "
                f"{estimate['seconds']['bound']} | {estimate['mfu']:.0%} | {estimate['chip_hours']:,.1f} | "
                f"{show.duration(found['compile_seconds'])} |"
            )
    path = OUT / "scaling.json"
    if not path.is_file():
        return "\n".join(lines)
    stored = json.loads(path.read_text())
    lines += [
        "",
        f"DiT-XL's training step over four slices, `mesh.fsdp {stored['mesh.fsdp']}`: {stored['images_per_chip']} images per "
        f"chip (weak), {stored['batch']} images per step (strong). Least times as above. {stored.get('note', '')}".rstrip(),
        "",
        "| scaling | slice | batch | peak (GB) | compute | memory | links | bound by | images/s at most | per chip, of the first |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in ("weak", "strong"):
        first = stored[kind][0]
        for row in stored[kind]:
            seconds = row["seconds"]
            share = row["images_per_second"] / row["chips"] / (first["images_per_second"] / first["chips"])
            times = " | ".join(show.duration(seconds[name]) for name in ("compute", "hbm", "ici"))
            lines.append(
                f"| {kind} | {row['topology']} | {row['batch']:,} | {row['peak_bytes'] / 1e9:.2f} | {times} | "
                f"{seconds['bound']} | {row['images_per_second']:,.0f} | {share:.0%} |"
            )
    return "\n".join(lines)


def _sent(counted: dict[str, Any]) -> float:
    return sum(each["wire"] for each in counted["collectives"].values())


def write_tables() -> None:
    """Put the tables between the page's marks."""
    before, rest = PAGE.read_text().split("<!-- plans -->\n")
    after = rest.split("<!-- /plans -->")[1]
    files.write_text(PAGE, f"{before}<!-- plans -->\n{tables()}\n<!-- /plans -->{after}")


def main() -> None:
    wanted = sys.argv[1:] or [*PLANS, "scaling"]
    for name in wanted:
        if name == "scaling":
            scaling()
        elif name in PLANS:
            make(PLANS[name], OUT / f"{name}.json")
        else:
            raise UserError(f"{name}: unknown; there are {', '.join(PLANS)}, scaling")
        write_tables()


if __name__ == "__main__":
    main()

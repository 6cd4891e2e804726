"""Make the committed plans and the scaling table in results/plans/; finished parts are kept and not made again.

Usage: python bench/plans.py [NAME …], names as in `PLANS`, or "scaling"; all of them when none is given. Needs
`pip install libtpu`. One plan's training step takes half a minute (scanned blocks) to half an hour (U-Nets) to compile.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mdiff import config, files
from mdiff.arguments import parse
from mdiff.errors import UserError
from mdiff.plan import command

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "plans"

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
    "ffhq64-ncsnpp_v5e-8x8": ["--config", "configs/ffhq64_ncsnpp.py", "--topology", "v5e:8x8"],
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
                    "wire_bytes": sum(each["wire"] for each in part["counted"]["collectives"].values()),
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


def main() -> None:
    wanted = sys.argv[1:] or [*PLANS, "scaling"]
    for name in wanted:
        if name == "scaling":
            scaling()
        elif name in PLANS:
            make(PLANS[name], OUT / f"{name}.json")
        else:
            raise UserError(f"{name}: unknown; there are {', '.join(PLANS)}, scaling")


if __name__ == "__main__":
    main()

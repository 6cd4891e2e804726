"""Write docs/models.md: what every named network and every config counts and costs.

Nothing is compiled: parameters come from `eval_shape`, operations from jaxprs (`mdiff.flops`).

Usage: python bench/models.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mdiff import config, files, flops
from mdiff.nets.denoiser import make_model
from mdiff.nets.sizes import SIZES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
GREY = ("faces", "digits", "mnist5k")  # built-in sets with one channel

PUBLISHED: dict[str, tuple[float, str]] = {
    "ddpmpp-cifar10": (55.7, "as released with arXiv 2206.00364"),
    "ddpmpp-ffhq64": (61.8, "as released with arXiv 2206.00364"),
    "ncsnpp-ffhq64": (62.8, "as released with arXiv 2206.00364"),
    "adm-imagenet64": (296, "arXiv 2105.05233"),
    "dit-s/2": (33, "arXiv 2212.09748, table 1"),
    "dit-b/2": (130, "arXiv 2212.09748, table 1"),
    "dit-l/2": (458, "arXiv 2212.09748, table 1"),
    "dit-xl/2": (675, "arXiv 2212.09748, table 1"),
}
"""Millions of parameters, rounded as they are given."""

HEAD = """# Sizes of the named networks

Written by `python bench/models.py` from the code itself; a test compares it. Names are those of
`mdiff.nets.sizes.SIZES`, files those of `configs/`.

- *Parameters* include the table of labels and the null condition.
- *GFLOPs* are multiplications and additions of matrix products and convolutions, for one image; a multiply-add is two.
  Papers that count multiply-adds state half of it. A training step is loss and gradient, with whatever `net.remat` recomputes.
- *State* is what training keeps between steps in float32: parameters, their average, and Adam's two moments (16 bytes per
  parameter), without activations and gradients. Each entry of `train.ema_lengths` adds 4 bytes per parameter.

"""

TAIL = """
## Against the published counts

{matches}
What differs, and why:

- U-Nets: the counts agree to the digits that are given. The frequencies of Fourier features (128 numbers of an NCSN++) are
  counted, though no gradient reaches them. Conditional networks have one more row of labels than classes, for "no label".
  Augmentation parameters (`data.augment`) add 9 rows of the condition's width.
- DiT: the papers' networks work on 4-channel latents, predict a variance too (8 output channels) and keep their fixed
  positions among the parameters; here images have 3 channels, positions are computed, and queries and keys have learned
  RMS scales. For XL/2 that is 4,608 parameters fewer at the input, 23,060 fewer at the output, 294,912 positions fewer,
  and 4,032 scales more.
- GFLOPs: DiT-XL/2 on 32x32 latents is published with 118.6 G multiply-adds. The same 256 tokens, `dit-xl/4` on 64x64
  pixels, cost {xl:.1f} GFLOPs here, half of which is {half:.1f}.
"""


@dataclass(frozen=True)
class Row:
    """One line of the table; operations are None where they were not asked for."""

    name: str
    arch: str
    size: int
    parameters: int
    forward: int | None
    train: int | None


def named() -> Iterator[tuple[str, config.Config, int]]:
    """(name, config, image channels) of every named size, then of every file in configs/."""
    for name, net in SIZES.items():
        size = 32 if name.endswith("cifar10") else 64
        yield name, config.Config(data=config.Data(size=size), net=net), 3
    for path in sorted((ROOT / "configs").glob("*.py")):
        cfg = config.load(path)
        yield f"configs/{path.name}", cfg, 1 if cfg.data.source in GREY else 3


def rows(with_flops: bool = True) -> list[Row]:
    """The table's lines; without operations it takes seconds."""
    counted: dict[object, tuple[int, int | None, int | None]] = {}
    made = []
    for name, cfg, channels in named():
        # Neither dropout nor the type of the computations changes a count.
        net = replace(cfg.net, dropout=0.0, condition_dropout=0.0, dtype="float32")
        key = (net, cfg.data.size, cfg.data.augment > 0, channels)
        if key not in counted:
            model = make_model(cfg, channels)
            forward = flops.forward(model).total if with_flops else None
            train = flops.train_step(model).total if with_flops else None
            counted[key] = (flops.parameters(model), forward, train)
        made.append(Row(name, cfg.net.arch, cfg.data.size, *counted[key]))
    return made


def page(table: list[Row]) -> str:
    """docs/models.md of a table with operations."""
    lines = [
        "| network | architecture | pixels | parameters (M) | forward (GFLOPs) | training step (GFLOPs) | state (GB) | published (M) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    matches = ["| network | here (M) | published (M) | difference |", "|---|---|---|---|"]
    for row in table:
        assert row.forward is not None and row.train is not None
        millions = row.parameters / 1e6
        published, source = PUBLISHED.get(row.name, (None, ""))
        stated = f"{published:g} ({source})" if published else ""
        lines.append(
            f"| `{row.name}` | {row.arch} | {row.size} | {millions:.3f} | {_giga(row.forward)} | "
            f"{_giga(row.train)} | {16 * row.parameters / 1e9:.3f} | {stated} |"
        )
        if published:
            off = 100 * (millions / published - 1)
            matches.append(f"| `{row.name}` | {millions:.3f} | {published:g} | {off:+.2f} % |")
    xl = next(row.forward for row in table if row.name == "dit-xl/4") or 0
    tail = TAIL.format(matches="\n".join(matches) + "\n", xl=xl / 1e9, half=xl / 2e9)
    return HEAD + "\n".join(lines) + "\n" + tail


def _giga(operations: int) -> str:
    billions = operations / 1e9
    return f"{billions:,.2f}" if billions >= 1 else f"{billions:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    options = parser.parse_args()
    text = page(rows())
    if options.check:
        sys.exit(0 if text == PAGE.read_text() else f"{PAGE} is not what the code gives; run bench/models.py")
    files.write_text(PAGE, text)


if __name__ == "__main__":
    main()

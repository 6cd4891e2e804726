"""Networks by name, at the sizes their papers give; docs/models.md lists what each one counts and costs."""

from __future__ import annotations

from mdiff.config import Net


def _dit(channels: int, blocks: int, heads: int, patch: int) -> Net:
    return Net(
        arch="dit",
        channels=channels,
        blocks=blocks,
        head_channels=channels // heads,
        patch=patch,
        classes=1000,
        condition_dropout=0.1,
    )


_DIT = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
"""Width, depth and heads (arXiv 2212.09748, table 1)."""

SIZES: dict[str, Net] = {
    "ddpmpp-cifar10": Net(dropout=0.13),
    "ddpmpp-ffhq64": Net(mults=(1, 2, 2, 2), dropout=0.05),
    "ncsnpp-cifar10": Net(arch="ncsnpp", dropout=0.13),
    "ncsnpp-ffhq64": Net(arch="ncsnpp", mults=(1, 2, 2, 2), dropout=0.05),
    "adm-imagenet64": Net(
        arch="adm",
        channels=192,
        mults=(1, 2, 3, 4),
        blocks=3,
        attention=(32, 16, 8),
        head_channels=64,
        dropout=0.1,
        classes=1000,
    ),
    **{f"dit-{size}/{patch}": _dit(*shape, patch) for size, shape in _DIT.items() for patch in (2, 4, 8)},
}
"""`{name: network}`: DDPM++ and NCSN++ as sized by arXiv 2206.00364 (table 7), ADM for ImageNet-64 as sized there
and in arXiv 2105.05233, DiT-S/B/L/XL with patches of 2, 4 or 8 pixels."""

"""Images cut into tiles: two images are as far apart as their worst tile (arXiv 2301.13188, §4.2).

Over the whole image, two product shots on one white background are close whatever they show. The largest
distance over tiles is small only when every part agrees. The distance of a tile is RMS per pixel on [0, 1];
the paper calls a generation a copy below 0.15, for 16 tiles of 128 x 128 pixels.
"""

from __future__ import annotations

import numpy as np

from mdiff.features.pixel import flatten
from mdiff.probes.neighbours import Neighbours, nearest_with_flips

GRID = 4
"""Tiles along each side, as in the paper."""
SMALLEST = 4
"""Pixels along a tile's side below which the grid has fewer tiles: 8 x 8 pixels have 2 x 2 of them."""
COPY = 0.15
"""The paper's threshold for 512 x 512 images."""


def grid(shape: tuple[int, ...]) -> int:
    """Tiles along each side of an image [...,H,W,C]."""
    return max(1, min(GRID, min(shape[-3:-1]) // SMALLEST))


def tiled(images: np.ndarray) -> np.ndarray:
    """Rows whose T = grid^2 equal parts are the tiles.

    Tiles of sides that do not divide differ by one pixel. All are padded to the largest and scaled so that
    a part's squared difference over its length is the tile's mean squared difference.

    Args:
      images: [N,H,W,C] uint8, or float in [-1, 1].

    Returns:
      float32 [N, T * d].
    """
    images = np.asarray(images)
    n, height, width, channels = images.shape
    parts = grid(images.shape)
    ys, xs = (np.linspace(0, size, parts + 1).round().astype(int) for size in (height, width))
    most = int(np.diff(ys).max() * np.diff(xs).max()) * channels
    out = np.zeros((n, parts * parts, most), np.float32)
    for i in range(parts):
        for j in range(parts):
            tile = flatten(images[:, ys[i] : ys[i + 1], xs[j] : xs[j + 1]])
            out[:, i * parts + j, : tile.shape[1]] = tile * np.sqrt(most / tile.shape[1])
    return out.reshape(n, -1)


def nearest_tiles(
    queries: np.ndarray, references: np.ndarray, *, flips: bool = False, chunk: int = 1024
) -> Neighbours:
    """The reference whose worst tile is nearest, exactly.

    Args:
      queries: [Q,H,W,C] images.
      references: [R,H,W,C] images.
      flips: a reference is as near as the nearer of its two orientations.
      chunk: rows per distance block.

    Returns:
      One neighbour per query: dist [Q,1] is its worst tile's RMS on [0, 1].
    """
    mirrored = tiled(references[:, :, ::-1]) if flips else None
    parts = grid(queries.shape) ** 2
    return nearest_with_flips(tiled(queries), tiled(references), mirrored, 1, chunk, parts)

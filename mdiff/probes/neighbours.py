"""Exact nearest neighbours and near-duplicate clusters of images.

One unit of distance everywhere: the root mean square difference per pixel on the [0, 1] scale, so 0 is an
exact copy and 1 is black against white (the normalized l2 of arXiv 2301.13188). Inputs are rows in
[-1, 1] (`features.pixel.flatten`); their Euclidean distance is 2 sqrt(D) times that. Rows cut into tiles
(`probes.tiles`) are as far apart as their worst tile; an uncut row is one tile.

Distances by matrix products cancel badly near zero, exactly where copies are. Products only propose
candidates here; every reported distance is a sum of squared float64 differences, and a bound on the
rounding of the products proves for each query that no better reference was left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mdiff import processes

_SPARE = 16  # candidates beyond the k asked for
_ELEMENTS = 1 << 19  # differences computed at once; fits the cache
_PAIRS = 1 << 22  # pairs listed at once where every reference is compared directly
_ROUNDING = 2.0**-24  # of one float32 operation


@dataclass(frozen=True)
class Neighbours:
    """Nearest references of each query, nearest first.

    Attributes:
      dist: float64 [Q,k], RMS per pixel on [0, 1].
      index: int64 [Q,k] into the references.
      flipped: bool [Q,k]: the mirrored reference was the nearer one.
    """

    dist: np.ndarray
    index: np.ndarray
    flipped: np.ndarray


def nearest(
    queries: np.ndarray, references: np.ndarray, k: int, chunk: int = 1024, tiles: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest references of each query, exactly; ties go to the lower index.

    Args:
      queries: [Q,D] rows in [-1, 1].
      references: [R,D] rows in [-1, 1].
      k: neighbours; at most R are returned.
      chunk: rows of queries and of references per distance block; bounds memory.
      tiles: how many equal parts a row consists of; the distance is that of the farthest part.

    Returns:
      dist: float64 [Q,k], RMS per pixel on [0, 1], nearest first.
      index: int64 [Q,k] into `references`.
    """
    queries, references = np.asarray(queries, np.float32), np.asarray(references, np.float32)
    k = min(k, len(references))
    if not len(queries):
        return np.zeros((0, k)), np.zeros((0, k), np.int64)
    squared, index = _search(queries, references, k, k + _SPARE, chunk, tiles)
    return _rms(squared, queries.shape[1] // tiles), index


def nearest_with_flips(
    queries: np.ndarray,
    references: np.ndarray,
    mirrored: np.ndarray | None,
    k: int,
    chunk: int = 1024,
    tiles: int = 1,
) -> Neighbours:
    """`nearest`, where a reference is as near as the nearer of its two orientations.

    Args:
      queries: [Q,D] rows in [-1, 1].
      references: [R,D] rows in [-1, 1].
      mirrored: [R,D] the references with left and right exchanged, or None to leave flips out.
      k: neighbours; at most R.
      chunk: rows per distance block.
      tiles: as in `nearest`.
    """
    count = len(references)
    k = min(k, count)
    if mirrored is None:
        dist, index = nearest(queries, references, k, chunk, tiles)
        return Neighbours(dist, index, np.zeros(index.shape, bool))
    # Each reference appears at most twice, so the nearest 2k rows hold k different references.
    dist, index = nearest(queries, np.concatenate([references, mirrored]), 2 * k, chunk, tiles)
    flipped, index = index >= count, index % count
    by_index = np.argsort(index, axis=1, kind="stable")
    ordered = np.take_along_axis(index, by_index, 1)
    repeated = np.zeros(index.shape, bool)
    np.put_along_axis(repeated, by_index[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    keep = np.argsort(repeated, axis=1, kind="stable")[:, :k]
    return Neighbours(*(np.take_along_axis(x, keep, 1) for x in (dist, index, flipped)))


def _search(
    queries: np.ndarray, references: np.ndarray, k: int, candidates: int, chunk: int, tiles: int
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances [Q,k] on the [-1, 1] scale and indices; widens the candidates until certain."""
    count = len(references)
    candidates = min(candidates, count)
    centre = references.mean(0, dtype=np.float64).astype(np.float32)
    blocks = [] if candidates == count else _blocks(references, centre, chunk, tiles)
    if candidates == count:
        chunk = max(1, min(chunk, _PAIRS // count))
    chunk = min(chunk, -(-len(queries) // processes.count()))  # the result does not depend on it
    starts = range(0, len(queries), chunk)

    def part(place: int) -> tuple[np.ndarray, ...]:
        rows = queries[starts[place] : starts[place] + chunk]
        certain = np.ones(len(rows), bool)
        if candidates == count:
            proposed = np.broadcast_to(np.arange(count), (len(rows), count))
            exact = _squared(rows, references, proposed, tiles)
        else:
            rough, proposed, slack = _propose(_tiled(rows - centre, tiles), blocks, candidates)
            exact = _squared(rows, references, proposed, tiles)
        order = np.lexsort((proposed, exact), axis=1)[:, :k]
        exact, proposed = np.take_along_axis(exact, order, 1), np.take_along_axis(proposed, order, 1)
        if candidates < count:
            # Whatever was left out is no nearer than the last candidate looked, less the rounding.
            certain = rough[:, -1] - slack > exact[:, -1]
        return exact, proposed, certain

    found = zip(*processes.spread(len(starts), part), strict=True)
    exact, proposed, certain = (np.concatenate(each) for each in found)
    unsure = np.flatnonzero(~certain)
    if len(unsure):
        exact[unsure], proposed[unsure] = _search(
            queries[unsure], references, k, 8 * candidates, chunk, tiles
        )
    return exact, proposed


def _tiled(rows: np.ndarray, tiles: int) -> np.ndarray:
    """Rows [N,D] as [T,N,D/T]."""
    return rows.reshape(len(rows), tiles, -1).swapaxes(0, 1)


def _norms(tiled: np.ndarray) -> np.ndarray:
    return np.einsum("tqd,tqd->tq", tiled, tiled, dtype=np.float64).astype(np.float32)


def _blocks(
    references: np.ndarray, centre: np.ndarray, chunk: int, tiles: int = 1
) -> list[tuple[int, Any, Any]]:
    """Centred blocks [T,r,D/T] of one shape, so that one program serves all; padding is infinitely far."""
    size = min(chunk, len(references))
    blocks = []
    for start in range(0, len(references), size):
        rows = _tiled(references[start : start + size] - centre, tiles)
        short = size - rows.shape[1]
        norms = np.pad(_norms(rows), ((0, 0), (0, short)), constant_values=np.inf)
        blocks.append((start, np.pad(rows, ((0, 0), (0, short), (0, 0))), norms))
    return blocks


def _propose(
    rows: np.ndarray, blocks: list[tuple[int, Any, Any]], candidates: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rough squared distances [q,m] of rows [T,q,d], indices of the nearest-looking, and their error."""
    norms = _norms(rows)
    best: Any = np.full((rows.shape[1], candidates), np.inf, np.float32)
    index: Any = np.zeros((rows.shape[1], candidates), np.int32)
    longest = 0.0
    for start, block, block_norms in blocks:
        best, index = _merge(rows, norms, block, block_norms, start, best, index)
        longest = max(longest, float(block_norms[np.isfinite(block_norms)].max()))
    slack = _slack(norms.max(0), longest, rows.shape[2])
    return np.asarray(best, np.float64), np.asarray(index, np.int64), slack


def _slack(norms: np.ndarray, longest: float, size: int) -> np.ndarray:
    """Bound on the rounding of |q|^2 + |r|^2 - 2 q.r in float32 over `size` terms, centring included."""
    return (size + 16) * _ROUNDING * (np.sqrt(norms, dtype=np.float64) + np.sqrt(longest)) ** 2


def _products(rows: Any, norms: Any, block: Any, block_norms: Any) -> Any:
    """Squared distances [q,r] by products, of rows [T,q,d] and a block [T,r,d]: those of the worst tile."""

    def tile(part: Any) -> Any:
        row, norm, other, other_norm = part
        inner = jnp.matmul(row, other.T, precision=jax.lax.Precision.HIGHEST)
        return norm[:, None] + other_norm[None, :] - 2 * inner

    parts = (rows, norms, block, block_norms)
    worst = tile([x[0] for x in parts])
    if rows.shape[0] == 1:
        return worst
    rest = tuple(x[1:] for x in parts)
    return jax.lax.scan(lambda far, part: (jnp.maximum(far, tile(part)), None), worst, rest)[0]


@jax.jit
def _merge(rows: Any, norms: Any, block: Any, block_norms: Any, start: Any, best: Any, index: Any) -> Any:
    here = _products(rows, norms, block, block_norms)
    near, place = jax.lax.top_k(-here, min(best.shape[1], here.shape[1]))
    merged = jnp.concatenate([-best, near], 1)
    near, choice = jax.lax.top_k(merged, best.shape[1])
    places = jnp.concatenate([index, place + start], 1)
    return -near, jnp.take_along_axis(places, choice, 1)


def _squared(queries: np.ndarray, references: np.ndarray, index: np.ndarray, tiles: int) -> np.ndarray:
    """Squared distances [q,m] of queries [q,D] to references[index [q,m]], by float64 differences."""
    flat = index.ravel()
    left = np.repeat(np.arange(len(queries)), index.shape[1])
    return _squared_pairs(queries, references, left, flat, tiles).reshape(index.shape)


def _squared_pairs(
    a: np.ndarray, b: np.ndarray, left: np.ndarray, right: np.ndarray, tiles: int = 1
) -> np.ndarray:
    out = np.empty(len(left))
    step = max(1, _ELEMENTS // a.shape[1])
    for i in range(0, len(left), step):
        part = slice(i, i + step)
        diff = np.subtract(a[left[part]], b[right[part]], dtype=np.float64)
        diff = diff.reshape(len(diff), tiles, -1)
        out[part] = np.einsum("ptd,ptd->pt", diff, diff).max(1)
    return out


def _rms(squared: np.ndarray, size: int) -> np.ndarray:
    return np.sqrt(squared / size) / 2


def median_pair_distance(references: np.ndarray, limit: int = 2000, seed: int = 0) -> float:
    """Median RMS distance on [0, 1] over pairs of references [R,D], on a sample of `limit` if more."""
    rows = np.asarray(references, np.float64)
    if len(rows) > limit:
        generator = np.random.Generator(np.random.Philox(seed))
        rows = rows[np.sort(generator.choice(len(rows), limit, replace=False))]
    rows = rows - rows.mean(0)
    norms = np.einsum("rd,rd->r", rows, rows)
    squared = norms[:, None] + norms[None, :] - 2 * rows @ rows.T
    pairs = squared[np.triu_indices(len(rows), 1)]
    return float(_rms(np.median(np.maximum(pairs, 0.0)), rows.shape[1]))


def cluster_near_duplicates(
    references: np.ndarray, threshold: float, chunk: int = 1024, mirrored: np.ndarray | None = None
) -> np.ndarray:
    """Images joined by chains of pairs no farther apart than `threshold` are one image.

    Equal images are one image at any threshold, 0 included.

    Args:
      references: [R,D] rows in [-1, 1].
      threshold: RMS distance on [0, 1].
      chunk: rows per distance block.
      mirrored: [R,D] the references mirrored: an image and a mirrored copy are then one image too.

    Returns:
      int64 [R], cluster of each reference, numbered by first appearance.
    """
    rows = np.asarray(references, np.float32)
    count, size = rows.shape
    limit = (2 * threshold) ** 2 * size
    centre = rows.mean(0, dtype=np.float64).astype(np.float32)
    labels = np.arange(count)
    for other in [rows] if mirrored is None else [rows, np.asarray(mirrored, np.float32)]:
        blocks, starts = _blocks(other, centre, chunk), range(0, count, chunk)

        def part(
            place: int, other: Any = other, blocks: Any = blocks, starts: Any = starts
        ) -> list[np.ndarray]:
            """Pairs of near duplicates of which one is in this chunk: enough of them to connect all."""
            nonlocal labels
            start, pairs = starts[place], [np.zeros((2, 0), np.int64)]
            rest = _tiled(rows[start : start + chunk] - centre, 1)
            norms = _norms(rest)
            for offset, block, block_norms in blocks:
                if offset + block.shape[1] <= start:
                    continue  # the pair of blocks was seen from the other side
                longest = float(block_norms[np.isfinite(block_norms)].max())
                rough = np.asarray(_products(rest, norms, block, block_norms), np.float64)
                left, right = np.nonzero(rough <= limit + _slack(norms[0], longest, size)[:, None])
                left, right = left + start, right + offset
                open_pairs = labels[left] != labels[right]
                left, right = left[open_pairs], right[open_pairs]
                close = _squared_pairs(rows, other, left, right) <= limit
                if close.any():
                    labels = _join(labels, left[close], right[close])
                    pairs.append(np.stack([left[close], right[close]]))
            return [np.concatenate(pairs, 1)]

        for (pairs,) in processes.spread(len(starts), part):
            labels = _join(labels, *pairs)
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _join(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Merges the clusters of the pairs; a cluster's label is its first member's index."""
    edges = (np.ones(len(left), bool), (labels[left], labels[right]))
    _, parts = connected_components(coo_matrix(edges, shape=(len(labels),) * 2), directed=False)
    _, first, inverse = np.unique(parts[labels], return_index=True, return_inverse=True)
    return first[inverse]

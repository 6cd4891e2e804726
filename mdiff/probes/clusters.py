"""Surrogate labels: spherical k-means of a model's own images, with a filter by cohesion (arXiv 2410.02467, algorithm 1).

Rows are compared by cosine. The cohesion of a cluster is the mean cosine of its members with its centre; the centre being
the direction of the members' sum, that is the norm of the mean of the unit rows, and its square the mean cosine over
all pairs, each row paired with itself included. One row alone has cohesion 1, so small clusters pass by chance: hence a
least size, and `pairwise`, the mean over pairs of different rows, which has no such bias.

Principal components are centred: a cosine there is between deviations from the mean image of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.cluster import KMeans

from mdiff.errors import UserError
from mdiff.files import locate, strict, write_atomically, write_json
from mdiff.probes import stamped
from mdiff.side import Surrogate

FORMAT = 1
"""Of `clusters.json`."""
_SWEEPS = 300  # of spherical k-means; it stops when no label changes


@dataclass(frozen=True)
class Clusters:
    """Clusters found, those kept, and the label of each row. K' of the K found are kept.

    Attributes:
      labels: int64 [N], the kept cluster (0..K'-1) of each row; -1 for rows left out and rows of length 0.
      centres: float64 [K',F], unit rows.
      cohesion: float64 [K], mean cosine of the members with their centre.
      pairwise: float64 [K], mean cosine over pairs of different members, (n c^2 - 1) / (n - 1); NaN for one member.
      sizes: int64 [K], members, before any is reassigned.
      kept: bool [K], in the order of `cohesion`; label k is the k-th kept one.
      inertia: sum over rows of the squared distance to their unit centre, 2 (1 - cosine).
      space: name of the feature space.
    """

    labels: np.ndarray
    centres: np.ndarray
    cohesion: np.ndarray
    pairwise: np.ndarray
    sizes: np.ndarray
    kept: np.ndarray
    inertia: float
    space: str = ""


def check(cfg: Surrogate) -> None:
    """Raises UserError for the first setting of the clustering that is out of range."""
    for name in ("n", "clusters", "min_size", "restarts"):
        if getattr(cfg, name) < 1:
            raise UserError(f"surrogate.{name} = {getattr(cfg, name)}; give at least 1")
    if not -1 <= cfg.cohesion <= 1:
        raise UserError(f"surrogate.cohesion = {cfg.cohesion}; give a cosine, from -1 to 1")
    if cfg.dropped not in ("reassign", "drop"):
        raise UserError(f"surrogate.dropped = {cfg.dropped!r}; give reassign or drop")
    if not 0 <= cfg.soft < np.inf:
        raise UserError(f"surrogate.soft = {cfg.soft}; give a temperature above 0, or 0 for hard labels")
    if cfg.seed < 0:
        raise UserError(f"surrogate.seed = {cfg.seed}; give 0 or more")
    if cfg.n < cfg.clusters:
        raise UserError(
            f"surrogate.n = {cfg.n}: fewer images than surrogate.clusters = {cfg.clusters}; raise n, to about 40 for each "
            "cluster, or lower clusters"
        )


def cluster(features: np.ndarray, cfg: Surrogate, *, space: str = "") -> Clusters:
    """Clusters rows by cosine and keeps the cohesive clusters.

    scikit-learn's k-means on unit rows, from k-means++ starts, moves Euclidean centres, the means; from where it ends the
    spherical iteration goes on, with centres brought to unit length and rows given to the largest cosine, until
    no label changes. The start with the least inertia is taken.

    Args:
      features: [N,F] rows.
      cfg: `clusters`, `cohesion`, `min_size`, `dropped`, `restarts`, `seed`.
      space: name of the feature space, kept in the result.

    Raises:
      UserError: a setting is out of range, rows are not finite or fewer (different ones) than clusters, or no cluster
        passes the filter.
    """
    check(cfg)
    unit, known = _unit(_rows(features))
    distinct = len(np.unique(unit[known], axis=0))
    if distinct < cfg.clusters:
        same = "" if distinct == len(unit) else f", {distinct} different ones,"
        raise UserError(
            f"surrogate.clusters = {cfg.clusters}: more than the {len(unit)} images{same} to cluster; draw more "
            "(surrogate.n) or lower clusters"
        )
    seeds = np.random.SeedSequence(cfg.seed).generate_state(cfg.restarts)
    found = [_spherical(unit[known], cfg.clusters, int(seed)) for seed in seeds]
    inertia, centres, own = min(found, key=lambda each: each[0])

    sizes = np.bincount(own, minlength=cfg.clusters)
    cohesion = np.bincount(own, (unit[known] * centres[own]).sum(1), cfg.clusters) / np.maximum(sizes, 1)
    kept = (cohesion >= cfg.cohesion) & (sizes >= cfg.min_size)
    if not kept.any():
        raise UserError(_none_kept(cohesion, sizes, cfg))
    centres, number = centres[kept], np.cumsum(kept) - 1
    labels = np.full(len(unit), -1)
    if cfg.dropped == "reassign":
        labels[known] = (unit[known] @ centres.T).argmax(1)
    else:
        labels[known] = np.where(kept[own], number[own], -1)
    return Clusters(labels, centres, cohesion, pairwise(cohesion, sizes), sizes, kept, inertia, space)


def pairwise(cohesion: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mean cosine over pairs of different members, from cohesions [K] and sizes [K]; NaN for fewer than 2."""
    n = np.asarray(sizes, np.float64)
    return np.divide(n * np.square(cohesion) - 1, n - 1, out=np.full(len(n), np.nan), where=n > 1)


def assign(clusters: Clusters, features: np.ndarray) -> np.ndarray:
    """The kept cluster of the largest cosine for each row [M,F]: int64 [M]; -1 for a row of length 0."""
    unit, known = _unit(_rows(features, clusters))
    return np.where(known, (unit @ clusters.centres.T).argmax(1), -1)


def soft(clusters: Clusters, features: np.ndarray, temperature: float) -> np.ndarray:
    """Labels as probabilities, softmax over the kept clusters of cosine / temperature.

    Args:
      clusters: K' kept ones.
      features: [M,F].
      temperature: 0 gives one-hot rows.

    Returns:
      float32 [M,K'], rows that sum to 1; a row of length 0 gets equal probabilities.

    Raises:
      UserError: a negative or infinite temperature, or features that do not fit.
    """
    if not 0 <= temperature < np.inf:
        raise UserError(f"surrogate.soft = {temperature}; give a temperature above 0, or 0 for hard labels")
    if temperature == 0:
        labels = assign(clusters, features)
        return np.where(
            labels[:, None] < 0, 1 / len(clusters.centres), one_hot(labels, len(clusters.centres))
        ).astype(np.float32)
    unit, _ = _unit(_rows(features, clusters))
    return softmax(unit @ clusters.centres.T / temperature, axis=1).astype(np.float32)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """float32 [N,classes] of labels int [N]; a label outside 0..classes-1, such as -1, gives a row of zeros."""
    return (np.asarray(labels)[:, None] == np.arange(classes)).astype(np.float32)


def shuffled(labels: np.ndarray, seed: int) -> np.ndarray:
    """The labels [N] dealt at random, as often as before; rows left out (-1) stay out. A control: they say nothing."""
    labels = np.array(labels)
    at = np.flatnonzero(labels >= 0)
    labels[at] = np.random.Generator(np.random.Philox(seed)).permutation(labels[at])
    return labels


# ---------------------------------------------------------------------------------------------- files


def save(clusters: Clusters, folder: str | Path) -> Path:
    """Writes `clusters.npz`, then `clusters.json`, which holds its digest; each whole or not at all.

    Returns:
      The path of the JSON.
    """
    path = locate(folder) / "clusters.json"
    names = ("labels", "centres", "cohesion", "pairwise", "sizes", "kept")
    data, stamp = stamped.pack({name: getattr(clusters, name) for name in names})
    write_atomically(path.with_suffix(".npz"), lambda part: part.write_bytes(data))
    write_json(path, strict(to_json(clusters) | {"format": FORMAT, "arrays": stamp}))
    return path


def to_json(clusters: Clusters) -> dict[str, Any]:
    """What a reader wants to know of the clusters, without the arrays of rows."""
    members = np.bincount(clusters.labels[clusters.labels >= 0], minlength=len(clusters.centres))
    return {
        "space": clusters.space,
        "found": len(clusters.kept),
        "kept": int(clusters.kept.sum()),
        "images": len(clusters.labels),
        "labelled": int(members.sum()),
        "inertia": float(clusters.inertia),
        "members": members.tolist(),
        "clusters": [
            {"size": int(n), "cohesion": float(c), "pairwise": float(p), "kept": bool(k)}
            for n, c, p, k in zip(
                clusters.sizes, clusters.cohesion, clusters.pairwise, clusters.kept, strict=True
            )
        ],
    }


def load(folder: str | Path) -> Clusters:
    """The inverse of `save`.

    Raises:
      UserError: there are none, or the files are damaged or not of one result.
    """
    path = locate(folder) / "clusters.json"
    again = "; cluster again"
    if not path.is_file() or not path.with_suffix(".npz").is_file():
        missing = path if not path.is_file() else path.with_suffix(".npz")
        raise UserError(f"{missing}: no such file{again}")
    tree = stamped.read_json(path, FORMAT, again)
    arrays = stamped.read(path.with_suffix(".npz"), tree.get("arrays"), str(path), again)
    return Clusters(**arrays, inertia=float(tree["inertia"]), space=tree["space"])


# ------------------------------------------------------------------------------------------ in common


def _rows(features: np.ndarray, clusters: Clusters | None = None) -> np.ndarray:
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or not rows.size:
        raise UserError(f"features: shape {rows.shape}; give one row per image, [N, features]")
    broken = int(np.sum(~np.isfinite(rows).all(1)))
    if broken:
        raise UserError(
            f"features: {broken} of {len(rows)} rows have NaN or infinite values; leave those images out"
        )
    if clusters is not None and rows.shape[1] != clusters.centres.shape[1]:
        raise UserError(
            f"features: {rows.shape[1]} columns, the clusters have {clusters.centres.shape[1]} "
            f"({clusters.space or 'unnamed space'}); take features of that space"
        )
    return rows


def _unit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows at unit length, and which have a direction at all; the others stay 0."""
    peak = np.abs(rows).max(1, keepdims=True)  # brought to 1 first: squares of tiny values vanish
    known = peak[:, 0] > 0
    rows = np.divide(rows, peak, out=np.zeros_like(rows), where=peak > 0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0), known


def _spherical(unit: np.ndarray, count: int, seed: int) -> tuple[float, np.ndarray, np.ndarray]:
    """One start: inertia, unit centres [K,F], and the cluster of the largest cosine of each row [N]."""
    own = KMeans(count, init="k-means++", n_init=1, random_state=seed).fit(unit).labels_
    for _ in range(_SWEEPS):
        centres = _centres(own, unit, count)
        before, own = own, (unit @ centres.T).argmax(1)
        if np.array_equal(before, own):
            break
    return float(2 * (1 - (unit * centres[own]).sum(1)).sum()), centres, own


def _centres(own: np.ndarray, unit: np.ndarray, count: int) -> np.ndarray:
    """Directions [K,F] of the sums of the members.

    Members that cancel have none: their first one's is taken. A cluster without members starts again at the row that is
    farthest from all centres.
    """
    sums = one_hot(own, count).astype(np.float64).T @ unit
    norms, sizes = np.linalg.norm(sums, axis=1), np.bincount(own, minlength=count)
    for k in np.flatnonzero((norms <= 1e-9) & (sizes > 0)):
        sums[k], norms[k] = unit[np.flatnonzero(own == k)[0]], 1.0
    filled = sizes > 0
    centres = np.divide(sums, norms[:, None], out=np.zeros_like(sums), where=filled[:, None])
    for k in np.flatnonzero(~filled):
        centres[k] = unit[(unit @ centres[filled].T).max(1).argmin()]
        filled[k] = True
    return centres


def _none_kept(cohesion: np.ndarray, sizes: np.ndarray, cfg: Surrogate) -> str:
    large = sizes >= cfg.min_size
    if not large.any():
        return (
            f"surrogate.min_size = {cfg.min_size}: the largest of {len(sizes)} clusters has {sizes.max()} images; lower "
            f"it to {sizes.max()} or less, or lower surrogate.clusters"
        )
    best = float(cohesion[large].max())
    return (
        f"surrogate.cohesion = {cfg.cohesion}: no cluster of {cfg.min_size} images or more is that cohesive, the best has "
        f"{best:.3f}; lower it below that, or raise surrogate.clusters"
    )

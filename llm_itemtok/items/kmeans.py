"""k-means: seeded, in blocks of bounded memory; knows nothing of items.

Decisions:
- k-means++ starts (Arthur and Vassilvitskii 2007) are drawn on a random subsample: the cost of the start does not grow
  with the number of points.
- A cluster that loses all its points is moved onto the point with the largest error, so that codewords do not die
  while some point is badly served.
- Sums are taken in the order of the rows, in float32 within a block and in float64 over blocks: the same points, seed
  and thread count give the same centres.
- With fewer distinct points than clusters some centres are copies of others and stay without points.

Shape letters in this file: N points, K clusters, D dimensions.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch

from llm_itemtok.errors import DataError

BLOCK = 16_384
"""Points looked at at a time."""

CACHED = 1024
"""Points whose distances are computed at a time, so that `CACHED * K` floats stay in the processor's cache."""

SAMPLE_PER_CLUSTER = 64
"""Points a cluster that the k-means++ start looks at."""


class Clusters(NamedTuple):
    """What k-means found."""

    centres: np.ndarray
    """float32 `[K, D]`."""
    labels: np.ndarray
    """int64 `[N]`, the nearest centre of each point; a tie goes to the lowest index."""
    errors: np.ndarray
    """float32 `[N]`, squared distance to it, in squared units of the points."""
    iterations: int
    """Rounds of assign-and-update that were run."""


def kmeans(points: np.ndarray, num_clusters: int, *, iterations: int = 50, seed: int = 0) -> Clusters:
    """Cluster points by Lloyd's algorithm until no point changes its cluster.

    Args:
        points: float32 `[N, D]`, finite, N at least 1.
        num_clusters: K, at least 1; may exceed N.
        iterations: upper bound on the rounds of assign-and-update, at least 1.
        seed: of the starts; the same seed gives the same clusters.

    Returns:
        The clusters; `labels` and `errors` belong to the returned centres.

    Raises:
        DataError: if a number is out of its range.
    """
    if points.ndim != 2 or len(points) == 0:
        raise DataError(f"k-means needs points of the shape (points, dimensions), at least one, was: {points.shape}")
    if num_clusters < 1 or iterations < 1:
        raise DataError(f"k-means needs at least 1 cluster and 1 iteration, was: {num_clusters} and {iterations}")
    points = np.ascontiguousarray(points, dtype=np.float32)
    rng = np.random.default_rng(seed)
    centres = _start(points, num_clusters, rng)
    labels, sums = _assign(points, centres)
    for iteration in range(1, iterations + 1):  # noqa: B007 (read after the loop)
        centres = _update(points, centres, labels, sums)
        previous = labels
        labels, sums = _assign(points, centres)
        if np.array_equal(labels, previous):
            break
    return Clusters(centres, labels, squared_errors(points, centres, labels), iteration)


def _start(points: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is a point drawn with probability proportional to its squared distance so far."""
    sample_size = SAMPLE_PER_CLUSTER * num_clusters
    if len(points) > sample_size:
        points = points[np.sort(rng.choice(len(points), size=sample_size, replace=False))]
    centres = np.empty((num_clusters, points.shape[1]), dtype=np.float32)
    centres[0] = points[rng.integers(len(points))]
    distances = np.full(len(points), np.inf)
    for cluster in range(1, num_clusters):
        difference = points - centres[cluster - 1]
        distances = np.minimum(distances, np.einsum("nd,nd->n", difference, difference))
        cumulated = np.cumsum(distances, dtype=np.float64)
        # All distances are zero when every distinct point is a centre already: then any point is as good.
        drawn = np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right") if cumulated[-1] > 0 else 0
        centres[cluster] = points[min(int(drawn), len(points) - 1)]
    return centres


def take_away(points: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> None:
    """Leave of each point what its centre does not explain, in place; arguments as `squared_errors` has them."""
    for start in range(0, len(points), BLOCK):
        rows = slice(start, start + BLOCK)
        points[rows] -= centres[labels[rows]]


def squared_errors(points: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared distance of points to their centres.

    Args:
        points: float32 `[N, D]`.
        centres: float32 `[K, D]`.
        labels: int64 `[N]`, each in `[0, K)`.

    Returns:
        float32 `[N]`; exact: a point on its centre has error 0, not a rounding error.
    """
    errors = np.empty(len(points), dtype=np.float32)
    for start in range(0, len(points), BLOCK):
        rows = slice(start, start + BLOCK)
        difference = points[rows] - centres[labels[rows]]
        errors[rows] = np.einsum("nd,nd->n", difference, difference)
    return errors


def _assign(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre of each point, and the float64 sum `[K, D]` of each cluster's points."""
    labels = np.empty(len(points), dtype=np.int64)
    sums = np.zeros(centres.shape, dtype=np.float64)
    transposed = torch.from_numpy(centres).T
    lengths = torch.from_numpy(centres).square().sum(dim=1)
    for start in range(0, len(points), BLOCK):
        block = points[start : start + BLOCK]
        rows = slice(start, start + len(block))
        for begin in range(0, len(block), CACHED):
            part = torch.from_numpy(block[begin : begin + CACHED])
            distances = torch.addmm(lengths, part, transposed, alpha=-2).numpy()
            # numpy's is several times faster than torch's.
            labels[start + begin : start + begin + len(part)] = distances.argmin(axis=1)
        sums += sums_by_label(block, labels[rows], len(centres))
    return labels, sums


def sums_by_label(points: np.ndarray, labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """Sum of each cluster's points, float32 `[K, D]`, added in the order of the rows."""
    membership = scipy.sparse.csc_array(
        (np.ones(len(points), dtype=np.float32), labels, np.arange(len(points) + 1)),
        shape=(num_clusters, len(points)),
    )
    return np.asarray(membership @ points)


def _update(points: np.ndarray, centres: np.ndarray, labels: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Mean of each cluster; an empty cluster takes the worst served point away from its cluster."""
    counts = np.bincount(labels, minlength=len(centres))
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        errors = squared_errors(points, centres, labels)  # dear, and needed for nothing else
        worst = iter(np.argsort(-errors, kind="stable"))
        for cluster in empty:
            # A point that is served without error, or is alone in its cluster, gains nothing by moving.
            row = next((row for row in worst if errors[row] == 0 or counts[labels[row]] > 1), None)
            if row is None or errors[row] == 0:
                break
            sums[labels[row]] -= points[row]
            counts[labels[row]] -= 1
            sums[cluster], counts[cluster] = points[row], 1
    means = sums / np.maximum(counts, 1)[:, None]
    return np.where(counts[:, None] > 0, means, centres).astype(np.float32)

"""What training sequences say about items: which occur near each other, and vectors made of that.

Decisions:
- Training sequences only: whoever calls this hands over nothing else. SASRec stops early by interactions held out
  *inside* training, because item tokens made from vectors that saw validation would not be judged by it fairly.
- An item that no sequence has gets the zero vector, as an item without text does: it is known to be nothing.
- Rows have length 1. How often an item occurs shows in the length of such vectors, and codes should say what an item
  is like, not how popular it is.
- Neighbours in a sequence count the same however far apart within the window, and the same pair of items in one
  sequence as often as it occurs.

Sources: shifted positive pointwise mutual information and its truncated SVD, with the singular values shared out
evenly, as in Levy and Goldberg 2014 ("Neural word embedding as implicit matrix factorization"); Kang and McAuley 2018
(arXiv:1808.09781) for SASRec.

Shape letters in this file: N items, D dimensions, T interactions of all sequences, U sequences, P pairs.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array
from sklearn.decomposition import TruncatedSVD

from llm_itemtok import sasrec
from llm_itemtok.errors import DataError
from llm_itemtok.items.base import Progress
from llm_itemtok.items.vectors import unit_rows

WINDOW = 5
"""Steps between two interactions of a sequence within which their items occur near each other."""

HELD_OUT_SHARE = 0.05
"""Share of the sequences whose last interaction tells SASRec when to stop."""
MOST_HELD_OUT = 2_000


def co_occurrence(items: np.ndarray, offsets: np.ndarray, *, num_items: int, window: int = WINDOW) -> csr_array:
    """Count how often two items occur near each other.

    Args:
        items: int64 `[T]`, catalogue rows of all sequences, one sequence after the other, oldest first.
        offsets: int64 `[U + 1]`; sequence `u` is `items[offsets[u]:offsets[u + 1]]`.
        num_items: size of the catalogue, N.
        window: two interactions of a sequence count when they are at most so many steps apart, at least 1.

    Returns:
        float64 `[N, N]`, symmetric, without a diagonal.

    Raises:
        DataError: if the window is below 1.
    """
    if window < 1:
        raise DataError(f"`window` must be at least 1 step, was: {window}")
    sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    ahead = csr_array((num_items, num_items))
    for distance in range(1, min(window, len(items) - 1) + 1):  # one distance after the other: a log may be long
        near = (sequence[distance:] == sequence[:-distance]) & (items[distance:] != items[:-distance])
        left, right = (part[near].astype(np.int32) for part in (items[:-distance], items[distance:]))
        ahead = ahead + coo_array((np.ones(len(left)), (left, right)), shape=ahead.shape).tocsr()
    counts = csr_array(ahead + ahead.T)
    counts.sum_duplicates()
    return counts


def draw_sequences(
    items: np.ndarray, offsets: np.ndarray, *, most: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Some sequences of a long log, whole, drawn at random.

    Args:
        items: as in `co_occurrence`.
        offsets: the same.
        most: interactions; sequences are drawn until the next would be one too many.
        seed: of the draw.

    Returns:
        Items and offsets of the sequences drawn, in their old order; of all, if they have no more than `most`.
    """
    if len(items) <= most:
        return items, offsets
    lengths = np.diff(offsets)
    order = np.random.default_rng(seed).permutation(len(lengths))
    drawn = np.zeros(len(lengths), dtype=bool)
    drawn[order[np.cumsum(lengths[order]) <= most]] = True
    return items[np.repeat(drawn, lengths)], np.concatenate([[0], np.cumsum(lengths[drawn])])


def near_pairs(counts: csr_array, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the items that each item occurs with most, for how often both occur near anything.

    Args:
        counts: as `co_occurrence` gives them, `[N, N]`.
        neighbours: of an item, at most.

    Returns:
        Rows of items and of their neighbours, int64 `[P]` each, an item's nearest first; items that occur near nothing
        are left out. Of two that are equally near, the one in the lower catalogue row is the nearer.
    """
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    often = np.sqrt(counts.sum(axis=1))
    likeness = counts.data / (often[rows] * often[counts.indices])
    order = np.lexsort((counts.indices, -likeness, rows))
    place = np.arange(len(rows)) - counts.indptr[rows]
    kept = order[place < neighbours]
    return rows[kept], counts.indices[kept].astype(np.int64)


def ppmi_vectors(counts: csr_array, *, dimensions: int = 64, shift: float = 1.0, seed: int = 0) -> np.ndarray:
    """Item vectors from a truncated SVD of shifted positive pointwise mutual information.

    Args:
        counts: as `co_occurrence` gives them, `[N, N]`.
        dimensions: D, at least 1; with fewer items, the rest is zeros.
        shift: at least 1. A pair counts only as far as it occurs more often than this many times what chance would
            give; it plays the part of the number of negative samples in word2vec.
        seed: of the randomised SVD; the same seed gives the same vectors.

    Returns:
        float32 `[N, D]`, rows of length 1, or 0 for an item without any pair that counts.

    Raises:
        DataError: if a number is out of range, or no two items occur near each other.
    """
    if dimensions < 1 or shift < 1:
        raise DataError(f"`dimensions` and `shift` must be at least 1, was: {dimensions} and {shift}")
    often = counts.sum(axis=1)
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    information = np.log(counts.data * often.sum() / (often[rows] * often[counts.indices] * shift))
    parts = (np.maximum(information, 0.0), counts.indices, counts.indptr)
    weights = csr_array(parts, shape=counts.shape, copy=True)  # zeros are taken out in place
    weights.eliminate_zeros()
    if not weights.nnz:
        raise DataError(
            "training sequences must have two different items near each other, and more often than chance would "
            f"(`shift` {shift:g}), to make collaborative vectors of; use item text or `vectors.kind: file` instead"
        )
    svd = TruncatedSVD(min(dimensions, counts.shape[0]), n_iter=7, random_state=seed)
    reduced = svd.fit_transform(weights)
    scale = np.sqrt(svd.singular_values_)
    vectors = np.zeros((counts.shape[0], dimensions), dtype=np.float32)
    vectors[:, : reduced.shape[1]] = np.divide(reduced, scale, out=np.zeros_like(reduced), where=scale > 0)
    vectors[weights.sum(axis=1) == 0] = 0.0  # what rounding left there would become a direction
    return unit_rows(vectors)


def sasrec_vectors(
    sequences: Sequence[np.ndarray],
    *,
    num_items: int,
    dimensions: int = 64,
    steps: int = 30_000,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> np.ndarray:
    """Item vectors of a SASRec fitted on training sequences.

    The last interaction of every twentieth sequence, drawn at random, is held out and tells when to stop (mean
    reciprocal rank over the whole catalogue).

    Args:
        sequences: training sequences, int64 catalogue rows in time order.
        num_items: size of the catalogue, N.
        dimensions: D, at least 1.
        steps: of training, at most.
        seed: of what is held out and of training; on one CPU thread the same seed gives the same vectors.
        device: where to train, as torch names it.
        progress: called with (steps done, at most).

    Returns:
        float32 `[N, D]`, rows of length 1, or 0 for an item that was not trained on.

    Raises:
        DataError: if there is no sequence of two items, or a number is out of range.
    """
    long_enough = np.flatnonzero([len(sequence) > 1 for sequence in sequences])
    if not len(long_enough):
        raise DataError(
            "training sequences must have at least two interactions somewhere to make collaborative vectors of; use "
            "item text or `vectors.kind: file` instead"
        )
    num_held_out = min(MOST_HELD_OUT, max(1, int(HELD_OUT_SHARE * len(long_enough))))
    held_out = np.random.default_rng(seed).choice(long_enough, num_held_out, replace=False)
    targets = np.array([sequences[place][-1] for place in held_out])
    fitted = list(sequences)
    for place in held_out.tolist():
        fitted[place] = fitted[place][:-1]

    def mean_reciprocal_rank(model: sasrec.SASRec) -> float:
        total = 0.0
        for start in range(0, len(held_out), 256):  # bounds the memory to 256 * N floats
            rows = slice(start, start + 256)
            scores = model.scores([fitted[place] for place in held_out[rows]])
            own = np.take_along_axis(scores, targets[rows, None], axis=1)
            total += float((1 / (1 + (scores > own).sum(axis=1))).sum())
        return total / len(held_out)

    found = sasrec.fit(
        fitted,
        num_items,
        validate=mean_reciprocal_rank,
        width=dimensions,
        heads=2 if dimensions % 2 == 0 else 1,
        steps=steps,
        every=min(300, steps),
        seed=seed,
        device=device,
        progress=progress,
    )
    vectors = found.model.item_vectors()
    vectors[np.bincount(np.concatenate(fitted), minlength=num_items) == 0] = 0.0
    return unit_rows(vectors)

"""Which items are alike: by the cosine of the sets of training users who touched them.

Knows training sequences and sparse matrices; how likeness becomes a score is the business of `baselines.ItemKNN`, and
so are the sources.

Shape letters in this file: N items of the catalogue.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from llm_itemtok.data.splits import Split


def similar_items(
    split: Split, settle: NDArray[np.float32], neighbours: int, shrink: float, block: int = 512
) -> csr_array:
    """Find each item's nearest others by cosine.

    Args:
        split: whose training part is used.
        settle: float32 [N]: of two neighbours that are equally alike, the one with more of it is the nearer.
        neighbours: of an item, at most.
        shrink: is added to the cosine's denominator.
        block: rows that are whole at a time, and those only in what is not zero.

    Returns:
        float32 [N, N], likeness of column to row, each row ordered from the nearest on.
    """
    users = np.repeat(np.arange(len(split.train_users)), np.diff(split.train_offsets))
    ones = np.ones(len(users), dtype=np.float32)
    touched = csr_array((ones, (users, split.train_items)), shape=(len(split.train_users), split.num_items))
    touched.sum_duplicates()
    touched.data[:] = 1  # sets: how often a user came back does not count
    by_item, norms = touched.T.tocsr(), np.sqrt(touched.sum(axis=0))
    columns, values, lengths = [], [], []
    for start in range(0, split.num_items, block):
        together = by_item[start : start + block] @ touched
        for row in range(together.shape[0]):
            inside = slice(together.indptr[row], together.indptr[row + 1])
            others, both = together.indices[inside], together.data[inside]
            others, both = others[others != start + row], both[others != start + row]
            cosines = both / (norms[others] * norms[start + row] + shrink)
            order = np.lexsort((others, -settle[others], -cosines))[:neighbours]
            columns.append(others[order])
            values.append(cosines[order].astype(np.float32))
            lengths.append(len(order))
    offsets = np.cumsum([0, *lengths])
    shape = (split.num_items, split.num_items)
    return csr_array((np.concatenate(values), np.concatenate(columns), offsets), shape=shape)


def nearest(similarity: csr_array, neighbours: int) -> csr_array:
    """Keep the first `neighbours` entries of each row of what `similar_items` found."""
    lengths = np.diff(similarity.indptr)
    place = np.arange(similarity.nnz) - np.repeat(similarity.indptr[:-1], lengths)
    kept, offsets = place < neighbours, np.cumsum([0, *np.minimum(lengths, neighbours)])
    return csr_array((similarity.data[kept], similarity.indices[kept], offsets), shape=similarity.shape)

"""Hierarchical codes: the path to an item in a tree of clusters.

The catalogue is split into clusters, each of these again, and so on; at the last level the items of a leaf are
numbered. So codes are unique by construction, and a prefix is a set of items that belong together: by what is bought
with what (`collaborative.co_occurrence`), or by their vectors.

Decisions:
- Codes have a fixed depth, so the tree has one, too. A node of n items that has r levels to go has about n ** (1 / r)
  children, all levels then being equally wide, and never more than `codebook_size`. No child gets more than twice its
  even share, nor more than the levels below it can tell apart: the items that fit it worst go to the next best child
  with room.
- Where a node has fewer children than there are codewords, siblings take different codewords, and nodes take turns: a
  codeword stands for as few nodes of its level as possible. It means nothing across nodes, though, as in any tree: what
  it means is said by its prefix.
- Clusters by co-occurrence are spectral: k-means on the leading eigenvectors of the normalised co-occurrence inside the
  node, rows scaled to length 1. Degrees are raised by their mean first (Qin and Rohe 2013, arXiv:1309.4111), or a few
  items that are bought only with each other would take an eigenvector each.
- An item that was never seen with another of its node goes to the child whose mean vector is nearest, so new and rare
  items stand by their kind.
- It leaves no quantizer: a tree has no codebooks. What needs gradients, or must code new items, cannot use it.

Source: collaborative indexing (CID) of Hua et al. 2023 (arXiv:2305.06569). Ours differs in the fixed depth, the bound
on the size of clusters, the raised degrees, items without co-occurrence, and what co-occurrence is: standing within a
window of a sequence, where theirs is anywhere in it.

Shape letters in this file: N items, n items of a node, D dimensions.
"""

from typing import final

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import eigsh

from llm_itemtok.errors import DataError
from llm_itemtok.items.base import ItemTokenizer, check_codebook_shape, check_vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.kmeans import kmeans
from llm_itemtok.items.residual import squared_distances

CROWDED = 2.0
"""Most items of a child, in even shares."""

DENSE = 512
"""Items of a node up to which all eigenvectors are computed, which is faster and surer there."""


@final
class HierarchicalCodes(ItemTokenizer):
    """Item tokenizer that clusters the catalogue top down."""

    def __init__(
        self,
        *,
        levels: int = 3,
        codebook_size: int = 256,
        together: scipy.sparse.csr_array | None = None,
        iterations: int = 50,
        seed: int = 0,
    ) -> None:
        """Set the shape of the codes, and what clusters are made from.

        Args:
            levels: number of levels, at least 1.
            codebook_size: codewords a level, at least 1.
            together: symmetric `[N, N]`, how often two items stand together, as `co_occurrence` gives it; clusters are
                made from it. None for clusters of the item vectors.
            iterations: upper bound on the rounds of k-means a node.
            seed: of the starts of k-means and of the eigenvectors.

        Raises:
            DataError: if a number is below 1.
        """
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        self.levels = levels
        self.codebook_size = codebook_size
        self.together = together
        self.iterations = iterations
        self.seed = seed

    def fit(self, vectors: np.ndarray) -> ItemCodes:
        """Make codes for a catalogue; see `ItemTokenizer.fit`.

        Returns:
            Codes with unique rows.

        Raises:
            DataError: also if there are more items than codes, or another number of them than of co-occurrences.
        """
        vectors = check_vectors(vectors)
        num_items = len(vectors)
        if self.together is not None and self.together.shape != (num_items, num_items):
            raise DataError(
                f"co-occurrence must be counted for the {num_items:,} items that have vectors, was: "
                f"{self.together.shape}"
            )
        if num_items > self.codebook_size**self.levels:
            raise DataError(
                f"{num_items:,} items cannot have a path each: {self.levels} levels of {self.codebook_size} spell only "
                f"{self.codebook_size**self.levels:,}; raise `codebook_size` or `levels`"
            )
        table = np.empty((num_items, self.levels), dtype=np.int32)
        nodes = [np.arange(num_items)]
        for level in range(self.levels):
            remaining = self.levels - level
            children: list[np.ndarray] = []
            dealt = 0
            for items in nodes:
                parts = self._split(items, remaining, vectors) if remaining > 1 else list(items[:, None])
                for part in parts:
                    table[part, level] = dealt % self.codebook_size
                    dealt += 1
                children += parts
            nodes = children
        source = "vectors" if self.together is None else "co-occurrence"
        settings = {"kind": "hierarchical", "source": source, "seed": self.seed}
        return ItemCodes(table, (self.codebook_size,) * self.levels, provenance={"tokenizer": settings})

    def _split(self, items: np.ndarray, remaining: int, vectors: np.ndarray) -> list[np.ndarray]:
        """Items of the children of a node, each ascending, none empty.

        Args:
            items: of the node, int64 `[n]`.
            remaining: levels to go, this one included; at least 2.
            vectors: of all items.
        """
        room = self.codebook_size ** (remaining - 1)
        even = max(int(np.ceil(len(items) ** (1 / remaining) - 1e-9)), -(-len(items) // room))
        width = min(even, self.codebook_size)
        if width == 1:
            return [items]
        limit = min(room, int(np.ceil(CROWDED * len(items) / width)))
        places, known = self._places(items, width, vectors)
        labels = np.full(len(items), -1)
        found = kmeans(places, width, iterations=self.iterations, seed=self.seed)
        labels[known] = fill(distances_to(places, found.centres), np.full(width, limit))
        if not known.all():
            labels[~known] = self._by_vector(vectors[items], labels, width, limit)
        return [items[labels == child] for child in range(width) if (labels == child).any()]

    def _places(self, items: np.ndarray, width: int, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points to cluster, float32 `[known, any]`, and which items they are of, bool `[n]`."""
        everybody = np.ones(len(items), dtype=bool)
        if self.together is None:
            return vectors[items], everybody
        inside = self.together[items][:, items]
        known = np.asarray(inside.sum(axis=1)).ravel() > 0
        if known.sum() <= width:  # too few to make clusters of
            return vectors[items], everybody
        return spectral_places(inside[known][:, known], width, seed=self.seed), known

    def _by_vector(self, own: np.ndarray, labels: np.ndarray, width: int, limit: int) -> np.ndarray:
        """Children of the items that have none yet (label -1), by the mean vectors of those that have one."""
        counts = np.bincount(labels[labels >= 0], minlength=width)
        means = np.full((width, own.shape[1]), np.inf, dtype=np.float32)
        for child in np.flatnonzero(counts):
            means[child] = own[labels == child].mean(axis=0)
        distances = np.full((int((labels < 0).sum()), width), np.inf, dtype=np.float32)
        used = counts > 0
        distances[:, used] = distances_to(own[labels < 0], means[used])
        return fill(distances, limit - counts)


def spectral_places(together: scipy.sparse.csr_array, num: int, *, seed: int) -> np.ndarray:
    """Points such that items that stand together are close.

    Args:
        together: symmetric `[n, n]`, not negative, with a positive sum in each row; n above `num`.
        num: number of eigenvectors.
        seed: of the start of the iteration.

    Returns:
        float32 `[n, num]`, rows of length 1: the leading eigenvectors of the co-occurrence over raised degrees.
    """
    degrees = np.asarray(together.sum(axis=1)).ravel()
    scale = scipy.sparse.diags_array(1 / np.sqrt(degrees + degrees.mean()))
    normalised = scipy.sparse.csr_array(scale @ together @ scale)
    if together.shape[0] <= max(DENSE, 2 * num):
        vectors = np.linalg.eigh(normalised.toarray())[1][:, -num:]
    else:
        start = np.random.default_rng(seed).normal(size=together.shape[0])
        vectors = eigsh(normalised, k=num, which="LA", v0=start, tol=1e-4)[1]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0).astype(np.float32)


def distances_to(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances float32 `[n, width]`."""
    return squared_distances(torch.from_numpy(points), torch.from_numpy(centres)).numpy()


def fill(distances: np.ndarray, rooms: np.ndarray) -> np.ndarray:
    """Give each point to its nearest child that has room, the points that have most to lose first.

    Args:
        distances: float `[n, width]`; infinity for a child of last resort.
        rooms: int64 `[width]`, items that each child takes; n of them in all at least.

    Returns:
        int64 `[n]`, the child of each point.
    """
    labels = np.full(len(distances), -1)
    rooms, waiting = rooms.copy(), np.arange(len(distances))
    while len(waiting):
        here = np.where(rooms > 0, distances[waiting], np.inf)
        # Children of last resort have no distance: those with room come before those without.
        wish = np.where(np.isfinite(here).any(axis=1), here.argmin(axis=1), rooms.argmax())
        order = np.lexsort((here[np.arange(len(waiting)), wish], wish))
        rank = np.arange(len(order)) - np.searchsorted(wish[order], wish[order])
        taken = order[rank < rooms[wish[order]]]
        labels[waiting[taken]] = wish[taken]
        rooms -= np.bincount(wish[taken], minlength=len(rooms))
        waiting = np.delete(waiting, taken)
    return labels

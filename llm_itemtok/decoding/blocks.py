"""The prefix tree of some items, cut into blocks of one width.

A model that has read a history needs one position for each distinct beginning of the items' codes, not one for each
codeword of each item. In the order of the sorted codes a prefix stands behind the prefixes that it continues, so the
tree may be cut anywhere: a block only has to begin with the ancestors of its first prefix, and then no prefix looks
beyond its own block. Prefixes of the last depth but one hold the items; none of them is ever repeated, so each item
ends in exactly one block. Codes may be of unlike lengths, if no code begins another one and the last codeword of each
comes before what may stand in its place.

Works on codes alone, on the host.

Shape letters: N blocks, Q slots of a block, I items, L levels, M prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """A tree in blocks.

    Attributes:
        codes: int64 `[N, Q]`, the last codeword of the prefix in each slot.
        depths: int64 `[N, Q]`, its length, in `[1, L - 1]`; 0 in slots that hold none.
        parents: int64 `[N, Q]`, the slot, in the same block, of the prefix that is one shorter; its own slot for
            prefixes of length 1 and for slots that hold none.
        leaf_starts: int64 `[N + 1]`: leaves `[leaf_starts[n], leaf_starts[n + 1])` end in block `n`.
        leaf_slots: int64 `[I]`, the slot of each leaf's longest proper prefix.
        leaf_codes: int64 `[I]`, the last codeword of its code.
        leaf_items: int64 `[I]`, which of the given codes it is.
    """

    codes: np.ndarray
    depths: np.ndarray
    parents: np.ndarray
    leaf_starts: np.ndarray
    leaf_slots: np.ndarray
    leaf_codes: np.ndarray
    leaf_items: np.ndarray

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.codes)

    def take(self, numbers: np.ndarray) -> "Blocks":
        """Some of the blocks, by number."""
        counts = np.diff(self.leaf_starts)[numbers]
        leaf_starts = np.append(0, np.cumsum(counts))
        leaves = np.repeat(self.leaf_starts[numbers] - leaf_starts[:-1], counts) + np.arange(leaf_starts[-1])
        return Blocks(
            self.codes[numbers],
            self.depths[numbers],
            self.parents[numbers],
            leaf_starts,
            self.leaf_slots[leaves],
            self.leaf_codes[leaves],
            self.leaf_items[leaves],
        )


def cut(codes: np.ndarray, width: int, lengths: np.ndarray | None = None) -> Blocks:
    """Cut the prefix tree of codes into blocks.

    Args:
        codes: integers `[I, L]`, distinct rows, at least one, of at least two levels.
        width: slots of a block, Q; at least `L - 1`, so that there is room for a prefix behind its ancestors.
        lengths: int64 `[I]` in `[2, L]`, codewords of each code that count; None where all do.
    """
    num_levels = codes.shape[1]
    assert num_levels > 1
    assert width >= num_levels - 1
    order = np.lexsort(codes.T[::-1])
    codes = codes[order].astype(np.int64)
    lengths = np.full(len(codes), num_levels) if lengths is None else lengths[order]
    depths, last_codes, parents, above_leaf = _prefixes(codes, lengths)

    begins: list[int] = []
    begin = 0
    while begin < len(depths):
        begins.append(begin)
        begin += width - int(depths[begin]) + 1  # its ancestors take `depth - 1` slots
    first = np.array(begins)
    block = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(depths))))
    slots = np.arange(len(depths)) - first[block] + depths[first[block]] - 1
    # A parent before the block's first prefix is one of its ancestors, which stand in the order of their depths.
    parent_slots = np.where(parents >= first[block], slots[parents], depths - 2)
    parent_slots = np.where(depths == 1, slots, parent_slots)

    shape = (len(first), width)
    cut_codes, cut_depths = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    cut_parents = np.tile(np.arange(width), (len(first), 1))
    cut_codes[block, slots], cut_depths[block, slots], cut_parents[block, slots] = last_codes, depths, parent_slots
    node, at = first, np.arange(len(first))
    for _ in range(num_levels - 2):
        deeper = depths[node] > 1
        node, at = parents[node[deeper]], at[deeper]
        cut_codes[at, depths[node] - 1], cut_depths[at, depths[node] - 1] = last_codes[node], depths[node]
        cut_parents[at, depths[node] - 1] = np.maximum(depths[node] - 2, 0)
    return Blocks(
        cut_codes,
        cut_depths,
        cut_parents,
        leaf_starts=np.searchsorted(above_leaf, np.append(first, len(depths))),
        leaf_slots=slots[above_leaf],
        leaf_codes=codes[np.arange(len(codes)), lengths - 1],
        leaf_items=order,
    )


def _prefixes(codes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct proper prefixes of sorted codes `[I, L]` of lengths `[I]`, each before those that continue it.

    Returns:
        Lengths `[M]`, last codewords `[M]`, numbers of the prefixes that are one shorter `[M]` (0 at length 1), and for
        each code `[I]` the number of its longest proper prefix.
    """
    new = np.ones((len(codes), codes.shape[1] - 1), dtype=bool)
    new[1:] = np.logical_or.accumulate(codes[1:, :-1] != codes[:-1, :-1], axis=1)
    new &= np.arange(1, codes.shape[1]) < lengths[:, None]
    rows, levels = np.nonzero(new)
    numbers = np.zeros(new.shape, dtype=np.int64)
    numbers[rows, levels] = np.arange(len(rows))
    numbers = np.maximum.accumulate(numbers, axis=0)  # of the prefix that holds each code at each level
    parents = np.where(levels == 0, 0, numbers[rows, np.maximum(levels - 1, 0)])
    return levels + 1, codes[rows, levels], parents, numbers[np.arange(len(codes)), lengths - 2]


def join(trees: Sequence[Blocks]) -> Blocks:
    """Blocks of several trees of one width as one list, narrowed to the slots that any of them needs."""
    depths = np.concatenate([tree.depths for tree in trees])
    width = int((depths > 0).sum(axis=1).max())
    return Blocks(
        np.concatenate([tree.codes for tree in trees])[:, :width],
        depths[:, :width],
        np.concatenate([tree.parents for tree in trees])[:, :width],
        leaf_starts=np.append(0, np.cumsum(np.concatenate([np.diff(tree.leaf_starts) for tree in trees]))),
        leaf_slots=np.concatenate([tree.leaf_slots for tree in trees]),
        leaf_codes=np.concatenate([tree.leaf_codes for tree in trees]),
        leaf_items=np.concatenate([tree.leaf_items for tree in trees]),
    )

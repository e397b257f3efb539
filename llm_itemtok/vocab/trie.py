"""`ItemTrie`: which codeword may follow which prefix, as per-level sorted arrays.

The distinct prefixes of length `l + 1` are numbered in lexicographic order; that number is the node's id at depth
`l + 1`. The children of a node are therefore one contiguous range of the next depth, so a level needs only two arrays:
where the children of each node start, and which codeword leads to each child. Child id = position; no pointers, no
state per step beyond a node id. Leaves are in the order of the sorted codes and point back to the items' rows.

Built once per code table from one sort of the items, vectorised; a node's children are found by two gathers, whatever
the size of the catalogue.

Decisions:
- Every array has the narrowest type that holds its numbers: ten million items with 4 levels of 256 take about 90 MB.
  What is handed out is int64, as indices must be.
- What follows from other arrays is not kept. The leaves under a node are found by following its first child down, one
  gather a level. The leaf of each item is worked out when somebody asks for it first, and then kept.
"""

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.errors import CollisionError
from llm_itemtok.items.codes import ItemCodes


class ItemTrie:
    """Prefix tree over injective item codes.

    Attributes:
        sizes: capacity of each level.
        starts: per level, int32 `[nodes at depth level, and one more]`: children of node `n` are
            `[starts[level][n], starts[level][n + 1])`. Depth 0 has one node, the root.
        child_codes: per level, uint8, int16 or int32 `[nodes at depth level + 1]`: the codeword that leads to each
            child.
        leaf_items: int32 `[num_items]`: the catalogue row of each leaf; int64 beyond 2**31 items, and so are `starts`.
        max_children: per level, the widest node.
        ended: per level, bool `[nodes at depth level + 1]`: whether the item of a node has no more words; None where
            every item has a codeword of its own at every level.
    """

    def __init__(self, codes: ItemCodes) -> None:
        """Build the trie.

        Raises:
            CollisionError: if two items share a code; a leaf must be one item.
        """
        rows, distinct = codes.sorted_rows(codes.num_levels)
        if not distinct.all():
            raise CollisionError(
                f"a trie needs one code per item, but {codes.collision_rate:.1%} of the items share theirs; "
                "resolve collisions first (`tokenizer.collisions`)"
            )
        self.sizes = codes.sizes
        self.starts: list[Tensor] = []
        self.child_codes: list[Tensor] = []
        self.leaf_items: Tensor = _narrow(rows, np.int32, np.int64)
        self._item_leaves: Tensor | None = None
        table = codes.table.take(rows, axis=0)
        lengths = None if codes.words is None else codes.lengths[rows]
        del rows  # ten million of them are 80 MB, and the sorted table is twice that
        self.ended: list[Tensor] | None = None if lengths is None else []
        parents = np.zeros(len(table), dtype=bool)  # whether the prefix differs from that of the row before
        parents[0] = True
        for level in range(codes.num_levels):
            children = parents.copy()
            children[1:] |= table[1:, level] != table[:-1, level]
            starts = np.flatnonzero(parents[children])
            self.starts.append(_narrow(np.append(starts, np.count_nonzero(children)), np.int32, np.int64))
            self.child_codes.append(_narrow(table[children, level], np.uint8, np.int16, np.int32))
            if self.ended is not None and lengths is not None:
                self.ended.append(torch.from_numpy(lengths[children] <= level + 1))
            parents = children
        self.max_children = tuple(int((starts[1:] - starts[:-1]).max()) for starts in self.starts)

    @property
    def num_levels(self) -> int:
        """Depth of the tree."""
        return len(self.starts)

    @property
    def num_items(self) -> int:
        """Leaves of the tree."""
        return len(self.leaf_items)

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self.leaf_items.device

    @property
    def item_leaves(self) -> Tensor:
        """The leaf of each catalogue row, int32 `[num_items]`; made when first asked for."""
        if self._item_leaves is None:
            leaves = torch.empty_like(self.leaf_items)
            leaves[self.leaf_items.long()] = torch.arange(self.num_items, dtype=leaves.dtype, device=self.device)
            self._item_leaves = leaves
        return self._item_leaves

    def arrays(self) -> list[Tensor]:
        """Every array that is held now."""
        leaves = [] if self._item_leaves is None else [self._item_leaves]
        return [*self.starts, *self.child_codes, *(self.ended or []), self.leaf_items, *leaves]

    def to(self, device: torch.device) -> "ItemTrie":
        """Move the arrays to a device, in place, and return self."""
        self.starts = [starts.to(device) for starts in self.starts]
        self.child_codes = [codes.to(device) for codes in self.child_codes]
        self.leaf_items = self.leaf_items.to(device)
        self.ended = None if self.ended is None else [ended.to(device) for ended in self.ended]
        self._item_leaves = None if self._item_leaves is None else self._item_leaves.to(device)
        return self

    def num_nodes(self, depth: int) -> int:
        """Number of distinct prefixes of length `depth`, which is in `[0, num_levels]`."""
        return 1 if depth == 0 else len(self.child_codes[depth - 1])

    def children(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """List the children of nodes at depth `level`.

        Args:
            nodes: int64 `[...]`, node ids at depth `level`; must be valid.
            level: in `[0, num_levels)`.

        Returns:
            children: int64 `[..., C]` node ids at depth `level + 1`, `C = max_children[level]`.
            codes: int64 `[..., C]` codewords that lead there, in `[0, sizes[level])`.
            legal: bool `[..., C]`; where False, `children` and `codes` hold an arbitrary valid index.
        """
        starts, codes = self.starts[level], self.child_codes[level]
        first = starts[nodes].long().unsqueeze(-1)
        after = starts[nodes + 1].unsqueeze(-1)
        children = first + torch.arange(self.max_children[level], device=nodes.device)
        legal = children < after
        children.clamp_(max=len(codes) - 1)
        # On a CPU three times as fast as `codes[children]`.
        return children, codes.index_select(0, children.view(-1)).view(children.shape).long(), legal

    @staticmethod
    def place_of(words: Tensor, legal: Tensor, codes: Tensor) -> Tensor:
        """Where codewords int64 `[n]` stand among the children that `children` listed: int64 `[n, 1]`.

        Each must be there; of one that is not, the place is 0.
        """
        return (legal & (words == codes.unsqueeze(1))).int().argmax(1, keepdim=True)

    def leaf_span(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Find the leaves under nodes at depth `depth`: a contiguous range each.

        Args:
            nodes: int64 `[...]`, node ids; must be valid.
            depth: in `[0, num_levels]`; at `num_levels` nodes are leaves.

        Returns:
            first: int64 `[...]`, the first leaf under each node.
            after: int64 `[...]`, one more than the last.
        """
        first, after = nodes, nodes + 1  # the node after the last has no children, but a start
        for starts in self.starts[depth:]:
            first, after = starts[first].long(), starts[after].long()
        return first, after

    def items(self, leaves: Tensor) -> Tensor:
        """Catalogue rows int64 `[...]` of leaves int64 `[...]`, which must be valid."""
        return self.leaf_items[leaves].long()

    def leaves(self, items: Tensor) -> Tensor:
        """Leaves int64 `[...]` of catalogue rows int64 `[...]`, which must be valid."""
        return self.item_leaves[items].long()

    def accepts(self, path: tuple[int, ...]) -> bool:
        """Say whether a tuple of codewords, at most one per level, is a prefix of some item's code."""
        node = 0
        for level, code in enumerate(path):
            start, stop = int(self.starts[level][node]), int(self.starts[level][node + 1])
            found = start + int(torch.searchsorted(self.child_codes[level][start:stop].long(), code))
            if found >= stop or int(self.child_codes[level][found]) != code:
                return False
            node = found
        return True


def _narrow(numbers: np.ndarray, *kinds: type[np.integer]) -> Tensor:
    """Copy numbers, none of them negative, into the first of these types that holds them."""
    highest = int(numbers.max())
    return torch.from_numpy(numbers.astype(next(kind for kind in kinds if highest <= np.iinfo(kind).max)))

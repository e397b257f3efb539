"""`ItemTrie`: which codeword may follow which prefix, as per-level sorted arrays.

The distinct prefixes of length `l + 1` are numbered in lexicographic order; that number is the node's id at depth
`l + 1`. The children of a node are therefore one contiguous range of the next depth, so a level needs only two arrays:
where the children of each node start, and which codeword leads to each child. Child id = position; no pointers, no
state per step beyond a node id. Leaves are in the order of the sorted codes and point back to the items' rows.

Built once per code table in O(items x levels), vectorised; a node's children are found by two gathers.
"""

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.errors import CollisionError
from llm_itemtok.items.codes import ItemCodes


class ItemTrie:
    """Prefix tree over injective item codes.

    Attributes:
        starts: per level, int64 `[nodes at depth level + 1 entries]`: children of node `n` are
            `[starts[level][n], starts[level][n + 1])`. Depth 0 has one node, the root.
        child_codes: per level, int64 `[nodes at depth level + 1]`: the codeword that leads to each child.
        first_leaves: per level, int64 `[nodes at depth level + 1, and one more]`: leaves under node `n` of that depth
            are `[first_leaves[level][n], first_leaves[level][n + 1])`.
        leaf_items: int64 `[num_items]`: the item row of each leaf.
        item_leaves: int64 `[num_items]`: the leaf of each item row.
        max_children: per level, the widest node.
    """

    def __init__(self, codes: ItemCodes) -> None:
        """Build the trie.

        Raises:
            CollisionError: if two items share a code; a leaf must be one item.
        """
        if not codes.is_injective:
            raise CollisionError(
                f"a trie needs one code per item, but {codes.collision_rate:.1%} of the items share theirs; "
                "resolve collisions first (`tokenizer.collisions`)"
            )
        table = codes.table
        order = np.lexsort(table.T[::-1])
        table = table[order]
        self.sizes = codes.sizes
        self.starts: list[Tensor] = []
        self.child_codes: list[Tensor] = []
        self.first_leaves: list[Tensor] = []
        changed = np.zeros(len(table), dtype=bool)
        changed[0] = True
        parents = np.zeros(1, dtype=np.int64)  # first sorted row of each node at the current depth
        for level in range(codes.num_levels):
            changed[1:] |= table[1:, level] != table[:-1, level]
            children = np.flatnonzero(changed)
            starts = np.append(np.searchsorted(children, parents), len(children))
            self.starts.append(torch.from_numpy(starts.astype(np.int64)))
            self.child_codes.append(torch.from_numpy(table[children, level].astype(np.int64)))
            self.first_leaves.append(torch.from_numpy(np.append(children, len(table)).astype(np.int64)))
            parents = children
        self.leaf_items: Tensor = torch.from_numpy(order.astype(np.int64))
        self.item_leaves: Tensor = torch.argsort(self.leaf_items)
        self.max_children = tuple(int((starts[1:] - starts[:-1]).max()) for starts in self.starts)

    @property
    def num_levels(self) -> int:
        """Depth of the tree."""
        return len(self.starts)

    @property
    def num_items(self) -> int:
        """Leaves of the tree."""
        return len(self.leaf_items)

    def to(self, device: torch.device) -> "ItemTrie":
        """Move the arrays to a device, in place, and return self."""
        self.starts = [starts.to(device) for starts in self.starts]
        self.child_codes = [codes.to(device) for codes in self.child_codes]
        self.first_leaves = [leaves.to(device) for leaves in self.first_leaves]
        self.leaf_items, self.item_leaves = self.leaf_items.to(device), self.item_leaves.to(device)
        return self

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
        starts = self.starts[level]
        first = starts[nodes].unsqueeze(-1)
        after = starts[nodes + 1].unsqueeze(-1)
        children = first + torch.arange(self.max_children[level], device=nodes.device)
        legal = children < after
        children = children.clamp(max=len(self.child_codes[level]) - 1)
        return children, self.child_codes[level][children], legal

    def accepts(self, path: tuple[int, ...]) -> bool:
        """Say whether a tuple of codewords, at most one per level, is a prefix of some item's code."""
        node = 0
        for level, code in enumerate(path):
            start, stop = int(self.starts[level][node]), int(self.starts[level][node + 1])
            found = start + int(torch.searchsorted(self.child_codes[level][start:stop].contiguous(), code))
            if found >= stop or int(self.child_codes[level][found]) != code:
                return False
            node = found
        return True

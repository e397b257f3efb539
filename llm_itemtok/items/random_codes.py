"""Random codes: the control that tells how much a tokenizer's meaning is worth.

Balanced at every level and distinct whenever there are enough codes, so that a comparison with learned codes is about
what the codes mean, not about how evenly they are used or how often they collide.
"""

from typing import final

import numpy as np

from llm_itemtok.items.base import ItemTokenizer, check_codebook_shape
from llm_itemtok.items.codes import ItemCodes


@final
class RandomCodes(ItemTokenizer):
    """Item tokenizer that deals codewords out at random, evenly."""

    def __init__(self, *, levels: int = 3, codebook_size: int = 256, seed: int = 0) -> None:
        """Set the shape of the codes.

        Args:
            levels: number of levels, at least 1.
            codebook_size: codewords a level, at least 1.
            seed: the same seed gives the same codes.

        Raises:
            DataError: if a number is below 1.
        """
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        self.levels = levels
        self.codebook_size = codebook_size
        self.seed = seed

    def fit(self, vectors: np.ndarray) -> ItemCodes:
        """Make codes for as many items as there are vectors; their values are not looked at."""
        return self.deal(len(vectors))

    def deal(self, num_items: int) -> ItemCodes:
        """Make codes for a number of items.

        At each level the items are put in the order of their prefixes, at random within one, and codewords are dealt
        in turn, as cards: a codeword is used equally often (give or take one) in all and under each prefix. So codes
        repeat only when there are more items than codes.

        Args:
            num_items: number of items, at least 1.

        Returns:
            Codes; distinct when `codebook_size ** levels >= num_items`.
        """
        rng = np.random.default_rng(self.seed)
        table = np.zeros((num_items, self.levels), dtype=np.int32)
        sizes = (self.codebook_size,) * self.levels
        for level in range(self.levels):
            deck = rng.permutation(self.codebook_size)
            shuffled = rng.permutation(num_items)
            groups = ItemCodes(table, sizes).prefix_groups(level)
            order = shuffled[np.argsort(groups[shuffled], kind="stable")]
            table[order, level] = deck[np.arange(num_items) % self.codebook_size]
        settings = {"levels": self.levels, "codebook_size": self.codebook_size, "seed": self.seed}
        return ItemCodes(table, sizes, provenance={"tokenizer": {"kind": "random", **settings}})

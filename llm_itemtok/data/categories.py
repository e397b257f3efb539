"""Category lists: which entry of them tells items apart.

Category lists are paths from coarse to fine in many catalogues, and their first entry may be the shop's name on every
item.
"""

from collections import Counter
from collections.abc import Sequence

MOST_ALIKE = 0.9
"""A place of the lists where one category holds more than this share tells nothing apart."""


def telling_place(categories: Sequence[Sequence[str]]) -> int:
    """Find the first place of the category lists that tells items apart.

    A place does if at least half of the items with categories have it and no category holds more than nine tenths of
    those; where no place does, the first is taken.

    Args:
        categories: of each item, coarse first; empty where an item has none.
    """
    known = sum(map(bool, categories))
    for place in range(max(map(len, categories), default=0)):
        counts = Counter(parts[place] for parts in categories if len(parts) > place)
        if counts.total() >= known / 2 and max(counts.values()) <= MOST_ALIKE * counts.total():
            return place
    return 0

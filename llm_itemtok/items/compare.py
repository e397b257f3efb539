"""Two tables of codes for the same items: what moved.

Decisions:
- Codewords are compared as they are, which is what counts for a model that was trained on the one and is given the
  other. Two fits number their codewords as they like, so how far both put the same items together is told besides, by
  the adjusted Rand index, which no numbering changes.
- The biggest movers are those that keep the shortest prefix, then those with most codewords changed, then the first in
  the catalogue.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.codes import ItemCodes

BIGGEST = 10
"""Movers that are named."""


def compare_codes(old: ItemCodes, new: ItemCodes) -> dict[str, Any]:
    """Say what moved from one table to the other.

    Args:
        old: N items.
        new: of the same items in the same order; levels beyond those of `old` are not looked at, nor the reverse.

    Returns:
        Plain JSON values: `items`; `moved`, those with another code (also where one table has more levels: in those
        that both have); `kept`, items by the length of the prefix that is the same in both, from 0 to the number of
        common levels; `levels`, for each common one its `name`, `churn`, the share of items with another codeword
        there, and `together`, the adjusted Rand index of the prefixes that end there (1: both put the same items
        together, 0: no more than chance); `movers`, rows of the items that moved most.

    Raises:
        ArtifactError: if the tables are of different numbers of items.
    """
    if old.num_items != new.num_items:
        raise ArtifactError(
            f"codes to compare must be of the same items, was: {old.num_items:,} items and {new.num_items:,}"
        )
    shared = min(old.num_levels, new.num_levels)
    differs = old.table[:, :shared] != new.table[:, :shared]
    kept = np.where(differs.any(axis=1), differs.argmax(axis=1), shared)
    rows = np.flatnonzero(kept < shared)
    order = np.lexsort((rows, -differs[rows].sum(axis=1), kept[rows]))
    return {
        "items": old.num_items,
        "moved": len(rows),
        "kept": np.bincount(kept, minlength=shared + 1).tolist(),
        "levels": [
            {
                "name": new.names[level],
                "churn": float(differs[:, level].mean()),
                "together": float(adjusted_rand_score(old.prefix_groups(level + 1), new.prefix_groups(level + 1))),
            }
            for level in range(shared)
        ],
        "movers": rows[order[:BIGGEST]].tolist(),
    }


def comparison_text(found: dict[str, Any], old: ItemCodes, new: ItemCodes, labels: Sequence[str]) -> str:
    """The result of `compare_codes` as text.

    Args:
        found: what it returned.
        old: as there.
        new: as there.
        labels: of the items, N of them.
    """
    shares = np.cumsum(found["kept"][::-1])[::-1] / found["items"]
    same = ", ".join(f"{share:.1%} to level {level}" for level, share in enumerate(shares[1:].tolist(), start=1))
    lines = [
        f"Items with the same code in both: {same}.",
        f"Items that moved: {found['moved']:,} of {found['items']:,} ({found['moved'] / found['items']:.1%}).",
    ]
    for level in found["levels"]:
        lines.append(
            f"  {level['name']}: {level['churn']:.1%} have another codeword; both put the same items together to "
            f"{level['together']:.2f} (1: all, 0: chance)"
        )
    if found["moved"]:
        by_length = ", ".join(f"{count:,} keep {length}" for length, count in enumerate(found["kept"][:-1]) if count)
        lines.append(f"Of those that moved, by codewords of their prefix: {by_length}.")
        lines.append("Moved most:")
        lines += [f"  {labels[row]}: {_spelled(old, row)} → {_spelled(new, row)}" for row in found["movers"]]
    return "\n".join(lines)


def _spelled(codes: ItemCodes, row: int) -> str:
    return " ".join(map(str, codes.table[row].tolist()))

"""Two tables of codes for the same items: what moved.

Decisions:
- Codewords are compared as they are, which is what counts for a model that was trained on the one and is given the
  other. Two fits number their codewords as they like, so how far both put the same items together is told besides, by
  the adjusted Rand index, which no numbering changes. Where every item of a table has a prefix of its own nothing is
  together, and two such tables would agree whatever they are: there it is not told.
- Of codes in existing words, words are compared and not the numbers that stand for them.
- The biggest movers are those that keep the shortest prefix, then those with most codewords changed, then the first in
  the catalogue.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.printable import one_line

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
        together, 0: no more than chance; None where no two items of one of the tables share one); `movers`, rows of
        the items that moved most.

    Raises:
        ArtifactError: if the tables are of different numbers of items.
    """
    if old.num_items != new.num_items:
        raise ArtifactError(
            f"codes to compare must be of the same items, was: {old.num_items:,} items and {new.num_items:,}"
        )
    shared = min(old.num_levels, new.num_levels)
    old_table, new_table = _comparable(old, new, shared)
    differs = old_table != new_table
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
                "together": _together(old.prefix_groups(level + 1), new.prefix_groups(level + 1)),
            }
            for level in range(shared)
        ],
        "movers": rows[order[:BIGGEST]].tolist(),
    }


def _comparable(old: ItemCodes, new: ItemCodes, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """The first levels of both tables, int64 `[N, shared]`, in numbers that mean the same in both."""
    tables = []
    known: list[dict[str, int]] = [{} for _ in range(shared)]
    for codes in (old, new):
        table = codes.table[:, :shared].astype(np.int64)
        for level, words in enumerate(codes.words[:shared] if codes.words is not None else ()):
            numbers = known[level]
            # Below zero, so that a word is no codeword that is a token of its own.
            table[:, level] = np.array([-1 - numbers.setdefault(word, len(numbers)) for word in words])[table[:, level]]
        tables.append(table)
    return tables[0], tables[1]


def _together(old: np.ndarray, new: np.ndarray) -> float | None:
    """Adjusted Rand index of two groupings, numbered from 0; None where one has nothing but groups of one."""
    if max(int(old.max()), int(new.max())) + 1 == len(old):
        return None
    return float(adjusted_rand_score(old, new))


def movement_sentences(found: Mapping[str, Any]) -> list[str]:
    """The result of `compare_codes` in sentences; levels and movers are left out."""
    shares = np.cumsum(found["kept"][::-1])[::-1] / found["items"]
    same = ", ".join(f"{share:.1%} to level {level}" for level, share in enumerate(shares[1:].tolist(), start=1))
    sentences = [
        f"Items with the same code in both: {same}.",
        f"Items that moved: {found['moved']:,} of {found['items']:,} ({found['moved'] / found['items']:.1%}).",
    ]
    if found["moved"]:
        by_length = ", ".join(f"{count:,} keep {length}" for length, count in enumerate(found["kept"][:-1]) if count)
        sentences.append(f"Of those that moved, by codewords of their prefix: {by_length}.")
    return sentences


def comparison_text(found: Mapping[str, Any], old: ItemCodes, new: ItemCodes, labels: Sequence[str]) -> str:
    """The result of `compare_codes` as text.

    Args:
        found: what it returned.
        old: as there.
        new: as there.
        labels: of the items, N of them.
    """
    lines = movement_sentences(found)
    for level in found["levels"]:
        told = "one of the two gives every item a prefix of its own here, so nothing is put together"
        if level["together"] is not None:
            told = f"both put the same items together to {level['together']:.2f} (1: all, 0: chance)"
        lines.append(f"  {level['name']}: {level['churn']:.1%} have another codeword; {told}")
    if found["moved"]:
        lines.append("Moved most:")
        rows = found["movers"]
        lines += [one_line(f"  {labels[row]}: {_spelled(old, row)} → {_spelled(new, row)}") for row in rows]
    return "\n".join(lines)


def _spelled(codes: ItemCodes, row: int) -> str:
    code = codes.table[row].tolist()
    if codes.words is not None:
        return " ".join(filter(None, (words[word] for words, word in zip(codes.words, code, strict=True))))
    return " ".join(map(str, code))

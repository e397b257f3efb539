"""The item-token doctor: what a table of codes does to items, beyond how evenly it is used.

`quality` counts codewords. This module asks what prefixes mean: do items that are near each other, by their vectors or
in training sequences, share them, more than chance would have it? Do they follow the categories? Do popular items
crowd? How much room is left? `findings` turns the numbers into advice.

Decisions:
- Every figure stands beside what chance would give, because a level with few codewords in use puts everything together.
  For pairs of neighbours, chance pairs the same items at random, so that popular neighbours do not look like meaning.
- Interactions are those of training only; whoever calls this hands over nothing else.

Shape letters in this file: N items, L levels, P pairs of neighbours, C categories.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_itemtok.data.categories import telling_place
from llm_itemtok.data.splits import head_items
from llm_itemtok.items.codes import ItemCodes

SHUFFLES = 5
"""Random orders of the categories that chance purity is the mean of."""

_NEAR = {"vectors": "nearest by item vectors", "training": "near each other in training"}


def examine(
    codes: ItemCodes,
    *,
    near: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    item_counts: np.ndarray | None = None,
    categories: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Measure what prefixes mean.

    Args:
        codes: N items, as they are in use.
        near: what made items neighbours (`vectors`, `training`) → rows of items and of their neighbours, int64 `[P]`
            each.
        item_counts: int64 `[N]`, training interactions of each item.
        categories: of each item, coarse first; empty where an item has none.

    Returns:
        Plain JSON values: `sha256` of the codes, `room` (see `room_left`; left out where codewords are existing words),
        and as far as it is known `neighbours` (`shared_prefixes` by what made items neighbours), `purity` (see
        `category_purity`) and `popularity` (see `head_and_tail`).
    """
    facts: dict[str, Any] = {"sha256": codes.sha256} | ({"room": room_left(codes)} if codes.words is None else {})
    pairs = {name: rows for name, rows in (near or {}).items() if len(rows[0])}
    if pairs:
        facts["neighbours"] = {name: shared_prefixes(codes, *rows) for name, rows in pairs.items()}
    if categories is not None and any(categories):
        facts["purity"] = category_purity(codes, categories)
    if item_counts is not None and item_counts.any():
        facts["popularity"] = head_and_tail(codes, item_counts)
    return facts


def judged_depths(codes: ItemCodes) -> range:
    """Lengths of prefix, from 1, that say something: before a level that only counts, and while items share them."""
    last = codes.num_describing_levels
    shared = [depth for depth in range(1, last + 1) if len(codes.prefix_counts(depth)[1]) < codes.num_items]
    return range(1, max(shared, default=0) + 1)


def shared_prefixes(codes: ItemCodes, items: np.ndarray, neighbours: np.ndarray) -> list[dict[str, float]]:
    """Say how many neighbours share a prefix.

    Args:
        codes: N items.
        items: int64 `[P]`, rows; P at least 1.
        neighbours: int64 `[P]`, the row of a neighbour of each; never the item itself.

    Returns:
        For each length of prefix: `depth`, `share` of the pairs, and `chance`, the share were the same items and the
        same neighbours paired at random (an item never with itself).
    """
    item_shares = np.bincount(items, minlength=codes.num_items) / len(items)
    neighbour_shares = np.bincount(neighbours, minlength=codes.num_items) / len(items)
    itself = float(item_shares @ neighbour_shares)
    result = []
    for depth in judged_depths(codes):
        groups = codes.prefix_groups(depth)
        together = float(np.bincount(groups, item_shares) @ np.bincount(groups, neighbour_shares))
        share = float((groups[items] == groups[neighbours]).mean())
        chance = max(0.0, (together - itself) / (1 - itself)) if itself < 1 else 0.0
        result.append({"depth": depth, "share": share, "chance": chance})
    return result


def category_purity(codes: ItemCodes, categories: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Say how far prefixes follow the categories.

    Args:
        codes: N items.
        categories: of each item, coarse first; at least one item has some.

    Returns:
        `place` of the category lists that was taken, the first that tells items apart; `categories`, how many there
        are; `items` that have one; and `levels`, for each length of prefix `depth`, `share` of those items that are of
        the most frequent category of their prefix, and `chance`, the mean of that over random orders of the categories.
    """
    place = telling_place(categories)
    rows = np.array([row for row, parts in enumerate(categories) if len(parts) > place], dtype=np.int64)
    names, numbers = np.unique([categories[row][place] for row in rows], return_inverse=True)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(rows)) for _ in range(SHUFFLES)]
    levels = []
    for depth in judged_depths(codes):
        groups = codes.prefix_groups(depth)[rows]
        chance = float(np.mean([_purity(groups, numbers[order]) for order in orders]))
        levels.append({"depth": depth, "share": _purity(groups, numbers), "chance": chance})
    return {"place": place, "categories": len(names), "items": len(rows), "levels": levels}


def _purity(groups: np.ndarray, numbers: np.ndarray) -> float:
    """Share of items that are of the most frequent number of their group."""
    keys, counts = np.unique(groups * (int(numbers.max()) + 1) + numbers, return_counts=True)
    starts = np.flatnonzero(np.diff(keys // (int(numbers.max()) + 1), prepend=-1))
    return float(np.maximum.reduceat(counts, starts).sum() / len(groups))


def head_and_tail(codes: ItemCodes, item_counts: np.ndarray) -> dict[str, Any]:
    """Say how popular items are spread over codewords.

    Args:
        codes: N items.
        item_counts: int64 `[N]`, training interactions of each, not all zero.

    Returns:
        `head` and `tail`, numbers of items (the head are the 20 % with most interactions, as far as they have any), and
        `levels`: for each its `name` and the perplexity of its codewords over items of the `head`, of the `tail`, over
        `sample`, as many items as the head has, drawn from all, and over `interactions`; with `fullest`, the share of
        the interactions that go to its most frequent codeword.
    """
    of_head = head_items(item_counts)
    head, tail = np.flatnonzero(of_head), np.flatnonzero(~of_head)
    sample = np.random.default_rng(0).choice(codes.num_items, len(head), replace=False)
    levels = []
    for name, column in zip(codes.names, codes.table.T, strict=True):
        weights = np.bincount(column, item_counts)
        figures = {"head": column[head], "tail": column[tail], "sample": column[sample]}
        levels.append(
            {"name": name}
            | {part: _perplexity(np.bincount(words)) for part, words in figures.items()}
            | {"interactions": _perplexity(weights), "fullest": float(weights.max() / weights.sum())}
        )
    return {"head": len(head), "tail": len(tail), "levels": levels}


def _perplexity(counts: np.ndarray) -> float:
    if not counts.any():
        return 0.0
    shares = counts[counts > 0] / counts.sum()
    return float(2.0 ** -(shares * np.log2(shares)).sum())


def room_left(codes: ItemCodes) -> dict[str, float]:
    """Say how much room codes have.

    Returns:
        `times`, how many codes there is room for, as a multiple of the items; `fullest`, the largest share of the codes
        under a prefix of all codewords but the last that is taken.
    """
    above = codes.prefix_counts(codes.num_levels - 1)[1]
    # A float, because the capacity has no bound; what is beyond floats is not worth telling.
    return {
        "times": min(codes.capacity / codes.num_items, 1e300),
        "fullest": float(min(above.max() / codes.sizes[-1], 1.0)),
    }


def facts_text(facts: Mapping[str, Any]) -> str:
    """What `examine` found, a line a figure."""
    lines = []
    rows = {_NEAR.get(name, name): figures for name, figures in facts.get("neighbours", {}).items()}
    if "purity" in facts:
        rows[f"of the most frequent of {facts['purity']['categories']} categories"] = facts["purity"]["levels"]
    if depths := max((len(figures) for figures in rows.values()), default=0):
        header = ["items that share a prefix (by chance)", *(f"length {depth}" for depth in range(1, depths + 1))]
        cells = [[name, *map(_beside_chance, figures)] for name, figures in rows.items()]
        widths = [max(len(row[place]) for row in (header, *cells)) for place in range(depths + 1)]
        for row in (header, *cells):
            lines.append("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())
    for level in [level for level in facts.get("popularity", {}).get("levels", []) if level["sample"] > 1][:1]:
        lines.append(
            f"{level['name']} is used as if it had {level['head']:,.0f} codewords by popular items, "
            f"{level['sample']:,.0f} by as many of all, {level['tail']:,.0f} by the others, "
            f"{level['interactions']:,.0f} by interactions, of which its fullest gets {level['fullest']:.1%}"
        )
    if error := facts.get("reconstruction_error"):
        lines.append(
            f"error of rebuilt vectors: {error['after']:.1%} of the variance, {error['before']:.1%} before resolution"
            + (" (codebooks estimated from the vectors)" if error.get("estimated") else "")
        )
    if room := facts.get("room"):
        lines.append(
            f"room: {room['times']:,.1f} codes an item; of those under the fullest prefix before the last level, "
            f"{room['fullest']:.0%} are taken"
        )
    return "\n".join(lines)


def _beside_chance(row: Mapping[str, float]) -> str:
    return f"{row['share']:.1%} ({row['chance']:.2%})"

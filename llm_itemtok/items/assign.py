"""New codes for items out of candidates: never two items on one code, few moves, high likelihood.

A method says how likely candidate codes of an item are, and how likely the code is that it has; here is decided who
gets what. What is maximised is the sum of the items' log-likelihoods, less a price for each item that moves.

- `greedy`: candidates are gone through from the highest log-likelihood down, so confident items choose first; one is
  taken if its code is free and the item is better off by more than the price. Codes that were left are free for the
  others, so there are more sweeps until nothing changes. An item never loses its code to another.
- `matching`: the best sum there is. Items can change places, and one may have to take less for the others' good. Takes
  seconds for ten thousand items, and about as the square of their number: a million are for `greedy`.

Decisions:
- Keeping everything is always possible, so nothing is ever refused; items without candidates stay.
- Ties go to the lower row, then to the candidate that stands first, so that the same input gives the same codes.
- With a limit on moves, `greedy` stops at it. `matching` is solved once without; if it moves too many, only those that
  gain most may move, and it is solved again.

Pure NumPy and SciPy: knows nothing of models, vectors or where log-likelihoods come from.

Shape letters in this file: N items, L levels, E candidates of all items together, C distinct codes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ItemCodes

Method = Literal["greedy", "matching"]


@dataclass(frozen=True)
class Candidates:
    """Codes that items may get, in any order.

    Attributes:
        items: int64 `[E]`, rows of items.
        codes: int32 `[E, L]`.
        log_likelihoods: float32 `[E]`, in nats, finite.
        keep: float32 `[N]`, log-likelihood of the code that each item has; read for items with candidates only.
    """

    items: np.ndarray
    codes: np.ndarray
    log_likelihoods: np.ndarray
    keep: np.ndarray

    def of(self, rows: np.ndarray) -> "Candidates":
        """The candidates of some items alone."""
        chosen = np.zeros(len(self.keep), dtype=bool)
        chosen[rows] = True
        own = chosen[self.items]
        return Candidates(self.items[own], self.codes[own], self.log_likelihoods[own], self.keep)


@dataclass(frozen=True)
class Assignment:
    """Who gets which code.

    Attributes:
        table: int32 `[N, L]`, distinct rows.
        moved: int64 `[M]`, rows of the items whose code is another now, ascending.
        before: float32 `[M]`, log-likelihood of the code that each of them had.
        after: float32 `[M]`, that of the one it has now.
        collisions: share of all items that would share a code if each had the best one known for it, in `[0, 1]`:
            what there was to resolve.
    """

    table: np.ndarray
    moved: np.ndarray
    before: np.ndarray
    after: np.ndarray
    collisions: float


def assign(
    codes: ItemCodes, candidates: Candidates, *, method: Method = "greedy", price: float = 0.0, max_moves: int
) -> Assignment:
    """Give items the codes that suit them, each code to one item.

    Args:
        codes: N items, unique.
        candidates: of some of them; codewords within the level sizes. An item's own code may be among them.
        method: `greedy` or `matching`, see the module.
        price: nats that a move must be worth, at least 0.
        max_moves: items that may move at most.

    Raises:
        DataError: if two items share a code already, or candidates do not fit the codes.
    """
    _check(codes, candidates)
    edges = _Edges.of(codes, candidates)
    solve = _greedy if method == "greedy" else _matching
    chosen = solve(edges, price, max_moves)
    moved = np.flatnonzero(chosen >= 0)
    table = codes.table.copy()
    table[moved] = candidates.codes[edges.places[chosen[moved]]]
    return Assignment(
        table=table,
        moved=moved,
        before=candidates.keep[moved],
        after=edges.values[chosen[moved]].astype(np.float32),
        collisions=_collisions(edges),
    )


def _check(codes: ItemCodes, candidates: Candidates) -> None:
    if not codes.is_injective:
        raise DataError(
            f"codes to assign anew must be unique, but {codes.collision_rate:.1%} of the items share theirs; resolve "
            "collisions first"
        )
    table, rows = candidates.codes, candidates.items
    if table.shape != (len(rows), codes.num_levels) or candidates.log_likelihoods.shape != rows.shape:
        raise DataError(
            f"candidates must have one code of {codes.num_levels} levels and one log-likelihood each, was: "
            f"{len(rows)} items, codes {table.shape}, log-likelihoods {candidates.log_likelihoods.shape}"
        )
    if candidates.keep.shape != (codes.num_items,):
        raise DataError(
            f"there must be one log-likelihood of keeping an item, {codes.num_items:,}, was: {candidates.keep.shape}"
        )
    if not len(rows):
        return
    if rows.min() < 0 or rows.max() >= codes.num_items or (table < 0).any() or (table >= codes.sizes).any():
        raise DataError(
            f"candidates must be of catalogue rows in [0, {codes.num_items}) with codewords below {codes.sizes}, found "
            f"others: rows {rows.min()} to {rows.max()}, codewords {table.min(0)} to {table.max(0)}"
        )
    if not (np.isfinite(candidates.log_likelihoods).all() and np.isfinite(candidates.keep[rows]).all()):
        raise DataError("log-likelihoods of candidates must be finite numbers, found others")


@dataclass(frozen=True)
class _Edges:
    """Candidates that are moves, the most likely first; each pair of item and code once.

    Attributes:
        places: int64 `[E]`, where each stands among the candidates that were given.
        items: int64 `[E]`.
        columns: int64 `[E]`, number of the code, in `[0, C)`.
        values: float64 `[E]`, log-likelihoods, falling.
        keep: float64 `[N]`.
        own: int64 `[N]`, number of the code that each item has.
        num_codes: C.
    """

    places: np.ndarray
    items: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    keep: np.ndarray
    own: np.ndarray
    num_codes: int

    @classmethod
    def of(cls, codes: ItemCodes, candidates: Candidates) -> "_Edges":
        both = np.concatenate([codes.table, candidates.codes.astype(np.int32, copy=False)])
        numbers = ItemCodes(both, codes.sizes).prefix_groups(codes.num_levels)
        own, columns = numbers[: codes.num_items], numbers[codes.num_items :]
        items, values = candidates.items, candidates.log_likelihoods.astype(np.float64)
        order = np.lexsort((np.arange(len(items)), items, -values))
        order = order[columns[order] != own[items[order]]]
        num_codes = int(numbers.max()) + 1
        first = np.unique(items[order] * num_codes + columns[order], return_index=True)[1]
        order = order[np.sort(first)]
        keep = candidates.keep.astype(np.float64)
        return cls(order, items[order], columns[order], values[order], keep, own, num_codes)

    def some(self, which: np.ndarray) -> "_Edges":
        """Some of the edges, bool `[E]` or places in their order."""
        return _Edges(
            self.places[which],
            self.items[which],
            self.columns[which],
            self.values[which],
            self.keep,
            self.own,
            self.num_codes,
        )


def _collisions(edges: _Edges) -> float:
    """Share of the items that would share a code if each had its best: a candidate, or the code that it has."""
    rows, first = np.unique(edges.items, return_index=True)
    better = edges.values[first] > edges.keep[rows]
    wanted = edges.own.copy()
    wanted[rows[better]] = edges.columns[first[better]]
    return float((np.bincount(wanted)[wanted] > 1).mean())


def _greedy(edges: _Edges, price: float, max_moves: int) -> np.ndarray:
    """The edge that each item takes, int64 `[N]`; -1 for those that stay."""
    chosen = np.full(len(edges.own), -1, dtype=np.int64)
    value = edges.keep + price  # what a candidate must exceed
    holder = np.full(edges.num_codes, -1, dtype=np.int64)
    holder[edges.own] = np.arange(len(edges.own))
    held, moves = edges.own.copy(), 0
    while True:
        # One sweep looks at what is free now; what becomes free in it is for the next.
        open_now = (holder[edges.columns] < 0) & (edges.values > value[edges.items])
        if moves >= max_moves:
            open_now &= chosen[edges.items] >= 0
        taken, settled = set(), set()
        for place, item, column in zip(
            np.flatnonzero(open_now).tolist(),
            edges.items[open_now].tolist(),
            edges.columns[open_now].tolist(),
            strict=True,
        ):
            if column in taken or item in settled or (moves >= max_moves and chosen[item] < 0):
                continue
            moves += int(chosen[item] < 0)
            holder[held[item]], holder[column], held[item] = -1, item, column
            chosen[item], value[item] = place, edges.values[place]
            taken.add(column)
            settled.add(item)
        if not taken:
            return chosen


def _matching(edges: _Edges, price: float, max_moves: int) -> np.ndarray:
    """As `_greedy`, the best there is."""
    chosen = _matched(edges, price)
    moved = np.flatnonzero(chosen >= 0)
    if len(moved) > max_moves:
        gains = edges.values[chosen[moved]] - edges.keep[moved]
        allowed = np.zeros(len(chosen), dtype=bool)
        allowed[moved[np.argsort(-gains, kind="stable")[:max_moves]]] = True
        kept = np.flatnonzero(allowed[edges.items])
        again = _matched(edges.some(kept), price)
        chosen = np.where(again >= 0, kept[again] if len(kept) else -1, -1)
    return chosen


def _matched(edges: _Edges, price: float) -> np.ndarray:
    """The edge that each item takes in the best matching, int64 `[N]`; -1 for those that stay.

    Source: Jonker and Volgenant 1987 (doi:10.1007/BF02278710), in SciPy's version for sparse candidates.
    """
    chosen = np.full(len(edges.own), -1, dtype=np.int64)
    rows = np.unique(edges.items)
    if not len(rows):
        return chosen
    fixed = np.zeros(edges.num_codes, dtype=bool)  # codes of items without candidates are out of reach
    fixed[edges.own] = True
    fixed[edges.own[rows]] = False
    places = np.flatnonzero(~fixed[edges.columns])
    items = np.concatenate([edges.items[places], rows])
    names, columns = np.unique(np.concatenate([edges.columns[places], edges.own[rows]]), return_inverse=True)
    values = np.concatenate([edges.values[places] - price, edges.keep[rows]])
    # An explicit zero would be no edge at all; the same for all, the 1 changes nothing about which is best.
    costs = values.max() - values + 1.0
    graph = csr_array((costs, (np.searchsorted(rows, items), columns)), shape=(len(rows), len(names)))
    row_of, column_of = min_weight_full_bipartite_matching(graph)
    taken = np.full(len(rows), -1, dtype=np.int64)
    taken[row_of] = column_of
    fits = np.flatnonzero(columns[: len(places)] == taken[np.searchsorted(rows, edges.items[places])])
    chosen[edges.items[places[fits]]] = places[fits]
    return chosen

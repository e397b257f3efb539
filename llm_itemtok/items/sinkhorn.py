"""Sinkhorn's iteration: items spread over codewords, all items of a prefix at once.

Entropic optimal transport between the items of a prefix and its free codewords, batched over prefixes. Every item has
a mass of 1 and every codeword room for 1; what room the items leave is taken up by one more row, which likes all
codewords alike. Without it, as where Sinkhorn's iteration is used to balance whole batches, two items would have to
fill 256 codewords evenly.

Source: Cuturi 2013 (arXiv:1306.0895); its use for item tokens as in LC-Rec, Zheng et al. 2023 (arXiv:2311.09049).

Shape letters in this file: M items, P prefixes, K codewords, B prefixes of a batch, W most items of one of them.
"""

from collections.abc import Iterator

import numpy as np

SHARPNESS = 0.02
"""Weight of the entropy, for distances that are scaled to [-1, 1] within each prefix.

On Beauty (3 x 256, MiniLM vectors) the moves then cost 4 % more than the best there are; 0.01 has not settled after
`ITERATIONS` (96 % more), and 0.1 is as costly as moving one item after the other (15 % more).
"""

ITERATIONS = 50
_BLOCK = 4_000_000  # numbers of a batch, which bounds the memory to a few times 32 MB


def sinkhorn_choices(distances: np.ndarray, prefixes: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Choose a codeword for each item.

    Args:
        distances: float `[M, K]`, of items to codewords.
        prefixes: int64 `[M]`, the prefix of each item, in `[0, P)`.
        free: bool `[P, K]`, codewords that may be chosen after each prefix.

    Returns:
        int64 `[M]`: the free codeword with the largest share of the item's mass, the lowest on a tie; -1 where a prefix
        has none. Two items may choose the same.
    """
    words = np.full(len(prefixes), -1, dtype=np.int64)
    for rows, used in _batches(prefixes, free.shape[1]):
        known = rows >= 0
        open_BK = free[prefixes[rows[:, 0]]]
        cost_BWK = np.where(known[:, :, None] & open_BK[:, None], distances[rows], np.nan)
        shares_BWK = _transport(cost_BWK, used, open_BK)
        found = np.where(open_BK.any(axis=1)[:, None], shares_BWK.argmax(axis=2), -1)
        words[rows[known]] = found[known]
    return words


def _batches(prefixes: np.ndarray, num_codewords: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prefixes with about as many items together: rows `[B, W]`, -1 for none, and how many rows are items `[B]`."""
    order = np.argsort(prefixes, kind="stable")
    starts = np.flatnonzero(np.diff(prefixes[order], prepend=-1))
    counts = np.diff(starts, append=len(order))
    widths = 2 ** np.ceil(np.log2(counts)).astype(np.int64)
    for width in np.unique(widths).tolist():
        alike = np.flatnonzero(widths == width)
        together = max(1, _BLOCK // (width * num_codewords))
        for begin in range(0, len(alike), together):
            chosen = alike[begin : begin + together]
            inside = np.arange(width) < counts[chosen, None]
            places = np.minimum(starts[chosen, None] + np.arange(width), len(order) - 1)
            yield np.where(inside, order[places], -1), counts[chosen]


def _transport(cost_BWK: np.ndarray, used_B: np.ndarray, open_BK: np.ndarray) -> np.ndarray:
    """Shares of each item's mass, float64 `[B, W, K]`; a cost that is NaN cannot be paid."""
    payable = ~np.isnan(cost_BWK)
    low = np.where(payable, cost_BWK, np.inf).min(axis=(1, 2), keepdims=True)
    high = np.where(payable, cost_BWK, -np.inf).max(axis=(1, 2), keepdims=True)
    with np.errstate(invalid="ignore"):  # of a prefix without a free codeword nothing is payable
        scaled = (2 * cost_BWK - high - low) / np.maximum(high - low, 1e-12)
    plan = np.where(payable, np.exp(-np.where(payable, scaled, 0.0) / SHARPNESS), 0.0)
    room_B = open_BK.sum(axis=1)
    slack_B = np.maximum(room_B - used_B, 0)
    rest_B1K = open_BK[:, None].astype(np.float64)
    most_B11 = np.maximum(used_B / np.maximum(room_B, 1), 1.0)[:, None, None]
    for _ in range(ITERATIONS):
        _scale(plan, plan.sum(axis=2, keepdims=True), 1.0)
        _scale(rest_B1K, rest_B1K.sum(axis=2, keepdims=True), slack_B[:, None, None])
        columns = plan.sum(axis=1, keepdims=True) + rest_B1K
        _scale(plan, columns, most_B11)
        _scale(rest_B1K, columns, most_B11)
    return plan


def _scale(plan: np.ndarray, sums: np.ndarray, wanted: np.ndarray | float) -> None:
    """Bring sums to what is wanted, in place; where there is nothing, nothing becomes of it."""
    plan *= np.divide(wanted, sums, out=np.zeros(np.broadcast_shapes(np.shape(wanted), sums.shape)), where=sums > 0)

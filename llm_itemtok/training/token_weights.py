"""How much each token of an item tells: tables of weights over items and levels.

A weighting is a table `[N, L]`, one weight for each token of each item, made of the current codes and of what training
may see: item vectors, and how often each item is a training target. Nothing here is learned and nothing depends on a
batch, so a weight is the same wherever its token stands, and a change of the codes needs a new table and nothing else.

Every table has mean 1: over the tokens of each item where it only shares weight out among them, over the training
targets where items as a whole may count differently. So tokens of text, which weigh 1, keep their say beside them.

Source: front-greater and frequency weights as in the code released with arXiv:2601.17787; position weights as in
arXiv:2410.22809 (equation for omega), information gains as in arXiv:2506.13229, both as that release runs them. Where
we differ: weights sum to the number of an item's tokens, whatever it is (the release: to 4), and there is no end token.
`prefix_gains` and `entropy_gains` are ours.

Shape letters: N items, L levels, D dimensions of the item vectors. Knows codes, vectors and counts; no torch.
"""

import numpy as np

from llm_itemtok.items.codes import ItemCodes

_BLOCK = 64
"""Dimensions of the item vectors worked on at a time, which bounds memory."""
_NO_GAIN = 1e-9
"""Gains up to here are rounding."""


def counted(codes: ItemCodes) -> np.ndarray:
    """Which levels hold a token of each item: bool `[N, L]`, all true unless identifiers are words of a text."""
    held: np.ndarray = np.arange(codes.num_levels) < codes.lengths[:, None]
    return held


def distances(codes: ItemCodes, vectors: np.ndarray, depth: int) -> np.ndarray:
    """Euclidean distance, float64 `[N]`, of each item vector to the mean of all that share its first `depth` codewords.

    Args:
        codes: N items.
        vectors: `[N, D]`.
        depth: in `[0, L]`; 0 puts all items together.
    """
    rows, first = codes.sorted_rows(depth)
    starts = np.flatnonzero(first)
    group = np.empty(len(rows), dtype=np.int64)
    group[rows] = np.cumsum(first) - 1
    sizes = np.diff(starts, append=len(rows))[:, None]
    squares = np.zeros(len(rows))
    for at in range(0, vectors.shape[1], _BLOCK):
        part = vectors[:, at : at + _BLOCK].astype(np.float64)
        means = np.add.reduceat(part[rows], starts) / sizes
        squares += ((part - means[group]) ** 2).sum(axis=1)
    return np.sqrt(squares)


def dispersions(codes: ItemCodes, vectors: np.ndarray) -> np.ndarray:
    """Mean distance within prefixes, float64 `[L + 1]`: among all items, then under one, two, ... codewords."""
    return np.array([distances(codes, vectors, depth).mean() for depth in range(codes.num_levels + 1)])


def level_gains(codes: ItemCodes, vectors: np.ndarray) -> np.ndarray:
    """How much each level's codeword narrows the item vectors down, float64 `[L]`: the drop in mean distance."""
    return -np.diff(dispersions(codes, vectors))


def prefix_gains(codes: ItemCodes, vectors: np.ndarray) -> np.ndarray:
    """As `level_gains`, for the prefix at hand: float64 `[N, L]`, the drop among the items that share it.

    The mean of a level's column over all items is that level's gain.
    """
    gains = np.empty((codes.num_items, codes.num_levels))
    outer = distances(codes, vectors, 0)
    for level in range(codes.num_levels):
        inner = distances(codes, vectors, level + 1)
        group = codes.prefix_groups(level)
        gains[:, level] = (np.bincount(group, outer - inner) / np.bincount(group))[group]
        outer = inner
    return gains


def entropy_gains(codes: ItemCodes, targets: np.ndarray) -> np.ndarray:
    """How much each level's codeword leaves less open, float64 `[L]`, in nats: the drop of the entropy of the item.

    The mean over training targets. Distances within prefixes shrink with the number of items that share them, whatever
    codes mean, and unique codes leave none at the last level; this counts what is left to say of the item.

    Args:
        codes: N items.
        targets: `[N]`, how often each item is a training target; all alike where none ever was.
    """
    times = targets if targets.any() else np.ones(len(targets))
    left = [np.average(_entropies(codes, targets, depth), weights=times) for depth in range(codes.num_levels + 1)]
    return -np.diff(left)


def front(codes: ItemCodes, gains: np.ndarray) -> np.ndarray:
    """Weights, float64 `[N, L]`, that grow with the logarithm of gains; within an item their mean is 1.

    `w_l = L log(1 + max(gain_l, 0)) / sum_j log(1 + max(gain_j, 0))`; an item of which no token gains anything has
    weights of 1.

    Args:
        codes: N items.
        gains: `[L]` or `[N, L]`, in the unit of the item vectors, or in nats.
    """
    logs = np.log1p(np.maximum(gains, 0.0))
    return _shared_out(np.broadcast_to(logs, codes.table.shape), counted(codes))


def frequency(codes: ItemCodes, targets: np.ndarray, *, beta: float, over: str) -> np.ndarray:
    """Weights, float64 `[N, L]`, that fall with how often a token is a training target.

    Of a token seen n times `a = (1 - beta) / (1 - beta**n)`, one over its "effective number" of samples
    (arXiv:1901.05555); of one that was never seen, 1. With `over="item"` an item's weights are these, divided by their
    mean over the item: they move weight from its frequent tokens to its rare ones, and no item as a whole weighs more
    than another. With `over="batch"` they are divided by their mean over all training targets, so that tokens of rare
    items weigh more than those of popular ones. (The loss is divided by the sum of its weights, so a factor common to
    all item tokens of a batch is without effect: the mean over the very batch would do the same, but could change what
    text tokens weigh beside them from step to step.)

    Args:
        codes: N items.
        targets: `[N]`, how often each item is a training target.
        beta: in `[0, 1)`; tokens seen more than about `3 / (1 - beta)` times are all alike.
        over: `item` or `batch`.
    """
    seen = token_counts(codes, targets)
    # A token that was never seen has the weight of one seen once, as the released code sets it.
    weights = (1 - beta) / (1 - np.power(beta, np.maximum(seen, 1.0)))
    held = counted(codes)
    return _shared_out(weights, held) if over == "item" else _of_mean_one(weights, held, targets)


def token_counts(codes: ItemCodes, targets: np.ndarray) -> np.ndarray:
    """How often each item's token of each level is a training target, float64 `[N, L]`.

    Item tokens belong to their level; a word of the language model is one token wherever it stands.
    """
    numbers, held = _numbers(codes), counted(codes)
    times = np.broadcast_to(targets[:, None], numbers.shape)
    counts: np.ndarray = np.bincount(numbers[held], times[held], minlength=int(numbers.max()) + 1)[numbers]
    return counts


def _numbers(codes: ItemCodes) -> np.ndarray:
    """A number for each item's token of each level, int64 `[N, L]`; the same for the same token."""
    if codes.words is None:
        return codes.table + np.cumsum((0, *codes.sizes))[:-1]
    known: dict[str, int] = {}
    columns = [
        np.array([known.setdefault(word, len(known)) for word in words])[codes.table[:, level]]
        for level, words in enumerate(codes.words)
    ]
    return np.stack(columns, axis=1)


def position(codes: ItemCodes, *, last: float) -> np.ndarray:
    """Weights, float64 `[N, L]`, that fall evenly from an item's first token to `last` times that at its last one."""
    steps = np.maximum(codes.lengths - 1, 1)[:, None]
    return _shared_out(1 - (1 - last) * np.arange(codes.num_levels) / steps, counted(codes))


def information_gain(codes: ItemCodes, targets: np.ndarray, *, without: float) -> np.ndarray:
    """Weights, float64 `[N, L]`, that are smaller by the factor `without` where a token leaves nothing less open.

    What is open after a prefix is the entropy of which item follows, each item being as likely as it is often a
    training target (all alike where none ever was). A token without gain is the only one that can follow, or leads
    where more is open than before.
    """
    gains = np.empty((codes.num_items, codes.num_levels))
    outer = _entropies(codes, targets, 0)
    for level in range(codes.num_levels):
        inner = _entropies(codes, targets, level + 1)
        gains[:, level] = outer - inner
        outer = inner
    return _of_mean_one(np.where(gains > _NO_GAIN, 1.0, without), counted(codes), targets)


def _entropies(codes: ItemCodes, targets: np.ndarray, depth: int) -> np.ndarray:
    """Entropy in nats of the item under each item's prefix of a length, float64 `[N]`."""
    group = codes.prefix_groups(depth)
    totals = np.bincount(group, targets)
    logs = np.log(np.maximum(targets, 1.0))
    among_seen = np.log(np.maximum(totals, 1.0)) - np.bincount(group, targets * logs) / np.maximum(totals, 1.0)
    return np.where(totals > 0, among_seen, np.log(np.bincount(group)))[group]


def _shared_out(raw: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Divide by the mean over each item's own tokens; 1 where all are zero. Levels without a token get 0."""
    kept = np.where(held, raw, 0.0)
    sums, lengths = kept.sum(axis=1, keepdims=True), held.sum(axis=1, keepdims=True)
    shared = np.divide(kept * lengths, sums, out=np.ones_like(kept), where=sums > 1e-12)
    return np.where(held, shared, 0.0)


def _of_mean_one(raw: np.ndarray, held: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Divide by the mean over the tokens of all training targets (of all items, where there are none)."""
    times = (targets if targets.any() else np.ones(len(raw)))[:, None] * held
    return np.where(held, raw * times.sum() / (raw * times).sum(), 0.0)

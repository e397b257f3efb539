"""Item-level ranking metrics: from scores or lists to ranks, from ranks to means and intervals.

Decisions. A case has one target item, so a single number says all about it: the target's *rank* among the
candidates. Rank = 1 + candidates strictly above + half of the other candidates tied with it, the mid-rank of Kendall
1945 (doi:10.1093/biomet/33.3.239): a scorer that cannot tell items apart must not be paid for the order in which an
array happens to hold them. Ranks are therefore floats that step by one half; rank 0 means that the target is not in
the list. Candidates are never sampled, because sampled metrics can reverse who wins (Krichene and Rendle 2020,
doi:10.1145/3394486.3403226). A hit is the item, never its code.

All metrics are means over cases of a gain that depends on the rank alone and is zero beyond the largest cutoff.
That is why the bootstrap is cheap: drawing users with replacement is the same as drawing how often each *distinct*
gain occurs, one multinomial draw a resample.

This module knows numpy and nothing else: no data sets, no models, no torch.

Shape letters in this file: C cases, N candidate items, K places of a list.
"""

import numpy as np
from numpy.typing import NDArray

CUTOFFS: dict[str, tuple[int, ...]] = {"recall": (1, 5, 10, 20), "ndcg": (5, 10, 20), "mrr": (20,)}
"""Cutoffs of each metric family, in the order in which `metrics.json` lists the keys."""

METRIC_KEYS: tuple[str, ...] = tuple(f"{family}@{k}" for family, cutoffs in CUTOFFS.items() for k in cutoffs)
"""`recall@1` … `mrr@20`: the keys of every metrics mapping of this project."""

_DEEPEST = max(k for cutoffs in CUTOFFS.values() for k in cutoffs)


def metrics_from_ranks(ranks: NDArray[np.floating]) -> dict[str, float]:
    """Average the gains of all cases.

    With one relevant item a case, Recall@k equals the hit rate, and the ideal DCG is 1, so that NDCG@k is
    1/log2(rank + 1) for rank <= k (Järvelin and Kekäläinen 2002, doi:10.1145/582415.582418). MRR@20 is 1/rank for
    rank <= 20 (Voorhees 1999, "The TREC-8 question answering track report", NIST SP 500-246).

    Args:
        ranks: float [C], each 0 (target not found) or at least 1; halves come from ties.

    Returns:
        Means in [0, 1] under the keys of `METRIC_KEYS`.

    Raises:
        ValueError: if there is no case, or a value is no rank.
    """
    of_metrics = _gains(_checked(ranks))
    return {key: float(gain.mean()) for key, gain in zip(METRIC_KEYS, of_metrics, strict=True)}


def gains(ranks: NDArray[np.floating], key: str) -> NDArray[np.float64]:
    """Return each case's gain under one metric; their mean is the metric.

    Args:
        ranks: float [C], as in `metrics_from_ranks`.
        key: one of `METRIC_KEYS`.

    Returns:
        float64 [C], each in [0, 1].

    Raises:
        ValueError: if there is no case, a value is no rank, or `key` is no metric.
    """
    if key not in METRIC_KEYS:
        raise ValueError(f"the metric must be one of {', '.join(METRIC_KEYS)}, was: {key!r}")
    of_key: NDArray[np.float64] = _gains(_checked(ranks))[METRIC_KEYS.index(key)]
    return of_key


def bootstrap(
    ranks: NDArray[np.floating], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> dict[str, list[float]]:
    """Percentile intervals of the means over users drawn with replacement (Efron 1979, doi:10.1214/aos/1176344552).

    The interval covers the choice of users only; what another training seed would give is not in it.

    Args:
        ranks: float [C], one case a user, as in `metrics_from_ranks`.
        seed: of the draws; same seed, same intervals.
        resamples: how many times C users are drawn.
        level: probability inside the interval, in (0, 1).

    Returns:
        `[low, high]` under the keys of `METRIC_KEYS`.

    Raises:
        ValueError: if there is no case, a value is no rank, or `resamples` or `level` are out of range.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"a bootstrap needs `resamples` >= 1 and `level` between 0 and 1, was: resamples={resamples}, level={level}"
        )
    ranks = _checked(ranks)
    distinct, cases = np.unique(np.where(ranks <= _DEEPEST, ranks, 0.0), return_counts=True)
    counts = np.random.default_rng(seed).multinomial(len(ranks), cases / len(ranks), size=resamples)
    means = counts @ _gains(distinct).T / len(ranks)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {key: [float(low[i]), float(high[i])] for i, key in enumerate(METRIC_KEYS)}


def ranks_from_scores(
    scores: NDArray[np.floating], targets: NDArray[np.integer], exclude: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Rank each target among all candidates.

    Args:
        scores: float [C, N], higher is better; -inf is allowed, NaN is not.
        targets: int [C], columns of `scores`.
        exclude: bool [C, N], True where an item is no candidate of that case (items already seen, say). The target
            itself always is one.

    Returns:
        float64 [C], in steps of one half, at least 1.

    Raises:
        ValueError: if the shapes do not fit together, a target is no column, or a score is NaN.
    """
    if scores.ndim != 2 or targets.shape != scores.shape[:1] or (exclude is not None and exclude.shape != scores.shape):
        raise ValueError(
            "`scores` and `exclude` must be [cases, items] and `targets` [cases], "
            f"was: {scores.shape}, {None if exclude is None else exclude.shape} and {targets.shape}"
        )
    if len(targets) and not (targets.min() >= 0 and targets.max() < scores.shape[1]):
        raise ValueError(
            f"targets must be columns of `scores`, 0 to {scores.shape[1] - 1}, was: {targets.min()} to {targets.max()}"
        )
    rows = np.arange(len(targets))
    target_scores = scores[rows, targets][:, None]
    above, tied = scores > target_scores, scores == target_scores
    # A NaN compares as neither above, tied nor below, so it is found by counting what is left.
    if (above.sum() + tied.sum() + (scores < target_scores).sum()) != scores.size:
        raise ValueError("scores must be numbers, was: NaN; look at the model that gave them")
    if exclude is not None:
        above &= ~exclude
        tied &= ~exclude
    tied[rows, targets] = False
    return 1.0 + above.sum(axis=1) + 0.5 * tied.sum(axis=1)


def ranks_from_lists(
    items: NDArray[np.integer], scores: NDArray[np.floating], targets: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Rank each target inside a list of recommendations.

    Ties count inside the list only: what a beam dropped at its edge cannot be seen from here.

    Args:
        items: int [C, K], catalogue rows; -1 marks a place that holds no item.
        scores: float [C, K]; the order of the list itself is not used. Ignored where `items` is -1.
        targets: int [C], catalogue rows.

    Returns:
        float64 [C], in steps of one half; 0 where the target is not in the list.

    Raises:
        ValueError: if the shapes do not fit together, an item stands twice in a list, or a score is NaN.
    """
    if items.ndim != 2 or items.shape != scores.shape or targets.shape != items.shape[:1]:
        raise ValueError(
            "`items` and `scores` must be [cases, places] and `targets` [cases], "
            f"was: {items.shape}, {scores.shape} and {targets.shape}"
        )
    held = items >= 0
    ordered = np.sort(items, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(
            f"an item may stand in a list once, was: twice in {twice.sum()} of {len(items)} lists, "
            f"first in case {twice.argmax()}"
        )
    if np.isnan(scores[held]).any():
        raise ValueError("scores must be numbers, was: NaN; look at the model that gave them")
    is_target = items == targets[:, None]
    found = is_target.any(axis=1) & (targets >= 0)
    target_scores = np.where(is_target, scores, -np.inf).max(axis=1, initial=-np.inf)[:, None]
    above = (held & (scores > target_scores)).sum(axis=1)
    tied = (held & ~is_target & (scores == target_scores)).sum(axis=1)
    return np.where(found, 1.0 + above + 0.5 * tied, 0.0)


def _checked(ranks: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ranks as float64 [C], or say what is wrong with them."""
    checked: NDArray[np.float64] = np.asarray(ranks, dtype=np.float64)
    if checked.ndim != 1 or not len(checked):
        raise ValueError(f"ranks must be one number a case, of at least one case, was: shape {checked.shape}")
    wrong = ~(np.isfinite(checked) & ((checked == 0) | (checked >= 1)))
    if wrong.any():
        raise ValueError(
            f"a rank must be 0 (not found) or at least 1, was: {checked[wrong][0]} in case {wrong.argmax()}, "
            f"{wrong.sum()} such values in all"
        )
    return checked


def _gains(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each rank's gain under each metric, [len(METRIC_KEYS), C]."""
    found = ranks > 0
    by_family = {
        "recall": found.astype(np.float64),
        "ndcg": found / np.log2(np.where(found, ranks, 1.0) + 1.0),
        "mrr": found / np.where(found, ranks, 1.0),
    }
    return np.stack([by_family[family] * (ranks <= k) for family, cutoffs in CUTOFFS.items() for k in cutoffs])


def metric_name(key: str) -> str:
    """Write `ndcg@10` as NDCG@10, `recall@10` as Recall@10, and names without a cutoff likewise."""
    family, at, cutoff = key.partition("@")
    return (family.upper() if family in ("ndcg", "mrr") else family.capitalize()) + at + cutoff

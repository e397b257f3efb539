"""Baselines that need no training loop, on the same split, candidates and histories as the model.

Decisions. Baselines are fitted on the training interactions of the split and on nothing else; when they are ranked on
test cases they see the same history as the model does, validation item included. Ties count half
(`metrics.ranks_from_scores`), which a chain of counts pays dearly for, because most items never followed the last one
and most of the others did so once. So the chain settles its ties by popularity, as anyone who ships it would: on the
Beauty table that is Recall@10 .0656 in place of .0584 for bare counts, and a gain over a baseline left weak is none.

A scorer is anything with `scores(histories) -> float32 [B, N]`. This module knows nothing of models and imports no
torch.

Shape letters in this file: B cases of a batch, N items of the catalogue.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from llm_itemtok.data.splits import Cases, Split
from llm_itemtok.errors import RecipeError
from llm_itemtok.evaluation.metrics import bootstrap, metrics_from_ranks, ranks_from_scores

_MAX_SCORES = 2**26
"""Scores held at a time (256 MB as float32): a batch is cut to it when the catalogue is large."""


class Scorer(Protocol):
    """Something that scores every item of the catalogue after a history."""

    def scores(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return float32 [B, N], higher is better; histories are catalogue rows in time order, possibly empty."""
        ...


@final
class Popularity:
    """Score an item by how often it occurs in training, whatever the history."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        """Keep the training interactions of each item, int64 [N]."""
        self.counts = counts

    @classmethod
    def fit(cls, split: Split) -> "Popularity":
        """Count the training interactions of each item."""
        return cls(split.item_counts())

    def scores(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the counts for every history: float32 [B, N], a read-only view of one row."""
        return np.broadcast_to(self.counts.astype(np.float32), (len(histories), len(self.counts)))


@final
class Markov:
    """First-order Markov chain: score an item by how often it followed the history's last item in training.

    The unfactorised chain of Rendle et al. 2010 (doi:10.1145/1772690.1772773), section 4.1, for one item a step.
    Dividing by the row's total would not change a ranking, so counts are left as they are.
    """

    def __init__(self, transitions: csr_array, settle: NDArray[np.float32]) -> None:
        """Keep how often column follows row, float32 [N, N], and what settles ties, float32 [N] in [0, 1)."""
        self.transitions = transitions
        self.settle = settle

    @classmethod
    def fit(cls, split: Split, *, settle_by_popularity: bool = True) -> "Markov":
        """Count neighbouring pairs inside the training sequence of each user.

        Args:
            split: whose training part is counted.
            settle_by_popularity: order items of equal counts by their training interactions; without it they stay
                tied, and an unknown last item scores every item 0.
        """
        items, counts = split.train_items, split.item_counts()
        within = np.ones(max(len(items) - 1, 0), dtype=bool)
        # The pair that ends where a user's sequence begins joins two users. Empty sequences repeat an offset.
        starts = split.train_offsets[1:-1]
        within[starts[(starts > 0) & (starts < len(items))] - 1] = False
        before, after = items[:-1][within], items[1:][within]
        ones = np.ones(len(before), dtype=np.float32)
        transitions = csr_array((ones, (before, after)), shape=(split.num_items, split.num_items))
        return cls(transitions, (counts * settle_by_popularity / (counts.max(initial=0) + 1)).astype(np.float32))

    def scores(self, histories: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the transition counts from each last item, ties settled: float32 [B, N]."""
        scores = np.tile(self.settle, (len(histories), 1))
        known = [case for case, history in enumerate(histories) if len(history)]
        if known:
            last = np.array([histories[case][-1] for case in known], dtype=np.int64)
            scores[known] += self.transitions[last].toarray()
        return scores


BASELINES: Mapping[str, Callable[[Split], Scorer]] = {"popularity": Popularity.fit, "markov": Markov.fit}
"""How to fit each baseline that `evaluation.baselines` of a recipe may name."""


def rank_cases(scorer: Scorer, cases: Cases, mask_seen: bool, batch: int = 512) -> NDArray[np.float64]:
    """Rank the target of each case among all items of the catalogue.

    Args:
        scorer: a baseline, or a model that scores whole catalogues.
        cases: histories and targets.
        mask_seen: leave the items of the history out of the candidates, the target excepted.
        batch: cases scored at a time, at most; fewer when the catalogue is large.

    Returns:
        float64 [C], in steps of one half, at least 1.

    Raises:
        ValueError: if the scorer returns NaN or scores of another shape.
    """
    ranks = np.zeros(len(cases))
    start, step = 0, 1  # one case first: it tells the size of the catalogue
    while start < len(cases):
        stop = min(start + step, len(cases))
        histories = [cases.history(case) for case in range(start, stop)]
        scores = scorer.scores(histories)
        exclude = seen_items(histories, scores.shape[1]) if mask_seen else None
        ranks[start:stop] = ranks_from_scores(scores, cases.targets[start:stop], exclude)
        start, step = stop, max(1, min(batch, _MAX_SCORES // scores.shape[1]))
    return ranks


def evaluate_baselines(
    names: Sequence[str], split: Split, cases: Cases, mask_seen: bool, seed: int
) -> dict[str, dict[str, Any]]:
    """Fit and measure baselines: the `baselines` part of `metrics.json`.

    Args:
        names: keys of `BASELINES`, in the order of the result.
        split: whose training part the baselines are fitted on.
        cases: what they are measured on, as a rule `split.test`.
        mask_seen: as in `rank_cases`.
        seed: of the bootstrap.

    Returns:
        `{name: {"test": {metric: value}, "ci95": {metric: [low, high]}}}`.

    Raises:
        RecipeError: if a name is no baseline.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise RecipeError(f"`evaluation.baselines` takes {', '.join(BASELINES)}, was: {', '.join(unknown)}")
    results = {}
    for name in names:
        ranks = rank_cases(BASELINES[name](split), cases, mask_seen)
        results[name] = {"test": metrics_from_ranks(ranks), "ci95": bootstrap(ranks, seed=seed)}
    return results


def seen_items(histories: Sequence[NDArray[np.int64]], num_items: int) -> NDArray[np.bool_]:
    """Mark the items of each history: bool [B, N]."""
    seen = np.zeros((len(histories), num_items), dtype=bool)
    for case, history in enumerate(histories):
        seen[case, history] = True
    return seen

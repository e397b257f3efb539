"""Baselines count what is in training, rank what they do not know as tied, and never look elsewhere."""

import numpy as np
import pytest

from llm_itemtok.data.splits import Cases, Split
from llm_itemtok.errors import RecipeError
from llm_itemtok.evaluation.baselines import Markov, Popularity, evaluate_baselines, rank_cases
from llm_itemtok.evaluation.metrics import METRIC_KEYS


def make_cases(histories, targets):
    offsets = np.cumsum([0, *map(len, histories)])
    return Cases(
        users=tuple(f"u{i}" for i in range(len(targets))),
        offsets=offsets.astype(np.int64),
        items=np.array([item for history in histories for item in history], dtype=np.int64),
        targets=np.array(targets, dtype=np.int64),
        ties=np.zeros(len(targets), dtype=bool),
    )


def make_split(train, test=((), ()), num_items=5):
    offsets = np.cumsum([0, *map(len, train)])
    return Split(
        kind="leave-last-out",
        train_users=tuple(f"u{i}" for i in range(len(train))),
        train_offsets=offsets.astype(np.int64),
        train_items=np.array([item for sequence in train for item in sequence], dtype=np.int64),
        validation=make_cases([], []),
        test=make_cases(*test),
        counts={},
        num_items=num_items,
    )


def histories(*rows):
    return [np.array(row, dtype=np.int64) for row in rows]


def test_popularity_is_the_count_in_training():
    scores = Popularity.fit(make_split([[0, 1], [1, 1, 2]])).scores(histories([4], []))

    assert scores.dtype == np.float32
    assert scores.tolist() == [[1, 3, 1, 0, 0]] * 2


def test_markov_counts_neighbours_within_a_user_only():
    """0→1 twice, 1→2 once, 2→2 once; the pair 2→0 where the second user begins is no step of anyone."""
    markov = Markov.fit(make_split([[0, 1, 2, 2], [0, 1]]), settle_by_popularity=False)

    scores = markov.scores(histories([3, 0], [1], [2], [2, 1, 4], []))

    assert scores.dtype == np.float32
    assert scores.tolist() == [[0, 2, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0] * 5, [0] * 5]


def test_markov_bears_users_without_training_items():
    """Users of one or no item have no step, wherever they stand, and join nothing with their neighbours."""
    markov = Markov.fit(make_split([[], [3], [], [0, 1], [2], []]), settle_by_popularity=False)

    assert markov.transitions.toarray().sum() == 1
    assert markov.scores(histories([0])).tolist() == [[0, 1, 0, 0, 0]]


def test_markov_of_an_empty_log_knows_nothing():
    assert Markov.fit(make_split([[]])).scores(histories([0], [1])).tolist() == [[0] * 5] * 2


def test_a_bare_chain_that_does_not_know_the_last_item_ranks_in_the_middle():
    """All five items are tied at 0: rank 1 + 4/2."""
    markov = Markov.fit(make_split([[0, 1]]), settle_by_popularity=False)

    assert rank_cases(markov, make_cases([[4]], [2]), mask_seen=False).tolist() == [3.0]


def test_popularity_settles_ties_of_the_chain_and_nothing_else():
    """After 0 came 1 twice, 2 and 3 once each; 3 is the most popular item, then 0. So 1, 3, 2, then 0, then 4."""
    train = [[0, 1], [0, 1], [0, 2], [0, 3], *[[3]] * 9]
    markov = Markov.fit(make_split(train))

    ranks = rank_cases(markov, make_cases([[0]] * 5, [1, 3, 2, 0, 4]), mask_seen=False)

    assert ranks.tolist() == [1, 2, 3, 4, 5]


def test_a_chain_that_does_not_know_the_last_item_falls_back_to_popularity():
    split = make_split([[0, 1], [1, 2]])
    cases = make_cases([[4], []] * 5, np.repeat(range(5), 2))

    ranks = rank_cases(Markov.fit(split), cases, mask_seen=False)

    assert ranks.tolist() == rank_cases(Popularity.fit(split), cases, mask_seen=False).tolist()


def test_masking_the_seen_moves_the_target_up_and_never_hides_it():
    """Counts 3, 2, 1, 0, 0. Target 2 stands third, first once 0 and 1 are masked; a seen target is still ranked."""
    popularity = Popularity(np.array([3, 2, 1, 0, 0]))
    cases = make_cases([[0, 1], [2]], [2, 2])

    assert rank_cases(popularity, cases, mask_seen=False).tolist() == [3.0, 3.0]
    assert rank_cases(popularity, cases, mask_seen=True).tolist() == [1.0, 3.0]


def test_the_batch_does_not_change_ranks():
    rng = np.random.default_rng(0)
    markov = Markov.fit(make_split([rng.integers(0, 30, size=20) for _ in range(20)], num_items=30))
    cases = make_cases([rng.integers(0, 30, size=rng.integers(0, 6)) for _ in range(23)], rng.integers(0, 30, size=23))

    whole = rank_cases(markov, cases, mask_seen=True)

    assert whole.tolist() == rank_cases(markov, cases, mask_seen=True, batch=4).tolist()
    assert len(set(whole)) > 5


def test_no_cases_have_no_ranks():
    assert rank_cases(Popularity(np.ones(3)), make_cases([], []), mask_seen=True).shape == (0,)


def test_evaluation_returns_the_part_of_metrics_json():
    """The chain 0→1 is right about both users; popularity has 0 first in a tie with 1 at two, so rank 1.5."""
    split = make_split([[0, 1], [0, 1]], test=([[0], [0]], [1, 1]))

    results = evaluate_baselines(["markov", "popularity"], split, split.test, mask_seen=False, seed=3)

    assert list(results) == ["markov", "popularity"]
    assert results["markov"]["test"]["recall@1"] == 1
    assert results["popularity"]["test"]["recall@1"] == 0
    assert results["popularity"]["test"]["mrr@20"] == pytest.approx(1 / 1.5)
    for result in results.values():
        assert tuple(result["test"]) == tuple(result["ci95"]) == METRIC_KEYS


def test_baselines_do_not_see_validation_or_test_targets():
    """Only the training part is fitted: moving test targets about changes no score."""
    train = [[0, 1], [1, 2]]
    one, other = (make_split(train, test=([[0]], [target])) for target in (3, 4))

    for fit in (Popularity.fit, Markov.fit):
        assert fit(one).scores(histories([0], [1])).tolist() == fit(other).scores(histories([0], [1])).tolist()


def test_an_unknown_baseline_is_named_with_those_there_are():
    with pytest.raises(RecipeError, match=r"takes popularity, markov, was: popularty"):
        evaluate_baselines(["markov", "popularty"], make_split([[0]]), make_cases([], []), mask_seen=False, seed=0)

"""Metrics equal hand-worked numbers, ties included, and intervals behave as intervals."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from llm_itemtok.evaluation.metrics import (
    METRIC_KEYS,
    bootstrap,
    metrics_from_ranks,
    ranks_from_lists,
    ranks_from_scores,
)


def test_the_keys_are_those_of_the_contract():
    assert METRIC_KEYS == (
        "recall@1",
        "recall@5",
        "recall@10",
        "recall@20",
        "ndcg@5",
        "ndcg@10",
        "ndcg@20",
        "mrr@20",
    )


def test_metrics_by_hand():
    """Ranks 1, 3, 7, 20, 21 and not found: gains 1, 1/log2(4) = 1/2, 1/log2(8) = 1/3, 1/log2(21), 0, 0; 6 cases."""
    metrics = metrics_from_ranks(np.array([1.0, 3.0, 7.0, 20.0, 21.0, 0.0]))

    assert metrics == pytest.approx(
        {
            "recall@1": 1 / 6,
            "recall@5": 2 / 6,
            "recall@10": 3 / 6,
            "recall@20": 4 / 6,
            "ndcg@5": (1 + 1 / 2) / 6,
            "ndcg@10": (1 + 1 / 2 + 1 / 3) / 6,
            "ndcg@20": (1 + 1 / 2 + 1 / 3 + 1 / np.log2(21)) / 6,
            "mrr@20": (1 + 1 / 3 + 1 / 7 + 1 / 20) / 6,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_a_half_rank_counts_as_itself():
    """Two items tied at the top share rank 1.5: no hit at 1, gain 1/log2(2.5); rank 10.5 is no hit at 10."""
    metrics = metrics_from_ranks(np.array([1.5, 10.5]))

    assert metrics["recall@1"] == 0
    assert metrics["recall@10"] == 0.5
    assert metrics["recall@20"] == 1
    assert metrics["ndcg@5"] == pytest.approx(1 / np.log2(2.5) / 2)
    assert metrics["mrr@20"] == pytest.approx((1 / 1.5 + 1 / 10.5) / 2)


def test_ranks_from_scores_by_hand():
    """Row 0: one above, two others tied: 1 + 1 + 2/2. Row 1: alone on top. Row 2: all five tied: 1 + 4/2."""
    scores = np.array([[5, 3, 3, 3, 1], [0, 0, 0, 0, 9], [7, 7, 7, 7, 7]], dtype=np.float32)

    assert ranks_from_scores(scores, np.array([2, 4, 0])).tolist() == [3.0, 1.0, 3.0]


def test_excluded_items_are_no_candidates_but_the_target_always_is():
    """Row 0 loses the item above and one tied item. Row 1 excludes its target, which stays where it was."""
    scores = np.array([[5, 3, 3, 3], [5, 4, 3, 2]], dtype=np.float32)
    exclude = np.array([[True, True, False, False], [False, True, False, False]])

    assert ranks_from_scores(scores, np.array([2, 1]), exclude).tolist() == [1.5, 2.0]


def test_minus_infinity_is_a_score_like_any_other():
    scores = np.array([[-np.inf, 1, -np.inf]])

    assert ranks_from_scores(scores, np.array([0])).tolist() == [2.5]


def test_scores_must_be_numbers():
    with pytest.raises(ValueError, match="scores must be numbers, was: NaN"):
        ranks_from_scores(np.array([[0.0, np.nan]]), np.array([0]))
    with pytest.raises(ValueError, match="scores must be numbers, was: NaN"):
        ranks_from_scores(np.array([[0.0, np.nan]]), np.array([1]))


def test_targets_and_shapes_must_fit():
    with pytest.raises(ValueError, match=r"columns of `scores`, 0 to 1, was: 2 to 2"):
        ranks_from_scores(np.zeros((1, 2)), np.array([2]))
    with pytest.raises(ValueError, match=r"was: \(2, 3\), None and \(1,\)"):
        ranks_from_scores(np.zeros((2, 3)), np.array([0]))
    with pytest.raises(ValueError, match=r"was: \(1, 3\), \(3,\) and \(1,\)"):
        ranks_from_scores(np.zeros((1, 3)), np.array([0]), np.zeros(3, dtype=bool))


def test_ranks_from_lists_by_hand():
    """Case 0: second of the list. Case 1: tied with one other: 1.5. Case 2: not listed. Case 3: an empty list."""
    items = np.array([[8, 3, 5], [1, 2, -1], [1, 2, 3], [-1, -1, -1]])
    scores = np.array([[0.9, 0.5, 0.1], [0.4, 0.4, 0.4], [3, 2, 1], [0, 0, 0]])

    assert ranks_from_lists(items, scores, np.array([3, 2, 9, 0])).tolist() == [2.0, 1.5, 0.0, 0.0]


def test_the_scores_of_a_list_rank_it_and_not_its_order():
    items, scores = np.array([[4, 5, 6]]), np.array([[0.1, 0.9, 0.5]])

    assert [ranks_from_lists(items, scores, np.array([target]))[0] for target in (5, 6, 4)] == [1, 2, 3]


def test_an_item_that_stands_twice_in_a_list_is_refused():
    with pytest.raises(ValueError, match=r"once, was: twice in 1 of 2 lists, first in case 1"):
        ranks_from_lists(np.array([[1, 2, -1, -1], [3, 1, 3, 4]]), np.zeros((2, 4)), np.array([0, 0]))


def test_the_scores_of_a_list_must_be_numbers_where_there_is_an_item():
    assert ranks_from_lists(np.array([[1, -1]]), np.array([[0.5, np.nan]]), np.array([1])).tolist() == [1.0]
    with pytest.raises(ValueError, match="was: NaN"):
        ranks_from_lists(np.array([[1, 2]]), np.array([[0.5, np.nan]]), np.array([1]))


def test_the_shapes_of_lists_must_fit():
    with pytest.raises(ValueError, match=r"was: \(1, 2\), \(1, 3\) and \(1,\)"):
        ranks_from_lists(np.zeros((1, 2), dtype=int), np.zeros((1, 3)), np.array([0]))


@pytest.mark.parametrize("wrong", [0.5, -1.0, np.nan, np.inf])
def test_what_is_no_rank_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"was: {wrong} in case 1, 1 such values"):
        metrics_from_ranks(np.array([1.0, wrong]))


def test_no_cases_are_refused():
    with pytest.raises(ValueError, match="at least one case"):
        metrics_from_ranks(np.array([]))


@given(
    st_numpy.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(-2, 2)), st.data()
)
def test_a_full_list_ranks_as_the_scores_do(scores, data):
    """A list that holds the whole catalogue is a full ranking, ties included."""
    num_cases, num_items = scores.shape
    targets = np.array(data.draw(st.lists(st.integers(0, num_items - 1), min_size=num_cases, max_size=num_cases)))
    items = np.stack([data.draw(st.permutations(range(num_items))) for _ in range(num_cases)])

    from_lists = ranks_from_lists(items, np.take_along_axis(scores, items, axis=1).astype(float), targets)

    assert from_lists.tolist() == ranks_from_scores(scores.astype(float), targets).tolist()


@given(st_numpy.arrays(np.int8, st.tuples(st.integers(1, 1), st.integers(1, 9)), elements=st.integers(-2, 2)))
def test_the_ranks_of_all_items_sum_to_those_of_any_order(scores):
    """Half ties share places out without making or losing any: 1 + … + N, whatever is tied."""
    num_items = scores.shape[1]
    ranks = ranks_from_scores(np.repeat(scores, num_items, axis=0).astype(float), np.arange(num_items))

    assert ranks.sum() == num_items * (num_items + 1) / 2


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 4.0, 10.5, 20.0, 300.0]), min_size=1, max_size=30), st.integers(0, 99))
def test_an_interval_is_ordered_inside_0_to_1_and_the_same_for_the_same_seed(ranks, seed):
    intervals = bootstrap(np.array(ranks), seed=seed, resamples=50)

    assert tuple(intervals) == METRIC_KEYS
    assert all(0 <= low <= high <= 1 + 1e-12 for low, high in intervals.values())
    assert intervals == bootstrap(np.array(ranks), seed=seed, resamples=50)


def test_an_interval_is_as_wide_as_theory_says():
    """4,000 users, 10 % hits: the standard error is sqrt(.1 * .9 / 4000) = .00474, so 95 % is .1 -+ .0093."""
    ranks = np.where(np.arange(4000) % 10 == 0, 1.0, 0.0)

    low, high = bootstrap(ranks, resamples=4000)["recall@10"]

    assert low == pytest.approx(0.1 - 1.96 * 0.00474, abs=1e-3)
    assert high == pytest.approx(0.1 + 1.96 * 0.00474, abs=1e-3)


def test_equal_users_leave_no_doubt():
    assert bootstrap(np.full(7, 2.0))["mrr@20"] == [0.5, 0.5]


def test_the_options_of_the_bootstrap_are_checked():
    with pytest.raises(ValueError, match=r"was: resamples=0, level=0\.95"):
        bootstrap(np.ones(2), resamples=0)
    with pytest.raises(ValueError, match="was: resamples=1000, level=1"):
        bootstrap(np.ones(2), level=1)


def test_25_000_users_take_the_bootstrap_less_than_5_seconds():
    ranks = np.random.default_rng(0).integers(0, 12_000, size=25_000).astype(float)
    ranks[(ranks > 0) & (ranks < 2)] = 2

    start = time.process_time()
    bootstrap(ranks)

    assert time.process_time() - start < 5

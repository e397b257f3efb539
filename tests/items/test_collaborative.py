"""Vectors from training sequences: what is near in them is near, what they do not have is zero."""

from itertools import pairwise

import numpy as np
import pytest

from llm_itemtok.errors import DataError
from llm_itemtok.items.collaborative import (
    co_occurrence,
    draw_sequences,
    near_pairs,
    ppmi_vectors,
    sasrec_vectors,
)


def sequences(num=300, seed=0):
    """Users stay within one of four groups of five items; item 20 is in no sequence."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(5)[: rng.integers(2, 6)] + 5 * rng.integers(0, 4) for _ in range(num)]


def flat(rows):
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def groups_apart(vectors):
    """Least cosine within a group, largest between groups."""
    likeness = vectors[:20] @ vectors[:20].T
    same = np.arange(20)[:, None] // 5 == np.arange(20) // 5
    return likeness[same].min(), likeness[~same].max()


def test_sequences_are_drawn_whole_in_their_order_and_as_many_as_fit():
    offsets = np.array([0, 3, 3, 7, 12, 14, 20])
    items = np.arange(20)
    whole = {tuple(items[start:end].tolist()) for start, end in pairwise(offsets)}
    for seed in range(5):
        drawn, places = draw_sequences(items, offsets, most=9, seed=seed)
        assert 4 <= len(drawn) == places[-1] <= 9  # no sequence is longer than 6
        assert {tuple(drawn[start:end].tolist()) for start, end in pairwise(places)} <= whole
        assert (np.diff(drawn) > 0).all()
    same, there = draw_sequences(items, offsets, most=20)
    assert same is items
    assert there is offsets


def test_co_occurrence_by_hand():
    """In 0 1 0 2 with a window of 2: 0-1 twice, 1-2 and 0-2 once; the sequence 3 0 does not touch the one before."""
    counts = co_occurrence(np.array([0, 1, 0, 2, 3, 0]), np.array([0, 4, 6]), num_items=5, window=2)
    expected = np.zeros((5, 5))
    for one, other, times in ((0, 1, 2), (1, 2, 1), (0, 2, 1), (0, 3, 1)):
        expected[one, other] = expected[other, one] = times
    np.testing.assert_array_equal(counts.toarray(), expected)


def test_a_window_longer_than_the_sequences_is_no_trouble():
    assert co_occurrence(np.array([0, 1]), np.array([0, 2]), num_items=2, window=9).toarray().tolist() == [
        [0, 1],
        [1, 0],
    ]
    nothing = np.empty(0, dtype=np.int64)
    assert co_occurrence(nothing, np.array([0]), num_items=2).nnz == 0
    with pytest.raises(DataError, match="at least 1 step, was: 0"):
        co_occurrence(nothing, np.array([0]), num_items=2, window=0)


def test_near_pairs_by_hand():
    """Item 0 was near 1 twice and near 2 once, but 2 was near nothing else while 1 was near 3 six times."""
    counts = co_occurrence(np.array([0, 1, 0, 1, 0, 2, *[1, 3] * 6]), np.array([0, 2, 4, 6, *range(8, 20, 2)]),
                           num_items=5, window=1)  # fmt: skip
    items, neighbours = near_pairs(counts, 1)
    assert dict(zip(items.tolist(), neighbours.tolist(), strict=True)) == {0: 2, 1: 3, 2: 0, 3: 1}
    items, neighbours = near_pairs(counts, 5)
    assert neighbours[items == 0].tolist() == [2, 1]
    assert 4 not in items


def test_ppmi_by_hand():
    """Two pairs that only occur together: information log(total * 1 / (1 * 1)) = log 4, and vectors of two axes."""
    counts = co_occurrence(np.array([0, 1, 2, 3]), np.array([0, 2, 4]), num_items=4)
    x = ppmi_vectors(counts, dimensions=6)
    assert x.shape == (4, 6)
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(x @ x.T, np.eye(4), atol=1e-4)  # 0 and 1 never have the same neighbours


def test_ppmi_puts_groups_apart_and_repeats_itself():
    counts = co_occurrence(*flat(sequences()), num_items=21)
    x = ppmi_vectors(counts, dimensions=4, seed=1)
    within, between = groups_apart(x)
    assert within > 0.5
    assert between < 0.2
    assert not x[20].any()
    np.testing.assert_array_equal(x, ppmi_vectors(counts, dimensions=4, seed=1))


def test_a_shift_leaves_out_what_is_little_more_than_chance():
    counts = co_occurrence(*flat(sequences()), num_items=21)
    with pytest.raises(DataError, match=r"more often than chance would \(`shift` 50\)"):
        ppmi_vectors(counts, shift=50.0)
    with pytest.raises(DataError, match=r"at least 1, was: 0 and 1\.0"):
        ppmi_vectors(counts, dimensions=0)


def test_counts_stay_as_they_are():
    counts = co_occurrence(*flat(sequences()), num_items=21)
    before = counts.copy()
    ppmi_vectors(counts, dimensions=4, shift=5.0)  # leaves out some pairs
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(counts, part), getattr(before, part))


def test_sasrec_puts_groups_apart_and_leaves_unknown_items_zero():
    x = sasrec_vectors(sequences(120), num_items=21, dimensions=8, steps=150, seed=3)
    assert x.shape == (21, 8)
    within, between = groups_apart(x)
    assert within > between
    assert not x[20].any()
    np.testing.assert_allclose(np.linalg.norm(x[:20], axis=1), 1, atol=1e-5)


def test_sasrec_repeats_itself_takes_odd_dimensions_and_refuses_single_interactions():
    one, again = (sasrec_vectors(sequences(20), num_items=21, dimensions=3, steps=2) for _ in range(2))
    assert one.shape == (21, 3)
    np.testing.assert_array_equal(one, again)
    with pytest.raises(DataError, match="at least two interactions somewhere"):
        sasrec_vectors([np.array([1]), np.array([2])], num_items=3)

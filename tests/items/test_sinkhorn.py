"""Sinkhorn's iteration over prefixes: which codeword an item's mass goes to."""

import numpy as np
import pytest

from llm_itemtok.items import sinkhorn as module
from llm_itemtok.items.sinkhorn import sinkhorn_choices


def test_an_item_that_is_alone_takes_its_nearest_free_codeword():
    distances = np.array([[3.0, 1.0, 2.0]])
    assert sinkhorn_choices(distances, np.array([0]), np.array([[True, True, True]])).tolist() == [1]
    assert sinkhorn_choices(distances, np.array([0]), np.array([[True, False, True]])).tolist() == [2]


def test_items_that_want_the_same_codeword_are_spread_at_least_cost():
    """The first is indifferent between the two, so it is the one to give way."""
    distances = np.array([[1.0, 1.1, 9.0], [1.0, 5.0, 9.0]])
    assert sinkhorn_choices(distances, np.array([0, 0]), np.ones((1, 3), dtype=bool)).tolist() == [1, 0]


def test_prefixes_do_not_look_at_each_other():
    rng = np.random.default_rng(0)
    distances, prefixes = rng.random((40, 12)), rng.integers(0, 7, 40)
    free = rng.random((7, 12)) < 0.8
    words = sinkhorn_choices(distances, prefixes, free)
    for prefix in range(7):
        inside = prefixes == prefix
        alone = sinkhorn_choices(distances[inside], np.zeros(inside.sum(), int), free[prefix : prefix + 1])
        np.testing.assert_array_equal(words[inside], alone)


def test_only_free_codewords_are_chosen_and_none_where_there_is_none():
    rng = np.random.default_rng(1)
    prefixes = np.repeat(np.arange(3), 6)
    free = np.array([[False] * 5, [True, False, True, False, True], [True] * 5])
    words = sinkhorn_choices(rng.random((18, 5)), prefixes, free)
    assert (words[:6] == -1).all()
    assert free[prefixes[6:], words[6:]].all()


def test_shares_are_even_where_there_are_more_items_than_codewords():
    """24 items on 4 codewords: six of each, give or take what the iteration has not settled."""
    rng = np.random.default_rng(2)
    words = sinkhorn_choices(rng.random((24, 4)), np.zeros(24, int), np.ones((1, 4), dtype=bool))
    assert np.bincount(words, minlength=4).tolist() == pytest.approx([6] * 4, abs=2)


def test_small_batches_give_the_same(monkeypatch):
    rng = np.random.default_rng(3)
    given = rng.random((50, 6)), rng.integers(0, 20, 50), np.ones((20, 6), dtype=bool)
    words = sinkhorn_choices(*given)
    monkeypatch.setattr(module, "_BLOCK", 1)
    np.testing.assert_array_equal(sinkhorn_choices(*given), words)


def test_equal_distances_are_no_trouble():
    assert sinkhorn_choices(np.ones((2, 3)), np.zeros(2, int), np.ones((1, 3), dtype=bool)).tolist() == [0, 0]

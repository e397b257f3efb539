"""Several sources in one space: the same spread, the say of their weights, directions that count more alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_itemtok.errors import DataError
from llm_itemtok.items.combine import concatenate, whitened

MATRIX = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_concatenated_sources_have_the_same_spread_and_the_say_of_their_weights():
    rng = np.random.default_rng(0)
    parts = [100 + 7 * rng.normal(size=(50, 3)).astype(np.float32), 0.01 * rng.normal(size=(50, 8)).astype(np.float32)]
    x = concatenate(parts, [1.0, 0.5])
    assert (x.shape, x.dtype) == ((50, 11), np.float32)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
    spread = [np.square(x[:, columns]).sum(axis=1).mean() for columns in (slice(3), slice(3, None))]
    np.testing.assert_allclose(spread, [1.0, 0.25], rtol=1e-4)


def test_an_item_that_a_source_does_not_know_is_at_the_mean_of_the_known_ones():
    known = np.array([[1.0, 0.0], [3.0, 0.0]], dtype=np.float32)
    x = concatenate([np.concatenate([known, np.zeros((1, 2), np.float32)]), MATRIX], [1.0, 1.0])
    np.testing.assert_allclose(x[:, 0], [-1, 1, 0])
    assert concatenate([np.zeros((3, 2), np.float32), MATRIX], [1.0, 1.0])[:, :2].any() == np.False_


def test_components_keep_distances_when_there_are_enough_and_are_fewer_when_asked():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(40, 2)).astype(np.float32) @ rng.normal(size=(2, 6)).astype(np.float32)
    parts = [flat, rng.normal(size=(40, 1)).astype(np.float32)]
    whole, few = concatenate(parts, [1.0, 1.0]), concatenate(parts, [1.0, 1.0], components=3)
    assert few.shape == (40, 3)
    np.testing.assert_allclose(few @ few.T, whole @ whole.T, atol=1e-4)
    np.testing.assert_array_equal(concatenate(parts, [1.0, 1.0], components=99), whole)


def test_sources_that_do_not_fit_each_other_are_refused():
    with pytest.raises(DataError, match="same items, was: 3, 2 of them"):
        concatenate([MATRIX, MATRIX[:2]], [1.0, 1.0])
    with pytest.raises(DataError, match="one weight above 0 a source"):
        concatenate([MATRIX, MATRIX], [1.0])
    with pytest.raises(DataError, match="one weight above 0 a source"):
        concatenate([MATRIX, MATRIX], [1.0, 0.0])


def test_vectors_of_further_items_change_nothing_of_those_that_are_there():
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=(4, 3)).astype(np.float32), np.arange(8, dtype=np.float32).reshape(4, 2)]
    more = [np.concatenate([part, 100 * part[:2]]) for part in parts]
    for components in (0, 2):
        alone = concatenate(parts, [1, 2], components=components)
        beside = concatenate(more, [1, 2], components=components, measured=4)
        np.testing.assert_allclose(beside[:4], alone, atol=1e-6)


def cone(rng, num=400, spread=(5.0, 1.0, 0.2)):
    """Vectors far from 0 that spread unevenly, in axes of their own."""
    turn = np.linalg.qr(rng.normal(size=(len(spread), len(spread))))[0]
    return ((rng.normal(size=(num, len(spread))) * spread + 9) @ turn).astype(np.float32)


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_variances_are_left_with_the_power_that_was_asked_for_and_rows_with_length_one(share, seed):
    rng = np.random.default_rng(seed)
    x = cone(rng)
    found = whitened(x, share)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    # Before their length was taken away, rows were these: cosines tell.
    variances, directions = np.linalg.eigh(np.cov(x, rowvar=False, bias=True, dtype=np.float64))
    raw = (x - x.mean(axis=0, dtype=np.float64)) @ (directions * variances ** (-share / 2))
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, raw @ raw.T, atol=1e-4)


def test_unknown_items_stay_unknown_and_change_nothing():
    x = cone(np.random.default_rng(3), num=50)
    x[[0, 7]] = 0
    found = whitened(x, 0.5)
    assert not found[[0, 7]].any()
    rest = np.delete(found, [0, 7], axis=0)
    alone = whitened(np.delete(x, [0, 7], axis=0), 0.5)
    np.testing.assert_array_equal(rest, alone)


def test_what_does_not_spread_is_no_direction():
    """Of vectors on a line, whitening must not make a second direction out of rounding."""
    line = np.outer(np.linspace(-1, 1, 40), [1.0, 2.0, 3.0]).astype(np.float32) + 1
    found = whitened(line, 1.0)
    likeness = np.abs(found @ found.T)
    np.testing.assert_allclose(likeness, 1, atol=1e-3)
    for same in (np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)):
        assert not whitened(same, 1.0).any()


def test_a_share_out_of_range_is_refused():
    with pytest.raises(DataError, match=r"must be in \[0, 1\], was: 1\.5"):
        whitened(MATRIX, 1.5)

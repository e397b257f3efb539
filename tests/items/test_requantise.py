"""Codebooks that follow vectors: index by index, and likelihoods that are those of a mixture."""

import itertools

import numpy as np
import pytest

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.requantise import LevelMixtures
from llm_itemtok.items.residual_kmeans import ResidualKMeans

SIZES = (4, 3)


@pytest.fixture
def planted():
    """40 items near the sums of codewords that lie far apart, and their codes under shuffled numbers."""
    rng = np.random.default_rng(0)
    books = [rng.normal(size=(4, 6)) * 10, rng.normal(size=(3, 6)) * 2]
    table = np.stack([rng.integers(0, size, 40) for size in SIZES], axis=1)
    table[:12] = list(itertools.product(range(4), range(3)))
    vectors = books[0][table[:, 0]] + books[1][table[:, 1]] + rng.normal(size=(40, 6)) * 0.05
    return vectors.astype(np.float32), ItemCodes(table, SIZES)


def everything(num):
    return np.broadcast_to(np.array(list(itertools.product(range(4), range(3))), dtype=np.int32), (num, 12, 2))


@pytest.mark.parametrize("steps", [0, 3])
def test_where_codes_fit_the_vectors_every_item_keeps_its_code_and_its_number(planted, steps):
    vectors, codes = planted
    mixtures = LevelMixtures.follow(vectors, codes, np.arange(40), steps=steps)
    found, scores = mixtures.candidates(vectors, 3)
    np.testing.assert_array_equal(found[:, 0], codes.table)
    np.testing.assert_allclose(scores[:, 0], mixtures.score(vectors, codes.table[:, None])[:, 0], rtol=1e-5)


def test_an_item_whose_vector_moved_is_offered_the_code_it_moved_to(planted):
    vectors, codes = planted
    vectors[0] = vectors[11]
    mixtures = LevelMixtures.follow(vectors, codes, np.arange(40), steps=2)
    found, scores = mixtures.candidates(vectors[:1], 2)
    assert found[0, 0].tolist() == codes.table[11].tolist()
    assert scores[0, 0] > mixtures.score(vectors[:1], codes.table[:1][None])[0, 0]


def test_likelihoods_of_all_codes_add_up_to_one_and_a_wide_beam_finds_the_best_of_them(planted):
    vectors, codes = planted
    mixtures = LevelMixtures.follow(vectors * 0.1, codes, np.arange(40), steps=1)
    queries = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32)
    scores = mixtures.score(queries, everything(300))
    np.testing.assert_allclose(np.exp(scores.astype(np.float64)).sum(1), 1, rtol=1e-4)
    found, best = mixtures.candidates(queries, 12)
    np.testing.assert_allclose(best, -np.sort(-scores, axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mixtures.score(queries, found), best, rtol=1e-4, atol=1e-4)


def test_a_likelihood_is_that_of_gaussians_with_the_variance_of_one_dimension():
    """Four items on two codewords, worked by hand: centres (0, 0) and (4, 0), each item 1 from its own."""
    vectors = np.array([[0, 1], [0, -1], [4, 1], [4, -1]], dtype=np.float32)
    mixtures = LevelMixtures.follow(vectors, ItemCodes(np.array([[0], [0], [1], [1]]), (2,)), np.arange(4), steps=0)
    variance = 1 / 2  # squared error 1, over two dimensions
    own, other = -1 / (2 * variance), -17 / (2 * variance)
    expected = own - np.logaddexp(own, other), other - np.logaddexp(own, other)
    np.testing.assert_allclose(mixtures.score(vectors[:1], np.array([[[0], [1]]]))[0], expected, atol=1e-5)


def test_codewords_that_nobody_uses_take_no_part(planted):
    vectors, codes = planted
    wider = ItemCodes(codes.table, (6, 3))
    mixtures = LevelMixtures.follow(vectors, wider, np.arange(40), steps=2)
    found, scores = mixtures.candidates(vectors, 30)
    assert np.isfinite(scores).sum(1).tolist() == [12] * 40
    assert found[np.isfinite(scores)][:, 0].max() == 3
    assert mixtures.score(vectors[:1], np.array([[[5, 0]]], dtype=np.int32))[0, 0] == -np.inf


def test_for_codes_of_residual_kmeans_it_begins_at_its_codebooks():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    tokenizer = ResidualKMeans(levels=2, codebook_size=8)
    codes = tokenizer.fit(vectors)
    mixtures = LevelMixtures.follow(vectors, codes, np.arange(300), steps=0)
    np.testing.assert_allclose(mixtures.codebooks, tokenizer.quantizer.codebooks.detach(), atol=1e-5)

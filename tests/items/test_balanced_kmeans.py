"""Balanced k-means: clusters of about equal size, by a rule that also holds for points it has not seen."""

import numpy as np
import pytest
import torch

from llm_itemtok.items import balanced_kmeans as module
from llm_itemtok.items.balanced_kmeans import balanced_kmeans
from llm_itemtok.items.kmeans import kmeans, squared_errors
from llm_itemtok.items.residual_kmeans import ResidualKMeans


def points(num=2000, dimensions=8, seed=0):
    """Much denser in the middle than outside, where k-means makes clusters of very different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num, dimensions)) * rng.exponential(size=(num, 1))).astype(np.float32)


def test_no_cluster_is_half_as_large_again_as_its_share_and_the_cost_is_small():
    """A cluster may stay small: one that the start put far outside finds few points."""
    x = points()
    found, free = balanced_kmeans(x, 16), kmeans(x, 16)
    sizes = np.bincount(found.labels, minlength=16)
    free_sizes = np.bincount(free.labels, minlength=16)
    assert free_sizes.max() > 2 * 125
    assert sizes.max() < 1.5 * 125
    assert sizes.std() < 0.5 * free_sizes.std()
    assert squared_errors(x, found.centres, found.labels).mean() < 2 * free.errors.mean()


def test_points_that_were_not_seen_are_balanced_by_the_same_prices():
    tokenizer = ResidualKMeans(levels=1, codebook_size=16, balance=True)
    tokenizer.fit(points())
    codes = tokenizer.quantizer.encode(torch.from_numpy(points(seed=1)))[:, 0]
    assert torch.bincount(codes, minlength=16).max() < 2 * 125


def test_labels_are_the_cheapest_clusters():
    x = points(300)
    found = balanced_kmeans(x, 8)
    dear = np.square(x[:, None] - found.centres).sum(axis=2) + found.prices
    np.testing.assert_array_equal(found.labels, dear.argmin(axis=1))
    assert abs(found.prices.mean()) < 1e-3 * np.abs(found.prices).max()


def test_blocks_do_not_change_the_clusters(monkeypatch):
    whole = balanced_kmeans(points(300), 8)
    monkeypatch.setattr(module, "BLOCK", 37)
    blocks = balanced_kmeans(points(300), 8)
    np.testing.assert_array_equal(whole.labels, blocks.labels)
    np.testing.assert_allclose(whole.centres, blocks.centres, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num", [1, 3, 8])
def test_no_more_points_than_clusters_are_met_exactly(num):
    found = balanced_kmeans(points(num), 8)
    assert squared_errors(points(num), found.centres, found.labels).max() == 0
    assert found.prices.tolist() == [0.0] * 8


def test_quantizers_without_balance_are_saved_as_before_there_was_any():
    plain = ResidualKMeans(levels=1, codebook_size=4)
    plain.fit(points(50))
    assert set(plain.quantizer.settings()) == {"levels", "codebook_size", "dimensions", "latent_dimensions"}
    assert set(plain.quantizer.state_dict()) == {"codebooks", "scale"}
    assert plain.quantizer.prices() is None

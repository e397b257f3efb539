"""k-means finds planted clusters, repeats itself, and copes with too few points."""

import numpy as np
import pytest

from llm_itemtok.errors import DataError
from llm_itemtok.items import kmeans as module
from llm_itemtok.items.kmeans import kmeans


def planted(seed=0, num=200):
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], dtype=np.float32)
    labels = rng.integers(4, size=num)
    return (centres[labels] + rng.normal(0, 0.1, (num, 2))).astype(np.float32), labels


def test_planted_clusters_are_found():
    points, planted_labels = planted()
    found = kmeans(points, 4, seed=1)
    pairs = {(a, b) for a, b in zip(planted_labels.tolist(), found.labels.tolist(), strict=True)}
    assert len(pairs) == 4
    assert found.errors.max() < 0.5
    for cluster in range(4):
        np.testing.assert_allclose(found.centres[cluster], points[found.labels == cluster].mean(0), atol=1e-5)


def test_two_clusters_by_hand():
    found = kmeans(np.array([[0.0], [2.0], [10.0], [12.0]], dtype=np.float32), 2)
    assert sorted(found.centres.ravel().tolist()) == [1.0, 11.0]
    assert found.errors.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_the_same_seed_gives_the_same_clusters():
    points = np.random.default_rng(3).normal(size=(300, 5)).astype(np.float32)
    first, second, other = kmeans(points, 8, seed=5), kmeans(points, 8, seed=5), kmeans(points, 8, seed=6)
    np.testing.assert_array_equal(first.centres, second.centres)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert not np.array_equal(first.centres, other.centres)


def test_blocks_do_not_change_the_clusters(monkeypatch):
    points, _ = planted()
    whole = kmeans(points, 4, seed=1)
    monkeypatch.setattr(module, "BLOCK", 7)
    blocks = kmeans(points, 4, seed=1)
    np.testing.assert_array_equal(whole.labels, blocks.labels)
    np.testing.assert_allclose(whole.centres, blocks.centres, rtol=1e-6)


def test_fewer_distinct_points_than_clusters_are_all_met_exactly():
    points = np.repeat(np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32), 5, axis=0)
    found = kmeans(points, 6)
    assert found.errors.max() == 0
    assert np.isfinite(found.centres).all()
    assert kmeans(points[:1], 3).centres.tolist() == [[1.0, 2.0]] * 3


def test_an_empty_cluster_takes_the_worst_served_point():
    points = np.array([[0.0], [1.0], [9.0]], dtype=np.float32)
    centres = np.array([[0.0], [50.0]], dtype=np.float32)
    labels, sums = module._assign(points, centres)
    assert labels.tolist() == [0, 0, 0]
    assert module.squared_errors(points, centres, labels).tolist() == [0.0, 1.0, 81.0]
    assert sums.tolist() == [[10.0], [0.0]]
    moved = module._update(points, centres, labels, sums)
    assert moved.tolist() == [[0.5], [9.0]]


def test_no_cluster_stays_empty_when_points_suffice():
    points = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    assert len(np.unique(kmeans(points, 32, seed=2).labels)) == 32


@pytest.mark.parametrize(
    ("points", "clusters", "iterations", "message"),
    [
        (np.zeros((0, 2), np.float32), 2, 5, r"at least one, was: \(0, 2\)"),
        (np.zeros(3, np.float32), 2, 5, "shape"),
        (np.zeros((3, 2), np.float32), 0, 5, "at least 1 cluster"),
        (np.zeros((3, 2), np.float32), 2, 0, "1 iteration, was: 2 and 0"),
    ],
)
def test_numbers_out_of_range_are_refused(points, clusters, iterations, message):
    with pytest.raises(DataError, match=message):
        kmeans(points, clusters, iterations=iterations)

"""Hierarchical codes: unique by construction, prefixes are clusters, and items without co-occurrence have a place."""

import numpy as np
import pytest
import scipy.sparse

from llm_itemtok.errors import DataError
from llm_itemtok.items.collaborative import co_occurrence
from llm_itemtok.items.hierarchical import HierarchicalCodes, fill, spectral_places

GROUPS = 6


def vectors(num=240, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(GROUPS, 5))
    return (centres[np.arange(num) % GROUPS] + rng.normal(size=(num, 5))).astype(np.float32)


def bought_together(num=240, unseen=(), seed=0):
    """Sequences inside planted groups (row modulo `GROUPS`, as the vectors), one in ten items from anywhere."""
    rng = np.random.default_rng(seed)
    seen = np.setdiff1d(np.arange(num), unseen)
    sequences = []
    for user in range(3 * num):
        own = seen[seen % GROUPS == user % GROUPS]
        sequence = rng.choice(own, size=6, replace=False)
        stranger = rng.random(6) < 0.1
        sequences.append(np.where(stranger, rng.choice(seen, size=6), sequence))
    offsets = np.arange(len(sequences) + 1) * 6
    return co_occurrence(np.concatenate(sequences), offsets, num_items=num)


@pytest.mark.parametrize("together", [None, bought_together()], ids=["vectors", "co-occurrence"])
@pytest.mark.parametrize(("levels", "size"), [(1, 240), (2, 16), (3, 7), (3, 256), (5, 3), (8, 2)])
def test_codes_are_unique_even_where_hardly_any_are_free(together, levels, size):
    codes = HierarchicalCodes(levels=levels, codebook_size=size, together=together).fit(vectors())
    assert codes.is_injective
    assert codes.sizes == (size,) * levels
    assert codes == HierarchicalCodes(levels=levels, codebook_size=size, together=together).fit(vectors())


def test_every_code_may_be_taken():
    codes = HierarchicalCodes(levels=3, codebook_size=4).fit(vectors(64))
    assert len(np.unique(codes.table, axis=0)) == 64


@pytest.mark.parametrize("num", [1, 2, 3])
def test_catalogues_of_a_few_items(num):
    for together in (None, scipy.sparse.csr_array((num, num))):
        assert HierarchicalCodes(together=together).fit(vectors(num)).is_injective


def test_prefixes_are_the_planted_groups():
    """Vectors say nothing here: only who is bought with whom does."""
    noise = np.random.default_rng(1).normal(size=(240, 4)).astype(np.float32)
    first = HierarchicalCodes(levels=3, codebook_size=256, together=bought_together()).fit(noise).table[:, 0]
    group = np.arange(240) % GROUPS
    together = first[:, None] == first
    assert together[group[:, None] == group].mean() > 0.5
    assert together[group[:, None] != group].mean() < 0.05


def test_items_that_were_never_seen_stand_with_their_kind_where_there_is_room():
    unseen = np.arange(12)
    codes = HierarchicalCodes(levels=2, codebook_size=48, together=bought_together(unseen=unseen)).fit(vectors())
    first, group = codes.table[:, 0], np.arange(240) % GROUPS
    beside = [(first == first[item]) & ~np.isin(np.arange(240), unseen) for item in unseen]
    kin = [(group[others] == group[item]).mean() for item, others in zip(unseen, beside, strict=True)]
    assert np.mean(kin) > 0.75


def test_no_child_has_more_than_twice_its_share():
    lopsided = np.concatenate([np.zeros((200, 3)), np.eye(3).repeat(14, axis=0)]).astype(np.float32)
    codes = HierarchicalCodes(levels=2, codebook_size=256).fit(lopsided[:240])
    width = int(np.ceil(240**0.5))
    assert codes.prefix_counts(1)[1].max() <= 2 * 240 / width + 1


def test_codewords_of_a_level_take_turns():
    codes = HierarchicalCodes(levels=3, codebook_size=10).fit(vectors())
    for depth in (1, 2):
        counts = np.bincount(codes.prefix_counts(depth)[0][:, -1], minlength=10)
        assert counts.max() - counts.min() <= 1


def test_points_of_pairs_that_stand_apart_do_not_take_the_eigenvectors():
    """Two large groups and ten pairs: without raised degrees the pairs would fill the leading eigenvectors."""
    big = np.ones((30, 30))
    pair = np.array([[0.0, 1.0], [1.0, 0.0]])
    together = scipy.sparse.csr_array(scipy.sparse.block_diag([big, big, *[pair] * 10]))
    places = spectral_places(together, 2, seed=0)
    assert places[:30] @ places[:30].T == pytest.approx(np.ones((30, 30)), abs=1e-4)
    assert places[:30] @ places[30:60].T == pytest.approx(np.zeros((30, 30)), abs=1e-4)


def test_large_nodes_get_the_places_that_small_ones_do(monkeypatch):
    together = bought_together()
    exact = spectral_places(together, 6, seed=0)
    monkeypatch.setattr("llm_itemtok.items.hierarchical.DENSE", 0)
    iterated = spectral_places(together, 6, seed=0)
    np.testing.assert_allclose(iterated @ iterated.T, exact @ exact.T, atol=1e-2)


def test_points_fill_their_nearest_child_and_the_worst_fitting_move_on():
    distances = np.array([[0.0, 5.0], [1.0, 3.0], [2.0, 9.0], [np.inf, np.inf]])
    assert fill(distances, np.array([2, 2])).tolist() == [0, 0, 1, 1]
    assert fill(distances[:3], np.array([3, 0])).tolist() == [0, 0, 0]


def test_too_many_items_and_foreign_counts_are_refused():
    with pytest.raises(DataError, match="240 items cannot have a path each: 2 levels of 15 spell only 225"):
        HierarchicalCodes(levels=2, codebook_size=15).fit(vectors())
    with pytest.raises(DataError, match=r"counted for the 240 items that have vectors, was: \(3, 3\)"):
        HierarchicalCodes(together=scipy.sparse.csr_array((3, 3))).fit(vectors())

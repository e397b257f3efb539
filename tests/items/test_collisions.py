"""Resolving collisions: rows become unique, rows that were unique stay as they are."""

import numpy as np
import pytest
import torch

from llm_itemtok.errors import CollisionError, DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collisions import extra_level, forbid, reassign
from llm_itemtok.items.residual_kmeans import ResidualKMeans, ResidualKMeansQuantizer

CODES = ItemCodes([[0, 1], [1, 1], [0, 1], [0, 0], [0, 1]], (2, 3))


def crowded(num=200, levels=3, codebook_size=6, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(num, 5)).astype(np.float32)
    vectors[num // 2 :] = vectors[: num - num // 2]  # every vector twice: half of the items at least collide
    tokenizer = ResidualKMeans(levels=levels, codebook_size=codebook_size)
    return tokenizer.fit(vectors), vectors, tokenizer.quantizer


def unshared(codes):
    groups = codes.prefix_groups(codes.num_levels)
    return np.bincount(groups)[groups] == 1


def test_extra_level_by_hand():
    resolved = extra_level(CODES)
    assert resolved.table.tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 1, 2]]
    assert resolved.sizes == (2, 3, 3)
    assert resolved.names == ("level-0", "level-1", "extra")
    assert resolved.provenance["collisions"] == {
        "policy": "extra-level", "collision_rate_before": 0.6, "levels_before": 2
    }  # fmt: skip


def test_extra_level_is_as_large_as_the_last_level_or_the_fullest_code():
    assert extra_level(ItemCodes([[0], [0], [1]], (5,))).sizes == (5, 5)
    assert extra_level(ItemCodes([[0]] * 7, (5,))).sizes == (5, 7)
    assert extra_level(CODES, size=40).sizes == (2, 3, 40)
    with pytest.raises(CollisionError, match="fullest code, 3, but its size was: 2"):
        extra_level(CODES, size=2)


def test_a_second_extra_level_gets_a_name_of_its_own():
    assert extra_level(extra_level(CODES)).names == ("level-0", "level-1", "extra", "extra-2")


@pytest.mark.parametrize("estimate", [False, True])
def test_after_resolution_rows_are_unique_and_unshared_rows_are_unchanged(estimate):
    codes, vectors, quantizer = crowded()
    kept = unshared(codes)
    assert codes.collision_rate > 0.9
    longer = extra_level(codes)
    moved = reassign(codes, vectors, None if estimate else quantizer)
    assert longer.is_injective
    assert moved.is_injective
    np.testing.assert_array_equal(longer.table[:, :3], codes.table)
    assert (longer.table[kept, 3] == 0).all()
    np.testing.assert_array_equal(moved.table[kept], codes.table[kept])
    assert moved.sizes == codes.sizes
    record = moved.provenance["collisions"]
    assert record["collision_rate_before"] == codes.collision_rate
    assert record["items_moved"] == (moved.table != codes.table).any(axis=1).sum()


def test_unique_codes_are_left_alone():
    codes = ItemCodes([[0, 0], [1, 2]], (2, 3))
    vectors = np.eye(2, dtype=np.float32)
    assert reassign(codes, vectors) == codes
    assert reassign(codes, vectors).provenance["collisions"]["items_moved"] == 0
    assert forbid(codes, ("a", "b")) == codes


def line_quantizer():
    """Level 0 at 0 and 10, level 1 adds 0, 1 or 2."""
    quantizer = ResidualKMeansQuantizer(levels=2, codebook_size=3, dimensions=1)
    quantizer.codebooks.data = torch.tensor([[[0.0], [10.0], [50.0]], [[0.0], [1.0], [2.0]]])
    return quantizer


def test_reassign_by_hand():
    """All are nearest to 1; 1.08 keeps it. Then 0.88 takes the nearest free one, 0, and 1.3 takes 2."""
    vectors = np.array([[1.08], [0.88], [1.3]], dtype=np.float32)
    quantizer = line_quantizer()
    codes = ItemCodes(quantizer.encode(torch.from_numpy(vectors)).numpy(), (3, 3))
    assert codes.table.tolist() == [[0, 1], [0, 1], [0, 1]]
    moved = reassign(codes, vectors, quantizer)
    assert moved.table.tolist() == [[0, 1], [0, 0], [0, 2]]
    record = moved.provenance["collisions"]
    assert record["squared_error_before"] == pytest.approx((0.08**2 + 0.12**2 + 0.3**2) / 3, rel=1e-4)
    assert record["squared_error_after"] == pytest.approx((0.08**2 + 0.88**2 + 0.7**2) / 3, rel=1e-4)


def test_reassign_leaves_a_prefix_only_when_it_is_full():
    """Five items at 1 fill the three codes around 0; the other two go on to 10, the next nearest: 10, then 11."""
    vectors = np.full((5, 1), 1.0, dtype=np.float32)
    codes = ItemCodes([[0, 1]] * 5, (3, 3))
    moved = reassign(codes, vectors, line_quantizer())
    assert moved.table.tolist() == [[0, 1], [0, 0], [0, 2], [1, 0], [1, 1]]


def test_reassign_fills_every_code_when_there_are_as_many_items():
    vectors = np.random.default_rng(0).normal(size=(27, 2)).astype(np.float32)
    moved = reassign(ItemCodes(np.zeros((27, 3), int), (3, 3, 3)), vectors)
    assert moved.is_injective
    assert moved.num_items == moved.capacity


def test_reassign_respects_levels_of_different_sizes():
    vectors = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    moved = reassign(ItemCodes(np.zeros((8, 2), int), (4, 2)), vectors)
    assert moved.is_injective
    assert moved.sizes == (4, 2)


def test_reassign_repeats_itself():
    codes, vectors, quantizer = crowded()
    assert reassign(codes, vectors, quantizer) == reassign(codes, vectors, quantizer)


def test_reassign_refuses_more_items_than_codes():
    codes = ItemCodes([[0, 0]] * 5, (2, 2))
    with pytest.raises(CollisionError, match=r"5 items cannot have a code each.*only 4 codes"):
        reassign(codes, np.zeros((5, 1), np.float32))


def test_reassign_needs_vectors_only_when_there_is_something_to_move():
    unique = ItemCodes([[0], [1]], (2,))
    assert reassign(unique, None) == unique
    with pytest.raises(DataError, match="needs item vectors"):
        reassign(ItemCodes([[0], [0]], (2,)), None)


def test_reassign_refuses_what_does_not_fit_together():
    codes, vectors, quantizer = crowded()
    with pytest.raises(DataError, match="one vector a code, 200 of them, was: 199"):
        reassign(codes, vectors[1:], quantizer)
    with pytest.raises(DataError, match=r"same levels, was: \(6, 6, 6, .*\) and \(6, 6, 6\)"):
        reassign(extra_level(codes), vectors, quantizer)


def test_forbid_says_how_bad_it_is_and_what_to_do():
    with pytest.raises(CollisionError) as caught:
        forbid(ItemCodes([[1, 2], [1, 2], [0, 1], [1, 2]], (2, 3)), ("B00A", "B00B", "B00C", "B00D"))
    assert str(caught.value) == (
        "3 of 4 items (75.0%) share their code with another item, so decoding could not tell them apart.\n"
        "  worst: code (1, 2) stands for 3 items (B00A, B00B, B00D)\n"
        "  fix, in the recipe's `tokenizer` section: `collisions: extra-level` adds one level that counts within a "
        "code;\n"
        "  or raise `codebook_size` or `levels` and fit again. `itemtok inspect <run>` shows usage level by level."
    )

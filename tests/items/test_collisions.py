"""Resolving collisions: rows become unique, rows that were unique stay as they are."""

import itertools

import numpy as np
import pytest
import torch

from llm_itemtok.errors import CollisionError, DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collisions import extra_level, forbid, matching, reassign, sinkhorn
from llm_itemtok.items.residual_kmeans import ResidualKMeans, ResidualKMeansQuantizer

MOVING = pytest.mark.parametrize("move", [reassign, sinkhorn, matching])
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
@MOVING
def test_after_resolution_rows_are_unique_and_unshared_rows_are_unchanged(move, estimate):
    codes, vectors, quantizer = crowded()
    kept = unshared(codes)
    assert codes.collision_rate > 0.9
    longer = extra_level(codes)
    moved = move(codes, vectors, None if estimate else quantizer)
    assert longer.is_injective
    assert moved.is_injective
    np.testing.assert_array_equal(longer.table[:, :3], codes.table)
    assert (longer.table[kept, 3] == 0).all()
    np.testing.assert_array_equal(moved.table[kept], codes.table[kept])
    assert moved.sizes == codes.sizes
    record = moved.provenance["collisions"]
    assert record["collision_rate_before"] == codes.collision_rate
    assert record["items_moved"] == (moved.table != codes.table).any(axis=1).sum()


@MOVING
def test_unique_codes_are_left_alone(move):
    codes = ItemCodes([[0, 0], [1, 2]], (2, 3))
    for vectors in (np.eye(2, dtype=np.float32), None):
        assert move(codes, vectors) == codes
        assert move(codes, vectors).provenance["collisions"]["items_moved"] == 0
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


def test_matching_by_hand():
    """All are nearest to 1. One by one, 1.2 keeps it, 1.3 takes 2 and leaves 0 to 1.4; together, 1.2 goes to 0."""
    vectors = np.array([[1.2], [1.3], [1.4]], dtype=np.float32)
    codes = ItemCodes([[0, 1]] * 3, (3, 3))
    one_by_one, together = (move(codes, vectors, line_quantizer()) for move in (reassign, matching))
    assert one_by_one.table[:, 1].tolist() == [1, 2, 0]
    assert together.table[:, 1].tolist() == [0, 1, 2]
    record = together.provenance["collisions"]
    assert record["squared_error_after"] == pytest.approx((1.2**2 + 0.3**2 + 0.6**2) / 3, rel=1e-5)
    assert (record["policy"], record["items_moved"], record["candidates"]) == ("matching", 2, 9)


def test_sinkhorn_by_hand():
    """As in matching by hand: three items on three codewords have no other even assignment that costs as little."""
    vectors = np.array([[1.2], [1.3], [1.4]], dtype=np.float32)
    moved = sinkhorn(ItemCodes([[0, 1]] * 3, (3, 3)), vectors, line_quantizer())
    assert moved.table[:, 1].tolist() == [0, 1, 2]
    assert moved.provenance["collisions"]["nearest_free"] == 0


@pytest.mark.parametrize("codebook_size", [6, 16])
@pytest.mark.parametrize("seed", range(5))
def test_matching_costs_no_more_than_the_others(seed, codebook_size):
    """It takes the best assignment of candidates that hold those of `reassign`, also where prefixes are full."""
    codes, vectors, quantizer = crowded(num=160 + 10 * seed, codebook_size=codebook_size, seed=seed)
    costs = {
        move.__name__: move(codes, vectors, quantizer).provenance["collisions"]["squared_error_after"]
        for move in (reassign, sinkhorn, matching)
    }
    assert costs["matching"] <= costs["reassign"] * (1 + 1e-6)
    full = codes.prefix_counts(2)[1].max() > codes.sizes[-1]
    assert full == (codebook_size == 6)
    assert full or costs["matching"] <= costs["sinkhorn"] * (1 + 1e-6)


def test_matching_is_the_best_there_is_under_a_prefix():
    """Against all permutations of six items over the seven codewords that are free."""
    rng = np.random.default_rng(0)
    quantizer = ResidualKMeansQuantizer(levels=1, codebook_size=8, dimensions=2)
    quantizer.codebooks.data = torch.from_numpy(rng.normal(size=(1, 8, 2)).astype(np.float32))
    vectors = rng.normal(size=(7, 2)).astype(np.float32)
    codes = ItemCodes([[3]] * 6 + [[5]], (8,))
    moved = matching(codes, vectors, quantizer)
    distances = np.square(vectors[:6, None] - quantizer.codebooks.detach().numpy()).sum(axis=2)
    free = [word for word in range(8) if word != 5]
    best = min(sum(distances[row, word] for row, word in enumerate(words)) for words in itertools.permutations(free, 6))
    assert distances[np.arange(6), moved.table[:6, 0]].sum() == pytest.approx(best, rel=1e-5)
    assert moved.table[6].tolist() == [5]


def test_sinkhorn_keeps_prefixes_and_is_nearly_as_cheap_as_matching():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 8)).astype(np.float32)
    tokenizer = ResidualKMeans(levels=2, codebook_size=32)
    codes = tokenizer.fit(vectors)
    spread, best = (move(codes, vectors, tokenizer.quantizer) for move in (sinkhorn, matching))
    np.testing.assert_array_equal(spread.table[:, 0], codes.table[:, 0])
    before, after, least = (
        spread.provenance["collisions"]["squared_error_before"],
        *(found.provenance["collisions"]["squared_error_after"] for found in (spread, best)),
    )
    assert after - before <= 1.3 * (least - before)


def test_items_that_are_the_same_are_told_apart_by_sinkhorn():
    """Their shares are equal, so each round only one of them is settled; after the rounds the nearest free code is."""
    vectors = np.full((30, 1), 1.0, dtype=np.float32)
    quantizer = ResidualKMeansQuantizer(levels=2, codebook_size=32, dimensions=1)
    codes = ItemCodes([[0, 1]] * 30, (32, 32))
    moved = sinkhorn(codes, vectors, quantizer)
    assert moved.is_injective
    assert (moved.table[:, 0] == 0).all()
    assert moved.provenance["collisions"]["rounds"] == 20
    assert moved.provenance["collisions"]["nearest_free"] == 10


@MOVING
def test_a_prefix_is_left_only_when_it_is_full(move):
    """Five items at 1 fill the three codes around 0; the other two go on to 10, the next nearest: 10, then 11."""
    vectors = np.full((5, 1), 1.0, dtype=np.float32)
    codes = ItemCodes([[0, 1]] * 5, (3, 3))
    moved = move(codes, vectors, line_quantizer())
    assert sorted(moved.table.tolist()) == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]


@MOVING
def test_every_code_is_filled_when_there_are_as_many_items(move):
    vectors = np.random.default_rng(0).normal(size=(27, 2)).astype(np.float32)
    moved = move(ItemCodes(np.zeros((27, 3), int), (3, 3, 3)), vectors)
    assert moved.is_injective
    assert moved.num_items == moved.capacity


@MOVING
def test_levels_of_different_sizes_are_respected(move):
    vectors = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    moved = move(ItemCodes(np.zeros((8, 2), int), (4, 2)), vectors)
    assert moved.is_injective
    assert moved.sizes == (4, 2)


@MOVING
def test_moves_repeat_themselves(move):
    codes, vectors, quantizer = crowded()
    assert move(codes, vectors, quantizer) == move(codes, vectors, quantizer)


@MOVING
def test_more_items_than_codes_are_refused(move):
    codes = ItemCodes([[0, 0]] * 5, (2, 2))
    with pytest.raises(CollisionError, match=r"5 items cannot have a code each.*only 4 codes"):
        move(codes, np.zeros((5, 1), np.float32))


@MOVING
def test_vectors_are_needed_only_when_there_is_something_to_move(move):
    unique = ItemCodes([[0], [1]], (2,))
    assert move(unique, None) == unique
    with pytest.raises(DataError, match=f"`collisions: {move.__name__}` needs item vectors"):
        move(ItemCodes([[0], [0]], (2,)), None)


@MOVING
def test_what_does_not_fit_together_is_refused(move):
    codes, vectors, quantizer = crowded()
    with pytest.raises(DataError, match="one vector a code, 200 of them, was: 199"):
        move(codes, vectors[1:], quantizer)
    with pytest.raises(DataError, match=r"same levels, was: \(6, 6, 6, .*\) and \(6, 6, 6\)"):
        move(extra_level(codes), vectors, quantizer)


def test_forbid_says_how_bad_it_is_and_what_to_do():
    with pytest.raises(CollisionError) as caught:
        forbid(ItemCodes([[1, 2], [1, 2], [0, 1], [1, 2]], (2, 3)), ("B00A", "B00B", "B00C", "B00D"))
    assert str(caught.value) == (
        "3 of 4 items (75.0%) share their code with another item, so decoding could not tell them apart.\n"
        "  worst: code (1, 2) stands for 3 items (B00A, B00B, B00D)\n"
        "  fix, in the recipe's `tokenizer` section: `collisions: extra-level` adds one level that counts within a "
        "code;\n"
        "  `sinkhorn`, `matching` and `reassign` move items to free codes by their item vectors;\n"
        "  or raise `codebook_size` or `levels`, so that codes are fitted anew"
    )


def test_what_is_advised_can_be_followed_by_codes_of_a_file():
    """Such codes have no `codebook_size`, and no run to inspect."""
    codes = ItemCodes([[1], [1], [0]], (2,), provenance={"kind": "file", "file": "x.csv"})
    for move in (lambda codes: forbid(codes, "abc"), lambda codes: matching(codes, np.zeros((3, 1), np.float32))):
        with pytest.raises(CollisionError, match=r"extra-level") as caught:
            move(codes)
        assert "codebook_size" not in str(caught.value)

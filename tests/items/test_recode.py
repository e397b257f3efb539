"""Codes read anew: unique, of the same sizes, and as they were wherever nothing asks for a change."""

import numpy as np
import pytest
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collisions import extra_level, reassign
from llm_itemtok.items.product import ProductQuantizer
from llm_itemtok.items.recode import recode
from llm_itemtok.items.residual_kmeans import ResidualKMeans, ResidualKMeansQuantizer

VECTORS = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)


def fitted(size=8, levels=2):
    tokenizer = ResidualKMeans(levels=levels, codebook_size=size)
    codes = tokenizer.fit(VECTORS)
    return tokenizer.quantizer, codes


def moved(quantizer, amount=0.3, seed=1):
    """The same quantizer after some training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        quantizer.codebooks.add_(torch.randn_like(quantizer.codebooks) * amount)
    return quantizer


def line_quantizer(places):
    """Codewords on a line, one level."""
    quantizer = ResidualKMeansQuantizer(levels=1, codebook_size=len(places), dimensions=1)
    quantizer.codebooks.data[0, :, 0] = torch.tensor(places)
    return quantizer


@pytest.mark.parametrize("extra", [True, False])
def test_a_quantizer_that_did_not_change_changes_nothing(extra):
    quantizer, codes = fitted(20)
    resolved = extra_level(codes) if extra else reassign(codes, VECTORS, quantizer)
    found = recode(quantizer, VECTORS, resolved)
    assert np.array_equal(found.table, resolved.table)
    assert found.collisions == codes.collision_rate
    assert found.displaced == (0 if extra else resolved.provenance["collisions"]["items_moved"])


def test_with_a_margin_an_item_moves_only_to_a_codeword_that_is_nearer_by_so_much():
    """By hand, on a line: from 1 the codeword at 0 is 1 away, and the one at 1.9, .81."""
    before, after = line_quantizer([0.0, 9.0, 7.0]), line_quantizer([0.0, 1.9, 7.0])
    vectors = np.array([[1.0]], dtype=np.float32)
    held = ItemCodes(before.encode_blocks(vectors), (3,))
    assert held.table.tolist() == [[0]]
    assert recode(after, vectors, held, margin=0.2).table.tolist() == [[1]]
    assert recode(after, vectors, held, margin=0.3).table.tolist() == [[0]]


def test_with_a_margin_prices_count_as_distance():
    """From 1 the codeword at 0 is 1 away and the one at 1.5, .25: with a price of 1 it is the dearer one."""
    quantizer = ResidualKMeansQuantizer(levels=1, codebook_size=2, dimensions=1, balanced=True)
    quantizer.codebooks.data[0, :, 0] = torch.tensor([0.0, 1.5])
    vectors, second = np.array([[1.0]], dtype=np.float32), ItemCodes(np.array([[1]]), (2,))
    assert recode(quantizer, vectors, second, margin=0.01).table.tolist() == [[1]]
    quantizer.price_table[0] = torch.tensor([0.0, 1.0])
    assert recode(quantizer, vectors, second, margin=0.01).table.tolist() == [[0]]
    assert recode(quantizer, vectors, second).table.tolist() == [[0]]


def test_with_a_margin_lower_levels_follow_what_is_kept():
    """A codeword that is kept leaves another rest for the levels below than the nearest one would."""
    quantizer, codes = fitted(20)
    resolved = extra_level(codes)
    changed = moved(quantizer, amount=0.1)
    kept = recode(changed, VECTORS, resolved, margin=0.5).table
    upper = kept[:, 0] == resolved.table[:, 0]
    distances = ((VECTORS[:, None] - changed.codebooks[0].detach().numpy()) ** 2).sum(2)
    own = distances[np.arange(300), resolved.table[:, 0]]
    np.testing.assert_array_equal(upper, own <= 1.5 * distances.min(1))
    found = [recode(changed, VECTORS, resolved, margin=margin).table for margin in (0.0, 0.1, 0.5)]
    moves = [int((table[:, :2] != resolved.table[:, :2]).sum()) for table in found]
    assert moves[0] > moves[1] > moves[2] > 0
    assert (recode(changed, VECTORS, resolved, margin=1e-9).table == recode(changed, VECTORS, resolved).table).all()


def test_the_next_level_describes_what_the_kept_codeword_leaves_over():
    """By hand: 1 keeps the codeword at 0, so 1 is left over, not the -.9 that the nearer one at 1.9 would leave."""
    quantizer = ResidualKMeansQuantizer(levels=2, codebook_size=2, dimensions=1)
    quantizer.codebooks.data[:, :, 0] = torch.tensor([[0.0, 1.9], [-0.9, 1.0]])
    vectors, held = np.array([[1.0]], dtype=np.float32), ItemCodes(np.array([[0, 0]]), (2, 2))
    assert recode(quantizer, vectors, held).table.tolist() == [[1, 0]]
    assert recode(quantizer, vectors, held, margin=0.3).table.tolist() == [[0, 1]]


def test_in_a_product_a_margin_is_of_the_dimensions_that_a_level_tells():
    """The other level's dimension is as far from all codewords of this one, and would make any two about as near."""
    quantizer = ProductQuantizer(levels=2, codebook_size=2, dimensions=2, latent_dimensions=2)
    quantizer.turn.copy_(torch.eye(2))
    quantizer.codebooks.data[0, :, 0] = torch.tensor([0.0, 1.9])
    quantizer.codebooks.data[1, :, 1] = torch.tensor([100.0, 0.0])
    vectors, held = np.array([[1.0, 50.5]], dtype=np.float32), ItemCodes(np.array([[0, 0]]), (2, 2))
    assert recode(quantizer, vectors, held, margin=0.2).table.tolist() == [[1, 0]]
    assert recode(quantizer, vectors, held, margin=0.3).table.tolist() == [[0, 0]]


@pytest.mark.parametrize("extra", [True, False])
def test_codes_are_those_that_vectors_read_unique_and_of_the_same_sizes(extra):
    quantizer, codes = fitted(20)
    resolved = extra_level(codes) if extra else reassign(codes, VECTORS, quantizer)
    found = recode(moved(quantizer), VECTORS, resolved)
    new = ItemCodes(found.table, resolved.sizes)
    assert new.is_injective
    read = quantizer.encode_blocks(VECTORS)
    assert int((new.table[:, :2] != read).any(axis=1).sum()) == found.displaced
    assert found.collisions == ItemCodes(read, codes.sizes).collision_rate
    if extra:
        assert found.displaced == 0
    else:
        groups = ItemCodes(read, codes.sizes).prefix_groups(2)
        assert found.displaced == len(groups) - len(np.unique(groups))


def test_an_item_that_stays_keeps_its_number_and_newcomers_take_the_lowest_free_ones():
    quantizer = line_quantizer([0.0, 10.0])
    vectors = np.array([[0.0], [0.1], [9.0], [0.2], [10.0], [0.3]], dtype=np.float32)
    before = ItemCodes(np.array([[0, 3], [1, 0], [1, 1], [1, 2], [1, 4], [0, 1]], dtype=np.int32), (2, 6))
    found = recode(quantizer, vectors, before)
    # Item 0 and 5 stay at code 0 with 3 and 1; 1 and 3 come to it, in row order. Items 2 and 4 stay.
    assert found.table.tolist() == [[0, 3], [0, 0], [1, 1], [0, 2], [1, 4], [0, 1]]
    assert (found.displaced, found.collisions) == (0, 1.0)


def test_an_item_beyond_the_extra_level_goes_to_the_nearest_code_with_room():
    quantizer = line_quantizer([0.0, 4.0, 10.0])
    vectors = np.array([[0.0], [0.1], [0.2], [10.0]], dtype=np.float32)
    before = ItemCodes(np.array([[0, 0], [0, 1], [1, 0], [2, 1]], dtype=np.int32), (3, 2))
    found = recode(quantizer, vectors, before)
    assert found.table.tolist() == [[0, 0], [0, 1], [1, 0], [2, 1]]
    assert found.displaced == 1


def test_whoever_had_a_code_keeps_it_though_another_is_nearer():
    quantizer = line_quantizer([0.0, 4.0, 10.0])
    vectors = np.array([[0.0], [1.0], [10.0]], dtype=np.float32)
    held = ItemCodes(np.array([[1], [0], [2]], dtype=np.int32), (3,))
    assert recode(quantizer, vectors, held).table.tolist() == [[1], [0], [2]]
    nobody = ItemCodes(np.array([[1], [2], [0]], dtype=np.int32), (3,))
    assert recode(quantizer, vectors, nobody).table.tolist() == [[0], [1], [2]]


def test_codes_of_other_levels_and_other_items_are_refused():
    quantizer, codes = fitted()
    with pytest.raises(DataError, match="same levels"):
        recode(quantizer, VECTORS, ItemCodes(codes.table[:, :1], codes.sizes[:1]))
    with pytest.raises(DataError, match="one vector a code, 300 of them, was: 299"):
        recode(quantizer, VECTORS[:-1], extra_level(codes))

"""New items get codes that nobody has, as near as can be, and nobody else moves."""

import numpy as np
import pytest
import torch

from llm_itemtok.errors import CollisionError, DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collisions import extra_level, reassign
from llm_itemtok.items.newcomers import add_items
from llm_itemtok.items.product import ProductKMeans
from llm_itemtok.items.residual_kmeans import ResidualKMeans
from llm_itemtok.items.rqvae import RQVAE
from tests.tiny import text_codes

KINDS = {
    "residual-kmeans": lambda: ResidualKMeans(levels=2, codebook_size=8, seed=0),
    "balanced": lambda: ResidualKMeans(levels=2, codebook_size=8, seed=0, balance=True, components=4),
    "product": lambda: ProductKMeans(levels=2, codebook_size=8, seed=0),
    "rqvae": lambda: RQVAE(levels=2, codebook_size=8, widths=(8,), latent_dimensions=4, epochs=2, seed=0),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def vectors(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, 6)).astype(np.float32)


def fitted(kind: str = "residual-kmeans", size: int = 30):
    """Codes with unique rows, their vectors and their quantizer."""
    matrix, tokenizer = vectors(size), KINDS[kind]()
    codes = tokenizer.fit(matrix)
    return reassign(codes, matrix, tokenizer.quantizer), matrix, tokenizer.quantizer


@every_kind
def test_new_items_have_codes_of_their_own_and_old_ones_keep_theirs(kind):
    codes, _, quantizer = fitted(kind)
    found = add_items(codes, vectors(20, seed=1), quantizer=quantizer)
    assert found.codes.is_injective
    assert np.array_equal(found.codes.table[:30], codes.table)
    assert (found.codes.sizes, found.codes.names) == (codes.sizes, codes.names)
    assert found.codes.provenance["added"] == [{"items": 20, "displaced": int(found.displaced.sum())}]


@every_kind
def test_who_is_not_displaced_has_the_code_that_the_quantizer_gives(kind):
    """Balanced codebooks price codewords, which a search for the nearest one would not know."""
    codes, _, quantizer = fitted(kind)
    new = vectors(20, seed=1)
    found = add_items(codes, new, quantizer=quantizer)
    own = quantizer.encode(torch.from_numpy(new)).numpy()
    stays = ~found.displaced
    assert stays.any()
    assert found.displaced.any()
    assert np.array_equal(found.codes.table[30:][stays], own[stays])
    taken = {tuple(row) for row in codes.table.tolist()}
    settled = taken | {tuple(row) for row in own[stays].tolist()}
    assert all(tuple(row) in settled for row in own[found.displaced].tolist())


def test_a_displaced_item_takes_the_nearest_codeword_that_is_free_under_its_prefix():
    """Worked by hand: one level of four codewords at -2, 0, 1 and 3, of which 0 and 1 are taken."""
    known = np.array([[-2.0], [0.0], [1.0], [3.0]], dtype=np.float32)
    tokenizer = ResidualKMeans(levels=1, codebook_size=4, seed=0)
    words = tokenizer.fit(known).table[:, 0]
    codes = ItemCodes(words[1:3, None], (4,))
    for place, nearest in ((0.9, 3), (-0.9, 0)):
        found = add_items(codes, np.array([[place]], dtype=np.float32), quantizer=tokenizer.quantizer)
        assert found.displaced.tolist() == [True]
        assert found.codes.table[2, 0] == words[nearest]


def test_of_new_items_on_one_code_the_best_described_has_it_whatever_their_order():
    codes, _, quantizer = fitted()
    taken = codes.table.tolist()
    centres = quantizer.decode(torch.tensor(list(np.ndindex(8, 8)))).detach()
    own = quantizer.encode(centres).tolist()  # the sum of two codewords may read another code off
    free = next(code for code in np.ndindex(8, 8) if list(code) not in taken and own[8 * code[0] + code[1]] == [*code])
    centre = quantizer.decode(torch.tensor([free])).detach().numpy()
    pair = np.concatenate([centre + 1e-3, centre])
    for order in ([0, 1], [1, 0]):
        found = add_items(codes, pair[order], quantizer=quantizer)
        assert found.displaced.tolist() == [row == 0 for row in order]


def test_a_level_that_counts_is_counted_on():
    matrix, tokenizer = vectors(30), KINDS["residual-kmeans"]()
    codes = extra_level(tokenizer.fit(matrix))
    group = codes.table[codes.table[:, 2] == codes.table[:, 2].max()][0]
    row = int(np.flatnonzero((codes.table == group).all(axis=1))[0])
    found = add_items(codes, matrix[[row]], quantizer=tokenizer.quantizer)
    assert found.codes.table[-1].tolist() == [*group[:2], group[2] + 1]
    assert not found.displaced.any()  # what its vector says is on the levels before


@pytest.mark.parametrize("known", [30, 20])
def test_codes_without_a_quantizer_are_read_off_estimated_codebooks(known):
    """An item like one that has a code goes beside it; vectors of the first items will do."""
    codes, matrix, _ = fitted()
    found = add_items(codes, vectors(20, seed=1), known=matrix[:known])
    assert found.codes.is_injective
    assert np.array_equal(found.codes.table[:30], codes.table)
    assert set(found.codes.table[30:, 0].tolist()) <= set(codes.table[:known, 0].tolist())
    room = np.bincount(codes.table[:, 0])[codes.table[:, 0]] < 8
    beside = [add_items(codes, matrix[[row]], known=matrix[:known]).codes.table[30, 0] for row in range(known)]
    assert room[:known].any()
    assert (beside == codes.table[:known, 0])[room[:known]].all()


def test_codewords_that_no_item_uses_are_not_read_off_estimated_codebooks():
    """They would stand at 0, which a vector of next to nothing is nearest to."""
    codes, matrix, _ = fitted()
    few = ItemCodes(codes.table[:5], codes.sizes)
    found = add_items(few, 0.01 * vectors(1, seed=1), known=matrix[:5])
    assert found.codes.table[5, 0] in few.table[:, 0]


def test_the_last_free_code_is_found_and_one_item_more_is_refused():
    codes, _, quantizer = fitted(size=60)
    full = add_items(codes, vectors(4, seed=1), quantizer=quantizer).codes
    assert (full.num_items, full.is_injective) == (64, True)
    with pytest.raises(CollisionError, match=r"65 items cannot have a code each.*spell only 64 codes, of which 0 are "):
        add_items(full, vectors(1, seed=2), quantizer=quantizer)


def test_what_does_not_fit_together_is_refused():
    codes, matrix, quantizer = fitted()
    with pytest.raises(DataError, match="must have the 6 dimensions of those that the codes were made of, was: 5"):
        add_items(codes, matrix[:2, :5], quantizer=quantizer)
    with pytest.raises(DataError, match="need the vectors of the items that have them, was: none"):
        add_items(codes, matrix[:2])
    with pytest.raises(DataError, match="from one source"):
        add_items(codes, matrix[:2], known=matrix[:, :3])
    with pytest.raises(DataError, match="codes and quantizer must have the same levels"):
        add_items(ItemCodes(codes.table, (8, 9)), matrix[:2], quantizer=quantizer)
    with pytest.raises(DataError, match="named in words of the language model"):
        add_items(text_codes(["a b", "c d"]), matrix[:2], quantizer=quantizer)

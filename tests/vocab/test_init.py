"""Rows start at the table's scale, the same for the same seed, and apart for different codewords."""

import numpy as np
import pytest
import torch

from llm_itemtok.errors import ItemTokError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.vocab import init
from llm_itemtok.vocab.item_vocab import ItemVocab
from tests.tiny import tiny_codes

WIDTH, WORDS = 24, 50
TABLE = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(3)) * 0.07
SCALE = float(TABLE.square().mean().sqrt())
CODES = tiny_codes()
RNG = np.random.default_rng(5)
TEXTS = [RNG.integers(0, WORDS, size=RNG.integers(1, 6)).tolist() for _ in range(CODES.num_items)]
VECTORS = {wide: RNG.normal(size=(CODES.num_items, wide)).astype(np.float32) * 5 for wide in (8, WIDTH, 40)}


def rows(kind: str, *, codes: ItemCodes = CODES, seed: int = 0, table: torch.Tensor = TABLE) -> torch.Tensor:
    vocab = ItemVocab(codes, 100)
    if kind == "normal":
        return init.normal(vocab, table, seed=seed)
    if kind == "text-mean":
        return init.text_mean(vocab, table, TEXTS[: codes.num_items], seed=seed)
    return init.codebook(vocab, table, VECTORS[int(kind.split()[1])][: codes.num_items], seed=seed)


KINDS = pytest.mark.parametrize("kind", ["normal", "text-mean", "codebook 8", "codebook 24", "codebook 40"])


@KINDS
def test_rows_have_the_scale_of_the_table_at_every_level(kind):
    made = rows(kind)
    assert made.shape == (15, WIDTH)
    assert made.dtype == torch.float32
    assert bool(torch.isfinite(made).all())
    for level in made.split(list(CODES.sizes)):
        # Means are scaled exactly; a random draw of 4 x 24 numbers is off by some percent.
        assert float(level.square().mean().sqrt()) == pytest.approx(SCALE, rel=0.3 if kind == "normal" else 1e-4)


@KINDS
def test_rows_are_the_same_for_the_same_seed(kind):
    assert torch.equal(rows(kind, seed=4), rows(kind, seed=4))
    if kind != "text-mean":  # which draws only for codewords without text
        assert not torch.equal(rows(kind, seed=4), rows(kind, seed=5))


@KINDS
def test_distinct_codewords_have_distinct_rows(kind):
    """The library's own default leaves them 1e-6 apart."""
    distances = torch.cdist(rows(kind), rows(kind)) + 10 * torch.eye(15)
    assert float(distances.min()) > 0.3 * SCALE * WIDTH**0.5


@KINDS
def test_the_table_is_left_alone(kind):
    table = TABLE.clone().requires_grad_(True)
    made = rows(kind, table=table)
    assert torch.equal(table, TABLE)
    assert not made.requires_grad


@KINDS
def test_codewords_without_items_start_as_normal(kind):
    codes = ItemCodes(np.minimum(CODES.table[:8], [3, 4, 3]), (7, 6, 4))
    used = torch.zeros(17, dtype=torch.bool)
    used[(codes.table + np.array([0, 7, 13])).reshape(-1)] = True
    assert not used.all()
    made, drawn = rows(kind, codes=codes), rows("normal", codes=codes)
    assert torch.equal(made[~used], drawn[~used])


@KINDS
def test_one_item_gets_rows_of_the_right_scale(kind):
    made = rows(kind, codes=ItemCodes(np.array([[1, 2]]), (4, 4)))
    assert float(made.square().mean().sqrt()) == pytest.approx(SCALE, rel=0.3)


def test_padding_rows_do_not_count_for_the_scale():
    padded = torch.cat([TABLE, torch.zeros(500, WIDTH)])
    assert torch.allclose(rows("normal", table=padded), rows("normal"))


def test_a_table_of_zeros_gives_the_usual_scale():
    assert float(rows("normal", table=torch.zeros(9, WIDTH)).std()) == pytest.approx(0.02, rel=0.2)


def test_bfloat16_tables_are_read_in_float32():
    made = rows("text-mean", table=TABLE.bfloat16())
    assert made.dtype == torch.float32
    assert torch.allclose(made, rows("text-mean"), atol=0.05 * SCALE)


def test_codewords_of_items_with_like_text_start_close():
    """Codewords 0 and 1 carry items on the same words, 2 and 3 on others."""
    codes = ItemCodes(np.stack([np.repeat(np.arange(4), 30), np.tile(np.arange(30), 4)], axis=1), (4, 30))
    rng = np.random.default_rng(0)
    topics = [np.arange(0, 10), np.arange(0, 10), np.arange(20, 30), np.arange(20, 30)]
    texts = [rng.choice(topics[code], size=8).tolist() for code in codes.table[:, 0]]
    made = init.text_mean(ItemVocab(codes, 100), TABLE, texts, seed=0)[:4]
    alike = torch.nn.functional.cosine_similarity(made.unsqueeze(0), made.unsqueeze(1), dim=-1)
    assert float(min(alike[0, 1], alike[2, 3])) > 0.5
    assert float(alike[:2, 2:].max()) < 0


def test_items_without_text_count_for_nothing():
    codes = ItemCodes(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), (2, 2))
    vocab = ItemVocab(codes, 100)
    made = init.text_mean(vocab, TABLE, [[1, 2], [], [3], []], seed=0)
    expected = TABLE[[1, 2]].mean(0) - TABLE[3]
    assert float(torch.nn.functional.cosine_similarity(made[0], expected, dim=0)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(made[3], init.normal(vocab, TABLE, seed=0)[3])


def test_text_means_of_a_catalogue_without_text_are_refused():
    with pytest.raises(ItemTokError, match=r"`vocab.init: text-mean` needs item text, but no item has any; use `codeb"):
        init.text_mean(ItemVocab(CODES, 100), TABLE, [[]] * CODES.num_items, seed=0)


def test_one_text_for_all_items_leaves_the_rows_random():
    made = init.text_mean(ItemVocab(CODES, 100), TABLE, [[4, 5]] * CODES.num_items, seed=0)
    assert torch.equal(made, rows("normal"))


def test_the_first_level_keeps_the_distances_between_cluster_means():
    """Vectors narrower than the model lose nothing on the way into it."""
    vectors = VECTORS[8]
    means = np.stack([vectors[CODES.table[:, 0] == code].mean(0) for code in range(6)])
    theirs = torch.pdist(torch.from_numpy(means))
    ours = torch.pdist(rows("codebook 8")[:6])
    assert torch.allclose(ours / ours.mean(), theirs / theirs.mean(), atol=1e-4)


def test_the_second_level_stands_for_what_the_first_left_over():
    table, vectors = CODES.table, VECTORS[8]
    of_first = np.stack([vectors[table[:, 0] == code].mean(0) for code in range(6)])
    left = vectors - of_first[table[:, 0]]
    theirs = torch.pdist(torch.from_numpy(np.stack([left[table[:, 1] == code].mean(0) for code in range(5)])))
    ours = torch.pdist(rows("codebook 8")[6:11])
    assert torch.allclose(ours / ours.mean(), theirs / theirs.mean(), atol=1e-4)

"""LETTER's terms by hand, and what they do to codes."""

import numpy as np
import pytest
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items.letter import Alignment, codeword_groups, diversity
from llm_itemtok.items.rqvae import RQVAE


def test_alignment_is_the_log_probability_of_the_own_vector():
    torch.manual_seed(0)
    term = Alignment(2, 2)
    with torch.no_grad():
        term.map.weight.copy_(torch.eye(2))
        term.log_sharpness.zero_()
    latent = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    loss = term(latent, torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    torch.testing.assert_close(loss, -torch.log_softmax(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=1).diagonal())


def test_items_without_a_collaborative_vector_are_left_out():
    torch.manual_seed(0)
    term = Alignment(3, 2)
    latent, own = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    own[1] = 0
    loss = term(latent, own)
    kept = [0, 2, 3]
    torch.testing.assert_close(loss[kept], term(latent[kept], own[kept]))
    assert loss[1] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), latent)
    assert gradient[1].abs().max() == 0
    assert term(latent, torch.zeros(4, 2)).tolist() == [0.0] * 4


def test_diversity_is_low_where_groups_are_tight_and_apart():
    tight = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
    groups, codes = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0], [2]])
    generator = torch.Generator().manual_seed(0)
    good = diversity(tight, codes, groups, generator)
    bad = diversity(tight, codes, torch.tensor([[0, 1, 0, 1]]), generator)
    assert (good < bad).all()


def test_a_codeword_alone_in_its_group_or_level_adds_nothing():
    generator = torch.Generator().manual_seed(0)
    codes = torch.tensor([[0]])
    assert diversity(torch.randn(1, 3, 2), codes, torch.tensor([[0, 1, 1]]), generator).tolist() == [0.0]
    assert diversity(torch.randn(1, 1, 2), codes, torch.tensor([[0]]), generator).tolist() == [0.0]


def test_groups_are_of_about_equal_size():
    groups = codeword_groups(torch.randn(2, 100, 4, generator=torch.Generator().manual_seed(0)), seed=0)
    for level in groups:
        counts = torch.bincount(level, minlength=10)
        assert counts.min() >= 5
        assert counts.max() <= 20


def test_aligned_codes_follow_the_collaborative_vectors():
    """Vectors of two kinds of structure; the collaborative vectors know the second, which is the weaker one."""
    rng = np.random.default_rng(0)
    strong, weak = np.arange(160) % 4, np.arange(160) // 4 % 4
    x = np.concatenate([2 * np.eye(4)[strong], np.eye(4)[weak]], axis=1) + 0.1 * rng.normal(size=(160, 8))
    settings = {"levels": 1, "codebook_size": 4, "widths": (16,), "latent_dimensions": 4, "epochs": 60}

    def purity(**changes):
        codes = RQVAE(**settings, batch_size=64, patience=60, **changes).fit(x.astype(np.float32)).table[:, 0]
        return np.mean([np.bincount(weak[codes == code]).max() / (codes == code).sum() for code in np.unique(codes)])

    collaborative = np.eye(4, dtype=np.float32)[weak]
    assert purity(collaborative=collaborative, alignment_weight=5.0) > purity() + 0.2


def test_alignment_needs_a_vector_an_item():
    with pytest.raises(DataError, match=r"alignment needs collaborative vectors, was: 1\.0 and 0\.0, no vectors"):
        RQVAE(alignment_weight=1.0)
    with pytest.raises(DataError, match="one collaborative vector an item, 3, was: 2"):
        RQVAE(alignment_weight=1.0, collaborative=np.ones((2, 2), np.float32)).fit(np.eye(3, dtype=np.float32))

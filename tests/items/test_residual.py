"""Codes are read off codebooks greedily, coarse first."""

import pytest
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items import residual
from llm_itemtok.items.residual import estimate_codebooks, nearest_codes, squared_distances, sum_of_codewords

CODEBOOKS = torch.tensor([[[0.0, 0.0], [10.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])


def test_codes_by_hand():
    """(11, 0): nearest (10, 0), rest (1, 0) is met. (0, 3): nearest (0, 0), rest (0, 3) to (0, 1), 2 off, squared 4."""
    codes, error = nearest_codes(torch.tensor([[11.0, 0.0], [0.0, 3.0]]), CODEBOOKS)
    assert codes.tolist() == [[1, 1], [0, 0]]
    assert error.tolist() == [0.0, 4.0]
    assert sum_of_codewords(codes, CODEBOOKS).tolist() == [[11.0, 0.0], [0.0, 1.0]]


def test_a_tie_goes_to_the_lowest_index():
    codes, _ = nearest_codes(torch.tensor([[5.0, 0.0]]), CODEBOOKS[:1])
    assert codes.tolist() == [[0]]


def test_prefix_does_not_depend_on_lower_levels():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator)
    codebooks = torch.randn(3, 8, 4, generator=generator)
    changed = codebooks.clone()
    changed[2] = torch.randn(8, 4, generator=generator)
    assert torch.equal(nearest_codes(x, codebooks)[0][:, :2], nearest_codes(x, changed)[0][:, :2])
    assert torch.equal(nearest_codes(x, codebooks)[0][:, :2], nearest_codes(x, codebooks[:2])[0])


def test_blocks_do_not_change_the_codes(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, codebooks = torch.randn(50, 4, generator=generator), torch.randn(3, 8, 4, generator=generator)
    whole = nearest_codes(x, codebooks)
    monkeypatch.setattr(residual, "BLOCK", 7)
    blocks = nearest_codes(x, codebooks)
    assert torch.equal(whole[0], blocks[0])
    torch.testing.assert_close(whole[1], blocks[1])


def test_distances_agree_with_cdist_and_have_second_derivatives():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.double, requires_grad=True)
    codebook = torch.randn(4, 3, generator=generator, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(squared_distances(x, codebook), torch.cdist(x, codebook).square())
    assert torch.autograd.gradgradcheck(squared_distances, (x, codebook))


def test_vectors_of_another_width_are_refused():
    with pytest.raises(DataError, match="3 dimensions but the codebooks have 2"):
        nearest_codes(torch.zeros(1, 3), CODEBOOKS)


def test_estimated_codebooks_are_mean_residuals_by_hand():
    x = torch.tensor([[1.0], [3.0], [10.0]])
    codes = torch.tensor([[0, 0], [0, 1], [2, 1]])
    # Level 0: mean of 1 and 3 is 2, and 10. Residuals -1, 1, 0: level 1 has -1 and the mean of 1 and 0.
    assert estimate_codebooks(x, codes, 3)[..., 0].tolist() == [[2.0, 0.0, 10.0], [-1.0, 0.5, 0.0]]

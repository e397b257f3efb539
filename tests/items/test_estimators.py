"""The estimators agree on the value and differ in the gradient, each as it is defined."""

from functools import partial

import pytest
import torch

from llm_itemtok.items.estimators import gumbel, rotation, straight_through


def subject(levels=3, codewords=6, dimensions=4):
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(20, dimensions, generator=generator, dtype=torch.float64, requires_grad=True)
    codebooks = torch.randn(levels, codewords, dimensions, generator=generator, dtype=torch.float64, requires_grad=True)
    return latent, codebooks


def summed(codebooks, codes):
    return codebooks[torch.arange(len(codebooks)), codes].sum(dim=1)


cold = partial(gumbel, temperature=1e-4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("estimator", [straight_through, rotation, cold])
def test_what_the_decoder_reads_is_the_sum_of_the_nearest_codewords(estimator):
    latent, codebooks = subject()
    found = estimator(latent, codebooks, None)
    torch.testing.assert_close(found.quantized, summed(codebooks, found.codes))
    assert torch.equal(found.codes, straight_through(latent, codebooks).codes)


@pytest.mark.parametrize("estimator", [straight_through, rotation, cold])
def test_prices_count_as_distance(estimator):
    latent, codebooks = subject(levels=1)
    prices = torch.zeros(1, 6, dtype=torch.float64)
    prices[0, 2] = -1e3
    assert set(estimator(latent, codebooks, prices).codes.ravel().tolist()) == {2}


def test_the_gradient_of_rotation_is_that_of_the_matrix_that_turns_the_point_onto_the_sum():
    """The matrix is made here from the plane of the two directions, another way than the definition in the paper."""
    latent, codebooks = subject()
    found = rotation(latent, codebooks)
    wanted = torch.randn(20, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found.quantized * wanted).sum(), latent)
    for row in range(20):
        x, q = latent[row].detach(), summed(codebooks, found.codes)[row].detach()
        a, b = x / x.norm(), q / q.norm()
        cosine = a @ b
        across = (b - cosine * a) / (b - cosine * a).norm()
        sine = b @ across
        plane = torch.stack([a, across])
        turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64) - torch.eye(2, dtype=torch.float64)
        matrix = torch.eye(4, dtype=torch.float64) + plane.T @ turn @ plane
        torch.testing.assert_close(matrix @ a, b)
        torch.testing.assert_close(gradient[row], q.norm() / x.norm() * matrix.T @ wanted[row])


def test_rotation_copes_with_points_and_sums_without_a_direction():
    codebooks = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]])
    latent = torch.tensor([[0.0, 0.0], [0.1, 0.0], [-1.0, 0.0]], requires_grad=True)
    prices = torch.tensor([[0.0, 0.0]])
    found = rotation(latent, codebooks, prices)
    assert found.quantized.tolist() == [[0.0, 0.0]] * 3
    opposite = rotation(latent[2:], codebooks[:, 1:])
    assert opposite.quantized.tolist() == [[3.0, 0.0]]
    (gradient,) = torch.autograd.grad(found.quantized.sum() + opposite.quantized.sum(), latent)
    assert gradient.isfinite().all()
    assert gradient[0].tolist() == [1.0, 1.0]  # straight through


def test_straight_through_and_rotation_share_the_losses():
    latent, codebooks = subject()
    one, other = straight_through(latent, codebooks), rotation(latent, codebooks)
    assert torch.equal(one.codebook_loss, other.codebook_loss)
    assert torch.equal(one.commitment_loss, other.commitment_loss)


def test_draws_follow_the_softmax_of_the_distances():
    """Distances 1 and 2, unit 1, temperature 1: the nearer one is drawn with probability 1 / (1 + exp(-1))."""
    latent = torch.zeros(20_000, 2)
    codebooks = torch.tensor([[[1.0, 0.0], [0.0, 2.0**0.5]]])
    drawn = gumbel(latent, codebooks, temperature=1.0, generator=torch.Generator().manual_seed(0)).codes
    assert abs((drawn == 0).float().mean().item() - 1 / (1 + torch.exp(torch.tensor(-1.0)).item())) < 0.015


def test_draws_reach_points_and_codebooks_of_every_level():
    latent, codebooks = subject()
    found = gumbel(latent, codebooks, temperature=0.5, generator=torch.Generator().manual_seed(0))
    to_latent, to_codebooks = torch.autograd.grad(found.quantized.square().sum(), [latent, codebooks])
    assert to_latent.abs().sum() > 0
    assert (to_codebooks.abs().sum(dim=(1, 2)) > 0).all()

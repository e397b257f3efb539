"""Surgery on gradients: what it promises, for vectors and matrices, and what the released rule does instead."""

import math

import pytest
import torch

from llm_itemtok.training.gradients import conflict, cosine, kept, projected, released

SHAPES = [(7,), (6, 4), (3, 5, 4)]


def conflicting(shape, seed=0):
    """Two random gradients whose inner product is below 0."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (x if (x * g).sum() < 0 else -x), g


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_leaves_nothing_that_goes_against_the_other(shape):
    x, g = conflicting(shape)
    assert (projected(x, g) * g).sum().abs() < 1e-12
    assert torch.allclose(x - projected(x, g), (x * g).sum() / (g * g).sum() * g)


@pytest.mark.parametrize("cut", [projected, released, kept])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_conflict_nothing_changes(cut, shape):
    x, g = conflicting(shape)
    assert torch.equal(cut(-x, g), -x)
    assert torch.equal(cut(x, torch.zeros_like(g)), x)


def test_on_vectors_both_rules_are_one():
    x, g = conflicting((9,))
    assert torch.allclose(projected(x, g), released(x, g), atol=1e-12)


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_the_released_rule_takes_away_as_often_as_there_are_rows(rows):
    """<x', G> = (1 - R) <x, G>, and ||x'|| / ||x|| = sqrt(1 + R (R - 2) cos^2)."""
    x, g = conflicting((rows, 4), seed=2)
    normal = g / g.norm(dim=1, keepdim=True)
    found = released(x, g)
    assert (found * normal).sum().item() == pytest.approx((1 - rows) * (x * normal).sum().item())
    factor = math.sqrt(1 + rows * (rows - 2) * cosine(x, normal) ** 2)
    assert (found.norm() / x.norm()).item() == pytest.approx(factor)


def test_the_released_rule_on_a_codebook_follows_the_rows_of_the_other():
    """The dossier's 256 x 32 row: from a cosine of -0.06 to +0.99, fifteen times as long; projected: 0, and x0.998."""
    generator = torch.Generator().manual_seed(0)
    g, other = (torch.randn(256, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    other = other - (other * g).sum() / (g * g).sum() * g
    x = -0.06 * g / g.norm() + math.sqrt(1 - 0.06**2) * other / other.norm()
    assert cosine(x, g) == pytest.approx(-0.06)
    assert cosine(released(x, g), g) == pytest.approx(0.99, abs=0.01)
    assert released(x, g).norm().item() == pytest.approx(15, abs=0.5)
    assert abs(cosine(projected(x, g), g)) < 1e-9
    assert projected(x, g).norm().item() == pytest.approx(0.998, abs=5e-4)


def test_conflict_counts_tensors_that_both_gradients_reach():
    x, g = conflicting((6, 4))
    found = conflict({"a": x, "b": -x, "c": x}, {"a": g, "b": g, "c": torch.zeros_like(g)})
    assert found.share == 0.5
    assert found.cosines == {"a": pytest.approx(cosine(x, g)), "b": pytest.approx(-cosine(x, g))}
    assert conflict({"a": x}, {"a": 0 * g}) == (0.0, {})

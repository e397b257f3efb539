"""Product codes: levels describe dimensions of their own, and stay out of each other's."""

import numpy as np
import pytest
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items.collisions import reassign
from llm_itemtok.items.product import ProductKMeans, dealt_components, groups


def correlated(num=600, dimensions=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num, dimensions)) @ rng.normal(size=(dimensions, dimensions))).astype(np.float32)


def error(tokenizer, x):
    codes = tokenizer.fit(x)
    rebuilt = tokenizer.quantizer.decode(torch.tensor(codes.table, dtype=torch.int64)).detach().numpy()
    return float(np.square(rebuilt - x).mean())


def test_groups_cover_the_dimensions_once():
    for levels, dimensions in ((1, 1), (3, 8), (4, 4), (5, 384)):
        parts = groups(levels, dimensions)
        assert [d for part in parts for d in range(part.start, part.stop)] == list(range(dimensions))
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) - min(lengths) <= 1


def test_without_a_rotation_a_level_reads_its_own_dimensions_only():
    x = correlated()
    tokenizer = ProductKMeans(levels=2, codebook_size=8, rotation="none")
    codes = tokenizer.fit(x)
    changed = x.copy()
    changed[:, :4] = x[::-1, :4]
    again = tokenizer.quantizer.encode(torch.from_numpy(changed)).numpy()
    np.testing.assert_array_equal(again[:, 0], codes.table[::-1, 0])
    np.testing.assert_array_equal(again[:, 1], codes.table[:, 1])


def test_codewords_stay_in_their_group_while_they_are_trained():
    tokenizer = ProductKMeans(levels=2, codebook_size=8)
    tokenizer.fit(correlated())
    quantizer = tokenizer.quantizer
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.1)
    out = quantizer(torch.from_numpy(correlated()))
    (out.reconstruction_loss + out.codebook_loss).mean().backward()
    soft = quantizer.soft_assign(torch.from_numpy(correlated()))
    (soft[0][:, 0].mean() + soft[1][:, 0].mean()).backward()
    optimizer.step()
    assert quantizer.codebooks[0, :, 4:].abs().max() == 0
    assert quantizer.codebooks[1, :, :4].abs().max() == 0
    assert quantizer.codebooks.grad[:, :, :].abs().sum() > 0


def test_turning_the_space_rebuilds_better():
    """One group has all the variance until the components are dealt out; what is twisted is untwisted by `opq`."""
    rng = np.random.default_rng(0)
    lopsided = (rng.normal(size=(600, 8)) * [4, 4, 4, 4, 0.1, 0.1, 0.1, 0.1]).astype(np.float32)
    none, pca, opq = (
        error(ProductKMeans(levels=2, codebook_size=16, rotation=way), lopsided) for way in ("none", "pca", "opq")
    )
    assert pca < 0.8 * none
    assert opq < 0.8 * none
    twisted = rng.choice([-1.0, 1.0], size=(600, 8)) + 0.1 * rng.normal(size=(600, 8))
    twisted = (twisted @ np.linalg.qr(rng.normal(size=(8, 8)))[0]).astype(np.float32)
    none, opq = (error(ProductKMeans(levels=2, codebook_size=16, rotation=way), twisted) for way in ("none", "opq"))
    assert opq < 0.9 * none


def test_components_are_dealt_to_groups_of_about_equal_product_of_variances():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 6)) * [32, 16, 8, 4, 2, 1]).astype(np.float32)
    turn = dealt_components(x, 6, 3)
    np.testing.assert_allclose(turn.T @ turn, np.eye(6), atol=1e-5)
    logs = np.log2(np.var(x @ turn, axis=0)).reshape(3, 2).sum(axis=1)
    assert np.ptp(logs) < 0.5  # 32 x 1, 16 x 2, 8 x 4


def test_collisions_of_product_codes_are_resolved_as_any():
    x = correlated()
    tokenizer = ProductKMeans(levels=2, codebook_size=32)
    codes = tokenizer.fit(x)
    assert not codes.is_injective
    assert reassign(codes, x, tokenizer.quantizer).is_injective


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": "up"}, "`rotation` must be one of none, pca, opq, was: up"),
        ({"components": 2}, "`components` must be at least the number of levels"),
        ({"components": 4, "rotation": "none"}, "needs a rotation, was: 4 for 3 levels, rotation none"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        ProductKMeans(**changes)


def test_more_levels_than_dimensions_are_refused():
    with pytest.raises(DataError, match="at most one level a dimension, was: 3 levels of 2 dimensions"):
        ProductKMeans(levels=3).fit(correlated(dimensions=2))

"""Soft-to-hard inputs: the values of hard rows, the gradients of soft ones."""

import pytest
import torch

from llm_itemtok.model.soft_inputs import SoftInputs
from llm_itemtok.training.bilevel import UpperLevel
from llm_itemtok.training.late_binding import LateBinding
from tests.tiny import FAMILIES, KINDS
from tests.training.bilevel_runs import make_bilevel, soft_model


def batches(family, **settings):
    """A model, and one batch as it reads it softly, and hard."""
    model, method = make_bilevel(family, UpperLevel(), **settings)
    material = method.material
    rendered = material.collate([material.table[row] for row in range(5)])
    hard = LateBinding(model)(rendered)
    return model, material.binding(rendered), hard


def inputs(batch):
    names = ("input_ids", "labels", "levels", "context_ids", "context_seen")
    return {name: batch[name] for name in names if name in batch}


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "granite"])
def test_the_value_is_that_of_hard_rows_bit_for_bit(family):
    model, soft, hard = batches(family)
    assert (soft["input_ids"] < 0).any()
    assert torch.equal(soft["labels"], hard["labels"])
    assert torch.equal(model(**inputs(soft)), model(**inputs(hard)))
    model.quantizer.requires_grad_(True)
    assert torch.equal(model(**inputs(soft)), model(**inputs(hard)))


@pytest.mark.parametrize("family", KINDS)
def test_the_gradient_is_that_of_the_mixture_by_hand(family):
    """Of one position: the row of each codeword of its level gets the position's gradient times its probability."""
    model, vectors = soft_model(family)
    item, level = 7, 1
    ids = torch.tensor([[-1 - (item * 3 + level)]])
    pull = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    embedded = model.soft.embed(ids, model.rows, model.lm.get_input_embeddings(), model.vocab, model.codes_of)
    (embedded * pull).sum().backward()
    (probabilities,) = model.quantizer.soft_assign(torch.from_numpy(vectors[item : item + 1]))[level]
    expected = torch.zeros_like(model.rows.input_rows)
    start = model.vocab.level_starts[level]
    expected[start : start + 5] = probabilities[:, None] * pull[0, 0]
    torch.testing.assert_close(model.rows.input_rows.grad, expected)
    assert torch.equal(embedded[0, 0], model.rows.input_rows[start + model.vocab.codes.table[item, level]])


@pytest.mark.parametrize("family", KINDS)
def test_rows_of_its_own_learn_as_without_a_mixture_and_the_quantizer_as_with_one(family):
    found = {}
    for own in (False, True):
        model, vectors = soft_model(family)
        model.soft = SoftInputs(model.quantizer, torch.from_numpy(vectors), own=own)
        model.quantizer.requires_grad_(True)
        ids = torch.tensor([[-1 - (7 * 3 + level) for level in (0, 1)]])
        embedded = model.soft.embed(ids, model.rows, model.lm.get_input_embeddings(), model.vocab, model.codes_of)
        pull = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
        (embedded * pull).sum().backward()
        found[own] = (embedded.detach(), model.quantizer.codebooks.grad.clone())
        if own:
            places = [model.vocab.level_starts[level] + int(model.vocab.codes.table[7, level]) for level in (0, 1)]
            expected = torch.zeros_like(model.rows.input_rows).index_put((torch.tensor(places),), pull[0])
            torch.testing.assert_close(model.rows.input_rows.grad, expected)
    torch.testing.assert_close(found[True], found[False])
    assert found[True][1].any()


@pytest.mark.parametrize(("residual", "deep"), [("paper", True), ("release", False)])
@pytest.mark.parametrize("family", KINDS)
def test_gradients_reach_the_codebooks_of_every_level_and_the_encoder_as_the_residual_has_it(family, residual, deep):
    """The last level that counts has no codebook; in `release`, the encoder hears of the first level only."""
    model, _ = soft_model(family, residual)
    model.quantizer.requires_grad_(True)
    for level in (0, 1):
        model.zero_grad()
        ids = torch.tensor([[-1 - (item * 3 + level) for item in (3, 9, 40)]])
        embedded = model.soft.embed(ids, model.rows, model.lm.get_input_embeddings(), model.vocab, model.codes_of)
        (embedded * torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        assert model.quantizer.codebooks.grad[level].abs().sum() > 0
        reached = sum(
            float(part.grad.abs().sum()) for part in model.quantizer.encoder.parameters() if part.grad is not None
        )
        assert (reached > 0) == (level == 0 or deep)
    ids = torch.tensor([[-1 - (3 * 3 + 2)]])
    model.zero_grad(set_to_none=True)
    model.soft.embed(ids, model.rows, model.lm.get_input_embeddings(), model.vocab, model.codes_of).sum().backward()
    assert not model.quantizer.codebooks.grad.any()


def test_probabilities_are_anew_after_a_load_and_after_forgetting():
    model, soft, _ = batches("llama")
    model(**inputs(soft)).sum().backward()
    before = model.rows.input_rows.grad.clone()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["quantizer.codebooks"] += torch.randn_like(state["quantizer.codebooks"])
    model.load_state_dict(state, strict=False)
    model.zero_grad()
    model(**inputs(soft)).sum().backward()
    assert not torch.allclose(model.rows.input_rows.grad, before)

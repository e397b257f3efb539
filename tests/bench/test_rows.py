"""The three ways of `bench rows` do the same work: equal gradients, and a step of each holds what it should."""

import pytest

from llm_itemtok.bench import rows, subjects

TINY = subjects.Shape(layers=2, width=32, heads=2, inner=64, vocabulary=50)


@pytest.fixture
def step(monkeypatch):
    monkeypatch.setattr(rows, "ITEMS", 300)
    monkeypatch.setattr(rows, "TOKENS", 8)
    return rows.Step(TINY, 3)


def test_our_rows_and_those_of_peft_get_the_same_gradients(step):
    assert 0 < step.largest_difference() < 1e-4


def test_lora_alone_trains_nothing_else(step):
    step.alone()
    trained = [name for name, parameter in step.plain.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert step.plain.get_input_embeddings().num_embeddings == 50 + step.model.vocab.num_tokens


def test_a_step_by_levels_reaches_the_rows_too(step):
    step.by_level()
    assert step.model.rows.input_rows.grad.abs().sum() > 0


@pytest.mark.parametrize("way", ["alone", "theirs", "ours", "by_level"])
def test_every_way_can_be_measured_in_a_process_of_its_own(monkeypatch, way):
    monkeypatch.setattr(rows, "ITEMS", 300)
    monkeypatch.setattr(rows, "TOKENS", 8)
    monkeypatch.setattr(rows, "WIDE", TINY)
    rows.prepare_step(way)()

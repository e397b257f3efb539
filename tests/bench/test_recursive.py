"""Models that are compared read the same histories and predict the same targets, and differ in what they are to."""

import pytest
import torch

from llm_itemtok.bench import recursive, subjects

TINY = subjects.Shape(layers=2, width=32, heads=2, inner=64, vocabulary=50)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(subjects, "SMALL", TINY)
    monkeypatch.setattr(recursive, "ITEMS", 200)
    monkeypatch.setattr(recursive, "EMBEDDING", 16)
    monkeypatch.setattr(recursive, "HIDDEN", 16)
    monkeypatch.setattr(recursive, "USERS", 3)


def test_everybody_predicts_the_same_targets_and_a_recursive_model_from_a_position_each():
    batches = {way: recursive._batch(recursive.model_of(way), 5, 3) for way in recursive.WAYS}
    targets = {way: batch["labels"][batch["levels"] >= 0] for way, batch in batches.items()}
    for way in recursive.WAYS:
        assert torch.equal(targets[way], targets["flattened"])
        assert len(targets[way]) == 3 * 6 * 4
    assert batches["recursive"]["input_ids"].shape == (3, 6)
    assert batches["flattened"]["input_ids"].shape == batches["matched"]["input_ids"].shape == (3, 24)


def test_the_backbones_are_one_and_the_matched_model_has_as_many_embeddings():
    found = {way: recursive.model_of(way) for way in recursive.WAYS}
    for way in recursive.WAYS:
        for ours, theirs in zip(found[way].lm.parameters(), found["flattened"].lm.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert found["matched"].own.table.shape == found["recursive"].recursion.items.table.shape == (200, 16)


def test_recommendations_are_timed_with_their_details():
    results = list(recursive._recommending(4, 1))
    assert [result.id for result in results] == ["IR-beam-10-4", "IR-beam-20-4", "IR-beam-50-4"]
    for result in results:
        assert set(result.details) == {"recursive_ms", "tree_ms", "replicated_ms", "against_replicated"}


@pytest.mark.parametrize("way", recursive.WAYS)
def test_a_step_trains_all_that_is_kept(way):
    """What memory is measured of: forward and backward over gradients that are there already."""
    recursive.activations_of(way, 4)()
    recursive.training_step(way, 4)()
    model = recursive.model_of(way)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert recursive.activations_mb(way, 8) > recursive.activations_mb(way, 4) > 0
    assert recursive._kept_mb(way) == pytest.approx(16 * numbers / 2**20)

"""A quantizer inside the composite module: nothing trains it but its method, and checkpoints and snapshots hold it."""

import copy

import pytest
import torch

from llm_itemtok.errors import ArtifactError, TrainingError
from llm_itemtok.model.state import hold_quantizer
from llm_itemtok.training.quantizer_optimizer import QuantizerOptimizer
from llm_itemtok.training.snapshot import Snapshot
from llm_itemtok.training.updates import METHOD_FILE, Rules
from tests.tiny import KINDS, tiny_item_model
from tests.training.runs import weights
from tests.training.test_invariants import assert_close, without_times
from tests.training.test_updates import ADAM, rounds, versions
from tests.training.update_runs import Killed, Rebuild, make_updating, tiny_quantizer

OPEN = Rules(rounds=100, gate=None)


def updating(folder, family="llama", killed_at=None, **settings):
    quantizer, vectors, codes = tiny_quantizer()
    model, _ = tiny_item_model(family, codes=codes)
    hold_quantizer(model, quantizer)
    return make_updating(folder, Rebuild(1, vectors, killed_at), OPEN, family=family, model=model, **settings)


@pytest.mark.parametrize("family", KINDS)
def test_a_training_killed_between_steps_of_the_quantizer_goes_on_as_if_nothing_had_been(tmp_path, family):
    """Weights of model and quantizer, moments of its optimiser, codes, versions and log."""
    settings = {"steps": 9, "every": 3, "dropout": 0.2, "family": family, **ADAM}
    straight = updating(tmp_path / "straight", **settings)
    straight.train()
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        updating(folder, killed_at=7, **settings).train()
    resumed = updating(folder, **settings)
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    found = weights(resumed)
    assert any(name.startswith("quantizer.encoder") for name in found)
    assert_close(found, weights(straight), atol=0, rtol=0)
    assert without_times(folder) == without_times(tmp_path / "straight")
    assert rounds(folder) == rounds(tmp_path / "straight")
    assert versions(folder) == versions(tmp_path / "straight")
    assert [line["step"] for line in rounds(folder)] == [2, 4, 6, 8]  # a proposal of nothing is no round
    (checkpoint / METHOD_FILE).unlink()
    with pytest.raises(ArtifactError, match="must hold what its method keeps"):
        updating(folder, **settings).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_refused_and_nothing_moves(broken):
    quantizer, _, _ = tiny_quantizer()
    optimizer = QuantizerOptimizer(quantizer, learning_rate=0.01)
    before = copy.deepcopy(quantizer.state_dict())
    gradients = [torch.ones_like(parameter) for parameter in optimizer.parameters]
    gradients[-1].view(-1)[0] = broken
    with pytest.raises(TrainingError, match=r"must stay finite, found: infinity or NaN; lower `update\.learning_rate`"):
        optimizer.step(gradients)
    assert_close(quantizer.state_dict(), before, atol=0, rtol=0)


def test_a_step_is_as_long_as_its_scale_says():
    """At 0 nothing moves; at a tenth, the first step of AdamW is a tenth as long."""
    moved = {}
    for scale in (0.0, 0.1, 1.0):
        quantizer, _, _ = tiny_quantizer()
        optimizer = QuantizerOptimizer(quantizer, learning_rate=0.01)
        before = quantizer.codebooks.detach().clone()
        optimizer.step([torch.ones_like(parameter) for parameter in optimizer.parameters], scale=scale)
        moved[scale] = (quantizer.codebooks.detach() - before).abs().mean().item()
    assert moved[0.0] == 0
    assert moved[1.0] == pytest.approx(0.01, rel=1e-3)
    assert moved[0.1] == pytest.approx(0.001, rel=1e-3)


def test_the_trainer_never_trains_it(tmp_path):
    trainer = updating(tmp_path, steps=2, **ADAM)
    trainer.updates.rules = Rules(rounds=0, gate=None)
    before = copy.deepcopy(trainer.model.quantizer.state_dict())
    trainer.train()
    assert_close(dict(trainer.model.quantizer.state_dict()), dict(before), atol=0, rtol=0)
    of_trainer = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert of_trainer.isdisjoint(map(id, trainer.model.quantizer.parameters()))


def test_a_snapshot_takes_it_back():
    quantizer, _, codes = tiny_quantizer()
    model, _ = tiny_item_model(codes=codes)
    hold_quantizer(model, quantizer)
    optimizer = torch.optim.SGD(model.parameters())
    snapshot, before = Snapshot.take(model, optimizer), copy.deepcopy(quantizer.state_dict())
    steps = QuantizerOptimizer(quantizer, learning_rate=0.1)
    steps.step([torch.ones_like(parameter) for parameter in steps.parameters])
    assert not torch.equal(quantizer.codebooks, before["codebooks"])
    snapshot.restore(model, optimizer)
    assert_close(dict(quantizer.state_dict()), dict(before), atol=0, rtol=0)


def test_it_asks_for_gradients_only_while_it_learns():
    quantizer, _, _ = tiny_quantizer()
    quantizer.zero_grad()
    steps = QuantizerOptimizer(quantizer.requires_grad_(False), learning_rate=0.1)
    with steps.learning() as parameters:
        assert all(parameter.requires_grad for parameter in parameters)
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    assert all(parameter.grad is None for parameter in quantizer.parameters())

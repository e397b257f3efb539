"""The upper level: its gradients, its limits, and that a kill or a second process changes nothing."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from llm_itemtok.model.soft_inputs import SoftInputs
from llm_itemtok.training.bilevel import UpperLevel, _by_tensor, _rates
from llm_itemtok.training.gradients import cosine
from llm_itemtok.training.updates import Rules
from tests.process_pairs import run_alone_and_in_pair
from tests.tiny import KINDS
from tests.training.bilevel_runs import make_bilevel, make_training, moment
from tests.training.runs import weights
from tests.training.test_invariants import assert_close, without_times
from tests.training.test_updates import ADAM, rounds, versions
from tests.training.update_runs import Killed

EVERY_KIND = pytest.mark.parametrize("family", KINDS)
UPPER = UpperLevel(batch_size=8, piece=8, learning_rate=0.05)
RATE = 0.3


def rates(model, rate=RATE):
    return {name: rate for name, each in model.named_parameters() if each.requires_grad and "quantizer" not in name}


def recommendation(model, method, rate=RATE, step=3):
    """G_rec by name, and the loss that it is the gradient of."""
    with method._optimizer.learning():
        found = method.gradients(model, rates(model, rate), step)
    return dict(zip(method._optimizer.names, found.recommendation, strict=True)), found.losses["recommendation"]


class Differentiable(SoftInputs):
    """The function whose derivative the estimator is: o = s + (h - s), the bracket as it was when first computed."""

    def __init__(self, inner):
        super().__init__(inner._quantizer, inner._vectors)
        self.brackets, self.calls = [], 0

    def embed(self, ids, rows, base, vocab, codes_of):
        named = ids < 0
        places = -1 - ids[named]
        items, levels = places // vocab.num_levels, places % vocab.num_levels
        words = codes_of(items).gather(1, levels.unsqueeze(1)).squeeze(1)
        hard = rows.embed(ids.masked_scatter(named, vocab.token_ids(words, levels)), base)
        mixed = levels < self._quantizer.num_levels
        mixtures = self._mixtures(torch.arange(60), rows, vocab)[items[mixed], levels[mixed]]
        where = named.masked_scatter(named, mixed).nonzero(as_tuple=True)
        if self.calls == len(self.brackets):
            self.brackets.append((hard[where] - mixtures).detach())
        soft = mixtures + self.brackets[self.calls]
        self.calls += 1
        return hard.index_put(where, soft)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@EVERY_KIND
def test_the_second_order_gradient_is_that_of_finite_differences_and_the_first_order_one_is_not(family, dropout):
    """Along the encoder's gradient, and that of the last codebook; with dropout, whose masks are those of the passes.

    The others are left out, because the residual that they leave to the next level counts as constant on purpose.
    """
    model, method = make_bilevel(family, UPPER, double=True)
    model.train().input_dropout.p = dropout
    found, loss = recommendation(model, method)
    method.upper = dataclasses.replace(UPPER, order=1)
    first, _ = recommendation(model, method)
    model.soft = Differentiable(model.soft)
    assert recommendation(model, method)[1] == loss

    def moved(parameter, by):
        with torch.no_grad():
            parameter += by
        model.soft.calls = 0
        value = recommendation(model, method)[1]
        with torch.no_grad():
            parameter -= by
        return value

    for name, parameter in model.quantizer.named_parameters():
        if not name.startswith("encoder") and name != "codebooks":
            continue
        direction = found[name].clone()
        if name == "codebooks":
            direction[0] = 0
        direction /= direction.norm()
        slope = (found[name] * direction).sum().item()
        step = min(0.01, 5e-4 / slope)  # losses are in single precision, so they must differ by enough
        difference = (moved(parameter, step * direction) - moved(parameter, -step * direction)) / (2 * step)
        assert slope == pytest.approx(difference, rel=0.03)
        assert abs((first[name] * direction).sum().item() / difference - 1) > (0.05 if dropout else 0.1)


def test_dropout_is_on_with_masks_of_its_own_in_each_pass():
    """After a step ahead of no length both passes have the same weights, so masks alone tell their losses apart."""

    def losses(dropout):
        model, method = make_bilevel("llama", dataclasses.replace(UPPER, look_ahead=1e-30, order=1))
        model.input_dropout.p = dropout
        model.eval()
        told = method.propose(moment(model)).facts["losses"]
        return told["before_look_ahead"], told["recommendation"]

    without, same = losses(0.0)
    assert without == same
    first, second = losses(0.5)
    assert len({without, first, second}) == 3


def test_in_half_precision_gradients_are_nearly_those_of_whole_numbers():
    model, method = make_bilevel("llama", UPPER)
    whole, _ = recommendation(model, method)
    method.material = dataclasses.replace(method.material, half=True)
    half, _ = recommendation(model, method)
    assert not torch.equal(half["codebooks"], whole["codebooks"])
    assert cosine(half["codebooks"], whole["codebooks"]) > 0.98
    assert half["codebooks"].dtype == torch.float32


def test_the_step_ahead_is_of_what_the_trainer_trains_each_at_its_own_rate():
    """As with LoRA: most weights are frozen. The quantizer is no part of theta."""
    model, _ = make_bilevel("llama", UPPER)
    model.lm.requires_grad_(False)
    fast, slow = model.lm.model.layers[0].requires_grad_(True), model.rows
    groups = [{"params": list(fast.parameters()), "lr": 0.2}, {"params": list(slow.parameters()), "lr": 0.1}]
    found = _rates(model, torch.optim.SGD(groups), None)
    assert found == {
        name: 0.2 if name.startswith("lm.model.layers.0.") else 0.1
        for name, each in model.named_parameters()
        if each.requires_grad and not name.startswith("quantizer")
    }
    assert set(found.values()) == {0.1, 0.2}
    assert set(_rates(model, torch.optim.SGD(groups), 0.5).items()) == {(name, 0.5) for name in found}


@EVERY_KIND
def test_pieces_of_a_batch_change_no_gradient(family):
    whole, _ = recommendation(*make_bilevel(family, UPPER, double=True))
    pieces, _ = recommendation(*make_bilevel(family, dataclasses.replace(UPPER, piece=3), double=True))
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-9)


@EVERY_KIND
def test_without_look_ahead_the_gradient_is_that_of_the_loss(family):
    model, method = make_bilevel(family, UPPER)
    found, loss = recommendation(model, method, rate=0.0)
    material = method.material
    rows = np.random.default_rng([0, 3]).choice(len(material.table), size=8, replace=False)
    batch = material.collate([material.table[int(row)] for row in rows])
    with method._optimizer.learning():
        terms = material.objective(model, material.binding(batch), material.objective.denominators(batch))
        expected = torch.autograd.grad(terms["next-item"], model.quantizer.codebooks)[0]
    assert loss == pytest.approx(terms["next-item"].item())
    torch.testing.assert_close(found["codebooks"], expected)
    assert not any(found[name].any() for name in found if name.startswith("decoder"))


@pytest.mark.parametrize(("codebook", "commitment"), [(1.0, 0.25), (0.3, 0.7)])
@EVERY_KIND
def test_reconstruction_counts_items_as_often_as_the_batch_reads_them(family, codebook, commitment):
    model, method = make_bilevel(family, dataclasses.replace(UPPER, codebook=codebook, commitment=commitment))
    with method._optimizer.learning():
        found = method.gradients(model, rates(model), 3)
    material, quantizer = method.material, model.quantizer
    rows = np.random.default_rng([0, 3]).choice(len(material.table), size=8, replace=False)
    items = np.concatenate([material.table[int(row)]["items"] for row in rows])
    out = quantizer(torch.from_numpy(material.vectors[items]))
    each = out.reconstruction_loss + codebook * (out.codebook_loss + commitment * out.commitment_loss)
    assert found.losses["tokenization"] == pytest.approx(each.mean().item(), rel=1e-5)


def test_weight_decay_is_of_all_but_the_codebooks():
    model, method = make_bilevel("llama", dataclasses.replace(UPPER, weight_decay=0.4))
    before = {name: each.detach().clone() for name, each in model.quantizer.named_parameters()}
    method._optimizer.step([torch.zeros_like(each) for each in before.values()])
    for name, after in model.quantizer.named_parameters():
        shrunk = 1.0 if name == "codebooks" else 1 - UPPER.learning_rate * 0.4
        torch.testing.assert_close(after.detach(), shrunk * before[name])


def test_the_log_tells_the_norms_of_either_gradient_and_how_peaked_mixtures_are():
    model, method = make_bilevel("llama", UPPER)
    with method._optimizer.learning():
        found = method.gradients(model, rates(model), 3)
    norms = method._operated(found)[1]["gradient_norms"]
    for name in ("recommendation", "tokenization"):
        parts = torch.cat([part.flatten() for part in getattr(found, name)])
        assert norms[name] == pytest.approx(parts.norm().item(), rel=1e-5)
    assert norms["recommendation"] != pytest.approx(norms["tokenization"], rel=0.01)
    told = method.propose(moment(model)).facts["peaks"]
    with torch.no_grad():
        levels = model.quantizer.soft_assign(torch.from_numpy(method.material.vectors))
    assert told == pytest.approx([each.amax(dim=1).mean().item() for each in levels])


@EVERY_KIND
def test_a_great_weight_follows_reconstruction_alone_and_none_recommendation_alone(family):
    def first_step(**settings):
        model, method = make_bilevel(family, dataclasses.replace(UPPER, **settings))
        before = model.quantizer.codebooks.detach().clone()
        with method._optimizer.learning():
            found = method.gradients(model, rates(model), 3)
        sums, _ = method._operated(found)
        names = method._optimizer.names
        at = names.index("codebooks")
        method.propose(moment(model, rate=RATE))
        assert not torch.equal(model.quantizer.codebooks, before)
        return sums[at], found.recommendation[at], found.tokenization[at]

    together, _, tokenization = first_step(weight=1e6)
    assert cosine(together, tokenization) > 1 - 1e-6
    alone, recommendation_, _ = first_step(weight=0.0, surgery="none")
    assert torch.equal(alone, recommendation_)


@EVERY_KIND
def test_surgery_leaves_no_tensor_that_goes_against_reconstruction(family):
    model, method = make_bilevel(family, dataclasses.replace(UPPER, weight=0.0))
    with method._optimizer.learning():
        found = method.gradients(model, rates(model), 3)
    sums, facts = method._operated(found)
    assert 0 < facts["conflict"] < 1
    assert {name for name in facts["cosines"] if name.startswith("codebooks")} == {"codebooks.0", "codebooks.1"}
    x, g = (_by_tensor(dict(zip(method._optimizer.names, parts, strict=True))) for parts in (sums, found.tokenization))
    for name, before in facts["cosines"].items():
        assert cosine(x[name], g[name]) >= -1e-5
        assert (cosine(x[name], g[name]) > 1e-5) == (before > 0)


@EVERY_KIND
def test_a_learning_rate_of_0_changes_nothing_at_all(tmp_path, family):
    """The training is that of fixed codes with the same inputs, bit for bit: look-aheads leave no trace."""
    settings = {"steps": 6, "family": family, "dropout": 0.2, **ADAM}
    still = make_training(tmp_path / "still", dataclasses.replace(UPPER, learning_rate=0.0), **settings)
    still.train()
    fixed = make_training(tmp_path / "fixed", UPPER, **settings)
    fixed.updates.rules = Rules(rounds=0, gate=None)
    fixed.train()
    assert_close(weights(still), weights(fixed), atol=0, rtol=0)
    assert without_times(tmp_path / "still") == without_times(tmp_path / "fixed")
    assert [line["moves"] for line in rounds(tmp_path / "still")] == [0, 0]


def test_one_step_of_the_quantizer_an_interval_and_all_that_reads_codes_has_the_new_ones(tmp_path):
    trainer = make_training(tmp_path, UPPER, every=3, steps=8, **ADAM)
    before = copy.deepcopy(trainer.model.quantizer.state_dict())
    codes = trainer.model.vocab.codes
    trainer.train()
    lines = rounds(tmp_path)
    assert [line["step"] for line in lines] == [3, 6]
    assert {"losses", "conflict", "cosines", "gradient_norms", "attention", "collisions", "displaced"} <= lines[
        0
    ].keys()
    assert lines[0]["attention"] == "math"
    assert not torch.equal(trainer.model.quantizer.codebooks, before["codebooks"])
    assert trainer.model.vocab.codes != codes
    read = trainer.model.quantizer.encode_blocks(trainer.updates.method.material.vectors)
    assert (trainer.model.vocab.codes.table[:, :2] != read).any(axis=1).sum() == lines[-1]["displaced"]


class _KilledAt:
    """The same method, killed after its step of the quantizer."""

    def __init__(self, inner, step):
        self.inner, self.step = inner, step
        self.due, self.state, self.load_state = inner.due, inner.state, inner.load_state

    def propose(self, moment):
        found = self.inner.propose(moment)
        if moment.step == self.step:
            raise Killed
        return found


@EVERY_KIND
def test_a_training_killed_in_an_upper_step_goes_on_as_if_nothing_had_been(tmp_path, family):
    settings = {"steps": 10, "family": family, "dropout": 0.2, **ADAM}
    settings["train_sampling_strategy"] = "random"
    straight = make_killable(tmp_path / "straight", settings)
    straight.train()
    folder = tmp_path / "killed"
    killed = make_killable(folder, settings, step=8)
    with pytest.raises(Killed):
        killed.train()
    resumed = make_killable(folder, settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-6"))
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
    assert without_times(folder) == without_times(tmp_path / "straight")
    assert rounds(folder) == rounds(tmp_path / "straight")
    assert versions(folder) == versions(tmp_path / "straight")
    assert len(rounds(folder)) == 4


def make_killable(folder, settings, step=None):
    """Checkpoints every 3 steps, rounds every 2."""
    trainer = make_training(folder, UPPER, every=2, every_save=3, **settings)
    if step is not None:
        trainer.updates.method = _KilledAt(trainer.updates.method, step)
    return trainer


@pytest.mark.slow
def test_two_processes_come_to_the_same(tmp_path):
    """Losses and the quantizer to rounding; codes the same."""
    run_alone_and_in_pair(
        "tests.training.bilevel_runs", [tmp_path / "one"], [tmp_path / "first"], [tmp_path / "second"]
    )
    one, first, second = (np.load(tmp_path / f"{name}.npz") for name in ("one", "first", "second"))
    for name in one.files:
        assert np.array_equal(first[name], second[name])
        if "table" in name:
            assert np.array_equal(first[name], one[name])
        else:
            np.testing.assert_allclose(first[name], one[name], rtol=1e-4, atol=1e-5)

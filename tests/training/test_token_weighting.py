"""What token-weighted training promises: the weights it claims, at the step it claims, however the step is cut."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_itemtok.training.collator import Collator, WithTargetItems
from llm_itemtok.training.examples import TASKS as ALL_TASKS
from llm_itemtok.training.next_token import MODEL_INPUTS
from llm_itemtok.training.token_weighting import Target, TokenWeighted, figures, log_pace
from llm_itemtok.training.updates import Rules
from tests.process_pairs import run_alone_and_in_pair
from tests.tiny import KINDS, states, tiny_codes, tiny_item_model, tiny_prompts
from tests.training.runs import TASKS, make_trainer, weights
from tests.training.test_invariants import assert_close, training_lines, without_times
from tests.training.update_runs import Shuffle, make_updating
from tests.training.weighted import COUNTS, EFFECT, MIX, by_gain, by_rarity, evenly, weigh

EVERY_KIND = pytest.mark.parametrize("family", KINDS)
EXAMPLES = [
    {"task": 0, "items": [5, 7, 11, 5], "first": 3, "weight": 1.0},
    {"task": 0, "items": [8, 9], "first": 1, "weight": 0.5},
    {"task": 1, "items": [11], "first": 0, "weight": 0.3},
    {"task": 2, "items": [12], "first": 0, "weight": 0.1},
]


def setting(family, targets=MIX, examples=EXAMPLES, **settings):
    """Model, objective, and a batch of examples of all tasks."""
    model, tokenizer = tiny_item_model(family, tied=False)
    prompts = tiny_prompts(model, tokenizer)
    objective = TokenWeighted(
        ALL_TASKS, targets, vocab=lambda: model.vocab, empty=prompts.history([]), answer_start=model.answer_start,
        **settings,
    )  # fmt: skip
    model.mix = objective.mix
    return model, objective, WithTargetItems(Collator(prompts, 3))(examples)


def total(model, objective, batch):
    """The loss of a step that is one batch."""
    return torch.stack(list(objective(model, batch, objective.denominators(batch)).values())).sum()


@EVERY_KIND
def test_the_loss_is_the_mix_of_weighted_means_by_hand(family):
    """Text tokens weigh 1, an item's token what its item and level say, each times the weight of its task."""
    model, objective, batch = setting(family, pace=0.1)
    objective.step = 4
    nll = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).detach()
    targets = {0: [5], 1: [9], 2: [11], 3: []}
    pace = torch.tensor([math.exp(-0.4), math.exp(-0.4), 1 - math.exp(-0.4)])
    expected = 0.0
    for target, share in zip(MIX, pace / pace.sum(), strict=True):
        table = target.weights(model.vocab.codes)
        above = below = 0.0
        for row, column in np.argwhere(batch["levels"].numpy() >= 0):
            level = int(batch["levels"][row, column])
            weight = EXAMPLES[row]["weight"] * (1.0 if level == 3 else table[targets[row][0], level])
            above, below = above + weight * float(nll[row, column]), below + weight
        expected += float(share) * above / below
    assert total(model, objective, batch).item() == pytest.approx(expected, rel=1e-5)


@EVERY_KIND
def test_weights_follow_the_item_wherever_it_stands(family):
    """Behind a prompt of any length, padded or not, and among several targets."""
    _, objective, batch = setting(family)
    alone, *_ = setting(family)
    own = objective._weights(batch)
    for row, item, scale in ((0, 5, 1.0), (1, 9, 0.5), (2, 11, 0.3)):
        held = (batch["levels"][row] >= 0) & (batch["levels"][row] < 3)
        table = torch.from_numpy(np.stack([target.weights(alone.vocab.codes)[item] for target in MIX]))
        torch.testing.assert_close(own[:, row, held], (table * scale).float())
    text = batch["levels"][3] == 3
    torch.testing.assert_close(own[:, 3, text], torch.full_like(own[:, 3, text], 0.1))
    assert not own[:, batch["levels"] < 0].any()


def test_each_target_of_a_row_of_all_positions_is_named():
    model, tokenizer = tiny_item_model()
    collator = WithTargetItems(Collator(tiny_prompts(model, tokenizer), 3))
    row = {"task": 0, "items": [5, 7, 5, 9], "first": 1, "weight": 1.0}
    batch = collator([row, {**row, "items": [1, 2, 3, 4, 6, 8], "first": 0}])
    assert batch["target_items"][0][batch["levels"][0] >= 0].reshape(-1, 3).tolist() == [[7] * 3, [5] * 3, [9] * 3]
    assert batch["target_items"][1].reshape(-1, 3)[:, 0].tolist() == [1, 2, 3, 4, 6, 8]
    paths = model.vocab.paths[batch["target_items"][1], batch["levels"][1]]
    assert torch.equal(paths, batch["labels"][1])


@EVERY_KIND
def test_one_target_of_weights_one_is_next_token_bit_for_bit(tmp_path, family):
    """Weights, log and all, also where a mix could be learned: one target has none."""
    settings = {"steps": 3, "batch": 3, "accumulation": 2, "every": 2, "dropout": 0.2, "family": family}
    plain = make_trainer(tmp_path / "plain", **settings)
    plain.train()
    ours = weigh(make_trainer(tmp_path / "ours", **settings), (Target("plain", evenly),))
    ours.train()
    assert_close(weights(ours), weights(plain), atol=0, rtol=0)
    assert without_times(tmp_path / "ours") == without_times(tmp_path / "plain")


@EVERY_KIND
def test_a_mix_of_even_weights_is_the_plain_loss(family):
    model, objective, batch = setting(family, tuple(Target(name, evenly, name == "c") for name in "abc"), pace=0.1)
    _, plain, _ = setting(family, (Target("plain", evenly),))
    for step in (0, 3, 50):
        objective.step = step
        assert total(model, objective, batch).item() == pytest.approx(total(model, plain, batch).item(), abs=1e-6)


@EVERY_KIND
def test_eight_accumulated_batches_of_one_are_one_batch_of_eight(tmp_path, family):
    runs = {}
    for batch, accumulation in ((8, 1), (1, 8)):
        folder = tmp_path / f"{batch}x{accumulation}"
        trainer = make_trainer(folder, batch=batch, accumulation=accumulation, steps=2, family=family)
        weigh(trainer, (*MIX, *EFFECT)).train()
        runs[batch] = weights(trainer), training_lines(folder)
    assert runs[8][0]["mix.bias"].abs().min() > 1e-4
    assert_close(runs[1][0], runs[8][0], atol=2e-6, rtol=0)
    for ours, theirs in zip(runs[1][1], runs[8][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_shares_begin_with_halves_are_level_at_the_half_life_and_end_with_frequency():
    _, objective, _ = setting("llama", pace=0.01)
    expected = {0: [0.5, 0.5, 0.0], math.log(2) / 0.01: [1 / 3] * 3, 5000: [0.0, 0.0, 1.0]}
    for step, shares in expected.items():
        objective.step = step
        np.testing.assert_allclose(objective.shares(torch.zeros(3)).tolist(), shares, atol=2e-6)
    assert log_pace([True, False], 0, 0.01).exp().tolist() == pytest.approx([1e-6, 1])


def test_without_a_curriculum_shares_are_equal_and_stay():
    _, objective, _ = setting("llama")
    for step in (0, 1000):
        objective.step = step
        assert objective.shares(None).tolist() == pytest.approx([1 / 3] * 3)


def test_learned_log_weights_follow_the_difference_to_the_mixed_loss_and_stay_in_bounds():
    """dL/db_k = share_k (L_k - L), checked against finite differences, too."""
    model, objective, batch = setting("llama", pace=0.1, bound=2.0)
    objective.step = 3
    total(model, objective, batch).backward()
    totals = objective.denominators(batch)
    with torch.no_grad():
        shares = objective.shares(torch.zeros(3))
        terms = objective(model, batch, totals)
        by_target = torch.stack([sum(v for n, v in terms.items() if n.endswith(f"/{t.name}")) for t in MIX])
        torch.testing.assert_close(model.mix.bias.grad, by_target - shares * by_target.sum())
        for target in range(3):
            losses = []
            for change in (1e-2, -1e-2):
                model.mix.bias[target] += change
                losses.append(total(model, objective, batch).item())
                model.mix.bias[target] -= change
            assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(model.mix.bias.grad[target].item(), abs=1e-4)
        model.mix.bias.fill_(-1e6)
        assert model.mix().tolist() == pytest.approx([-2.0] * 3)


def test_frozen_shares_are_no_parameter():
    model, objective, _ = setting("llama", pace=0.1)
    assert objective.mix is None
    assert not [name for name in model.state_dict() if "mix" in name]


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_the_log_says_each_targets_share_at_the_optimiser_step(tmp_path, logging_steps):
    """Whatever the accumulation, and validations in between: t is the number of steps that are done."""
    trainer = make_trainer(tmp_path, accumulation=3, batch=2, steps=6, every=2, logging_steps=logging_steps)
    weigh(trainer, pace=0.3, bound=None).train()
    expected = []
    for done in range(6):
        pace = np.array([math.exp(-0.3 * done)] * 2 + [max(1e-6, 1 - math.exp(-0.3 * done))])
        expected.append(pace / pace.sum())
    lines = training_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(logging_steps, 7, logging_steps))
    for line in lines:
        shares = [line[f"mix/{name}"] for name in ("plain", "front", "frequency")]
        steps = expected[int(line["step"]) - logging_steps : int(line["step"])]
        np.testing.assert_allclose(shares, np.mean(steps, axis=0), rtol=1e-5)
        terms = [line[f"loss/{task}/{target.name}"] for task in TASKS for target in MIX]
        assert sum(terms) == pytest.approx(line["loss"], rel=1e-5)


@EVERY_KIND
def test_a_resumed_run_is_the_straight_run(tmp_path, family):
    """The curriculum and the learned shares go on where they were, and the log with them."""
    settings = {"family": family, "steps": 6, "every": 3, "dropout": 0.2, "optim": "adamw_torch"}
    straight = weigh(make_trainer(tmp_path / "straight", **settings))
    straight.train()
    folder = tmp_path / "resumed"
    weigh(make_trainer(folder, **settings)).train()
    resumed = weigh(make_trainer(folder, **settings))
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
        resumed.model.mix.bias.fill_(3.0)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-3"))
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
    assert without_times(folder) == without_times(tmp_path / "straight")


def test_weight_decay_leaves_the_log_weights_alone(tmp_path):
    trainer = weigh(make_trainer(tmp_path, weight_decay=0.1))
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert "mix.bias" not in decayed
    assert any("rows" in name for name in decayed)


def test_other_codes_mean_other_weights_in_the_very_next_batch():
    """A colliding table, or an update of the item tokens: weights follow `model.vocab` without being told."""
    model, objective, batch = setting("llama")
    before = objective.tables().clone()
    model.vocab = model.vocab.with_codes(tiny_codes(seed=7))
    objective.denominators(batch)
    for place, target in enumerate(MIX):
        expected = torch.from_numpy(target.weights(tiny_codes(seed=7))).float()
        torch.testing.assert_close(objective.tables()[place], expected)
    assert not torch.equal(objective.tables()[1:], before[1:])
    model.vocab = model.vocab.with_codes(tiny_codes())
    torch.testing.assert_close(objective.tables(), before)


@EVERY_KIND
@pytest.mark.parametrize("normaliser", ["level", "items", "vocab", "children"])
def test_the_counterfactual_target_fits_the_effect_of_the_history(family, normaliser):
    """By plain passes over single rows: softmax of logits with the history less those without it."""
    examples = [*EXAMPLES, {"task": 0, "items": [3, 9], "first": 1, "weight": 1.0}]
    model, objective, batch = setting(family, EFFECT, examples)
    model.normaliser = normaliser
    _, tokenizer = tiny_item_model(family, tied=False)
    prompts = tiny_prompts(model, tokenizer)
    nll = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).detach()
    own = objective._weights(batch)[0]
    expected = float((nll * own).sum())
    for row in (0, 1, 4):
        items = examples[row]["items"]
        path = model.vocab.paths[items[-1:]]
        with_history = states(model, [prompts.history(items[:-1])], path)
        without = states(model, [prompts.history([])], path)
        for level in range(3):
            logits, first = model._level_logits(with_history[:, level], level)
            effect = logits - model._level_logits(without[:, level], level)[0]
            if normaliser == "children":
                table, code = model.vocab.codes.table, model.vocab.codes.table[items[-1]]
                siblings = table[(table[:, :level] == code[:level]).all(1), level]
                effect[:, np.setdiff1d(np.arange(effect.shape[1]), siblings)] = -torch.inf
            loss = -effect.log_softmax(-1)[0, path[0, level] - first].item()
            expected += 0.1 * loss * float(own[row, batch["levels"][row] == level][0])
    assert total(model, objective, batch).item() == pytest.approx(expected / float(own.sum()), rel=1e-5)


def test_a_target_without_a_history_has_no_effect_to_fit():
    """The first item of a user's row, and targets of text tasks."""
    examples = [{"task": 0, "items": [4], "first": 0, "weight": 1.0}, *EXAMPLES[2:]]
    model, objective, batch = setting("llama", EFFECT, examples)
    plain = TokenWeighted(ALL_TASKS, (Target("plain", EFFECT[0].weights),), vocab=lambda: model.vocab)
    assert total(model, objective, batch).item() == total(model, plain, batch).item()


def test_figures_are_means_over_training_targets():
    _, objective, _ = setting("llama")
    found = figures(objective, COUNTS)
    assert list(found) == ["plain", "front", "frequency"]
    codes = tiny_codes()
    np.testing.assert_allclose(found["front"]["levels"], by_gain(codes)[0], rtol=1e-6)
    table = by_rarity(codes)
    np.testing.assert_allclose(found["frequency"]["levels"], COUNTS @ table / COUNTS.sum(), rtol=1e-6)
    means = {count: weight for count, weight in found["frequency"]["by_count"]}
    assert list(means) == [1, 2, 4, 8, 16]
    assert means[8] == pytest.approx(table[(COUNTS >= 8) & (COUNTS < 16)].mean(), rel=1e-6)


@pytest.mark.slow
@EVERY_KIND
def test_two_processes_train_as_one(tmp_path, family):
    """The mix has its gradient from every process, and a distributed wrapper does not take it for unused."""
    one, two = [tmp_path / "one", 4, 2, family], [tmp_path / "two", 2, 2, family]
    run_alone_and_in_pair("tests.training.weighted", one, two, two)
    one, two = (load_file(Path(tmp_path) / name / "weights.safetensors") for name in ("one", "two"))
    assert one["mix.bias"].abs().min() > 1e-4
    assert_close(two, one, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(training_lines(tmp_path / "two"), training_lines(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_first_step_with_other_codes_is_divided_by_their_weights(tmp_path):
    """The library sums a step up before the step begins, and codes change where it begins."""
    by_codeword = Target("by-codeword", lambda codes: 1.0 + codes.table)
    trainer = weigh(make_updating(tmp_path, Shuffle(2), Rules(rounds=1, gate=None), steps=4), (by_codeword,))
    inner, seen = trainer.objective, []

    class Watch:
        denominators = inner.denominators

        def __call__(self, model, batch, totals):
            seen.append((totals["by-codeword"].item(), inner.denominators(batch)["by-codeword"].item()))
            return inner(model, batch, totals)

    trainer.objective = Watch()
    trainer.train()
    divided, own = zip(*seen, strict=True)
    assert divided == pytest.approx(own)

"""Training a recursive model: its loss, the same update however it is cut, and codes that change underneath."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.effort import batch_counts, training_flops
from llm_itemtok.training.next_token import MODEL_INPUTS, NextToken
from llm_itemtok.training.recursive import Aligned
from llm_itemtok.training.self_improve import Search
from llm_itemtok.training.updates import Moment
from tests.process_pairs import run_alone_and_in_pair
from tests.recursive import recursive_model
from tests.tiny import KINDS, tiny_prompts
from tests.training.recursive_runs import make, make_self_improving
from tests.training.runs import TASKS, weights
from tests.training.test_invariants import assert_close, training_lines, without_times

EVERY_KIND = pytest.mark.parametrize("family", KINDS)
MODELS = ("recursive", "aligned", "weighted", "named")


def a_batch(trainer, rows=range(6)):
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


@EVERY_KIND
def test_the_loss_is_that_of_the_recommendation_and_the_weighted_alignment(tmp_path, family):
    trainer = make(tmp_path, "aligned", family=family, weight=0.5)
    batch = a_batch(trainer)
    totals = trainer.objective.denominators(batch)
    ids = batch["context_ids"] if "context_ids" in batch else batch["input_ids"]
    assert int(totals["alignment"]) == int((ids < 0).sum())
    terms = trainer.objective(trainer.model, batch, totals)
    nll, told = trainer.model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
    expected = (nll * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    torch.testing.assert_close(sum(terms[task] for task in TASKS), expected)
    torch.testing.assert_close(terms["alignment"], 0.5 * told["alignment"].sum() / (ids < 0).sum())
    assert terms["alignment"] > 0


@EVERY_KIND
def test_an_alignment_that_weighs_nothing_leaves_the_gradient_of_the_recommendation_alone(tmp_path, family):
    gradients = []
    for kind, weight in (("aligned", 0.0), ("recursive", 0.5)):
        trainer = make(tmp_path / kind, kind, family=family, weight=weight)
        batch = a_batch(trainer)
        terms = trainer.objective(trainer.model, batch, trainer.objective.denominators(batch))
        sum(terms.values()).backward()
        gradients.append({name: part.grad for name, part in trainer.model.named_parameters() if part.grad is not None})
    assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_a_step_without_items_to_read_has_no_alignment():
    model, _ = recursive_model(aligns=True)
    batch = {"input_ids": torch.tensor([[1, 5]]), "labels": torch.full((1, 6), 7), "levels": torch.full((1, 6), -1)}
    batch |= {"loss_weights": torch.zeros(1, 6), "tasks": torch.zeros(1, dtype=torch.long)}
    batch["levels"][0, 3], batch["loss_weights"][0, 3] = 3, 1.0
    objective = Aligned(NextToken(["next-item"]), 1.0)
    terms = objective(model, batch, objective.denominators(batch))
    assert terms["alignment"].item() == 0
    assert terms["next-item"].item() > 0


@pytest.mark.parametrize("kind", MODELS[1:])
@EVERY_KIND
def test_eight_accumulated_batches_of_one_are_one_batch_of_eight(tmp_path, family, kind):
    runs = {}
    for batch, accumulation in ((8, 1), (1, 8)):
        folder = tmp_path / f"{batch}x{accumulation}"
        trainer = make(folder, kind, batch=batch, accumulation=accumulation, steps=2, family=family)
        trainer.train()
        runs[batch] = weights(trainer), training_lines(folder)
    # The learnt mix of token weights goes by the loss of a micro-batch's targets, as `test_token_weighting` has it.
    assert_close(runs[1][0], runs[8][0], atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(runs[1][1], runs[8][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("aligned", family) for family in KINDS),
        *(pytest.param(kind, family, marks=pytest.mark.slow) for kind in ("weighted", "named") for family in KINDS),
    ],
)
def test_a_resumed_run_is_the_straight_run(tmp_path, family, kind):
    """Bit by bit; all that the network learns is in the checkpoint, all else is made again as it was."""
    settings = {"family": family, "steps": 8, "every": 5, "dropout": 0.2, "optim": "adamw_torch",
                "train_sampling_strategy": "random"}  # fmt: skip
    straight = make(tmp_path / "straight", kind, **settings)
    straight.train()
    folder = tmp_path / "resumed"
    make(folder, kind, **settings).train()
    resumed = make(folder, kind, **settings)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-5"))
    assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
    assert without_times(folder) == without_times(tmp_path / "straight")


def test_the_network_learns_and_what_was_never_seen_stays():
    """In a few steps the loss falls; rows of items without history get no gradient."""
    model, tokenizer = recursive_model()
    before = model.recursion.items.table.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    rows = [{"task": 0, "items": np.arange(start, start + 6), "first": 0, "weight": 1.0} for start in range(0, 30, 3)]
    batch = Collator(tiny_prompts(model, tokenizer), 3)(rows)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})[batch["levels"] >= 0].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    moved = (model.recursion.items.table.detach() != before).any(1)
    assert moved[:30].all()
    assert not moved[40:].any()


@pytest.mark.parametrize("kind", ["aligned", "named"])
def test_embeddings_of_items_do_not_decay(tmp_path, kind):
    """A rare one would be shrunk at every step, and learnt at few."""
    trainer = make(tmp_path, kind, weight_decay=0.5)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    decay = {names[id(each)]: group["weight_decay"] for group in groups for each in group["params"]}
    tables = {name: value for name, value in decay.items() if name.endswith(".table")}
    assert len(tables) == 1
    assert set(tables.values()) == {0}
    assert any(value == 0.5 and "project" in name for name, value in decay.items())


@EVERY_KIND
def test_work_is_counted_by_what_reads_what(family):
    """One position an item makes a recursive model cheap; its network works at both ends."""
    model, _ = recursive_model(family)
    network = model.recursion
    flops = training_flops(model, 100, 300 if family == "t5" else 0)
    model.recursion = None
    body = training_flops(model, 100, 300 if family == "t5" else 0)
    steps = 6 * sum(part.weight.numel() for step in network.steps for part in step if hasattr(part, "weight"))
    project = 6 * network.items.project.weight.numel()
    read = 300 if family == "t5" else 100
    assert flops - body == steps * (100 + read) + project * read


@pytest.mark.parametrize("source", ["generate", "embeddings", "both"])
@pytest.mark.parametrize("kind", ["recursive", "named"])
@EVERY_KIND
def test_self_improvement_moves_codes_and_the_model_follows(family, kind, source):
    model, method = make_self_improving(kind, family, Search(source=source, candidates=5, batch_size=4, outliers=0.5))
    old = model.vocab.codes
    proposal = method.propose(Moment(model, torch.optim.SGD(model.parameters()), 0, 0.0))
    moved = (proposal.table != old.table).any(1)
    assert 0 < moved.sum() < 60
    collate, table, binding = method.material.collate, method.material.table, method.material.binding
    batch = collate([table[row] for row in range(4)])
    before, bound_before = _nll(model, binding, batch)
    model.take_codes(ItemCodes(proposal.table, old.sizes))
    after, bound_after = _nll(model, binding, batch)
    # What is read names items, what is predicted are their tokens: of now.
    assert torch.equal(bound_before["input_ids"] < 0, bound_after["input_ids"] < 0)
    touched = bool(set(np.concatenate([table[row]["items"] for row in range(4)])) & set(np.flatnonzero(moved)))
    assert torch.equal(bound_after["labels"], bound_before["labels"]) != touched
    assert torch.equal(after, before) != touched


def _nll(model, binding, batch):
    bound = binding(batch)
    with torch.no_grad():
        found = model(**{name: bound[name] for name in MODEL_INPUTS if name in bound})
    return found, bound


def test_targets_are_counted_once_an_item_whatever_the_labels_of_a_position():
    rows = [{"task": 0, "items": np.arange(5), "first": 0, "weight": 1.0}]
    model, tokenizer = recursive_model()
    batch = Collator(tiny_prompts(model, tokenizer), 3)(rows)
    assert batch_counts([batch]).tolist() == [5, 5, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family"), [("recursive", "llama"), ("aligned", "t5"), ("weighted", "llama"), ("named", "t5")]
)
def test_two_processes_train_as_one(tmp_path, family, kind):
    """gloo on the loopback; with a recursive model, what self-improvement proposes as well."""
    one, two = [tmp_path / "one", 4, 2, kind, family], [tmp_path / "two", 2, 2, kind, family]
    run_alone_and_in_pair("tests.training.recursive_runs", one, two, two)
    one, two = tmp_path / "one", tmp_path / "two"
    assert_close(load_file(two / "weights.safetensors"), load_file(one / "weights.safetensors"), atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(without_times(two), without_times(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    if kind == "recursive":
        with np.load(one / "tables.npz") as alone, np.load(two / "tables.npz") as pair:
            for source in alone.files:
                assert np.array_equal(alone[source], pair[source])

"""Self-improvement: what the sources say is what the model says, and what comes of it is always a table of codes."""

import itertools

import numpy as np
import pytest
import torch

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.training.examples import TASKS
from llm_itemtok.training.item_states import predicting_states, shrunk
from llm_itemtok.training.self_improve import Candidates, RandomMoves, Search, conflict
from llm_itemtok.training.updates import Moment, Rules
from tests.process_pairs import run_alone_and_in_pair
from tests.tiny import KINDS, tiny_codes, tiny_item_model
from tests.training.update_runs import TEXTS, make_self_improving, make_updating

EVERY_KIND = pytest.mark.parametrize("family", KINDS)
EVERY_SOURCE = pytest.mark.parametrize("source", ["generate", "embeddings", "both"])


def moment(model, step=4):
    return Moment(model, torch.optim.SGD(model.parameters()), step, 1.0)


@torch.no_grad()
def own_nll(model, prompts, row):
    """Summed cross-entropy of an item's code after its title, by a plain forward pass of the training loss."""
    prompt, _ = prompts.title_to_item(row)
    path = model.vocab.paths[row]
    if model.answer_start is None:
        ids = torch.cat([torch.from_numpy(prompt), path])[None]
        labels, levels = ids[:, 1:], torch.full((1, len(prompt) + 2), -1)
        levels[:, -3:] = torch.arange(3)
        return float(model(ids[:, :-1], labels, levels).sum())
    ids, context = torch.cat([torch.tensor([model.answer_start]), path])[None], torch.from_numpy(prompt)[None]
    return float(model(ids[:, :-1], ids[:, 1:], torch.arange(3)[None], context, torch.ones_like(context)).sum())


@EVERY_KIND
def test_how_well_a_title_fits_the_code_is_the_cross_entropy_of_training(family):
    """The a_i of the method, times the number of tokens."""
    model, method = make_self_improving(family, Search(source="generate", candidates=2))
    found = method.candidates(model, 0)
    for row in np.unique(found.items)[:7].tolist():
        assert -found.keep[row] == pytest.approx(own_nll(model, method.material.prompts, row), abs=3e-5)


@EVERY_SOURCE
@EVERY_KIND
def test_new_codes_are_unique_within_their_levels_and_of_items_that_a_source_knows(family, source):
    """Also with one candidate an item, where many want the same."""
    for count in (1, 6):
        model, method = make_self_improving(family, Search(source=source, candidates=count, outliers=None))
        codes = model.vocab.codes
        proposal = method.propose(moment(model))
        new = ItemCodes(proposal.table, codes.sizes)
        assert new.is_injective
        moved = np.flatnonzero((new.table != codes.table).any(axis=1))
        assert len(moved)
        assert (proposal.after[moved] > proposal.before[moved]).all()
        assert np.isnan(np.delete(proposal.after, moved)).all()
        titled = {row for row, text in enumerate(TEXTS) if text}
        if source == "generate":
            assert set(moved.tolist()) <= titled


@EVERY_KIND
def test_a_code_that_nobody_has_is_given_out_when_the_model_prefers_it(family):
    """The trie of the present codes is not applied: all items sit in one half of the codes, the best lie in both."""
    codes = ItemCodes(np.array(list(itertools.product(range(3), range(5), range(4))))[:60], (6, 5, 4))
    model, method = make_self_improving(
        family, Search(source="generate", candidates=20, outliers=None, assignment="matching"), codes=codes
    )
    assert method.propose(moment(model)).table[:, 0].max() >= 3


@EVERY_KIND
def test_the_log_likelihoods_of_two_sources_add_up(family):
    """Of the present code, and of every candidate that either offers."""
    read, histories, both = (
        make_self_improving(family, Search(source=source, candidates=120))[1].candidates
        for source in ("generate", "embeddings", "both")
    )
    model, _ = make_self_improving(family, Search())
    found, ours, theirs = both(model, 0), read(model, 0), histories(model, 0)
    known = np.intersect1d(ours.items, theirs.items)
    np.testing.assert_allclose(found.keep[known], ours.keep[known] + theirs.keep[known], atol=1e-3)

    def values(part):
        return {(item, *code): value for item, code, value in zip(
            part.items.tolist(), part.codes.tolist(), part.log_likelihoods.tolist(), strict=True)}  # fmt: skip

    first, second, either = values(ours), values(theirs), values(found)
    shared = [key for key in either if key[0] in known and key in first and key in second]
    assert len(shared) > 100
    for key in shared:
        assert either[key] == pytest.approx(first[key] + second[key], abs=1e-3)
    alone = np.setdiff1d(found.items, known)
    np.testing.assert_allclose(found.keep[alone], (ours.keep + theirs.keep)[alone], atol=1e-4)


@EVERY_KIND
def test_a_model_that_writes_every_code_from_its_title_changes_nothing(family):
    """The limit of an alignment trained to the end, with one candidate an item."""
    codes = tiny_codes(18, (6, 5, 4))
    model, method = make_self_improving(
        family, Search(source="generate", candidates=1, outliers=None), codes=codes, distinct_titles=True
    )
    rows = method.material.text_rows
    examples = [
        {"task": TASKS.index("title-to-item"), "items": np.array([row]), "first": 0, "weight": 1.0} for row in rows
    ]
    batch = method.material.binding(method.material.collate(examples))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    inputs = {name: value for name, value in batch.items() if name not in ("tasks", "loss_weights")}
    for _ in range(300):
        loss = model(**inputs).sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    proposal = method.propose(moment(model))
    np.testing.assert_array_equal(proposal.table, codes.table)
    assert proposal.facts["collisions"] == 0


def test_only_the_most_conflicting_items_move_and_no_more_than_may():
    everybody, model = {}, None
    for outliers in (None, 0.1):
        model, method = make_self_improving("llama", Search(source="generate", outliers=outliers, candidates=6))
        found = method.candidates(model, 0)
        rows, conflicts = conflict(found)
        proposal = method.propose(moment(model, 0))
        everybody[outliers] = np.flatnonzero((proposal.table != model.vocab.codes.table).any(axis=1))
    most = rows[np.argsort(-conflicts, kind="stable")[:6]]
    assert len(everybody[0.1]) > 0
    assert set(everybody[0.1]) <= set(most)
    assert len(everybody[None]) > 6
    model, method = make_self_improving("llama", Search(source="generate", outliers=None, max_moves=0.05))
    moved = (method.propose(moment(model)).table != model.vocab.codes.table).any(axis=1).sum()
    assert moved == 3


@EVERY_KIND
def test_the_log_tells_what_the_search_found(family):
    model, method = make_self_improving(family, Search(source="both", outliers=None, candidates=6))
    found = method.candidates(model, 4)
    rows, conflicts = conflict(found)
    proposal = method.propose(moment(model, 4))
    moved = (proposal.table != model.vocab.codes.table).any(axis=1)
    assert proposal.facts["items_with_candidates"] == len(rows)
    assert 0 < proposal.facts["conflicting"] == pytest.approx((conflicts > 1e-4).mean())
    assert 0 < proposal.facts["nats_a_level"] == pytest.approx(-found.keep[rows].mean() / 3, rel=1e-5)
    gains = (proposal.after - proposal.before)[moved]
    assert 0 < proposal.facts["gain_a_move"] == pytest.approx(gains.mean(), rel=1e-5)


def test_a_price_above_every_conflict_leaves_all_where_they_are():
    moved = []
    for price in (0.0, 1000.0):
        model, method = make_self_improving("llama", Search(source="embeddings", outliers=None, price=price))
        moved.append((method.propose(moment(model)).table != model.vocab.codes.table).any(axis=1).sum())
    assert moved[0] > 0
    assert moved[1] == 0


def test_a_great_weight_of_item_vectors_leaves_nothing_of_the_states():
    """What is near then does not depend on the model, as long as that is no matter of how sure one is."""

    def best(weight, dropped):
        model, method = make_self_improving(
            "llama", Search(source="embeddings", vectors_weight=weight, candidates=1, shrinkage=0.0)
        )
        with torch.no_grad():
            model.rows.input_rows.mul_(-1 if dropped else 1)
        return method.candidates(model, 1).codes

    assert (best(1e4, False) == best(1e4, True)).all()
    assert (best(0.01, False) != best(0.01, True)).any()


def test_groups_and_penalties_change_what_the_model_writes():
    """Groups kept apart offer an item more different first codewords; a penalty, codewords that fewer items use."""

    def offered(**settings):
        model, method = make_self_improving("llama", Search(source="generate", candidates=4, **settings))
        return model.vocab.codes, method.candidates(model, 1)

    def different(found):
        return np.mean([len(set(found.codes[found.items == row, 0].tolist())) for row in np.unique(found.items)])

    def used(codes, found):
        return np.mean([np.bincount(codes.table[:, level])[found.codes[:, level]].mean() for level in range(3)])

    _, plain = offered()
    assert different(offered(groups=4, diversity=100.0)[1]) > different(offered(groups=4)[1])
    assert different(offered(groups=4, diversity=100.0)[1]) > different(plain)
    assert used(*offered(usage_penalty=5.0)) < used(*offered())


def test_conflict_is_how_much_more_likely_the_best_candidate_is():
    found = Candidates(
        np.array([2, 0, 2]), np.zeros((3, 1), np.int32), np.array([-3, -9, -1], "f4"), np.array([-4, 0, -6], "f4")
    )
    rows, nats = conflict(found)
    assert rows.tolist() == [0, 2]
    assert nats.tolist() == [-5, 5]


@EVERY_KIND
def test_states_are_the_mean_of_those_that_predict_an_item_however_batches_are_cut(family):
    model, method = make_self_improving(family, Search())
    material = method.material
    read = {"collate": material.collate, "binding": material.binding}
    states, counts = predicting_states(model, material.table, batch_size=3, **read)
    again, _ = predicting_states(model, material.table, batch_size=50, **read)
    np.testing.assert_allclose(again, states, atol=1e-6)
    sums, seen = np.zeros_like(states, dtype=np.float64), np.zeros_like(counts)
    for example in material.table:
        if example["task"] == TASKS.index("next-item"):
            for place in range(example["first"], len(example["items"])):
                prompt = material.prompts.history(example["items"][:place])
                prompt = np.where(prompt >= material.binding.first, bound(model, material, prompt), prompt)
                state = plain_state(model, prompt)
                sums[example["items"][place]] += state / np.linalg.norm(state)
                seen[example["items"][place]] += 1
    np.testing.assert_array_equal(counts, seen)
    np.testing.assert_allclose(states, sums / np.maximum(seen, 1)[:, None], atol=1e-5)


def bound(model, material, prompt):
    return material.binding({"input_ids": torch.from_numpy(prompt)})["input_ids"].numpy()


@torch.no_grad()
def plain_state(model, prompt):
    ids = torch.from_numpy(prompt)[None]
    if model.answer_start is None:
        return model.hidden(ids, use_cache=False).last_hidden_state[0, -1].numpy()
    seen = torch.ones_like(ids)
    context = {"encoder_hidden_states": model.read(ids, seen), "encoder_attention_mask": seen}
    return (
        model.hidden(torch.tensor([[model.answer_start]]), use_cache=False, **context).last_hidden_state[0, 0].numpy()
    )


def test_where_every_example_has_one_target_so_many_an_item_are_read():
    model, method = make_self_improving("t5", Search())
    material = method.material
    read = {"collate": material.collate, "binding": material.binding}
    _, everything = predicting_states(model, material.table, **read)
    _, some = predicting_states(model, material.table, contexts=2, **read)
    np.testing.assert_array_equal(some, np.minimum(everything, 2))
    assert everything.max() > 2


def test_a_training_improves_its_own_tokens_from_end_to_end(tmp_path):
    model, method = make_self_improving("llama", Search(source="both", candidates=4, outliers=0.2), every=3)
    trainer = make_updating(tmp_path, method, Rules(rounds=2, gate=None, refresh=True), model=model, steps=8, every=2)
    trainer.train()
    assert trainer.updates.version == 2
    assert trainer.model.vocab.codes == ItemCodes.load(tmp_path / "codes/v2")


def test_random_moves_move_just_as_many_to_free_codes():
    model, _ = tiny_item_model()
    codes = model.vocab.codes
    method = RandomMoves(2, 0.25, seed=1)
    proposal = method.propose(moment(model))
    assert ItemCodes(proposal.table, codes.sizes).is_injective
    assert (proposal.table != codes.table).any(axis=1).sum() == 15
    assert [step for step in range(7) if method.due(step)] == [2, 4, 6]


@pytest.mark.slow
@EVERY_KIND
def test_two_processes_propose_what_one_does(tmp_path, family):
    """gloo on the loopback; identical codes from identical weights."""
    arguments = [[tmp_path / name, family] for name in ("alone", "first", "second")]
    run_alone_and_in_pair("tests.training.update_runs", *arguments)
    found = [np.load(tmp_path / f"{name}.npz") for name in ("alone", "first", "second")]
    for name in found[0]:
        np.testing.assert_array_equal(found[1][name], found[0][name])
        np.testing.assert_array_equal(found[2][name], found[0][name])


def test_means_of_few_states_are_taken_back():
    states = np.ones((3, 2), dtype=np.float32)
    np.testing.assert_allclose(shrunk(states, np.array([0, 1, 30]), 30.0)[:, 0], [0, 1 / 31, 1 / 2], rtol=1e-6)
    np.testing.assert_array_equal(shrunk(states, np.array([0, 1, 30]), 0.0)[:, 0], [0, 1, 1])
    assert shrunk(states, np.array([0, 1, 30]), 30.0).dtype == np.float32


def test_whitening_and_shrinkage_change_what_is_near():
    """Both reach the search; without item vectors beside there is nothing that a state could be shrunk towards."""
    found = {}
    for name, changes in {
        "raw": {"whiten": 0.0, "shrinkage": 0.0},
        "whitened": {"shrinkage": 0.0},
        "shrunk": {"whiten": 0.0},
        "alone": {"vectors_weight": 0.0, "shrinkage": 0.0},
        "alone, shrunk": {"vectors_weight": 0.0, "shrinkage": 30.0},
    }.items():
        search = Search(**{"source": "embeddings", "vectors_weight": 1.0, **changes})
        model, method = make_self_improving("llama", search)
        found[name] = method.candidates(model, 1).keep
    assert not np.allclose(found["raw"], found["whitened"])
    assert not np.allclose(found["raw"], found["shrunk"])
    np.testing.assert_array_equal(found["alone"], found["alone, shrunk"])

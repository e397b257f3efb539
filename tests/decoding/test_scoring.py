"""Exact scores are the model's own log-probabilities, whatever is asked for and however it is cut and batched."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_itemtok.decoding import scoring
from llm_itemtok.decoding.scoring import score_catalog, score_items
from llm_itemtok.decoding.tree import takes_tree_masks
from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.export import fold_rows
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import FAMILIES, KINDS, MOST_SLOWLY, states, tiny_codes, tiny_item_model, tiny_prompts

HISTORIES = [np.array([3, 7, 1]), np.array([], dtype=int), np.arange(9)]
ITEMS = [np.array([5, 2, 59]), np.array([], dtype=int), np.array([0])]
NORMALISERS = ["level", "items", "vocab", "children"]
TABLES = {
    "one level": tiny_codes(20, (24,)),
    "five levels": tiny_codes(20, (3, 2, 4, 2, 3)),
    "all but one level agree": ItemCodes(np.array([[0, 0, code, 0] for code in range(12)]), (1, 2, 12, 3)),
    "all begin alike": ItemCodes(np.array([[1, 0, code // 5, code % 5] for code in range(15)]), (2, 1, 3, 5)),
    "one item": tiny_codes(1, (6, 5, 4)),
    "every code there can be": tiny_codes(24, (2, 3, 4)),
}


@torch.no_grad()
def one_by_one(model, trie, prompt, items) -> dict[str, list[float]]:
    """The oracle: each item's path alone through the model, no cache, no mask, no tree; by normaliser."""
    found = {normaliser: [] for normaliser in NORMALISERS}
    table = model.vocab.codes.table
    for item in items:
        hidden = states(model, [prompt], model.vocab.paths[item : item + 1])[0]
        for normaliser in NORMALISERS:
            total = 0.0
            for level, state in enumerate(hidden):
                log_probs = model.level_log_probs(state, level, "level" if normaliser == "children" else normaliser)
                total += float(log_probs[table[item, level]])
                if normaliser == "children":
                    siblings = np.unique(table[(table[:, :level] == table[item, :level]).all(1), level])
                    total -= float(log_probs[siblings.tolist()].logsumexp(0))
            found[normaliser].append(total)
    return found


def prepared(family: str = "llama", codes: ItemCodes | None = None, histories=HISTORIES, **changes):
    model, tokenizer = tiny_item_model(family, codes=codes, **changes)
    prompts, size = tiny_prompts(model, tokenizer), model.vocab.codes.num_items
    rendered = [prompts.history(np.asarray(history, dtype=int) % size) for history in histories]
    return model, ItemTrie(model.vocab.codes), rendered


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_are_the_log_probabilities_of_the_plain_model(family):
    model, trie, rendered = prepared(family, padding=7)
    plain = fold_rows(copy.deepcopy(model.lm), model)
    found = score_items(model, trie, rendered, ITEMS, normaliser="vocab")
    for prompt, items, scores in zip(rendered, ITEMS, found, strict=True):
        for item, score in zip(items, scores, strict=True):
            path = model.vocab.paths[item]
            context = torch.from_numpy(prompt)[None]
            if family == "t5":
                ids = torch.tensor([[model.answer_start, *path]])
                log_probs = plain(input_ids=context, decoder_input_ids=ids).logits[0].log_softmax(-1)
            else:
                log_probs = plain(input_ids=torch.cat([context, path[None]], dim=1)).logits[0].log_softmax(-1)
            first = len(log_probs) - 1 - len(path)
            expected = sum(float(log_probs[first + level, path[level]]) for level in range(3))
            assert float(score) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", MOST_SLOWLY)
def test_the_catalogue_is_scored_as_each_item_by_itself_is(family):
    """A window of 6 is shorter than two of the histories, and the paths reach beyond it."""
    model, trie, rendered = prepared(family)
    oracle = [one_by_one(model, trie, prompt, range(0, 60, 4)) for prompt in rendered]
    for normaliser in NORMALISERS:
        found = score_catalog(model, trie, rendered, normaliser=normaliser, nodes_per_pass=40)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[:, ::4], [expected[normaliser] for expected in oracle], atol=1e-5)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("family", KINDS)
def test_trees_of_any_shape_are_scored_as_their_items_are(family, table):
    """Also in passes that hold less than one path."""
    model, trie, rendered = prepared(family, codes=TABLES[table], histories=[[4, 0, 3], []])
    oracle = [one_by_one(model, trie, prompt, range(trie.num_items)) for prompt in rendered]
    for normaliser, size in zip(NORMALISERS, (1, 3, 7, 1024), strict=True):
        found = score_catalog(model, trie, rendered, normaliser=normaliser, nodes_per_pass=size)
        np.testing.assert_allclose(found, [expected[normaliser] for expected in oracle], atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    items=st.lists(st.lists(st.integers(0, 59), max_size=12), min_size=3, max_size=3),
    normaliser=st.sampled_from(NORMALISERS),
    family=st.sampled_from(["llama", "gemma3", "t5"]),
    size=st.one_of(st.integers(1, 7), st.integers(8, 200)),
)
def test_any_items_in_any_order_get_the_scores_they_have_in_the_catalogue(items, normaliser, family, size):
    """Also when an item is named twice, and whatever the pass holds."""
    model, trie, rendered = prepared(family)
    everything = score_catalog(model, trie, rendered, normaliser=normaliser)
    found = score_items(
        model, trie, rendered, [np.array(rows) for rows in items], normaliser=normaliser, nodes_per_pass=size
    )
    for scores, rows, whole in zip(found, items, everything, strict=True):
        assert scores.dtype == np.float32
        assert scores.shape == (len(rows),)
        np.testing.assert_allclose(scores, whole[np.array(rows, dtype=int)], atol=1e-5)


@pytest.mark.parametrize("positions", [7, 40, 10_000])
@pytest.mark.parametrize("family", ["gemma3", "t5"])
def test_users_of_a_batch_do_not_see_each_other(family, positions):
    """Uneven lengths, in no order; all in one group, few, or each alone."""
    histories = [np.arange(5), [], np.arange(11), [7], np.arange(3, 9), [1, 1, 1]]
    model, trie, rendered = prepared(family, histories=histories)
    together = score_catalog(model, trie, rendered, nodes_per_pass=positions)
    for prompt, scores in zip(rendered, together, strict=True):
        np.testing.assert_allclose(scores, score_catalog(model, trie, [prompt])[0], atol=1e-5)


@pytest.mark.parametrize("positions", [1, 30, 1024])
def test_models_that_take_no_tree_masks_are_scored_path_by_path(positions):
    model, trie, rendered = prepared("bloom")
    assert not takes_tree_masks(model)
    oracle = [one_by_one(model, trie, prompt, items) for prompt, items in zip(rendered, ITEMS, strict=True)]
    for normaliser in NORMALISERS:
        found = score_items(model, trie, rendered, ITEMS, normaliser=normaliser, nodes_per_pass=positions)
        for scores, expected in zip(found, oracle, strict=True):
            np.testing.assert_allclose(scores, expected[normaliser], atol=1e-5)


@pytest.mark.parametrize("normaliser", ["vocab", "items"])
def test_logits_made_a_few_at_a_time_are_the_same(normaliser, monkeypatch):
    model, trie, rendered = prepared()
    inner, seen = model.level_log_probs, []
    monkeypatch.setattr(model, "level_log_probs", lambda part, *given: seen.append(len(part)) or inner(part, *given))
    at_once = score_catalog(model, trie, rendered, normaliser=normaliser)
    assert max(seen) > 1
    seen.clear()
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 1)
    np.testing.assert_allclose(score_catalog(model, trie, rendered, normaliser=normaliser), at_once, atol=1e-5)
    assert set(seen) == {1}


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), positions=st.integers(1, 90))
def test_prompts_are_read_in_groups_that_fill_a_pass_and_no_more(lengths, positions):
    groups = list(scoring._groups(lengths, range(len(lengths)), positions))
    assert sorted(user for group in groups for user in group) == list(range(len(lengths)))
    padded = [len(group) * max(lengths[user] for user in group) for group in groups]
    assert all(size <= positions or len(group) == 1 for size, group in zip(padded, groups, strict=True))
    assert len(groups) == 1 or max(lengths) * len(lengths) > positions


def test_nobody_and_nothing_are_scored():
    model, trie, rendered = prepared()
    assert score_items(model, trie, [], []) == []
    assert score_catalog(model, trie, []).shape == (0, 60)
    nothing = [np.array([], dtype=int)] * 3
    assert [scores.shape for scores in score_items(model, trie, rendered, nothing)] == [(0,)] * 3


def test_children_scores_of_the_whole_catalogue_are_probabilities():
    model, trie, rendered = prepared()
    scores = score_catalog(model, trie, rendered, normaliser="children")
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-5)


def test_level_scores_leave_room_for_paths_that_are_no_item():
    model, trie, rendered = prepared(histories=[[1, 2]])
    (scores,) = score_items(model, trie, rendered, [np.arange(60)])
    # 60 of the 120 paths are items; the others take the rest.
    assert 0 < float(np.exp(scores).sum()) < 1


@pytest.mark.parametrize(
    ("items", "message"),
    [([], "one list of items per prompt, 1, was: 0"), ([[-1]], "was: -1 to -1"), ([[3, 60]], "was: 3 to 60")],
)
def test_rows_that_are_not_there_are_refused(items, message):
    model, tokenizer = tiny_item_model()
    prompt = tiny_prompts(model, tokenizer).history([1])
    with pytest.raises(DataError, match=message):
        score_items(model, ItemTrie(model.vocab.codes), [prompt], [np.array(rows) for rows in items])

"""Exact scores are the model's own log-probabilities, whatever is asked for and however it is batched."""

import copy

import numpy as np
import pytest
import torch

from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.model.export import fold_rows
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import FAMILIES, tiny_item_model

HISTORIES = [np.array([3, 7, 1]), np.array([], dtype=int), np.arange(9)]
ITEMS = [np.array([5, 2, 59]), np.array([], dtype=int), np.array([0])]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_are_the_log_probabilities_of_the_plain_model(family):
    model, tokenizer = tiny_item_model(family, padding=7)
    prompts, trie = Prompts(tokenizer, model.vocab), ItemTrie(model.vocab.codes)
    plain = fold_rows(copy.deepcopy(model.lm), model)
    rendered = [prompts.history(history) for history in HISTORIES]
    found = score_items(model, trie, rendered, ITEMS, normaliser="vocab")
    for prompt, items, scores in zip(rendered, ITEMS, found, strict=True):
        for item, score in zip(items, scores, strict=True):
            path = model.vocab.paths[item]
            ids = torch.cat([torch.from_numpy(prompt), path])
            log_probs = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
            expected = sum(float(log_probs[len(prompt) - 1 + level, path[level]]) for level in range(3))
            assert float(score) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("normaliser", ["level", "items", "vocab", "children"])
def test_batches_change_no_score_and_none_is_given_for_no_item(normaliser):
    model, tokenizer = tiny_item_model()
    prompts, trie = Prompts(tokenizer, model.vocab), ItemTrie(model.vocab.codes)
    rendered = [prompts.history(history) for history in HISTORIES]
    together = score_items(model, trie, rendered, ITEMS, normaliser=normaliser)
    one_by_one = score_items(model, trie, rendered, ITEMS, normaliser=normaliser, batch_size=1)
    assert [len(scores) for scores in together] == [3, 0, 1]
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_level_scores_leave_room_for_paths_that_are_no_item():
    model, tokenizer = tiny_item_model()
    prompt = Prompts(tokenizer, model.vocab).history([1, 2])
    (scores,) = score_items(model, ItemTrie(model.vocab.codes), [prompt], [np.arange(60)])
    # 60 of the 120 paths are items; the others take the rest.
    assert 0 < float(np.exp(scores).sum()) < 1

"""Beams by level alone: exact where they hold everything, free of the present codes, varied when asked."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.level_beams import level_beams, usage_penalties
from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import KINDS, states, tiny_codes, tiny_item_model, tiny_prompts

EVERY_KIND = pytest.mark.parametrize("family", [*KINDS, "bloom"])
"""Beams of a decoder-only model, of an encoder–decoder, and of one that replicates the history."""


def rendered(prompts):
    return [prompts.title_to_item(row)[0] for row in (1, 2, 5)]


def all_codes(sizes):
    return np.array(list(itertools.product(*map(range, sizes))), dtype=np.int32)


def plain(model, prompt, codes, normaliser="level"):
    """Log-probabilities of codes behind one prompt: whole paths, no cache, no tree."""
    offsets = torch.tensor(model.vocab.level_starts) + model.vocab.first_id
    rows = torch.from_numpy(codes.astype(np.int64)) + offsets
    with torch.no_grad():
        found = states(model, [prompt] * len(codes), rows)
        steps = [
            model.level_log_probs(found[:, level], level, normaliser).gather(
                1, torch.from_numpy(codes[:, [level]]).long()
            )
            for level in range(codes.shape[1])
        ]
    return torch.cat(steps, dim=1).sum(1).numpy()


@pytest.mark.parametrize("normaliser", ["level", "items", "vocab"])
@EVERY_KIND
def test_beams_that_hold_every_code_give_each_with_the_log_probability_of_its_plain_path(family, normaliser):
    """Position l of each lies in level l; also codes that no item has come out."""
    sizes = (3, 2, 4)
    model, tokenizer = tiny_item_model(family, codes=tiny_codes(10, sizes))
    prompts = rendered(tiny_prompts(model, tokenizer))
    found = level_beams(decoder_for(model), prompts, levels=3, beam=24, normaliser=normaliser)
    everything = all_codes(sizes)
    for prompt, codes, log_probs in zip(prompts, found.codes, found.log_probs, strict=True):
        expected = plain(model, prompt, everything, normaliser)
        best = np.argsort(-expected)
        np.testing.assert_array_equal(codes, everything[best])
        np.testing.assert_allclose(log_probs, expected[best], atol=1e-4)


@EVERY_KIND
def test_given_codes_are_scored_as_exact_scoring_does_and_change_no_beam(family):
    model, tokenizer = tiny_item_model(family)
    prompts = rendered(tiny_prompts(model, tokenizer))
    items = np.array([[1, 40], [2, 41], [5, 42]])
    given = model.vocab.codes.table[items]
    decoder = decoder_for(model)
    found = level_beams(decoder, prompts, levels=3, beam=6, groups=2, diversity=0.5, scored=given)
    exact = score_items(model, ItemTrie(model.vocab.codes), prompts, list(items))
    np.testing.assert_allclose(found.scored, np.stack(exact), atol=1e-4)
    without = level_beams(decoder, prompts, levels=3, beam=6, groups=2, diversity=0.5)
    np.testing.assert_array_equal(found.codes, without.codes)
    np.testing.assert_allclose(found.log_probs, without.log_probs, atol=1e-4)


@EVERY_KIND
def test_groups_make_candidates_differ_in_more_levels_and_say_the_models_own_log_probabilities(family):
    model, tokenizer = tiny_item_model(family)
    prompts = rendered(tiny_prompts(model, tokenizer))

    def differing(diversity):
        found = level_beams(decoder_for(model), prompts, levels=3, beam=6, groups=3, diversity=diversity)
        for prompt, codes, log_probs in zip(prompts, found.codes, found.log_probs, strict=True):
            np.testing.assert_allclose(log_probs[log_probs > -np.inf], plain(model, prompt, codes)[log_probs > -np.inf],
                                       atol=1e-4)  # fmt: skip
            assert len(np.unique(codes[log_probs > -np.inf], axis=0)) == (log_probs > -np.inf).sum()
        return np.mean([(a != b).sum() for codes in found.codes for a, b in itertools.combinations(codes, 2)])

    assert differing(3.0) > differing(0.0)


def test_codewords_that_many_items_use_come_out_less_often_when_they_cost():
    model, tokenizer = tiny_item_model("llama", codes=tiny_codes(60, (6, 5, 4)))
    prompts = rendered(tiny_prompts(model, tokenizer))
    favourite = level_beams(decoder_for(model), prompts, levels=3, beam=1).codes[0, 0, 0]
    table = np.stack(np.unravel_index(np.arange(20), (1, 5, 4)), axis=1)
    table[:, 0] = favourite
    crowded = ItemCodes(np.concatenate([table, [[(favourite + 1) % 6, 0, 0]]]), (6, 5, 4))
    penalties = usage_penalties(crowded, 50.0, model.device)
    found = level_beams(decoder_for(model), prompts, levels=3, beam=1, penalties=penalties)
    assert (found.codes[:, 0, 0] != favourite).all()
    assert_close(usage_penalties(crowded, 0.0, model.device), [torch.zeros(size) for size in (6, 5, 4)])


def test_what_cannot_be_searched_is_refused():
    model, tokenizer = tiny_item_model("llama")
    prompts = rendered(tiny_prompts(model, tokenizer))
    for wrong in ({"beam": 0}, {"beam": 5, "groups": 2}, {"beam": 4, "diversity": -1.0}):
        with pytest.raises(DataError, match="level beams need at least 1 beam"):
            level_beams(decoder_for(model), prompts, levels=3, **wrong)

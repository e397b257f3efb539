"""Beams inside the recursive network: exact, in one call of the backbone, and never more than there are items."""

import numpy as np
import pytest
import torch

from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.level_beams import level_beams
from llm_itemtok.decoding.recursive import RecursiveDecoder
from llm_itemtok.decoding.scoring import score_catalog, score_items
from llm_itemtok.errors import ItemTokError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.vocab.trie import ItemTrie
from tests.recursive import recursive_model
from tests.tiny import tiny_codes, tiny_prompts

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "t5")
HISTORIES = [np.array([3, 7, 55]), np.array([], dtype=int), np.arange(9)]
NORMALISERS = ("level", "children")
TABLES = {
    "three levels": tiny_codes(),
    "one level": tiny_codes(20, (24,)),
    "five levels": tiny_codes(20, (3, 2, 4, 2, 3)),
    "all begin alike": ItemCodes(np.array([[1, 0, code // 5, code % 5] for code in range(15)]), (2, 1, 3, 5)),
    "one item": tiny_codes(1, (6, 5, 4)),
    "every code there can be": tiny_codes(24, (2, 3, 4)),
}


def prepared(family="llama", histories=HISTORIES, **changes):
    codes = changes.get("codes")
    cold = (0,) if codes is not None else (55, 56)
    model, tokenizer = recursive_model(family, cold=cold, **changes)
    prompts, size = tiny_prompts(model, tokenizer), model.vocab.codes.num_items
    rendered = [prompts.history(np.asarray(history, dtype=int) % size) for history in histories]
    return model, ItemTrie(model.vocab.codes), rendered


@torch.no_grad()
def one_by_one(model, state, normaliser):
    """The oracle: each item by itself, level by level, by the equations of the network."""
    codebooks, table = model.codebooks(), model.vocab.codes.table
    scores = []
    for code in table:
        total, before = 0.0, None
        for level, codebook in enumerate(codebooks):
            logits = codebook @ model.recursion.query(level, state, before)
            log_probs = logits.log_softmax(0)
            if normaliser == "children":
                siblings = np.unique(table[(table[:, :level] == code[:level]).all(1), level])
                log_probs = log_probs - log_probs[siblings.tolist()].logsumexp(0)
            total += float(log_probs[code[level]])
            before = codebook[code[level]]
        scores.append(total)
    return np.array(scores)


def states_of(model, prompts):
    return RecursiveDecoder(model).encode(prompts).last


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("table", TABLES)
@torch.no_grad()
def test_a_search_as_wide_as_the_catalogue_is_exhaustive_scoring(table, normaliser):
    """Same items, same order, same scores, also where there are fewer codewords than beams."""
    model, trie, rendered = prepared(codes=TABLES[table])
    oracle = np.stack([one_by_one(model, state, normaliser) for state in states_of(model, rendered)])
    scores = score_catalog(model, trie, rendered, normaliser=normaliser)
    np.testing.assert_allclose(scores, oracle, atol=1e-4)
    beams = beam_search(decoder_for(model), trie, rendered, beam=100, normaliser=normaliser)
    assert np.isfinite(beams.scores).all()
    for items, found, expected in zip(beams.items, beams.scores, oracle, strict=True):
        assert sorted(items) == list(range(trie.num_items))
        np.testing.assert_allclose(found, expected[items], atol=1e-4)
        np.testing.assert_allclose(found, np.sort(expected)[::-1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_are_those_of_plain_passes_whoever_is_in_the_batch(family):
    model, _, rendered = prepared(family)
    together = states_of(model, rendered)
    for prompt, state in zip(rendered, together, strict=True):
        ids = torch.from_numpy(prompt)[None]
        if model.answer_start is None:
            alone = model.hidden(ids, use_cache=False).last_hidden_state[0, -1]
        else:
            seen, start = torch.ones_like(ids), torch.full((1, 1), model.answer_start)
            read = model.read(ids, seen)
            alone = model.hidden(start, encoder_hidden_states=read, encoder_attention_mask=seen).last_hidden_state[0, 0]
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beam", [1, 20, 60])
@pytest.mark.parametrize("levels", [1, 3, 5])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_backbone_runs_once_for_a_recommendation(family, levels, beam):
    """Whatever the number of levels and beams; T5's encoder once as well."""
    model, trie, rendered = prepared(family, codes=tiny_codes(20, (24,) if levels == 1 else (3,) * levels))
    calls = []
    parts = [model.lm.base_model] if model.answer_start is None else [model.lm.get_encoder(), model.lm.get_decoder()]
    hooks = [part.register_forward_hook(lambda module, *_: calls.append(module)) for part in parts]
    beam_search(decoder_for(model), trie, rendered, beam=beam)
    score_items(model, trie, rendered, [np.arange(20)] * 3)
    for hook in hooks:
        hook.remove()
    assert [sum(call is part for call in calls) for part in parts] == [2] * len(parts)


@pytest.mark.parametrize("beam", [1, 4, 12])
def test_narrower_beams_find_real_items_with_their_exact_scores(beam):
    model, trie, rendered = prepared()
    scores = score_catalog(model, trie, rendered)
    beams = beam_search(decoder_for(model), trie, rendered, beam=beam)
    for items, found, exact in zip(beams.items, beams.scores, scores, strict=True):
        assert len(set(items)) == beam
        np.testing.assert_allclose(found, exact[items], atol=1e-5)
        assert (np.diff(found) <= 0).all()


def test_children_of_every_prefix_share_out_its_probability():
    model, trie, rendered = prepared()
    scores = score_catalog(model, trie, rendered, normaliser="children")
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-5)


def test_what_may_not_come_out_does_not():
    model, trie, rendered = prepared()
    allowed, excluded = [np.arange(30)] * 3, [np.arange(10)] * 3
    beams = beam_search(decoder_for(model), trie, rendered, beam=60, allowed=allowed, excluded=excluded)
    for items in beams.items:
        assert sorted(items[items >= 0]) == list(range(10, 30))


@pytest.mark.parametrize("positions", [1, 7, 10_000])
def test_users_of_a_batch_do_not_change_each_others_scores(positions):
    model, trie, rendered = prepared("gemma3")
    together = score_catalog(model, trie, rendered, nodes_per_pass=positions)
    for prompt, scores in zip(rendered, together, strict=True):
        np.testing.assert_allclose(scores, score_catalog(model, trie, [prompt])[0], atol=1e-5)


def test_given_items_get_the_scores_that_they_have_in_the_catalogue():
    model, trie, rendered = prepared()
    asked = [np.array([5, 2, 59, 5]), np.array([], dtype=int), np.array([0])]
    for normaliser in NORMALISERS:
        everything = score_catalog(model, trie, rendered, normaliser=normaliser)
        found = score_items(model, trie, rendered, asked, normaliser=normaliser)
        for scores, rows, whole in zip(found, asked, everything, strict=True):
            np.testing.assert_allclose(scores, whole[rows], atol=1e-5)


@pytest.mark.parametrize("normaliser", ["items", "vocab"])
def test_other_normalisers_are_refused(normaliser):
    model, trie, rendered = prepared()
    message = f"normalised over `level` or `children`, was: {normaliser}"
    with pytest.raises(ItemTokError, match=message):
        beam_search(decoder_for(model), trie, rendered, beam=5, normaliser=normaliser)
    with pytest.raises(ItemTokError, match=message):
        score_catalog(model, trie, rendered, normaliser=normaliser)


def test_paths_of_no_item_are_found_too_where_codes_are_looked_for():
    """What self-improvement asks: all codes there can be, by their likelihood."""
    model, _, rendered = prepared(codes=tiny_codes(20, (3, 2, 4)))
    found = level_beams(
        decoder_for(model), rendered, levels=3, beam=24, normaliser="level", scored=np.zeros((3, 1, 3), dtype=np.int32)
    )
    np.testing.assert_allclose(np.exp(found.log_probs).sum(axis=1), 1.0, atol=1e-5)
    for codes, values, scored in zip(found.codes, found.log_probs, found.scored, strict=True):
        (place,) = np.flatnonzero((codes == 0).all(axis=1))
        np.testing.assert_allclose(values[place], scored[0], atol=1e-5)

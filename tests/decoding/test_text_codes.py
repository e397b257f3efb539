"""Identifiers of unlike lengths in existing words: beams are those of `generate`, scores those of whole paths."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.blocks import cut
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.replicated import ReplicatedDecoder
from llm_itemtok.decoding.scoring import score_catalog, score_items
from llm_itemtok.errors import ItemTokError
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import (
    ALL_FAMILIES,
    ENCODER_DECODERS,
    KINDS,
    WORDS,
    logits,
    states,
    text_codes,
    tiny_item_model,
    tiny_prompts,
)

END = 2
HISTORIES = [np.array([3, 7, 1]), np.array([], dtype=int), np.array([5])]


def subject(family: str, **changes: object):
    """Forty items of one to five words and the end token; many begin alike, some titles come twice."""
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS[:4], size=rng.integers(1, 6))) for _ in range(40)]
    model, tokenizer = tiny_item_model(family, codes=text_codes(titles), normaliser="vocab", **changes)
    prompts = tiny_prompts(model, tokenizer)
    return model, ItemTrie(model.vocab.codes), [prompts.history(history) for history in HISTORIES]


def paths_of(model: ItemTokenModel) -> list[list[int]]:
    return [path[:length].tolist() for path, length in zip(model.vocab.paths, model.vocab.lengths, strict=True)]


@torch.no_grad()
def plain_scores(model: ItemTokenModel, prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probabilities `[B, N]` under plain `transformers`: each identifier's path run alone behind each prompt."""
    scores = np.zeros((len(prompts), len(model.vocab.paths)))
    for user, prompt in enumerate(prompts):
        for item, path in enumerate(paths_of(model)):
            targets = torch.tensor([path])
            hidden = states(model, [prompt], targets)
            steps = model.lm.get_output_embeddings()(hidden)
            steps = model._finished(steps).log_softmax(-1).gather(2, targets.unsqueeze(2))
            scores[user, item] = float(steps.sum())
    return scores


@torch.no_grad()
def generated(lm: PreTrainedModel, paths: list[list[int]], prompt: np.ndarray, beam: int) -> tuple[list, np.ndarray]:
    """Items and scores of plain `generate` with a prefix function, on a model that nothing was added to."""
    before = 1 if lm.config.is_encoder_decoder else len(prompt)

    def legal(_batch: int, ids: torch.Tensor) -> list[int]:
        prefix = ids.tolist()[before:]
        return sorted({path[len(prefix)] for path in paths if path[: len(prefix)] == prefix != path}) or [END]

    found = lm.generate(
        torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=beam,
        num_return_sequences=beam, max_new_tokens=max(map(len, paths)), do_sample=False, length_penalty=0.0,
        early_stopping=False, prefix_allowed_tokens_fn=legal, return_dict_in_generate=True, output_scores=True,
        eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    items = [paths.index(row[: row.index(END) + 1]) for row in found.sequences[:, before:].tolist()]
    return items, found.sequences_scores.numpy()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "family", [family if family in KINDS else pytest.param(family, marks=pytest.mark.slow) for family in ALL_FAMILIES]
)
def test_beams_are_those_of_generate(family, tied):
    """Items that end early leave their beams to others, so a narrow search finds what `generate` finds."""
    model, trie, prompts = subject(family, tied=tied, padding=5)
    for beam in (3, 8, trie.num_items):
        found = beam_search(decoder_for(model), trie, prompts, beam=beam, normaliser="vocab")
        for user, prompt in enumerate(prompts):
            items, scores = generated(model.lm, paths_of(model), prompt, beam)
            assert found.items[user].tolist() == items
            np.testing.assert_allclose(found.scores[user], scores, atol=2e-4)


@pytest.mark.parametrize("family", [*KINDS, "bloom"])
def test_scores_are_those_of_whole_paths_however_they_are_cut(family):
    model, trie, prompts = subject(family)
    expected = plain_scores(model, prompts)
    for nodes in (1024, 7):
        found = score_catalog(model, trie, prompts, normaliser="vocab", nodes_per_pass=nodes)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    some = [np.array([7, 3]), np.array([], dtype=int), np.array([0, 39, 0])]
    for user, scores in enumerate(score_items(model, trie, prompts, some, normaliser="vocab")):
        np.testing.assert_allclose(scores, expected[user, some[user]], atol=1e-4)


@pytest.mark.parametrize("family", [*KINDS, "bloom"])
def test_a_beam_as_wide_as_the_catalogue_ranks_as_exact_scores_do(family):
    model, trie, prompts = subject(family)
    decoders = [decoder_for(model)] + ([] if family in ENCODER_DECODERS else [ReplicatedDecoder(model)])
    for normaliser in ("vocab", "children"):
        scores = score_catalog(model, trie, prompts, normaliser=normaliser)
        for decoder in decoders:
            found = beam_search(decoder, trie, prompts, beam=trie.num_items, normaliser=normaliser)
            np.testing.assert_array_equal(found.items, np.argsort(-scores, axis=1))
            np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1), atol=1e-4)
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, atol=1e-4)  # over the children, items are all there is


@pytest.mark.parametrize("beam", [2, 5, 20])
def test_lists_hold_what_may_come_out_and_are_full(beam):
    model, trie, prompts = subject("llama")
    scores = score_catalog(model, trie, prompts, normaliser="vocab")
    allowed, excluded = [None, np.arange(0, 40, 3), np.array([1, 2, 3])], [np.arange(20), None, np.array([2])]
    found = beam_search(
        decoder_for(model), trie, prompts, beam=beam, normaliser="vocab", allowed=allowed, excluded=excluded
    )
    for user, may in enumerate([np.arange(20, 40), allowed[1], np.array([1, 3])]):
        items = found.items[user][found.items[user] >= 0]
        assert len(items) == min(beam, len(may))
        assert set(items.tolist()) <= set(may.tolist())
        np.testing.assert_allclose(found.scores[user][: len(items)], scores[user, items], atol=1e-4)
        if beam >= len(may):
            assert items.tolist() == may[np.argsort(-scores[user, may])].tolist()


def test_losses_are_those_of_plain_transformers():
    model, _, _ = subject("llama")
    ids = torch.tensor([[1, *paths_of(model)[3], *paths_of(model)[8]]])
    levels = torch.tensor([[*range(len(paths_of(model)[3])), *range(len(paths_of(model)[8]))]])
    found = model(ids[:, :-1], ids[:, 1:], levels)
    expected = -logits(model.lm, ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_row_is_trained_and_no_item_normaliser_taken():
    model, _, _ = subject("llama", tied=False)
    assert not any(parameter.requires_grad for parameter in model.rows.parameters())
    with pytest.raises(ItemTokError, match="normalised over `vocab` or `children`, was: items"):
        model.level_log_probs(torch.zeros(1, 16), 0, "items")
    with pytest.raises(ItemTokError, match="take the normaliser `vocab` only, was: level"):
        ItemTokenModel(model.lm, model.rows, model.vocab, normaliser="level")


def test_blocks_hold_no_more_than_the_words_there_are():
    """An item that has ended takes no slot at the levels behind it."""
    codes = text_codes(["red lamp", "red", "blue", "red lamp old new big"])
    for width in (5, 6, 64):
        blocks = cut(codes.table, width, codes.lengths)
        assert sorted(blocks.leaf_items.tolist()) == [0, 1, 2, 3]
        depths = blocks.depths[np.repeat(np.arange(len(blocks)), np.diff(blocks.leaf_starts)), blocks.leaf_slots]
        assert depths.tolist() == (codes.lengths[blocks.leaf_items] - 1).tolist()
    assert int((blocks.depths > 0).sum()) == 6  # red, red lamp, …; blue

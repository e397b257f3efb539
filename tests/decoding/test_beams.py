"""Beams are the right items in the right order, for every supported family."""

import copy

import numpy as np
import pytest
import torch

from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.decoding.tree import TreeDecoder
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.export import fold_rows
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import FAMILIES, tiny_codes, tiny_item_model

HISTORIES = [np.array([3, 7, 1, 9, 22]), np.array([5]), np.array([], dtype=int), np.arange(12)]


@pytest.mark.parametrize("normaliser", ["level", "items", "vocab", "children"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_as_wide_as_the_catalogue_rank_as_exact_scoring_does(family: str, normaliser: str) -> None:
    model, tokenizer = tiny_item_model(family)
    trie, prompts = ItemTrie(model.vocab.codes), Prompts(tokenizer, model.vocab)
    rendered = [prompts.history(history) for history in HISTORIES]
    beams = beam_search(TreeDecoder(model), trie, rendered, beam=trie.num_items, normaliser=normaliser)
    everything = [np.arange(trie.num_items)] * len(rendered)
    exact = np.stack(score_items(model, trie, rendered, everything, normaliser=normaliser))
    np.testing.assert_array_equal(beams.items, np.argsort(-exact, axis=1))
    np.testing.assert_allclose(beams.scores, -np.sort(-exact, axis=1), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 7, 40])
def test_beams_of_20_rank_as_generate_with_a_prefix_function_does(family: str, padding: int) -> None:
    """`padding`: item ids may fall beyond the base table, astride its end, or wholly into its padding."""
    model, tokenizer = tiny_item_model(family, padding=padding, normaliser="vocab")
    trie, prompts = ItemTrie(model.vocab.codes), Prompts(tokenizer, model.vocab)
    merged = fold_rows(copy.deepcopy(model.lm), model)
    paths = model.vocab.paths.tolist()
    for history in HISTORIES:
        prompt = prompts.history(history)
        ours = beam_search(TreeDecoder(model), trie, [prompt], beam=20, normaliser="vocab")

        def legal(_batch: int, ids: torch.Tensor, done: int = len(prompt)) -> list[int]:
            prefix = ids.tolist()[done:]
            return sorted({path[len(prefix)] for path in paths if path[: len(prefix)] == prefix}) or [2]

        theirs = merged.generate(
            torch.from_numpy(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=20,
            num_return_sequences=20,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            length_penalty=0.0,
            early_stopping=False,
            prefix_allowed_tokens_fn=legal,
            return_dict_in_generate=True,
            output_scores=True,
        )
        items = [paths.index(path) for path in theirs.sequences[:, len(prompt) :].tolist()]
        assert ours.items[0].tolist() == items
        np.testing.assert_allclose(ours.scores[0], theirs.sequences_scores.numpy(), atol=2e-4)


@pytest.mark.parametrize("sizes", [(60,), (1, 1, 60), (2, 2, 2, 2, 4), (6, 5, 4)])
def test_every_recommendation_is_an_existing_item_and_comes_once(sizes: tuple[int, ...]) -> None:
    codes = tiny_codes(min(55, int(np.prod(sizes))), sizes)
    model, tokenizer = tiny_item_model(codes=codes)
    trie, prompts = ItemTrie(codes), Prompts(tokenizer, model.vocab)
    rng = np.random.default_rng(1)
    rendered = [prompts.history(rng.integers(0, codes.num_items, size=rng.integers(0, 9))) for _ in range(50)]
    beams = beam_search(TreeDecoder(model), trie, rendered, beam=20)
    assert beams.items.min() >= 0
    assert beams.items.max() < codes.num_items
    assert all(len(set(row)) == 20 for row in beams.items.tolist())
    assert (np.diff(beams.scores, axis=1) <= 0).all()


def test_a_catalogue_smaller_than_the_beam_comes_out_whole() -> None:
    codes = tiny_codes(3)
    model, tokenizer = tiny_item_model(codes=codes)
    prompt = Prompts(tokenizer, model.vocab).history([0, 1])
    beams = beam_search(TreeDecoder(model), ItemTrie(codes), [prompt], beam=20)
    assert sorted(beams.items[0].tolist()) == [0, 1, 2]


def test_excluded_items_never_come_out_and_the_rest_keep_their_order() -> None:
    model, tokenizer = tiny_item_model()
    trie, prompt = ItemTrie(model.vocab.codes), Prompts(tokenizer, model.vocab).history([4, 8])
    free = beam_search(TreeDecoder(model), trie, [prompt], beam=60).items[0]
    banned = free[[0, 2, 5]]
    kept = beam_search(TreeDecoder(model), trie, [prompt], beam=60, excluded=[banned]).items[0]
    assert kept[:57].tolist() == [item for item in free.tolist() if item not in banned]
    assert kept[57:].tolist() == [-1, -1, -1]


def test_users_of_a_batch_do_not_see_each_other() -> None:
    model, tokenizer = tiny_item_model("gemma3")
    trie, prompts = ItemTrie(model.vocab.codes), Prompts(tokenizer, model.vocab)
    rendered = [prompts.history(history) for history in HISTORIES]
    together = beam_search(TreeDecoder(model), trie, rendered, beam=20)
    for row, prompt in enumerate(rendered):
        alone = beam_search(TreeDecoder(model), trie, [prompt], beam=20)
        assert alone.items[0].tolist() == together.items[row].tolist()


def test_children_log_probabilities_of_the_whole_catalogue_sum_to_one() -> None:
    codes = ItemCodes(np.array([[0, 0], [0, 1], [1, 0]], dtype=np.int32), (2, 2), provenance={})
    model, tokenizer = tiny_item_model(codes=codes)
    prompt = Prompts(tokenizer, model.vocab).history([2])
    beams = beam_search(TreeDecoder(model), ItemTrie(codes), [prompt], beam=3, normaliser="children")
    assert np.exp(beams.scores).sum() == pytest.approx(1.0, abs=1e-5)

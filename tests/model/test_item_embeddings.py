"""Embeddings of items' own: who has one, where it stands in a row, and that it never tells what is to be predicted."""

import numpy as np
import pytest
import torch

from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.replicated import ReplicatedDecoder
from llm_itemtok.decoding.scoring import score_catalog
from llm_itemtok.model.item_embeddings import ItemEmbeddings
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import TASKS
from llm_itemtok.vocab.trie import ItemTrie
from tests.recursive import COLD, embeddings, named_model, vectors_of
from tests.tiny import states, tiny_codes, tiny_item_model, tiny_prompts

HISTORIES = [np.array([3, 7, 55]), np.array([], dtype=int), np.arange(9)]
KINDS = ("llama", "gemma3", "t5")


def nll_of(model, tokenizer, examples):
    """NLL of target tokens, one after the other, of examples (task, items, first target)."""
    rows = [
        {"task": TASKS.index(task), "items": np.asarray(items), "first": first, "weight": 1.0}
        for task, items, first in examples
    ]
    batch = Collator(tiny_prompts(model, tokenizer), model.vocab.num_levels)(rows)
    found = model(**{name: value for name, value in batch.items() if name not in ("tasks", "loss_weights")})
    return found[batch["levels"] >= 0], batch


@pytest.mark.parametrize("guidance", ["uid", "vectors", "both"])
def test_what_was_never_trained_counts_as_no_embedding(guidance):
    codes = tiny_codes()
    items = embeddings(8, codes, guidance=guidance)
    rows = torch.tensor([*COLD, 3])
    has = {"uid": [False, False, True], "vectors": [False, True, True], "both": [False, True, True]}
    assert items.has(rows).tolist() == has[guidance]
    found = items(rows)
    assert found.any(1).tolist() == has[guidance]
    assert found.shape == (3, 8)
    (found.sum()).backward()
    if items.table is not None:
        assert items.table.grad[list(COLD)].abs().sum() == 0


def test_item_vectors_come_in_at_one_scale_whatever_they_were():
    codes = tiny_codes()
    vectors = vectors_of(codes, COLD)
    known = torch.ones(60, dtype=torch.bool)
    one = ItemEmbeddings(8, known=known, dimensions=0, vectors=vectors)
    other = ItemEmbeddings(
        8, known=known, dimensions=0, vectors=torch.where(vectors.any(1, keepdim=True), 9 * vectors + 4, 0)
    )
    torch.testing.assert_close(one(torch.arange(60)), other(torch.arange(60)))


@pytest.mark.parametrize("guidance", ["uid", "vectors", "both"])
def test_more_items_leave_the_others_as_they_are(guidance):
    items = embeddings(8, tiny_codes(), guidance=guidance)
    before = items(torch.arange(60))
    items.extend(2, None if guidance == "uid" else torch.tensor([[1.0, 2, 3, 4, 5], [0.0, 0, 0, 0, 0]]))
    torch.testing.assert_close(items(torch.arange(60)), before, rtol=0, atol=0)
    assert items.has(torch.tensor([60, 61])).tolist() == [guidance != "uid", False]
    assert items.settings["items"] == 62


def test_the_initial_values_do_not_use_up_the_random_numbers_of_others():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    embeddings(8, tiny_codes())
    torch.testing.assert_close(torch.randn(3), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KINDS[::2])
def test_silent_embeddings_begin_as_the_model_without_them(family, tied):
    """So what they bring is learnt, and not the luck of another beginning."""
    plain, tokenizer = tiny_item_model(family, tied=tied)
    with_own, _ = tiny_item_model(family, tied=tied)
    with_own.own = embeddings(16, plain.vocab.codes, silent=True)
    examples = [("next-item", [3, 9, 4], 2), ("title-to-item", [7], 0), ("item-to-title", [8], 0)]
    ours, theirs = nll_of(with_own, tokenizer, examples)[0], nll_of(plain, tokenizer, examples)[0]
    torch.testing.assert_close(ours, theirs)
    torch.autograd.grad(ours.sum(), list(with_own.own.parameters()))  # and they can be learnt


def test_an_embedding_stands_at_the_last_token_of_its_item_alone():
    model, tokenizer = named_model()
    prompts = tiny_prompts(model, tokenizer)
    ids, plain = prompts.read([3, 9]), prompts.paths([3, 9])
    assert (ids[[2, 5]] == [-4, -10]).all()
    assert (ids[[0, 1, 3, 4]] == plain[[0, 1, 3, 4]]).all()
    found = model._embed(torch.from_numpy(ids), None)
    rows = model.rows.input_rows[torch.from_numpy(plain) - model.vocab.first_id]
    torch.testing.assert_close(found[[0, 1, 3, 4]], rows[[0, 1, 3, 4]])
    torch.testing.assert_close(found[[2, 5]], rows[[2, 5]] + model.own(torch.tensor([3, 9])))


@pytest.mark.parametrize("family", KINDS)
def test_the_embedding_of_a_target_is_never_seen_before_it_is_predicted(family):
    """The loss of an item does not move with its own embedding, that of what follows it does."""
    model, tokenizer = named_model(family)
    kind = 4 if model.answer_start is not None else 0
    nll, batch = nll_of(model, tokenizer, [("next-item", [3, 9, 4, 8, 5], kind)])
    targets = nll.view(-1, 3)
    order = [5] if kind else [3, 9, 4, 8, 5]
    for place, item in enumerate(order):
        gradient = torch.autograd.grad(targets[place].sum(), model.own.table, retain_graph=True)[0]
        read = [3, 9, 4, 8] if kind else order[:place]
        assert gradient[item].abs().max() == 0
        assert gradient[read].abs().amax(1).min() > 0 if read else not gradient.any()
    assert batch["labels"].min() >= 0


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_decoding_and_scoring_are_what_plain_passes_over_whole_rows_say(family):
    model, tokenizer = named_model(family)
    prompts, trie = tiny_prompts(model, tokenizer), ItemTrie(model.vocab.codes)
    rendered = [prompts.history(history) for history in HISTORIES]
    scores = score_catalog(model, trie, rendered)
    table = torch.from_numpy(model.vocab.codes.table.astype(np.int64))
    for prompt, found in zip(rendered, scores, strict=True):
        expected = []
        for item in range(60):
            hidden = states(model, [prompt], model.vocab.paths[item : item + 1])[0]
            expected.append(
                sum(float(model.level_log_probs(hidden[at], at, "level")[table[item, at]]) for at in range(3))
            )
        np.testing.assert_allclose(found, expected, atol=1e-4)
    beams = beam_search(decoder_for(model), trie, rendered, beam=60)
    for items, values, found in zip(beams.items, beams.scores, scores, strict=True):
        np.testing.assert_allclose(values, found[items], atol=1e-4)
        np.testing.assert_allclose(values, np.sort(found)[::-1], atol=1e-4)
    if model.answer_start is None:
        rows = beam_search(ReplicatedDecoder(model), trie, rendered, beam=60)
        np.testing.assert_allclose(rows.scores, beams.scores, atol=1e-4)

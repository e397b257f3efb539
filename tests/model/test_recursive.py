"""The recursive network and the model around it: what it reads, what it tells, and where its gradients go."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.load import add_lora, with_item_tokens
from llm_itemtok.model.recursive import SPREAD, Recursion
from llm_itemtok.model.rows import embedding_scale, input_table
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import TASKS
from llm_itemtok.vocab import init
from tests.recursive import COLD, embeddings, recursive_model
from tests.tiny import tiny_codes, tiny_lm, tiny_prompts, tiny_tokenizer

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "t5")
NEXT, TO_ITEM, TO_TITLE = (TASKS.index(task) for task in ("next-item", "title-to-item", "item-to-title"))
GUIDANCES = ("uid", "vectors", "both")


def network(mixing="hard", guidance="uid", levels=3, words=6, width=4, seed=0):
    """A network over random codebooks, and codes of 60 items."""
    codes = tiny_codes(sizes=(words,) * levels)
    recursion = Recursion(
        embeddings(width, codes, guidance=guidance), levels=levels, width=width, hidden=5, mixing=mixing, seed=seed
    )
    codebooks = [torch.randn(words, width, generator=torch.Generator().manual_seed(level)) for level in range(levels)]
    table = torch.from_numpy(codes.table.astype(np.int64))
    recursion.fit_scale(codebooks, table)
    return recursion, [codebook.requires_grad_() for codebook in codebooks], table


def batch_of(model, tokenizer, examples):
    """Examples (task, items, first target) as the collator renders them."""
    rows = [
        {"task": task, "items": np.asarray(items), "first": first, "weight": 1.0} for task, items, first in examples
    ]
    return Collator(tiny_prompts(model, tokenizer), model.vocab.num_levels)(rows)


def nll_of(model, batch):
    found = model(**{name: value for name, value in batch.items() if name not in ("tasks", "loss_weights")})
    return found[0] if isinstance(found, tuple) else found


def test_a_level_goes_by_the_guidance_and_the_codeword_before_and_by_nothing_else():
    """By hand, from the equations; the sum of the levels before plays no part."""
    recursion, codebooks, _ = network()
    states, codes = torch.randn(5, 4), torch.tensor([[1, 2, 3], [1, 2, 5], [0, 2, 3], [1, 0, 3], [4, 4, 4]])
    logits = recursion.user_side(states, codes, codebooks)
    torch.testing.assert_close(logits[0], states @ codebooks[0].T)
    for level in (1, 2):
        before = codebooks[level - 1][codes[:, level - 1]] / recursion.unit
        first, _, second = recursion.steps[level - 1]
        inner = torch.cat([before, states], dim=1) @ first.weight.T + first.bias
        x = inner.clamp(min=0) @ second.weight.T + second.bias
        torch.testing.assert_close(logits[level], x @ codebooks[level].T)


def test_the_user_side_is_forced_along_the_target_and_the_item_side_never_sees_the_code():
    recursion, codebooks, table = network()
    states = torch.tensor([[0.5, -1.0, 0.3, 0.8]]).expand(2, 4)
    one, other = recursion.user_side(states, torch.tensor([[1, 2, 3], [4, 2, 5]]), codebooks)[1]
    assert not torch.equal(one, other)
    rows = torch.arange(20)
    shuffled = table[torch.randperm(60)][:20]
    ours, theirs = (recursion.item_side(rows, codes, codebooks) for codes in (table[:20], shuffled))
    torch.testing.assert_close(ours.vectors, theirs.vectors, rtol=0, atol=0)


def test_hard_reads_the_best_codeword_and_its_scores_learn_as_those_of_the_mean():
    """Straight-through: forward the row of the best codeword, backward, for its scores, the gradient of the mean."""
    hard, codebooks, table = network("hard", levels=1, words=64)
    soft = copy.deepcopy(hard)
    soft.mixing = "soft"
    rows, wanted, book = torch.arange(8), torch.randn(8, 4), codebooks[0]
    found = {}
    for name, recursion in (("hard", hard), ("soft", soft)):
        assigned = recursion.item_side(rows, table[rows], codebooks)
        best = book[assigned.logits[0].argmax(1)] * recursion.gain
        mean = assigned.logits[0].softmax(1) @ book * recursion.gain
        torch.testing.assert_close(assigned.vectors, best if name == "hard" else mean)
        (of_scores,) = torch.autograd.grad((assigned.vectors * wanted).sum(), assigned.logits, retain_graph=True)
        (assigned.vectors * wanted).sum().backward()
        found[name] = [of_scores, *(part.grad.clone() for part in recursion.parameters())]
    for ours, theirs in zip(found["hard"], found["soft"], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(gradient.any() for gradient in found["hard"])


def test_a_codeword_that_is_read_learns_as_an_embedding_does():
    """Not by its share under p, which is small as long as nothing is learnt."""
    recursion, codebooks, table = network(levels=1, words=64)
    rows, wanted = torch.arange(8), torch.randn(8, 4)
    assigned = recursion.item_side(rows, table[rows], codebooks)
    of_scores, whole = torch.autograd.grad(
        (assigned.vectors * wanted).sum(), (assigned.logits[0], codebooks[0]), retain_graph=True
    )
    (through,) = torch.autograd.grad(assigned.logits[0], codebooks[0], of_scores)
    own = torch.zeros_like(through).index_add(0, assigned.logits[0].argmax(1), wanted * recursion.gain)
    torch.testing.assert_close(whole - through, own)


@pytest.mark.parametrize("mixing", ["hard", "soft"])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_items_begin_with_a_choice_whatever_the_scale_of_the_codewords(mixing, size):
    """Flat scores would be no choice, and read every item alike; the release has codewords of scale 1 instead."""
    codes = tiny_codes(sizes=(40,) * 3)
    books = [size * torch.randn(40, 32, generator=torch.Generator().manual_seed(level)) for level in range(3)]
    table = torch.from_numpy(codes.table.astype(np.int64))
    recursion = Recursion(embeddings(32, codes), levels=3, width=32, hidden=16, mixing=mixing)
    recursion.fit_scale(books, table)
    known = recursion.items.has(torch.arange(60)).nonzero()[:, 0]
    assigned = recursion.item_side(known, table[known], books)
    for logits in assigned.logits:
        torch.testing.assert_close(logits.std(1, correction=0).mean(), torch.tensor(SPREAD))
    spread = (assigned.vectors - assigned.vectors.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(spread, torch.cat(books).square().mean().sqrt())


def test_items_that_all_begin_alike_keep_the_scale_of_the_codewords():
    """Of one item nothing spreads, and a gain that made it would be half a million."""
    codes = ItemCodes([[1, 2]], (3, 3))
    books = [torch.randn(3, 8, generator=torch.Generator().manual_seed(level)) for level in range(2)]
    recursion = Recursion(embeddings(8, codes, cold=()), levels=2, width=8, hidden=4)
    recursion.fit_scale(books, torch.from_numpy(codes.table.astype(np.int64)))
    read = recursion.item_side(torch.zeros(1, dtype=torch.long), torch.tensor([[1, 2]]), books).vectors
    torch.testing.assert_close(read.square().mean().sqrt(), torch.cat(books).square().mean().sqrt())


def test_the_gradient_of_later_levels_passes_through_earlier_ones():
    recursion, codebooks, table = network()
    last = recursion.item_side(torch.arange(8), table[:8], codebooks).logits[2]
    (first_book, guidance) = torch.autograd.grad(last.square().sum(), (codebooks[0], recursion.items.table))
    assert first_book.any()
    assert guidance.any()


def test_equal_paths_of_unlike_items_are_equal_inputs_if_hard_and_unlike_ones_if_soft():
    """Released behaviour: redistribution is a choice of codewords, not a mixture, unless mixtures are asked for."""
    recursion, codebooks, table = network()
    rows = torch.arange(50)
    assigned = recursion.item_side(rows, table[rows], codebooks)
    paths = torch.stack([logits.argmax(1) for logits in assigned.logits], dim=1)
    one, other = next((a, b) for a in range(50) for b in range(a) if torch.equal(paths[a], paths[b]))
    torch.testing.assert_close(assigned.vectors[one], assigned.vectors[other])
    recursion.mixing = "soft"
    vectors = recursion.item_side(rows, table[rows], codebooks).vectors
    assert (vectors[one] - vectors[other]).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_an_item_without_embedding_is_read_as_the_sum_of_its_code(guidance):
    recursion, codebooks, table = network(guidance=guidance)
    rows = torch.tensor([*COLD, 3])
    found = recursion.item_side(rows, table[rows], codebooks).vectors
    spelled = sum(codebook[table[rows, level]] for level, codebook in enumerate(codebooks)) * recursion.gain
    same = [torch.allclose(*pair) for pair in zip(found, spelled, strict=True)]
    # The second has an item vector, the third a learnt embedding as well.
    assert same == [True, guidance == "uid", False]


def test_without_guidance_the_sums_of_codes_have_the_scale_of_the_codewords():
    """An LLM reads embeddings of one size; a sum of L codewords would be about sqrt(L) times that."""
    recursion, codebooks, table = network(width=32, words=40)
    recursion.items.known = torch.full((60,), False)
    recursion.fit_scale(codebooks, table)
    vectors = recursion.item_side(torch.arange(60), table, codebooks).vectors
    size = torch.cat(codebooks).square().mean().sqrt()
    torch.testing.assert_close((vectors - vectors.mean(0)).square().mean().sqrt(), size)


@pytest.mark.parametrize(
    ("family", "tied"), [*((family, True) for family in FAMILIES), ("llama", False), ("gpt2", False), ("t5", False)]
)
def test_the_model_reads_items_as_the_network_says_at_the_scale_of_the_family(family, tied):
    """Also Gemma, which multiplies its embeddings."""
    model, tokenizer = recursive_model(family, tied=tied)
    ids = torch.from_numpy(tiny_prompts(model, tokenizer).history([3, 55, 3]))
    embeds = model._embed(ids, None)
    places = [place for place, token in enumerate(ids.tolist()) if token < 0]
    table, rows = torch.from_numpy(model.vocab.codes.table.astype(np.int64)), torch.tensor([3, 55])
    scale = embedding_scale(input_table(model.lm))
    first, second = model.recursion.item_side(rows, table[rows], model.codebooks()).vectors * scale
    torch.testing.assert_close(embeds[places], torch.stack([first, second, first]))
    text = [place for place, token in enumerate(ids.tolist()) if token >= 0]
    torch.testing.assert_close(embeds[text], input_table(model.lm)(ids[text]))
    assert model.rows.output_rows is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_levels_from_one_state(family):
    model, tokenizer = recursive_model(family)
    batch = batch_of(model, tokenizer, [(NEXT, [3, 9, 4], 2), (TO_ITEM, [7], 0)])
    nll, prompts = nll_of(model, batch), tiny_prompts(model, tokenizer)
    for row, (prompt, item) in enumerate(((prompts.history([3, 9]), 4), (prompts.title_to_item(7)[0], 7))):
        states = _state_after(model, prompt)
        code = torch.from_numpy(model.vocab.codes.table[[item]].astype(np.int64))
        logits = model.recursion.user_side(states, code, model.codebooks())
        expected = [F.cross_entropy(part, code[:, level]) for level, part in enumerate(logits)]
        torch.testing.assert_close(nll[row][batch["levels"][row] >= 0], torch.stack(expected), rtol=1e-4, atol=1e-5)


def _state_after(model, prompt):
    ids = torch.from_numpy(prompt)[None]
    if model.answer_start is None:
        return model.hidden(ids, use_cache=False).last_hidden_state[:, -1]
    seen = torch.ones_like(ids)
    start = torch.full((1, 1), model.answer_start)
    read = model.read(ids, seen)
    return model.hidden(start, encoder_hidden_states=read, encoder_attention_mask=seen).last_hidden_state[:, 0]


def test_many_positions_are_the_same_targets_one_at_a_time():
    """Multi-position training sums what the last-position mode, the release's, sums over all beginnings."""
    model, tokenizer = recursive_model()
    items = [3, 9, 4, 55, 1]
    whole = batch_of(model, tokenizer, [(NEXT, items, 0)])
    single = batch_of(model, tokenizer, [(NEXT, items[: last + 1], last) for last in range(5)])
    together, alone = nll_of(model, whole), nll_of(model, single)
    assert whole["input_ids"].shape == (1, 5)
    torch.testing.assert_close(together[whole["levels"] >= 0], alone[single["levels"] >= 0])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_padding_and_the_company_of_a_row_change_nothing(family):
    model, tokenizer = recursive_model(family)
    examples = [(NEXT, [3, 9, 4], 2), (NEXT, [8], 0), (NEXT, [1, 2, 55, 9, 30, 41], 5)]
    together = batch_of(model, tokenizer, examples)
    found = nll_of(model, together)
    for row, example in enumerate(examples):
        batch = batch_of(model, tokenizer, [example])
        alone = nll_of(model, batch)[batch["levels"] >= 0]
        torch.testing.assert_close(found[row][together["levels"][row] >= 0], alone, rtol=1e-4, atol=1e-5)
    padding = {name: value.clone() for name, value in together.items()}
    name = "input_ids" if model.answer_start is None else "context_ids"
    width = [len(ids) for ids in padding[name]]
    assert len(set(width)) == 1
    lengths = [max(place for place, token in enumerate(ids.tolist()) if token != 0) + 1 for ids in padding[name]]
    for row, length in enumerate(lengths):
        padding[name][row, length:] = -7  # an item where there was a word: it must not be seen either
    torch.testing.assert_close(nll_of(model, padding)[together["levels"] >= 0], found[together["levels"] >= 0])


def test_both_sides_train_one_set_of_codebooks_and_steps():
    model, tokenizer = recursive_model(aligns=True)
    batch = batch_of(model, tokenizer, [(NEXT, [3, 9, 4], 2)])
    nll, told = model(**{name: batch[name] for name in ("input_ids", "labels", "levels")})
    shared = [model.rows.input_rows, *model.recursion.steps.parameters()]
    for side in (nll.sum(), told["alignment"].sum()):
        assert all(part.any() for part in torch.autograd.grad(side, shared, retain_graph=True))


def test_alignment_is_the_mean_over_levels_of_how_unlikely_a_code_is_under_its_own_item():
    model, tokenizer = recursive_model(aligns=True)
    batch = batch_of(model, tokenizer, [(NEXT, [3, 55, 3, 4], 0)])
    _, told = model(**{name: batch[name] for name in ("input_ids", "labels", "levels")})
    codes = model.codes_of(torch.tensor([3]))
    logits = model.recursion.item_side(torch.tensor([3]), codes, model.codebooks()).logits
    expected = sum(F.cross_entropy(part, codes[:, level]) for level, part in enumerate(logits)) / 3
    found = told["alignment"][0]
    torch.testing.assert_close(found[[1, 3]], expected.expand(2))
    assert found[[0, 2]].tolist() == [0.0, 0.0]  # the start token, and an item without embedding


def test_alignment_vanishes_where_the_item_side_is_sure_of_the_code():
    codes = ItemCodes(np.array([[0], [1], [2], [3]]), (4,))
    model, tokenizer = recursive_model(codes=codes, aligns=True, cold=())
    with torch.no_grad():
        model.rows.input_rows.copy_(torch.eye(4, 16))
        model.recursion.items.table.copy_(torch.eye(4, 7))
        model.recursion.items.project.weight.copy_(50 * torch.eye(16, 7))
        model.recursion.items.project.bias.zero_()
    batch = batch_of(model, tokenizer, [(NEXT, [0, 1, 2, 3], 3)])
    _, told = model(**{name: batch[name] for name in ("input_ids", "labels", "levels")})
    assert told["alignment"].max() < 1e-6


def test_a_batch_without_items_in_it_still_uses_every_parameter():
    """A distributed wrapper waits for a gradient of each."""
    model, tokenizer = recursive_model(aligns=True)
    for examples in ([(TO_ITEM, [7], 0)], [(TO_TITLE, [7], 0)]):
        batch = batch_of(model, tokenizer, examples)
        nll, told = model(**{name: batch[name] for name in ("input_ids", "labels", "levels")})
        trained = [part for part in (*model.recursion.parameters(), model.rows.input_rows)]
        torch.autograd.grad(nll.sum() + told["alignment"].sum(), trained)  # raises for one that is not used


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_texts_are_predicted_beside_items_from_the_same_states(family):
    model, tokenizer = recursive_model(family)
    mixed = batch_of(model, tokenizer, [(TO_TITLE, [7], 0), (NEXT, [3, 9, 4], 2)])
    alone = batch_of(model, tokenizer, [(TO_TITLE, [7], 0)])
    found, expected = nll_of(model, mixed)[0], nll_of(model, alone)[0]
    torch.testing.assert_close(found[mixed["levels"][0] >= 0], expected[alone["levels"][0] >= 0], rtol=1e-4, atol=1e-5)
    assert (alone["levels"][0] == model.vocab.num_levels).sum() == 4  # three words and the end
    assert (expected[alone["levels"][0] >= 0] > 0).all()


@pytest.mark.parametrize("family", ["qwen3", "t5"])
def test_lora_the_network_and_the_rows_are_what_is_trained(family):
    lm, _ = add_lora(tiny_lm(family), rank=2, alpha=4, dropout=0.0, rslora=False, seed=0)
    codes, tokenizer = tiny_codes(), tiny_tokenizer()
    model = with_item_tokens(lm, tokenizer, codes, lambda v, t: init.normal(v, t, seed=0), one_table=True)
    model.recursion = Recursion(embeddings(16, codes), levels=3, width=16, hidden=8)
    batch = batch_of(model, tokenizer, [(NEXT, [3, 9, 4], 2)])
    nll_of(model, batch).sum().backward()
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    assert {name for name, part in model.named_parameters() if part.grad is not None} == trained
    assert any("lora_" in name for name in trained)
    assert all("lora_" in name or name.startswith(("rows.", "recursion.")) for name in trained)
    held = model.state_dict()
    assert trained <= set(held)


def test_a_body_in_bfloat16_has_its_network_in_float32():
    """Small updates of few rows would be rounded away."""
    model, tokenizer = recursive_model()
    exact = batch_of(model, tokenizer, [(NEXT, [3, 9, 4, 55], 0)])
    expected = nll_of(model, exact)
    model.lm.to(torch.bfloat16)
    found = nll_of(model, exact)
    assert found.dtype == torch.float32
    assert model.recursion.items.table.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(nll_of(model.float(), exact), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("guidance", ["uid", "both"])
def test_in_half_precision_an_item_is_read_by_the_codewords_that_decoding_would_choose(guidance):
    """Rounded scores would choose others now and then, and decoding does not round."""
    model, _ = recursive_model(guidance=guidance)
    rows = torch.arange(60)
    codes, codebooks = model.codes_of(rows), model.codebooks()
    states = torch.randn(60, codebooks[0].shape[1], generator=torch.Generator().manual_seed(0))

    def both_sides():
        return model.recursion.item_side(rows, codes, codebooks), model.recursion.user_side(states, codes, codebooks)

    read, told = both_sides()
    with torch.autocast("cpu", torch.bfloat16):
        half_read, half_told = both_sides()
    torch.testing.assert_close(half_read.vectors, read.vectors, rtol=0, atol=0)
    torch.testing.assert_close(half_told, told, rtol=0, atol=0)


def test_codes_that_change_are_followed_at_once():
    """The network keeps its weights; targets, and what items without embedding are read as, are of the new codes."""
    model, tokenizer = recursive_model()
    before = batch_of(model, tokenizer, [(NEXT, [55, 9, 4], 2)])
    first = nll_of(model, before)[before["levels"] >= 0]
    table = model.vocab.codes.table.copy()
    table[[4, 55]] = table[[30, 31]]
    table[[30, 31]] = model.vocab.codes.table[[4, 55]]
    model.take_codes(ItemCodes(table, model.vocab.codes.sizes))
    after = batch_of(model, tokenizer, [(NEXT, [55, 9, 4], 2)])
    fresh, _ = recursive_model(codes=ItemCodes(table, model.vocab.codes.sizes))
    fresh.load_state_dict(model.state_dict())
    fresh.recursion.gain.copy_(model.recursion.gain)
    fresh.recursion.unit.copy_(model.recursion.unit)
    found = nll_of(model, after)[after["levels"] >= 0]
    torch.testing.assert_close(found, nll_of(fresh, after)[after["levels"] >= 0])
    assert not torch.allclose(found, first)

"""The model with item tokens is the base model, plus item rows, and nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, StableLmConfig

from llm_itemtok.errors import UnsupportedModelError
from llm_itemtok.model import item_lm
from llm_itemtok.model.export import fold_rows
from llm_itemtok.model.families import SUPPORTED_FAMILIES, of_encoder, refuse_unsupported
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.load import add_lora
from llm_itemtok.model.rows import input_table
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import build
from llm_itemtok.training.next_token import MODEL_INPUTS
from tests.tiny import (
    ALL_FAMILIES,
    DECODERS,
    ENCODER_DECODERS,
    KINDS,
    MOST_SLOWLY,
    WORDS,
    context,
    hidden,
    logits,
    slowly,
    tiny_codes,
    tiny_item_model,
    tiny_lm,
    tiny_prompts,
)

NUM_TEXT = 3 + len(WORDS)
EVERY_FAMILY = pytest.mark.parametrize("family", MOST_SLOWLY)
EVERY_DECODER = pytest.mark.parametrize("family", slowly(DECODERS))
EVERY_KIND = pytest.mark.parametrize("family", KINDS)
EVERY_TIE = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
EVERY_PADDING = pytest.mark.parametrize("padding", [0, 7, 40])
NORMALISERS = pytest.mark.parametrize("normaliser", ["level", "items", "vocab"])


def mixed_ids(model: ItemTokenModel) -> torch.Tensor:
    """Two rows of 11 ids, of text and of items."""
    generator = torch.Generator().manual_seed(9)
    text = torch.randint(0, NUM_TEXT, (2, 11), generator=generator)
    items = torch.randint(0, model.vocab.num_tokens, (2, 11), generator=generator) + model.vocab.first_id
    return torch.where(torch.arange(11) % 3 == 0, text, items)


@EVERY_PADDING
@EVERY_TIE
@EVERY_FAMILY
@torch.no_grad()
def test_adding_item_tokens_changes_no_old_logit(family, tied, padding):
    """Ids below the item range are the base model's own; item ids may lie beyond its table, astride, or inside."""
    model, _ = tiny_item_model(family, tied=tied, padding=padding)
    base = tiny_lm(family, tied=tied, padding=padding)
    ids = torch.randint(0, NUM_TEXT, (2, 12), generator=torch.Generator().manual_seed(1))
    ours = model.vocab_logits(hidden(model, ids))
    theirs = logits(base, ids)
    assert ours.shape[-1] == max(NUM_TEXT + padding, model.vocab.first_id + model.vocab.num_tokens)
    assert torch.equal(ours[..., :NUM_TEXT], theirs[..., :NUM_TEXT])
    after = model.vocab.first_id + model.vocab.num_tokens
    assert torch.equal(ours[..., after:], theirs[..., after:])


@EVERY_PADDING
@EVERY_TIE
@EVERY_FAMILY
@torch.no_grad()
def test_logits_are_those_of_the_plain_model_with_the_rows_in_its_table(family, tied, padding):
    model, _ = tiny_item_model(family, tied=tied, padding=padding)
    if model.rows.output_rows is not None:
        model.rows.output_rows.copy_(torch.randn_like(model.rows.output_rows))
    plain = fold_rows(copy.deepcopy(model.lm), model)
    ids = mixed_ids(model)
    ours = model.vocab_logits(hidden(model, ids))
    assert torch.allclose(ours, logits(plain, ids), atol=1e-5)
    assert bool(plain.config.tie_word_embeddings) is tied


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_losses_and_gradients_are_those_of_the_plain_model(family):
    """Every family's, with an untied head and item tokens astride the end of the base table."""
    model, _ = tiny_item_model(family, tied=False, padding=7, normaliser="vocab")
    with torch.no_grad():
        model.rows.output_rows.add_(torch.randn_like(model.rows.output_rows))
    plain = fold_rows(copy.deepcopy(model.lm), model)
    ids = mixed_ids(model)
    after = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    text = after < model.vocab.first_id
    nll = model(ids, after, torch.where(text, model.vocab.num_levels, 0), **context(model.lm, ids))
    expected = F.cross_entropy(logits(plain, ids).transpose(1, 2), after, reduction="none")
    assert torch.allclose(nll, expected, atol=1e-5)
    nll.sum().backward()
    expected.sum().backward()
    theirs = dict(plain.named_parameters())
    tables = {id(plain.get_input_embeddings().weight), id(plain.get_output_embeddings().weight)}
    body = [name for name in theirs if id(theirs[name]) not in tables and theirs[name].grad is not None]
    assert len(body) > 8
    for name in body:
        assert torch.allclose(model.lm.get_parameter(name).grad, theirs[name].grad, atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@EVERY_TIE
@EVERY_FAMILY
def test_gradients_of_the_item_rows_are_those_of_the_rows_in_a_plain_table(family, tied, lora):
    model, _ = tiny_item_model(family, tied=tied, normaliser="vocab")
    with torch.no_grad():
        if not tied:
            model.rows.output_rows.add_(torch.randn_like(model.rows.output_rows))
    plain = fold_rows(copy.deepcopy(model.lm), model)
    if lora:
        for lm in (model.lm, plain):  # the same seed: the same adapters, whose second half is zero
            add_lora(lm, rank=2, alpha=2, dropout=0.0, rslora=False, seed=0)
        plain.get_input_embeddings().weight.requires_grad_(True)
        plain.get_output_embeddings().weight.requires_grad_(True)
    ids = mixed_ids(model)
    after = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    levels = torch.where(after < model.vocab.first_id, model.vocab.num_levels, 0)
    model(ids, after, levels, **context(model.lm, ids)).sum().backward()
    F.cross_entropy(logits(plain, ids).transpose(1, 2), after, reduction="sum").backward()
    span = slice(model.vocab.first_id, model.vocab.first_id + model.vocab.num_tokens)
    expected = plain.get_input_embeddings().weight.grad[span]
    assert expected.abs().sum() > 0
    assert torch.allclose(model.rows.input_rows.grad, expected, atol=1e-4, rtol=1e-4)
    if not tied:
        expected = plain.get_output_embeddings().weight.grad[span]
        assert torch.allclose(model.rows.output_rows.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("extra", [0, 2], ids=["", "a tokenizer with more tokens"])
@EVERY_PADDING
@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "t5"])
@torch.no_grad()
def test_the_vocabulary_is_summed_in_pieces_as_it_is_at_once(family, padding, extra, monkeypatch):
    """Item tokens beyond the table, astride its end, or inside it; pieces that do not divide the vocabulary."""
    model, _ = tiny_item_model(family, padding=padding, extra_tokens=extra)
    states = hidden(model, mixed_ids(model))
    everything = model.vocab_logits(states)
    expected = model.item_logits(states, 1) - everything.logsumexp(-1, keepdim=True)
    inner, words = F.linear, []
    monkeypatch.setattr(item_lm.F, "linear", lambda x, table, *bias: words.append(len(table)) or inner(x, table, *bias))
    for size in (1, 5, 1000):
        monkeypatch.setattr(item_lm, "CACHED_PIECE", size)
        words.clear()
        assert torch.allclose(model.level_log_probs(states, 1, "vocab"), expected, atol=1e-6, rtol=1e-6)
        of_text = [count for count in words if count != len(model.rows)]
        assert 0 < max(of_text) <= size


@EVERY_TIE
@EVERY_FAMILY
@torch.no_grad()
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_shifts_nothing(family, tied):
    """As Gemma 3's, whose tokenizer has a token for images that its text model lacks."""
    model, _ = tiny_item_model(family, tied=tied, extra_tokens=2)
    assert (model.vocab.first_id, input_table(model.lm).num_embeddings) == (NUM_TEXT + 2, NUM_TEXT)
    plain = fold_rows(copy.deepcopy(model.lm), model)
    ids = mixed_ids(model)
    states = hidden(model, ids)
    ours = model.vocab_logits(states)
    assert ours.shape[-1] == NUM_TEXT + 2 + model.vocab.num_tokens
    assert torch.allclose(ours, logits(plain, ids), atol=1e-5)
    assert torch.equal(ours[..., model.vocab.first_id :], model.item_logits(states))


@NORMALISERS
@EVERY_FAMILY
@torch.no_grad()
def test_probabilities_sum_to_one_over_what_they_are_normalised_over(family, normaliser):
    model, _ = tiny_item_model(family, tied=False, padding=7)
    states = hidden(model, mixed_ids(model))
    levels = [model.level_log_probs(states, level, normaliser) for level in range(3)]
    assert [part.shape[-1] for part in levels] == [6, 5, 4]
    sums = torch.stack([part.exp().sum(-1) for part in levels], dim=-1)
    if normaliser == "level":
        assert torch.allclose(sums, torch.ones(()), atol=1e-5)
    elif normaliser == "items":
        assert torch.allclose(sums.sum(-1), torch.ones(()), atol=1e-5)
    else:
        first, after = model.vocab.first_id, model.vocab.first_id + model.vocab.num_tokens
        everything = model.vocab_logits(states).log_softmax(-1)
        assert torch.allclose(torch.cat(levels, dim=-1), everything[..., first:after], atol=1e-5)
        text = everything.exp()[..., :first].sum(-1) + everything.exp()[..., after:].sum(-1)
        assert torch.allclose(sums.sum(-1) + text, torch.ones(()), atol=1e-5)


@NORMALISERS
@EVERY_KIND
@torch.no_grad()
def test_the_nll_of_a_target_is_its_negative_log_probability(family, normaliser):
    model, _ = tiny_item_model(family, normaliser=normaliser)
    ids = mixed_ids(model)
    states = hidden(model, ids)
    levels = torch.tensor([[-1, 0, 1, 2, 3, -1, 0, 2, 1, 3, 3]]).expand(2, -1)
    codes = torch.arange(11).expand(2, -1) % 4
    starts = torch.tensor([*model.vocab.level_starts, 0, 0])
    labels = torch.where(levels == 3, codes, codes + model.vocab.first_id + starts[levels])
    nll = model(ids, labels, levels, **context(model.lm, ids))
    assert nll.dtype == torch.float32
    for row in range(2):
        for place in range(11):
            level, code = int(levels[row, place]), int(codes[row, place])
            if level == -1:
                expected = 0.0
            elif level == 3:  # text
                expected = -float(model.vocab_logits(states[row, place]).log_softmax(-1)[code])
            else:
                expected = -float(model.level_log_probs(states[row, place], level, normaliser)[code])
            assert float(nll[row, place]) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_label_smoothing_spreads_its_share_over_the_normalisers_tokens():
    model, _ = tiny_item_model()
    model.label_smoothing = 0.3
    ids = mixed_ids(model)
    log_probs = model.level_log_probs(hidden(model, ids), 1, "level")
    labels = torch.full_like(ids, model.vocab.first_id + model.vocab.level_starts[1] + 2)
    expected = -(0.7 * log_probs[..., 2] + 0.3 * log_probs.mean(-1))
    assert torch.allclose(model(ids, labels, torch.ones_like(ids)), expected, atol=1e-5)


@NORMALISERS
@EVERY_FAMILY
@torch.no_grad()
def test_more_padding_changes_no_loss(family, normaliser):
    model, tokenizer = tiny_item_model(family, normaliser=normaliser)
    kind = "last" if family in ENCODER_DECODERS else "all-positions"
    table = build([torch.arange(n).numpy() for n in (2, 9, 5)], kind=kind, history_length=20,
                  tasks={"next-item": 1.0}, text_rows=torch.arange(0).numpy())  # fmt: skip
    batch = Collator(tiny_prompts(model, tokenizer), 3)(list(table))
    arguments = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    nll = model(**arguments)
    fill = {"levels": -1, "context_seen": 0}
    wider = {name: F.pad(value, (0, 8), value=fill.get(name, 2)) for name, value in arguments.items()}
    more = model(**wider)
    assert torch.allclose(more[:, : nll.shape[1]], nll, atol=1e-5)
    assert not more[:, nll.shape[1] :].any()
    # The first row alone: of two items, six tokens behind the start token, or one item read and the other written.
    shortest = {name: value[:1, : 4 if name.startswith("context") else 6] for name, value in arguments.items()}
    assert torch.allclose(model(**shortest), nll[:1, :6], atol=1e-5)


@EVERY_DECODER
@torch.no_grad()
def test_one_row_for_all_targets_gives_the_losses_of_one_row_a_target(family):
    """Also where histories are longer than a chunk: a target's loss is that of its own context.

    Of decoder-only models: an encoder reads a row both ways, so no row of one holds more than one target.
    """
    model, tokenizer = tiny_item_model(family)
    collate = Collator(tiny_prompts(model, tokenizer), 3)
    sequences = [torch.randperm(60, generator=torch.Generator().manual_seed(n))[:n].numpy() for n in (2, 5, 11)]
    losses: dict[str, list[float]] = {}
    for kind in ("all-positions", "windows"):
        table = build(sequences, kind=kind, history_length=20, tasks={"next-item": 1.0},
                      text_rows=torch.arange(0).numpy())  # fmt: skip
        batch = collate(list(table))
        nll = model(batch["input_ids"], batch["labels"], batch["levels"])
        losses[kind] = []
        for row, example in enumerate(table):
            by_item = nll[row][batch["levels"][row] >= 0].reshape(-1, 3).sum(1).tolist()
            # `windows` has no example for a user's first item.
            losses[kind] += by_item[1:] if kind == "all-positions" else by_item
            assert len(by_item) == len(example["items"]) - example["first"]
    assert len(losses["windows"]) == 1 + 4 + 10
    assert losses["all-positions"] == pytest.approx(losses["windows"], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_FAMILY
@torch.no_grad()
def test_item_rows_pass_through_the_scale_of_the_models_own_embedding(family, dtype):
    """Gemma multiplies embeddings by sqrt(width), rounded to the table's dtype: in bfloat16, 4.46875 for sqrt(20)."""
    model, _ = tiny_item_model(family, **({"hidden_size": 20} if family.startswith("gemma") else {}))
    model.to(dtype)
    plain = fold_rows(copy.deepcopy(model.lm), model)
    ids = mixed_ids(model)
    assert torch.equal(model.rows.embed(ids, input_table(model.lm)), input_table(plain)(ids))
    scale = torch.tensor(20**0.5 if family.startswith("gemma") else 1.0).to(dtype)
    item = torch.tensor([model.vocab.first_id + 5])
    assert torch.equal(model.rows.embed(item, input_table(model.lm))[0], model.rows.input_rows[5] * scale)


@EVERY_TIE
@EVERY_FAMILY
def test_checkpoints_hold_what_is_trained_once_and_load_without_missing_keys(family, tied):
    model, _ = tiny_item_model(family, tied=tied)
    for name, parameter in model.lm.named_parameters():
        parameter.requires_grad_("mlp" in name or ".fc" in name or ".wi" in name)
    state = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(state) == trained
    assert ("rows.output_rows" in state) is not tied
    assert 1 < len(trained) < 15
    other, _ = tiny_item_model(family, tied=tied, seed=1)
    for name, parameter in other.lm.named_parameters():
        parameter.requires_grad_("mlp" in name or ".fc" in name or ".wi" in name)
    result = other.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())


@EVERY_TIE
@EVERY_KIND
def test_checkpoints_of_full_training_hold_a_tied_table_once(family, tied):
    model, _ = tiny_item_model(family, tied=tied)
    state = model.state_dict()
    assert ("lm.shared.weight" if family == "t5" else "lm.model.embed_tokens.weight") in state
    assert not any("coder.embed_tokens" in name for name in state)
    assert ("lm.lm_head.weight" in state) is not tied
    assert len({value.data_ptr() for value in state.values()}) == len(state)


def test_a_checkpoint_that_lacks_something_trained_is_refused():
    model, _ = tiny_item_model()
    state = model.state_dict()
    del state["rows.input_rows"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"rows.input_rows\""):
        model.load_state_dict(state)


@EVERY_TIE
@EVERY_KIND
def test_input_and_output_rows_train_on_their_own_only_where_the_base_has_them_apart(family, tied):
    model, _ = tiny_item_model(family, tied=tied)
    assert len(model.rows) == model.vocab.num_tokens
    ids = mixed_ids(model)
    labels = torch.full_like(ids, model.vocab.first_id)
    model(ids, labels, torch.zeros_like(ids), **context(model.lm, ids)).sum().backward()
    assert model.rows.input_rows.grad.any()
    if tied:
        assert model.rows.output_rows is None
    else:
        assert model.rows.output_rows.grad[:6].any()
        assert not model.rows.output_rows.grad[6:].any()  # the level softmax reads no other level


@pytest.mark.parametrize("which", ["input_dropout", "output_dropout"])
@EVERY_FAMILY
def test_dropout_acts_in_training_alone(family, which):
    model, _ = tiny_item_model(family)
    getattr(model, which).p = 0.5
    ids = mixed_ids(model)
    inputs = (ids, torch.full_like(ids, model.vocab.first_id), torch.zeros_like(ids))
    with torch.no_grad():
        read = context(model.lm, ids)
        assert torch.equal(model(*inputs, **read), model(*inputs, **read))
        model.train()
        assert not torch.equal(model(*inputs, **read), model(*inputs, **read))


@torch.no_grad()
def test_what_an_encoder_reads_is_dropped_as_well():
    model, _ = tiny_item_model("t5")
    model.input_dropout.p = 0.5
    ids = mixed_ids(model)
    seen = torch.ones_like(ids)
    assert torch.equal(model.read(ids, seen), model.read(ids, seen))
    model.train()
    assert not torch.equal(model.read(ids, seen), model.read(ids, seen))


@EVERY_FAMILY
def test_activation_checkpointing_changes_no_gradient(family):
    """And does compute the layers anew."""
    gradients, calls = [], []
    for checkpointing in (False, True):
        model, _ = tiny_item_model(family)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        attention = next(module for module in model.lm.modules() if "attention" in type(module).__name__.lower())
        seen = []
        attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        ids = mixed_ids(model)
        targets = (torch.full_like(ids, model.vocab.first_id), torch.zeros_like(ids))
        model(ids, *targets, **context(model.lm, ids)).sum().backward()
        gradients.append(model.rows.input_rows.grad)
        calls.append(len(seen))
    assert calls == [1, 2]
    if family in ENCODER_DECODERS:  # all layers share one bias, whose gradient is then summed in another order
        assert torch.allclose(*gradients, atol=1e-6)
    else:
        assert torch.equal(*gradients)


def test_new_codes_over_the_same_tokens_need_no_new_model():
    model, _ = tiny_item_model()
    rows = model.rows.input_rows.clone()
    model.vocab = model.vocab.with_codes(tiny_codes(seed=5))
    assert torch.equal(model.rows.input_rows, rows)


@pytest.mark.parametrize("config", [
    StableLmConfig(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                   num_key_value_heads=1),
    GPTJConfig(vocab_size=24, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
])  # fmt: skip
def test_other_families_are_refused_by_name(config):
    lm = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=f"tested families llama, .*is of type {config.model_type};"):
        refuse_unsupported(lm)


def test_every_supported_family_is_among_the_tested_ones():
    tested = {tiny_lm(family).config.model_type for family in ALL_FAMILIES}
    assert tested == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@torch.no_grad()
def test_capped_logits_are_capped_as_the_plain_model_caps_them(family):
    model, _ = tiny_item_model(family, final_logit_softcapping=2.0)
    ids = mixed_ids(model)
    ours = model.vocab_logits(hidden(model, ids))
    assert ours.abs().max() < 2
    plain = fold_rows(copy.deepcopy(model.lm), model)
    assert torch.allclose(ours, logits(plain, ids), atol=1e-5)


def test_a_decoder_without_what_its_encoder_read_is_our_mistake():
    """The library would pass its cross-attention over and say nothing."""
    model, _ = tiny_item_model("t5")
    with pytest.raises(AssertionError):
        model.hidden(mixed_ids(model))


def test_what_works_on_the_context_is_the_encoder_and_what_makes_keys_and_values_of_it():
    model, _ = tiny_item_model("mt5")
    names = {name for name, _ in model.named_parameters() if "shared" not in name and "rows" not in name}
    read = {name for name in names if of_encoder(name)}
    assert {name for name in read if ".decoder." in name} == {
        f"lm.decoder.block.{block}.layer.1.EncDecAttention.{part}.weight" for block in range(2) for part in "kv"
    }
    assert read >= {name for name in names if ".encoder." in name}


def test_a_head_with_a_bias_is_refused():
    lm = tiny_lm("gpt2", tied=False)
    lm.set_output_embeddings(torch.nn.Linear(16, GPT2Config().vocab_size, bias=True))
    with pytest.raises(UnsupportedModelError, match="must have no bias, but that of GPT2LMHeadModel has one"):
        refuse_unsupported(lm)


def test_logits_of_lists_are_float32_whatever_the_states_are():
    """In bfloat16 many items of a list would have the same score, and their order would hang on the kernel."""
    model, _ = tiny_item_model("llama")
    states = torch.randn(5, model.rows.input_rows.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        found = model.item_logits(states, 1)
        torch.testing.assert_close(found, states.float() @ model.codebooks()[1].T, rtol=0, atol=1e-6)
    assert found.dtype == torch.float32
    assert model.item_logits(states, 1).dtype == torch.bfloat16

"""Base models come from folders or the Hub, whole or not at all; LoRA leaves everything but itself as it was."""

import json

import pytest
import torch

from llm_itemtok.errors import ItemTokError, UnsupportedModelError
from llm_itemtok.model.load import add_lora, load_base, with_item_tokens
from llm_itemtok.vocab import init
from tests.tiny import (
    ENCODER_DECODERS,
    MOST_SLOWLY,
    context,
    hidden,
    logits,
    slowly,
    tiny_codes,
    tiny_lm,
    tiny_tokenizer,
)

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "rslora": False, "seed": 0}
EVERY_FAMILY = pytest.mark.parametrize("family", MOST_SLOWLY)


def lora_model(family: str, *, tied: bool = True):
    lm, peft_model = add_lora(tiny_lm(family, tied=tied, padding=7), **LORA)
    tokenizer = tiny_tokenizer()
    model = with_item_tokens(lm, tokenizer, tiny_codes(), lambda vocab, table: init.normal(vocab, table, seed=0))
    return model, tokenizer, peft_model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@EVERY_FAMILY
def test_with_lora_only_lora_and_item_rows_are_trained_and_the_base_stays_bit_identical(family, tied):
    model, _, _ = lora_model(family, tied=tied)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"rows.input_rows"} | (
        set() if tied else {"rows.output_rows"}
    )
    assert sum("lora_A" in name for name in trained) == sum("lora_B" in name for name in trained) >= 8
    assert not any(part in name for name in trained for part in ("embed", "wte", "shared", "relative", "lm_head"))
    assert set(model.state_dict()) == trained

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(model.vocab.first_id, model.vocab.first_id + 15, (4, 9), generator=generator)
        labels = torch.randint(model.vocab.first_id, model.vocab.first_id + 6, (4, 9), generator=generator)
        model(ids, labels, torch.zeros_like(ids), **context(model.lm, ids)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trained


@EVERY_FAMILY
@torch.no_grad()
def test_lora_begins_as_the_base_model(family):
    """And so old logits are those of the base, whatever the item rows are."""
    model, _, _ = lora_model(family)
    base = tiny_lm(family, padding=7)
    ids = torch.randint(0, 21, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = model.vocab_logits(hidden(model, ids))
    assert torch.equal(ours[..., :21], logits(base, ids)[..., :21])
    model.rows.input_rows.mul_(7)
    assert torch.equal(model.vocab_logits(hidden(model, ids))[..., :21], ours[..., :21])


def test_lora_is_the_same_for_the_same_seed():
    states = [lora_model("llama")[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@EVERY_FAMILY
def test_a_model_and_its_tokenizer_come_back_from_a_folder(family, tmp_path):
    lm = tiny_lm(family)
    lm.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = load_base(tmp_path)
    assert len(tokenizer) == len(tiny_tokenizer())
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in lm.named_parameters())
    assert load_base(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_base(tmp_path, dtype="auto")[0].dtype == torch.float32


@pytest.mark.parametrize("family", slowly(ENCODER_DECODERS))
@torch.no_grad()
def test_an_encoder_decoder_keeps_the_head_of_its_own_that_its_configuration_denies(family, tmp_path):
    """As Flan-T5 and mT5 have it; the library would tie it to the input table where the table grows."""
    for tied in (True, False):
        lm = tiny_lm(family, tied=tied)
        lm.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        loaded, _ = load_base(tmp_path)
        assert loaded.config.tie_word_embeddings is tied
        ids = torch.randint(0, 21, (2, 9), generator=torch.Generator().manual_seed(0))
        before = logits(loaded, ids)
        assert torch.allclose(before, logits(lm, ids), atol=1e-5)
        loaded.resize_token_embeddings(40, mean_resizing=False)
        assert (loaded.lm_head.weight is loaded.shared.weight) is tied
        assert torch.allclose(logits(loaded, ids)[..., :21], before, atol=1e-5)


@pytest.mark.parametrize("kind", ["bart", "umt5", "gptj", "cohere", "bert"])
def test_other_families_are_refused_before_their_weights_are_read(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModelError, match=f"tested families .*is of type {kind}; choose"):
        load_base(tmp_path)


def test_a_type_that_the_library_does_not_know_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ItemTokError, match=r"`model.name` must be .*\n.*has model type `nonsense`"):
        load_base(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ItemTokError, match=r"must be a folder with a safetensors model or a Hub id .* was: .*nothing"):
        load_base(tmp_path / "nothing")


def test_a_model_without_weights_is_refused(tmp_path):
    tiny_lm("llama").config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ItemTokError, match="must be a folder with a safetensors model"):
        load_base(tmp_path)


def test_item_rows_are_trained_in_float32_whatever_the_base_has():
    """Updates of AdamW late in training are smaller than what bfloat16 tells apart."""
    lm = tiny_lm("llama").to(torch.bfloat16)
    model = with_item_tokens(lm, tiny_tokenizer(), tiny_codes(), lambda vocab, table: init.normal(vocab, table, seed=0))
    assert model.rows.input_rows.dtype == torch.float32
    hidden = model.hidden(torch.tensor([[1, model.vocab.first_id]]), use_cache=False).last_hidden_state
    assert hidden.dtype == torch.bfloat16

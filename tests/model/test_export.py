"""Exports load with plain `transformers` and `peft`, and give the logits of the training model."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llm_itemtok.errors import ArtifactError
from llm_itemtok.model import export
from tests.model.test_load import lora_model
from tests.tiny import MOST_SLOWLY, hidden, logits, plain_class, tiny_item_model, tiny_lm, tiny_tokenizer

EVERY_FAMILY = pytest.mark.parametrize("family", MOST_SLOWLY)
EVERY_TIE = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def stirred(family: str, tied: bool):
    """A model with LoRA, as if trained: everything trainable has moved."""
    model, tokenizer, peft_model = lora_model(family, tied=tied)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval(), tokenizer, peft_model


IDS = torch.randint(0, 36, (2, 11), generator=torch.Generator().manual_seed(0))


@EVERY_TIE
@EVERY_FAMILY
@torch.no_grad()
def test_plain_peft_loads_an_adapter_with_equal_logits(family, tied, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_lm(family, tied=tied, padding=7).save_pretrained(base)
    model, tokenizer, peft_model = stirred(family, tied)
    folder.mkdir()
    export.save_adapter(model, peft_model, folder, base=str(base), revision=None)
    tokenizer.save_pretrained(folder)

    plain_tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = plain_class(family).from_pretrained(base)
    plain.config.tie_word_embeddings = tied  # the configurations of T5 say tied whatever the checkpoint holds
    plain.resize_token_embeddings(len(plain_tokenizer), mean_resizing=False)
    plain = PeftModel.from_pretrained(plain, folder).eval()
    assert torch.allclose(logits(plain, IDS), model.vocab_logits(hidden(model, IDS)), atol=1e-6, rtol=1e-6)


@EVERY_TIE
@EVERY_FAMILY
@torch.no_grad()
def test_plain_transformers_loads_a_merged_model_with_equal_logits(family, tied, tmp_path):
    model, tokenizer, peft_model = stirred(family, tied)
    export.merged(model, peft_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = plain_class(family).from_pretrained(tmp_path)
    assert torch.allclose(logits(plain, IDS), model.vocab_logits(hidden(model, IDS)), atol=1e-5, rtol=1e-5)
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) is tied
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 36


@EVERY_FAMILY
@torch.no_grad()
def test_exports_leave_the_training_model_as_it_was(family, tmp_path):
    model, _, peft_model = stirred(family, tied=False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    config = peft_model.peft_config["default"].to_dict()
    export.merged(model, peft_model)
    export.save_adapter(model, peft_model, tmp_path, base="somewhere", revision="main")
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert peft_model.peft_config["default"].to_dict() == config


@EVERY_TIE
def test_an_adapter_comes_back_as_it_was_saved(tied, tmp_path):
    model, _, peft_model = stirred("qwen3", tied)
    export.save_adapter(model, peft_model, tmp_path, base="somewhere", revision="v1")
    config, weights, input_rows, output_rows = export.load_adapter(tmp_path)
    assert (config.base_model_name_or_path, config.revision, config.r) == ("somewhere", "v1", 2)
    assert config.trainable_token_indices is None
    assert torch.equal(input_rows, model.rows.input_rows)
    assert (output_rows is None) is tied
    assert output_rows is None or torch.equal(output_rows, model.rows.output_rows)
    assert all("lora_" in name for name in weights)


def test_an_adapter_is_small_and_the_same_bytes_each_time(tmp_path):
    """No copy of the base table goes along."""
    model, _, peft_model = stirred("llama", tied=True)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export.save_adapter(model, peft_model, tmp_path / name, base="somewhere", revision=None)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]
    settings = json.loads((tmp_path / "a" / export.ADAPTER_CONFIG).read_text())
    assert settings["trainable_token_indices"] == {"embed_tokens": list(range(21, 36))}
    shapes = {tuple(value.shape) for value in load_file(tmp_path / "a" / export.ADAPTER_WEIGHTS).values()}
    assert not any(shape[0] in (28, 36) for shape in shapes)


def test_an_adapter_of_another_program_is_refused(tmp_path):
    model, _, peft_model = stirred("llama", tied=True)
    export.save_adapter(model, peft_model, tmp_path, base="somewhere", revision=None)
    tensors = load_file(tmp_path / export.ADAPTER_WEIGHTS)
    save_file({n: t for n, t in tensors.items() if "lora_" in n}, tmp_path / export.ADAPTER_WEIGHTS)
    with pytest.raises(ArtifactError, match=r"must hold one table of item rows .* found: \[\]; was it written by"):
        export.load_adapter(tmp_path)


@pytest.mark.parametrize(("padding", "size"), [(0, 36), (7, 36), (40, 61)])
def test_tables_grow_only_when_the_item_tokens_do_not_fit_into_the_padding(padding, size):
    model, _ = tiny_item_model(padding=padding)
    plain = export.fold_rows(copy.deepcopy(model.lm), model)
    assert (plain.get_input_embeddings().num_embeddings, plain.config.vocab_size) == (size, size)
    assert len(tiny_tokenizer()) == 21
    assert model.lm.get_input_embeddings().num_embeddings == 21 + padding

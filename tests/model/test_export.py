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
from llm_itemtok.model.load import add_lora, with_item_tokens
from llm_itemtok.vocab import init
from llm_itemtok.vocab.item_vocab import ItemVocab
from tests.model.test_load import LORA, lora_model
from tests.tiny import MOST_SLOWLY, hidden, logits, plain_class, tiny_codes, tiny_item_model, tiny_lm, tiny_tokenizer

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "must be of PEFT's kind LORA, found:"),
        ({"target_modules": "((([a-z_0-9.])+)+)+!"}, "found: other values"),
        ({"target_modules": ["((([a-z_0-9.])+)+)+!"]}, "found: other values"),
        ({"rank_pattern": {"(.+)+!": 1}}, "found: other values"),
        ({"rank_pattern": {"q_proj": 10**9}}, "found: other values"),
        ({"rank_pattern": ["q_proj"]}, "found: other values"),
        ({"r": 10**9}, "found: other values"),
        ({"r": "2"}, "found: other values"),
        (
            {"init_lora_weights": "pissa", "layer_replication": [[0, 9]]},
            r"others \['init_lora.*', 'layer_replication'\]",
        ),
    ],
)
def test_of_an_adapter_nothing_is_taken_but_what_was_written(changes, message, tmp_path):
    """PEFT would take any of these: other answers, any memory, any time."""
    model, _, peft_model = stirred("llama", tied=True)
    export.save_adapter(model, peft_model, tmp_path, base="somewhere", revision=None)
    settings = json.loads((tmp_path / export.ADAPTER_CONFIG).read_text())
    (tmp_path / export.ADAPTER_CONFIG).write_text(json.dumps(settings | changes))
    with pytest.raises(ArtifactError, match=message):
        export.load_adapter(tmp_path)


@pytest.mark.parametrize(("padding", "size"), [(0, 36), (7, 36), (40, 61)])
def test_tables_grow_only_when_the_item_tokens_do_not_fit_into_the_padding(padding, size):
    model, _ = tiny_item_model(padding=padding)
    plain = export.fold_rows(copy.deepcopy(model.lm), model)
    assert (plain.get_input_embeddings().num_embeddings, plain.config.vocab_size) == (size, size)
    assert len(tiny_tokenizer()) == 21
    assert model.lm.get_input_embeddings().num_embeddings == 21 + padding


def mixed_up(tmp_path, *, tied: bool = True):
    """A saved adapter, and the vocabulary that it was trained with."""
    model, _, peft_model = stirred("llama", tied)
    export.save_adapter(model, peft_model, tmp_path, base="somewhere", revision=None)
    return model.vocab


def test_an_adapter_goes_back_into_its_base_as_it_was(tmp_path):
    model, _, peft_model = stirred("llama", tied=False)
    export.save_adapter(model, peft_model, tmp_path, base="somewhere", revision=None)
    again, _ = export.from_adapter(tiny_lm("llama", tied=False, padding=7), model.vocab, tmp_path, normaliser="items")
    assert again.normaliser == "items"
    assert torch.equal(again.eval().vocab_logits(hidden(again, IDS)), model.vocab_logits(hidden(model, IDS)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "item rows are 16 wide for a head that is tied, and the base model is 32 wide and tied"),
        ({"tied": False}, "16 wide for a head that is tied, and the base model is 16 wide and untied"),
        ({"intermediate_size": 48}, "in LlamaForCausalLM PEFT says: size mismatch"),
        ({"num_hidden_layers": 1}, "in LlamaForCausalLM 0 weights of its LoRA are missing, 14 are of no layer"),
    ],
)
def test_an_adapter_of_another_base_model_is_refused(changes, message, tmp_path):
    vocab = mixed_up(tmp_path)
    lm = tiny_lm("llama", padding=7, **changes)
    with pytest.raises(
        ArtifactError, match=rf"adapter and base model must belong together.* {message}.*name the model"
    ):
        export.from_adapter(lm, vocab, tmp_path)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (2, r"7 layers would go without LoRA, such as model.layers.2.mlp.down_proj"),
        (3, r"14 weights of its LoRA are missing, 0 are of no layer"),
    ],
)
def test_an_adapter_of_a_base_model_with_fewer_layers_is_refused(layers, message, tmp_path):
    """PEFT would say nothing, and leave the further layers as they are; of few layers it saves the names in full."""
    lm, peft_model = add_lora(tiny_lm("llama", padding=7, num_hidden_layers=layers), **LORA)
    model = with_item_tokens(lm, tiny_tokenizer(), tiny_codes(), lambda vocab, table: init.normal(vocab, table, seed=0))
    export.save_adapter(model, peft_model, tmp_path, base="somewhere", revision=None)
    with pytest.raises(ArtifactError, match=message):
        export.from_adapter(tiny_lm("llama", padding=7, num_hidden_layers=layers + 1), model.vocab, tmp_path)


def test_an_adapter_beside_other_codes_is_refused(tmp_path):
    """Of the same shapes, so that nothing else would tell."""
    vocab = mixed_up(tmp_path).with_codes(tiny_codes(seed=1))
    with pytest.raises(ArtifactError, match=r"model and item codes must belong together, but the model was trained"):
        export.from_adapter(tiny_lm("llama", padding=7), vocab, tmp_path)


def test_an_adapter_of_an_earlier_version_does_not_say_its_codes_and_is_taken(tmp_path):
    vocab = mixed_up(tmp_path).with_codes(tiny_codes(seed=1))
    save_file(
        load_file(tmp_path / export.ADAPTER_WEIGHTS), tmp_path / export.ADAPTER_WEIGHTS, metadata={"format": "pt"}
    )
    model, _ = export.from_adapter(tiny_lm("llama", padding=7), vocab, tmp_path)
    assert model.vocab is vocab


def test_an_adapter_with_rows_for_other_tokens_is_refused(tmp_path):
    mixed_up(tmp_path)
    vocab = ItemVocab(tiny_codes(sizes=(8, 5, 4)), 21)
    save_file(
        load_file(tmp_path / export.ADAPTER_WEIGHTS), tmp_path / export.ADAPTER_WEIGHTS, metadata={"format": "pt"}
    )
    with pytest.raises(
        ArtifactError, match=r"must have a row for each of the 17 item tokens, was: 15; were files mixed"
    ):
        export.from_adapter(tiny_lm("llama", padding=7), vocab, tmp_path)


def test_a_whole_model_beside_other_codes_or_another_tokenizer_is_refused(tmp_path):
    model, _ = tiny_item_model()
    whole = export.merged(model, None)
    assert export.from_merged(whole, model.vocab, tmp_path).vocab is model.vocab
    with pytest.raises(ArtifactError, match=r"model and item codes must belong together"):
        export.from_merged(whole, model.vocab.with_codes(tiny_codes(seed=1)), tmp_path)
    with pytest.raises(ArtifactError, match=r"model and tokenizer .* ids up to 44 and the model's table has 36 rows"):
        export.from_merged(whole, ItemVocab(model.vocab.codes, 30), tmp_path)

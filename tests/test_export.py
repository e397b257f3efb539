"""What is written for servers says of each item what the merged model's own tokenizer says."""

import json

import pytest
from transformers import AutoTokenizer

from llm_itemtok.cli import main
from llm_itemtok.errors import ArtifactError, UnsupportedModelError
from llm_itemtok.items.files import read_codes
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.pipeline.export import export
from llm_itemtok.recommender import Recommender
from tests.test_recommender import HISTORIES, adapter, made_of, merged
from tests.tiny import text_codes, tiny_item_model


def spelled(out) -> dict[str, list[int]]:
    """Token ids of each item, by the tokenizer of an export and the items' codes as text."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    return {item["id"]: tokenizer(item["code"], add_special_tokens=False)["input_ids"] for item in items}


def test_paths_are_the_token_ids_of_the_merged_tokenizer(tmp_path, capsys):
    bundle = adapter(tmp_path / "base").save_pretrained(tmp_path / "bundle")
    out = tmp_path / "served"
    assert main(["export", str(bundle), str(out), "--format", "paths"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    paths = json.loads((out / "paths.json").read_text())
    assert dict(zip(paths["item_ids"], paths["token_ids"], strict=True)) == spelled(out)
    serving = json.loads((out / "serving.json").read_text())
    ids = [token for path in paths["token_ids"] for token in path]
    assert serving["first_item_token"] <= min(ids) <= max(ids) <= serving["last_item_token"]
    assert sum(serving["level_sizes"]) == serving["last_item_token"] - serving["first_item_token"] + 1
    expected, found = (Recommender.from_pretrained(place) for place in (bundle, out))
    for history in HISTORIES:
        best = [item.item_id for item in expected.recommend(history, 5)]
        assert [item.item_id for item in found.recommend(history, 5)] == best


def test_a_flashrec_catalogue_counts_codewords_up_from_the_first_item_token(tmp_path):
    """FlashRec adds to a codeword the sizes of the levels before it and the first id of the range that it is told."""
    bundle = merged("qwen3").save_pretrained(tmp_path / "bundle")
    out = export(bundle, tmp_path / "served", "flashrec")
    serving, paths = json.loads((out / "serving.json").read_text()), spelled(out)
    starts = [sum(serving["level_sizes"][:level]) for level in range(serving["levels"])]
    for key, items in json.loads((out / "catalogue.json").read_text()).items():
        code = [int(word) for word in key.split(",")]
        tokens = [serving["first_item_token"] + start + word for start, word in zip(starts, code, strict=True)]
        assert [paths[item] for item in items] == [tokens]
    recommender = Recommender.from_pretrained(bundle)
    codes = recommender.model.vocab.codes
    assert read_codes(out / "catalogue.json", recommender.item_ids, sizes=codes.sizes) == codes


def test_a_chat_template_makes_the_prompt_that_the_model_was_trained_with(tmp_path):
    out = export(merged("qwen3").save_pretrained(tmp_path / "bundle"), tmp_path / "served", "flashrec")
    recommender = Recommender.from_pretrained(out)
    prompts = Prompts(recommender.tokenizer, recommender.model.vocab, answer_start=None)
    codes = [json.loads(line)["code"] for line in (out / "items.jsonl").read_text().splitlines()]
    message = {"role": "user", "content": codes[3] + codes[7]}
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template([message], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids == prompts.history([3, 7]).tolist()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] != "TokenizersBackend"  # which no version before 5 has
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_what_a_server_cannot_serve_is_refused(tmp_path):
    llama = merged("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match="models of the type qwen3, was: llama; use `--format paths`"):
        export(llama, tmp_path / "served", "flashrec")
    with pytest.raises(UnsupportedModelError, match="decoder-only models, was: t5"):
        export(merged("t5").save_pretrained(tmp_path / "t5"), tmp_path / "served", "paths")
    named = tiny_item_model(codes=text_codes(["a b", "c d"]), normaliser="vocab")
    words = made_of(*named, normaliser="vocab", training_normaliser="vocab").save_pretrained(tmp_path / "words")
    with pytest.raises(UnsupportedModelError, match="named in words"):
        export(words, tmp_path / "served", "paths")
    assert not (tmp_path / "served").exists()


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    bundle = merged().save_pretrained(tmp_path / "bundle")
    with pytest.raises(ArtifactError, match="must go into a new folder or replace an export, found: other files"):
        export(bundle, bundle, "paths")
    for _ in range(2):
        export(bundle, tmp_path / "served", "paths")
    (tmp_path / "served" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"new folder or replace an export, found: other files \['notes.txt'\]"):
        export(bundle, tmp_path / "served", "paths")

"""Adapters by recipe: what cannot be is refused by `check`, with the reason; what is new changes no older recipe."""

import json
import re

import pytest

from llm_itemtok.cli import main
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError, UnsupportedModelError
from llm_itemtok.experiments.pool import serves
from llm_itemtok.model import load
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.run import run
from tests.tiny import tiny_lm, tiny_tokenizer

RECIPE = """
data: {source: synthetic, items: 40, users: 30}
vectors: {kind: tfidf-svd, dimensions: 8}
tokenizer: {kind: random, levels: 2, codebook_size: 8, collisions: reassign}
vocab: {init: normal}
model: {name: BASE, adapter: lora, lora: {rank: 2, dropout: 0.0}}
examples: {history_length: 4}
trainer: {max_steps: 2, per_device_train_batch_size: 8, logging_steps: 1, use_cpu: true}
evaluation: {baselines: [popularity]}
"""


@pytest.fixture
def recipe(tmp_path):
    def write(family="llama"):
        base = tmp_path / family
        tiny_lm(family, padding=7).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        path = tmp_path / f"{family}.yaml"
        path.write_text(RECIPE.replace("BASE", str(base)))
        return path

    return write


def test_check_tells_the_time_on_a_gpu_of_models_that_can_keep_one_busy(recipe):
    path = recipe()
    assert "on a GPU at 100 TFLOP/s" not in check(RunConfig.load(path))
    file = path.parent / "llama" / "config.json"
    larger = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | larger))
    assert "on a GPU at 100 TFLOP/s, a third of an A100: less than a minute" in check(RunConfig.load(path))
    longer = check(RunConfig.load(path, ["trainer.max_steps=20000000"]))
    work = float(re.search(r"work: ([\d.]+) PFLOP", longer)[1])
    minutes = float(re.search(r"an A100: about (\d+) minutes", longer)[1])
    assert minutes == pytest.approx(work * 10 / 60, abs=0.6)


@pytest.mark.parametrize("override", ["model.lora.dora=true", "model.lora.dropout=0.1"])
def test_check_refuses_what_peft_cannot_put_on_packed_experts(recipe, override):
    path = recipe("mixtral")
    assert "trained: about" in check(RunConfig.load(path))
    with pytest.raises(
        UnsupportedModelError, match=r"on every linear layer of MixtralForCausalLM, .*PEFT says: lora.Par"
    ):
        check(RunConfig.load(path, [override]))


def test_check_refuses_four_bits_where_they_cannot_be_had(recipe, monkeypatch):
    four_bits = ["model.quantization=nf4", "model.dtype=bfloat16"]
    with pytest.raises(UnsupportedModelError, match="GPT-2 stores its own transposed"):
        check(RunConfig.load(recipe("gpt2"), four_bits))
    monkeypatch.setattr(load, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedModelError, match="needs the package bitsandbytes, which is not installed here"):
        check(RunConfig.load(recipe(), four_bits))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.quantization=nf4"],
            "`model.quantization: nf4` computes in bfloat16 .* `model.dtype: bfloat16`, was: flo",
        ),
        (["model.quantization=nf4", "model.dtype=bfloat16", "model.adapter=none"], "quantization.*adapter: lora"),
        (["model.quantization=nf4", "model.name=scratch"], "quantization"),
        (["model.adapter=none", "model.lora.dora=true"], "lora"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        RunConfig.load(recipe(), overrides)


def test_recipes_from_before_these_settings_are_served_by_their_records(recipe):
    config = RunConfig.load(recipe())
    plain, defaults = (json.loads(json.dumps(part, default=str)) for part in (config.to_dict(), config.defaults()))
    older = json.loads(json.dumps(plain))
    del older["model"]["quantization"], older["model"]["lora"]["dora"]
    assert serves(older, plain, defaults)
    changed = RunConfig.load(recipe(), ["model.lora.dora=true"]).to_dict()
    assert not serves(older, json.loads(json.dumps(changed, default=str)), defaults)


def test_a_run_with_dora_trains_what_check_said_and_ends_in_a_bundle_that_can_be_merged(recipe, tmp_path):
    config = RunConfig.load(recipe(), ["model.lora.dora=true"])
    assert "trained: about 1.54 k" in check(config)
    folder = run(config, tmp_path / "run", until="evaluate")
    assert json.loads((folder / "training.json").read_text())["parameters"] == 1280 + 16 * 16
    assert json.loads((folder / "model" / "adapter_config.json").read_text())["use_dora"] is True
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()

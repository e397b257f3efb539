"""Items named in words of the language model go the whole way: recipe, training, bundle, answers, doctor, report."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llm_itemtok import Recommender
from llm_itemtok.artifacts import read_json
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError, DataError, RecipeError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.inspect import inspect
from llm_itemtok.pipeline.run import run
from tests.tiny import tiny_lm, tiny_tokenizer

RECIPE = """
data: {source: synthetic, items: 40, users: 60}
tokenizer: {kind: KIND}
model:
  name: scratch
  scratch: {layers: 1, width: 16, heads: 2, vocab_size: 300, pretrain_epochs: 1}
examples: {history_length: 5}
objective: {normaliser: vocab}
trainer: {max_steps: 4, per_device_train_batch_size: 8, learning_rate: 5.0e-3, logging_steps: 2, use_cpu: true}
evaluation: {every: 1, baselines: [popularity]}
"""


@pytest.fixture
def recipe(tmp_path):
    def load(kind, *overrides):
        path = tmp_path / "tiny.yaml"
        path.write_text(RECIPE.replace("KIND", kind), encoding="utf-8")
        return RunConfig.load(path, overrides)

    return load


def answers(recommender):
    history = recommender.item_ids[:3]
    found = recommender.recommend(history, k=20)
    assert len({item.item_id for item in found}) == 20
    scores = recommender.score(history, [item.item_id for item in found])
    np.testing.assert_allclose(scores, [item.score for item in found], atol=1e-4)
    return [(item.item_id, round(item.score, 4)) for item in found]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("numeric", ("tokenizer.order=sequential",)),
        ("title", ("model.scratch.family=t5", "examples.kind=windows", "evaluation.decode_normaliser=children")),
    ],
)
def test_a_run_ends_in_a_bundle_that_answers(recipe, tmp_path, kind, overrides):
    folder = run(recipe(kind, *overrides), tmp_path / "run")
    metrics = read_json(folder / "metrics.json")
    assert metrics["protocol"]["normaliser"] in ("vocab", "children")
    assert 0 < metrics["test"]["recall@20"] < 1
    assert metrics["codes"]["words"] > 2
    assert "capacity" not in metrics["codes"]
    recommender = Recommender.from_pretrained(folder)
    assert len(recommender.model.rows) == 0
    again = Recommender.from_pretrained(recommender.save_pretrained(tmp_path / "copy"))
    assert answers(again) == answers(recommender)
    auto = AutoModelForSeq2SeqLM if "title" in kind else AutoModelForCausalLM
    plain = auto.from_pretrained(folder / "model")
    assert plain.get_input_embeddings().num_embeddings == len(recommender.tokenizer)
    first = json.loads((folder / "model" / "items.jsonl").read_text(encoding="utf-8").splitlines()[0])
    ids = recommender.tokenizer.convert_tokens_to_ids(first["code"].split(" "))
    assert ids == recommender.model.vocab.paths[0, : recommender.model.vocab.lengths[0]].tolist()
    text = inspect(folder)
    assert "room, usage and dead codewords mean nothing here and are left out" in text
    assert "room:" not in text
    assert "Codewords in use" not in (folder / "report.html").read_text(encoding="utf-8")


def test_training_goes_on_where_it_stopped(recipe, tmp_path):
    config = recipe("title", "evaluation.every=0.08")
    folder = run(config, tmp_path / "run", until="train")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    said: list[str] = []
    run(config, folder, start="train", until="train", resume=True, log=said.append)
    assert "  resumed from checkpoint-2" in said
    assert (folder / "model" / "model.safetensors").read_bytes() == weights


@pytest.fixture
def base(tmp_path):
    """A tiny model on disk, whose tokenizer knows a few words and no digits but those below."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([str(digit) for digit in range(10)])
    tiny_lm("llama", padding=20).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_with_lora_the_adapter_is_all_that_is_trained_and_saved(recipe, tmp_path, base):
    overrides = (f"model.name={base}", "model.adapter=lora", "model.lora.rank=2")
    folder = run(recipe("numeric", *overrides), tmp_path / "run", until="evaluate")
    config = read_json(folder / "model" / "adapter_config.json")
    assert config["trainable_token_indices"] is None
    recommender = Recommender.from_pretrained(folder)
    assert recommender.generation.layout == "adapter"
    trained = [name for name, parameter in recommender.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    again = Recommender.from_pretrained(recommender.save_pretrained(tmp_path / "copy"))
    assert answers(again) == answers(recommender)
    codes = ItemCodes.load(folder / "model")
    assert recommender.model.vocab.codes == codes
    (folder / "model" / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": {"x": [1]}}))
    with pytest.raises(ArtifactError, match="an adapter must hold one table of item rows"):
        Recommender.from_pretrained(folder)


def test_check_knows_how_long_identifiers_are(recipe, base):
    assert "tokens of items an epoch" in check(recipe("title"))
    assert "tokens of items an epoch" in check(recipe("numeric", f"model.name={base}", "model.adapter=lora"))
    assert "cannot be reached" in check(recipe("numeric", "model.name=no/such", "model.adapter=lora"))
    with pytest.raises(RecipeError, match=r"needs [0-9,]+ positions at [0-9]+ an item, but the model has 128"):
        check(recipe("numeric", f"model.name={base}", "model.adapter=lora", "examples.history_length=60"))


def test_a_tokenizer_without_digits_cannot_spell_numbers(recipe, tmp_path):
    tiny_lm("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = recipe("numeric", f"model.name={tmp_path / 'base'}", "model.adapter=lora")
    with pytest.raises(DataError, match="the tokenizer must have all digits"):
        run(config, tmp_path / "run", until="items")


def test_without_titles_there_is_none_to_name_an_item_by(recipe, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},\n" for n in range(8)))
    lines = [f"u{user},i{(user + step) % 8},{step}\n" for user in range(30) for step in range(5)]
    (folder / "interactions.csv").write_text("user_id,item_id,position\n" + "".join(lines))
    data = f"data={{source: folder, path: {folder}}}"
    with pytest.raises(DataError, match="no item of the catalogue has a title, so there is none to name it by"):
        check(recipe("title", data))
    scratch = ("model.scratch.pretrain_epochs=0", "evaluation.k=5")
    assert run(recipe("numeric", data, *scratch), tmp_path / "run", until="evaluate").is_dir()

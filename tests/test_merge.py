"""Merging writes a bundle that needs neither PEFT nor the base model, and touches nothing else."""

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from llm_itemtok.bundle import _YOUNGER, items_sha256
from llm_itemtok.cli import main
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError
from llm_itemtok.pipeline import stages
from llm_itemtok.pipeline.merge import merge
from llm_itemtok.pipeline.push import card_of
from llm_itemtok.recommender import Recommender
from tests.report.test_page import _metrics
from tests.test_recommender import adapter, merged


@pytest.fixture
def bundle(tmp_path):
    return adapter(tmp_path / "base").save_pretrained(tmp_path / "bundle")


def test_a_merged_bundle_answers_as_its_adapter_and_stands_alone(bundle, tmp_path, capsys):
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    recommender = Recommender.from_pretrained(bundle)
    assert main(["merge", str(bundle), str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")
    (tmp_path / "base").rename(tmp_path / "gone")
    again = Recommender.from_pretrained(tmp_path / "merged")
    expected = recommender.recommend(["item-3", "item-7"], 12)
    found = again.recommend(["item-3", "item-7"], 12)
    assert [item.item_id for item in found] == [item.item_id for item in expected]
    assert [item.score for item in found] == pytest.approx([item.score for item in expected], abs=1e-4)
    assert {path: path.read_bytes() for path in before} == before
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "PeftModel" not in card
    assert "PeftModel.from_pretrained(base, " in (bundle / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 36


def test_a_whole_model_is_not_merged_again(tmp_path):
    bundle = merged().save_pretrained(tmp_path / "bundle")
    with pytest.raises(
        ArtifactError, match=r"what is merged must be an adapter, found: a whole model; use it as it is"
    ):
        merge(bundle, tmp_path / "merged")


def test_merging_replaces_a_bundle_but_no_other_folder_and_not_its_adapter(bundle, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("mine")
    for out in (tmp_path / "precious", tmp_path / "precious" / "notes.txt"):
        with pytest.raises(ArtifactError, match="must go into a new folder or replace a bundle, found: other files"):
            merge(bundle, out)
    assert (tmp_path / "precious" / "notes.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match="must not take its adapter's place; choose another folder"):
        merge(bundle, bundle)
    merge(bundle, tmp_path / "merged")
    assert merge(bundle, tmp_path / "merged") == tmp_path / "merged"


def test_items_of_another_catalogue_are_refused(tmp_path):
    """With the same codes, as `random` gives them to any catalogue of one size."""
    saved = merged()
    saved = saved.with_generation(items_sha256=items_sha256(saved.item_ids))
    bundle = saved.save_pretrained(tmp_path / "bundle")
    assert Recommender.from_pretrained(bundle).item_ids == saved.item_ids
    text = (bundle / "items.jsonl").read_text()
    (bundle / "items.jsonl").write_text(text.replace('"item-5"', '"item-x"'))
    with pytest.raises(
        ArtifactError, match=r"items.jsonl and generation.json .* the items are those of another catalog"
    ):
        Recommender.from_pretrained(bundle)


def test_a_model_of_another_run_is_refused_by_its_codes(bundle, tmp_path):
    """Each file alone is right, and all shapes are the same."""
    path = bundle / "adapter_model.safetensors"
    content = path.read_bytes()
    codes = json.loads((bundle / "generation.json").read_text())["codes_sha256"].encode()
    assert content.count(codes) == 1
    path.write_bytes(content.replace(codes, codes[::-1]))
    with pytest.raises(ArtifactError, match="model and item codes must belong together"):
        Recommender.from_pretrained(bundle)


def test_bundles_of_earlier_versions_load(bundle):
    settings = json.loads((bundle / "generation.json").read_text())
    for name in _YOUNGER:
        del settings[name]
    (bundle / "generation.json").write_text(json.dumps(settings))
    generation = Recommender.from_pretrained(bundle).generation
    assert (generation.quantization, generation.repeats, generation.dense_share) == ("none", True, 0.0)


def test_a_bundle_with_something_of_ones_own_in_it_is_not_replaced(bundle, tmp_path):
    merge(bundle, tmp_path / "merged")
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"found: other files \['notes.txt'\]; choose another folder"):
        merge(bundle, tmp_path / "merged")
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("place", "catalog", "items", "told"), [
    ("model", "0" * 64, 60, True), ("other", "0" * 64, 60, False), ("model", "1" * 64, 60, False),
    ("model", "0" * 64, 99_999, False),
])  # fmt: skip
def test_numbers_are_told_of_the_model_that_they_were_measured_with(place, catalog, items, told, tmp_path):
    """A folder around a bundle need not be its run, nor are numbers those of a catalogue that has grown since."""
    run = tmp_path / "run"
    saved = adapter(tmp_path / "base")
    saved.save_pretrained(run / place)
    measured = _metrics(np.random.default_rng(0))
    counts = dict.fromkeys(("train_interactions", "train_users", "validation_cases", "test_cases"), 100)
    measured["protocol"]["counts"] = {"items": items} | counts
    (run / "metrics.json").write_text(json.dumps(measured))
    (run / "recipe.yaml").write_text(RunConfig.load("recipes/quickstart.yaml").to_yaml())
    (run / "environment.json").write_text("{}")
    assert ("## Measured" in card_of(saved.with_generation(catalog_sha256=catalog), run / place)) == told


def test_a_folder_that_a_run_began_with_is_no_name_on_the_hub_when_seen_from_elsewhere(tmp_path, monkeypatch):
    """Neither is its path told, nor is somebody's model of that name said to be the base."""
    for place in ("client-x/finetune-2024", "away"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "client-x/v.npy").write_bytes(b"")
    vectors = "vectors: {kind: concat, parts: [{kind: tfidf-svd}, {kind: file, path: client-x/v.npy}]}"
    text = f"data: {{source: synthetic}}\n{vectors}\nmodel: {{name: client-x/finetune-2024}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config, run = RunConfig.load("recipe.yaml"), tmp_path / "run"
    stages.claim(run, config, fresh=False, book=stages.Stages(run, {}, None, writes=False), keys={})
    merged().save_pretrained(run / "model")
    cards = {card_of(merged(), run)}
    monkeypatch.chdir(tmp_path / "away")
    cards.add(card_of(merged(), run))
    (told,) = cards
    assert "client-x" not in told
    assert "name: finetune-2024\n" in told
    assert ModelCard(told).data.base_model is None
    (run / "environment.json").write_text("{}")  # as runs of before there was such a note
    (run / "recipe.yaml").write_text(config.to_yaml().replace("client-x/finetune-2024", "org/base"))
    assert ModelCard(card_of(merged(), run)).data.base_model == "org/base"

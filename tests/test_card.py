"""A model card tells what was measured and how, and nothing of the machine or the people it was made by."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from llm_itemtok import strict
from llm_itemtok.card import Subject, card, for_repo, redacted
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import HubError
from llm_itemtok.papers import PAPERS, cited
from llm_itemtok.recommender import Recommender
from tests.report.test_page import _metrics
from tests.test_recommender import adapter, made_of, merged
from tests.tiny import KINDS, text_codes, tiny_item_model

RECIPE = {
    "seed": 3,
    "data": {"source": "folder", "path": "/home/anna/secret-project/toys", "split": "leave-last-out"},
    "vectors": {"kind": "concat", "parts": [{"path": "../vectors.npy"}, {"source": "sasrec"}]},
    "tokenizer": {"kind": "rqvae", "path": "~/codes.csv", "collisions": "sinkhorn"},
    "model": {"name": "org/base", "adapter": "lora"},
    "trainer": {"learning_rate": 1e-3, "hub_token": "hf_abcdefghij", "run_name": "for anna"},
}


@pytest.fixture
def metrics():
    import numpy as np

    measured = _metrics(np.random.default_rng(0))
    measured["protocol"]["counts"] = {
        "items": 60, "train_interactions": 1434, "train_users": 120, "validation_cases": 120, "test_cases": 119,
    }  # fmt: skip
    level = {"name": "level-0", "size": 16, "used": 12, "perplexity": 8.25}
    measured["codes"] = {
        "collision_rate": 0.0421,
        "resolved": {"levels": [level], "verdict": "Good: few items collide."},
    }
    return measured


@pytest.fixture(autouse=True)
def _at_annas(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/anna"))


def test_every_test_metric_is_in_the_metadata_with_the_protocol(metrics):
    made = ModelCard(for_repo(merged().card(metrics, RECIPE), "anna/toys"))
    results = {result.metric_type: result for result in made.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == pytest.approx(metrics["test"], abs=1e-6)
    protocol = {name: value for name, value in metrics["protocol"].items() if name != "counts"}
    assert all(result.dataset_args == protocol for result in results.values())
    assert {(result.dataset_name, result.dataset_split) for result in results.values()} == {("toys", "test")}
    assert made.data.model_name == "toys"
    assert len(made.data.to_dict()["model-index"][0]["results"]) == 1  # one group, because the protocol is one


def test_the_text_tells_data_counts_item_tokens_numbers_and_recipe(metrics):
    text = merged().card(metrics, RECIPE)
    for told in ("1,434 training interactions of 120 users", "4.2% of the items", "Good: few items collide.",
                 "| level-0 | 16 | 12 | 8.2 |", "| **this model** |", "| markov |", "119 test users",
                 "learning_rate: 0.001"):  # fmt: skip
        assert told in text, told


def test_places_names_and_secrets_stay_at_home(metrics):
    told = merged(base="/home/anna/models/base", layout="merged").card(metrics, RECIPE)
    assert not re.search(r"anna|secret-project|hf_abc|/home|\.\./|~/", told)
    clean = redacted(RECIPE)
    assert clean["data"]["path"] == "toys"
    assert clean["tokenizer"]["path"] == "codes.csv"
    assert clean["vectors"]["parts"][0]["path"] == "vectors.npy"
    assert clean["trainer"]["hub_token"] == "(left out)"
    assert clean["model"]["name"] == "org/base"
    assert clean["seed"] == 3
    assert f"```yaml\n{yaml.safe_dump(clean, sort_keys=False, allow_unicode=True, width=100)}```" in told


def test_a_relative_folder_is_a_place_too(tmp_path, monkeypatch):
    (tmp_path / "mine" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert redacted({"model": {"name": "mine/base"}}) == {"model": {"name": "base"}}


def test_the_methods_of_the_recipe_are_cited(metrics):
    text = merged().card(metrics, RECIPE)
    for paper in ("arxiv:2305.05065", "arxiv:2203.01941", "arxiv:2106.09685", "arxiv:1808.09781"):
        assert paper in text
    assert "arxiv:2412.17171" not in text
    assert merged().card().count("@misc") == 1  # a bundle of no recipe is of item tokens all the same


@pytest.mark.parametrize("place", PAPERS)
def test_every_paper_is_cited_for_a_value_that_a_recipe_can_have(place):
    section, name, value = place
    kinds = map(strict.annotations_of, strict.sections_in(strict.annotations_of(RunConfig)[section]))
    assert any(value in strict.choices_of(kind[name]) for kind in kinds if name in kind)
    assert [paper.number for paper in cited({section: {name: value}})] == ["2305.05065", PAPERS[place].number]


def test_the_five_systems_have_their_papers():
    kinds = {kind for section, name, kind in PAPERS if section in ("objective", "scoring", "update")}
    assert kinds == {"token-weighted", "recursive", "self-improve", "bilevel", "alternate"}


def test_a_card_whose_metadata_somebody_broke_is_named():
    with pytest.raises(HubError, match="anna/toys: the metadata of the card, its first lines, must be YAML: while"):
        for_repo("---\ntags: [a\n---\n# Toys\n", "anna/toys")


def test_a_licence_is_told_when_it_is_given_and_never_guessed():
    text = merged().card()
    assert ModelCard(text).data.license is None
    assert "none is stated here" in text
    made = ModelCard(for_repo(text, "anna/toys", "apache-2.0"))
    assert made.data.license == "apache-2.0"
    assert "Of the model: apache-2.0." in made.text


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("layout", ["merged", "adapter"])
def test_the_code_is_python_and_names_the_repository(layout, family, tmp_path):
    recommender = adapter(tmp_path / "base", family, tied=False) if layout == "adapter" else merged(family)
    text = for_repo(for_repo(recommender.card(), "someone/else"), "anna/toys")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
        assert block.count('HERE = "anna/toys"\n') == 1
    assert str(tmp_path) not in text
    assert ("PeftModel" in text) == (layout == "adapter")
    assert ("AutoModelForSeq2SeqLM" in text) == (family == "t5")


def test_a_base_model_of_the_hub_is_named():
    text = merged(layout="adapter", base="org/base", revision="v2").card()
    assert ModelCard(text).data.base_model == "org/base"
    assert 'from_pretrained("org/base", revision="v2")' in text


def test_a_whole_model_says_what_it_was_trained_from(metrics):
    made = ModelCard(merged().card(metrics, RECIPE))
    assert made.data.base_model == "org/base"
    assert "It was trained from [org/base](https://huggingface.co/org/base)." in made.text
    made = ModelCard(merged().card(metrics, RECIPE | {"model": {"name": "scratch"}}))
    assert made.data.base_model is None


def test_items_in_words_of_the_model_have_no_plain_route():
    generation = merged().generation
    subject = Subject(generation, items=9, levels=4, example=["a"], codes=None, start="<s>", end=None, tied=True)
    text = card(subject)
    assert "custom_generate" not in text
    assert "spelled in words" in text
    assert 'model.recommend(["a"], k=10)' in text


def test_a_card_of_somebody_else_is_left_as_it_is():
    assert for_repo("# Mine\n", "anna/toys").strip().endswith("# Mine")


def test_settings_that_hold_a_place_tell_its_last_name_wherever_one_stands():
    """The card may be made in another folder than the run was, where no relative path exists."""
    recipe = {
        "data": {"source": "folder", "path": "clients/acme/toys"},
        "vectors": {"kind": "file", "path": "s3://KEY:word@bucket/acme/v.npy", "model": "models/acme/minilm"},
        "tokenizer": {"path": "file:///home/anna/codes.csv"},
        "model": {"name": "https://anna:hunter2@hub.example/acme/base"},
        "trainer": {"logging_dir": "acme/logs", "deepspeed": "conf/acme/ds.json", "fsdp_config": {"x": "\\\\acme\\y"}},
        "seed": 3,
    }
    clean = redacted(recipe)
    assert "acme" not in str(clean)
    assert clean["data"]["path"] == "toys"
    assert clean["tokenizer"]["path"] == "codes.csv"
    assert clean["trainer"] == {"logging_dir": "logs", "deepspeed": "ds.json", "fsdp_config": {"x": "y"}}
    assert redacted({"data": {"source": "hub", "path": "org/toys"}})["data"]["path"] == "org/toys"


def test_secrets_stay_at_home_whatever_their_setting_is_called():
    clean = redacted(
        {
            "trainer": {"HUB_TOKEN": "abc", "wandb_key": "abc", "hub_tokens": {"mine": "hf_abc"}, "credentials": "abc"},
            "model": {"revision": "Bearer hf_abcDEF09"},
            "note": "see https://anna:abc@corp.example/x or /home/anna/x.py --token hf_abc",
        }
    )
    assert "abc" not in str(clean)
    assert "anna" not in str(clean)
    assert clean["note"] == "see https://corp.example/x or x.py --token (left out)"


@pytest.mark.parametrize("item", ['x\nimport os; os.system("id") #', 'a"b\\', "\u2028\x00", "東京", "```"])
def test_ids_are_texts_in_the_code_whatever_they_hold(item):
    """Ids are whatever a catalogue has, and the code of a card is there to be run."""
    recommender = merged()
    ids = (item, *recommender.item_ids[1:])
    text = Recommender(
        recommender.model,
        recommender.tokenizer,
        item_ids=ids,
        titles=recommender.titles,
        generation=recommender.generation,
    ).card()
    start = text.index("```python\n") + len("```python\n")
    calls = [
        node for node in ast.walk(ast.parse(text[start : text.index("\n```\n", start)])) if isinstance(node, ast.List)
    ]
    assert [ast.literal_eval(call) for call in calls] == [[item, "item-1"]]
    assert "import os; os.system" not in text.replace("\\nimport os", "")


@pytest.mark.parametrize("item", ["`<img src=x>", "a``b", "```", "x`\n\n# Injected\n[a](b)", "", "`"])
def test_ids_are_code_in_the_text_whatever_they_hold(item):
    recommender = merged()
    subject = Subject(
        recommender.generation, items=9, levels=4, example=[item], codes=["<a_0>"], start="<s>`#", end=None, tied=True
    )
    text = card(subject, recipe={"note": f"x\n```\n{item}"})
    (told,) = re.findall(r"^.*`<a_0>` is (.*)\)\.$", text, re.MULTILINE)
    ticks = re.match("`*", told)[0]
    inner = told[len(ticks) : -len(ticks)]
    assert told == ticks + inner + ticks
    assert ticks not in re.findall("`+", inner)  # so CommonMark ends the code at the last ones, and no sooner
    assert json.loads(f'"{inner.strip()}"') == item
    assert "A prompt is ``<s>`#`` and" in text
    recipe = text[text.index("````yaml") :]
    assert recipe.index("note:") < recipe.index("```\n") < recipe.index("\n````\n")


def test_items_of_several_lengths_have_at_most_so_many_words():
    codes = text_codes(["toy car", "kids", "kids toy car"])
    whole = made_of(*tiny_item_model(codes=codes, normaliser="vocab"), normaliser="vocab", training_normaliser="vocab")
    assert f"each is a path of at most {codes.num_levels} words" in whole.card()


def test_a_name_is_written_into_a_card_as_it_is():
    assert 'HERE = "anna/a\\1"' in for_repo(merged().card(), "anna/a\\1")

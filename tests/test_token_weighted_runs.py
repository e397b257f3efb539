"""Recipes with token weights, from `check` to the report: what is refused, what is counted, what a run leaves."""

import json
import re

import numpy as np
import pytest

from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.objective import target_counts
from llm_itemtok.pipeline.run import run
from llm_itemtok.pipeline.vectors import needs_vectors
from llm_itemtok.recommender import Recommender
from llm_itemtok.report.run_folder import read_run
from llm_itemtok.report.weights import charts
from llm_itemtok.training.callbacks import read_log
from llm_itemtok.training.examples import build
from tests.test_pipeline import T5, recipe

WEIGHTED = ("objective.kind=token-weighted", "objective.pace=0.1", "trainer.max_steps=4")
TEXT_TASKS = "examples.tasks={next-item: 1.0, title-to-item: 0.5, item-to-title: 0.5}"
ALL = (
    "objective.targets=[{kind: plain}, {kind: front, gains: prefix}, {kind: frequency, over: batch}, {kind: position}, "
    "{kind: information-gain}, {kind: counterfactual}]"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.targets=[]"], "must name at least one target, such as {kind: plain}, was: []"),
        (["objective.targets=[{kind: front}, {kind: front, gains: prefix}]"], "each kind once, was: front, front"),
        (["objective.targets=[{kind: frequency, beta: 1.0}]"], "at least 0 and below 1, was: 1.0"),
        (["objective.targets=[{kind: front, beta: 0.9}]"], "beta"),
        (["objective.curriculum=none", "objective.pace=0.1"], "applies only with curriculum: pace"),
        (["objective.mix=frozen", "objective.bound=2.0"], "applies only with mix: learned"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(tmp_path, "objective.kind=token-weighted", *overrides)


def test_a_resolved_recipe_loads_again(tmp_path):
    config = recipe(tmp_path, *WEIGHTED, ALL)
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert RunConfig.load(tmp_path / "resolved.yaml") == config


def test_front_weights_need_item_vectors_whatever_the_item_tokens_are(tmp_path):
    random = ("tokenizer.kind=random", "vocab.init=normal")
    assert needs_vectors(recipe(tmp_path, *random, *WEIGHTED))
    assert not needs_vectors(recipe(tmp_path, *random, *WEIGHTED, "objective.targets=[{kind: frequency}]"))
    assert not needs_vectors(recipe(tmp_path, *random))


def test_check_says_when_shares_are_level_and_warns_if_never(tmp_path):
    learned = "equal shares after 7 steps, but for what is learned beside it\n"
    assert f"{learned}  warning: training ends before; `objective.pace: 3.5e-01`" in check(recipe(tmp_path, *WEIGHTED))
    assert f"{learned}  base model" in check(recipe(tmp_path, *WEIGHTED, "trainer.max_steps=8"))
    assert "equal shares after 7 steps\n" in check(recipe(tmp_path, *WEIGHTED, "objective.mix=frozen"))
    for silent in (("objective.curriculum=none",), ("objective.targets=[{kind: front}]", "objective.pace=0.1")):
        assert "equal shares" not in check(recipe(tmp_path, "objective.kind=token-weighted", *silent))
    without = check(recipe(tmp_path, *WEIGHTED, "objective.targets=[{kind: plain}, {kind: front}]"))
    assert "equal shares" not in without
    assert "warning: no share rises without `frequency` among `objective.targets`" in without


def test_front_weights_by_entropy_need_no_vectors_and_fall_from_front_to_back(tmp_path):
    settings = ("tokenizer={kind: random, levels: 3, codebook_size: 8}", "vocab.init=normal")
    front = "objective.targets=[{kind: front, gains: entropy}]"
    config = recipe(tmp_path, "objective.kind=token-weighted", *settings, front)
    assert not needs_vectors(config)
    out = run(config, tmp_path / "run", until="train")
    levels = json.loads((out / "token_weights.json").read_text())["targets"]["front"]["levels"]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 1 > levels[-1]


@pytest.mark.parametrize("kind", ["all-positions", "windows", "last"])
def test_targets_are_counted_as_the_examples_have_them(kind):
    """By hand: what is no target of training counts for nothing, nor does a text task."""
    sequences = [np.array([3, 1, 4, 1, 5]), np.array([2, 6]), np.array([5])]
    tasks = {"next-item": 1.0, "title-to-item": 1.0, "item-to-title": 1.0}
    table = build(sequences, kind=kind, history_length=2, tasks=tasks, text_rows=np.arange(8))
    expected = {
        "all-positions": [0, 2, 1, 1, 1, 2, 1, 0],
        "windows": [0, 2, 0, 0, 1, 1, 1, 0],
        "last": [0, 0, 0, 0, 0, 1, 1, 0],
    }
    assert target_counts(table, 8).tolist() == expected[kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighted")
    return run(recipe(folder, *WEIGHTED, ALL, TEXT_TASKS, "trainer.logging_steps=1"), folder / "run")


def test_a_run_leaves_its_weights_its_mix_and_a_bundle_like_any_other(finished):
    weights = json.loads((finished / "token_weights.json").read_text())["targets"]
    names = ["plain", "front", "frequency", "position", "information-gain", "counterfactual"]
    assert list(weights) == names
    assert weights["plain"]["levels"] == [1.0, 1.0, 1.0]
    for name in names:
        assert np.mean(weights[name]["levels"]) == pytest.approx(1, abs=1e-5)
    first, *_, last = [line for line in read_log(finished / "metrics.jsonl") if "loss" in line]
    assert first["mix/frequency"] < 1e-5 < 0.04 < last["mix/frequency"]
    assert sum(last[f"mix/{name}"] for name in names) == pytest.approx(1)
    assert sum(value for name, value in last.items() if name.startswith("loss/")) == pytest.approx(last["loss"])
    assert len(Recommender.from_pretrained(finished).recommend([], k=5)) == 5
    assert not [path for path in (finished / "model").iterdir() if "mix" in path.name]


def test_the_report_draws_mix_losses_and_weights(finished):
    found = charts(read_run(finished))
    assert [chart.title for chart in found] == [
        "What is mixed",
        "Loss of each target on its own",
        "Weight of a target token by level, mean over training",
        "Weight of an item's tokens by how often it is a training target",
    ]
    page = (finished / "report.html").read_text()
    assert all(chart.title.replace("'", "&#39;") in page for chart in found)
    (losses,) = (chart for chart in found if chart.title.startswith("Loss"))
    line = [line for line in read_log(finished / "metrics.jsonl") if "loss" in line][-1]
    own = sum(value for name, value in line.items() if name.endswith("/front") and "loss/" in name) / line["mix/front"]
    assert f"front: {own:.4g}" in [text for _, text in losses.legend]


def test_the_report_of_a_run_without_weights_draws_none_and_of_one_that_lost_them_says_so(finished, tmp_path):
    (tmp_path / "recipe.yaml").write_text("objective: {kind: token-weighted}\n")
    lost = read_run(tmp_path)
    assert charts(lost) == []
    assert any("token_weights.json" in note for note in lost.notes)
    (tmp_path / "recipe.yaml").write_text("objective: {kind: next-token}\n")
    assert not any("token_weights.json" in note for note in read_run(tmp_path).notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (*T5, TEXT_TASKS),
        (*T5, "model.adapter=lora", "objective.normaliser=vocab"),
        ("model.adapter=lora", "model.scratch.family=qwen3", "objective.mix=frozen"),
        ("examples.kind=windows", "objective.curriculum=none", "objective.normaliser=items", "tokenizer.levels=1"),
        ("tokenizer.kind=title", "objective.normaliser=vocab"),
        ("tokenizer.kind=numeric", "objective.normaliser=vocab", *T5),
        ("tokenizer.kind=product", "tokenizer.levels=4"),
    ],
    ids=["t5", "t5-lora-vocab", "lora-frozen", "windows-items-one-level", "title", "numeric-t5", "product"],
)
def test_every_combination_runs(tmp_path, overrides):
    paced = [] if "objective.curriculum=none" in overrides else ["objective.pace=0.1"]
    settings = ("objective.kind=token-weighted", "trainer.max_steps=2", *paced, *overrides, ALL)
    out = run(recipe(tmp_path, *settings), tmp_path / "run")
    assert (out / "token_weights.json").is_file()
    assert len(Recommender.from_pretrained(out).recommend([], k=5)) == 5

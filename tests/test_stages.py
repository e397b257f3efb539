"""Keys of the stages: every setting is in the key of the stage that reads it first, and of all stages after it."""

import dataclasses

import pytest

from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.pipeline.stages import SECTIONS, STAGE_NAMES, Stages, claim, keys


def recipe_in(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {source: synthetic}\n", encoding="utf-8")
    return path


def keys_of(tmp_path, *overrides, data="d", files=None, columns="c"):
    return keys(RunConfig.load(recipe_in(tmp_path), overrides), data, files or {}, columns)


def changed(before, after):
    """Stages whose keys differ."""
    return [stage for stage in STAGE_NAMES if before[stage] != after[stage]]


def test_every_section_of_a_recipe_belongs_to_exactly_one_stage():
    sections = [section for stage in STAGE_NAMES for section in SECTIONS[stage]]
    assert sorted(sections) == sorted(field.name for field in dataclasses.fields(RunConfig))


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("seed=5", "data"),
        ("data.k_core=2", "data"),
        ("vectors.dimensions=16", "items"),
        ("tokenizer.levels=2", "items"),
        ("model.input_dropout=0.5", "items"),
        ("vocab.init=normal", "vocab"),
        ("examples.history_length=7", "train"),
        ("objective.normaliser=children", "train"),
        ("update.kind=self-improve", "train"),
        ("scoring.item_embedding=8", "train"),
        ("rescoring.kind=sasrec", "train"),
        ("trainer.max_steps=3", "train"),
        ("evaluation.beam=40", "train"),
        ("evaluation.mask_seen=true", "train"),
        ("evaluation.repeats=choose", "train"),
        ("evaluation.validation_users=9", "train"),
        ("evaluation.patience=2", "train"),
        ("evaluation.every=0.5", "train"),
        ("evaluation.decode_normaliser=children", "train"),
        ("evaluation.k=5", "evaluate"),
        ("evaluation.baselines=[markov]", "evaluate"),
        ("evaluation.batch_size=8", "evaluate"),
    ],
)
def test_a_changed_setting_changes_its_stage_and_all_after_it(tmp_path, override, stage):
    before, after = keys_of(tmp_path), keys_of(tmp_path, override)
    assert changed(before, after) == list(STAGE_NAMES[STAGE_NAMES.index(stage) :])


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ({"data": "other"}, "data"),
        ({"files": {"vectors.path": "other"}}, "items"),
        ({"files": {"tokenizer.path": "other"}}, "items"),
        ({"files": {"model.name": "other"}}, "items"),
        ({"columns": "other"}, "evaluate"),
    ],
)
def test_changed_inputs_change_the_stage_that_reads_them(tmp_path, change, stage):
    before, after = keys_of(tmp_path), keys_of(tmp_path, **change)
    assert changed(before, after) == list(STAGE_NAMES[STAGE_NAMES.index(stage) :])


@pytest.fixture
def claimed(tmp_path):
    """Make a run folder a recipe's; what it takes but for `fresh`."""
    config, found = RunConfig.load(recipe_in(tmp_path)), keys_of(tmp_path)
    folder = tmp_path / "run"
    book = Stages(folder, finished={}, trained=None, writes=False)
    claim(folder, config, fresh=False, book=book, keys=found)
    return folder, {"config": config, "book": book, "keys": found}


def test_the_recipe_of_a_run_folder_is_read_as_recipes_are(claimed):
    """A few lines of anchors and aliases stand for gigabytes."""
    folder, what = claimed
    (folder / "recipe.yaml").write_text("a: &a [1]\nb: *a\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml:1: broken YAML: anchors"):
        claim(folder, **what, fresh=False)
    claim(folder, **what, fresh=True)
    assert (folder / "recipe.yaml").read_text() == what["config"].to_yaml()

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from llm_itemtok.errors import RecipeError
from llm_itemtok.training.arguments import OWNED, RANGES, REMOVED, build_arguments, check_settings


def test_settings_reach_the_library_under_their_own_names(tmp_path):
    settings = {"learning_rate": 1.0e-3, "max_steps": 7, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    arguments = build_arguments(settings, output_dir=tmp_path, seed=5)
    assert (arguments.learning_rate, arguments.max_steps, arguments.warmup_steps) == (1.0e-3, 7, 0.1)
    assert arguments.lr_scheduler_type == "cosine"


def test_the_pipeline_decides_seed_folder_columns_and_validation(tmp_path):
    arguments = build_arguments({}, output_dir=tmp_path / "run", seed=5)
    assert (arguments.seed, arguments.data_seed, arguments.output_dir) == (5, 5, str(tmp_path / "run"))
    assert arguments.remove_unused_columns is False
    assert arguments.average_tokens_across_devices is True
    assert (arguments.eval_strategy, arguments.report_to) == ("no", [])


def test_a_process_trains_on_one_device_however_many_the_machine_has(tmp_path):
    """The library would spread one process over all of them, with batches that nobody asked for."""
    arguments = build_arguments({"per_device_train_batch_size": 4}, output_dir=tmp_path, seed=0)
    arguments._n_gpu = 3
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.eval_batch_size) == (1, 4, 8)


def test_trackers_are_the_users_choice(tmp_path):
    assert build_arguments({"report_to": ["none"]}, output_dir=tmp_path, seed=0).report_to == []
    with pytest.raises(RecipeError, match=r"`trainer` cannot be carried out here: nonsense is not supported"):
        build_arguments({"report_to": "nonsense"}, output_dir=tmp_path, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rte": 1}, r"is not a setting; did you mean `trainer\.learning_rate`\?\n.* explains it"),
        ({"learning_rate": "2e-5"}, "must be a number, was: the text '2e-5'; YAML reads 2e-5 as text; write 2.0e-5"),
        ({"learning_rate": -1}, r"`trainer\.learning_rate` must be at least 0, was: -1"),
        ({"learning_rate": float("nan")}, "must be a finite number, was: nan"),
        ({"learning_rate": True}, "must be a number, was: true"),
        ({"num_train_epochs": -1}, r"`trainer\.num_train_epochs` must be above 0, was: -1"),
        ({"num_train_epochs": 0}, r"`trainer\.num_train_epochs` must be above 0, was: 0"),
        ({"max_steps": 0}, "must be at least 1, or -1 to go by epochs, was: 0"),
        ({"max_steps": -5}, "must be at least 1, or -1 to go by epochs, was: -5"),
        ({"max_steps": 10.0}, "must be a whole number, was: 10.0; write 10"),
        ({"per_device_train_batch_size": 0}, "must be at least 1, was: 0"),
        ({"gradient_accumulation_steps": -2}, "must be at least 1, was: -2"),
        ({"weight_decay": -0.1}, "must be at least 0, was: -0.1"),
        ({"warmup_steps": -1}, "must be at least 0, was: -1"),
        ({"warmup_steps": 1.5}, "must be a share below 1 or a whole number of steps, was: 1.5"),
        ({"adam_beta2": 1.0}, "must be at least 0 and below 1, was: 1.0"),
        ({"logging_steps": 0}, "must be above 0, was: 0"),
        ({"lr_scheduler_type": "cosin"}, "must be one of linear, cosine, .* did you mean cosine"),
        ({"train_sampling_strategy": "rand"}, "must be one of random, sequential, .*was: 'rand'"),
        ({"lr_scheduler_kwargs": [1]}, "must be a mapping or text or null, was: a list of 1"),
        ({"bf16": "yes"}, "must be true or false, was: the text 'yes'"),
        ({"bf16": True, "fp16": True}, r"`trainer\.fp16` and `trainer\.bf16` are both true; choose one"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "must not wait for the library's own evaluation"),
        ({"save_strategy": "epoch"}, r"a checkpoint is written at every validation: see `evaluation\.every`"),
        ({"dataloader_prefetch_factor": 2}, "needs `trainer.dataloader_num_workers` of at least 1"),
        (
            {"warmup_ratio": 0.1},
            r"`trainer\.warmup_ratio` is not a setting of the installed .* `trainer\.warmup_steps`",
        ),
        ({"group_by_length": True}, "train_sampling_strategy: group_by_length"),
        ({"evaluation_strategy": "epoch"}, r"`evaluation\.every`"),
        ({"no_cuda": True}, "use_cpu: true"),
        (
            {"output_dir": "x"},
            r"`trainer\.output_dir` is not for the recipe to set; checkpoints go into the run folder",
        ),
        ({"seed": 1}, "write `seed` at the top of the recipe"),
        ({"label_smoothing_factor": 0.1}, r"`objective\.label_smoothing`"),
        ({"eval_strategy": "steps"}, r"`evaluation\.every`"),
        ({"push_to_hub": True}, "a training pushes nothing; `itemtok push` does"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(RecipeError, match=message) as raised:
        check_settings(settings, source="recipes/x.yaml")
    assert str(raised.value).startswith("recipes/x.yaml: `trainer.")


def test_what_the_machine_cannot_do_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError, match=r"`trainer` cannot be carried out here: .*unexpected keyword argument 'x'"):
        build_arguments({"accelerator_config": {"x": 1}}, output_dir=tmp_path, seed=0)


@pytest.mark.parametrize("settings", [{"fsdp": True}, {"disable_tqdm": None}, {"optim": "adafactor"}, {"debug": ""}])
def test_what_the_library_takes_is_taken(settings):
    check_settings(settings)


def test_the_tables_speak_of_settings_as_they_are_in_the_installed_library():
    """A release that renames a setting must be noticed here, not by a user."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(OWNED) <= names
    assert set(RANGES) <= names
    assert not set(REMOVED) & names
    assert not set(OWNED) & set(RANGES)


def test_nothing_is_built_or_written_by_checking(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_settings({"max_steps": 3})
    assert list(Path().iterdir()) == []

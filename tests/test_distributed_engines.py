"""Engines: each launcher's file is what Accelerate reads, and what an engine cannot do is refused with the reason."""

import json
import subprocess
import sys

import pytest
from accelerate import PartialState
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from llm_itemtok.cli import main
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.pipeline.engines import asks_for_fsdp, refuse_engine
from llm_itemtok.training.arguments import CHECKPOINTING
from tests.process_pairs import free_port
from tests.sharded_on_cpu import LAUNCHED
from tests.test_architecture import ROOT

FOLDER = ROOT / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
KINDS = {
    "cpu-2": "MULTI_GPU",  # for MULTI_CPU Accelerate starts one process
    "ddp": "MULTI_GPU",
    "deepspeed-zero2": "DEEPSPEED",
    "deepspeed-zero3": "DEEPSPEED",
    "fsdp2": "FSDP",
}
RECIPE = """
data: {source: synthetic, items: 40, users: 40}
vectors: {kind: tfidf-svd, dimensions: 8}
tokenizer: {levels: 2, codebook_size: 8}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 0}}
trainer: {max_steps: 4, learning_rate: 5.0e-3}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """These tests begin as if nobody had launched them, and leave no trace in the environment."""
    for name in (*LAUNCHED, "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def launched_with(path):
    """The variables that `accelerate launch --config_file PATH` gives to its processes."""
    parser = launch_command_parser()
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "train.py"]))
    return prepare_multi_gpu_env(arguments)


def test_there_is_a_file_for_each_engine_and_its_head_says_how_to_launch_it():
    assert [path.stem for path in FILES] == sorted(KINDS)
    for path in FILES:
        command = f"accelerate launch --config_file recipes/accelerate/{path.name} scripts/train.py --config RECIPE"
        assert command in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_each_file_and_leaves_the_precision_to_the_recipe(path):
    loaded = load_config_from_file(str(path))
    assert isinstance(loaded, ClusterConfig)
    assert loaded.distributed_type == KINDS[path.stem]
    assert loaded.mixed_precision == "no"
    assert loaded.num_processes >= 2
    if "deepspeed" in path.stem:
        assert loaded.deepspeed_config["zero_stage"] == int(path.stem[-1])


@pytest.mark.slow
def test_the_file_for_processors_trains_in_two_processes_as_one_does_alone(recipe, tmp_path):
    """Also where the recipe does not say that it is to use processors."""
    settings = [("model.scratch.dropout", 0), ("trainer.logging_steps", 1), ("evaluation.baselines", "[popularity]")]
    losses = {}
    for name, batch in (("alone", 8), ("launched", 4)):
        own = [*settings, ("trainer.per_device_train_batch_size", batch)]
        told = ["--out", str(tmp_path / name), *(f"--set={key}={value}" for key, value in own)]
        program = [sys.executable, "-m", "llm_itemtok", "run", str(recipe), *told]
        if name == "launched":
            launcher = ["-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu-2.yaml")]
            program = [sys.executable, *launcher, "--main_process_port", str(free_port()), *program[1:]]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses["alone"]) == 4
    assert losses["launched"] == pytest.approx(losses["alone"], rel=1e-5)


def test_what_the_tests_shard_with_is_what_the_file_says(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    variables = launched_with(FOLDER / "fsdp2.yaml")
    assert {name: variables[name].lower() for name in LAUNCHED} == {n: value.lower() for n, value in LAUNCHED.items()}
    with monkeypatch.context() as patched:
        for name in LAUNCHED:
            patched.setenv(name, variables[name])
        assert asks_for_fsdp({})


def test_fsdp_in_processes_on_cpus_is_refused_by_check_and_at_launch(recipe, monkeypatch, capsys, tmp_path):
    """Accelerate would train without it and not say so."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    for command in (["check", str(recipe)], ["run", str(recipe), "--out", str(tmp_path / "run")]):
        assert main([*command, "--set", "trainer.use_cpu=true"]) == 2
        said = capsys.readouterr().err
        assert "FSDP is asked for, but the processes work on cpu" in said
        assert "recipes/accelerate/cpu-2.yaml" in said
    assert not (tmp_path / "run").exists()


def test_stages_before_training_need_no_engine(recipe, monkeypatch):
    """Codes can be made where no GPU is, of a recipe that will be trained where some are."""
    refuse_engine(RunConfig.load(recipe, ["trainer.fsdp=true"]), here=False)
    with pytest.raises(RecipeError, match="the processes work on cpu"):
        refuse_engine(RunConfig.load(recipe, ["trainer.fsdp=true"]), here=True)


NF4 = ("model.quantization=nf4", "model.adapter=lora", "model.name=some/model", "model.dtype=bfloat16")
REFUSED = [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), "DeepSpeed is asked for, but nothing"),
    ({}, ("trainer.deepspeed=ds.json",), "DeepSpeed is asked for, but nothing"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, (), "Megatron-LM is asked for"),
    ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, (), "`parallelism_config_tp_size` .* must be 1, was: 2"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, (), "`mixed_precision: bf16` would train what the recipe does not say"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ("trainer.bf16=true",), "write `trainer.fp16: true` in the recipe"),
    (LAUNCHED, ("update.kind=self-improve", "examples.tasks.title-to-item=0.2"), "take weights back, which FSDP"),
    (LAUNCHED, NF4, "FSDP cannot cut packed"),
    (LAUNCHED, ("objective={kind: token-weighted}",), "`objective.mix: learned` is read between the steps"),
    (LAUNCHED | {"FSDP_VERSION": "1"}, (), "`fsdp_version` must be 2, was: 1"),
    (LAUNCHED | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, (), "`fsdp_state_dict_type` must be FULL_STATE_DICT"),
    (LAUNCHED | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, (), "they leave the frozen weights out"),
    (LAUNCHED | {"FSDP_OFFLOAD_PARAMS": "true"}, (), "`fsdp_cpu_offload` must be false, was: true"),
    ({}, ("trainer.fsdp=true", "trainer.fsdp_config={fsdp_version: 1}"), "`fsdp_version` must be 2, was: 1"),
    ({}, ("trainer.fsdp=true", "trainer.fsdp_config={activation_checkpointing: true}"), f"`trainer.{CHECKPOINTING}"),
]  # fmt: skip


@pytest.mark.parametrize(("launcher", "overrides", "message"), REFUSED)
def test_what_an_engine_cannot_do_is_refused_with_the_reason(recipe, monkeypatch, launcher, overrides, message):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=message):
        refuse_engine(RunConfig.load(recipe, overrides), here=False)


def test_without_an_engine_nothing_is_refused(recipe, monkeypatch):
    refuse_engine(RunConfig.load(recipe), here=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    refuse_engine(RunConfig.load(recipe, ["trainer.bf16=true"]), here=True)
    assert PartialState().num_processes == 1

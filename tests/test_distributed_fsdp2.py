"""FSDP2 trains what DDP does: the engine is real, on two CPU processes (`tests.sharded_on_cpu` says how)."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from llm_itemtok.artifacts import read_json
from tests.sharded_on_cpu import run_pair

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {levels: 2, codebook_size: 8}
model:
  name: scratch
  scratch: {layers: 2, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}
examples: {history_length: 8, tasks: {next-item: 1.0, title-to-item: 0.2, item-to-title: 0.1}}
trainer: {max_steps: 20, per_device_train_batch_size: 8, learning_rate: 5.0e-3, logging_steps: 1, use_cpu: true}
evaluation: {every: 0.5, baselines: [popularity]}
"""
VARIANTS = {
    "full": (),
    "lora": ("model.adapter=lora",),
    # Many a batch has text targets alone in one process, so no effect of histories to compute there.
    "effects": (
        "objective={kind: token-weighted, mix: frozen, targets: [{kind: counterfactual}]}",
        "examples.tasks={next-item: 1.0, title-to-item: 1.0, item-to-title: 3.0}",
        "examples.kind=windows",
        "trainer.per_device_train_batch_size=2",
    ),
}


def lines(folder):
    """The log of the training, without the summary of its times."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in logged if "train_runtime" not in line]


def assert_alike(ours, theirs):
    """Loss, its terms and the norm of the gradient, step by step."""
    assert len(ours) == len(theirs) >= 20
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("llama", "untied"), ("t5", "tied")])
def test_twenty_steps_are_those_of_ddp_whatever_the_batches_use(tmp_path, family, tied):
    """Some batches have no text target, so no gradient of the head over words, in one process or in both."""
    for engine in ("ddp", "fsdp2"):
        run_pair(engine, "steps", tmp_path / engine, family, tied)
    assert_alike(lines(tmp_path / "fsdp2"), lines(tmp_path / "ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sharded_run_leaves_the_bundle_and_the_metrics_of_a_plain_one_also_when_resumed(tmp_path, variant):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    changes = [word for change in VARIANTS[variant] for word in ("--set", change)]

    def go(engine, *more):
        run_pair(engine, "itemtok", "run", recipe, "--out", tmp_path / engine, "--until", "evaluate", *changes, *more)
        return tmp_path / engine

    ddp, sharded = go("ddp"), go("fsdp2")
    assert_alike(lines(sharded), lines(ddp))
    assert read_json(sharded / "metrics.json")["test"] == read_json(ddp / "metrics.json")["test"]
    weights = load_file(sharded / "model" / "model.safetensors")
    assert_close(weights, load_file(ddp / "model" / "model.safetensors"), rtol=1e-5, atol=1e-6)
    if variant != "full":
        return
    before = lines(sharded)
    newest = max((sharded / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(newest)
    go("fsdp2", "--from", "train", "--resume")
    assert lines(sharded) == before
    again = load_file(sharded / "model" / "model.safetensors")
    assert_close(again, weights, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scoring", "alike"), [("{kind: tokens}", 20), ("{kind: recursive, guidance: both, embedding: 8}", 2)]
)
def test_in_half_precision_gradients_are_added_up_and_losses_told_in_float32(tmp_path, scoring, alike):
    """Weights are gathered in bfloat16, also for validation; only rounding may tell the engines apart.

    A recursive model chooses codewords by rounded weights here and by exact ones under DDP, so after a few steps it is
    another training: that it trains and validates is what can be asked.
    """
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    changes = ("--set", f"scoring={scoring}", "--set", "trainer.bf16=true", "--set", "vocab.init=codebook")
    for engine in ("ddp", "fsdp2"):
        run_pair(engine, "itemtok", "run", recipe, "--out", tmp_path / engine, "--until", "evaluate", *changes)
    ours, theirs = (
        [line["loss"] for line in lines(tmp_path / engine) if "loss" in line] for engine in ("fsdp2", "ddp")
    )
    assert len(ours) == 20
    assert ours[:alike] == pytest.approx(theirs[:alike], rel=0.02)
    assert ours[-1] < ours[0]
    assert ours != theirs

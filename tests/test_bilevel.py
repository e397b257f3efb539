"""Bi-level updates as a recipe: from data to report in both families, and refused where they cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.quantizers import load_quantizer
from llm_itemtok.model.soft_inputs import SoftInputs
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.run import run
from llm_itemtok.recommender import Recommender
from llm_itemtok.training.arguments import CHECKPOINTING
from tests.process_pairs import run_in_two_processes

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: rqvae, levels: 2, codebook_size: 16, latent: 4, hidden: [8], epochs: 10, batch_size: 20}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 0}}
vocab: {init: normal}
examples: {history_length: 8}
update: {kind: bilevel, every: {steps: 3}, learning_rate: 0.05}
trainer: {max_steps: 12, per_device_train_batch_size: 16, learning_rate: 5.0e-3, logging_steps: 2, use_cpu: true}
evaluation: {every: 1.0, baselines: [popularity]}
"""


def recipe(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return RunConfig.load(path, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.scratch.family=t5", "model.scratch.head_dim=4", "examples.kind=windows", "update.residual=release",
         "update.order=1", "update.surgery=bloger-release", "tokenizer.collisions=reassign", "evaluation.every=0.1"),
        pytest.param(
            ("model.adapter=lora", "model.scratch.pretrain_epochs=1", "update.order=2", "objective.normaliser=vocab",
             "tokenizer={kind: residual-kmeans, levels: 2, codebook_size: 8}", "objective.kind=token-weighted",
             "examples.tasks={next-item: 1.0, title-to-item: 0.3}"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("update.look_ahead=0", "update.surgery=none", "tokenizer.alignment=0.02", "update.every.steps=1",
             "tokenizer.collaborative={kind: collaborative, source: co-occurrence, dimensions: 4}"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["llama", "t5-release", "lora-kmeans", "joint-letter"],
)  # fmt: skip
def test_every_choice_runs_from_data_to_report(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """The bundle has the quantizer that belongs to its codes: it reads them off the item vectors."""
    config = recipe(tmp_path, *overrides)
    assert "the quantizer takes a step every" in check(config)
    out = run(config, tmp_path / "run")
    versions = sorted(path.name for path in (out / "codes").iterdir())
    newest = ItemCodes.load(out / "codes" / versions[-1])
    assert ItemCodes.load(out / "model") == newest
    assert newest.is_injective
    lines = [json.loads(line) for line in (out / "updates.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == config.update.every.steps
    assert {"losses", "conflict", "collisions", "displaced"} <= lines[0].keys()
    assert all(1 / newest.sizes[level] <= peak <= 1 for level, peak in enumerate(lines[0]["peaks"]))
    assert len(lines[0]["peaks"]) == 2
    quantizer, before = load_quantizer(out / "model"), load_quantizer(out / "codes/v0")
    if versions[-1] != "v0":
        assert np.array_equal(
            quantizer.codebooks.detach(), load_quantizer(out / "codes" / versions[-1]).codebooks.detach()
        )
        assert not np.array_equal(quantizer.codebooks.detach(), before.codebooks.detach())
    assert len(Recommender.from_pretrained(out).recommend([], k=5)) == 5
    assert "Gradients of recommendation and of reconstruction" in (out / "report.html").read_text()


def test_rows_that_learn_as_they_are_read_and_a_quantizer_that_does_not_are_training_with_fixed_codes(tmp_path: Path):
    """Mixtures and look-aheads leave no trace then."""
    still = run(recipe(tmp_path, "update.gradient=own", "update.learning_rate=0"), tmp_path / "still", until="evaluate")
    fixed = run(recipe(tmp_path, "update={kind: fixed}"), tmp_path / "fixed", until="evaluate")
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (still, fixed)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weight, weights[1][name], rtol=0, atol=0, err_msg=name)
    metrics = [json.loads((folder / "metrics.json").read_text())["test"] for folder in (still, fixed)]
    assert metrics[0] == metrics[1]


def test_settings_of_steps_reach_what_they_are_of(tmp_path: Path, monkeypatch) -> None:
    """One step; rows that learn as they are read; a margin so wide that nothing moves."""
    settings = ("update.rounds=1", "update.margin=1.0e+6", "update.gradient=own", "update.learning_rate=0.1")
    made, make = [], SoftInputs.__init__

    def remembered(self, *args, own, **more):
        made.append(own)
        make(self, *args, own=own, **more)

    monkeypatch.setattr(SoftInputs, "__init__", remembered)
    config = recipe(tmp_path, *settings)
    assert ", 1 in all; codes follow" in check(config)
    out = run(config, tmp_path / "run", until="train")
    (line,) = [json.loads(line) for line in (out / "updates.jsonl").read_text().splitlines()]
    assert line["moves"] == 0
    assert made == [True]
    before, after = (load_quantizer(out / place).codebooks.detach() for place in ("codes/v0", "model"))
    assert (after - before).abs().max().item() == pytest.approx(0.1, rel=1e-3)  # of AdamW, a first step is its rate


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer={kind: random}", "`tokenizer.kind: random` leaves none; use rqvae, residual-kmeans or product"),
        ("tokenizer={kind: hierarchical}", "`tokenizer.kind: hierarchical` leaves none"),
        ("scoring={kind: recursive}", "reads items as their tokens and nothing else"),
        ("scoring={kind: tokens, item_embedding: 4}", "reads items as their tokens and nothing else"),
        ("trainer.fsdp=true", "`trainer.fsdp` shards what `update.kind: bilevel`"),
        (f"trainer.{CHECKPOINTING}=true", "computes states anew with the model as it is"),
        ("update.every={steps: 3, epochs: 1}", "either {steps: N} or {epochs: N}"),
        ("update.order=3", "must be one of"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, override)


def test_a_second_order_needs_a_model_that_can_be_differentiated_twice(tmp_path: Path) -> None:
    quantized = ("model.name=some/model", "model.quantization=nf4", "model.dtype=bfloat16", "model.adapter=lora")
    with pytest.raises(RecipeError, match=r"write `update\.order: 1`"):
        recipe(tmp_path, *quantized)
    recipe(tmp_path, *quantized, "update.order=1")
    recipe(tmp_path, *quantized, "update.look_ahead=0")


def test_an_interval_longer_than_the_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="comes after 12 steps, but training has 12"):
        check(recipe(tmp_path, "update.every.steps=12"))


@pytest.mark.slow
def test_two_processes_carry_the_steps_out_together(tmp_path: Path) -> None:
    """They share batches and gradients, and write once; `tests/training/test_bilevel.py` compares them with one."""
    recipe(tmp_path)
    out = tmp_path / "pair"
    flags = ["--set", "trainer.per_device_train_batch_size=8", "--until", "train"]
    for status, errors in run_in_two_processes(tmp_path / "tiny.yaml", "--out", str(out), *flags):
        assert status == 0, errors
    lines = [json.loads(line) for line in (out / "updates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9]
    newest = max((out / "codes").iterdir(), key=lambda path: int(path.name[1:]))
    assert ItemCodes.load(out / "model") == ItemCodes.load(newest)

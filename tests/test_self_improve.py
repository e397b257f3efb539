"""Self-improvement as a recipe: from data to report in both families, refused where it cannot be, exact on resuming."""

import json
from pathlib import Path

import pytest

from llm_itemtok.config import RunConfig
from llm_itemtok.data import synthetic
from llm_itemtok.errors import DataError, RecipeError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.run import run
from llm_itemtok.recommender import Recommender
from llm_itemtok.training.self_improve import SelfImprove
from tests.process_pairs import run_in_two_processes

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: residual-kmeans, levels: 2, codebook_size: 16, collisions: reassign}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}}
examples: {history_length: 8, tasks: {next-item: 1.0, title-to-item: 0.3}}
update: {kind: self-improve, source: both, every: {steps: 5}, outliers: 0.2, candidates: 4}
trainer: {max_steps: 14, per_device_train_batch_size: 16, learning_rate: 5.0e-3, logging_steps: 2, use_cpu: true}
evaluation: {every: 0.4, baselines: [popularity]}
"""
T5 = ("model.scratch.family=t5", "model.scratch.head_dim=4", "examples.kind=windows", "update.contexts=3",
      "update.gate=none", "update.every.steps=4", "evaluation.every=0.05")  # fmt: skip
GATED = ("update.adapt=0.2", "update.tolerance=0.9")
UNTIMED = ("pass_seconds", "training_seconds", "pass_share")


def recipe(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return RunConfig.load(path, overrides)


def rounds(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in UNTIMED} for line in lines]


@pytest.mark.parametrize(
    "overrides",
    [
        (*GATED, "update.gate=likelihood", "update.rows=refresh", "update.vectors_weight=0.5"),
        ("update.source=random", "update.gate=none", "tokenizer.kind=random", "vocab.init=normal"),
        (*GATED, "update.scope=all", "update.assignment=matching", "update.price=0.1", "model.adapter=lora",
         "objective.normaliser=vocab", "update.groups=2", "update.diversity=0.5", "update.usage_penalty=0.3"),
        T5,
        (*GATED, "objective.kind=token-weighted", "tokenizer.collisions=extra-level", "update.source=embeddings"),
    ],
    ids=["likelihood-refresh", "random", "all-lora-vocab", "t5", "token-weighted-extra-level"],
)  # fmt: skip
def test_every_choice_runs_from_data_to_report(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = recipe(tmp_path, *overrides)
    assert "item tokens are updated every" in check(config)
    out = run(config, tmp_path / "run")
    versions = sorted(path.name for path in (out / "codes").iterdir())
    newest = ItemCodes.load(out / "codes" / versions[-1])
    assert ItemCodes.load(out / "model") == newest
    assert newest.is_injective
    assert rounds(out)[0]["moves"] > 0
    assert all((out / "codes" / name / "trace.parquet").is_file() for name in versions[1:])
    metrics, quality = (
        json.loads((out / name).read_text()) for name in ("metrics.json", f"codes/{versions[-1]}/quality.json")
    )
    assert metrics["codes"] == quality
    assert len(Recommender.from_pretrained(out).recommend([], k=5)) == 5
    assert "Updates of item tokens" in (out / "report.html").read_text()


def test_a_run_that_is_resumed_leaves_what_an_uninterrupted_one_does(tmp_path: Path, monkeypatch) -> None:
    """Killed when the second round begins; the checkpoint before it was written where the trial of the first ended."""
    settings = (*GATED, "update.rounds=2", "update.every.steps=4", "evaluation.every=0.2")
    straight = run(recipe(tmp_path, *settings), tmp_path / "straight", until="evaluate")

    propose = SelfImprove.propose

    def killed(self, moment):
        if moment.step == 8:
            raise KeyboardInterrupt
        return propose(self, moment)

    with monkeypatch.context() as patch:
        patch.setattr(SelfImprove, "propose", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(tmp_path, *settings), tmp_path / "killed", until="evaluate")
    said = []
    out = run(recipe(tmp_path, *settings), tmp_path / "killed", until="evaluate", resume=True, log=said.append)
    assert "  resumed from checkpoint-7" in said
    assert rounds(out) == rounds(straight)
    assert len(rounds(out)) == 2
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (straight, out))
    assert first["test"] == second["test"]
    assert first["codes"] == second["codes"]
    assert (out / "model/item_codes.safetensors").read_bytes() == (
        straight / "model/item_codes.safetensors"
    ).read_bytes()


def test_a_training_too_short_for_a_round_is_refused_by_check_and_by_run(tmp_path: Path) -> None:
    config = recipe(tmp_path, *GATED, "update.every.steps=13")
    for refused in (lambda: check(config), lambda: run(config, tmp_path / "run")):
        with pytest.raises(RecipeError, match=r"leave room for a round, which takes 16 steps, but training has 14"):
            refused()


def test_without_titles_reading_them_is_refused_and_learnt_states_will_do(tmp_path: Path) -> None:
    catalog, interactions, _ = synthetic.generate(num_items=60, num_users=80, seed=0)
    synthetic.write_folder(catalog, interactions, tmp_path / "data")
    items = [json.loads(line)["item_id"] for line in (tmp_path / "data/items.jsonl").read_text().splitlines()]
    (tmp_path / "data/items.jsonl").write_text(
        "".join(json.dumps({"item_id": item, "title": None}) + "\n" for item in items)
    )
    text = RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {tmp_path / 'data'}")
    (tmp_path / "tiny.yaml").write_text(text.replace("pretrain_epochs: 1", "pretrain_epochs: 0"))
    textless = ("vectors.kind=collaborative", "vectors.source=co-occurrence", "vocab.init=codebook")
    with pytest.raises(DataError, match=r"examples\.tasks\.title-to-item"):
        check(RunConfig.load(tmp_path / "tiny.yaml", textless))
    config = RunConfig.load(
        tmp_path / "tiny.yaml", [*textless, *GATED, "update.source=embeddings", "examples.tasks.title-to-item=0"]
    )
    assert rounds(run(config, tmp_path / "run", until="train"))[0]["moves"] > 0


@pytest.mark.slow
def test_two_processes_carry_rounds_out_together(tmp_path: Path) -> None:
    """They train on the same batches, propose, judge and take back as one, and write once."""
    settings = (*GATED, "update.every.steps=4", "trainer.per_device_train_batch_size=8", "update.rounds=2")
    recipe(tmp_path, *settings)
    out = tmp_path / "run"
    flags = ["--out", str(out), *(word for setting in settings for word in ("--set", setting))]
    for status, errors in run_in_two_processes(tmp_path / "tiny.yaml", *flags):
        assert status == 0, errors
    together = rounds(out)
    assert len(together) == 2
    assert [(line["step"], line["decided"], line["accepted"]) for line in together] == [(4, 7, True), (8, 11, True)]
    assert all(line["moves"] == 12 for line in together)
    versions = sorted(path.name for path in (out / "codes").iterdir())
    assert ItemCodes.load(out / "model") == ItemCodes.load(out / "codes" / versions[-1])

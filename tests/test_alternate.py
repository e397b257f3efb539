"""ETEGRec as a recipe: from data to report in both families, refused where it cannot be, exact on resuming."""

import json
from pathlib import Path

import pytest
import torch

from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.prepare import item_vectors, load_data
from llm_itemtok.pipeline.run import run
from llm_itemtok.recommender import Recommender
from llm_itemtok.training.alternate import Alternate
from tests.process_pairs import run_in_two_processes

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: collaborative, source: co-occurrence, dimensions: 8}
tokenizer: {kind: rqvae, levels: 2, codebook_size: 12, latent: 4, hidden: [12], epochs: 10, collisions: reassign}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}}
examples: {history_length: 8}
update:
  kind: alternate
  every: {steps: 4}
  rounds: 3
  warmup: 0
  batch_size: 32
  learning_rate: 0.01
trainer: {max_steps: 14, per_device_train_batch_size: 16, learning_rate: 5.0e-3, logging_steps: 1, use_cpu: true}
evaluation: {every: 0.4, baselines: [popularity]}
"""
T5 = ("model.scratch.family=t5", "model.scratch.head_dim=4", "examples.kind=windows", "evaluation.every=0.05")
UNTIMED = ("pass_seconds", "training_seconds", "pass_share", "learning_seconds", "coding_seconds")


def recipe(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return RunConfig.load(path, overrides)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounds(folder: Path) -> list[dict]:
    """Without what differs from machine to machine."""
    return [{n: v for n, v in line.items() if n not in UNTIMED} for line in lines(folder / "updates.jsonl")]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (*T5, "tokenizer.collisions=extra-level"),
        pytest.param(("update.schedule=joint", "update.variant=release", "update.pool=last",
                      "objective.kind=token-weighted"), marks=pytest.mark.slow),
        pytest.param(("model.adapter=lora", "examples.tasks.title-to-item=0.3", "update.first=false",
                      "update.sequence=0", "objective.normaliser=vocab",
                      "tokenizer={kind: residual-kmeans, levels: 2, codebook_size: 12}"), marks=pytest.mark.slow),
    ],
    ids=["decoder", "t5-extra-level", "joint-release-token-weighted", "lora-residual-kmeans"],
)  # fmt: skip
def test_every_choice_runs_from_data_to_report(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = recipe(tmp_path, *overrides)
    assert "every 4 steps, 3 times at most; item tokens" in check(config)
    out = run(config, tmp_path / "run")
    assert 2 <= len(rounds(out)) <= 3
    newest = ItemCodes.load(max((out / "codes").iterdir(), key=lambda path: int(path.name[1:])))
    assert ItemCodes.load(out / "model") == newest
    assert newest.is_injective
    terms = [line for line in lines(out / "metrics.jsonl") if "loss/alignment/preference" in line]
    assert terms
    assert all(line["loss/alignment/preference"] > 0 for line in terms)
    assert len(Recommender.from_pretrained(out).recommend([], k=5)) == 5
    report = (out / "report.html").read_text()
    assert "Updates of item tokens" in report
    assert "Alignments in the quantizer" in report


def test_the_bundle_has_the_quantizer_that_its_codes_are_read_off(tmp_path: Path) -> None:
    out = run(recipe(tmp_path, "tokenizer.collisions=extra-level"), tmp_path / "run", until="train")
    found = Recommender.from_pretrained(out / "model")
    begun = ItemCodes.load(out / "codes" / "v0")
    config = RunConfig.load(out / "recipe.yaml")
    data = load_data(config.data, config.seed, {})
    vectors = torch.from_numpy(item_vectors(config, data, out, lambda _line: None))
    assert found.quantizer is not None
    codes = ItemCodes.load(out / "model")
    assert codes != begun
    assert torch.equal(found.quantizer.encode(vectors).int(), torch.from_numpy(codes.table[:, :2].copy()))


def test_a_run_that_is_resumed_leaves_what_an_uninterrupted_one_does(tmp_path: Path, monkeypatch) -> None:
    """Killed when the third turn begins; the checkpoint before it lies inside the second cycle."""
    inside = "evaluation.every=0.3"
    straight = run(recipe(tmp_path, inside), tmp_path / "straight", until="evaluate")
    propose = Alternate.propose

    def killed(self, moment):
        if moment.step == 8:
            raise KeyboardInterrupt
        return propose(self, moment)

    monkeypatch.setattr(Alternate, "propose", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(tmp_path, inside), tmp_path / "resumed", until="evaluate")
    monkeypatch.setattr(Alternate, "propose", propose)
    said = []
    resumed = run(recipe(tmp_path, inside), tmp_path / "resumed", until="evaluate", resume=True, log=said.append)
    assert "  resumed from checkpoint-6" in said
    assert rounds(resumed) == rounds(straight)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (resumed, straight))
    assert ours["test"] == theirs["test"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer={kind: random}", "vocab.init=normal"], "trains the quantizer behind the codes"),
        (["tokenizer={kind: hierarchical}"], "use rqvae, residual-kmeans or product"),
        (["scoring.kind=recursive"], "reads items as their tokens"),
        (["trainer.fsdp=full_shard"], "shards what `update.kind: alternate`"),
        (["examples.tasks={next-item: 0, title-to-item: 1}"], "aligns histories with the items"),
        (["update.patience=4", "evaluation.patience=4"], "must be below `evaluation.patience`"),
        (["update.variant=release", "update.sequence=0"], "is of the first alignment"),
        (
            ["update.sequence=0", "update.quantizer_sequence=0.1"],
            r"needs `update\.sequence` above 0, .* 0\.1 and 0",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, *overrides)


def test_a_training_too_short_for_a_cycle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="turns are 40 steps apart, but training has 14"):
        check(recipe(tmp_path, "update.every.steps=40"))


def test_settings_of_the_quantizers_turn_reach_it(tmp_path: Path) -> None:
    """Weights of its own, means, a margin so wide that nothing moves; the model's stay what they are."""
    settings = ("update.sequence=0.5", "update.quantizer_sequence=0", "update.quantizer_preference=7.0",
                "update.losses=means", "update.margin=1.0e+6")  # fmt: skip
    out = run(recipe(tmp_path, *settings), tmp_path / "run", until="train")
    taught = [line for line in rounds(out) if line["aligned"]]
    assert taught
    assert all(line["losses"]["alignment/sequence"] == 0 for line in taught)
    assert all(line["losses"]["alignment/preference"] > 7 for line in taught)
    assert all(line["moves"] == 0 for line in rounds(out))
    assert any(line.get("loss/alignment/sequence", 0) > 0 for line in lines(out / "metrics.jsonl"))


def test_a_quantizer_that_would_never_hear_the_alignments_is_told_of(tmp_path: Path) -> None:
    assert "never hears the alignments" not in check(recipe(tmp_path))
    assert "never hears the alignments; lower `update.warmup`" in check(recipe(tmp_path, "update.rounds=1"))
    # Turns are at 0, 4 and 8, and it is taught from step 9 on, before cycles end at 12.
    assert "never hears the alignments" in check(recipe(tmp_path, "update.warmup=0.45"))
    assert "never hears" not in check(recipe(tmp_path, "update.warmup=0.45", "update.schedule=joint"))


def test_a_way_to_pool_that_a_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`update\.pool: last` is for decoder-only models"):
        run(recipe(tmp_path, *T5, "update.pool=last"), tmp_path / "run", until="train")


@pytest.mark.slow
def test_two_processes_take_turns_together(tmp_path: Path) -> None:
    """They train on the same batches, read the same codes, and write once."""
    alone = run(recipe(tmp_path, "model.scratch.dropout=0"), tmp_path / "alone", until="train")
    settings = ("model.scratch.dropout=0", "trainer.per_device_train_batch_size=8")
    flags = ["--out", str(tmp_path / "pair"), "--until", "train"]
    flags += [word for setting in settings for word in ("--set", setting)]
    for status, errors in run_in_two_processes(tmp_path / "tiny.yaml", *flags):
        assert status == 0, errors
    assert len(rounds(tmp_path / "pair")) == 3
    for ours, theirs in zip(rounds(tmp_path / "pair"), rounds(alone), strict=True):
        assert (ours["step"], ours["moves"], ours["churn"]) == (theirs["step"], theirs["moves"], theirs["churn"])
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)

"""Checkpoints: one that is not whole is told and never gone on from, and old ones go only when a newer one stands."""

import json
import shutil

import pytest

from llm_itemtok.config import RunConfig
from llm_itemtok.pipeline.run import run
from llm_itemtok.training.checkpoints import CHECKSUMS, SHARDED, _delete_old, damage, foreign, newest_whole, seal

RECIPE = """
data: {source: synthetic, items: 40, users: 40}
vectors: {kind: tfidf-svd, dimensions: 8}
tokenizer: {levels: 2, codebook_size: 8}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 0}}
examples: {history_length: 6}
trainer: {max_steps: 8, per_device_train_batch_size: 8, learning_rate: 5.0e-3, logging_steps: 1, use_cpu: true}
evaluation: {every: 0.2, baselines: [popularity]}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    run(RunConfig.load(path, ("trainer.save_total_limit=null",)), folder / "run", until="train")
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """Goes on with a copy of the finished run, after `spoil` has been at its checkpoints."""
    shutil.copytree(finished, tmp_path / "copy")
    config = RunConfig.load(tmp_path / "copy" / "tiny.yaml", ("trainer.save_total_limit=null",))

    def going_on(spoil):
        out, said = tmp_path / "copy" / "run", []
        weights = (out / "model" / "model.safetensors").read_bytes()
        spoil(out / "checkpoints")
        run(config, out, start="train", until="train", resume=True, log=said.append)
        assert (out / "model" / "model.safetensors").read_bytes() == weights
        return "\n".join(said)

    return going_on


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_every_checkpoint_is_sealed_and_every_change_of_a_file_is_seen(finished, tmp_path):
    folder = finished / "run" / "checkpoints"
    assert len(steps(folder)) >= 3
    for step in steps(folder):
        assert damage(folder / f"checkpoint-{step}") is None
    names = sorted(json.loads((folder / f"checkpoint-{steps(folder)[0]}" / CHECKSUMS).read_text()))
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        for change in (flip, lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])):
            copy = tmp_path / "copy"
            shutil.copytree(folder / f"checkpoint-{steps(folder)[0]}", copy)
            change(copy / name)
            assert name in damage(copy)
            shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", CHECKSUMS])
def test_a_damaged_checkpoint_is_named_and_the_one_before_gone_on_from_to_the_same_end(again, name):
    went_on_from = []

    def spoil(folder):
        newest = steps(folder)[-1]
        flip(folder / f"checkpoint-{newest}" / name)
        went_on_from.append(steps(folder)[-2])

    said = again(spoil)
    assert "cannot be gone on from: " in said
    assert f"  resumed from checkpoint-{went_on_from[0]}\n" in said


def test_a_checkpoint_whose_best_one_is_damaged_is_not_gone_on_from(again):
    def spoil(folder):
        state = json.loads((folder / f"checkpoint-{steps(folder)[-1]}" / "trainer_state.json").read_text())
        flip(folder / state["best_model_checkpoint"].rpartition("/")[2] / "model.safetensors")

    said = again(spoil)
    assert "is damaged: model.safetensors is not what was written" in said or "nothing to resume from" in said


def test_with_nothing_whole_training_starts_over(again):
    def spoil(folder):
        for step in steps(folder):
            (folder / f"checkpoint-{step}" / CHECKSUMS).unlink()

    said = again(spoil)
    assert "it was not written to its end" in said
    assert "nothing to resume from" in said


KEPT = [("checkpoint-9", 2, [8, 9]), ("checkpoint-2", 2, [2, 9]), (None, 2, [8, 9]), ("checkpoint-2", 3, [2, 8, 9])]


@pytest.mark.parametrize(("best", "keep", "left"), KEPT)
def test_the_best_and_the_newest_stay(tmp_path, best, keep, left):
    for step in (1, 2, 8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-7.tmp").mkdir()
    _delete_old(tmp_path, keep, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["checkpoint-7.tmp", *(f"checkpoint-{step}" for step in left)]
    )


@pytest.mark.parametrize(
    "settings",
    [
        ("trainer.max_steps=8",),  # within an epoch, where the library would train a ninth
        ("trainer.max_steps=10",),
        ("evaluation.patience=1", "trainer.learning_rate=0.0"),  # nothing gets better, so patience ends it early
        ("trainer.num_train_epochs=2", "trainer.max_steps=-1", "evaluation.every=1"),
    ],
)
def test_a_run_killed_behind_its_last_checkpoint_trains_no_more(finished, tmp_path, settings):
    """The weights, the steps and the log are those of the run that was not; its bundle was never written."""
    config = RunConfig.load(finished / "tiny.yaml", settings)
    out = run(config, tmp_path / "run", until="train")
    before = {name: (out / name).read_bytes() for name in ("model/model.safetensors", "metrics.jsonl")}
    facts = json.loads((out / "training.json").read_text())
    said = []
    run(config, out, start="train", until="train", resume=True, log=said.append)
    assert any("resumed from" in line for line in said)
    again = json.loads((out / "training.json").read_text())
    untimed = [name for name in facts if name not in ("seconds", "peak_mb", "made_by")]
    assert {name: again[name] for name in untimed} == {name: facts[name] for name in untimed}
    assert (out / "model/model.safetensors").read_bytes() == before["model/model.safetensors"]
    trained = [line for line in before["metrics.jsonl"].decode().splitlines() if "train_runtime" not in line]
    assert [line for line in (out / "metrics.jsonl").read_text().splitlines() if "train_runtime" not in line] == trained


def test_training_that_is_cut_up_in_another_way_is_no_way_to_go_on(finished, tmp_path):
    """Another number of processes is another batch, and the library passes over an optimiser that it does not find."""
    folder = finished / "run" / "checkpoints"
    newest = folder / f"checkpoint-{steps(folder)[-1]}"
    assert foreign(newest, processes=1, sharded=False) is None
    assert "it began with 1, was: 2; launch 1" in foreign(newest, processes=2, sharded=False)
    assert "it began without FSDP, was: with it" in foreign(newest, processes=1, sharded=True)
    (tmp_path / SHARDED).touch()
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    assert foreign(tmp_path, processes=2, sharded=True) is None
    assert "it began with FSDP, was: without it" in foreign(tmp_path, processes=2, sharded=False)
    assert "it began with 2, was: 1; launch 2" in foreign(tmp_path, processes=1, sharded=True)


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert newest_whole(tmp_path / "none", print) is None
    (tmp_path / "checkpoint-3").mkdir()
    seal(tmp_path / "checkpoint-3")
    assert damage(tmp_path / "checkpoint-3") is None

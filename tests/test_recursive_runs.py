"""Recipes with a recursive network or embeddings of items, from `check` to the report: refused, resumed, extended."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from llm_itemtok.cli import main
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.fit import make_examples
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.run import run
from llm_itemtok.pipeline.scoring import items_read, path_figures
from llm_itemtok.pipeline.vectors import needs_vectors
from llm_itemtok.recommender import Recommender
from llm_itemtok.report.paths import charts
from llm_itemtok.report.run_folder import read_run
from llm_itemtok.training.callbacks import read_log
from llm_itemtok.training.examples import TASKS
from tests.recursive import COLD, recursive_model
from tests.test_extend import new_items
from tests.test_pipeline import T5, recipe

RECURSIVE = ("scoring.kind=recursive", "scoring.embedding=8", "scoring.hidden=16", "trainer.max_steps=4")
TEXT_TASKS = "examples.tasks={next-item: 1.0, title-to-item: 0.5, item-to-title: 0.5}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.normaliser=vocab"], "needs `objective.normaliser: level` or `children`, was: vocab"),
        (["evaluation.decode_normaliser=items"], "must be same, level or children"),
        (["objective.normaliser=children", "evaluation.decode_normaliser=level"], "`children`, was: level"),
        (["tokenizer.kind=numeric", "objective.normaliser=vocab"], "needs item tokens, and `tokenizer.kind: numeric`"),
        (["objective.kind=token-weighted", "objective.targets=[{kind: counterfactual}]"], "leave it out"),
        (["scoring.guidance=vectors", "scoring.embedding=8"], "applies only"),
        (["scoring.alignment=-1"], "scoring.alignment"),
        (["scoring.mixing=softly"], "scoring.mixing"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(tmp_path, "scoring.kind=recursive", *overrides)


def test_item_embeddings_need_item_tokens(tmp_path):
    with pytest.raises(RecipeError, match=r"`scoring\.item_embedding` needs item tokens"):
        recipe(tmp_path, "scoring.item_embedding=8", "tokenizer.kind=title", "objective.normaliser=vocab")


def test_item_vectors_are_made_where_they_are_read(tmp_path):
    random = ("tokenizer.kind=random", "vocab.init=normal", "scoring.kind=recursive")
    assert not needs_vectors(recipe(tmp_path, *random))
    for guidance in ("vectors", "both"):
        assert needs_vectors(recipe(tmp_path, *random, f"scoring.guidance={guidance}"))


@pytest.mark.parametrize("kind", ["all-positions", "windows", "last"])
@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("tasks", [{"next-item": 1.0}, {"title-to-item": 1.0}, {"item-to-title": 1.0}])
def test_items_are_known_that_a_batch_of_training_holds_before_something_else(tmp_path, kind, length, tasks):
    """Of the others nothing is learnt, and a random vector would be all that is known."""
    said = ", ".join(f"{task}: {tasks.get(task, 0.0)}" for task in TASKS)
    config = recipe(
        tmp_path, f"examples.kind={kind}", f"examples.history_length={length}", f"examples.tasks={{{said}}}", "seed=3"
    )
    data = load_data(config.data, config.seed, {})
    read = np.zeros(len(data.catalog), dtype=bool)
    for example in make_examples(config, data):
        asks = TASKS[example["task"]]
        read[example["items"][:-1] if asks == "next-item" else example["items"] if asks == "item-to-title" else []] = (
            True
        )
    assert np.array_equal(items_read(config.examples, data), read)


def test_check_tells_positions_parameters_and_work_of_what_is_read(tmp_path):
    """One position an item, a table of embeddings, a network at both ends."""
    usual, recursive = (check(recipe(tmp_path, *settings)) for settings in ((), RECURSIVE))
    items, tokens = (
        int(re.search(r"examples, about ([\d,]+) ", text)[1].replace(",", "")) for text in (recursive, usual)
    )
    assert tokens == 3 * items
    assert f"about {items:,} items, a position each an epoch" in recursive
    more = recipe(tmp_path, *RECURSIVE, "scoring.embedding=100000")
    assert re.search(r"trained: about 7\.6\d M", check(more))  # 60 items of 100,000, and what projects them
    longer = recipe(tmp_path, "examples.history_length=900", "model.scratch.width=16", *RECURSIVE)
    assert "900" not in check(longer)  # 901 positions fit where 2,703 would not


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recursive")
    settings = ("scoring.guidance=both", TEXT_TASKS, "trainer.logging_steps=1", "tokenizer.collisions=reassign",
                "tokenizer.codebook_size=9")  # fmt: skip
    return run(recipe(folder, *RECURSIVE, *settings), folder / "run")


def test_a_run_leaves_its_network_its_alignment_and_answers_that_can_be_had_again(finished):
    lines = [line for line in read_log(finished / "metrics.jsonl") if "loss" in line]
    assert all(line["loss/alignment"] > 0 for line in lines)
    assert sum(value for name, value in lines[-1].items() if name.startswith("loss/")) == pytest.approx(
        lines[-1]["loss"]
    )
    loaded = Recommender.from_pretrained(finished)
    assert loaded.model.reads == "items"
    assert len(loaded.recommend([], k=5)) == 5
    metrics = json.loads((finished / "metrics.json").read_text())
    again = run(RunConfig.load(finished / "recipe.yaml"), finished, start="evaluate")
    assert json.loads((again / "metrics.json").read_text())["test"] == metrics["test"]
    assert "It loads through this package only" in (finished / "model/README.md").read_text()
    assert "2602.20704" in (finished / "model/README.md").read_text()


def test_the_report_draws_how_far_vectors_go_by_codes(finished, tmp_path):
    shares = json.loads((finished / "item_paths.json").read_text())
    assert shares["items"] == 60
    assert len(shares["levels"]) == 2
    assert all(0 <= share <= 1 for share in (*shares["levels"], shares["whole"], shares["distinct"]))
    assert shares["whole"] <= min(shares["levels"])
    (chart,) = charts(read_run(finished))
    assert "60 items whose vector" in chart.title
    assert chart.title in (finished / "report.html").read_text()
    (tmp_path / "recipe.yaml").write_text("scoring: {kind: recursive}\n")
    lost = read_run(tmp_path)
    assert charts(lost) == []
    assert any("item_paths.json" in note for note in lost.notes)
    (tmp_path / "recipe.yaml").write_text("scoring: {kind: tokens}\n")
    assert not any("item_paths.json" in note for note in read_run(tmp_path).notes)


def test_shares_count_items_that_have_an_embedding_only():
    """By hand: the network's first choices beside the codes."""
    model, _ = recursive_model()
    codes = model.vocab.codes.table
    found = path_figures(model, batch_size=7)
    rows = [row for row in range(60) if row not in COLD]
    logits = model.recursion.item_side(torch.tensor(rows), torch.from_numpy(codes[rows]).long(), model.codebooks())
    paths = np.stack([scores.argmax(1).numpy() for scores in logits.logits], axis=1)
    assert found["items"] == 58
    assert found["levels"] == pytest.approx((paths == codes[rows]).mean(0).tolist())
    assert found["whole"] == pytest.approx((paths == codes[rows]).all(1).mean())
    assert found["distinct"] == len(np.unique(paths, axis=0)) / 58


def test_new_items_are_read_by_their_vectors_and_old_ones_stay(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    before = Recommender.from_pretrained(out)
    history = list(before.item_ids[:3])
    scores = before.score(history, before.item_ids)
    assert main(["extend", str(out), "--items", str(new_items(tmp_path, "new-1", "new-2"))]) == 0
    assert "2 new items beside 60" in capsys.readouterr().out
    after = Recommender.from_pretrained(out)
    assert after.score(history, before.item_ids) == scores
    items = after.model.recursion.items
    assert items.vectors[60:].abs().sum() > 0
    assert not items.known[60:].any()
    assert {"new-1", "new-2"} < {item.item_id for item in after.recommend(["new-1"], 62)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (*T5, TEXT_TASKS),
        (*T5, "model.adapter=lora", "scoring.guidance=vectors"),
        ("model.adapter=lora", "model.scratch.family=qwen3", "scoring.mixing=soft"),
        ("examples.kind=windows", "tokenizer.levels=1", "scoring.alignment=0.0"),
        ("tokenizer.kind=product", "tokenizer.levels=4", "evaluation.decode_normaliser=children"),
        ("objective.kind=token-weighted", "objective.pace=0.1", "model.input_dropout=0.1"),
        ("update.kind=self-improve", "update.every.steps=2", "update.gate=none",
         "tokenizer.collisions=reassign", "tokenizer.codebook_size=16", TEXT_TASKS),
    ],
    ids=["t5-text", "t5-lora-vectors", "lora-soft", "windows-one-level", "product-children", "token-weighted", "siit"],
)  # fmt: skip
def test_every_combination_runs(tmp_path, overrides):
    guidance = ("scoring.kind=recursive", "scoring.hidden=16", "trainer.max_steps=4")
    embedding = () if "scoring.guidance=vectors" in overrides else ("scoring.embedding=8",)
    out = run(recipe(tmp_path, *guidance, *embedding, *overrides), tmp_path / "run")
    assert len(Recommender.from_pretrained(out).recommend([], k=5)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("further", [(), (*T5, TEXT_TASKS), ("model.adapter=lora",)], ids=["llama", "t5", "lora"])
def test_embeddings_of_items_beside_their_tokens_run(tmp_path, further):
    out = run(recipe(tmp_path, "scoring.item_embedding=8", "trainer.max_steps=4", *further), tmp_path / "run")
    loaded = Recommender.from_pretrained(out)
    assert loaded.model.reads == "named"
    assert loaded.model.own.table.shape == (60, 8)
    assert len(loaded.recommend([], k=5)) == 5
    assert not (out / "item_paths.json").exists()


@pytest.mark.slow
def test_a_resumed_run_leaves_what_an_uninterrupted_one_does(tmp_path):
    """The network is in the checkpoint; what it is made from, such as its scale, is made again as it was."""
    settings = (*RECURSIVE, "trainer.max_steps=10", "evaluation.every=0.2", "model.input_dropout=0.1")
    straight = run(recipe(tmp_path, *settings), tmp_path / "straight", until="evaluate")
    out = run(recipe(tmp_path, *settings), tmp_path / "again", until="evaluate")
    checkpoints = sorted((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(out / "model")
    said = []
    out = run(recipe(tmp_path, *settings), out, start="train", until="evaluate", resume=True, log=said.append)
    assert f"  resumed from {checkpoints[-2].name}" in said
    assert (out / "model/item_network.safetensors").read_bytes() == (
        straight / "model/item_network.safetensors"
    ).read_bytes()

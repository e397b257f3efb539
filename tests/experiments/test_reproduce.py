"""A plan loses nothing: whatever stops it, going on gives the rows of a plan that was never stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest
import yaml

from llm_itemtok import artifacts
from llm_itemtok.cli import main
from llm_itemtok.errors import RecipeError
from llm_itemtok.experiments.book import Book
from llm_itemtok.experiments.plan import LoadedPlan
from llm_itemtok.experiments.pool import Pool
from llm_itemtok.experiments.reproduce import dry_run
from llm_itemtok.experiments.workers import Worker
from llm_itemtok.items.codes import ItemCodes
from tests.process_pairs import PATIENCE

RECIPE = {
    "data": {"source": "synthetic", "items": 60, "users": 80},
    "vectors": {"dimensions": 16},
    "tokenizer": {"levels": 2, "codebook_size": 16},
    "model": {"scratch": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 400, "pretrain_epochs": 1}},
    "trainer": {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 5},
    "evaluation": {"baselines": ["popularity"], "every": 1},
}
PLAN = {
    "name": "demo",
    "question": "Does it work?",
    "datasets": {"shop": {"recipe": "base.yaml"}},
    "arms": {
        "demo": {"title": "k-means"},
        "fresh": {"probe": True, "based_on": "random", "codes_of": "demo"},
        "random": {"control": True, "settings": {"tokenizer": {"kind": "random"}}},
    },
    "tuning": {"dataset": "shop", "seed": 9, "grid": {"trainer.learning_rate": [1e-5, 3e-3]}},
    "confirm": {"seeds": [1]},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "base.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    (folder / "demo.yaml").write_text(yaml.safe_dump(PLAN), encoding="utf-8")
    return folder / "demo.yaml"


def command(plan, place):
    places = ["--results", str(place / "results"), "--runs", str(place / "runs")]
    return [sys.executable, "-m", "llm_itemtok", "reproduce", str(plan), *places]


def wait_until(holds, process):
    """Wait while a process works; it must not have ended before."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert process.poll() is None, f"ended with status {process.returncode}"
        assert time.monotonic() < end, "still waiting"
        time.sleep(0.1)


@contextmanager
def started(*program):
    """A process that is not left behind, whatever happens."""
    with subprocess.Popen(program, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def table(place):
    """The rows without what time and memory decide."""
    rows = artifacts.read_json(place / "results" / "demo.json")
    return [{name: value for name, value in row.items() if name not in ("seconds", "peak_mb")} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(command(plan, place), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.slow
def test_a_plan_leaves_rows_ranks_records_and_a_page(undisturbed):
    results = undisturbed / "results"
    rows = table(undisturbed)
    assert [row["stage"] for row in rows] == ["screen"] * 4 + ["confirm"] * 3
    assert all((row["test"] is None) == (row["stage"] == "screen") for row in rows)
    assert {row["seed"] for row in rows if row["stage"] == "screen"} == {9}
    for row in rows:
        record = artifacts.read_json(results / "runs" / f"{row['recipe_sha256'][:12]}.json")
        assert record["metrics"]["validation"] == row["validation"]
        screened = undisturbed / "runs" / row["recipe_sha256"][:12] / artifacts.METRICS
        assert screened.exists() == (row["stage"] == "confirm")  # tuning never opened test
    ranks = pq.read_table(results / "demo.ranks.parquet")
    confirmed = {row["recipe_sha256"] for row in rows if row["stage"] == "confirm"}
    assert set(ranks["recipe_sha256"].to_pylist()) == confirmed
    assert len(ranks) == 80 * len(confirmed)
    assert "Does it work?" in (results / "demo.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_tuning_chooses_by_validation_for_each_arm(undisturbed):
    rows = table(undisturbed)
    for arm in ("demo", "random"):
        screened = [row for row in rows if row["stage"] == "screen" and row["arm"] == arm]
        best = max(screened, key=lambda row: row["validation"]["ndcg@10"])
        chosen = {str(row["settings"]) for row in rows if row["stage"] == "confirm" and row["arm"] == arm}
        assert chosen == {str(best["settings"])}


@pytest.mark.slow
def test_a_plan_stopped_and_killed_goes_on_to_the_same_table(plan, undisturbed, tmp_path):
    with started(*command(plan, tmp_path)) as first:
        wait_until(lambda: (tmp_path / "results" / "demo.json").exists(), first)
        first.send_signal(signal.SIGTERM)
        assert first.wait(PATIENCE) == 143
    before = table(tmp_path)

    with started(*command(plan, tmp_path)) as second:
        wait_until(lambda: len(table(tmp_path)) > len(before), second)
    kept = table(tmp_path)
    assert [row for row in kept if row in before] == before  # either of two runs may have ended first

    last = subprocess.run(command(plan, tmp_path), capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert table(tmp_path) == table(undisturbed)
    one, other = (place / "results" / "demo.ranks.parquet" for place in (tmp_path, undisturbed))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_runs_that_a_plan_shares_with_another_count_before_it_is_tuned(plan, undisturbed):
    """Its control has one point only, so what it will be confirmed with is known."""
    found = []
    for rate in PLAN["tuning"]["grid"]["trainer.learning_rate"]:
        tuning = {**PLAN["tuning"], "grid": {"trainer.learning_rate": [rate]}}
        arms = {"other": {"settings": {"tokenizer": {"kind": "product"}}}, "random": PLAN["arms"]["random"]}
        other = plan.parent / f"other-{rate}.yaml"
        other.write_text(yaml.safe_dump({**PLAN, "name": "other", "arms": arms, "tuning": tuning}), encoding="utf-8")
        text = dry_run(other, results=undisturbed / "results", runs=undisturbed / "runs")
        found.append("2 of 4 runs done" in text)  # tuning of the control, and what confirmed the better rate
        assert "after tuning" in text
    assert sorted(found) == [False, True]


@pytest.mark.slow
def test_a_finished_plan_runs_nothing_and_a_rerun_gives_the_same(plan, undisturbed, capsys, monkeypatch):
    places = {"results": undisturbed / "results", "runs": undisturbed / "runs"}
    assert "7 of 7 runs done" in dry_run(plan, **places)
    page = (places["results"] / "demo.md").read_bytes()
    flags = ["--results", str(places["results"]), "--runs", str(places["runs"])]
    with monkeypatch.context() as none_starts:
        none_starts.delattr(Worker, "start")
        assert main(["reproduce", str(plan), *flags]) == 0
    assert (places["results"] / "demo.md").read_bytes() == page
    run = table(undisturbed)[-1]["recipe_sha256"][:12]
    again = ["reproduce", str(plan), "--rerun", run, *flags]
    assert main(again) == 0
    assert "the same in all of test, validation, segments" in capsys.readouterr().out

    folder = places["runs"] / f"rerun-{run}" / run
    (folder / artifacts.METRICS).unlink()  # as if it had been stopped before the test
    stages = artifacts.read_json(folder / artifacts.STAGES)
    before = {name: key for name, key in stages.items() if name not in ("evaluate", "report")}
    artifacts.write_json(folder / artifacts.STAGES, before)
    assert main(again) == 0
    assert "the same in all of test, validation, segments" in capsys.readouterr().out
    assert "train: done before, kept" in folder.with_suffix(".log").read_text(encoding="utf-8")


def one_stage(folder, settings):
    """A plan without tuning whose method has these settings."""
    arms = {**PLAN["arms"], "demo": {"settings": settings}}
    plan = {**{name: value for name, value in PLAN.items() if name != "tuning"}, "arms": arms}
    (folder / "base.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    (folder / "demo.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    return folder / "demo.yaml"


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_others_are_finished(tmp_path):
    path = one_stage(tmp_path, {"tokenizer": {"levels": 2, "codebook_size": 8, "collisions": "forbid"}})
    done = subprocess.run(command(path, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "shop · demo · seed 1" in done.stderr
    assert "share their code with another item" in done.stderr
    assert [row["arm"] for row in table(tmp_path)] == ["random"]
    assert "shop · fresh · seed 1" in done.stderr
    assert "needs the item tokens of that run" in done.stderr


def test_what_can_be_known_to_be_wrong_is_told_before_anything_runs(tmp_path, capsys):
    path = one_stage(tmp_path, {"model": {"name": str(tmp_path / "nowhere")}})
    flags = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    assert main(["reproduce", str(path), *flags]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_an_arm_begins_with_the_item_tokens_that_another_one_ended_with(plan, undisturbed, tmp_path, capsys):
    rows = {row["arm"]: row for row in table(undisturbed) if row["stage"] == "confirm"}
    assert rows["fresh"]["initial_codes"] == "file:demo"
    assert rows["fresh"]["settings"] == rows["random"]["settings"]
    runs = [undisturbed / "runs" / rows[arm]["recipe_sha256"][:12] / artifacts.MODEL for arm in ("demo", "fresh")]
    kept, taken = map(ItemCodes.load, runs)
    assert taken.table.tolist() == kept.table.tolist()
    portable = artifacts.read_json(undisturbed / "results" / "runs" / f"{rows['fresh']['recipe_sha256'][:12]}.json")
    assert portable["recipe"]["tokenizer"]["path"] == f"sha256:{rows['demo']['recipe_sha256']}"

    shutil.copytree(undisturbed / "results", tmp_path / "results")  # with records, and without run folders
    (tmp_path / "results" / "runs" / f"{rows['fresh']['recipe_sha256'][:12]}.json").unlink()
    flags = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    assert main(["reproduce", str(plan), *flags]) == 2
    assert rows["demo"]["recipe_sha256"][:12] in capsys.readouterr().err


@pytest.mark.slow
def test_a_changed_plan_keeps_the_ranks_of_runs_whose_folders_are_gone(plan, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "results", tmp_path / "results")
    shutil.copy(plan.parent / "base.yaml", tmp_path)
    wider = {**PLAN, "tuning": {**PLAN["tuning"], "grid": {"trainer.learning_rate": [1e-5, 1e-4, 3e-3]}}}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(wider), encoding="utf-8")
    done = subprocess.run(command(tmp_path / "demo.yaml", tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, other = (pq.read_table(place / "results" / "demo.ranks.parquet") for place in (tmp_path, undisturbed))
    assert one.equals(other)
    assert len(table(tmp_path)) == len(table(undisturbed)) + 2


@pytest.mark.parametrize("flags", ["--workers 0", "--minutes -1", "--minutes nan", "--dry-run --rerun a"])
def test_flags_that_make_no_sense_are_refused(plan, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", str(plan), *flags.split()])
    assert caught.value.code == 2


def test_a_dry_run_says_what_is_to_do_and_writes_nothing(plan, tmp_path):
    text = dry_run(plan, results=tmp_path / "results", runs=tmp_path / "runs")
    assert "tuning, on validation only: 4 runs" in text
    assert "confirm, on test: 3 runs" in text
    assert "0 of 7 runs done" in text
    assert "after tuning" in text
    assert not (tmp_path / "results").exists()
    assert os.listdir(tmp_path) == []


def test_a_dry_run_looks_at_every_outcome_of_tuning(plan, tmp_path):
    demo = {"variants": {"k-means": {}, "chance": {"tokenizer": {"kind": "random"}}}}
    side = {"probe": True, "settings": {"tokenizer": {"iterations": 7}}}
    other = plan.with_name("uneven.yaml")
    arms = {"uneven": demo, "random": PLAN["arms"]["random"], "side": {**side, "based_on": "uneven"}}
    other.write_text(yaml.safe_dump({**PLAN, "name": "uneven", "arms": arms}), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"tokenizer\.iterations"):
        dry_run(other, results=tmp_path / "results", runs=tmp_path / "runs")


def test_a_page_tells_the_variants_apart_that_have_not_run(plan, tmp_path):
    other = plan.with_name("waiting.yaml")
    demo = {"title": "k-means", "variants": {"deep": {"tokenizer": {"levels": 3}}, "flat": {}}}
    arms = {"waiting": demo, "random": PLAN["arms"]["random"]}
    other.write_text(yaml.safe_dump({**PLAN, "name": "waiting", "arms": arms}), encoding="utf-8")
    book = Book(LoadedPlan.load(other), Pool(tmp_path / "results", tmp_path / "runs"))
    book.tuning()
    book.write()
    page = (tmp_path / "results" / "waiting.md").read_text(encoding="utf-8")
    listed = [line for line in page.partition("## Not run")[2].splitlines() if line.startswith("- shop, ")]
    assert listed == [
        f"- shop, learning_rate {rate}, {arm}, seed 9"
        for rate in ("1e-05", "0.003")
        for arm in ("random", "k-means, variant deep", "k-means, variant flat")
    ]

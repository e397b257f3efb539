"""A record stands for a recipe: it hashes to its name, and a stale or edited one is never passed off as a result."""

import json

import pytest

from llm_itemtok import artifacts
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError
from llm_itemtok.experiments import pool as module
from llm_itemtok.experiments.plan import Cell
from llm_itemtok.experiments.pool import Pool, recipe_hash, row

METRICS = {"recall@10": 0.5}
TRAINING = {"steps": 3, "best_step": 2, "targets_seen": 40, "flops": 1e6, "seconds": 1.5, "peak_mb": 200, "curve": []}


def recipe(folder, data, **settings):
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"data": {"path": str(data)}, **settings}), encoding="utf-8")
    return RunConfig.load(path)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "here" / "shop"
    folder.mkdir(parents=True)
    (folder / "items.csv").write_text("item_id,title\na,A\nb,B\nc,C\n", encoding="utf-8")
    (folder / "interactions.csv").write_text("user_id,item_id,position\n1,a,0\n1,b,1\n1,c,2\n", encoding="utf-8")
    return folder


@pytest.fixture
def pool(tmp_path):
    return Pool(tmp_path / "results", tmp_path / "runs")


def cell(config, stage="confirm"):
    return Cell(stage, "shop", "shop", "demo", (("trainer.learning_rate", 0.1),), config)


def finish(pool, job):
    folder = pool.folder(job)
    artifacts.write_json(folder / artifacts.TRAINING, {**TRAINING, "validation": METRICS})
    if job.cell.stage == "confirm":
        metrics = {"test": METRICS, "validation": METRICS, "training": TRAINING}
        artifacts.write_json(folder / artifacts.METRICS, metrics)
    return pool.adopt(job)


def test_a_run_is_named_by_content_and_not_by_place(tmp_path, data, pool):
    first = pool.job(cell(recipe(tmp_path, data)))
    moved = data.parent.rename(tmp_path / "elsewhere") / "shop"
    again = Pool(tmp_path / "results", tmp_path / "runs").job(cell(recipe(tmp_path, moved)))
    assert first.sha256 == again.sha256 == recipe_hash(first.recipe)
    assert str(tmp_path) not in json.dumps(first.recipe)
    other = pool.job(cell(recipe(tmp_path, moved, seed=1)))
    assert other.sha256 != first.sha256
    (moved / "interactions.csv").write_text("user_id,item_id,position\n1,a,0\n1,c,1\n1,b,2\n", encoding="utf-8")
    edited = Pool(tmp_path / "results", tmp_path / "runs").job(cell(recipe(tmp_path, moved)))
    assert edited.sha256 != first.sha256


def test_a_record_is_found_again_and_hashes_to_its_name(tmp_path, data, pool):
    job = pool.job(cell(recipe(tmp_path, data)))
    assert pool.record(job) is None
    written = finish(pool, job)
    assert pool.record(job) == written
    path = pool.record_path(job.sha256)
    assert path.stem == job.sha256[:12]
    assert set(artifacts.read_json(path)) >= {"recipe", "metrics", "commit"}
    assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_an_edited_record_is_refused(tmp_path, data, pool):
    job = pool.job(cell(recipe(tmp_path, data)))
    written = finish(pool, job)
    written["recipe"]["seed"] = 5
    artifacts.write_json(pool.record_path(job.sha256), written)
    with pytest.raises(ArtifactError, match="must hash to the record's name"):
        pool.record(job)


def test_a_record_of_other_results_is_stale(tmp_path, data, pool, monkeypatch):
    job = pool.job(cell(recipe(tmp_path, data)))
    finish(pool, job)
    monkeypatch.setattr(module, "RESULTS_VERSION", module.RESULTS_VERSION + 1)
    assert pool.record(job) is None


def test_screening_has_no_test_and_does_not_stand_in_for_a_confirmed_run(tmp_path, data, pool):
    config = recipe(tmp_path, data)
    screened = pool.job(cell(config, "screen"))
    record = finish(pool, screened)
    assert "test" not in record["metrics"]
    assert row(screened, record, control=False, probe=False)["test"] is None
    assert pool.record(pool.job(cell(config))) is None
    confirmed = pool.job(cell(config))
    finish(pool, confirmed)
    assert row(screened, pool.record(screened), control=False, probe=False)["test"] is None


def test_a_row_has_what_the_contract_names(tmp_path, data, pool):
    job = pool.job(cell(recipe(tmp_path, data)))
    found = row(job, finish(pool, job), control=True, probe=False)
    assert set(found) >= {
        *("stage", "block", "dataset", "arm", "control", "probe", "initial_codes", "backbone", "seed", "steps"),
        *("targets_seen", "flops", "test", "validation", "seconds", "peak_mb", "recipe_sha256", "versions"),
    }
    assert found["initial_codes"] == "residual-kmeans"
    assert found["backbone"] == "decoder 4x128"

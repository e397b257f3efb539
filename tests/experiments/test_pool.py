"""A record stands for a recipe: it hashes to its name, and a stale or edited one is never passed off as a result."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_itemtok import artifacts
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError
from llm_itemtok.evaluation.metrics import metrics_from_ranks
from llm_itemtok.experiments import pool as module
from llm_itemtok.experiments.plan import Cell
from llm_itemtok.experiments.pool import Pool, recipe_hash, row
from llm_itemtok.experiments.workers import is_stale

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
    return Cell(stage, "shop", "shop", "demo", (("trainer.learning_rate", 0.1),), "demo on shop", config)


def finish(pool, job):
    folder = pool.folder(job)
    made_by = {"commit": "abc", "results": module.RESULTS_VERSION, "packages": {"torch": "2"}, "cuda": []}
    artifacts.write_json(folder / artifacts.TRAINING, {**TRAINING, "validation": METRICS, "made_by": made_by})
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


def test_a_record_from_before_a_setting_existed_serves_its_default_and_nothing_else(tmp_path, data, pool):
    job = pool.job(cell(recipe(tmp_path, data)))
    written = finish(pool, job)
    path = pool.record_path(job.sha256)
    del written["recipe"]["objective"]["label_smoothing"]  # as if it had come later
    path.unlink()
    older = recipe_hash(written["recipe"])
    artifacts.write_json(pool.record_path(older), written)
    served = pool.job(cell(recipe(tmp_path, data)))
    assert served.sha256 == older
    assert pool.record(served) == written
    other = pool.job(cell(recipe(tmp_path, data, objective={"label_smoothing": 0.1})))
    assert other.sha256 != older
    assert pool.record(other) is None


def test_a_file_of_codes_is_hashed_whatever_was_named_before_it(tmp_path, data, pool):
    """What one cell's inputs hash to is not taken for another's."""
    plain = pool.job(cell(recipe(tmp_path, data)))
    names = []
    for text in ("item_id,code\n1,0\n", "item_id,code\n1,1\n"):
        (tmp_path / "codes.csv").write_text(text)
        again = Pool(pool.results, pool.runs)
        again.job(cell(recipe(tmp_path, data)))
        job = again.job(cell(recipe(tmp_path, data, tokenizer={"kind": "file", "path": str(tmp_path / "codes.csv")})))
        assert job.recipe["tokenizer"]["path"].startswith("sha256:")
        assert str(tmp_path) not in json.dumps(job.recipe)
        names.append(job.sha256)
        assert again.job(cell(recipe(tmp_path, data))).sha256 == plain.sha256
    assert len(set(names)) == 2


def test_a_record_from_before_a_section_existed_serves_its_default_and_no_other_kind(tmp_path, data, pool):
    """The defaults of another kind are no defaults of the section."""
    written = finish(pool, pool.job(cell(recipe(tmp_path, data))))
    pool.record_path(recipe_hash(written["recipe"])).unlink()
    del written["recipe"]["rescoring"]
    older = recipe_hash(written["recipe"])
    artifacts.write_json(pool.record_path(older), written)
    assert pool.job(cell(recipe(tmp_path, data))).sha256 == older
    assert pool.record(pool.job(cell(recipe(tmp_path, data, rescoring={"kind": "sasrec"})))) is None


def test_a_setting_whose_default_is_not_what_was_before_it_is_taken_for_what_was(tmp_path, data, pool):
    """An RQ-VAE of a record without `tokenizer.stop` was stopped by the loss, whatever the default is today."""
    by_loss = {"kind": "rqvae", "stop": "loss"}
    written = finish(pool, pool.job(cell(recipe(tmp_path, data, tokenizer=by_loss))))
    pool.record_path(recipe_hash(written["recipe"])).unlink()
    for name in ("stop", "patience"):
        del written["recipe"]["tokenizer"][name]
    older = recipe_hash(written["recipe"])
    artifacts.write_json(pool.record_path(older), written)
    assert pool.job(cell(recipe(tmp_path, data, tokenizer=by_loss))).sha256 == older
    for others in ({"kind": "rqvae"}, {**by_loss, "patience": 20}):
        assert pool.record(pool.job(cell(recipe(tmp_path, data, tokenizer=others)))) is None


def test_what_was_before_a_setting_is_of_a_setting_and_not_its_default(tmp_path, data):
    """An entry that names no setting of any kind, or repeats its default, is a slip."""
    defaults = recipe(tmp_path, data, tokenizer={"kind": "rqvae"}, update={"kind": "self-improve"}).defaults()
    for dotted, value in module.BEFORE.items():
        section, name = dotted.split(".")
        assert defaults[section][name] != value
    assert "stop" not in module.unwritten(recipe(tmp_path, data))["tokenizer"]  # residual k-means has no such setting


def test_ranks_that_do_not_give_the_recorded_metrics_are_passed_over(tmp_path, data, pool):
    job = pool.job(cell(recipe(tmp_path, data)))
    pool.folder(job).mkdir(parents=True)
    stale = pa.table({"user": ["1", "2"], "rank": pa.array([0, 0], pa.float32())})
    right = pa.table({"user": ["1", "2"], "rank": pa.array([1, 0], pa.float32())})
    test = metrics_from_ranks(np.array([1.0, 0.0]))
    pq.write_table(stale, pool.folder(job) / artifacts.RANKS)
    assert pool.ranks(job, test) is None
    pool.results.mkdir(exist_ok=True)
    reported = right.add_column(0, "recipe_sha256", pa.array([job.sha256] * 2))
    pq.write_table(reported, pool.results / "other.ranks.parquet")
    assert pool.ranks(job, test).equals(right)


@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": {}, "metrics": {}, "commit": ""}', "no json"])
def test_a_record_of_another_form_is_bad_input(tmp_path, data, pool, content):
    job = pool.job(cell(recipe(tmp_path, data)))
    path = pool.record_path(job.sha256)
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=path.name):
        pool.record(job)


def test_a_run_that_code_with_other_numbers_began_is_not_gone_on_with(tmp_path):
    """Its checkpoints are of other inputs by then, and a worker has nobody to ask."""
    assert not is_stale(tmp_path)
    artifacts.write_json(tmp_path / artifacts.ENVIRONMENT, {"results": module.RESULTS_VERSION})
    assert not is_stale(tmp_path)
    artifacts.write_json(tmp_path / artifacts.ENVIRONMENT, {"results": module.RESULTS_VERSION - 1})
    assert is_stale(tmp_path)

"""`itemtok inspect` and the stage before it: what the doctor is told at pipeline time, and says wherever codes lie."""

import json

import numpy as np
import pytest

from llm_itemtok.artifacts import read_json
from llm_itemtok.cli import main
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError, CollisionError, DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.files import export_codes, read_codes
from llm_itemtok.pipeline import prepare
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.inspect import inspect
from llm_itemtok.pipeline.run import run
from llm_itemtok.report_codes import findings, quality_rows, usage_charts
from llm_itemtok.report_run import read_run

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: residual-kmeans, levels: 2, codebook_size: 8}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}}
trainer: {max_steps: 2, use_cpu: true}
"""


def recipe(folder, *overrides):
    path = folder / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return RunConfig.load(path, overrides)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that has its codes and no more."""
    folder = tmp_path_factory.mktemp("inspect")
    return run(recipe(folder), folder / "run", until="items")


@pytest.fixture(scope="module")
def item_ids(made):
    config = RunConfig.load(made / "recipe.yaml")
    return prepare.load_data(config.data, config.seed, {}).catalog.item_ids


def test_quality_gains_the_doctors_figures_and_keeps_the_others(made):
    report = read_json(made / "codes" / "v0" / "quality.json")
    assert set(report) == {
        "items", "capacity", "collision_rate", "unique", "levels", "neighbours", "reconstruction_error", "verdict",
        "resolved", "doctor",
    }  # fmt: skip
    facts = report["doctor"]
    assert facts["sha256"] == ItemCodes.load(made / "codes" / "v0").sha256
    assert set(facts["neighbours"]) == {"vectors", "training"}
    assert facts["neighbours"]["vectors"][0]["share"] > facts["neighbours"]["vectors"][0]["chance"]
    assert facts["reconstruction_error"]["before"] == report["reconstruction_error"]
    assert facts["reconstruction_error"]["after"] == pytest.approx(report["reconstruction_error"])  # an extra level
    assert {"purity", "popularity", "room", "findings"} <= set(facts)


def test_the_doctor_sees_training_interactions_only(made, monkeypatch):
    """Other validation and test items leave every figure as it is."""
    config = RunConfig.load(made / "recipe.yaml")
    data = prepare.load_data(config.data, config.seed, {})
    codes = ItemCodes.load(made / "codes" / "v0")
    facts = prepare.doctor_facts(codes, data, None, None)
    data.split.validation.targets[:] = 0
    data.split.test.targets[:] = 0
    data.split.test.items[:] = 0
    assert prepare.doctor_facts(codes, data, None, None) == facts


def test_a_run_is_inspected_with_what_was_measured_and_a_folder_of_codes_by_its_table(made, tmp_path):
    text = inspect(made)
    assert "near each other in training" in text
    assert "error of rebuilt vectors" in text
    assert "Verdict: " in text
    assert inspect(made / "codes" / "v0") == text  # a part of the run
    ItemCodes.load(made / "codes" / "v0").save(tmp_path)
    alone = inspect(tmp_path)
    assert "near each other" not in alone
    assert "Verdict: " in alone


def test_codes_that_are_not_those_that_were_measured_are_not_given_their_figures(made, tmp_path):
    (tmp_path / "recipe.yaml").write_text((made / "recipe.yaml").read_text())
    folder = tmp_path / "codes" / "v0"
    ItemCodes(np.stack([np.arange(60) % 8, np.arange(60) // 8], axis=1), (8, 8)).save(folder)
    (folder / "quality.json").write_text((made / "codes" / "v0" / "quality.json").read_text())
    assert "near each other in training" not in inspect(tmp_path)


def test_comparison_says_what_moved(made, tmp_path):
    codes = ItemCodes.load(made / "codes" / "v0")
    table = codes.table.copy()
    table[5] = (table[5] + 1) % 8
    ItemCodes(table, codes.sizes).save(tmp_path)
    text = inspect(made, tmp_path)
    assert "Items that moved: 1 of 60 (1.7%)." in text
    assert "1 keep 0" in text
    assert f"row 5: {' '.join(map(str, codes.table[5].tolist()))} → " in text
    with pytest.raises(ArtifactError, match=r"60 in .* and 1 in "):
        inspect(made, ItemCodes([[0]], (1,)).save(tmp_path / "one").parent)


def test_codes_are_exported_with_the_ids_of_the_data(made, item_ids, tmp_path, capsys):
    for name in ("x.index.json", "x.json", "x.csv"):
        assert main(["inspect", str(made), "--export", str(tmp_path / name)]) == 0
        assert str(tmp_path / name) in capsys.readouterr().out
        back = read_codes(tmp_path / name, item_ids)
        np.testing.assert_array_equal(back.table, ItemCodes.load(made / "codes" / "v0").table)
    ItemCodes.load(made / "codes" / "v0").save(tmp_path)
    with pytest.raises(ArtifactError, match="do not say which items they are of"):
        inspect(tmp_path, export=tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"must be called \*.index.json"):
        inspect(made, export=tmp_path / "x.txt")


def test_the_page_has_verdict_and_pictures_and_says_nothing_of_a_run(made, tmp_path):
    inspect(made, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Codewords in use" in page
    assert "Neighbours that share a prefix" in page
    assert "Items of the most frequent category of their prefix" in page
    assert '<h2 id="made">' not in page
    assert "Verdict: " in page
    ItemCodes.load(made / "codes" / "v0").save(tmp_path)
    inspect(tmp_path, html=tmp_path / "alone.html")
    assert "Codewords in use" in (tmp_path / "alone.html").read_text(encoding="utf-8")


def test_the_report_shows_the_doctors_findings_and_figures(made):
    found = read_run(made)
    titles = [chart.title for chart in usage_charts(found)]
    assert "Neighbours that share a prefix" in titles
    named = dict(quality_rows(found.quality))
    assert "Items of the most frequent category of their first codeword (by chance)" in named
    assert findings(found.quality) == read_json(made / "codes" / "v0" / "quality.json")["doctor"]["findings"]


@pytest.mark.parametrize("policy", ["sinkhorn", "matching"])
def test_policies_of_the_recipe_are_carried_out(tmp_path, policy):
    folder = run(recipe(tmp_path, f"tokenizer.collisions={policy}"), tmp_path / "run", until="items")
    codes = ItemCodes.load(folder / "codes" / "v0")
    assert codes.is_injective
    assert codes.num_levels == 2
    assert codes.provenance["collisions"]["policy"] == policy


@pytest.mark.parametrize(
    "vectors",
    [
        "{kind: collaborative, source: co-occurrence, dimensions: 8}",
        "{kind: collaborative, dimensions: 8, steps: 4}",
        "{kind: concat, parts: [{kind: tfidf-svd}, {kind: collaborative, source: co-occurrence, dimensions: 8}],"
        " weights: [1, 0.5], components: 6}",
    ],
)
def test_vectors_from_training_make_codes_once(tmp_path, vectors, monkeypatch):
    config = recipe(tmp_path, f"vectors={vectors}", "vocab.init=codebook")
    folder = run(config, tmp_path / "run", until="vocab")
    assert (folder / "vocab" / "initial_rows.safetensors").is_file()
    data = prepare.load_data(config.data, config.seed, {})
    lines = []
    found = prepare.item_vectors(config, data, folder, lines.append)
    assert found.shape[0] == 60
    assert found.dtype == np.float32
    if "components" in vectors:
        assert found.shape[1] == 6
    if "tfidf" not in vectors:
        assert "item vectors" in check(config)


def test_vectors_from_training_do_not_see_validation_or_test(tmp_path):
    config = recipe(tmp_path, "vectors={kind: collaborative, source: co-occurrence}", "vectors.window=2")
    data = prepare.load_data(config.data, config.seed, {})
    before = prepare.item_vectors(config, data, tmp_path, print)
    data.split.validation.targets[:] = 0
    data.split.test.items[:] = 0
    np.testing.assert_array_equal(prepare.item_vectors(config, data, tmp_path, print), before)


def test_codes_from_a_file_run_from_check_to_vocabulary(made, item_ids, tmp_path):
    codes = ItemCodes.load(made / "codes" / "v0")
    path = export_codes(codes, item_ids, tmp_path / "x.index.json")
    config = recipe(tmp_path, "tokenizer.kind=file", f"tokenizer.path={path}")
    assert "parameters" in check(config)
    folder = run(config, tmp_path / "run", until="vocab")
    np.testing.assert_array_equal(ItemCodes.load(folder / "codes" / "v0").table, codes.table)
    assert "vectors" not in read_json(folder / "codes" / "v0" / "quality.json")["doctor"]["neighbours"]
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert run(config, tmp_path / "run", until="vocab") == folder  # another file, the same codes: made again


def test_codes_from_a_file_that_collide_are_refused_beforehand_and_can_be_resolved(item_ids, tmp_path):
    shared = ItemCodes(np.stack([np.arange(60) % 8, np.arange(60) // 16], axis=1), (8, 8))
    path = export_codes(shared, item_ids, tmp_path / "x.csv")
    config = recipe(tmp_path, "tokenizer.kind=file", f"tokenizer.path={path}")
    with pytest.raises(CollisionError, match="share their code"):
        check(config)
    config = recipe(
        tmp_path, "tokenizer.kind=file", f"tokenizer.path={path}", "tokenizer.collisions=matching",
        "tokenizer.sizes=[8, 8]",
    )  # fmt: skip
    assert ItemCodes.load(run(config, tmp_path / "run", until="items") / "codes" / "v0").is_injective

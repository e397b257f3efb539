"""`itemtok inspect` and the stage before it: what the doctor is told at pipeline time, and says wherever codes lie."""

import dataclasses
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
from llm_itemtok.report.codes import findings, quality_rows, usage_charts
from llm_itemtok.report.run_folder import read_run

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
    """Other validation and test items leave every figure as it is, and so does a log without them."""
    config = RunConfig.load(made / "recipe.yaml")
    data = prepare.load_data(config.data, config.seed, {})
    codes = ItemCodes.load(made / "codes" / "v0")
    facts = prepare.doctor_facts(codes, data, None)
    log = data.interactions
    last = np.concatenate([log.offsets[1:] - 1, log.offsets[1:] - 2])
    trained_on = log.take(~np.isin(np.arange(len(log)), last))
    data = dataclasses.replace(data, raw=dataclasses.replace(data.raw, interactions=trained_on))
    data.split.validation.targets[:] = 0
    data.split.test.targets[:] = 0
    data.split.test.items[:] = 0
    assert prepare.doctor_facts(codes, data, None) == facts


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


def test_codes_are_compared_item_by_item_in_whatever_order_they_stand(made, item_ids, tmp_path):
    """The same codes by id in another order: nothing moved. By row, all but a few would have."""
    codes = ItemCodes.load(made / "codes" / "v0")
    order = np.random.default_rng(0).permutation(60)
    shuffled = ItemCodes(codes.table[order], codes.sizes)
    ids = [item_ids[row] for row in order]
    path = export_codes(shuffled, ids, tmp_path / "x.index.json")
    for one, other in ((made, path), (path, made)):
        text = inspect(one, other)
        assert "Items are joined by id." in text
        assert "Items that moved: 0 of 60 (0.0%)." in text
    shuffled.save(tmp_path / "bundle")
    (tmp_path / "bundle" / "items.jsonl").write_text("".join(json.dumps({"id": one}) + "\n" for one in ids))
    assert "Items that moved: 0 of 60 (0.0%)." in inspect(made, tmp_path / "bundle")
    shuffled.save(tmp_path / "alone")
    assert f"Items are joined by row, because {tmp_path / 'alone'} does not say which items there are." in (
        inspect(made, tmp_path / "alone")
    )


def test_codes_of_other_items_are_not_compared(made, item_ids, tmp_path):
    codes = ItemCodes.load(made / "codes" / "v0")
    path = export_codes(codes, ["other", *item_ids[1:]], tmp_path / "x.csv")
    with pytest.raises(ArtifactError, match=rf"1 are in the first only and 1 in the second only, .*'{item_ids[0]}'"):
        inspect(made, path)
    some = export_codes(ItemCodes(codes.table[:50], codes.sizes), item_ids[:50], tmp_path / "y.csv")
    with pytest.raises(ArtifactError, match=r"of 60 items in .* and 50 in .*, 10 are in the first only and 0 in the"):
        inspect(made, some)


def test_a_file_by_row_number_is_compared_by_row_and_that_is_said(made, tmp_path):
    codes = ItemCodes.load(made / "codes" / "v0")
    path = export_codes(codes, [str(row) for row in range(60)], tmp_path / "x.index.json")
    text = inspect(made, path)
    assert "joined by row, because the ids of one side are the numbers of the rows." in text
    assert "Items that moved: 0 of 60" in text


@pytest.mark.parametrize("name", ["x.index.json", "x.json", "x.csv", "item_codes.safetensors"])
def test_a_file_of_codes_is_examined(made, item_ids, tmp_path, name, capsys):
    codes = ItemCodes.load(made / "codes" / "v0")
    path = export_codes(codes, item_ids, tmp_path / name)
    assert main(["inspect", str(path), "--html", str(tmp_path / "x.html")]) == 0
    text = capsys.readouterr().out
    assert "60 items, room for" in text
    assert "Not judged, for want of figures: whether prefixes follow item vectors" in text
    assert "healthy" not in text
    if not name.endswith(".safetensors"):
        assert item_ids[0] in inspect(path, export_codes(codes, item_ids[::-1], tmp_path / "back.csv"))


def test_what_is_no_file_of_codes_is_bad_input(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "x.csv").write_text("item_id,l0\na,100000000000000000000\n")
    for path, message in ((tmp_path / "x.txt", "must be called"), (tmp_path / "x.csv", "small numbers from 0")):
        assert main(["inspect", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_codes_of_more_levels_than_letters_can_be_looked_at(tmp_path):
    ItemCodes(np.arange(27)[:, None] * np.ones(27, int), (27,) * 27).save(tmp_path)
    inspect(tmp_path, html=tmp_path / "x.html")
    assert "&lt;26_1&gt;" in (tmp_path / "x.html").read_text(encoding="utf-8")


def test_the_page_of_a_comparison_has_both_and_what_moved(made, item_ids, tmp_path):
    codes = ItemCodes.load(made / "codes" / "v0")
    table = codes.table.copy()
    table[5] = (table[5] + 1) % 8
    path = export_codes(ItemCodes(table, codes.sizes), item_ids, tmp_path / "moved.csv")
    inspect(made, path, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Item tokens: run, v0</h2>" in page
    assert "Item tokens: moved.csv</h2>" in page
    assert page.count('class="tree"') == 2
    assert '<h2 id="moved">What moved</h2>' in page
    assert "Items that moved: 1 of 60 (1.7%)." in page
    inspect(made, html=tmp_path / "page.html")
    assert "What moved" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_codes_of_a_file_are_judged_by_how_well_they_rebuild_vectors(made, item_ids, tmp_path):
    """By codebooks estimated from them, which for codes of residual k-means are its own."""
    codes = ItemCodes.load(made / "codes" / "v0")
    known = read_json(made / "codes" / "v0" / "quality.json")
    fitted = ItemCodes(codes.table[:, :2], codes.sizes[:2])
    path = export_codes(fitted, item_ids, tmp_path / "x.csv")
    tokenizer = ["tokenizer.kind=file", f"tokenizer.path={path}", "tokenizer.collisions=matching"]
    folder = run(recipe(tmp_path, *tokenizer, "tokenizer.sizes=[8, 8]"), tmp_path / "run", until="items")
    found = read_json(folder / "codes" / "v0" / "quality.json")
    assert found["reconstruction_error"] == pytest.approx(known["reconstruction_error"], rel=1e-3)
    error = found["doctor"]["reconstruction_error"]
    assert error["estimated"]
    assert error["after"] >= error["before"] == found["reconstruction_error"]
    assert "(codebooks estimated from the vectors)" in inspect(folder)


def test_check_says_how_codes_of_a_file_are_joined_and_what_room_they_leave_empty(made, item_ids, tmp_path):
    codes = ItemCodes.load(made / "codes" / "v0")
    sparse = ItemCodes(codes.table * [1, 200, 1], (8, 2000, 9))
    path = export_codes(sparse, item_ids, tmp_path / "x.csv")
    text = check(recipe(tmp_path, "tokenizer.kind=file", f"tokenizer.path={path}"))
    assert "x.csv: 3 levels, joined by id" in text
    assert "warning: level-1 has room for 1,401 codewords, of which 8 are used" in text
    deep = ItemCodes(np.repeat(np.arange(60)[:, None], 26, axis=1), (60,) * 26)
    path = export_codes(deep, item_ids, tmp_path / "deep.csv")
    more = [f"tokenizer.path={path}", "tokenizer.collisions=extra-level"]
    with pytest.raises(DataError, match=r"at most 26 levels, .*was: 27"):
        check(recipe(tmp_path, "tokenizer.kind=file", *more))


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
    assert "private" not in page
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

"""A model is given new items: it can recommend them, and all that it knew stays as it was."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from llm_itemtok.artifacts import sha256_of_file
from llm_itemtok.cli import main
from llm_itemtok.config import RunConfig
from llm_itemtok.data import synthetic
from llm_itemtok.data.readers import read_items
from llm_itemtok.errors import ArtifactError, CollisionError, DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.quantizers import read_quantizer
from llm_itemtok.pipeline.extend import extend
from llm_itemtok.pipeline.inspect import inspect
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.run import alone_in, run
from llm_itemtok.pipeline.vectors import Sources
from llm_itemtok.recommender import Recommender
from llm_itemtok.report.page import write_report
from tests.test_pipeline import RECIPE
from tests.test_recommender import adapter


def carried_out(folder: Path, *overrides: str) -> Path:
    (folder / "tiny.yaml").write_text(RECIPE)
    return run(RunConfig.load(folder / "tiny.yaml", ["trainer.max_steps=2", *overrides]), folder / "run")


@pytest.fixture(scope="module")
def _finished(tmp_path_factory) -> Path:
    return carried_out(tmp_path_factory.mktemp("run"), "tokenizer.collisions=reassign", "tokenizer.codebook_size=9")


@pytest.fixture
def finished(_finished, tmp_path) -> Path:
    """A run of 60 items on 9 x 9 codes, free to change."""
    return Path(shutil.copytree(_finished, tmp_path / "run"))


def new_items(folder: Path, *ids: str) -> Path:
    path = folder / "new.jsonl"
    books = [{"item_id": item_id, "title": f"The Glass Garden, book {place}"} for place, item_id in enumerate(ids)]
    path.write_text("".join(json.dumps(book) + "\n" for book in books))
    return path


def weights(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("*model.safetensors"))
    return {name: tensor.numpy().tobytes() for path in files for name, tensor in load_file(path).items()}


def test_a_run_recommends_new_items_and_nothing_that_it_knew_changes(finished, tmp_path, capsys):
    before = Recommender.from_pretrained(finished)
    kept, history = weights(finished / "model"), list(before.item_ids[:3])
    scores = before.score(history, before.item_ids)
    assert main(["extend", str(finished), "--items", str(new_items(tmp_path, "new-1", "new-2", "new-3"))]) == 0
    assert "3 new items beside 60, codes v1" in capsys.readouterr().out
    after = Recommender.from_pretrained(finished)
    assert after.item_ids == (*before.item_ids, "new-1", "new-2", "new-3")
    assert weights(finished / "model") == kept
    assert after.score(history, before.item_ids) == scores  # normalised over a level's tokens, not over items
    recommended = after.recommend(history, 63)
    assert {"new-1", "new-2", "new-3"} < {item.item_id for item in recommended}
    assert after.recommend(["new-2"], 5)
    old, new = ItemCodes.load(finished / "codes/v0"), ItemCodes.load(finished / "codes/v1")
    assert np.array_equal(new.table[:60], old.table)
    assert new == after.model.vocab.codes
    trace = pq.read_table(finished / "codes/v1/trace.parquet").to_pydict()
    assert trace["item"] == ["new-1", "new-2", "new-3"]
    assert trace["new"] == new.table[60:].tolist()


@pytest.mark.parametrize("way", ["here", "linked"])
def test_a_run_is_known_by_its_model_however_that_is_named(finished, tmp_path, monkeypatch, way):
    """A model that is exchanged without its run would have codes that no version of the run has."""
    items = new_items(tmp_path, "new-1")
    if way == "here":
        monkeypatch.chdir(finished / "model")
    else:
        (tmp_path / "link").symlink_to(finished / "model")
    assert extend("." if way == "here" else tmp_path / "link", items).version == "v1"
    assert ItemCodes.load(finished / "codes/v1") == Recommender.from_pretrained(finished).model.vocab.codes


def test_no_other_bundle_takes_the_place_of_a_runs_model(finished, tmp_path):
    kept = weights(finished / "model")
    with pytest.raises(ArtifactError, match="a run folder keeps the model that the run made"):
        extend(finished, new_items(tmp_path, "new-1"), out=finished / "model")
    assert weights(finished / "model") == kept
    assert extend(finished, new_items(tmp_path, "new-1"), out=finished / "served").added == 1


def test_a_version_of_codes_is_no_model(finished, tmp_path):
    with pytest.raises(ArtifactError, match=r"a bundle must be a folder with generation\.json"):
        extend(finished / "codes/v0", new_items(tmp_path, "new-1"))


def test_a_bundle_is_extended_by_one_at_a_time(finished, tmp_path):
    alone = Path(shutil.copytree(finished / "model", tmp_path / "alone"))
    with alone_in(alone), pytest.raises(ArtifactError, match="only one process may work in a folder"):
        extend(alone, new_items(tmp_path, "new-1"))


def test_a_run_whose_model_was_being_exchanged_is_mended_by_the_same_command(finished, tmp_path, capsys):
    """So it is after a kill between the two renames that an exchange takes."""
    (finished / "model").rename(finished / ".model.itemtok-old.abcd1234")
    assert main(["recommend", str(finished), "--history", "1"]) == 2
    assert f"mv {finished}/.model.itemtok-old.abcd1234 {finished}/model" in capsys.readouterr().err
    assert extend(finished, new_items(tmp_path, "new-1")).version == "v1"


def test_an_item_that_says_what_an_old_one_says_goes_beside_it(finished, tmp_path):
    """Its vector is made in the space of the old ones, though the map into it is not kept but fitted again."""
    config = RunConfig.load(finished / "recipe.yaml")
    data = load_data(config.data, config.seed, {})
    catalog = data.catalog
    same = dataclasses.replace(catalog.subset(range(5)), item_ids=tuple(f"copy-{row}" for row in range(5)))
    lines = [
        {"item_id": item_id, "title": title, "categories": [list(parts)], "brand": brand, "description": text}
        for item_id, title, parts, brand, text in zip(
            same.item_ids, same.titles, same.categories, same.brands, same.descriptions, strict=True
        )
    ]
    (tmp_path / "copies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = Sources(config, data.catalog, data.split, lambda: pytest.fail("no model is needed"), lambda *_: None)
    known, new = sources.make(print), sources.of_new(read_items(tmp_path / "copies.jsonl"), print)
    np.testing.assert_allclose(new, known[:5], atol=1e-5)
    assert extend(finished, tmp_path / "copies.jsonl").displaced >= 3


def test_vectors_that_are_fitted_to_the_catalogue_are_refused_once_its_texts_have_changed(tmp_path):
    """Other words mean other axes: the quantizer would read codes off that say nothing, without a sign of it."""
    catalog, interactions, _ = synthetic.generate(num_items=60, num_users=80, seed=0)
    synthetic.write_folder(catalog, interactions, tmp_path / "data")
    folder = RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {tmp_path / 'data'}")
    (tmp_path / "tiny.yaml").write_text(folder)
    finished = run(RunConfig.load(tmp_path / "tiny.yaml", ["trainer.max_steps=2"]), tmp_path / "run")
    assert extend(finished, new_items(tmp_path, "new-1")).added == 1
    items = tmp_path / "data" / "items.jsonl"
    items.write_text(items.read_text().replace("Saga", "Chronicle"))
    with pytest.raises(ArtifactError, match="their texts differ; make vectors of the new items"):
        extend(finished, new_items(tmp_path, "new-2"))


def test_report_and_inspect_read_an_extended_run_and_it_can_be_extended_again(finished, tmp_path):
    extend(finished, new_items(tmp_path, "new-1", "new-2"))
    again = extend(finished, new_items(tmp_path, "new-3"))
    assert (again.version, again.old, again.added) == ("v2", 62, 1)
    assert ItemCodes.load(finished / "codes/v2").provenance["added"][1]["items"] == 1
    assert "63" in inspect(finished)
    assert "new-3" in inspect(finished, export=tmp_path / "codes.csv") + (tmp_path / "codes.csv").read_text()
    write_report(finished)


def test_items_that_are_known_stay_what_they_are(finished, tmp_path):
    extend(finished, new_items(tmp_path, "new-1"))
    again = extend(finished, new_items(tmp_path, "new-1", "new-2"))
    assert (again.old, again.added, again.known) == (61, 1, 1)
    assert "1 more of the file are known already" in str(again)
    first, second = (ItemCodes.load(finished / "codes" / version) for version in ("v1", "v2"))
    assert second.table[:61].tolist() == first.table.tolist()


def test_what_cannot_be_added_is_refused_and_nothing_is_written(finished, tmp_path):
    extend(finished, new_items(tmp_path, "new-1"))
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=r"at least one item must be new to the model, but all 1 are known"):
        extend(finished, new_items(tmp_path, "new-1"))
    with pytest.raises(DataError, match="item ids must be distinct"):
        extend(finished, new_items(tmp_path, "new-2", "new-2"))
    with pytest.raises(CollisionError, match=r"codes, of which 20 are free"):
        extend(finished, new_items(tmp_path, *(f"more-{number}" for number in range(21))))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_call_that_was_stopped_half_way_is_made_good_by_the_same_call(finished, tmp_path):
    """Killed after the codes were written: the model still has the version before."""
    items, model = new_items(tmp_path, "new-1"), finished / "model"
    shutil.copytree(model, tmp_path / "model")
    extend(finished, items)
    written = sha256_of_file(finished / "codes/v1/item_codes.safetensors")
    shutil.rmtree(model)
    shutil.copytree(tmp_path / "model", model)
    assert extend(finished, items).version == "v1"
    assert sha256_of_file(finished / "codes/v1/item_codes.safetensors") == written
    assert pq.read_table(finished / "categories.parquet").num_rows == 61


def test_nobody_else_extends_a_run_while_vectors_are_made(finished, tmp_path):
    """They would begin with the same codes, and the one that ends last would drop what the other added."""
    other, said = new_items(tmp_path, "new-1"), []
    (tmp_path / "untold.jsonl").write_text('{"item_id": "new-2", "title": ""}\n')

    def meanwhile(line):
        said.append(line)
        with pytest.raises(ArtifactError, match="wait for it"):
            extend(finished, other)

    extend(finished, tmp_path / "untold.jsonl", log=meanwhile)
    assert said
    assert extend(finished, other).version == "v2"


def test_with_out_the_run_stays_and_the_bundle_stands_alone(finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    extend(finished, new_items(tmp_path, "new-1"), out=tmp_path / "bundle")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert Recommender.from_pretrained(tmp_path / "bundle").item_ids[-1] == "new-1"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="must go into a new folder or replace a bundle, found: other files"):
        extend(finished, new_items(tmp_path, "new-2"), out=tmp_path / "precious")


def test_a_bundle_alone_has_its_quantizer_and_takes_vectors(finished, tmp_path):
    """The same vectors give the same codes with the run and without it."""
    with_run = Path(shutil.copytree(finished, tmp_path / "with run"))
    bundle = Path(shutil.move(finished / "model", tmp_path / "bundle"))
    assert read_quantizer(bundle) is not None
    items = new_items(tmp_path, "new-1", "new-2")
    np.save(tmp_path / "new.npy", np.eye(2, 16, dtype=np.float32))
    extend(with_run, items, vectors=tmp_path / "new.npy")
    with pytest.raises(DataError, match=r"without its run folder cannot make item vectors of `tfidf-svd`"):
        extend(bundle, items)
    settings = json.loads((bundle / "generation.json").read_text())
    for place in (None, str(tmp_path), "../elsewhere/encoder"):
        named = settings | {"vectors": {"kind": "sentence-transformers", "model": place}}
        (bundle / "generation.json").write_text(json.dumps(named))
        with pytest.raises(DataError, match=r"of `sentence-transformers` by a folder of another machine, which takes"):
            extend(bundle, items)
    done = extend(bundle, items, vectors=tmp_path / "new.npy")
    assert (done.version, done.folder) == (None, bundle)
    assert Recommender.from_pretrained(bundle).item_ids[60:] == ("new-1", "new-2")
    assert ItemCodes.load(bundle) == ItemCodes.load(with_run / "model")
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"must hold nothing else, found: \['notes.txt'\]"):
        extend(bundle, new_items(tmp_path, "new-3"), vectors=tmp_path / "new.npy")


def test_codes_without_a_quantizer_follow_the_vectors_of_the_old_items(tmp_path):
    finished = carried_out(tmp_path, "tokenizer.kind=hierarchical", "tokenizer.codebook_size=9")
    assert extend(finished, new_items(tmp_path, "new-1")).added == 1
    bundle = Path(shutil.copytree(finished / "model", tmp_path / "bundle"))
    ids = [*Recommender.from_pretrained(bundle).item_ids, "new-2"]
    rows = np.random.default_rng(0).normal(size=(len(ids), 4)).tolist()
    pq.write_table(pa.table({"item_id": ids, "vector": rows}), tmp_path / "all.parquet")
    items = new_items(tmp_path, "new-2")
    assert extend(bundle, items, vectors=tmp_path / "all.parquet").added == 1
    with pytest.raises(DataError, match="no quantizer, so the vectors of the old items are needed"):
        extend(bundle, new_items(tmp_path, "new-3"), vectors=tmp_path / "one.npy")


def test_an_item_that_is_there_twice_is_named(finished):
    recommender = Recommender.from_pretrained(finished)
    with pytest.raises(ArtifactError, match="'x' is there twice"):
        recommender.extended(recommender.model.vocab.codes, ["x", "y", "x"], ["", "", ""])


def test_an_adapter_is_extended_beside_its_base(tmp_path):
    """Its weights name the codes that they belong to, so the file changes and its tensors do not."""
    bundle = adapter(tmp_path / "base").save_pretrained(tmp_path / "bundle")
    recommender, kept = Recommender.from_pretrained(bundle), weights(bundle)
    ids = [*recommender.item_ids, "new-1"]
    rows = np.random.default_rng(0).normal(size=(len(ids), 4)).tolist()
    pq.write_table(pa.table({"item_id": ids, "vector": rows}), tmp_path / "all.parquet")
    scores = recommender.score(["item-3"], recommender.item_ids)
    extend(bundle, new_items(tmp_path, "new-1"), vectors=tmp_path / "all.parquet")
    again = Recommender.from_pretrained(bundle)
    assert again.score(["item-3"], recommender.item_ids) == scores
    assert weights(bundle) == kept


def test_identifiers_in_words_are_refused_with_the_reason(tmp_path):
    finished = carried_out(tmp_path, "tokenizer={kind: numeric}", "objective.normaliser=vocab")
    with pytest.raises(DataError, match="named in words of the language model"):
        extend(finished, new_items(tmp_path, "new-1"))


def test_training_again_forgets_items_that_were_added_after_it(finished, tmp_path):
    extend(finished, new_items(tmp_path, "new-1"))
    config = RunConfig.load(finished / "recipe.yaml")
    run(config, finished, start="train")
    assert [path.name for path in sorted((finished / "codes").iterdir())] == ["v0"]
    assert len(Recommender.from_pretrained(finished).item_ids) == 60

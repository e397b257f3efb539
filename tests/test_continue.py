"""Training goes on from a bundle, on a newer log: the same item tokens, old items on their codes, nothing forgotten."""

import json
import shutil
from pathlib import Path

import pytest

from llm_itemtok.cli import main
from llm_itemtok.config import RunConfig
from llm_itemtok.data.readers import read_items
from llm_itemtok.errors import DataError, ItemTokError, RecipeError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.pipeline.extend import extend
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.run import run
from llm_itemtok.recommender import Recommender

RECIPE = """
data: {path: "%s"}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {levels: 2, codebook_size: 12, collisions: reassign}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}}
examples: {history_length: 8}
trainer: {max_steps: 40, per_device_train_batch_size: 16, learning_rate: 5.0e-3, use_cpu: true}
evaluation: {every: 1, baselines: [popularity]}
"""
GOES_ON = """
extends: first.yaml
data: {path: "%s"}
model: {name: "%s"}
tokenizer: {kind: file, path: "%s"}
vocab: {init: base}
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A run on the log of yesterday; beside it the log of today, with two items more."""
    place = tmp_path_factory.mktemp("continue")
    made = place / "made.yaml"
    made.write_text("data: {source: synthetic, items: 60, users: 80}\ntrainer: {max_steps: 1}\n", encoding="utf-8")
    data = load_data(RunConfig.load(made).data, 0, {})
    titles = dict(zip(data.catalog.item_ids, data.catalog.titles, strict=True))
    rows = [(user, data.catalog.item_ids[item]) for user, items in _histories(data) for item in items]
    _write(place / "yesterday", titles, rows)
    newer = [(user, item) for user, item in rows if hash_of(user) % 2] + [
        (f"new{number}", item) for number in range(20) for item in ("n1", "n2", *list(titles)[number : number + 3])
    ]
    _write(place / "today", {**titles, "n1": "The Glass Garden, book 1", "n2": "The Glass Garden, book 2"}, newer)
    (place / "first.yaml").write_text(RECIPE % (place / "yesterday"), encoding="utf-8")
    run(RunConfig.load(place / "first.yaml"), place / "first")
    extend(place / "first", place / "today" / "new.jsonl", out=place / "extended")
    return place


def hash_of(user: str) -> int:
    return sum(map(ord, user))


def _histories(data):
    test = data.split.test
    return [(user, [*test.history(case).tolist(), int(test.targets[case])]) for case, user in enumerate(test.users)]


def _write(folder: Path, titles: dict[str, str], rows: list[tuple[str, str]]) -> None:
    folder.mkdir()
    lines = [json.dumps({"item_id": item, "title": title}) for item, title in titles.items()]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "new.jsonl").write_text(
        "\n".join(line for line in lines if "Glass Garden, book" in line and '"n' in line)
    )
    text = "".join(f"{user},{item},{place}\n" for place, (user, item) in enumerate(rows))
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + text, encoding="utf-8")


def going_on(first: Path, name: str, base: Path, data: str, *overrides: str) -> Path:
    recipe = first / f"{name}.yaml"
    recipe.write_text(GOES_ON % (first / data, base, base), encoding="utf-8")
    return run(RunConfig.load(recipe, overrides), first / name)


def test_without_a_step_that_changes_anything_the_model_is_the_one_it_was(first):
    before = json.loads((first / "first" / "metrics.json").read_text())
    again = going_on(first, "idle", first / "first" / "model", "yesterday", "trainer.learning_rate=1.0e-30")
    after = json.loads((again / "metrics.json").read_text())
    assert after["test"] == before["test"]
    assert ItemCodes.load(again / "codes" / "v0") == ItemCodes.load(first / "first" / "codes" / "v0")


def test_a_newer_log_with_new_items_is_learnt_and_old_items_keep_their_ids_and_codes(first):
    old = Recommender.from_pretrained(first / "extended")
    new = Recommender.from_pretrained(going_on(first, "second", first / "extended", "today"))
    code = {item: row for row, item in enumerate(new.item_ids)}
    assert set(new.item_ids) == set(old.item_ids)
    for row, item in enumerate(old.item_ids):
        assert new.model.vocab.spell(code[item]) == old.model.vocab.spell(row)
    (before,), (after,) = old.score(["n1"], ["n2"]), new.score(["n1"], ["n2"])
    assert after > before + 1  # nats; it is always the next one in the newer log
    history = list(old.item_ids[:3])
    assert new.score(history, old.item_ids) != old.score(history, old.item_ids)


def test_items_without_codes_are_named_before_anything_is_trained(first):
    with pytest.raises(
        DataError, match=r"every item of the catalogue must have a code; 2 of 62 have none, e.g. 'n1', 'n2'"
    ):
        going_on(first, "unextended", first / "first" / "model", "today")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["tokenizer.path=elsewhere"], "must name a bundle, and `tokenizer: {kind: file, path: ...}` the same one"),
        (["model.name=scratch"], "must name a bundle"),
        (["scoring.kind=recursive"], "goes on with item tokens alone"),
    ],
)
def test_what_does_not_fit_together_is_refused(first, overrides, says):
    recipe = first / "refused.yaml"
    base = first / "first" / "model"
    recipe.write_text(GOES_ON % (first / "yesterday", base, base), encoding="utf-8")
    with pytest.raises(RecipeError, match=says.replace("{", r"\{").replace("(", r"\(")):
        RunConfig.load(recipe, overrides)


def test_without_saying_so_a_bundle_is_no_base(first, capsys):
    base = first / "first" / "model"
    recipe = first / "unsaid.yaml"
    recipe.write_text(
        (GOES_ON % (first / "yesterday", base, base)).replace("init: base", "init: normal"), encoding="utf-8"
    )
    for command in (["check", str(recipe)], ["run", str(recipe), "--out", str(first / "unsaid")]):
        assert main(command) == 2
        assert "item tokens must be new to the tokenizer" in capsys.readouterr().err


def test_what_is_gone_on_with_passes_the_check(first, capsys):
    recipe = first / "checked.yaml"
    recipe.write_text(GOES_ON % (first / "today", first / "extended", first / "extended"), encoding="utf-8")
    assert main(["check", str(recipe)]) == 0
    assert "steps in all" in capsys.readouterr().out


def test_an_adapter_is_no_base_until_it_is_merged(first, tmp_path):
    for name in ("item_codes.safetensors", "items.jsonl"):
        shutil.copy(first / "first" / "model" / name, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ItemTokError, match="make it whole by `itemtok merge`"):
        going_on(first, "adapter", tmp_path, "yesterday")


def test_the_newer_catalogue_reads_as_any_other(first):
    assert len(read_items(first / "today" / "items.jsonl", columns={})) == 62

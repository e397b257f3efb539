"""Recipes with a dense model beside the language model, from training to the report, and what a bundle makes of it."""

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llm_itemtok.decoding.beams import Beams
from llm_itemtok.decoding.dense import FILE_NAME, Rescorer
from llm_itemtok.ensemble import Ensemble
from llm_itemtok.errors import ArtifactError, RecipeError, UnsupportedModelError
from llm_itemtok.evaluation import baselines
from llm_itemtok.pipeline import fit
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.evaluate import evaluate_path
from llm_itemtok.pipeline.export import export
from llm_itemtok.pipeline.extend import extend
from llm_itemtok.pipeline.rescoring import with_rescoring
from llm_itemtok.pipeline.run import run
from llm_itemtok.recommender import Recommender
from llm_itemtok.report.rescoring import charts
from llm_itemtok.report.run_folder import read_run
from llm_itemtok.sasrec import SASRec
from llm_itemtok.training import effort
from tests.hub_server import Hub
from tests.process_pairs import run_in_two_processes
from tests.test_extend import new_items
from tests.test_pipeline import recipe

# As in test_hub.py.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

DENSE = ("rescoring={kind: sasrec, width: 8, steps: 40, shares: [0.25, 0.5]}",)
SPACIOUS = ("tokenizer.collisions=reassign", "tokenizer.codebook_size=9")
"""Codes that have room for new items."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a dense model, and the same one without."""
    folder = tmp_path_factory.mktemp("pair")
    with_dense = run(recipe(folder, *DENSE, *SPACIOUS), folder / "dense")
    return with_dense, run(recipe(folder, *SPACIOUS), folder / "plain")


@pytest.fixture(scope="module")
def rescored(pair: tuple[Path, Path]) -> Recommender:
    return Recommender.from_pretrained(pair[0])


def histories(recommender: Recommender) -> list[np.ndarray]:
    size = len(recommender.item_ids)
    return [np.array([], dtype=np.int64), np.array([5]), np.arange(size - 10, size)]


def same(one: Beams, other: Beams) -> None:
    np.testing.assert_array_equal(one.items, other.items)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rescoring={kind: sasrec, width: 7}", "`rescoring.width` must be even"),
        ("rescoring={kind: sasrec, shares: []}", "`rescoring.shares` must have at least one share"),
        ("rescoring={kind: sasrec, shares: [0.5, 1.0]}", "rescoring.shares"),
        ("rescoring={kind: none, width: 8}", "width"),
        ("rescoring.kind=dense", "rescoring.kind"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(tmp_path, override)


def test_check_tells_what_a_dense_model_takes(tmp_path: Path) -> None:
    text = check(recipe(tmp_path, *DENSE))
    assert "sasrec of 60 items, 8 dimensions" in text
    assert "at most 40 steps" in text
    assert "dense model" not in check(recipe(tmp_path))


def test_the_share_is_chosen_on_validation_and_everything_says_so(pair: tuple[Path, Path]) -> None:
    folder, plain = pair
    found = json.loads((folder / "rescoring.json").read_text())
    by_share = {line["share"]: line for line in found["validation"]}
    assert set(by_share) == {0.0, 0.25, 0.5, 1.0}
    assert by_share[found["share"]]["ndcg@10"] == max(by_share[share]["ndcg@10"] for share in (0.25, 0.5))
    metrics, without = (json.loads((run_folder / "metrics.json").read_text()) for run_folder in pair)
    assert metrics["validation"] == {k: v for k, v in by_share[found["share"]].items() if k != "share"}
    assert without["validation"] == {k: v for k, v in by_share[0.0].items() if k != "share"}
    assert metrics["protocol"] == {**without["protocol"], "dense_share": found["share"]}
    assert f"a share of {found['share']:g}" in (folder / "model" / "README.md").read_text()
    assert not (plain / "rescoring.json").exists()
    assert not (plain / "model" / FILE_NAME).exists()


def test_the_language_model_is_what_it_would_be_alone(pair: tuple[Path, Path], rescored: Recommender) -> None:
    plain = Recommender.from_pretrained(pair[1])
    alone = rescored.with_generation(dense_share=0.0)
    same(alone.search(histories(plain), 20), plain.search(histories(plain), 20))


def test_lists_are_those_of_exact_scores_where_beams_hold_everything(rescored: Recommender) -> None:
    """The mean of two log-probabilities, neither of which this test takes from what it tests."""
    asked, size = histories(rescored), len(rescored.item_ids)
    every = [np.arange(size)] * len(asked)
    own = rescored.with_generation(dense_share=0.0).score_rows(asked, every)
    logits = rescored.rescorer.network.scores(asked)
    dense = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    share = rescored.generation.dense_share
    wanted = (1 - share) * np.stack(own) + share * dense
    found = rescored.search(asked, size)
    np.testing.assert_array_equal(found.items, np.argsort(-wanted, axis=1, kind="stable"))
    np.testing.assert_allclose(found.scores, -np.sort(-wanted, axis=1), rtol=1e-4)
    np.testing.assert_allclose(np.stack(rescored.score_rows(asked, every)), wanted, rtol=1e-4)


def test_lists_of_what_may_come_out_hold(rescored: Recommender) -> None:
    ids = rescored.item_ids
    found = rescored.recommend([ids[5]], 10, allow=ids[:6], deny=[ids[2]])
    assert {item.item_id for item in found} == set(ids[:6]) - {ids[2]}
    assert rescored.recommend([ids[5]], 3, allow=[]) == []


def test_tested_again_to_the_same_numbers_and_alone_to_those_of_the_plain_run(pair: tuple[Path, Path]) -> None:
    metrics, without = (json.loads((run_folder / "metrics.json").read_text()) for run_folder in pair)
    again = evaluate_path(str(pair[0]), None)
    assert again["test"] == metrics["test"]
    assert again["validation"] == metrics["validation"]
    assert metrics["test"] != without["test"]


def test_it_may_be_one_of_several_models(pair: tuple[Path, Path], rescored: Recommender) -> None:
    plain = Recommender.from_pretrained(pair[1])
    asked = histories(plain)
    every = [np.arange(len(plain.item_ids))] * len(asked)
    together = Ensemble([rescored, plain]).score_rows(asked, every)
    parts = [np.stack(model.score_rows(asked, every)) for model in (rescored, plain)]
    np.testing.assert_allclose(np.stack(together), np.mean(parts, axis=0), rtol=1e-6)


def test_saved_and_loaded_it_answers_the_same(rescored: Recommender, tmp_path: Path) -> None:
    rescored.save_pretrained(tmp_path / "bundle")
    again = Recommender.from_pretrained(tmp_path / "bundle")
    asked = histories(rescored)
    same(again.search(asked, 20), rescored.search(asked, 20))


def test_with_short_lists_either_model_brings_items(rescored: Recommender) -> None:
    """By what either finds and scores alone, put together by this test."""
    asked, beam = histories(rescored), 4
    alone = rescored.with_generation(dense_share=0.0)
    logits = rescored.rescorer.network.scores(asked)
    dense = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    share, brought = 0.9, 0
    found = rescored.with_generation(dense_share=share).search(asked, beam)
    for row, (own, best) in enumerate(zip(alone.search(asked, beam).items, np.argsort(-logits, axis=1), strict=True)):
        candidates = np.union1d(own, best[:beam])
        scores = (1 - share) * alone.score_rows([asked[row]], [candidates])[0] + share * dense[row, candidates]
        assert found.items[row].tolist() == candidates[np.argsort(-scores, kind="stable")][:beam].tolist()
        brought += len(set(found.items[row].tolist()) - set(own.tolist()))
    assert brought > 0


def test_new_items_come_out_as_often_as_the_language_model_wants(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "run"))
    before = Recommender.from_pretrained(folder)
    extend(folder, new_items(tmp_path, *(f"new{number}" for number in range(10))))
    after = Recommender.from_pretrained(folder)
    assert after.generation.dense_share == before.generation.dense_share
    history, old, new = before.item_ids[:3], before.item_ids[:5], ["new0", "new1"]
    assert after.score(history, old) == pytest.approx(before.score(history, old), rel=1e-5)
    share, alone = after.generation.dense_share, after.with_generation(dense_share=0.0)
    wanted = [(1 - share) * own - share * np.log(len(before.item_ids)) for own in alone.score(history, new)]
    assert after.score(history, new) == pytest.approx(wanted, rel=1e-5)
    asked = [[item] for item in before.item_ids]

    def how_often(model: Recommender) -> int:
        return sum(item.item_id.startswith("new") for answer in model.recommend_batch(asked, 10) for item in answer)

    assert 0.5 < how_often(after) / how_often(alone) < 2


def test_seconds_of_the_dense_model_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = 0.0

    def slowly(*given: Any) -> Any:
        nonlocal ahead
        ahead += 1e6
        return with_rescoring(*given)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead)
    monkeypatch.setattr(effort, "time", clock)
    monkeypatch.setattr(fit, "with_rescoring", slowly)
    folder = run(recipe(tmp_path, *DENSE), tmp_path / "run", until="train")
    assert ahead == 1e6
    dense = json.loads((folder / "rescoring.json").read_text())["training"]["seconds"]
    assert dense < json.loads((folder / "training.json").read_text())["seconds"] < 1e5


def test_a_bundle_without_its_dense_model_or_with_anothers_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0] / "model", tmp_path / "model"))
    own = Rescorer.load(folder)
    for others in (Rescorer(own.network, "other items"), Rescorer(SASRec(61, width=8), own.items_sha256)):
        others.save(folder)
        with pytest.raises(ArtifactError, match="must be of the same catalogue"):
            Recommender.from_pretrained(folder)
    (folder / FILE_NAME).unlink()
    with pytest.raises(ArtifactError, match="this is missing"):
        Recommender.from_pretrained(folder)
    plain = Recommender.from_pretrained(pair[1])
    with pytest.raises(ArtifactError, match="found: none"):
        plain.with_generation(dense_share=0.5)
    with pytest.raises(ArtifactError, match=r"`dense_share` must be a number in \[0, 1\], was: '2'"):
        plain.with_generation(dense_share=2)
    settings = json.loads((folder / "generation.json").read_text())
    for wrong in (1.5, "half", True):
        (folder / "generation.json").write_text(json.dumps({**settings, "dense_share": wrong}))
        with pytest.raises(ArtifactError, match=r"`dense_share` must be a number in \[0, 1\]"):
            Recommender.from_pretrained(folder)


def test_servers_that_would_leave_it_out_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="asks the language model alone"):
        export(pair[0], tmp_path / "out", "paths")
    assert not (tmp_path / "out").exists()


def test_the_report_shows_what_the_share_does(pair: tuple[Path, Path]) -> None:
    (chart,) = charts(read_run(pair[0]))
    share = json.loads((pair[0] / "rescoring.json").read_text())["share"]
    assert f"{share:g} was chosen" in chart.title
    assert chart.title in (pair[0] / "report.html").read_text().replace("&#39;", "'")
    assert charts(read_run(pair[1])) == []


def test_what_training_took_has_the_dense_model_in_it(pair: tuple[Path, Path]) -> None:
    facts = json.loads((pair[0] / "rescoring.json").read_text())
    took = facts["training"]
    ours, plain = (json.loads((folder / "metrics.json").read_text())["training"] for folder in pair)
    assert ours["parameters"] == plain["parameters"] + took["parameters"]
    assert took["seconds"] > 0
    assert ours["seconds"] > took["seconds"] + facts["choosing_seconds"]


def test_seen_items_are_left_out_of_choice_and_test_alike(tmp_path: Path) -> None:
    out = run(recipe(tmp_path, *DENSE, "evaluation.mask_seen=true"), tmp_path / "run")
    metrics = json.loads((out / "metrics.json").read_text())
    again = evaluate_path(str(out), None)
    assert again["validation"] == metrics["validation"]  # that of the chosen share, as it was chosen
    assert again["test"] == metrics["test"]


def test_it_goes_with_a_recursive_model_and_into_other_places(tmp_path: Path, hub: Hub) -> None:
    out = run(recipe(tmp_path, *DENSE, "scoring={kind: recursive, embedding: 8, hidden: 16}"), tmp_path / "run")
    ours = Recommender.from_pretrained(out)
    ours.merged().save_pretrained(tmp_path / "merged")
    ours.push_to_hub("anna/model")
    asked = histories(ours)
    for place in (tmp_path / "merged", "anna/model"):
        same(Recommender.from_pretrained(place).search(asked, 20), ours.search(asked, 20))


def test_the_dense_model_is_trained_once_for_the_runs_that_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITEMTOK_CACHE", str(tmp_path / "cache"))

    def made(name: str, *overrides: str) -> tuple[bytes, int]:
        out = run(recipe(tmp_path, *DENSE, "trainer.max_steps=2", *overrides), tmp_path / name, until="train")
        kept = [path for path in (tmp_path / "cache" / "dense").iterdir() if path.is_dir()]
        return (out / "model" / FILE_NAME).read_bytes(), len(kept)

    first, kept = made("first")
    assert kept == 1
    assert made("other tokens", "tokenizer.kind=random") == (first, 1)
    others = ("seed=1", "rescoring.dropout=0.1", "evaluation.mask_seen=true", "evaluation.repeats=drop")
    for number, other in enumerate(others, start=2):
        assert made(f"other {number}", other)[1] == number
    monkeypatch.setitem(baselines.BASELINES, "sasrec", baselines.BASELINES["sasrec"]._replace(version=99))
    assert made("other method")[1] == 6


def test_a_run_from_before_there_were_dense_models_goes_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[1], tmp_path / "run"))
    text = (folder / "recipe.yaml").read_text()
    assert "rescoring:\n  kind: none\n" in text
    (folder / "recipe.yaml").write_text(text.replace("rescoring:\n  kind: none\n", ""))
    said: list[str] = []
    run(recipe(tmp_path, *SPACIOUS), folder, log=said.append)
    assert sum("done before, kept" in line for line in said) == 6


@pytest.mark.slow
def test_two_processes_share_all_but_the_dense_model(tmp_path: Path) -> None:
    recipe(tmp_path)  # writes the file
    ended = run_in_two_processes(tmp_path / "tiny.yaml", "--set", DENSE[0], "--out", str(tmp_path / "run"))
    assert [code for code, _ in ended] == [0, 0], ended
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    found = json.loads((tmp_path / "run" / "rescoring.json").read_text())
    assert metrics["protocol"]["dense_share"] == found["share"]
    assert evaluate_path(str(tmp_path / "run"), None)["test"] == metrics["test"]

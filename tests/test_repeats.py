"""Items of a history among the answers or not: said in the recipe, or chosen on validation; measured as it answers."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llm_itemtok.artifacts import METRICS, TRAINING
from llm_itemtok.errors import RecipeError
from llm_itemtok.evaluation import baselines
from llm_itemtok.pipeline import rescoring
from llm_itemtok.pipeline.evaluate import evaluate_path
from llm_itemtok.pipeline.export import export
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.run import run
from llm_itemtok.recommender import Recommender
from tests.process_pairs import run_in_two_processes
from tests.test_pipeline import recipe

# As in test_hub.py.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SMALL = ("trainer.max_steps=30",)
DENSE = "rescoring={kind: sasrec, width: 8, steps: 40, shares: [0.5]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training under each way to say it."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        way: run(recipe(folder, *SMALL, f"evaluation.repeats={way}"), folder / way)
        for way in ("keep", "drop", "choose")
    }


def of(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_validation_chooses_the_better_way(runs: dict[str, Path]) -> None:
    by_way = of(runs["choose"], TRAINING)["repeats"]
    validation = {way: of(runs[way], METRICS)["validation"] for way in runs}
    for way in ("keep", "drop"):
        assert "repeats" not in of(runs[way], TRAINING)
    assert by_way["keep"] == validation["keep"]["ndcg@10"]
    assert by_way["drop"] > by_way["keep"]  # nobody returns to anything in these data
    assert validation["choose"]["ndcg@10"] == by_way["drop"]
    assert not Recommender.from_pretrained(runs["choose"]).generation.repeats


def test_where_nobody_returns_it_is_the_masked_protocol(runs: dict[str, Path], tmp_path: Path) -> None:
    config = recipe(tmp_path, *SMALL, "evaluation.mask_seen=true")
    split = load_data(config.data, config.seed, {}).split
    assert not any(
        target in history
        for cases in (split.validation, split.test)
        for history, target in zip(cases.histories(), cases.targets, strict=True)
    )
    masked = of(run(config, tmp_path / "masked"), METRICS)
    dropped = of(runs["drop"], METRICS)
    for part in ("test", "validation"):
        assert masked[part] == dropped[part]


def test_metrics_say_so_and_what_is_kept_says_nothing(runs: dict[str, Path]) -> None:
    assert of(runs["choose"], METRICS)["protocol"]["repeats"] is False
    assert of(runs["drop"], METRICS)["protocol"]["repeats"] is False
    assert "repeats" not in of(runs["keep"], METRICS)["protocol"]
    told = {way: (runs[way] / "model" / "README.md").read_text() for way in ("keep", "choose")}
    assert "seen items left out" in told["choose"]
    assert "seen items included" in told["keep"]
    settings = of(runs["choose"], METRICS)["baselines"]["popularity"]["settings"]
    assert settings == {"repeats": False}


def test_the_bundle_answers_and_is_measured_without_the_history(runs: dict[str, Path], tmp_path: Path) -> None:
    ours = Recommender.from_pretrained(runs["choose"])
    history = list(ours.item_ids[:4])
    everything = ours.recommend(history, len(ours.item_ids))
    assert {answer.item_id for answer in everything} == set(ours.item_ids) - set(history)
    kept = ours.with_generation(repeats=True).recommend(history, len(ours.item_ids))
    assert {answer.item_id for answer in kept} == set(ours.item_ids)

    again, metrics = evaluate_path(str(runs["choose"]), None), of(runs["choose"], METRICS)
    assert again["test"] == metrics["test"]
    assert again["protocol"] == metrics["protocol"]

    export(str(runs["choose"]), tmp_path / "served", format="paths")
    assert of(tmp_path / "served", "serving.json")["mask_seen"] is True


def test_with_a_dense_model_both_choose_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITEMTOK_CACHE", str(tmp_path / "cache"))  # the dense model is trained here and now
    judged: list[bool] = []

    def validated(scorer, cases, mask_seen, repeats=True) -> float:
        judged.append(repeats)
        return baselines.validated(scorer, cases, mask_seen, repeats)

    monkeypatch.setattr(rescoring, "validated", validated)
    out = run(recipe(tmp_path, *SMALL, "evaluation.repeats=choose", DENSE), tmp_path / "run")
    assert set(judged) == {True, False}
    metrics, shares = of(out, METRICS), of(out, "rescoring.json")
    assert of(out, TRAINING)["repeats"] == shares["repeats"]
    chosen = next(line for line in shares["validation"] if line["share"] == shares["share"])
    assert chosen["ndcg@10"] == max(shares["repeats"].values()) == metrics["validation"]["ndcg@10"]
    assert Recommender.from_pretrained(out).generation.repeats is (shares["repeats"]["keep"] == chosen["ndcg@10"])
    again = evaluate_path(str(out), None)
    assert again["validation"] == metrics["validation"]
    assert again["test"] == metrics["test"]


def test_both_rules_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape("`evaluation.repeats: choose` leaves out the target, too")):
        recipe(tmp_path, "evaluation.mask_seen=true", "evaluation.repeats=choose")
    with pytest.raises(RecipeError, match=r"evaluation\.repeats"):
        recipe(tmp_path, "evaluation.repeats=false")


def test_a_run_from_before_there_was_a_choice_goes_on(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["keep"], tmp_path / "run"))
    text = (folder / "recipe.yaml").read_text()
    assert "  repeats: keep\n" in text
    (folder / "recipe.yaml").write_text(text.replace("  repeats: keep\n", ""))
    said: list[str] = []
    run(recipe(tmp_path, *SMALL), folder, log=said.append)
    assert sum("done before, kept" in line for line in said) == 6


@pytest.mark.slow
def test_two_processes_choose_as_one(tmp_path: Path) -> None:
    recipe(tmp_path)  # writes the file
    chosen = ("--set", "evaluation.repeats=choose", "--set", "trainer.max_steps=4")
    ended = run_in_two_processes(tmp_path / "tiny.yaml", *chosen, "--out", str(tmp_path / "run"))
    assert [code for code, _ in ended] == [0, 0], ended
    training, metrics = of(tmp_path / "run", TRAINING), of(tmp_path / "run", METRICS)
    best = max(training["repeats"].values())
    assert metrics["validation"]["ndcg@10"] == best
    assert metrics["protocol"].get("repeats", True) == (training["repeats"]["keep"] == best)
    assert evaluate_path(str(tmp_path / "run"), None)["test"] == metrics["test"]

"""A recipe carried out: what a run folder holds, what is run again, and what stays the same."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader
from transformers import LlamaConfig, Phi3Config, T5Config

from llm_itemtok.config import RunConfig
from llm_itemtok.data import synthetic
from llm_itemtok.errors import ArtifactError, CollisionError, DataError, ItemTokError, RecipeError
from llm_itemtok.evaluation.metrics import metrics_from_ranks
from llm_itemtok.items import vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.pipeline import stages
from llm_itemtok.pipeline.base_model import base_model, most_positions
from llm_itemtok.pipeline.check import check
from llm_itemtok.pipeline.evaluate import evaluate_path, table
from llm_itemtok.pipeline.fit import count_steps, training_arguments
from llm_itemtok.pipeline.inspect import inspect
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.push import card_of
from llm_itemtok.pipeline.run import alone_in, run
from llm_itemtok.pipeline.stages import input_hashes
from llm_itemtok.recommender import Recommender
from llm_itemtok.report.page import write_report
from tests.process_pairs import run_in_two_processes

RECIPE = """
data: {source: synthetic, items: 60, users: 80}
vectors: {kind: tfidf-svd, dimensions: 16}
tokenizer: {kind: residual-kmeans, levels: 2, codebook_size: 8}
model: {name: scratch, scratch: {layers: 1, width: 16, heads: 2, vocab_size: 400, pretrain_epochs: 1}}
examples: {history_length: 8}
trainer: {max_steps: 6, per_device_train_batch_size: 16, learning_rate: 5.0e-3, logging_steps: 2, use_cpu: true}
evaluation: {every: 0.5}
"""


IMPROVING = "update: {kind: self-improve, source: random, gate: none, outliers: 0.5, every: {steps: 2}, rounds: 1}\n"
T5 = ("model.scratch.family=t5", "model.scratch.head_dim=4", "examples.kind=windows")


def recipe(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return RunConfig.load(path, overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return run(recipe(folder), folder / "run")


def test_a_run_leaves_the_files_of_the_contract(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "metrics.json",
        "codes",
        "predictions.parquet",
        "model",
        "report.html",
    }
    assert (finished / "codes/v0/item_codes.safetensors").is_file()
    shipped = [*(finished / "model").iterdir(), *(finished / "codes").rglob("*"), *(finished / "base").iterdir()]
    assert not [path for path in shipped if path.suffix in (".pkl", ".bin", ".pt")]


def test_metrics_json_has_the_keys_of_the_contract(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    keys = {"recall@1", "recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr@20"}
    assert set(metrics["test"]) == set(metrics["validation"]) == set(metrics["ci95"]) == keys
    assert metrics["protocol"]["candidates"] == "full"
    assert set(metrics["baselines"]) == {"popularity", "markov", "item-knn", "oracle"}
    assert set(metrics) == {
        *("protocol", "test", "ci95", "segments", "validation", "baselines", "codes", "training", "speed")
    }
    assert metrics["training"]["steps"] == 6
    assert metrics["training"]["targets_seen"] > 0
    assert set(metrics["speed"]) == {"test_seconds", "users_per_second", "model_share"}
    assert 0 < metrics["speed"]["model_share"] < 1
    assert all(low <= metrics["test"][key] <= high for key, (low, high) in metrics["ci95"].items())


def test_predictions_are_ranked_items_of_the_catalogue_each_once_a_user(finished: Path) -> None:
    table = pq.read_table(finished / "predictions.parquet").to_pandas()
    known = {json.loads(line)["id"] for line in (finished / "model/items.jsonl").read_text().splitlines()}
    assert set(table["item"]) <= known
    assert not table.duplicated(["user", "item"]).any()
    assert table.groupby("user")["rank"].apply(list).map(lambda ranks: ranks == list(range(1, 11))).all()
    assert table.groupby("user")["score"].apply(lambda scores: scores.is_monotonic_decreasing).all()


def test_the_metrics_log_is_json_lines_with_loss_terms_and_validation(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/next-item" in line for line in lines)
    assert any("validation/ndcg@10" in line for line in lines)
    assert all("step" in line for line in lines)


def test_the_same_recipe_and_seed_give_the_same_metrics_timings_aside(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITEMTOK_CACHE", str(tmp_path / "cache"))  # nothing is taken from the other run
    again = run(recipe(tmp_path), tmp_path / "again")
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, again))
    for metrics in (first, second):
        del metrics["speed"], metrics["training"]["seconds"], metrics["training"]["peak_mb"]
        for baseline in metrics["baselines"].values():
            baseline.pop("seconds", None)
    assert first == second


def test_a_model_from_scratch_is_made_once_for_the_runs_that_begin_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITEMTOK_CACHE", str(tmp_path / "cache"))
    said: list[str] = []

    def trained(name: str, *overrides: str) -> bytes:
        said.clear()
        out = run(recipe(tmp_path, *overrides), tmp_path / name, until="train", log=said.append)
        return (out / "model" / "model.safetensors").read_bytes()

    def made() -> bool:
        return any("pre-training" in line for line in said)

    first = trained("first")
    assert made()
    assert trained("second") == first
    assert not made()
    other = ("tokenizer.kind=random",)
    of_kept = trained("other", *other)
    assert not made()
    shutil.rmtree(tmp_path / "cache")
    assert trained("other anew", *other) == of_kept
    assert made()
    trained("other seed", "seed=1")
    assert made()
    trained("other sizes", "model.scratch.width=32")
    assert made()


def test_item_vectors_are_made_once_for_the_runs_that_begin_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITEMTOK_CACHE", str(tmp_path / "cache"))
    made: list[int] = []
    inner = vectors.tfidf_svd
    monkeypatch.setattr(vectors, "tfidf_svd", lambda *given, **also: made.append(1) or inner(*given, **also))

    def codes(name: str, *overrides: str) -> bytes:
        out = run(recipe(tmp_path, *overrides), tmp_path / name, until="items")
        return (out / "codes" / "v0" / "item_codes.safetensors").read_bytes()

    first = codes("first")
    assert codes("second") == first
    assert len(made) == 1
    (kept,) = (tmp_path / "cache" / "vectors").glob("*/vectors.npy")
    assert json.loads((kept.parent / "key.json").read_text())["settings"]["kind"] == "tfidf-svd"
    for i, other in enumerate(("seed=1", "vectors.dimensions=8")):
        codes(f"other {i}", other)
        assert len(made) == 2 + i


def test_an_rqvae_is_fitted_once_for_the_runs_that_begin_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITEMTOK_CACHE", str(tmp_path / "cache"))
    kind = "tokenizer={kind: rqvae, levels: 2, codebook_size: 8, hidden: [8], latent: 4, epochs: 3}"

    def made(name: str, *overrides: str) -> tuple[Path, int]:
        codes = run(recipe(tmp_path, kind, *overrides), tmp_path / name, until="items") / "codes" / "v0"
        return codes, sum(path.is_dir() for path in (tmp_path / "cache" / "rqvae").iterdir())

    first, fits = made("first")
    assert fits == 1
    of_kept, fits = made("of kept", "tokenizer.collisions=reassign", "objective.normaliser=level")
    assert fits == 1
    shutil.rmtree(tmp_path / "cache" / "rqvae")
    anew, fits = made("anew", "tokenizer.collisions=reassign")
    assert fits == 1
    for name in ("item_codes.safetensors", "quantizer.safetensors", "quality.json"):
        assert (anew / name).read_bytes() == (of_kept / name).read_bytes()
    assert (first / "quantizer.safetensors").read_bytes() == (anew / "quantizer.safetensors").read_bytes()
    for i, other in enumerate(("seed=1", "tokenizer.epochs=4", "vectors.dimensions=8")):
        assert made(f"other {i}", other)[1] == 2 + i


def test_another_seed_gives_other_metrics(finished: Path, tmp_path: Path) -> None:
    other = run(recipe(tmp_path, "seed=1"), tmp_path / "other", until="evaluate")
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, other))
    assert first["test"] != second["test"]


def test_finished_stages_are_not_run_again(finished: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "model").iterdir()}
    lines: list[str] = []
    run(recipe(tmp_path), finished, log=lines.append)
    assert {path: path.stat().st_mtime_ns for path in (finished / "model").iterdir()} == before
    assert sum("done before" in line for line in lines) == 6


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_of_an_epoch_are_those_of_the_library(tmp_path: Path, drop: bool, accumulation: int) -> None:
    more = (f"trainer.dataloader_drop_last={json.dumps(drop)}", f"trainer.gradient_accumulation_steps={accumulation}")
    arguments = training_arguments(recipe(tmp_path, *more, "trainer.max_steps=-1"), tmp_path, 170)
    batches = len(DataLoader(range(170), batch_size=16, drop_last=drop))
    assert count_steps(arguments, 170)[0] == -(-batches // accumulation)


def test_the_ranks_of_all_test_users_give_the_metrics_again(finished: Path) -> None:
    table = pq.read_table(finished / "ranks.parquet")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics_from_ranks(table["rank"].to_numpy().astype(float)) == metrics["test"]
    assert len(set(table["user"].to_pylist())) == len(table) == metrics["protocol"]["counts"]["test_cases"]


def test_two_processes_do_not_work_in_one_run_folder(finished: Path, tmp_path: Path) -> None:
    with alone_in(finished), pytest.raises(ArtifactError, match="only one process may work in a folder"):
        run(recipe(tmp_path), finished)
    run(recipe(tmp_path), finished)


def test_results_of_an_older_version_of_the_code_are_not_gone_on_from(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    monkeypatch.setattr(stages, "RESULTS_VERSION", stages.RESULTS_VERSION + 1)
    lines: list[str] = []
    run(recipe(tmp_path), copy, until="items", log=lines.append)
    assert not any("done before" in line for line in lines)


def test_from_runs_a_stage_and_all_after_it_again(finished: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    run(recipe(tmp_path), finished, start="evaluate", log=lines.append)
    assert [line for line in lines if line.endswith(":")] == ["evaluate:", "report:"]


def test_a_model_begins_without_the_numbers_of_the_one_before_it(finished: Path, tmp_path: Path) -> None:
    """A card or a report would tell them of the new one."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    run(recipe(tmp_path), folder, start="train", until="train")
    assert not {"metrics.json", "ranks.parquet", "predictions.parquet", "examples.json", "report.html"} & {
        path.name for path in folder.iterdir()
    }
    assert "## Measured" not in card_of(Recommender.from_pretrained(folder), folder / "model")
    run(recipe(tmp_path), folder)
    assert "## Measured" in card_of(Recommender.from_pretrained(folder), folder / "model")


@pytest.mark.parametrize("policy", ["forbid", "reassign", "matching", "sinkhorn"])
def test_codes_of_another_run_stay_as_they_were_resolved(finished: Path, tmp_path: Path, policy: str) -> None:
    """Their last level only counts, whatever else could be done about collisions that they do not have."""
    theirs = ItemCodes.load(finished / "codes/v0")
    assert theirs.num_describing_levels < theirs.num_levels
    given = ("tokenizer.kind=file", f"tokenizer.path={finished / 'codes/v0'}", f"tokenizer.collisions={policy}")
    text = RECIPE.replace("{kind: residual-kmeans, levels: 2, codebook_size: 8}", "{}")
    (tmp_path / "file.yaml").write_text(text)
    ours = ItemCodes.load(
        run(RunConfig.load(tmp_path / "file.yaml", given), tmp_path / "run", until="items") / "codes/v0"
    )
    assert ours == theirs
    assert ours.provenance["collisions"] == theirs.provenance["collisions"]


def test_to_begin_in_the_middle_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(RecipeError, match="`--from train` needs the stages before it"):
        run(config, tmp_path / "new", start="train")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "seed: 0 # Größe".encode("latin-1"), r"recipe\.yaml: it must be text in UTF-8, .* byte at 12"),
        ("stages.json", b"[]", r"stages\.json: must hold the keys of stages"),
        ("stages.json", b'{"data": 1}', r"stages\.json: must hold the keys of stages"),
    ],
)
def test_damaged_files_of_a_run_are_told(finished: Path, tmp_path: Path, name, content, message) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        run(recipe(tmp_path), folder)
    if name == "recipe.yaml":
        with pytest.raises(ArtifactError, match=message):
            write_report(folder)


def test_what_the_test_alone_depends_on_may_change_without_training_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    lines: list[str] = []
    out = run(recipe(tmp_path, "evaluation.baselines=[popularity, markov]"), tmp_path / "run", log=lines.append)
    assert [line for line in lines if line.endswith(":")] == ["evaluate:", "report:"]
    assert "markov" in json.loads((out / "metrics.json").read_text())["baselines"]


def test_a_folder_that_holds_another_recipe_is_refused_and_left_alone(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"another run.*: the folder has seed: 0, this recipe seed: 1\n.*--fresh"):
        run(recipe(tmp_path, "seed=1"), finished)
    with pytest.raises(ArtifactError, match=r"has tokenizer.levels: \d, this recipe tokenizer.levels: 4\n"):
        run(recipe(tmp_path, "tokenizer.levels=4"), finished)
    assert (finished / "metrics.json").is_file()


def test_what_differs_is_told_also_where_it_looks_alike_and_of_a_damaged_recipe(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "recipe.yaml").read_text()
    for old, message in (
        (text.replace("items: 60", "items: '60'"), 'the folder has data.items: "60".*, this recipe data.items: 60'),
        (text + "seed: 0\n", "another run, whose recipe.yaml differs"),
    ):
        assert old != text
        (folder / "recipe.yaml").write_text(old)
        with pytest.raises(ArtifactError, match=message):
            run(recipe(tmp_path, "vectors.dimensions=5"), folder)


def test_a_corrected_recipe_takes_over_a_folder_where_nothing_but_data_was_finished(tmp_path: Path) -> None:
    faulty = ("vectors.kind=file", f"vectors.path={tmp_path / 'vectors.npy'}")
    with pytest.raises(DataError, match=r"vectors\.npy"):
        run(recipe(tmp_path, *faulty), tmp_path / "run")
    run(recipe(tmp_path), tmp_path / "run", until="items")
    assert (tmp_path / "run/codes/v0").is_dir()


def test_a_training_that_was_cut_short_is_not_thrown_away_unasked(tmp_path: Path) -> None:
    """The same command without `--resume` is refused; asking for the stage by its name begins it anew."""
    out, config = tmp_path / "run", recipe(tmp_path)
    run(config, out, until="train")
    book = json.loads((out / "stages.json").read_text())
    del book["train"]
    del book["trained"]
    (out / "stages.json").write_text(json.dumps(book))
    held = sorted(path.name for path in (out / "checkpoints").iterdir())
    with pytest.raises(ArtifactError, match=r"checkpoints of this very training, up to checkpoint-\d+; .*--resume"):
        run(config, out)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == held
    lines: list[str] = []
    run(config, out, start="train", until="train", log=lines.append)
    assert not any("resumed" in line for line in lines)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == held


def test_a_checkpoint_of_other_data_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    """Or a model of the old log, with new test targets in it, would be measured under the new hashes."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {folder}"))
    run(RunConfig.load(path), tmp_path / "run", until="train")
    lines: list[str] = []
    log = folder / "interactions.csv"
    log.write_text("\n".join(log.read_text().splitlines()[:-40]) + "\n")
    run(RunConfig.load(path), tmp_path / "run", until="train", resume=True, log=lines.append)
    assert any("training starts over" in line for line in lines)
    assert not any("resumed from" in line for line in lines)


def test_checkpoints_of_a_training_that_was_cut_short_are_kept_when_its_inputs_change(
    folder: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {folder}") + IMPROVING)
    run(RunConfig.load(path), out, until="train")
    assert (out / "codes/v1").is_dir()
    book = json.loads((out / "stages.json").read_text())
    del book["train"]
    del book["trained"]
    (out / "stages.json").write_text(json.dumps(book))
    held = sorted(path.name for path in (out / "checkpoints").iterdir())
    codes = sorted(path.name for path in (out / "codes").iterdir())
    log = folder / "interactions.csv"
    whole = log.read_text()
    log.write_text("\n".join(whole.splitlines()[:-40]) + "\n")
    for resume in (False, True):
        with pytest.raises(ArtifactError, match=r"checkpoints of a training that was cut short.*--from data"):
            run(RunConfig.load(path), out, until="train", resume=resume)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == held
    assert sorted(path.name for path in (out / "codes").iterdir()) == codes
    log.write_text(whole)
    lines: list[str] = []
    run(RunConfig.load(path), out, until="train", resume=True, log=lines.append)
    assert any("resumed from" in line for line in lines)


def test_a_later_stage_is_not_begun_on_what_earlier_inputs_made(folder: Path, tmp_path: Path) -> None:
    """Nor is anything taken for finished that came before a change which was taken back."""
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {folder}") + IMPROVING)
    run(RunConfig.load(path), out)
    whole = (folder / "items.jsonl").read_text()
    titles = [json.loads(line) for line in whole.splitlines()]
    other = [{**item, "title": titles[-1 - row]["title"]} for row, item in enumerate(titles)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in other))
    with pytest.raises(RecipeError, match="inputs of data, items, vocab, train have changed since; begin with `--from"):
        run(RunConfig.load(path), out, start="evaluate")
    assert (out / "codes/v1").is_dir()
    run(RunConfig.load(path), out, until="items")
    assert [version.name for version in (out / "codes").iterdir()] == ["v0"]
    (folder / "items.jsonl").write_text(whole)
    lines: list[str] = []
    run(RunConfig.load(path), out, log=lines.append)
    assert not any("done before" in line for line in lines)
    assert not any("resumed" in line for line in lines)  # its codes are gone


def test_a_bundle_alone_is_tested_on_the_split_it_was_trained_with(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {folder}, split: temporal"))
    run(RunConfig.load(path), tmp_path / "run", until="evaluate")
    (tmp_path / "run/model").rename(tmp_path / "alone")
    metrics = evaluate_path(str(tmp_path / "alone"), folder)
    assert metrics["protocol"]["split"] == "temporal"
    assert metrics["test"] == json.loads((tmp_path / "run/metrics.json").read_text())["test"]


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"source": "hub"}, r"must have settings of split, .* only, found: \['source'\]"),
        ({"path": "elsewhere", "k_core": 0}, r"must have settings of split, .* only, found: \['path'\]"),
        ({"k_core": "abc"}, r"`data.k_core` must be a whole number at least 0, was: the text 'abc'"),
        ({"split": []}, r"`data.split` must be one of leave-last-out, temporal, was"),
        ({"filter": {"col": "x"}}, r"`data.filter.col` is not a setting"),
        ({"filter": {"column": "x", "keep": ["a"], "min": 1}}, r"`data.filter` takes either `keep`"),
        ({"split": "temporal", "validation_share": 0.5, "test_share": 0.5}, r"must leave something to train on"),
    ],
)
def test_a_bundle_says_how_data_are_split_and_nothing_else_of_them(
    protocol: dict, message: str, finished: Path, folder: Path, tmp_path: Path
) -> None:
    """Where the data are and what they are read by is for whoever names them to say."""
    shutil.copytree(finished / "model", tmp_path / "alone")
    settings = json.loads((tmp_path / "alone/generation.json").read_text())
    (tmp_path / "alone/generation.json").write_text(json.dumps(settings | {"protocol": protocol}))
    with pytest.raises(ArtifactError, match=f"the `protocol` in the model's generation.json.*{message}"):
        evaluate_path(str(tmp_path / "alone"), folder)


SEGMENTS = "{brand: {kind: item-order, column: shelf}, home: {kind: user-column, column: country}}"


def with_further_columns(folder: Path) -> None:
    """Give every item a shelf, in the order of the file, and every interaction a country, one a user."""
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    lines = [json.dumps({**item, "shelf": number}) + "\n" for number, item in enumerate(items)]
    (folder / "items.jsonl").write_text("".join(lines))
    header, *rows = (folder / "interactions.csv").read_text().splitlines()
    lines = [f"{row},{'NL' if int(row[1:6]) % 4 else 'DE'}" for row in rows]
    (folder / "interactions.csv").write_text("\n".join([f"{header},country", *lines]) + "\n")


def test_segments_by_rule_are_in_the_metrics_and_nothing_is_trained_again_when_their_columns_change(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {folder}"))
    plain = run(RunConfig.load(path), tmp_path / "plain")
    with_further_columns(folder)
    config = RunConfig.load(path, [f"evaluation.segments={SEGMENTS}"])
    out = run(config, tmp_path / "run")

    first, metrics = (json.loads((run / "metrics.json").read_text()) for run in (plain, out))
    assert metrics["test"] == first["test"]
    assert metrics["protocol"] == first["protocol"]
    assert {name: part["users"] for name, part in metrics["segments"].items() if name.startswith("home")} == {
        "home: NL": 60,
        "home: DE": 20,
    }
    assert metrics["segments"]["brand up"]["users"] + metrics["segments"]["brand down"]["users"] == 80
    assert {name: metrics["segments"][name] for name in first["segments"]} == first["segments"]
    assert evaluate_path(str(out), None)["segments"] == metrics["segments"]
    assert set(evaluate_path(str(out / "model"), None)["segments"]) == set(metrics["segments"])

    log = folder / "interactions.csv"
    log.write_text(log.read_text().replace(",DE", ",FR"))
    lines: list[str] = []
    run(config, out, log=lines.append)
    assert [line for line in lines if line.endswith(":")] == ["evaluate:", "report:"]
    assert "home: FR" in json.loads((out / "metrics.json").read_text())["segments"]
    (out / "model").rename(tmp_path / "alone")
    assert set(evaluate_path(str(tmp_path / "alone"), folder)["segments"]) == set(first["segments"])


def test_check_refuses_a_segment_of_a_column_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {folder}"))
    with pytest.raises(DataError, match=r"items\.jsonl: the column `titles`.*did you mean `title`\?"):
        check(RunConfig.load(path, ["evaluation.segments={x: {kind: item-order, column: titles}}"]))
    with pytest.raises(DataError, match=r"interactions\.csv: the column `country`.*there are: 'user_id'"):
        check(RunConfig.load(path, ["evaluation.segments={x: {kind: user-column, column: country}}"]))


def test_text_tasks_without_any_title_are_refused_also_where_categories_exist(folder: Path, tmp_path: Path) -> None:
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    (folder / "items.jsonl").write_text("".join(json.dumps({**item, "title": None}) + "\n" for item in items))
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {folder}"))
    with pytest.raises(DataError, match=r"no item .* has a title(.|\n)*title-to-item"):
        check(RunConfig.load(path, ["examples.tasks.title-to-item=1"]))


def test_a_folder_that_happens_to_be_called_scratch_is_not_taken_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/file").write_text("anything")
    monkeypatch.chdir(tmp_path)
    assert input_hashes(recipe(tmp_path)) == {}


def test_the_card_of_a_bundle_may_be_edited_while_a_training_goes_on_from_it(finished: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(finished / "model", base)
    text = "\n".join(line for line in RECIPE.splitlines() if not line.startswith("model:"))
    (tmp_path / "tiny.yaml").write_text(text)
    config = RunConfig.load(tmp_path / "tiny.yaml", [f"model.name={base}"])
    before = input_hashes(config)["model.name"]
    (base / "README.md").write_text("# Ours")
    (base / ".cache").mkdir()
    (base / ".cache" / "download.lock").touch()
    assert input_hashes(config)["model.name"] == before
    (base / "items.jsonl").write_text((base / "items.jsonl").read_text().replace("a", "b"))
    assert input_hashes(config)["model.name"] != before


def test_a_run_folder_is_not_emptied_under_who_stands_in_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = recipe(tmp_path)
    monkeypatch.chdir(out)
    with pytest.raises(ArtifactError, match="cannot empty the folder that one stands in"):
        run(config, ".", fresh=True)
    lines: list[str] = []
    run(config, ".", log=lines.append)
    assert lines == [f"{stage}: done before, kept" for stage in stages.STAGE_NAMES]


@pytest.mark.parametrize(
    "override", ["model.name=./nowhere", "vectors={kind: sentence-transformers, model: ./nowhere}"], ids=["llm", "st"]
)
def test_models_that_are_not_there_are_bad_input(tmp_path: Path, override: str) -> None:
    with pytest.raises(ItemTokError, match="nowhere"):
        check(recipe(tmp_path, override))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_only_an_adapter_says_where_its_base_model_is(adapter: str, finished: Path, tmp_path: Path) -> None:
    """A path tells of this machine, and a whole model needs none."""
    config = recipe(tmp_path, f"model={{name: {finished / 'base'}, adapter: {adapter}}}", "trainer.max_steps=2")
    out = run(config, tmp_path / "run")
    told = json.loads((out / "model" / "generation.json").read_text())["base"]
    assert told == (None if adapter == "none" else str(finished / "base"))
    assert str(finished) not in (out / "model" / "README.md").read_text()


def test_training_does_not_begin_where_its_bundle_could_not_be_written(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "model" / "notes.txt").write_text("mine")
    checkpoints = sorted((out / "checkpoints").iterdir())
    with pytest.raises(ArtifactError, match=r"found: other files \['notes.txt'\]"):
        run(recipe(tmp_path), out, start="train")
    assert (out / "model" / "notes.txt").read_text() == "mine"
    assert sorted((out / "checkpoints").iterdir()) == checkpoints


def test_a_folder_that_is_no_run_is_never_emptied(tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(ArtifactError, match="found other files"):
            run(recipe(tmp_path), out, fresh=fresh)
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "recipe.yaml").write_text(RECIPE)  # of somebody's own, which a run's is not
    for fresh in (False, True):
        with pytest.raises(ArtifactError, match="found other files"):
            run(recipe(tmp_path), out, fresh=fresh)
    assert (out / "recipe.yaml").read_text() == RECIPE
    assert not list(tmp_path.glob(".*.lock"))  # nothing of ours beside it, either


def test_from_a_stage_whose_predecessors_never_ran_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--from train.*data, items, vocab never ran"):
        run(recipe(tmp_path), tmp_path / "new", start="train")
    with pytest.raises(RecipeError, match="nothing would run"):
        run(recipe(tmp_path), tmp_path / "new", start="train", until="data")


@pytest.mark.parametrize(
    "overrides",
    [
        ("tokenizer.kind=random", "vocab.init=normal", "tokenizer.collisions=reassign", "tokenizer.levels=3"),
        ("tokenizer.kind=rqvae", "tokenizer.epochs=3", "tokenizer.hidden=[16]", "tokenizer.latent=8"),
        ("examples.kind=windows", "objective.normaliser=vocab", "vocab.init=codebook"),
        ("examples.kind=last", "objective.normaliser=items", "evaluation.decode_normaliser=children"),
        ("examples.tasks={next-item: 1.0, title-to-item: 0.5, item-to-title: 0.5}", "vectors.kind=llm"),
        ("model.adapter=lora", "model.scratch.family=qwen3", "evaluation.mask_seen=true"),
        ("objective.kind=token-weighted", "objective.normaliser=children", "objective.label_smoothing=0.1"),
        ("model.scratch.family=gpt2", "data.split=temporal", "data.k_core=2", "tokenizer.collisions=reassign"),
        (*T5, "examples.tasks={next-item: 1.0, title-to-item: 0.5, item-to-title: 0.5}", "vectors.kind=llm"),
        (*T5, "model.adapter=lora", "objective.normaliser=vocab", "evaluation.mask_seen=true"),
    ],
    ids=[
        *("random", "rqvae", "windows-vocab", "last-items", "text-tasks", "lora-qwen3", "children", "gpt2-temporal"),
        *("t5-text-tasks-llm", "t5-lora-vocab"),
    ],
)
def test_every_choice_of_the_recipe_runs_from_data_to_report(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    out = run(recipe(tmp_path, "trainer.max_steps=2", *overrides), tmp_path / "run")
    assert len(Recommender.from_pretrained(out).recommend([], k=5)) == 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    catalog, interactions, _ = synthetic.generate(num_items=60, num_users=80, seed=0)
    synthetic.write_folder(catalog, interactions, tmp_path / "data")
    return tmp_path / "data"


def test_a_catalogue_without_any_text_is_refused_where_text_is_needed(folder: Path, tmp_path: Path) -> None:
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    (folder / "items.jsonl").write_text(
        "".join(json.dumps({"item_id": item["item_id"], "title": None}) + "\n" for item in items)
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("source: synthetic, items: 60, users: 80", f"path: {folder}"))
    with pytest.raises(DataError, match=r"no item .* has any text(.|\n)*tfidf-svd(.|\n)*text-mean"):
        check(RunConfig.load(path))
    config = RunConfig.load(path, ["tokenizer.kind=random", "vocab.init=normal", "trainer.max_steps=2"])
    assert (run(config, tmp_path / "run") / "report.html").is_file()


@pytest.mark.parametrize("setting", ["vectors.model", "model.name"])
def test_check_neither_runs_the_code_of_a_model_nor_asks_whether_to(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever presses `y` at a prompt of the library would have run it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "evil.C"}}))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').write('ran')")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    overrides = [f"{setting}={model}"]
    if setting == "vectors.model":
        overrides += ["vectors.kind=sentence-transformers"]
    with pytest.raises(ItemTokError, match=f"`{setting}` must be a model without code of its own"):
        check(recipe(tmp_path, *overrides))
    assert not asked
    assert not (tmp_path / "marker").exists()


def test_check_refuses_what_the_stage_items_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vectors\.npy"):
        check(recipe(tmp_path, "vectors.kind=file", f"vectors.path={tmp_path / 'vectors.npy'}"))
    few = ("tokenizer.levels=1", "tokenizer.codebook_size=8", "tokenizer.collisions=reassign")
    with pytest.raises(CollisionError, match="make 8 codes for 60 items"):
        check(recipe(tmp_path, *few))


def test_histories_that_do_not_fit_into_the_model_are_refused(tmp_path: Path) -> None:
    config = recipe(tmp_path, "examples.history_length=700")
    with pytest.raises(RecipeError, match="needs 2,104 positions at 3 an item, but the model has 2,048"):
        check(config)
    with pytest.raises(RecipeError, match="2,104 positions"):
        run(config, tmp_path / "run")


def test_weights_that_could_not_take_small_steps_are_refused_where_all_are_trained(tmp_path: Path) -> None:
    """Explicitly in the recipe; and by what a folder's model was saved in."""
    with pytest.raises(RecipeError, match=r"write `model\.dtype: float32`.*; `model\.dtype` was: bfloat16"):
        recipe(tmp_path, "model.dtype=bfloat16")
    half = recipe(tmp_path, "model.dtype=bfloat16", "model.adapter=lora")
    base, _ = base_model(half, load_data(half.data, 0, {}).catalog, tmp_path / "first", print)
    base.save_pretrained(tmp_path / "first" / "base")
    text = RECIPE.replace("model: {name: scratch, scratch", "ignored: {name: scratch, scratch")
    (tmp_path / "tiny.yaml").write_text("\n".join(line for line in text.splitlines() if "ignored" not in line))
    named = (f"model.name={tmp_path / 'first' / 'base'}", "model.dtype=auto", "model.adapter=none")
    config = RunConfig.load(tmp_path / "tiny.yaml", named)
    for refused in (lambda: check(config), lambda: run(config, tmp_path / "run")):
        with pytest.raises(RecipeError, match=r"write `model\.dtype: float32`.*`model\.dtype: auto` is bfloat16 here"):
            refused()


def test_an_encoder_decoder_of_a_folder_is_refused_with_rows_of_many_targets_and_trains_with_windows(
    tmp_path: Path,
) -> None:
    """From outside the recipe its kind is not seen; it is checked when the model is."""
    base = run(recipe(tmp_path, *T5), tmp_path / "first", until="vocab") / "base"
    named = (f"model.name={base}", "trainer.max_steps=2")
    text = RECIPE.replace("model: {name: scratch, scratch", "ignored: {name: scratch, scratch")
    (tmp_path / "tiny.yaml").write_text("\n".join(line for line in text.splitlines() if "ignored" not in line))
    config = RunConfig.load(tmp_path / "tiny.yaml", named)
    for refused in (lambda: check(config), lambda: run(config, tmp_path / "run")):
        with pytest.raises(RecipeError, match=f"all-positions` needs a decoder-only .*{base}` is an encoder–decoder"):
            refused()
    config = RunConfig.load(tmp_path / "tiny.yaml", [*named, "examples.kind=windows"])
    assert "parameters" in check(config)
    assert (run(config, tmp_path / "windows") / "report.html").is_file()


def test_an_encoder_decoder_has_no_longest_history(tmp_path: Path) -> None:
    assert "parameters" in check(recipe(tmp_path, *T5, "examples.history_length=700"))


def test_check_warns_of_a_learning_rate_that_no_scratch_model_learns_with(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    assert "learning_rate" not in check(config)
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("learning_rate: 5.0e-3, ", ""))
    assert "about 2.0e-3" in check(RunConfig.load(tmp_path / "tiny.yaml"))


def test_check_says_how_much_room_there_is_for_codes_and_how_many_users_are_ranked(tmp_path: Path) -> None:
    roomy = recipe(tmp_path, "tokenizer.levels=3", "tokenizer.codebook_size=16")
    codes = 16**3 / len(load_data(roomy.data, roomy.seed, {}).catalog)
    assert f"  room for {codes:,.0f} codes an item" in check(roomy)
    assert "should be 4 at least" not in check(roomy)
    assert "should be 4 at least" in check(recipe(tmp_path, "tokenizer.levels=2", "tokenizer.codebook_size=8"))
    assert "  validation ranks 20 users, " in check(recipe(tmp_path, "evaluation.validation_users=20"))


def test_check_prints_what_it_found_and_writes_nothing(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    text = check(config)
    assert "users                 80\n" in text
    assert "steps" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_measures_a_run_again_to_the_same_numbers(finished: Path, folder: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert evaluate_path(str(finished), None)["test"] == metrics["test"]
    elsewhere = folder.parent / "日誌 😀"
    shutil.copytree(folder, elsewhere)
    assert evaluate_path(str(finished / "model"), elsewhere)["test"] == metrics["test"]
    assert evaluate_path(str(finished), elsewhere)["test"] == metrics["test"]


def test_a_recipe_beside_a_bundle_is_not_that_of_its_run(finished: Path, folder: Path, tmp_path: Path) -> None:
    """It may split in another way, and test on what the model was trained on; or make items of two bundles one's."""
    for place in ("served", "models/a", "models/b"):
        shutil.copytree(finished / "model", tmp_path / place)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{source:", "{split: temporal, source:"))
    assert evaluate_path(str(tmp_path / "served"), folder)["protocol"]["split"] == "leave-last-out"
    assert "Items are joined by id." in inspect(tmp_path / "models/a", tmp_path / "models/b")


def test_several_models_are_measured_together(finished: Path) -> None:
    alone = json.loads((finished / "metrics.json").read_text())
    together = evaluate_path(str(finished), None, [str(finished / "model")])
    assert together["test"] == pytest.approx(alone["test"], abs=1e-9)
    assert together["protocol"] == {**alone["protocol"], "models": 2}
    assert table(together).splitlines()[-1].startswith(("2 models", "oracle"))


def test_models_of_different_splits_are_not_measured_together(finished: Path, tmp_path: Path) -> None:
    """The users that one is tested on may be those that another was trained on."""
    path = Path(shutil.copytree(finished / "model", tmp_path / "other")) / "generation.json"
    settings = json.loads(path.read_text())
    for protocol, message in (
        (
            {**settings["protocol"], "split": "temporal"},
            r'`data.split` is "leave-last-out" for .*, and "temporal" for .*other',
        ),
        ({**settings["protocol"], "k_core": 3}, "`data.k_core` is 0 for .*, and 3 for .*other"),
        ({}, "other: this model does not say how its data were split"),
    ):
        path.write_text(json.dumps(settings | {"protocol": protocol}))
        with pytest.raises(ArtifactError, match=message):
            evaluate_path(str(finished), None, [str(tmp_path / "other")])
    path.write_text(json.dumps(settings | {"protocol": {**settings["protocol"], "unknown_items": "drop"}}))
    assert evaluate_path(str(finished), None, [str(tmp_path / "other")])["protocol"]["models"] == 2


def test_evaluate_refuses_data_of_another_catalogue(finished: Path, tmp_path: Path) -> None:
    catalog, interactions, _ = synthetic.generate(num_items=50, num_users=40, seed=5)
    synthetic.write_folder(catalog, interactions, tmp_path / "other")
    with pytest.raises(ArtifactError, match="they lack the last 10"):
        evaluate_path(str(finished / "model"), tmp_path / "other")


def test_inspect_finds_codes_in_a_run_a_bundle_and_a_codes_folder(finished: Path) -> None:
    texts = [inspect(finished / part) for part in (".", "model", "codes/v0")]
    assert all("level" in text for text in texts)
    assert "100.0% to level 1" in inspect(finished, finished / "model")
    with pytest.raises(ArtifactError, match="no item codes here"):
        inspect(finished.parent / "nowhere")


def test_a_bundle_holds_no_user(finished: Path) -> None:
    users = set(pq.read_table(finished / "predictions.parquet")["user"].to_pylist())
    for file in filter(Path.is_file, (finished / "model").rglob("*")):
        content = file.read_bytes()
        assert not any(f'"{user}"'.encode() in content for user in users), file


@pytest.mark.slow
def test_two_processes_measure_as_one_and_neither_outlives_an_error_of_the_main_one(tmp_path: Path) -> None:
    """They share validation and test; what main does alone, such as baselines, the other one waits for."""
    settings = ("evaluation.batch_size=8", "trainer.per_device_train_batch_size=8")
    config, out = recipe(tmp_path, *settings), tmp_path / "run"
    flags = ["--out", str(out), *(word for setting in settings for word in ("--set", setting))]
    assert [status for status, _ in run_in_two_processes(tmp_path / "tiny.yaml", *flags)] == [0, 0]
    together = pq.read_table(out / "predictions.parquet"), json.loads((out / "metrics.json").read_text())
    run(config, out, start="evaluate")
    assert pq.read_table(out / "predictions.parquet").equals(together[0])
    alone = json.loads((out / "metrics.json").read_text())
    assert {key: alone[key] for key in ("test", "ci95", "segments")} == {
        key: together[1][key] for key in ("test", "ci95", "segments")
    }
    assert evaluate_path(str(out), None)["validation"] == together[1]["validation"]

    (out / "training.json").write_text("cut sho")
    (main, says), (other, _) = run_in_two_processes(tmp_path / "tiny.yaml", *flags, "--from", "evaluate")
    assert main == 2
    assert "training.json:1: not JSON" in says
    assert other != 0


def test_models_are_not_read_beyond_where_they_are_themselves() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
    long = Phi3Config(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope,
    )
    assert most_positions(long) == 16
    assert most_positions(LlamaConfig(max_position_embeddings=64)) == 64
    assert most_positions(T5Config()) is None

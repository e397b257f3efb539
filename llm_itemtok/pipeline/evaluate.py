"""The evaluation stage: a bundle, a split and the baselines → `metrics.json`, predictions and examples."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from numpy.typing import NDArray

from llm_itemtok.answering import Answering
from llm_itemtok.artifacts import (
    CATEGORIES,
    EXAMPLES,
    METRICS,
    MODEL,
    PREDICTIONS,
    QUALITY,
    RANKS,
    RECIPE,
    TRAINING,
    cache_folder,
    read_json,
    run_of,
    write_bytes,
    write_json,
    write_text,
)
from llm_itemtok.bundle import CARD, GENERATION
from llm_itemtok.config import RunConfig, data_contradictions
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.splits import Cases
from llm_itemtok.ensemble import Ensemble
from llm_itemtok.errors import ArtifactError, RecipeError
from llm_itemtok.evaluation import baselines
from llm_itemtok.evaluation.full_ranking import Ranking
from llm_itemtok.evaluation.metrics import bootstrap, metrics_from_ranks, ranks_from_scores
from llm_itemtok.evaluation.segments import item_order_masks, segment_masks, segment_metrics, user_column_masks
from llm_itemtok.items.quality import quality
from llm_itemtok.pipeline.prepare import PROTOCOL, Dataset, Log, load_data, progress_lines
from llm_itemtok.pipeline.updates import newest_version
from llm_itemtok.recommender import Recommender
from llm_itemtok.settings import Data, Evaluation, ItemOrderSegments, Segments
from llm_itemtok.strict import Checker


def rank(answers: Answering, cases: Cases, *, batch_size: int, log: Log, what: str) -> Ranking:
    """Rank cases as the model says that it is decoded; `what` they are is said in progress lines."""
    return answers.rank(cases, batch_size=batch_size, progress=progress_lines(log, what))


def rank_test(answers: Answering, data: Dataset, *, batch_size: int, log: Log) -> tuple[Ranking, dict[str, float]]:
    """Rank the test cases, and say how fast that was.

    Args:
        answers: whose catalogue must be the data's.
        data: catalogue, log and split.
        batch_size: users decoded at a time.
        log: called with progress lines.

    Returns:
        The lists, and `speed` of `metrics.json`: seconds by the clock, users a second (of all processes together), and
        on a CPU the share of this process's time that went into the model, body and head. Prompts, masks, trie, top-k
        and ranks are the rest.

    Raises:
        ArtifactError: if model and data have different catalogues.
    """
    answers.check_catalog(data.catalog)
    started = time.perf_counter()
    ranking = rank(answers, data.split.test, batch_size=batch_size, log=log, what="test users")
    seconds = time.perf_counter() - started
    speed = {"test_seconds": round(seconds, 3), "users_per_second": round(len(data.split.test) / seconds, 1)}
    if "replicated" in ranking.decoder:
        log(
            "  the model's attention takes no tree-shaped masks: every beam keeps a copy of the history, slower by half"
        )
    if ranking.model_seconds is not None:
        speed["model_share"] = round(ranking.model_seconds / seconds, 3)
    return ranking, speed


def measure(
    answers: Answering,
    data: Dataset,
    ranking: Ranking,
    *,
    k_core: int,
    seed: int,
    baseline_names: tuple[str, ...],
    repeats: bool,
    segments: Mapping[str, Segments],
    quality: Mapping[str, Any],
    training: Mapping[str, Any],
    validation: Mapping[str, float],
    speed: Mapping[str, float],
    log: Log,
) -> dict[str, Any]:
    """Measure a recommender by its test lists: the contract's `metrics.json`.

    Args:
        answers: whose lists they are.
        data: catalogue, log and split.
        ranking: of the test cases.
        k_core: of the data, for the protocol stamp.
        seed: of the bootstrap.
        baseline_names: measured beside it; the generator's oracle is added on synthetic data.
        repeats: False where the model might leave out items of a history; then baselines may, too.
        segments: rules for further segments, whose columns `data` was read with.
        quality: of the item codes, copied.
        training: what training took, copied; empty for a model of unknown origin.
        validation: metrics of all validation users, copied.
        speed: of the ranking, copied.
        log: called with progress lines.
    """
    masks = _masks(data, segments)
    return {
        "protocol": _protocol(answers, data, k_core, seed),
        "test": metrics_from_ranks(ranking.ranks),
        "ci95": bootstrap(ranking.ranks, seed=seed),
        "segments": segment_metrics(ranking.ranks, masks),
        "validation": dict(validation),
        "baselines": _baselines(data, baseline_names, answers, repeats, masks, seed, log),
        "codes": dict(quality),
        "training": dict(training),
        "speed": dict(speed),
    }


def _baselines(
    data: Dataset,
    names: tuple[str, ...],
    answers: Answering,
    repeats: bool,
    masks: Mapping[str, NDArray[np.bool_]],
    seed: int,
    log: Log,
) -> dict[str, dict[str, Any]]:
    """The baselines, measured now or on the same split before, and the oracle where there is one."""
    split, test = data.split, data.split.test
    others = baselines.evaluate_baselines(
        names,
        split,
        test,
        answers.mask_seen,
        seed,
        repeats=repeats,
        device=answers.device,
        masks=masks,
        cache=cache_folder() / "baselines",
        log=log,
    )
    if data.oracle is not None:
        scores = data.oracle.scores(test.histories(), test.users)
        exclude = baselines.seen_items(test.histories(), len(data.catalog)) if answers.mask_seen else None
        ranks = ranks_from_scores(scores, test.targets, exclude)
        others["oracle"] = {"test": metrics_from_ranks(ranks), "ci95": bootstrap(ranks, seed=seed)}
    return others


def _protocol(answers: Answering, data: Dataset, k_core: int, seed: int) -> dict[str, Any]:
    """What has to agree for numbers to be comparable.

    `models` and `dense_share` only where more than one answers, `repeats` where items of a history are no answers.
    """
    generations = answers.generations
    shares = [generation.dense_share for generation in generations]
    return {
        "split": data.split.kind,
        "k_core": k_core,
        "history_length": max(generation.history_length for generation in generations),
        "mask_seen": answers.mask_seen,
        **({} if answers.repeats else {"repeats": False}),
        "candidates": "full",
        "beam": answers.beam,
        "normaliser": "/".join(sorted({generation.normaliser for generation in generations})),
        **({"models": len(generations)} if len(generations) > 1 else {}),
        **({"dense_share": shares[0] if len(shares) == 1 else shares} if any(shares) else {}),
        "seed": seed,
        "catalog_sha256": data.catalog.sha256,
        "interactions_sha256": data.interactions.sha256,
        "counts": {"items": len(data.catalog), **data.split.counts},
    }


def _masks(data: Dataset, rules: Mapping[str, Segments]) -> dict[str, NDArray[np.bool_]]:
    """Say which test cases belong to which segment: those that every run has, and those of the recipe's rules."""
    test = data.split.test
    masks = segment_masks(test, data.split.item_counts())
    for name, rule in rules.items():
        if isinstance(rule, ItemOrderSegments):
            masks |= item_order_masks(name, test, data.catalog.column(rule.column))
        else:
            masks |= user_column_masks(name, test, data.interactions, rule.column)
    return masks


def evaluate(config: RunConfig, data: Dataset, folder: Path, log: Log) -> None:
    """Measure the run's bundle; write `metrics.json`, `predictions.parquet`, `examples.json` and the model card.

    Every process of a run calls this. They share the ranking, which comes first; then the main process alone measures
    baselines and writes, however long that takes: the others are done here.
    """
    recommender = Recommender.from_pretrained(
        folder / MODEL,
        device="cpu" if config.trainer.get("use_cpu") else None,
        trust_remote_code=config.model.trust_remote_code,
    )
    ranking, speed = rank_test(recommender, data, batch_size=config.evaluation.batch_size, log=log)
    if not PartialState().is_main_process:
        return
    training = read_json(folder / TRAINING)
    training.pop("made_by", None)
    metrics = measure(
        recommender,
        data,
        ranking,
        k_core=config.data.k_core,
        seed=config.seed,
        baseline_names=config.evaluation.baselines,
        repeats=config.evaluation.repeats == "keep",
        segments=config.evaluation.segments,
        quality=read_json(newest_version(folder) / QUALITY),
        validation=training.pop("validation"),
        training=training,
        speed=speed,
        log=log,
    )
    test = data.split.test
    write_ranks(folder / RANKS, ranking, test)
    write_predictions(folder / PREDICTIONS, ranking, test, recommender.item_ids, config.evaluation.k)
    write_categories(folder / CATEGORIES, data.catalog)
    write_json(folder / EXAMPLES, _examples(ranking, test, recommender))
    write_text(folder / MODEL / CARD, recommender.card(metrics, config.to_dict()))
    write_json(folder / METRICS, metrics)
    log(table(metrics))


def evaluate_path(
    path: str, data_folder: Path | None, others: Sequence[str] = (), *, log: Log = lambda _line: None
) -> dict[str, Any]:
    """Measure a run or a bundle again, by default on the data of its run.

    Args:
        path: run folder, bundle or Hub id.
        data_folder: data folder to use instead of the run's.
        others: further ones that answer together with it, see `Ensemble`; data and protocol are those of `path`.
        log: called with progress lines.

    Returns:
        As `metrics.json`. `codes` is empty where several models answer.

    Raises:
        ArtifactError: if `path` is a bundle without a run around it and no data folder is given, or the models do not
            go together, such as by the split that they were trained on.
    """
    recommender = Recommender.from_pretrained(path)
    answers: Answering = recommender
    if others:
        answers = Ensemble([recommender, *(Recommender.from_pretrained(other) for other in others)])
        _same_split([path, *others], answers.members)
    run = run_of(Path(path))
    recipe = None if run is None else run / RECIPE
    if recipe is None and data_folder is None:
        raise ArtifactError(f"{path}: a model without its run folder has no data; name a folder with `--data`")
    config = RunConfig.load(recipe) if recipe else None
    if recipe and config and data_folder is not None:
        source = "folder" if config.data.source == "synthetic" else config.data.source
        place = json.dumps(str(data_folder), ensure_ascii=False)
        config = RunConfig.load(recipe, [f"data.source={source}", f"data.path={place}"])
    settings = config.data if config else _bundle_data(recommender, str(data_folder))
    seed = config.seed if config else 0
    segments = config.evaluation.segments if config else {}
    batch_size = config.evaluation.batch_size if config else Evaluation().batch_size
    data = load_data(settings, seed, segments)
    ranking, speed = rank_test(answers, data, batch_size=batch_size, log=log)
    validation = rank(answers, data.split.validation, batch_size=batch_size, log=log, what="validation users")
    return measure(
        answers,
        data,
        ranking,
        k_core=settings.k_core,
        seed=seed,
        baseline_names=config.evaluation.baselines if config else Evaluation().baselines,
        repeats=config.evaluation.repeats == "keep" if config else answers.repeats,
        segments=segments,
        quality={} if others else quality(recommender.model.vocab.codes),
        training={},
        validation=metrics_from_ranks(validation.ranks),
        speed=speed,
        log=log,
    )


def _same_split(paths: Sequence[str], members: Sequence[Recommender]) -> None:
    """Raise `ArtifactError` unless all had one split: one may have learnt what others are tested on."""
    first, *others = (_split_of(path, member) for path, member in zip(paths, members, strict=True))
    for path, other in zip(paths[1:], others, strict=True):
        for name in PROTOCOL:
            if name != "unknown_items" and other[name] != first[name]:
                raise ArtifactError(
                    "models that are measured together must have been trained on the same split, or one may have "
                    f"learnt what another is tested on; `data.{name}` is {json.dumps(first[name])} for {paths[0]}, "
                    f"and {json.dumps(other[name])} for {path}"
                )


def _split_of(path: str, member: Recommender) -> dict[str, Any]:
    try:
        return dataclasses.asdict(_bundle_data(member, "."))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _bundle_data(recommender: Recommender, path: str) -> Data:
    """A data folder, split as the data were that a bundle was trained on.

    Raises:
        ArtifactError: if the bundle does not say how that was, or says what is no way to split.
    """
    protocol, here = recommender.generation.protocol, f"the `protocol` in the model's {GENERATION}"
    if not protocol:
        raise ArtifactError("this model does not say how its data were split, so what to test on is not known")
    if others := sorted(protocol.keys() - set(PROTOCOL)):
        raise ArtifactError(f"{here} must have settings of {', '.join(PROTOCOL)} only, found: {others}")
    try:
        data: Data = Checker(here).section((Data,), Data, {**protocol, "path": path}, ("data",))
    except RecipeError as error:
        raise ArtifactError(str(error)) from error
    for contradiction in data_contradictions(data):
        raise ArtifactError(f"{here}: {contradiction}")
    return data


def write_ranks(path: Path, ranking: Ranking, cases: Cases) -> None:
    """Write where each user's target was found: user, rank (float32, 0 where it is not in the list)."""
    columns = {"user": pa.array(cases.users, pa.string()), "rank": pa.array(ranking.ranks, pa.float32())}
    _write_table(path, columns)


def _write_table(path: Path, columns: Mapping[str, pa.Array]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def write_predictions(path: Path, ranking: Ranking, cases: Cases, item_ids: tuple[str, ...], k: int) -> None:
    """Write the first `k` of every list: user, rank, item, score."""
    items, scores = ranking.items[:, :k], ranking.scores[:, :k]
    case, place = np.nonzero(items >= 0)
    names = np.asarray(item_ids, dtype=object)
    columns = {
        "user": pa.array(np.asarray(cases.users, dtype=object)[case], pa.string()),
        "rank": pa.array(place + 1, pa.int32()),
        "item": pa.array(names[items[case, place]], pa.string()),
        "score": pa.array(scores[case, place], pa.float32()),
    }
    _write_table(path, columns)


def write_categories(path: Path, catalog: Catalog) -> None:
    """Write what the report colours the code tree by, in catalogue order: item, categories (a list of texts)."""
    categories = pa.array([list(parts) for parts in catalog.categories], pa.list_(pa.string()))
    _write_table(path, {"item": pa.array(catalog.item_ids, pa.string()), "categories": categories})


def _examples(ranking: Ranking, cases: Cases, recommender: Recommender, each: int = 3) -> list[dict[str, Any]]:
    """A few users with history, target and list, and the rule that chose them; `each` a rule, best first."""

    def item(row: int) -> dict[str, str]:
        return {"item_id": recommender.item_ids[row], "title": recommender.titles[row]}

    return [
        {
            "user": cases.users[case],
            "rule": rule,
            "history": [item(row) for row in cases.history(case)[-recommender.generation.history_length :].tolist()],
            "older": max(0, len(cases.history(case)) - recommender.generation.history_length),
            "target": item(int(cases.targets[case])),
            "rank": float(ranking.ranks[case]),
            "recommendations": [
                {**item(int(row)), "score": float(score)}
                for row, score in zip(ranking.items[case][:10], ranking.scores[case][:10], strict=True)
                if row >= 0
            ],
        }
        for rule, chosen in _chosen_users(ranking.ranks, each).items()
        for case in chosen
    ]


def _chosen_users(ranks: NDArray[np.float64], each: int) -> dict[str, list[int]]:
    """Choose users by rule, none twice; users of equal rank stand in the order of the data.

    Args:
        ranks: float64 `[C]`, rank of each target, 0 where it was not found.
        each: at most so many a rule; where few were found, they are shared out among the rules.

    Returns:
        Cases under `best` (lowest ranks), `median` (the middle of those found) and `worst` (targets not found, or,
        where all were found, the highest ranks, highest first).
    """
    missed = np.flatnonzero(ranks == 0)
    found = np.flatnonzero(ranks > 0)
    by_rank = found[np.argsort(ranks[found], kind="stable")]
    few = min(each, max(1, len(by_rank) // 3), len(by_rank))
    stop = len(by_rank) if len(missed) else max(few, len(by_rank) - few)
    middle = min(max(few, (len(by_rank) - few) // 2), stop)
    worst = missed[:each] if len(missed) else by_rank[stop:][::-1]
    return {
        "best": by_rank[:few].tolist(),
        "median": by_rank[middle : min(middle + few, stop)].tolist(),
        "worst": worst.tolist(),
    }


def table(metrics: Mapping[str, Any]) -> str:
    """Plain-text table of the test metrics, the model last but for the oracle."""
    rows = [(name, part) for name, part in metrics["baselines"].items() if name != "oracle"]
    models = metrics["protocol"].get("models", 1)
    rows.append(("model" if models == 1 else f"{models} models", metrics))
    rows += [(name, part) for name, part in metrics["baselines"].items() if name == "oracle"]
    lines = [f"{'test, full ranking':<20} {'Recall@10':>9} {'95 % interval':>17} {'NDCG@10':>8}"]
    for name, part in rows:
        test, interval = part["test"], "{:.4f} – {:.4f}".format(*part["ci95"]["recall@10"])
        lines.append(f"{name:<20} {test['recall@10']:>9.4f} {interval:>17} {test['ndcg@10']:>8.4f}")
    return "\n".join(lines)

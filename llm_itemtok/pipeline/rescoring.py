"""What a recipe's `rescoring` makes: a dense model trained on the same log, and its share in the scores."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from llm_itemtok import sasrec
from llm_itemtok.answering import best_scored
from llm_itemtok.artifacts import cache_folder, kept_folder, read_json, sha256_of_arrays, write_json
from llm_itemtok.bundle import items_sha256
from llm_itemtok.config import RunConfig
from llm_itemtok.data.splits import Cases
from llm_itemtok.decoding.dense import FILE_NAME, Rescorer
from llm_itemtok.evaluation.baselines import fingerprint, sasrec_interval, validated
from llm_itemtok.evaluation.full_ranking import left_out
from llm_itemtok.evaluation.metrics import metrics_from_ranks, ranks_from_lists
from llm_itemtok.pipeline.prepare import Dataset, Log, progress_lines
from llm_itemtok.pipeline.stages import made_by
from llm_itemtok.pipeline.validation import RULES, WAYS
from llm_itemtok.recommender import Recommender
from llm_itemtok.settings import SasrecRescoring

KEY = "ndcg@10"
"""What a share is chosen by."""
_TOOK = "took.json"


def with_rescoring(
    config: RunConfig, data: Dataset, recommender: Recommender, log: Log
) -> tuple[Recommender, dict[str, Any]]:
    """Train the dense model and choose its share on validation; with it, where the recipe says so, `repeats`.

    Args:
        config: the recipe.
        data: its data; test is not looked at.
        recommender: of the language model alone, with `repeats` as that does better by itself.
        log: called with progress lines.

    Returns:
        The recommender with its dense model, and `rescoring.json`; both as they were and empty where the recipe has no
        dense model.
    """
    chosen = config.rescoring
    if not isinstance(chosen, SasrecRescoring):
        if (left := Path(config.model.name) / FILE_NAME).is_file():
            log(f"  {left} is left behind: the recipe has no dense model (`rescoring`)")
        return recommender, {}
    rescorer, took = _trained(config, chosen, data, log)
    cases = data.split.validation
    shares = (0.0, *sorted({*chosen.shares}), 1.0)
    ways = (True, False) if config.evaluation.repeats == "choose" else (recommender.generation.repeats,)
    of_way, best_of, began = {}, {}, time.perf_counter()
    for way in ways:
        asked, progress = recommender.with_generation(repeats=way), progress_lines(log, "validation users")
        found = of_way[way] = _by_share(asked, rescorer, cases, shares, config, progress)
        best_of[way] = max(chosen.shares, key=lambda share: (found[share][KEY], -share))
    repeats = max(ways, key=lambda way: of_way[way][best_of[way]][KEY])
    found, best = of_way[repeats], best_of[repeats]
    alone = f"{found[0.0][KEY]:.4f} as the language model ranks, {found[1.0][KEY]:.4f} as the dense one does"
    log(f"  re-scoring: validation NDCG@10 {found[best][KEY]:.4f} with a share of {best:g}; {alone}")
    facts: dict[str, Any] = {"share": best, "users": len(cases), "training": took}
    facts["choosing_seconds"] = round(time.perf_counter() - began, 3)
    facts["validation"] = [{"share": share, **found[share]} for share in shares]
    if len(ways) > 1:
        facts["repeats"] = {WAYS[way]: of_way[way][best_of[way]][KEY] for way in ways}
        log(f"  items of a history are {'kept among' if repeats else 'left out of'} the answers of both")
    return recommender.with_generation(repeats=repeats).with_rescorer(rescorer, best), facts


def chosen_metrics(shares: Mapping[str, Any]) -> dict[str, float]:
    """Of `rescoring.json`, validation metrics under the share that was chosen; empty where there is no dense model."""
    found = [line for line in shares.get("validation", ()) if line["share"] == shares["share"]]
    return {key: value for line in found for key, value in line.items() if key != "share"}


def _trained(config: RunConfig, chosen: SasrecRescoring, data: Dataset, log: Log) -> tuple[Rescorer, dict[str, Any]]:
    """Train the dense model, once for all runs with the same log, settings and seed, and say what that took."""
    split, mask_seen, device = data.split, config.evaluation.mask_seen, str(PartialState().device)
    ways = RULES[config.evaluation.repeats]
    cases = split.validation.head(config.evaluation.validation_users or len(split.validation), config.seed)
    items = items_sha256(data.catalog.item_ids)

    def fill(new: Path) -> None:
        log("  training the dense model …")
        began = time.perf_counter()
        fitted = sasrec.fit(
            split.train_sequences(),
            split.num_items,
            validate=lambda model: max(validated(model, cases, mask_seen, way) for way in ways),
            every=sasrec_interval(split),
            seed=config.seed,
            device=device,
            width=chosen.width,
            dropout=chosen.dropout,
            steps=chosen.steps,
            progress=progress_lines(log, "steps of the dense model"),
        )
        took = {
            "steps": fitted.step,
            "seconds": round(time.perf_counter() - began, 3),
            "parameters": sum(weights.numel() for weights in fitted.model.parameters()),
        }
        log(f"  dense model: {took['parameters']:,} parameters, best after {fitted.step:,} steps")
        Rescorer(fitted.model, items).save(new)
        write_json(new / _TOOK, took)

    facts: dict[str, Any] = {
        "width": chosen.width,
        "dropout": chosen.dropout,
        "steps": chosen.steps,
        "seed": config.seed,
    }
    if False in ways:  # else nothing, as in what was kept before there was such a choice
        facts["repeats"] = ways
    facts |= {"mask_seen": mask_seen, "device": device.split(":")[0], "method": fingerprint("sasrec"), "items": items}
    inputs = (split.train_items, split.train_offsets, cases.items, cases.offsets, cases.targets)
    key = sha256_of_arrays(json.dumps(facts), made_by("torch"), *inputs)
    kept = kept_folder(cache_folder() / "dense", key, fill, log)
    return Rescorer.load(kept), read_json(kept / _TOOK)


def _by_share(
    recommender: Recommender,
    rescorer: Rescorer,
    cases: Cases,
    shares: Sequence[float],
    config: RunConfig,
    progress: Callable[[int, int], None],
) -> dict[float, dict[str, float]]:
    """Metrics of some cases by the share of the dense model; what either finds is scored once for all of them."""
    together = recommender.with_rescorer(rescorer, 0.0)
    beam, batch = recommender.beam, config.evaluation.batch_size
    ranks = {share: np.zeros(len(cases)) for share in shares}
    order = np.argsort([len(history) for history in cases.histories()], kind="stable")
    for start in range(0, len(order), batch):
        at = order[start : start + batch]
        histories = [cases.history(case) for case in at]
        seen = left_out(histories, cases.targets[at], mask_seen=recommender.mask_seen, repeats=recommender.repeats)
        found = together.both(histories, beam, excluded=seen)
        for share in shares:
            lists = best_scored(found.items, found.mixed(share), min(beam, len(recommender.item_ids)))
            ranks[share][at] = ranks_from_lists(lists.items, lists.scores, cases.targets[at])
        progress(min(start + batch, len(order)), len(order))
    return {share: metrics_from_ranks(of_share) for share, of_share in ranks.items()}

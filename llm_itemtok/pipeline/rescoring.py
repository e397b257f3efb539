"""What a recipe's `rescoring` makes: a dense model trained on the same log, and its share in the scores."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from llm_itemtok import sasrec
from llm_itemtok.answering import best_scored
from llm_itemtok.artifacts import kept_folder, sha256_of_arrays
from llm_itemtok.config import RunConfig
from llm_itemtok.data.splits import Cases
from llm_itemtok.decoding.dense import Rescorer
from llm_itemtok.evaluation.baselines import rank_cases
from llm_itemtok.evaluation.metrics import metrics_from_ranks, ranks_from_lists
from llm_itemtok.pipeline.prepare import Dataset, Log, progress_lines
from llm_itemtok.pipeline.stages import RESULTS_VERSION
from llm_itemtok.recommender import Recommender
from llm_itemtok.settings import SasrecRescoring

KEY = "ndcg@10"
"""What a share is chosen by."""


def with_rescoring(
    config: RunConfig, data: Dataset, recommender: Recommender, log: Log
) -> tuple[Recommender, dict[str, Any]]:
    """Train the dense model and choose its share on validation.

    Args:
        config: the recipe.
        data: its data; test is not looked at.
        recommender: of the language model alone.
        log: called with progress lines.

    Returns:
        The recommender with its dense model, and `rescoring.json`; both as they were and empty where the recipe has no
        dense model.
    """
    chosen = config.rescoring
    if not isinstance(chosen, SasrecRescoring):
        return recommender, {}
    rescorer = _rescorer(config, chosen, data, log)
    cases = data.split.validation
    shares = (0.0, *sorted({*chosen.weights} - {0.0, 1.0}), 1.0)
    found = _by_share(recommender, rescorer, cases, shares, config, progress_lines(log, "validation users"))
    best = max(chosen.weights, key=lambda share: (found[share][KEY], -share))
    alone = f"{found[0.0][KEY]:.4f} by the language model alone, {found[1.0][KEY]:.4f} by the dense one"
    log(f"  re-scoring: validation NDCG@10 {found[best][KEY]:.4f} with a share of {best:g}; {alone}")
    facts = {"share": best, "users": len(cases), "validation": [{"share": share, **found[share]} for share in shares]}
    return recommender.with_rescorer(rescorer, best), facts


def chosen_metrics(shares: Mapping[str, Any]) -> dict[str, float]:
    """Of `rescoring.json`, validation metrics under the share that was chosen; empty where there is no dense model."""
    found = [line for line in shares.get("validation", ()) if line["share"] == shares["share"]]
    return {key: value for line in found for key, value in line.items() if key != "share"}


def _rescorer(config: RunConfig, chosen: SasrecRescoring, data: Dataset, log: Log) -> Rescorer:
    """Train the dense model once for all runs with the same log, settings and seed."""
    split, mask_seen = data.split, config.evaluation.mask_seen
    cases = split.validation.head(config.evaluation.validation_users or len(split.validation), config.seed)
    device = str(PartialState().device)

    def fill(new: Path) -> None:
        log("  training the dense model …")
        fitted = sasrec.fit(
            split.train_sequences(),
            split.num_items,
            validate=lambda model: metrics_from_ranks(rank_cases(model, cases, mask_seen))[KEY],
            seed=config.seed,
            device=device,
            width=chosen.width,
            dropout=chosen.dropout,
            steps=chosen.steps,
            progress=progress_lines(log, "steps of the dense model"),
        )
        log(f"  dense model: validation NDCG@10 {fitted.score:.4f} after {fitted.step:,} steps")
        Rescorer(fitted.model).save(new)

    facts = {"seed": config.seed, "mask_seen": mask_seen, "device": device.split(":")[0]}
    sizes = {"width": chosen.width, "dropout": chosen.dropout, "steps": chosen.steps}
    versions = f"torch={version('torch')} results={RESULTS_VERSION}"
    inputs = (split.train_items, split.train_offsets, cases.items, cases.offsets, cases.targets)
    key = sha256_of_arrays(json.dumps({**facts, **sizes}), versions, str(split.num_items), *inputs)
    return Rescorer.load(kept_folder("dense", key, fill))


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
        seen = None
        if recommender.mask_seen:
            seen = [history[history != cases.targets[case]] for case, history in zip(at, histories, strict=True)]
        found = together.both(histories, beam, excluded=seen)
        for share in shares:
            lists = best_scored(found.items, found.mixed(share), min(beam, len(recommender.item_ids)))
            ranks[share][at] = ranks_from_lists(lists.items, lists.scores, cases.targets[at])
        progress(min(start + batch, len(order)), len(order))
    return {share: metrics_from_ranks(of_share) for share, of_share in ranks.items()}

"""Updates of item tokens as a recipe asks for them: the method, its material, and how rounds are judged."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset as ExampleTable

from llm_itemtok.artifacts import CODES
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.findings import as_json, findings, gaps
from llm_itemtok.items.quality import quality, vector_pairs
from llm_itemtok.items.quantizers import read_quantizer
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.pipeline.prepare import Dataset, Log, doctor_facts
from llm_itemtok.pipeline.vectors import improves_by_vectors
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.self_improve import Material, RandomMoves, Search, SelfImprove
from llm_itemtok.training.updates import Method, Rules, Updates
from llm_itemtok.training.versions import Versions
from llm_itemtok.update_settings import FixedUpdate, SelfImproveUpdate


@dataclass(frozen=True)
class Schedule:
    """When rounds begin, and how long they take.

    Attributes:
        every: optimiser steps between the beginnings of rounds.
        adapt: optimiser steps of a trial.
        rounds: that can end before training does.
    """

    every: int
    adapt: int
    rounds: int

    @classmethod
    def of(cls, update: SelfImproveUpdate, steps_an_epoch: int, total: int) -> "Schedule":
        """Count in steps.

        Raises:
            RecipeError: if no round could end before training does.
        """
        asked = update.every
        every = max(1, asked.steps or round((asked.epochs or 1.0) * steps_an_epoch))
        # Without a gate there is no trial, but a step must follow that has the new codes.
        adapt = 1 if update.gate == "none" else max(1, round(update.adapt * steps_an_epoch))
        if every + adapt > total:
            raise RecipeError(
                f"`update.every` and `update.adapt` must leave room for a round, which takes {every + adapt:,} steps, "
                f"but training has {total:,}; update earlier, or train longer"
            )
        apart = every * math.ceil(adapt / every)  # the next round waits for the end of the one before
        return cls(every, adapt, min(update.rounds, (total - adapt - every) // apart + 1))


def make_updates(
    config: RunConfig,
    data: Dataset,
    model: ItemTokenModel,
    prompts: Prompts,
    binding: LateBinding,
    table: ExampleTable,
    *,
    steps: tuple[int, int],
    validate: Callable[[], Mapping[str, float]],
    vectors: Callable[[], np.ndarray | None],
    folder: Path,
    log: Log,
) -> Updates | None:
    """Build the recipe's updates; None where item tokens are fixed.

    Args:
        config: the recipe.
        data: its data.
        model: the model to train, which holds its codes.
        prompts: of placeholders, with the titles if a task reads them.
        binding: whose placeholders they are.
        table: the training examples.
        steps: of an epoch, and of the whole training.
        validate: measures the model.
        vectors: gives the item vectors `[N, D]`.
        folder: the run folder.
        log: called with progress lines.

    Raises:
        RecipeError: if no round could end before training does.
    """
    update = config.update
    if not isinstance(update, SelfImproveUpdate):
        return None
    schedule = Schedule.of(update, *steps)
    matrix = vectors()
    near = None if matrix is None else vector_pairs(matrix)
    rules = Rules(
        rounds=update.rounds,
        gate=None if update.gate == "none" else update.gate,
        adapt=schedule.adapt,
        tolerance=update.tolerance,
        patience=update.patience,
        refresh=update.rows == "refresh",
    )

    def describe(codes: ItemCodes) -> Mapping[str, Any]:
        figures, facts = quality(codes, matrix, near=near), doctor_facts(codes, data, near)
        found = {"findings": as_json(findings(figures, facts)), "not_judged": gaps(figures, facts)}
        return {**figures, "doctor": {**facts, **found}}

    titles = data.catalog.titles
    material = Material(
        prompts=prompts,
        text_rows=np.array([row for row, title in enumerate(titles) if title], dtype=np.int64),
        table=table,
        collate=Collator(prompts, model.vocab.num_levels),
        binding=binding,
        vectors=matrix if improves_by_vectors(config) else None,
    )
    return Updates(
        _method(config, update, schedule, material),
        rules,
        model=model,
        validate=validate,
        versions=Versions(folder, data.catalog.item_ids),
        describe=describe,
        say=log,
    )


def _method(config: RunConfig, update: SelfImproveUpdate, schedule: Schedule, material: Material) -> Method:
    if update.source == "random":
        return RandomMoves(schedule.every, update.outliers, seed=config.seed)
    search = Search(
        source=update.source,
        candidates=update.candidates,
        groups=update.groups,
        diversity=update.diversity,
        usage_penalty=update.usage_penalty,
        contexts=update.contexts,
        vectors_weight=update.vectors_weight,
        steps=update.iterations,
        outliers=update.outliers if update.scope == "outliers" else None,
        max_moves=update.max_moves,
        price=update.price,
        assignment=update.assignment,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )
    return SelfImprove(schedule.every, search, material)


def trains_quantizer(config: RunConfig) -> bool:
    """Tell whether the recipe's updates train the quantizer behind the codes."""
    return not isinstance(config.update, FixedUpdate | SelfImproveUpdate)


def keep_quantizer(folder: Path, model: ItemTokenModel) -> Quantizer | None:
    """The quantizer behind the codes of a trained model, None where there is none.

    One that was trained with the model is written beside the version that the model has, and beside no other, because
    it may be large; `codes/v0` is another stage's, and keeps the one that training began with.
    """
    version = newest_version(folder)
    if model.quantizer is None:
        return read_quantizer(version)
    if version.name != "v0":
        model.quantizer.save(version)
    return model.quantizer


def newest_version(folder: Path) -> Path:
    """The folder of the newest codes of a run, which are those of its model once training has finished."""
    return max((folder / CODES).glob("v[0-9]*"), key=lambda path: int(path.name[1:]))


def keep_versions_until(folder: Path, codes: ItemCodes) -> tuple[ItemCodes, int]:
    """Remove versions after the one that a model holds: the best checkpoint may lie before the last update.

    Returns:
        The codes as they were saved, with where they come from; and the number of versions that were removed.
    """
    removed = 0
    while (found := ItemCodes.load(path := newest_version(folder))) != codes:
        assert path.name != "v0", "a model's codes must be those of a version"
        shutil.rmtree(path)
        removed += 1
    return found, removed

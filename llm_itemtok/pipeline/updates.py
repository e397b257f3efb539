"""Updates of item tokens as a recipe asks for them: the method, its material, and how rounds are judged."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as ExampleTable
from transformers import TrainingArguments

from llm_itemtok.artifacts import code_versions
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.findings import judged
from llm_itemtok.items.quality import quality, vector_pairs
from llm_itemtok.items.quantizers import read_quantizer
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.model.soft_inputs import SoftInputs
from llm_itemtok.pipeline.alternate import alternate
from llm_itemtok.pipeline.objective import Aim
from llm_itemtok.pipeline.prepare import Dataset, Log, doctor_facts
from llm_itemtok.pipeline.vectors import improves_by_vectors
from llm_itemtok.training.bilevel import Bilevel, UpperLevel, UpperMaterial
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.self_improve import RandomMoves, Search, SearchMaterial, SelfImprove
from llm_itemtok.training.updates import Method, Rules, Updates
from llm_itemtok.training.versions import Versions
from llm_itemtok.update_settings import AlternateUpdate, BilevelUpdate, Every, FixedUpdate, SelfImproveUpdate


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
        every = every_steps(asked, steps_an_epoch)
        # Without a gate there is no trial, but a step must follow that has the new codes.
        adapt = 1 if update.gate == "none" else max(1, round(update.adapt * steps_an_epoch))
        if every + adapt > total:
            raise RecipeError(
                f"`update.every` and `update.adapt` must leave room for a round, which takes {every + adapt:,} steps, "
                f"but training has {total:,}; update earlier, or train longer"
            )
        apart = every * math.ceil(adapt / every)  # the next round waits for the end of the one before
        return cls(every, adapt, min(update.rounds, (total - adapt - every) // apart + 1))


@dataclass(frozen=True)
class Surroundings:
    """What updates work on.

    Attributes:
        model: to train, which holds its codes, and the quantizer behind them where that is trained.
        prompts: of placeholders, with the titles if a task reads them.
        binding: whose placeholders they are.
        table: the training examples.
        aim: what the training minimises, and what collates for it.
        arguments: of the training.
        steps: of an epoch, and of the whole training.
    """

    model: ItemTokenModel
    prompts: Prompts
    binding: LateBinding
    table: ExampleTable
    aim: Aim
    arguments: TrainingArguments
    steps: tuple[int, int]


def make_updates(
    config: RunConfig,
    data: Dataset,
    around: Surroundings,
    *,
    validate: Callable[[], Mapping[str, float]],
    vectors: Callable[[], np.ndarray | None],
    folder: Path,
    log: Log,
) -> Updates | None:
    """Build the recipe's updates; None where item tokens are fixed.

    Args:
        config: the recipe.
        data: its data.
        around: what they work on.
        validate: measures the model.
        vectors: gives the item vectors `[N, D]`.
        folder: the run folder.
        log: called with progress lines.

    Raises:
        RecipeError: if no round could end before training does.
    """
    update = config.update
    if isinstance(update, FixedUpdate):
        return None
    matrix = vectors()
    near = None if matrix is None else vector_pairs(matrix)

    def describe(codes: ItemCodes) -> Mapping[str, Any]:
        figures, facts = quality(codes, matrix, near=near), doctor_facts(codes, data, near)
        return {**figures, "doctor": judged(figures, facts)}

    if isinstance(update, SelfImproveUpdate):
        method, rules = _self_improve(config, update, data, around, matrix)
    elif isinstance(update, AlternateUpdate):
        assert matrix is not None
        every, parts = every_steps(update.every, around.steps[0]), (around.binding, around.table, around.aim)
        method, rules = alternate(config, update, around.model, *parts, matrix, every=every, steps=around.steps)
    else:
        assert matrix is not None
        method, rules = bilevel(config, update, around, matrix)
    return Updates(
        method,
        rules,
        model=around.model,
        validate=validate,
        versions=Versions(folder, data.catalog.item_ids),
        describe=describe,
        say=log,
    )


def _self_improve(
    config: RunConfig, update: SelfImproveUpdate, data: Dataset, around: Surroundings, matrix: np.ndarray | None
) -> tuple[Method, Rules]:
    """The method and the rules of `update.kind: self-improve`."""
    schedule = Schedule.of(update, *around.steps)
    rules = Rules(
        rounds=update.rounds,
        gate=None if update.gate == "none" else update.gate,
        adapt=schedule.adapt,
        tolerance=update.tolerance,
        patience=update.patience,
        refresh=update.rows == "refresh",
    )
    if update.source == "random":
        return RandomMoves(schedule.every, update.outliers, seed=config.seed), rules
    titles = data.catalog.titles
    material = SearchMaterial(
        prompts=around.prompts,
        text_rows=np.array([row for row, title in enumerate(titles) if title], dtype=np.int64),
        table=around.table,
        collate=Collator(around.prompts, around.model.vocab.num_levels),
        binding=around.binding,
        vectors=matrix if improves_by_vectors(config) else None,
    )
    search = Search(
        source=update.source,
        candidates=update.candidates,
        groups=update.groups,
        diversity=update.diversity,
        usage_penalty=update.usage_penalty,
        contexts=update.contexts,
        vectors_weight=update.vectors_weight,
        whiten=update.whiten,
        shrinkage=update.shrinkage,
        steps=update.iterations,
        outliers=update.outliers if update.scope == "outliers" else None,
        max_moves=update.max_moves,
        price=update.price,
        assignment=update.assignment,
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )
    return SelfImprove(schedule.every, search, material), rules


def every_steps(every: Every, steps_an_epoch: int) -> int:
    """What a recipe says of when rounds begin, in optimiser steps."""
    return max(1, every.steps or round((every.epochs or 1.0) * steps_an_epoch))


def quantizer_steps(update: BilevelUpdate, steps_an_epoch: int, total: int) -> int:
    """Optimiser steps from one step of the quantizer to the next.

    Raises:
        RecipeError: if training ends before it would take one.
    """
    every = every_steps(update.every, steps_an_epoch)
    if every >= total:
        raise RecipeError(
            f"`update.every` must leave room for a step of the quantizer, which comes after {every:,} steps, but "
            f"training has {total:,}; update earlier, or train longer"
        )
    return every


def bilevel(config: RunConfig, update: BilevelUpdate, around: Surroundings, matrix: np.ndarray) -> tuple[Method, Rules]:
    """The method and the rules of `update.kind: bilevel`; lets the model mix its inputs from now on.

    Raises:
        RecipeError: if training ends before the quantizer would take a step, or the model's attention cannot be
            differentiated twice.
    """
    model, arguments = around.model, around.arguments
    every, total = quantizer_steps(update, *around.steps), around.steps[1]
    second = update.order == 2 and update.look_ahead != 0
    attention = model.config._attn_implementation
    if second and attention not in ("eager", "sdpa"):
        raise RecipeError(
            f"`update.order: 2` differentiates attention twice, which `{attention}` does not allow; write "
            "`update.order: 1`"
        )
    assert model.quantizer is not None
    model.soft = SoftInputs(
        model.quantizer,
        torch.from_numpy(matrix),
        straight_through_residual=update.residual == "release",
        own=update.gradient == "own",
    )
    whole = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    upper = UpperLevel(
        look_ahead=update.look_ahead,
        order=2 if second else 1,
        surgery=update.surgery,
        weight=update.weight,
        learning_rate=update.learning_rate,
        weight_decay=update.weight_decay,
        codebook=update.codebook,
        commitment=update.commitment,
        margin=update.margin,
        batch_size=update.batch_size or whole,
        piece=arguments.train_batch_size,
        seed=config.seed,
    )
    material = UpperMaterial(
        table=around.table,
        collate=around.aim.collator,
        binding=around.binding,
        objective=around.aim.objective,
        vectors=matrix,
        half=arguments.bf16,
    )
    return Bilevel(every, upper, material, model), Rules(rounds=update.rounds or total, gate=None)


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
    return code_versions(folder)[-1][1]


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

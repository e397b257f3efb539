"""The objective of a recipe, and what it needs beside it: a collator, callbacks, item vectors, counts of targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset as ExampleTable
from torch import Tensor
from transformers import TrainerCallback

from llm_itemtok import objective_settings as settings
from llm_itemtok.config import RunConfig
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.pipeline.vectors import weighs_by_vectors
from llm_itemtok.settings import RecursiveScoring
from llm_itemtok.training import token_weights
from llm_itemtok.training.alignment import WithAlignments
from llm_itemtok.training.collator import Collator, WithTargetItems
from llm_itemtok.training.examples import NextItems
from llm_itemtok.training.next_token import NextToken
from llm_itemtok.training.objective import Objective
from llm_itemtok.training.recursive import Aligned
from llm_itemtok.training.token_weighting import FollowSteps, Target, TokenWeighted, figures


@dataclass(frozen=True)
class Aim:
    """An objective and its surroundings.

    Attributes:
        objective: what to minimise.
        collator: makes the batches that it reads.
        callbacks: of the trainer, before all that write its log down.
    """

    objective: Objective
    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
    callbacks: tuple[TrainerCallback, ...] = ()


def make_aim(
    config: RunConfig,
    model: ItemTokenModel,
    prompts: Prompts,
    collator: Collator,
    table: ExampleTable,
    vectors: Callable[[], np.ndarray | None],
) -> Aim:
    """Build the recipe's objective; what it learns besides becomes the model's `mix`.

    Args:
        config: the recipe.
        model: the model to train; weights of tokens follow its `vocab`.
        prompts: of the model.
        collator: renders the examples.
        table: the training examples, whose targets are counted.
        vectors: gives the item vectors `[N, D]`; called if weights are made of them.
    """
    chosen = config.objective
    tasks = [str(task) for task, weight in config.examples.tasks.items() if weight > 0]
    weight = config.scoring.alignment if isinstance(config.scoring, RecursiveScoring) else 0.0

    def aligned(objective: Objective) -> Objective:
        return Aligned(objective, weight) if weight else objective

    if isinstance(chosen, settings.NextTokenObjective):
        return Aim(aligned(NextToken(tasks)), collator)
    counts = target_counts(table, model.vocab.codes.num_items)
    matrix = vectors() if weighs_by_vectors(config) else None
    objective = TokenWeighted(
        tasks,
        [_target(target, counts, matrix) for target in chosen.targets],
        vocab=lambda: model.vocab,
        pace=chosen.pace if chosen.curriculum == "pace" else None,
        bound=chosen.bound if chosen.mix == "learned" else None,
        empty=prompts.history([]),
        answer_start=model.answer_start,
    )
    model.mix = objective.mix
    return Aim(aligned(objective), WithTargetItems(collator), (FollowSteps(objective),))


def token_figures(objective: Objective, table: ExampleTable) -> dict[str, Any]:
    """What the report shows of token weights as they are now; empty where all tokens weigh the same."""
    while isinstance(objective, Aligned | WithAlignments):
        objective = objective.objective
    if not isinstance(objective, TokenWeighted):
        return {}
    return {"targets": figures(objective, target_counts(table, objective.tables().shape[1]))}


def target_counts(table: ExampleTable, num_items: int) -> np.ndarray:
    """How often each item is a target of the task `next-item`, float64 `[num_items]`.

    Args:
        table: examples, as `training.examples.build` makes them.
        num_items: N.
    """
    examples = NextItems(table)
    return np.bincount(examples.targets(examples.rows), minlength=num_items).astype(np.float64)


def _target(chosen: settings.Target, counts: np.ndarray, vectors: np.ndarray | None) -> Target:
    """A target of the mix by its settings."""
    name = chosen.kind
    if isinstance(chosen, settings.FrontTarget):
        if chosen.gains == "entropy":
            return Target(name, partial(_front_by_entropy, targets=counts))
        assert vectors is not None  # `needs_vectors` has asked for them
        return Target(name, partial(_front, vectors=vectors, by_prefix=chosen.gains == "prefix"))
    if isinstance(chosen, settings.FrequencyTarget):
        weights = partial(token_weights.frequency, targets=counts, beta=chosen.beta, over=chosen.over)
        return Target(name, weights, rising=True)
    if isinstance(chosen, settings.PositionTarget):
        return Target(name, partial(token_weights.position, last=chosen.last))
    if isinstance(chosen, settings.InformationGainTarget):
        return Target(name, partial(token_weights.information_gain, targets=counts, without=chosen.without))
    if isinstance(chosen, settings.CounterfactualTarget):
        return Target(name, partial(token_weights.position, last=chosen.last), effect=chosen.weight)
    return Target(name, partial(token_weights.position, last=1.0))


def _front_by_entropy(codes: ItemCodes, *, targets: np.ndarray) -> np.ndarray:
    return token_weights.front(codes, token_weights.entropy_gains(codes, targets))


def _front(codes: ItemCodes, *, vectors: np.ndarray, by_prefix: bool) -> np.ndarray:
    gains = token_weights.prefix_gains if by_prefix else token_weights.level_gains
    return token_weights.front(codes, gains(codes, vectors))

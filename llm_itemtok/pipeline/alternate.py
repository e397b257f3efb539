"""ETEGRec as a recipe asks for it: turns counted in steps, the method, and the objective that aligns in between."""

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset as ExampleTable

from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.items.base import Quantizer, check_vectors
from llm_itemtok.items.streaming import read_blocks
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.pipeline.objective import Aim
from llm_itemtok.training.alignment import Adapters, Alignments, WithAlignments
from llm_itemtok.training.alternate import Alternate, TakeTurns, Tuning, TurnMaterial, Turns
from llm_itemtok.training.collator import Collator, WithTargetItems
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.updates import Rules, Updates
from llm_itemtok.update_settings import AlternateUpdate


def turns(update: AlternateUpdate, every: int, steps: tuple[int, int]) -> Turns:
    """Count in steps.

    Args:
        update: what the recipe says.
        every: optimiser steps between the quantizer's turns.
        steps: of an epoch, and of the whole training.

    Raises:
        RecipeError: if there would be no turn between steps of the model.
    """
    steps_an_epoch, total = steps
    if every >= total:
        raise RecipeError(
            f"`update.every` must leave room for a turn of the quantizer between steps of the model; turns are "
            f"{every:,} steps apart, but training has {total:,}; give turns more often, or train longer"
        )
    return Turns(
        every=every,
        rounds=min(update.rounds, (total - 1) // every + int(update.first and update.schedule == "turns")),
        first=update.first,
        warmup=round(update.warmup * steps_an_epoch),
        patience=update.patience,
        converged=update.converged,
        joint=update.schedule == "joint",
    )


def described(update: AlternateUpdate, every: int, steps: tuple[int, int]) -> str:
    """When turns are, and when the final stage begins, as a line for `check`; raises what `turns` does."""
    found, total = turns(update, every, steps), steps[1]
    what = "the quantizer learns at every step, and codes are read anew" if found.joint else "the quantizer has a turn"
    last = f"item tokens stay from step {found.end:,} on" if found.end < total else "item tokens change to the end"
    line = f"  {what} every {found.every:,} steps, {found.rounds} times at most; {last}"
    # Before the last step of the cycles, or the last turn among them.
    last_heard = min(found.end, total) - 1
    last_heard -= 0 if found.joint else last_heard % found.every
    if any(taught(update)) and last_heard < found.warmup + found.every:
        line += "\n  warning: the quantizer never hears the alignments; lower `update.warmup`, or give it more turns"
    return line


def taught(update: AlternateUpdate) -> tuple[float, float]:
    """Weights of both alignments in the quantizer's turn: of histories, of preferences."""
    sequence, preference = update.quantizer_sequence, update.quantizer_preference
    return (
        update.sequence if sequence is None else sequence,
        update.preference if preference is None else preference,
    )


def alternate(
    config: RunConfig,
    update: AlternateUpdate,
    model: ItemTokenModel,
    binding: LateBinding,
    table: ExampleTable,
    aim: Aim,
    vectors: np.ndarray,
    *,
    every: int,
    steps: tuple[int, int],
) -> tuple[Alternate, Rules]:
    """The method and the rules of `update.kind: alternate`; the model gets what it learns for the alignments.

    Args:
        config: the recipe.
        update: of it.
        model: to train, which holds its codes and the quantizer behind them.
        binding: to its item tokens.
        table: training examples.
        aim: what the training minimises, and what collates for it.
        vectors: item vectors `[N, V]`.
        every: optimiser steps between the quantizer's turns.
        steps: of an epoch, and of the whole training.

    Raises:
        RecipeError: as `turns`, and for a way to pool that the model does not have.
    """
    assert model.quantizer is not None
    tuning = Tuning(
        learning_rate=update.learning_rate,
        weight_decay=update.weight_decay,
        commitment=update.commitment,
        margin=update.margin,
        batch_size=update.batch_size,
        piece=config.evaluation.batch_size,
        seed=config.seed,
    )
    of_turns = [
        Alignments(sequence, preference, update.temperature, update.variant, means=update.losses == "means")
        for sequence, preference in ((update.sequence, update.preference), taught(update))
    ]
    if model.answer_start is not None and update.pool == "last":
        raise RecipeError(
            "`update.pool: last` is for decoder-only models, and this one has an encoder, the mean of whose states "
            "stands for a history; leave it out"
        )
    material = TurnMaterial(table, _naming_targets(aim), binding, check_vectors(vectors))
    model.beside = Adapters(
        model.rows.input_rows.shape[1],
        codeword=model.quantizer.codebooks.shape[2],
        vector=vectors.shape[1],
        middle=_middle(model.quantizer, material.vectors),
        pool=update.pool,
        seed=config.seed,
    )
    method = Alternate(turns(update, every, steps), tuning, of_turns[0], material, teaching=of_turns[1])
    return method, Rules(rounds=update.rounds, gate=None)


@torch.no_grad()
def _middle(quantizer: Quantizer, vectors: np.ndarray) -> torch.Tensor:
    """Mean of the items in the space of the codebooks, `[H]`."""
    parts = [quantizer.to_latent(torch.from_numpy(check_vectors(block))).sum(0) for _, block in read_blocks(vectors)]
    return torch.stack(parts).sum(0) / len(vectors)


def with_alignments(aim: Aim, model: ItemTokenModel, updates: Updates | None) -> Aim:
    """The same aim, with the alignments beside it where the updates take turns."""
    if updates is None or not isinstance(updates.method, Alternate):
        return aim
    method = updates.method
    assert model.quantizer is not None
    objective = WithAlignments(aim.objective, method.alignments, model.quantizer, torch.from_numpy(method.vectors))
    callbacks = (*aim.callbacks, TakeTurns(method, objective, model))
    return replace(aim, objective=objective, collator=_naming_targets(aim), callbacks=callbacks)


def _naming_targets(aim: Aim) -> WithTargetItems:
    """The aim's collator, which says of each label which item it belongs to."""
    if isinstance(aim.collator, WithTargetItems):
        return aim.collator
    assert isinstance(aim.collator, Collator)
    return WithTargetItems(aim.collator)

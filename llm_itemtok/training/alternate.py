"""ETEGRec's schedule: quantizer and recommender take turns, each learning while the other stands still.

A *cycle* is one epoch of the quantizer, after which all items get the codes that they now read off it, and some epochs
of the recommender. The quantizer's epoch is a round of the update protocol (`updates`), so it lies between two steps of
the recommender:

    L_T = L_SQ + w_s sequence + w_p preference     the quantizer learns; the recommender's states are constants
    L_R = L_REC + v_s sequence + v_p preference    the recommender learns; the quantizer is frozen (`alignment`)

Cycles end after so many, when hardly an item moved, or when validation has not become better for a while. What follows
is the *final stage*: item tokens stay what they are, and L_REC alone is minimised. For some epochs at the beginning
(`warmup`) neither turn has alignments, and the quantizer's has none before the recommender has learnt them for a cycle:
what is not learnt yet would pull all codes to one place.

Decisions:
- The quantizer's epoch goes through all training examples in an order drawn with seed and step. Its batches are cut
  into pieces that processes share, and only what the alignments read is exchanged: every process then takes the same
  step with all of it, so that two processes are one, and no gradients are exchanged.
- While the quantizer learns, examples are written with the codes before, and the recommender is in evaluation mode.
- L_SQ counts each distinct target of a batch once. Its parts are sums over dimensions and levels, the units of the
  equations, or means, as released and as in the quantizer's own fit. Weights are to be read beside that; the paper has
  one pair of them, and they may differ between the turns here.
- The quantizer's AdamW lasts from turn to turn, and is in every checkpoint. Its rate rises over the steps of one turn,
  then falls to 0 at the end of the last one: the first steps of AdamW are as long as any, and move most items.
- `joint` is the control without turns: the quantizer takes a step on a batch of its own before every step of the
  recommender; items are coded anew at the same moments.

Differs from the release: the cycle begins where a setting says; the final stage goes on from the weights of now and
not from the best ones, under the same schedule of the learning rate; the quantizer's falls along a line.

Source: Liu et al. 2025 (arXiv:2409.05546), section 3.3, and the released code.

Shape letters: N items, P pairs of a batch, U distinct targets, H width of a codeword, V of an item vector.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from datasets import Dataset as ExampleTable
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_itemtok.items.base import Quantizer, check_vectors
from llm_itemtok.items.recode import recode
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.processes import added_up, dealt
from llm_itemtok.training.alignment import PREFERENCE, SEQUENCE, Alignments, WithAlignments, first_of_each, pairs
from llm_itemtok.training.examples import NextItems
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.quantizer_optimizer import QuantizerOptimizer
from llm_itemtok.training.updates import Moment, Proposal

TERMS = ("reconstruction", "quantization", SEQUENCE, PREFERENCE)
"""Of the quantizer's loss."""

CLIP = 1.0
"""Largest norm of the quantizer's gradients, as released."""

_MOMENTS = "moments/"


@dataclass(frozen=True)
class Turns:
    """Who learns when, in optimiser steps of the recommender.

    Attributes:
        every: steps between the quantizer's turns, at least 1.
        rounds: turns of the quantizer at most, at least 1.
        first: whether training begins with one.
        warmup: steps without alignments.
        patience: validations in a row without a better NDCG@10 after which the final stage begins; 0 for none.
        converged: a turn that moves less than this share of the items is the last; 0 for none.
        joint: no turns: the quantizer learns at every step, and `every` says when items are coded anew.
    """

    every: int
    rounds: int
    first: bool = True
    warmup: int = 0
    patience: int = 0
    converged: float = 0.0
    joint: bool = False

    @property
    def end(self) -> int:
        """The step before which the final stage begins, if nothing ends the cycles earlier."""
        return (self.rounds + int(not self.first or self.joint)) * self.every

    def due(self, step: int) -> bool:
        """Whether the cycle begins anew before this step."""
        return step % self.every == 0 and (step > 0 or (self.first and not self.joint))

    def next(self, step: int) -> int:
        """The step, this one or a later one, before which a cycle begins or would begin."""
        return -(-step // self.every) * self.every


@dataclass(frozen=True)
class Tuning:
    """How the quantizer is trained.

    Attributes:
        learning_rate: of AdamW, before it is scaled: up over the first turn, down to 0 over all of them.
        weight_decay: of networks; codewords have none.
        commitment: weight of the term that keeps an encoder near its codewords.
        margin: of `recode`.
        batch_size: examples a step.
        piece: examples that are read at a time.
        seed: of the order of the examples.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    commitment: float = 0.25
    margin: float = 0.0
    batch_size: int = 256
    piece: int = 64
    seed: int = 0


@dataclass(frozen=True)
class TurnMaterial:
    """What the quantizer's turn reads beside the model.

    Attributes:
        table: training examples.
        collate: renders them with the placeholders of `binding`, and names the targets (`WithTargetItems`).
        binding: to the current item tokens.
        vectors: item vectors, float32 `[N, V]`.
    """

    table: ExampleTable
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]
    binding: LateBinding
    vectors: np.ndarray


@final
class Alternate:
    """The `Method` of updates; its model has `quantizer`, and `beside` for the alignments."""

    def __init__(
        self,
        turns: Turns,
        tuning: Tuning,
        alignments: Alignments,
        material: TurnMaterial,
        *,
        teaching: Alignments | None = None,
    ) -> None:
        """Take turns over some examples.

        Args:
            turns: when.
            tuning: of the quantizer.
            alignments: in the recommender's turn.
            material: of the quantizer's turn.
            teaching: the alignments in that turn; None for the same ones.
        """
        self.turns = turns
        self.tuning = tuning
        self.alignments = alignments
        self.teaching = teaching or alignments
        self._binding, self._collate = material.binding, material.collate
        self._examples = NextItems(material.table)
        self.vectors = material.vectors
        self._there = torch.from_numpy(check_vectors(material.vectors))
        self._best, self._without, self._end = -math.inf, 0, math.inf
        self._taken = 0
        self._told = _nothing_told()
        self._optimizer: QuantizerOptimizer | None = None
        self._held: Mapping[str, Tensor] = {}

    # ------------------------------------------------------------------------------------------------ the schedule

    def due(self, step: int) -> bool:
        """Where a cycle begins, as long as cycles last."""
        return step < self.end and self.turns.due(step)

    @property
    def end(self) -> float:
        """The step before which the final stage begins, as far as it is known."""
        return min(self.turns.end, self._end)

    def aligns(self, step: int) -> bool:
        """Whether the alignments count in a step."""
        return self.alignments.any and self.turns.warmup <= step < self.end

    def teaches(self, step: int) -> bool:
        """Whether the alignments count in what the quantizer learns before a step."""
        return self.teaching.any and self.turns.warmup + self.turns.every <= step < self.end

    def learns(self, step: int) -> bool:
        """Whether the quantizer learns before this step without having a turn."""
        # Up to the last new codes: a quantizer that went on would no longer be the one behind them.
        return self.turns.joint and self.turns.next(step) < self.end

    def measured(self, step: int, metric: float) -> None:
        """Take notice of a validation; after too many that were not the best, the final stage begins."""
        self._without = 0 if metric > self._best else self._without + 1
        self._best = max(self._best, metric)
        if self.turns.patience and self._without >= self.turns.patience:
            # What learnt aside since the last codes gives new ones once more.
            self._end = min(self._end, self.turns.next(step) + 1 if self.turns.joint else step)

    # ------------------------------------------------------------------------------------------------ a turn

    def propose(self, moment: Moment) -> Proposal:
        """Train the quantizer for an epoch, and read all codes off it."""
        model, began = moment.model, time.perf_counter()
        if not self.turns.joint:
            rows = np.random.default_rng([self.tuning.seed, moment.step]).permutation(self._examples.rows)
            for start in range(0, len(rows), self.tuning.batch_size):
                self.learn(model, rows[start : start + self.tuning.batch_size], aligned=self.teaches(moment.step))
        learnt, codes = time.perf_counter(), model.vocab.codes
        found = recode(_quantizer(model), self.vectors, codes, margin=self.tuning.margin)
        share = float((found.table != codes.table).any(axis=1).mean())
        if share < self.turns.converged:
            self._end = min(self._end, moment.step + self.turns.every)
        steps = max(1, int(self._told[-1]))
        facts = {
            "collisions": found.collisions,
            "displaced": found.displaced,
            "aligned": self.teaches(moment.step),
            "quantizer_steps": int(self._told[-1]),
            "losses": {name: float(total / steps) for name, total in zip(TERMS, self._told[:-1], strict=True)},
            "learning_seconds": round(learnt - began, 3),
            "coding_seconds": round(time.perf_counter() - learnt, 3),
        }
        self._told = _nothing_told()
        unknown = np.full(len(found.table), np.nan, dtype=np.float32)
        return Proposal(found.table, unknown, unknown, facts)

    def learn_aside(self, model: ItemTokenModel, step: int) -> None:
        """A step of the quantizer on a batch of its own, drawn with seed and step: `joint`."""
        rng = np.random.default_rng([self.tuning.seed, step])
        size = min(self.tuning.batch_size, len(self._examples.rows))
        self.learn(model, rng.choice(self._examples.rows, size, replace=False), aligned=self.teaches(step))

    def learn(self, model: ItemTokenModel, rows: np.ndarray, *, aligned: bool) -> None:
        """One step of the quantizer on some examples `[n]`; of the model nothing else changes but its mode."""
        model.eval()  # no dropout in what is read, and no random numbers used up
        quantizer = _quantizer(model)
        self._there = self._there.to(model.device)
        items = np.unique(self._examples.targets(rows))
        read = self._read(model, rows) if aligned else None
        vectors = self._there[torch.from_numpy(items).to(model.device)]
        optimizer = self._optimizer_of(quantizer)
        with optimizer.learning() as parameters, torch.enable_grad():
            terms = self._terms(quantizer, vectors, items, read)
            loss = torch.stack(list(terms.values())).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        optimizer.step(_clipped(gradients), scale=self._scale())
        self._taken += 1
        for name, value in terms.items():
            self._told[TERMS.index(name)] += value.detach().cpu().double()
        self._told[-1] += 1

    def _scale(self) -> float:
        """Of the learning rate in the next step: up along a line over the first turn, down to 0 over all of them."""
        turn = self.turns.every if self.turns.joint else math.ceil(len(self._examples.rows) / self.tuning.batch_size)
        left = 1 - self._taken / (self.turns.rounds * turn + int(self.turns.joint))
        return min(1.0, (self._taken + 1) / turn) * max(0.0, left)

    def _terms(
        self, quantizer: Quantizer, vectors: Tensor, items: np.ndarray, read: tuple[np.ndarray, Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """Terms of the loss of a batch: vectors `[U, V]` of its distinct targets, and what was read of its pairs."""
        found = quantizer(vectors)
        quantization = found.codebook_loss + self.tuning.commitment * found.commitment_loss
        sizes = (vectors.shape[1], quantizer.num_levels * quantizer.codebooks.shape[2])
        if self.teaching.means:
            sizes = (1, 1)
        each = {"reconstruction": sizes[0] * found.reconstruction_loss, "quantization": sizes[1] * quantization}
        if read is not None and len(read[0]):
            targets, sequences, preferences = read
            places = torch.from_numpy(np.searchsorted(items, targets)).to(vectors.device)
            rebuilt = found.reconstruction[places]
            each |= self.teaching(quantizer, vectors[places], rebuilt, sequences, preferences)
        return {name: values.mean() for name, values in each.items()}

    @torch.no_grad()
    def _read(self, model: ItemTokenModel, rows: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
        """What the recommender makes of some examples: items `[U]`, their z^E `[U, H]` and h^D `[U, V]`.

        Short examples are read first, so that little is padded; of each item its first pair in the order of `rows`.
        """
        order = self._examples.by_length(rows)
        rows = rows[order]
        items, counts = self._examples.pairs(rows, alone=model.answer_start is None)
        starts = np.concatenate([[0], np.cumsum(counts)])
        quantizer, width = _quantizer(model), self._there.shape[1]
        codeword = quantizer.codebooks.shape[2]
        told = np.zeros((len(items), codeword + width), dtype=np.float32)
        for at in dealt(np.arange(len(rows)), self.tuning.piece):
            batch = self._collate([self._examples.example(row) for row in rows[at].tolist()])
            own = _told(model, {name: value.to(model.device) for name, value in self._binding(batch).items()})
            told[starts[at[0]] : starts[at[-1] + 1]] = own.cpu().numpy()
        as_given = np.argsort(np.repeat(order, counts), kind="stable")
        first = as_given[first_of_each(torch.from_numpy(items[as_given])).numpy()]
        whole = torch.from_numpy(added_up(told, model.device)[first]).to(model.device)
        sequences, preferences = whole.split([codeword, width], dim=1)
        return items[first], sequences, preferences

    # ------------------------------------------------------------------------------------------------ what lasts

    def state(self) -> dict[str, Tensor]:
        """Where the cycles stand, and what the quantizer's optimiser holds."""
        known = torch.tensor([self._best, self._without, self._end, self._taken], dtype=torch.float64)
        found = {"known": known, "told": self._told.clone()}
        moments = self._held if self._optimizer is None else self._optimizer.state()
        return found | {f"{_MOMENTS}{name}": value for name, value in moments.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        best, without, end, taken = state["known"].tolist()
        self._best, self._without, self._end, self._taken = best, int(without), end, int(taken)
        self._told = state["told"].clone()
        self._optimizer = None
        self._held = {name.removeprefix(_MOMENTS): value for name, value in state.items() if name.startswith(_MOMENTS)}

    def _optimizer_of(self, quantizer: Quantizer) -> QuantizerOptimizer:
        """The quantizer's optimiser, made when it is first needed: by then the quantizer is where it stays."""
        if self._optimizer is None:
            rate, decay = self.tuning.learning_rate, self.tuning.weight_decay
            self._optimizer = QuantizerOptimizer(quantizer, learning_rate=rate, weight_decay=decay)
            self._optimizer.load_state(self._held)
        return self._optimizer


class TakeTurns(TrainerCallback):
    """Tells the recommender's objective whose turn it is, and the method what validation says.

    Must stand before the updates among the trainer's callbacks.
    """

    def __init__(self, method: Alternate, objective: WithAlignments, model: ItemTokenModel) -> None:
        """Follow a training of `model`, unwrapped."""
        self.method = method
        self.objective = objective
        self._model = model

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Switch the alignments, and where there are no turns let the quantizer learn."""
        self.objective.active = self.method.aligns(state.global_step)
        if self.method.learns(state.global_step):
            self.method.learn_aside(self._model, state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Pass a validation on."""
        if metrics is not None and "eval_ndcg@10" in metrics:
            self.method.measured(state.global_step, metrics["eval_ndcg@10"])


def _told(model: ItemTokenModel, batch: Mapping[str, Tensor]) -> Tensor:
    """z^E and h^D side by side of the pairs of a batch, float32 `[P, H + V]`."""
    rows, places, _ = pairs(batch)
    ids, context_ids, seen = batch["input_ids"], batch.get("context_ids"), batch.get("context_seen")
    if context_ids is not None:
        ids = ids[:, :1]  # only the first state is asked for
    states, context = model.states(ids, context_ids, seen)
    assert model.beside is not None
    told = model.beside(states, context, seen, rows=rows, places=places)
    return torch.cat([told["sequence"], told["preference"]], dim=1)


def _nothing_told() -> Tensor:
    """Sums of the terms of the quantizer's loss, and over how many steps: none yet."""
    return torch.zeros(len(TERMS) + 1, dtype=torch.float64)


def _quantizer(model: ItemTokenModel) -> Quantizer:
    assert model.quantizer is not None
    return model.quantizer


def _clipped(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients scaled to a norm of at most `CLIP` over all of them."""
    norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
    scale = (CLIP / (norm + 1e-6)).clamp(max=1)
    return [None if gradient is None else gradient * scale for gradient in gradients]

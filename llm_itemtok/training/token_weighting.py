"""Token-weighted multi-target loss with a curriculum: tokens count by what they tell, and how changes as training goes.

Minimises `L = sum_k share_k L_k`, where each target is a weighted cross-entropy over the tokens of the whole optimiser
step, `L_k = sum_t w_kt nll_t / sum_t w_kt`, with `w_kt` = weight of the task x weight of the token
(`training/token_weights.py`; 1 for tokens of text). The shares go by the optimiser step t and by learned log-weights b:

    share = softmax(log pace + b),  pace = 1 - exp(-c t) for a rising target, exp(-c t) for the others, at least 1e-6

so plain and front-greater likelihood begin with a half each, all three are level at `t = ln 2 / c`, and frequency
weighted likelihood ends with nearly all. Without a curriculum the pace is 1. With one target there is no mix.

Decisions. t is the trainer's count of optimiser steps before this one: the same under any accumulation, untouched by
validation, and in every checkpoint. b starts at 0 and lives in the model (`ItemTokenModel.mix`), so checkpoints, resume
and processes share it; it is called a bias, which it is, and which the library keeps out of weight decay. Nothing but
the loss teaches it, and a softmax then drifts to the smallest loss (`dL/db_k = share_k (L_k - L)`), which need not be
the most useful: b is kept within `+-bound` by `bound tanh(b / bound)`. The mixed loss moves with t: it is never what a
checkpoint is chosen by.

Differs from `next_token` by the weights alone: with one target whose weights are 1 it is that objective, bit for bit.

Source: arXiv:2601.17787 and its released code, which has s = -b. There t counts micro-batches (in the code for T5 those
of validation, too) and is forgotten by a resume; that code's mix leaves the pace out; the other's bound is 20. The
counterfactual target is arXiv:2410.22809 as that release runs it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.processes import together
from llm_itemtok.training.collator import TARGET_ITEMS
from llm_itemtok.training.examples import TASKS
from llm_itemtok.training.next_token import MODEL_INPUTS
from llm_itemtok.vocab.item_vocab import ItemVocab

_LEAST_PACE = 1e-6


@dataclass(frozen=True)
class Target:
    """One weighted cross-entropy of the mix.

    Attributes:
        name: of its terms in the log.
        weights: codes → weights `[N, L]` of each item's tokens, with mean 1.
        rising: whether its pace grows from 0; the others' falls from 1.
        effect: weight of a second cross-entropy, by the effect that the history has on the logits; 0 leaves it out.
    """

    name: str
    weights: Callable[[ItemCodes], np.ndarray]
    rising: bool = False
    effect: float = 0.0


class LogWeights(nn.Module):
    """Learned log-weights of the targets.

    Attributes:
        bias: float32 `[K]`, the parameter, 0 at first.
        bound: log-weights stay within plus and minus this.
    """

    def __init__(self, size: int, bound: float) -> None:
        """Begin at 0 for `size` targets."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))
        self.bound = bound

    def forward(self) -> Tensor:
        """The log-weights, float32 `[K]`."""
        return self.bound * torch.tanh(self.bias / self.bound)


def log_pace(rising: Sequence[bool], step: int, pace: float) -> Tensor:
    """Logarithm of each target's pace, float32 `[K]`.

    Args:
        rising: which targets rise.
        step: optimiser steps before this one.
        pace: c, in 1 per optimiser step.
    """
    fallen = math.exp(-pace * step)
    return torch.tensor([math.log(max(1 - fallen if up else fallen, _LEAST_PACE)) for up in rising])


@final
class TokenWeighted:
    """The `Objective`; terms are called `task/target`, or `task` where there is one target.

    Needs batches of `WithTargetItems`, and `FollowSteps` among the trainer's callbacks.

    Attributes:
        step: optimiser steps before this one.
        mix: the log-weights that the model must hold as its `mix`; None where nothing is learned.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        targets: Sequence[Target],
        *,
        vocab: Callable[[], ItemVocab],
        pace: float | None = None,
        bound: float | None = None,
        empty: np.ndarray | None = None,
        answer_start: int | None = None,
    ) -> None:
        """Minimise over these tasks and targets; the same on every process, whatever its batches happen to hold.

        Args:
            tasks: as `NextToken`.
            targets: at least one, of different names.
            vocab: the current item tokens; weights are made anew when it gives other codes.
            pace: c of the curriculum, in 1 per optimiser step; None for no curriculum.
            bound: of the learned log-weights; None learns none.
            empty: token ids int64 `[P]` of the prompt of an empty history, for targets with an `effect`.
            answer_start: `ItemTokenModel.answer_start`.
        """
        assert targets, "there must be a target to minimise"
        self.tasks = tuple(tasks)
        self.targets = tuple(targets)
        self.step = 0
        self.mix = LogWeights(len(targets), bound) if bound is not None and len(targets) > 1 else None
        self._vocab = vocab
        self._pace = pace
        self._empty = empty
        self._answer_start = answer_start
        self._codes: ItemCodes | None = None
        self._tables = torch.empty(0)

    def denominators(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum of each target's weights."""
        weights = self._weights(batch)
        return {target.name: own.sum() for target, own in zip(self.targets, weights, strict=True)}

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted negative log-likelihoods in nats, times the share of their target."""
        asks_effect = any(target.effect for target in self.targets)
        blank = self._without_history(batch) if asks_effect else {}
        found = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}, **blank)
        nll, told = found if isinstance(found, tuple) else (found, {})
        nll, by_effect = nll if blank else (nll, None)
        shares = self.shares(told.get("mix"))
        terms: dict[str, Tensor] = {}
        for target, weights, share in zip(self.targets, self._weights(batch), shares, strict=True):
            loss = nll if by_effect is None or not target.effect else nll + target.effect * by_effect
            by_row = (loss * weights).sum(1) / totals[target.name]
            for task in self.tasks:
                term = by_row[batch["tasks"] == TASKS.index(task)].sum()
                if len(self.targets) == 1:
                    terms[task] = term
                else:
                    terms[f"{task}/{target.name}"] = share * term
        return terms

    def shares(self, log_weights: Tensor | None) -> Tensor:
        """Share of each target at the current step, float32 `[K]`, of sum 1.

        Args:
            log_weights: what the model's `mix` computed; None for zeros.
        """
        logits = torch.zeros(len(self.targets))
        if self._pace is not None:
            logits = log_pace([target.rising for target in self.targets], self.step, self._pace)
        if log_weights is not None:
            logits = logits.to(log_weights.device) + log_weights
        return logits.softmax(0)

    def tables(self) -> Tensor:
        """Weights of each target, float32 `[K, N, L]`, for the current codes."""
        codes = self._vocab().codes
        if codes is not self._codes:
            tables = [target.weights(codes) for target in self.targets]
            self._tables = torch.from_numpy(np.stack(tables).astype(np.float32))
            self._codes = codes
        return self._tables

    def _weights(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Weight of each label for each target, float32 `[K, B, S]`: 1 times its task's for text, 0 for no target."""
        items, levels = batch[TARGET_ITEMS], batch["levels"]
        self._tables = self.tables().to(items.device)
        of_item = items >= 0
        tokens = self._tables[:, items.clamp(min=0), levels.clamp(0, self._tables.shape[2] - 1)]
        return torch.where(of_item, tokens, 1.0) * batch["loss_weights"]

    def _without_history(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of the batch's target items with no history before them: what `ItemTokenModel.forward` calls blank.

        Left out are targets that have none in the batch either, and the other tasks. Each item stands there once; a
        batch without any target to ask for has none; of several processes a row that no place asks for, because where
        they share a sharded model all must call it as often.
        """
        assert self._empty is not None
        items, levels = batch[TARGET_ITEMS], batch["levels"]
        places = torch.arange(items.shape[1], device=items.device)
        has_history = (places > levels) | (self._answer_start is not None)
        asked = (items >= 0) & has_history & (batch["tasks"] == TASKS.index("next-item")).unsqueeze(1)
        rows, inverse = items[asked].unique(return_inverse=True)
        if not len(rows):
            if not together():
                return {}
            rows = items.new_zeros(1)
        vocab, empty = self._vocab(), torch.from_numpy(self._empty).to(items.device)
        paths = vocab.paths.to(items.device)[rows, :-1].clamp(min=0)
        context: dict[str, Tensor] = {}
        start = empty
        if self._answer_start is not None:
            context = {"blank_context": empty.unsqueeze(0)}
            start = torch.tensor([self._answer_start], device=items.device)
        ids = torch.cat([start.expand(len(rows), -1), paths], dim=1)
        found = torch.full_like(items, -1)
        found[asked] = inverse * ids.shape[1] + len(start) - 1 + levels[asked]
        return {"blank_ids": ids, "blank_places": found, **context}


class FollowSteps(TrainerCallback):
    """Tells the objective which optimiser step it is at, and writes each target's share into training lines.

    Must stand before what writes the lines down.
    """

    def __init__(self, objective: TokenWeighted) -> None:
        """Follow for `objective`."""
        self.objective = objective
        self._shares: list[Tensor] = []  # of each step since the last line, on their device

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the step: steps that are done, so 0 for the first."""
        self.objective.step = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remember the shares that the step's loss had."""
        mix = self.objective.mix
        with torch.no_grad():
            self._shares.append(self.objective.shares(None if mix is None else mix()))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add `mix/<target>`, the mean over the steps since the last line, as the terms of the loss are."""
        if logs is None or "loss" not in logs or not self._shares:
            return
        if len(self.objective.targets) > 1:
            means = torch.stack(self._shares).mean(0).tolist()
            logs |= {f"mix/{target.name}": mean for target, mean in zip(self.objective.targets, means, strict=True)}
        self._shares.clear()


def figures(objective: TokenWeighted, targets: np.ndarray) -> dict[str, Any]:
    """What the report shows of the current weights.

    Args:
        objective: whose weights.
        targets: `[N]`, how often each item is a training target.

    Returns:
        For each target by name: `levels`, the mean weight of each level over training targets, and `by_count`, pairs
        of how often an item is a training target (a power of 2: from there up to the next) and the mean weight of the
        tokens of these items.
    """
    tables = objective.tables().cpu().numpy()
    powers = np.floor(np.log2(np.maximum(targets, 1))).astype(np.int64)
    found = {}
    for target, table in zip(objective.targets, tables, strict=True):
        means = table.sum(1) / (table > 0).sum(1).clip(1)
        levels = (table * targets[:, None]).sum(0) / max(1, targets.sum())
        bins = [power for power in np.unique(powers[targets > 0])]
        by_count = [[int(2**power), float(means[(powers == power) & (targets > 0)].mean())] for power in bins]
        found[target.name] = {"levels": levels.tolist(), "by_count": by_count}
    return found

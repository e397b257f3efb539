"""R: training on item tokens against one example per target.

R1: targets a second, forward and backward, batches made on the way, histories as long as Beauty's, examples of like
length batched together on both sides; with a vocabulary of 9 thousand against `labels=` as the trainer of
`transformers` computes it, with 152 thousand against the better way that computes logits at target positions only. Both
ways see the same targets with the same histories, which is checked: the log-probabilities are equal under one
normaliser. R2: what head and loss add to the peak memory of a step.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_itemtok.bench import subjects
from llm_itemtok.bench.measure import Result, at_least, at_most, cpu_seconds, one_thread, peak_mb
from llm_itemtok.bench.usual import Windows
from llm_itemtok.model.load import add_lora
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.examples import TASKS, chunks
from llm_itemtok.training.next_token import NextToken

ITEMS, HISTORY = 12_000, 20
BATCH = 16
STEP_TOKENS = 2048


class Training:
    """One model and users' sequences, trained on in every way."""

    def __init__(
        self,
        shape: subjects.Shape,
        users: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        lora: bool = False,
    ) -> None:
        """Build it with a random model of this shape and this many users; with LoRA or the whole body trained."""
        self.model = subjects.item_model(shape, subjects.codes(ITEMS), dtype=dtype, device=device).train()
        self.plain = subjects.plain_model(self.model).train()
        if lora:
            for lm in (self.model.lm, self.plain):
                add_lora(lm, rank=16, alpha=32, dropout=0.0, rslora=False, seed=0)
        # Tables stay as they are on both sides: training all of the baseline's would cost it more.
        self.plain.get_input_embeddings().weight.requires_grad_(False)
        self.model.lm.get_input_embeddings().weight.requires_grad_(False)
        self.sequences = subjects.sequences(users, ITEMS)
        vocab = self.model.vocab
        self.windows = Windows(vocab.paths, self.sequences, start=subjects.START, history_length=HISTORY)
        self.windows.examples.sort(key=len)
        self.collator = Collator(Prompts(subjects.tokenizer(), vocab), vocab.num_levels)
        rows = [(items, first) for sequence in self.sequences for items, first in chunks(sequence, HISTORY)]
        rows.sort(key=lambda row: len(row[0]))
        self.examples: list[dict[str, Any]] = [
            {"task": TASKS.index("next-item"), "items": items, "first": first, "weight": 1.0} for items, first in rows
        ]

    @property
    def targets(self) -> int:
        """Items with a loss on each of their tokens, in both ways."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def positions(self) -> int:
        """Tokens that our rows feed, padding aside."""
        return sum(len(example["items"]) for example in self.examples) * self.model.vocab.num_levels

    def usual(self) -> None:
        """Train on windows, logits at every position."""
        for ids, mask, labels in self._windows():
            self.plain(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()

    def better(self) -> None:
        """Train on windows, logits at target positions only."""
        for ids, mask, labels in self._windows():
            logits = self._window_logits(ids, mask)
            F.cross_entropy(logits.flatten(0, 1), labels[:, -logits.shape[1] :].flatten()).backward()

    def ours(self) -> None:
        """Train on a row a user, softmax over the level."""
        self.model.normaliser = "level"
        objective = NextToken(("next-item",))
        for batch in self._batches():
            terms = objective(self.model, batch, objective.denominators(batch))
            terms["next-item"].backward()

    def largest_difference(self) -> float:
        """Largest difference of a target's log-probability between windows and rows, under one normaliser."""
        self.model.normaliser = "vocab"
        usual: dict[tuple[int, ...], Tensor] = {}
        with torch.no_grad():
            for ids, mask, labels in self._windows():
                logits = self._window_logits(ids, mask)
                log_probs = logits.log_softmax(-1).gather(2, labels[:, -logits.shape[1] :, None]).squeeze(2)
                for row in range(len(ids)):
                    whole = ids[row][mask[row].bool()]
                    usual[tuple(whole.tolist())] = log_probs[row]
            return max(self._differences(usual))

    def _differences(self, usual: Mapping[tuple[int, ...], Tensor]) -> Iterator[float]:
        """The largest difference of each target item; `usual` holds its tokens' log-probabilities by the prompt."""
        levels = self.model.vocab.num_levels
        for batch in self._batches():
            nll = self.model(input_ids=batch["input_ids"], labels=batch["labels"], levels=batch["levels"])
            for row, col in (batch["levels"] == 0).nonzero().tolist():
                prompt = [
                    *batch["input_ids"][row, : col + 1].tolist(),
                    *batch["labels"][row, col : col + levels].tolist(),
                ]
                yield float((usual[tuple(prompt)] + nll[row, col : col + levels]).abs().max())

    def _window_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits `[B, L, V]` at the positions before the target's tokens."""
        after = ids.shape[1] - 1
        before = torch.arange(after - self.model.vocab.num_levels, after, device=ids.device)
        return self.plain(input_ids=ids, attention_mask=mask, logits_to_keep=before).logits

    def _windows(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in self.windows.batches(BATCH):
            ids, mask, labels = (part.to(self.model.device) for part in batch)
            yield ids, mask, labels

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        for begin in range(0, len(self.examples), BATCH):
            batch = self.collator(self.examples[begin : begin + BATCH])
            yield {name: part.to(self.model.device) for name, part in batch.items()}


def train(repeats: int = 3) -> Iterator[Result]:
    """R1 and R2."""
    with one_thread():
        small = Training(subjects.SMALL, users=48)
        baseline = "one example per target, padded, logits at every position"
        yield _speed("R1-9k", small, small.usual, 6, repeats, baseline)
        large = Training(subjects.LARGE_VOCABULARY, users=24)
        yield _speed("R1-152k", large, large.better, 12, repeats, "one example per target, logits at targets only")
    yield _memory()


def _speed(name: str, run: Training, other: Callable[[], None], target: float, repeats: int, baseline: str) -> Result:
    difference = run.largest_difference()
    usual, ours = cpu_seconds(other, run.ours, repeats=repeats)
    details = {
        "largest_difference": difference,
        "baseline_targets_per_second": run.targets / usual,
        "targets_per_second": run.targets / ours,
    }
    result = at_least(name, usual / ours, target, details, baseline=baseline)
    return replace(result, met=result.met and difference <= 1e-5)


def _memory() -> Result:
    """R2: growth by head and loss, which is linear in tokens, so fewer tokens give the same share.

    Ours is smaller than what two runs of one program differ by, so the share may come out below 0.
    """
    megabytes = {f"{way}_mb": peak_mb(_step, way) for way in ("body", "usual", "ours")}
    body, usual, ours = megabytes.values()
    return at_most(
        "R2", (ours - body) / (usual - body), 0.02, {"tokens": STEP_TOKENS, **megabytes}, baseline="full logits"
    )


def _step(way: str) -> Callable[[], object]:
    """One training step of a fresh process: the body alone, or with full logits, or as we do it."""
    model = subjects.item_model(subjects.LARGE_VOCABULARY, subjects.codes(ITEMS)).train()
    plain = subjects.plain_model(model) if way == "usual" else model.lm
    plain.get_input_embeddings().weight.requires_grad_(False)
    vocab = model.vocab
    ids = torch.from_numpy(np.stack(subjects.prompts(vocab, STEP_TOKENS // 128, 129)))
    inputs, labels = ids[:, :-1], ids[:, 1:]
    levels = (torch.arange(128).expand_as(labels) + 1) % vocab.num_levels  # token j + 1 of a chain of paths

    def step() -> None:
        if way == "body":
            model.hidden(inputs, use_cache=False).last_hidden_state.sum().backward()
        elif way == "usual":
            plain(input_ids=inputs, labels=inputs).loss.backward()
        else:
            model(input_ids=inputs, labels=labels, levels=levels).mean().backward()

    return step

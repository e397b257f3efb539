"""Examples of catalogue rows → a batch of token ids, labels, levels and weights.

Rendering happens here, from the current `Prompts`, so a batch always speaks the newest item tokens: exchange `prompts`
after an update and nothing else is stale. Labels are already shifted: position `j` predicts `labels[j]`.

For a decoder-only model a row is the prompt and what follows it. For an encoder–decoder the prompt is the encoder's, as
`context_ids`, and the row begins anew with the answer. A model that reads an item as one vector predicts all its tokens
from one position: each position then has room for so many labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.model.prompts import Prompts
from llm_itemtok.training.examples import TASKS

TARGET_ITEMS = "target_items"
"""What `WithTargetItems` adds to a batch."""


class Collator:
    """Render and pad examples.

    Attributes:
        prompts: of the current item vocabulary.
        num_levels: tokens of an item, or of the longest.
    """

    def __init__(self, prompts: Prompts, num_levels: int) -> None:
        """Render with `prompts`."""
        self.prompts = prompts
        self.num_levels = num_levels

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Render a batch of B examples.

        Returns:
            `input_ids` int64 `[B, S]`, `labels`, `levels` int64 `[B, S * W]`, `loss_weights` float32 `[B, S * W]`,
            `tasks` int64 `[B]`. W, labels a position, is 1, or `num_levels` for a model that reads an item as one
            vector. `levels` is the level of the label, `num_levels` for a text token, -1 (with weight 0) for no target.
            For an encoder–decoder also `context_ids` and `context_seen`, int64 `[B, C]`. Padding is on the right.
        """
        rendered = [self._render(example) for example in examples]
        batch = self._contexts([prompt for prompt, *_ in rendered]) if self.prompts.encoded else {}
        rows = [self._row(*parts) for parts in rendered]
        width, each = max(len(ids) for ids, _, _ in rows), self._labels_a_position
        batch |= {
            "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
            "labels": torch.zeros(len(rows), width * each, dtype=torch.long),
            "levels": torch.full((len(rows), width * each), -1),
            "loss_weights": torch.zeros(len(rows), width * each),
            "tasks": torch.tensor([example["task"] for example in examples]),
        }
        for row, ((ids, labels, levels), example) in enumerate(zip(rows, examples, strict=True)):
            batch["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
            batch["labels"][row, : len(labels)] = torch.from_numpy(labels)
            batch["levels"][row, : len(labels)] = torch.from_numpy(levels)
            batch["loss_weights"][row, : len(labels)] = torch.from_numpy(levels >= 0) * float(example["weight"])
        return batch

    @property
    def _labels_a_position(self) -> int:
        return self.num_levels if self.prompts.reads == "items" else 1

    def _contexts(self, prompts: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """What an encoder reads, padded on the right."""
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.from_numpy(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
        return {"context_ids": ids, "context_seen": (torch.arange(ids.shape[1]) < lengths).long()}

    def _row(
        self, prompt: np.ndarray, read: np.ndarray, labels: np.ndarray, levels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids int64 `[n]` that a row feeds, and labels and levels int64 `[n * W]` of what its positions predict.

        Args:
            prompt: ids before the targets.
            read: ids `[t]` of the targets as the model reads them; the last is never fed.
            labels: `[t * W]`, what is predicted in place of each.
            levels: beside `labels`.
        """
        before = np.array([self.prompts.start]) if self.prompts.encoded else prompt
        nothing = np.full((len(before) - 1) * self._labels_a_position, -1)
        ids = np.concatenate([before, read[:-1]])
        return ids, np.concatenate([np.zeros_like(nothing), labels]), np.concatenate([nothing, levels])

    def _render(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids of a prompt, those of its targets as they are read, and their labels and levels."""
        task, items = TASKS[example["task"]], example["items"]
        prompts = self.prompts
        if task == "next-item":
            first = example["first"]
            # Another target behind the first would be one without its history: the encoder has not read on.
            assert not prompts.encoded or first == len(items) - 1
            own = items[first:]
            return prompts.history(items[:first]), prompts.read(own), prompts.paths(own), prompts.levels(own)
        if task == "title-to-item":
            prompt, labels = prompts.title_to_item(int(items[0]))
            return prompt, prompts.read(items), labels, prompts.levels(items)
        prompt, words = prompts.item_to_title(int(items[0]))
        each = self._labels_a_position
        labels, levels = np.zeros((len(words), each), dtype=np.int64), np.full((len(words), each), -1)
        labels[:, 0], levels[:, 0] = words, self.num_levels
        return prompt, words, labels.reshape(-1), levels.reshape(-1)


class WithTargetItems:
    """A collator that also says which item each label belongs to.

    Adds `target_items`, int64 `[B, S]`: catalogue rows, -1 for tokens of text and where there is no target. Rows are
    what weights hang on: token ids change with the codes, rows never.
    """

    def __init__(self, collator: Collator) -> None:
        """Add to the batches of `collator`."""
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Render a batch, as `Collator` does."""
        batch = self.collator(examples)
        levels = batch["levels"]
        held = (levels >= 0) & (levels < self.collator.num_levels)
        text = TASKS.index("item-to-title")
        targets = [np.asarray(part["items"])[part["first"] :] for part in examples if part["task"] != text]
        rows = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *targets]).astype(np.int64))
        items = torch.full_like(levels, -1)
        # Row by row, an item's tokens stand together, and its first has level 0.
        items[held] = rows[(levels[held] == 0).cumsum(0) - 1]
        return batch | {TARGET_ITEMS: items}

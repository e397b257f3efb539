"""Examples of item rows → a batch of token ids, labels, levels and weights.

Rendering happens here, from the current `Prompts`, so a batch always speaks the newest item tokens: exchange `prompts`
after an update and nothing else is stale. Labels are already shifted: position `j` predicts `labels[j]`.

For a decoder-only model a row is the prompt and what follows it. For an encoder–decoder the prompt is the encoder's, as
`context_ids`, and the row begins anew with the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.model.prompts import Prompts
from llm_itemtok.training.examples import TASKS


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
            `input_ids`, `labels`, `levels` int64 `[B, S]`, `loss_weights` float32 `[B, S]`, `tasks` int64 `[B]`.
            `levels` is the level of the label, `num_levels` for a text token, -1 (with weight 0) for no target.
            For an encoder–decoder also `context_ids` and `context_seen`, int64 `[B, C]`. Padding is on the right.
        """
        rendered = [self._render(example) for example in examples]
        batch = self._contexts([prompt for prompt, _, _ in rendered]) if self.prompts.encoded else {}
        rows = [self._row(*parts) for parts in rendered]
        width = max(len(ids) for ids, _ in rows) - 1
        batch |= {
            "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
            "labels": torch.zeros(len(rows), width, dtype=torch.long),
            "levels": torch.full((len(rows), width), -1),
            "loss_weights": torch.zeros(len(rows), width),
            "tasks": torch.tensor([example["task"] for example in examples]),
        }
        for row, ((ids, levels), example) in enumerate(zip(rows, examples, strict=True)):
            size = len(ids) - 1
            batch["input_ids"][row, :size] = torch.from_numpy(ids[:-1])
            batch["labels"][row, :size] = torch.from_numpy(ids[1:])
            batch["levels"][row, :size] = torch.from_numpy(levels[1:])
            batch["loss_weights"][row, :size] = torch.from_numpy(levels[1:] >= 0) * float(example["weight"])
        return batch

    def _contexts(self, prompts: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """What an encoder reads, padded on the right."""
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.from_numpy(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
        return {"context_ids": ids, "context_seen": (torch.arange(ids.shape[1]) < lengths).long()}

    def _row(self, prompt: np.ndarray, targets: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[n]` of a row, and the level of each, -1 where it is no target."""
        before = np.array([self.prompts.start]) if self.prompts.encoded else prompt
        return np.concatenate([before, targets]), np.concatenate([np.full(len(before), -1), levels])

    def _render(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids of a prompt, those of its targets, and the levels of the targets."""
        task, items = TASKS[example["task"]], example["items"]
        if task == "next-item":
            first = example["first"]
            # Another target behind the first would be one without its history: the encoder has not read on.
            assert not self.prompts.encoded or first == len(items) - 1
            targets = items[first:]
            return self.prompts.history(items[:first]), self.prompts.paths(targets), self.prompts.levels(targets)
        if task == "title-to-item":
            return *self.prompts.title_to_item(int(items[0])), self.prompts.levels(items)
        prompt, targets = self.prompts.item_to_title(int(items[0]))
        return prompt, targets, np.full(len(targets), self.num_levels)

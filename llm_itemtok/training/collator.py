"""Examples of item rows → a batch of token ids, labels, levels and weights.

Rendering happens here, from the current `Prompts`, so a batch always speaks the newest item tokens: exchange `prompts`
after an update and nothing else is stale. Labels are already shifted: position `j` predicts `labels[j]`.
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
        num_levels: tokens of an item.
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
            Padding is on the right.
        """
        rendered = [self._render(example) for example in examples]
        width = max(len(ids) for ids, _ in rendered) - 1
        batch = {
            "input_ids": torch.zeros(len(rendered), width, dtype=torch.long),
            "labels": torch.zeros(len(rendered), width, dtype=torch.long),
            "levels": torch.full((len(rendered), width), -1),
            "loss_weights": torch.zeros(len(rendered), width),
            "tasks": torch.tensor([example["task"] for example in examples]),
        }
        for row, ((ids, levels), example) in enumerate(zip(rendered, examples, strict=True)):
            size = len(ids) - 1
            batch["input_ids"][row, :size] = torch.from_numpy(ids[:-1])
            batch["labels"][row, :size] = torch.from_numpy(ids[1:])
            batch["levels"][row, :size] = torch.from_numpy(levels[1:])
            batch["loss_weights"][row, :size] = torch.from_numpy(levels[1:] >= 0) * float(example["weight"])
        return batch

    def _render(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[n]` of one example and the level of each, -1 where it is no target."""
        task = TASKS[example["task"]]
        if task == "next-item":
            ids = self.prompts.history(example["items"])
            levels = np.tile(np.arange(self.num_levels), len(example["items"]))
            levels[: example["first"] * self.num_levels] = -1
            return ids, np.concatenate([[-1], levels])
        item = int(example["items"][0])
        if task == "title-to-item":
            ids, num_targets = self.prompts.title_to_item(item)
            targets = np.arange(num_targets)
        else:
            ids, num_targets = self.prompts.item_to_title(item)
            targets = np.full(num_targets, self.num_levels)
        return ids, np.concatenate([np.full(len(ids) - num_targets, -1), targets])

"""Next-token loss over item tokens, and over text tokens where a task has text targets.

Minimises `sum_t w_t * -log p(token_t | tokens before it) / sum_t w_t`, both sums over the whole optimiser step. The
weight of a target token is its task's weight. Over what `p` is normalised is the model's `normaliser`.

Source: the usual objective of generative recommendation, TIGER (arXiv:2305.05065, section 3.2); the level softmax
restricts it to the tokens that can follow.
"""

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor, nn

from llm_itemtok.training.examples import TASKS

MODEL_INPUTS = ("input_ids", "labels", "levels", "context_ids", "context_seen")
"""What a model takes of a batch; the last two come with an encoder."""


@final
class NextToken:
    """The `Objective` with one term per task, all over the same denominator."""

    def __init__(self, tasks: Sequence[str]) -> None:
        """Minimise over these tasks; the same on every process, whatever its batches happen to hold."""
        self.tasks = tuple(tasks)

    def denominators(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum of the target weights."""
        return {"weight": batch["loss_weights"].sum()}

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted negative log-likelihood in nats, one term per task."""
        found = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
        nll = found[0] if isinstance(found, tuple) else found
        by_row = (nll * batch["loss_weights"]).sum(1) / totals["weight"]
        return {task: by_row[batch["tasks"] == TASKS.index(task)].sum() for task in self.tasks}

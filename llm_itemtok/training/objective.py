"""What to minimise: the protocol of an objective.

An objective returns named terms. Each term is divided by its own denominator, summed over *all micro-batches and all
processes of the optimiser step* by the trainer, and by nothing else: that makes 8 x 1 and 1 x 8 accumulation, and one
process and two, the same update. (The obvious way, a mean per micro-batch, was measured to be 8.9 times too large at 8
accumulation steps.) An objective never calls `backward` and keeps no state between calls.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """Something to minimise."""

    def denominators(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each term's share of its denominator in this micro-batch, as scalars; names as in `__call__`."""
        ...

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return scalar terms whose sum is this micro-batch's share of the step's loss.

        Args:
            model: the trainer's model, possibly wrapped; call it, do not reach inside.
            batch: as the collator made it.
            totals: the denominators over the whole optimiser step, names as in `denominators`.
        """
        ...

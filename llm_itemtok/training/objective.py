"""What to minimise: the protocol of an objective.

An objective returns named terms. Each term is divided by its own denominator, summed over *all micro-batches and all
processes of the optimiser step* by the trainer, and by nothing else: that makes 8 x 1 and 1 x 8 accumulation, and one
process and two, the same update. (The obvious way, a mean per micro-batch, was measured to be 8.9 times too large at 8
accumulation steps.) An objective never calls `backward` and keeps no state between calls.
"""

from collections.abc import Mapping
from typing import Any, Protocol, final

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


@final
class Heard(nn.Module):
    """A model for an objective inside another: what the model tells besides is kept, for the outer one to read.

    So one pass serves both, as a distributed wrapper wants it.

    Attributes:
        told: by name, after a pass (`ItemTokenModel.forward`).
    """

    told: Mapping[str, Tensor]

    def __init__(self, model: nn.Module, **asked: Any) -> None:
        """Call `model`, which stays its owner's, with these inputs as well."""
        super().__init__()
        self._model = [model]  # not a submodule
        self._asked = asked

    def forward(self, **inputs: Any) -> Any:
        """As the model."""
        found = self._model[0](**inputs, **self._asked)
        assert isinstance(found, tuple)
        self.told = found[1]
        return found

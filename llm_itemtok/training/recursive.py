"""IntRR's loss: the likelihood of the next item's levels, and the alignment of the item side with the items' codes.

    L = L_rec + weight * L_aln

`L_rec` is any objective of this package: the recursive model predicts all levels of an item from one position, and its
terms are those of the same targets in a flattened row. `L_aln` is the mean, over the items that are read and the
levels, of how unlikely the network finds an item's code under its own guidance (`model/recursive.py`). With weight 0 it
is left out, and codes are redistributed by what recommends best alone; the released settings do that, the release's
default is 0.1, the paper's value is not known.

Source: IntRR, arXiv:2602.20704, and its released code, in which both are sums over the levels; here both are means.
"""

from collections.abc import Mapping
from typing import final

from torch import Tensor, nn

from llm_itemtok.training.objective import Heard, Objective


@final
class Aligned:
    """The `Objective` with the alignment's term, `alignment`, beside those of another.

    Attributes:
        objective: `L_rec`.
        weight: of the alignment.
    """

    def __init__(self, objective: Objective, weight: float) -> None:
        """Add to `objective`; the model's recursion must tell its alignment."""
        self.objective = objective
        self.weight = weight

    def denominators(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the other, and how many items are read."""
        ids = batch["context_ids"] if "context_ids" in batch else batch["input_ids"]
        return {**self.objective.denominators(batch), "alignment": (ids < 0).sum()}

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Terms in nats."""
        heard = Heard(model)
        terms = self.objective(heard, batch, totals)
        # At least 1: a step may hold texts alone.
        terms["alignment"] = self.weight * heard.told["alignment"].sum() / totals["alignment"].clamp(min=1)
        return terms

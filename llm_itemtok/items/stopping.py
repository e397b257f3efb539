"""When the training of an RQ-VAE ends, and which of its epochs is kept.

Decisions:
- Training ends when a figure has not fallen by 0.1 % for a number of epochs. Which one is the *rule*.
- `reconstruction`, the default: the error of the rebuilt vectors. The total loss will not do. Its codebook and
  commitment terms grow with the latent vectors, so it is lowest right after the codebooks have started on k-means, and
  a patience of 50 epochs ends long before the codes are good: on the SASRec vectors of Instruments
  (9,922 items of 32 dimensions, 3 x 256) after 53 epochs, where 34 % of the variance is lost. After 500 it is 23 %.
- Kept is the epoch with the lowest collision rate among those looked at whose rebuilt error is within 5 % of the
  lowest; among equals, the one that rebuilds best. Without that bound a barely trained network wins: on Beauty (12,101
  MiniLM vectors, 3 x 256) epoch 5 had 8.0 % collisions and rebuilt 46 % of the variance, epoch 485 had 10.1 % and
  rebuilt 57 %. Which epochs are within the bound is known at the end only, so the weights of all that may still win are
  held: of two epochs, one that is no better in either figure never can.
- `loss` is there to repeat what was made before there was a choice, and gives the same codes. It watches the total loss
  and keeps an epoch when the one kept so far has a loss more than 5 % above the lowest, or more collisions, or as many
  and a larger error. Where the lowest loss is that of an early epoch that was not looked at, that is the newest one.
"""

from typing import Literal, NamedTuple

from torch import Tensor, nn

from llm_itemtok.errors import DataError

StopRule = Literal["reconstruction", "loss"]

LEAST_FALL = 0.001
"""Smaller falls, relatively, do not count."""
WITHIN = 0.05
"""Epochs whose figure is so far, relatively, above the lowest may be kept."""


class Look(NamedTuple):
    """What was seen when training paused to look at the codes."""

    epoch: int
    """Epochs trained with quantisation so far."""
    loss: float
    """Mean total loss of the last epoch."""
    collision_rate: float
    """Share of items that share their code with another."""
    reconstruction: float
    """Mean squared error, in units of the variance of the vectors: 1 is as bad as answering the mean."""

    @property
    def order(self) -> tuple[float, float]:
        """What looks are compared by, lower is better: collisions, then the error."""
        return self.collision_rate, self.reconstruction


class Watch:
    """Follows a training: tells when to stop, and holds the weights that may be the best.

    Attributes:
        looks: what was seen, in order.
    """

    def __init__(self, rule: StopRule, *, patience: int) -> None:
        """Begin to watch.

        Args:
            rule: see the head of this module.
            patience: epochs without a fall before the end, at least 1.
        """
        self.looks: list[Look] = []
        self._rule = rule
        self._patience = patience
        self._lowest, self._lowest_epoch = float("inf"), 0
        self._kept: list[tuple[Look, dict[str, Tensor]]] = []

    def is_over(self, epoch: int, *, loss: float, reconstruction: float) -> bool:
        """Note an epoch; whether the figure that is watched has not fallen for too long.

        Args:
            epoch: counted from 1.
            loss: mean total loss of it.
            reconstruction: mean reconstruction loss of it.
        """
        figure = loss if self._rule == "loss" else reconstruction
        if figure < self._lowest * (1 - LEAST_FALL):
            self._lowest, self._lowest_epoch = figure, epoch
        return epoch - self._lowest_epoch >= self._patience

    def look(self, seen: Look, module: nn.Module) -> None:
        """Note what was seen, and keep the weights if they may be the best."""
        self.looks.append(seen)
        if self._rule == "loss":
            best = self._kept[0][0] if self._kept else None
            if best is None or best.loss > self._lowest * (1 + WITHIN) or seen.order < best.order:
                self._kept = [(seen, _copy(module))]
            return
        # Last in the list, so that an error that is no number is never the lowest.
        bound = (1 + WITHIN) * min([*(other.reconstruction for other, _ in self._kept), seen.reconstruction])
        others = [(other, weights) for other, weights in self._kept if other.reconstruction <= bound]
        if seen.reconstruction <= bound and not any(_serves(other, seen) for other, _ in others):
            others = [(other, weights) for other, weights in others if not _serves(seen, other)]
            others.append((seen, _copy(module)))
        self._kept = others

    def best(self) -> tuple[Look, dict[str, Tensor]]:
        """The look that is kept, and the weights of then.

        Raises:
            DataError: if training went wrong so early that there is none.
        """
        if not self._kept:
            raise DataError(
                "training must leave errors that are numbers, was: NaN from the first look on; lower the learning rate"
            )
        return min(self._kept, key=lambda kept: kept[0].order)


def _serves(one: Look, other: Look) -> bool:
    """Whether, however low the error will fall, the one is chosen before the other."""
    return one.reconstruction <= other.reconstruction and one.collision_rate <= other.collision_rate


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}

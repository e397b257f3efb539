"""The optimiser of a quantizer that is trained between the steps of a training.

The quantizer belongs to the composite module, so checkpoints and snapshots hold its weights (`model/state.py`). At rest
its parameters ask for no gradient: neither the trainer's optimiser nor a distributed wrapper touches them. A method
that trains it does so `with learning():`, makes gradients that are the same on all processes
(`processes.summed_up`), and takes a step.

AdamW, at a rate that whoever takes the steps may scale. Weight decay is for networks, not for codebooks: a codeword has
no reason to shrink.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llm_itemtok.errors import TrainingError
from llm_itemtok.items.base import Quantizer
from llm_itemtok.training.snapshot import flat_state, load_flat_state


class QuantizerOptimizer:
    """AdamW of a quantizer's parameters.

    Attributes:
        quantizer: on the device where it is trained.
        parameters: of the quantizer, in their order.
        names: of the parameters.
    """

    def __init__(self, quantizer: Quantizer, *, learning_rate: float, weight_decay: float = 0.0) -> None:
        """Begin with no moments.

        Args:
            quantizer: to train; where it is when this is made is where it must stay.
            learning_rate: at least 0.
            weight_decay: at least 0, of all but the codebooks.
        """
        self.quantizer = quantizer
        named = dict(quantizer.named_parameters())
        self.names, self.parameters = tuple(named), list(named.values())
        networks = [parameter for parameter in self.parameters if parameter is not quantizer.codebooks]
        groups = [{"params": networks, "weight_decay": weight_decay}] if networks else []
        groups.append({"params": [quantizer.codebooks], "weight_decay": 0.0})
        self._rate = learning_rate
        self._adam = torch.optim.AdamW(groups, lr=learning_rate)

    @contextmanager
    def learning(self) -> Iterator[list[torch.nn.Parameter]]:
        """Let the parameters ask for gradients, which they do not at rest; gives them."""
        self.quantizer.requires_grad_(True)
        try:
            yield self.parameters
        finally:
            self.quantizer.requires_grad_(False)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], *, scale: float = 1.0) -> None:
        """Move along gradients, beside `parameters`; a parameter without one stays.

        Args:
            gradients: the same on all processes.
            scale: of the learning rate in this step.

        Raises:
            TrainingError: if a gradient is no finite number: every item would read the same codeword from then on.
        """
        finite = [gradient.isfinite().all() for gradient in gradients if gradient is not None]
        if finite and not torch.stack(finite).all():
            raise TrainingError(
                "gradients of the quantizer must stay finite, found: infinity or NaN; lower `update.learning_rate` or "
                "the weights of the terms of `update`, or look for numbers out of range in the item vectors. "
                "Checkpoints are of before"
            )
        for group in self._adam.param_groups:
            group["lr"] = scale * self._rate
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the moments and counts of steps, by number of the parameter and name."""
        flat = flat_state(self._adam)
        return {f"{number}/{name}": torch.as_tensor(value) for (number, name), value in flat.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        flat = {}
        for key, value in state.items():
            number, name = key.split("/", 1)
            flat[int(number), name] = value
        load_flat_state(self._adam, flat)

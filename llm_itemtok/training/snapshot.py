"""A training as it was at a moment, to go back to: weights, item codes and the optimiser's state.

What goes on whatever happens, is not in it: the step count, the schedule of the learning rate, the order of examples,
the state of random numbers. A snapshot lies in the processor's memory, and in a file where a checkpoint needs it, so
that a training that is killed while it may still go back can go back after it is resumed.

For plain and distributed data-parallel training, where every process holds everything.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from llm_itemtok.artifacts import write_bytes
from llm_itemtok.model.item_lm import ItemTokenModel

_WEIGHT, _STATE, _BESIDE = "weight/", "state/", "beside/"


class Snapshot:
    """What a training can go back to.

    Attributes:
        weights: the model's state dict: what is trained, and the item codes.
        state: the optimiser's: (number of the parameter, name) → tensor or plain value.
    """

    def __init__(self, weights: dict[str, Tensor], state: dict[tuple[int, str], Any]) -> None:
        self.weights = weights
        self.state = state

    @classmethod
    def take(cls, model: ItemTokenModel, optimizer: torch.optim.Optimizer) -> "Snapshot":
        """Copy all of it."""
        return cls({name: _copy(value) for name, value in model.state_dict().items()}, flat_state(optimizer))

    def restore(self, model: ItemTokenModel, optimizer: torch.optim.Optimizer) -> None:
        """Put everything back, bit for bit; learning rates stay what they are by now."""
        model.load_state_dict(self.weights, strict=False)
        load_flat_state(optimizer, self.state)

    def save(self, path: Path, beside: dict[str, Tensor]) -> None:
        """Write it to a file, with further tensors beside."""
        tensors = {f"{_WEIGHT}{name}": value for name, value in self.weights.items()}
        tensors |= {f"{_BESIDE}{name}": value for name, value in beside.items()}
        plain = {}
        for (number, name), value in self.state.items():
            key = f"{_STATE}{number}/{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                plain[key] = value
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        write_bytes(path, safetensors.torch.save(contiguous, metadata={"plain": json.dumps(plain, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> tuple["Snapshot", dict[str, Tensor]]:
        """Read what `save` wrote: the snapshot, and the further tensors."""
        with safetensors.safe_open(path, framework="pt") as file:
            found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            found |= json.loads(file.metadata()["plain"])
        weights = {name.removeprefix(_WEIGHT): found[name] for name in found if name.startswith(_WEIGHT)}
        beside = {name.removeprefix(_BESIDE): found[name] for name in found if name.startswith(_BESIDE)}
        state = {}
        for key in (name for name in found if name.startswith(_STATE)):
            number, name = key.removeprefix(_STATE).split("/", 1)
            state[int(number), name] = found[key]
        return cls(weights, state), beside


def flat_state(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    """A copy, in the processor's memory, of what an optimiser holds: (number of the parameter, name) → value."""
    state = optimizer.state_dict()["state"]
    return {(number, name): _copy(value) for number, entry in state.items() for name, value in entry.items()}


def load_flat_state(optimizer: torch.optim.Optimizer, state: Mapping[tuple[int, str], Any]) -> None:
    """Let an optimiser hold what `flat_state` gave; its learning rates stay."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    for (number, name), value in state.items():
        whole["state"].setdefault(number, {})[name] = value
    optimizer.load_state_dict(whole)


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value

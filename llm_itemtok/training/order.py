"""Which examples a step reads: the same however many processes share it, and after a resume.

Where an epoch's last step has too few examples for all processes, the library has them read those again that the epoch
began with; one process would not. Here these are left out. A process that is left without any reads a blank row, whose
target does not count, as it must take part in what processes do together.

Where examples of like length share a batch, the library draws the order of an epoch from the random numbers that
dropout uses, too. Processes use up unlike many, and would read by unlike orders; and a training that goes on in the
middle of an epoch would go on in another one. Here the main process's order counts for all, and checkpoints hold the
random numbers that it was drawn from. What is sorted by length is the batch of all processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from llm_itemtok.artifacts import write_bytes
from llm_itemtok.processes import of_main, place_among
from llm_itemtok.training.examples import TASKS

BLANK: dict[str, Any] = {"task": TASKS.index("next-item"), "items": [0], "first": 0, "weight": 0.0}
"""An example that reads nothing, and whose target does not count."""

ORDER_FILE = "order.safetensors"
"""In a checkpoint: the random numbers that the order of the epoch was drawn from."""


def own_share(examples: int, batch_size: int) -> int:
    """How many of an epoch's last examples are this process's, from 0 to `batch_size`.

    Args:
        examples: of an epoch.
        batch_size: of a process.
    """
    place, processes = place_among()
    left = examples % (batch_size * processes) or batch_size * processes
    return min(max(left - place * batch_size, 0), batch_size)


class LengthGrouped(LengthGroupedSampler):
    """The library's order by length, the same on all processes, and drawn again where a training goes on.

    Attributes:
        drawn_from: state of random numbers that the order of the epoch was drawn from.
        again: what the next one is to be drawn from; None for the random numbers of then.
    """

    def __init__(self, batch_size: int, lengths: list[int], device: torch.device) -> None:
        """Sort within some steps of examples.

        Args:
            batch_size: examples of an optimiser step, of all processes.
            lengths: of the examples.
            device: by which processes talk.
        """
        super().__init__(batch_size, lengths=lengths)
        self.drawn_from = torch.get_rng_state()
        self.again: Tensor | None = None
        self._device = device

    def __iter__(self) -> Iterator[int]:
        """Draw the order of an epoch."""
        if self.again is not None:
            torch.set_rng_state(self.again)  # those of now come from the checkpoint, as soon as a batch is there
            self.again = None
        self.drawn_from = torch.get_rng_state()
        order = np.array(list(super().__iter__()))
        return iter(of_main(order, self._device).tolist())


class KeepOrder(TrainerCallback):
    """Lets a training that goes on draw the order of its epoch again."""

    def __init__(self, sampler: LengthGrouped) -> None:
        """Keep that of `sampler`."""
        self.sampler = sampler

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read what `save` wrote, where the checkpoint is one in the middle of an epoch."""
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / ORDER_FILE
        if path.is_file() and float(state.epoch or 0.0) % 1:
            self.sampler.again = safetensors.torch.load_file(path)["drawn_from"]

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what the order was drawn from."""
        write_bytes(folder / ORDER_FILE, safetensors.torch.save({"drawn_from": self.sampler.drawn_from}))

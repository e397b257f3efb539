"""What a training took: targets, positions, time, memory, and an estimate of the arithmetic.

Experiments compare methods that saw the same number of targets, and say what each cost. The counts are taken from the
batches themselves, over all processes, and stand in checkpoints, so a resumed run reports what an uninterrupted one
would; time counts training and validation, without what an interruption lost.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ExportableState

from llm_itemtok.model.families import of_encoder
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.rows import output_head
from llm_itemtok.model.state import QUANTIZER


class Effort(TrainerCallback, ExportableState):
    """Counts kept while training, and in every checkpoint.

    Attributes:
        targets: items that were a target, over all epochs and processes; an item of L tokens counts once.
        positions: token positions of the batches of training, padding included; of an encoder–decoder, its decoder's.
            What a method reads besides is not among them: rounds of self-improvement, a quantizer's turns and upper
            steps, the second pass of a counterfactual target.
        context_positions: those that its encoder read; 0 for a decoder-only model.
        seconds_before: of the parts of this training that ended in a checkpoint.
        peak_mb_before: most memory that a process of those parts held, in 2**20 bytes.
    """

    def __init__(self) -> None:
        """Begin at nothing."""
        self.targets = 0
        self.positions = 0
        self.context_positions = 0
        self.seconds_before = 0.0
        self.peak_mb_before = 0.0
        self._began: float | None = None
        self._unread: Tensor | None = None  # of the newest steps, on their device: reading would make it wait

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return self.seconds_before + (0.0 if self._began is None else time.monotonic() - self._began)

    @property
    def peak_mb(self) -> float:
        """Most memory so far: of the accelerator if there is one, else resident; in 2**20 bytes."""
        return max(self.peak_mb_before, peak_megabytes())

    def add(self, counts: Tensor) -> None:
        """Count a step: int64 `[3]`, targets and positions of both kinds, of all processes."""
        self._unread = counts if self._unread is None else self._unread + counts

    def _read(self) -> None:
        if self._unread is not None:
            targets, positions, context_positions = self._unread.tolist()
            self.targets += targets
            self.positions += positions
            self.context_positions += context_positions
            self._unread = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        self._read()
        counts = {name: getattr(self, name) for name in ("targets", "positions", "context_positions")}
        return {"args": {}, "attributes": counts | {"seconds_before": self.seconds, "peak_mb_before": self.peak_mb}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the counts up to date."""
        self._read()


def batch_counts(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Targets, positions and context positions of some micro-batches, at least one: int64 `[3]` on their device."""
    counted = [(batch["levels"] == 0) & (batch["loss_weights"] > 0) for batch in batches]
    targets = torch.stack([each.sum() for each in counted]).sum()
    positions, contexts = (
        sum(batch[name].numel() for batch in batches if name in batch) for name in ("input_ids", "context_ids")
    )
    return torch.stack([targets, torch.full_like(targets, positions), torch.full_like(targets, contexts)])


def training_flops(model: ItemTokenModel, positions: int, context_positions: int = 0) -> float:
    """Floating-point operations of training on a number of positions, and of context positions, estimated.

    Two a weight of each linear layer and position for the forward pass, two for the gradient of its input, two more
    for its own gradient where it is trained (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). Left out, and small
    here: attention scores, norms, the softmax over item tokens, the optimiser. The output head of the base model is
    left out with them: item tokens do not pass through it. So is a quantizer, which reads items and not positions, and
    whatever a method reads beside the batches (`Effort.positions`), which seconds tell.
    Embeddings of items are made for what is read, and a recursive network works there and where items are predicted;
    both are counted as if no item came twice in a batch.
    """
    head = output_head(model.lm)
    read = context_positions or positions
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not name.startswith(QUANTIZER):
            work = module.weight.numel() * (6 if module.weight.requires_grad else 4)
            if name.startswith(("own.", "recursion.items.")):
                total += work * read
            elif name.startswith("recursion."):
                total += work * (read + positions)
            else:
                total += work * (context_positions if of_encoder(name) else positions)
    return total


def peak_megabytes() -> float:
    """Most memory this process has held so far: of the accelerator if it used one, else resident; in 2**20 bytes."""
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return held / 2**20 if held else resident_peak()


def resident_peak() -> float:
    """Most memory this process has had resident, in 2**20 bytes; where the system forgets its peak, since then."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says includes the parent's memory before this program began
        (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

"""Where a machine ends: memory or disk that is full, a process that is gone, told in words that say what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments

from llm_itemtok.errors import ItemTokError, TrainingError
from llm_itemtok.processes import together
from llm_itemtok.training.arguments import CHECKPOINTING

_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")
"""What torch says of memory that is not to be had, where it has no error class of its own for it."""
_NO_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout", "remote process")
"""What gloo and NCCL say where another process is gone."""
_FULL = 1 << 20
"""A disk with less room than this, in bytes, is full: what could not be written was larger."""


@contextmanager
def limits(arguments: TrainingArguments, folder: Path) -> Iterator[None]:
    """Tell full memory, a full disk and a lost process as such; every other error passes through.

    Args:
        arguments: of the training that is carried out within.
        folder: that it writes to.

    Raises:
        TrainingError: with what to change.
    """
    try:
        yield
    except ItemTokError:
        raise
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        said = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in _NO_MEMORY):
            raise TrainingError(_memory(arguments)) from error
        if getattr(error, "errno", None) == errno.ENOSPC or _is_full(folder):
            raise TrainingError(
                f"{folder}: the disk must have room for checkpoints, but is full; make room and go on with `--resume`. "
                "What was written before is whole"
            ) from error
        if together() and any(words in said for words in _NO_PEER):
            raise TrainingError(
                "all processes of a training must live, but another one is gone; what it said itself is why, or the "
                "system's log. Go on with `--resume`"
            ) from error
        raise


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _FULL


def _memory(arguments: TrainingArguments) -> str:
    batch, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    return (
        f"training must fit into the memory of {arguments.device}, but it does not with batches of {batch}; halve "
        f"`trainer.per_device_train_batch_size` and double `trainer.gradient_accumulation_steps` (was {accumulated}), "
        f"which gives the same updates; or shorten `examples.history_length`, write `trainer.{CHECKPOINTING}: true`, "
        "`model.adapter: lora` or `model.dtype: bfloat16`. While validating, `evaluation.batch_size` counts"
    )

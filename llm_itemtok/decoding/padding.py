"""Prompts of unlike lengths → one batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Token ids int64 `[B, S]` of prompts, padded on the right, and their lengths int64 `[B]`."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
    return input_ids, lengths

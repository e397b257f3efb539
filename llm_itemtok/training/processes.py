"""Work that the processes of a training share, with the result of one process alone.

The work is cut into fixed batches, which are dealt like cards: process p of P takes batches p, p + P, ... What is
computed together decides the last digits, so batches must not depend on the number of processes. Each process fills its
places of an array of zeros, and the arrays are added up, which is exact.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import distributed


def dealt(rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """This process's batches of some rows `[n]`, in their order, each of `batch_size` rows or fewer at the end."""
    place, processes = (distributed.get_rank(), distributed.get_world_size()) if together() else (0, 1)
    for start in range(place * batch_size, len(rows), processes * batch_size):
        yield rows[start : start + batch_size]


def added_up(part: np.ndarray, device: torch.device) -> np.ndarray:
    """Sum over the processes of arrays of one shape; exact where all but one are zero, and for whole numbers."""
    if not together() or not part.size:
        return part
    whole = torch.from_numpy(part).to(device)
    distributed.all_reduce(whole)
    return whole.cpu().numpy()


def together() -> bool:
    """Whether other processes work on the same."""
    return distributed.is_available() and distributed.is_initialized()

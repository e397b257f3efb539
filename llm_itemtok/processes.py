"""Work that the processes of a run share, with the result of one process alone.

The work is cut into fixed batches, which are dealt like cards: process p of P takes batches p, p + P, ... What is
computed together decides the last digits, so batches must not depend on the number of processes. Each process fills its
places of an array of zeros, and the arrays are added up, which is exact.
"""

import gc
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, distributed


def dealt(rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """This process's batches of some rows `[n]`, in their order, each of `batch_size` rows or fewer at the end."""
    place, processes = place_among()
    for start in range(place * batch_size, len(rows), processes * batch_size):
        yield rows[start : start + batch_size]


def added_up(part: np.ndarray, device: torch.device) -> np.ndarray:
    """Sum over the processes of arrays of one shape; exact where all but one are zero, and for whole numbers."""
    if not together() or not part.size:
        return part
    whole = torch.from_numpy(part).to(device)
    distributed.all_reduce(whole)
    return whole.cpu().numpy()


def summed_up(parts: Sequence[Tensor]) -> list[Tensor]:
    """Sum each of some tensors over the processes, such as gradients of shares of one loss; the same on all of them.

    Args:
        parts: on one device, of the same shapes in the same order on every process.

    Returns:
        New tensors, without gradients; of one process the values as they are.
    """
    wholes = [part.detach().clone() for part in parts]
    if together():
        for whole in wholes:
            distributed.all_reduce(whole)
    return wholes


def of_main(table: np.ndarray, device: torch.device) -> np.ndarray:
    """The main process's table, on every process: floating-point numbers of two machines may differ in the last bit."""
    if not together():
        return table
    shared = torch.from_numpy(table.astype(np.int32)).to(device)
    distributed.broadcast(shared, src=0)
    return shared.cpu().numpy()


def place_among() -> tuple[int, int]:
    """Which process this is, from 0, and of how many."""
    return (distributed.get_rank(), distributed.get_world_size()) if together() else (0, 1)


def leave(*, failed: bool = False) -> None:
    """Leave the group of processes, if there is one: left to the interpreter's end, its threads may abort it.

    What holds the group goes first, such as the wrapper of a model that nobody refers to but in a circle, of which
    trainers are full: it would keep the threads alive until then.

    Args:
        failed: whether others may still wait for this process. Gloo breaks off what they wait for; NCCL would wait for
            them in turn, so that its groups are left to the interpreter's end, which breaks them off.
    """
    if together() and not (failed and distributed.get_backend() != "gloo"):
        gc.collect()
        distributed.destroy_process_group()


def together() -> bool:
    """Whether other processes work on the same."""
    return distributed.is_available() and distributed.is_initialized()

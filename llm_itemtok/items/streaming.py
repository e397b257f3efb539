"""Item vectors in blocks: a catalogue larger than memory lies in a memory-mapped file and is read once.

`np.load(path, mmap_mode="r")` gives such an array. The functions here map a block at a time and let it go again,
because pages of a mapping that stays open count as memory of the process until the system wants them back.
"""

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_itemtok.errors import DataError

BLOCK = 65_536
"""Vectors read at a time."""


def read_blocks(vectors: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Go through vectors from the first to the last, a block in memory at a time.

    Args:
        vectors: `[N, D]`, in memory or memory-mapped.

    Yields:
        Rows, and their vectors as they are stored.
    """
    for start in range(0, len(vectors), BLOCK):
        rows = slice(start, min(start + BLOCK, len(vectors)))
        yield rows, _read(vectors, rows)


def read_rows(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some vectors, of a file in the order of the file.

    Args:
        vectors: `[N, D]`, in memory or memory-mapped.
        rows: int64 `[M]`, ascending, each in `[0, N)`.

    Returns:
        `[M, D]`, in memory.
    """
    if not isinstance(vectors, np.memmap):
        return vectors[rows]
    found = np.empty((len(rows), vectors.shape[1]), dtype=vectors.dtype)
    for block, content in read_blocks(vectors):
        low, high = np.searchsorted(rows, (block.start, block.stop))
        found[low:high] = content[rows[low:high] - block.start]
    return found


def draw_rows(num: int, size: int, *, seed: int) -> np.ndarray:
    """Draw a sample of rows without repetition.

    Returns:
        int64 `[min(size, num)]`, ascending.

    Raises:
        DataError: if the sample is empty.
    """
    if size < 1:
        raise DataError(f"a sample must have at least 1 item, was: {size}")
    if size >= num:
        return np.arange(num)
    return np.sort(np.random.default_rng(seed).choice(num, size=size, replace=False, shuffle=False))


def _read(vectors: np.ndarray, rows: slice) -> np.ndarray:
    """A block as an array in memory."""
    # A view of a mapping does not say where in the file it begins.
    file: Any = vectors  # numpy's types do not know what a memory map has beside an array
    whole = isinstance(file.base, mmap.mmap) and isinstance(file, np.memmap) and file.flags.c_contiguous
    if not whole:
        return np.asarray(vectors[rows])
    mapped = np.memmap(
        file.filename,
        dtype=file.dtype,
        mode="r",
        offset=file.offset + rows.start * file.strides[0],
        shape=(rows.stop - rows.start, *file.shape[1:]),
    )
    return np.array(mapped)

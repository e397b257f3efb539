"""Codes anew from a quantizer that has been trained: the same level sizes, unique rows, as few changes as can be.

Items take the codes that their vectors read off the codebooks now. Where several read the same one, whoever has had it
keeps it, so that one item's move does not push others about.

Decisions:
- With a margin, an item leaves a codeword only for one that is nearer by so much. Below the first level the nearest two
  codewords are often about as near, and an item that goes over for a hair has a model forget what it knew of it.
- A level that only counts within a code (`extra-level`) has no codebook: an item whose code above it did not change
  keeps its number, the others take the lowest free numbers in the order of the catalogue.
- Without such a level, one item of each code has it: the one that had it, else the one that it describes best. The
  others are *displaced*. A displaced item keeps the code it had, if nobody reads that one and it is a neighbour, one
  with the same codewords above the last level; else it takes the nearest free code, as in `collisions.reassign`.
- An item that finds no number left within its code is displaced, too.

Shape letters in this file: N items, L levels, K codewords of a level, H dimensions of a codeword, G codes that items
read.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.errors import DataError
from llm_itemtok.items.base import Quantizer, check_vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.free_codes import FreeCodes, refuse_unfit, squared_errors, with_room
from llm_itemtok.items.residual import lowest, squared_distances
from llm_itemtok.items.streaming import read_blocks

_ROWS = 4096
"""Items whose distances to a codebook are held at a time."""


class Recoded(NamedTuple):
    """Codes anew."""

    table: np.ndarray
    """int32 `[N, L]`, distinct rows."""
    collisions: float
    """Share of the items that read the same code off the codebooks as another, in `[0, 1]`."""
    displaced: int
    """Items that have another code than they read."""


def recode(quantizer: Quantizer, vectors: np.ndarray, codes: ItemCodes, *, margin: float = 0.0) -> Recoded:
    """Read all codes off a quantizer, and make them unique.

    Args:
        quantizer: on any device, with the levels of `codes` but for one that counts within a code.
        vectors: float `[N, D]`, in the quantizer's units.
        codes: of the same items before, with unique rows.
        margin: at least 0; an item keeps a codeword whose squared distance is at most `1 + margin` times the least.

    Raises:
        DataError: if codes, vectors and quantizer do not fit each other.
    """
    refuse_unfit(codes, quantizer)
    levels = quantizer.num_levels
    if len(vectors) != codes.num_items:
        raise DataError(f"there must be one vector a code, {codes.num_items:,} of them, was: {len(vectors):,}")
    had = codes.table[:, :levels]
    read = _read_with(margin, quantizer, vectors, had) if margin else quantizer.encode_blocks(vectors)
    wanted = ItemCodes(read, codes.sizes[:levels])
    if codes.num_levels > levels:
        table, rows = _numbered(wanted, codes)
    else:
        table, rows = _singled_out(wanted, codes, quantizer, vectors)
    if len(rows):
        _take_nearest(table, rows, codes.sizes, quantizer, vectors)
    return Recoded(table, wanted.collision_rate, int((table[:, :levels] != wanted.table).any(axis=1).sum()))


@torch.no_grad()
def _read_with(margin: float, quantizer: Quantizer, vectors: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Read codes int32 `[N, L]` off the codebooks; items have `table`, and leave a codeword for a much nearer one."""
    parts = []
    codebooks, prices = quantizer.used_codebooks(), quantizer.prices()
    for rows, block in read_blocks(vectors):
        latent = quantizer.to_latent(torch.from_numpy(check_vectors(block)).to(codebooks.device))
        own = torch.from_numpy(table[rows].astype(np.int64)).to(codebooks.device)
        for residual, had in zip(latent.split(_ROWS), own.split(_ROWS), strict=True):
            levels = []
            for level, codebook in enumerate(codebooks):
                chosen = _nearly_nearest(
                    residual, codebook, had[:, level], margin, None if prices is None else prices[level]
                )
                residual = residual - codebook[chosen]
                levels.append(chosen)
            parts.append(torch.stack(levels, dim=1).cpu().numpy())
    return np.concatenate(parts).astype(table.dtype)


def _nearly_nearest(points: Tensor, codebook: Tensor, had: Tensor, margin: float, prices: Tensor | None) -> Tensor:
    """Codewords int64 `[n]` of points `[n, H]` in a codebook `[K, H]`: those they had, int64 `[n]`, or nearer ones."""
    told = (codebook != codebook[0]).any(0)  # what no codeword tells, as in a product, is no distance between them
    distances = squared_distances(points[:, told], codebook[:, told])
    costs = distances if prices is None else distances + prices
    best, own = lowest(costs).unsqueeze(1), had.unsqueeze(1)
    most = costs.gather(1, best) + margin * distances.gather(1, best).clamp(min=0)
    return torch.where(costs.gather(1, own) <= most, own, best)[:, 0]


def _numbered(wanted: ItemCodes, codes: ItemCodes) -> tuple[np.ndarray, np.ndarray]:
    """Number the items of each code; returns the table int32 `[N, L]`, and the rows that find no number left."""
    levels, size = wanted.num_levels, codes.sizes[-1]
    groups = wanted.prefix_groups(levels)
    counts = np.bincount(groups)
    starts = np.cumsum(counts) - counts
    numbers = codes.table[:, -1].astype(np.int64)
    same = (wanted.table == codes.table[:, :levels]).all(axis=1)
    # A code with n items has at least as many free numbers below n as it has newcomers; so N places are all there is.
    taken = np.zeros(len(groups), dtype=bool)
    low = same & (numbers < counts[groups])
    taken[starts[groups[low]] + numbers[low]] = True
    places = np.flatnonzero(~taken)
    places_group = np.repeat(np.arange(len(counts)), counts)[places]
    newcomers = np.flatnonzero(~same)
    newcomers = newcomers[np.argsort(groups[newcomers], kind="stable")]
    own = groups[newcomers]
    rank = np.arange(len(own)) - np.searchsorted(own, own)
    numbers[newcomers] = places[np.searchsorted(places_group, own) + rank] - starts[own]
    table = np.concatenate([wanted.table, numbers[:, None].astype(np.int32)], axis=1)
    return table, np.flatnonzero(numbers >= size)


def _singled_out(
    wanted: ItemCodes, codes: ItemCodes, quantizer: Quantizer, vectors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Leave each code to one item; returns the table int32 `[N, L]`, and the rows that are still without one."""
    groups = wanted.prefix_groups(wanted.num_levels)
    contested = np.flatnonzero(np.bincount(groups)[groups] > 1)
    table = wanted.table.copy()
    if not len(contested):
        return table, contested
    had = (table[contested] == codes.table[contested]).all(axis=1)
    latent, codebooks = _latent(quantizer, vectors[contested])
    errors = squared_errors(latent, table[contested], codebooks)
    order = np.lexsort((contested, errors, ~had))
    first = order[np.unique(groups[contested][order], return_index=True)[1]]
    displaced = np.delete(contested, first)
    near = displaced[(table[displaced, :-1] == codes.table[displaced, :-1]).all(axis=1)]
    both = ItemCodes(np.concatenate([wanted.table, codes.table[near]]), codes.sizes).prefix_groups(codes.num_levels)
    kept = near[~np.isin(both[len(groups) :], both[: len(groups)])]
    table[kept] = codes.table[kept]
    return table, np.setdiff1d(displaced, kept)


def _take_nearest(
    table: np.ndarray, rows: np.ndarray, sizes: tuple[int, ...], quantizer: Quantizer, vectors: np.ndarray
) -> None:
    """Give some rows of a table the nearest free codes, the best described first; all others have theirs."""
    latent, codebooks = _latent(quantizer, vectors[rows])
    room = with_room(codebooks, sizes)
    wanted = table[rows]
    if len(sizes) > len(codebooks):
        wanted[:, -1] = 0  # the number that was too high
    errors = squared_errors(latent, wanted, room)
    free = FreeCodes(ItemCodes(np.delete(table, rows, axis=0), sizes), room, len(table))
    for place in np.lexsort((rows, errors)).tolist():
        table[rows[place]] = free.take_nearest(latent[place], tuple(wanted[place].tolist()))


@torch.no_grad()
def _latent(quantizer: Quantizer, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items float32 `[n, H]` and codebooks float32 `[L, K, H]` in the space of the codebooks."""
    codebooks = quantizer.used_codebooks()
    latent = quantizer.to_latent(torch.from_numpy(check_vectors(vectors)).to(codebooks.device))
    return latent.cpu().numpy(), codebooks.cpu().numpy()

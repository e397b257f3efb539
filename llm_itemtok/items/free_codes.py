"""Where items stand in the space of the codebooks, and which codes near them are free.

Shared by the policies of `collisions` that move items.

Shape letters in this file: N items, L levels, K codewords of a level, H dimensions of a codeword, M items of shared
codes, P prefixes (the first L - 1 codewords) of those.
"""

from typing import NamedTuple, Self

import numpy as np
import torch

from llm_itemtok.errors import DataError
from llm_itemtok.items.base import Quantizer, check_vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.residual import estimate_codebooks, squared_distances, sum_of_codewords


def refuse_unfit(codes: ItemCodes, quantizer: Quantizer) -> None:
    """Raise `DataError` unless codes have the quantizer's levels, and perhaps one more that counts."""
    levels = quantizer.num_levels
    if codes.num_levels - levels not in (0, 1) or codes.sizes[:levels] != (quantizer.num_codewords,) * levels:
        raise DataError(
            f"codes and quantizer must have the same levels, but for one that counts, was: {codes.sizes} and "
            f"{(quantizer.num_codewords,) * levels}; were files mixed from two runs?"
        )


def latent_space(codes: ItemCodes, vectors: np.ndarray, quantizer: Quantizer | None) -> tuple[np.ndarray, np.ndarray]:
    """Items float32 `[N, H]` and codebooks float32 `[L, K, H]` in the space in which codes are read off.

    Raises:
        DataError: if codes, vectors and quantizer do not fit each other.
    """
    vectors = check_vectors(vectors)
    if len(vectors) != codes.num_items:
        raise DataError(f"there must be one vector a code, {codes.num_items:,} of them, was: {len(vectors):,}")
    x_ND = torch.from_numpy(vectors)
    if quantizer is None:
        codes_NL = torch.tensor(codes.table, dtype=torch.int64)
        return vectors, estimate_codebooks(x_ND, codes_NL, max(codes.sizes)).numpy()
    sizes = (quantizer.num_codewords,) * quantizer.num_levels
    if sizes != codes.sizes:
        raise DataError(
            f"codes and quantizer must have the same levels, was: {codes.sizes} and {sizes}; resolve collisions of the "
            "codes as the quantizer gave them"
        )
    with torch.no_grad():
        return quantizer.to_latent(x_ND).numpy(), quantizer.used_codebooks().numpy()


def squared_errors(latent: np.ndarray, table: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Squared distance of each item, float32 `[N, H]`, to the sum of its codewords, float32 `[N]`."""
    rebuilt = sum_of_codewords(torch.tensor(table, dtype=torch.int64), torch.from_numpy(codebooks)).numpy()
    return np.square(latent - rebuilt).sum(axis=1)


def with_room(codebooks: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Codebooks float32 `[L, K, H]` for levels of some sizes, zeros where there were none, K the largest size."""
    room = np.zeros((len(sizes), max(sizes), codebooks.shape[2]), dtype=np.float32)
    room[: len(codebooks), : codebooks.shape[1]] = codebooks
    return room


class Shared(NamedTuple):
    """The items that share their code with another, and what they may do at the last level."""

    rows: np.ndarray
    """int64 `[M]`, ascending."""
    prefixes: np.ndarray
    """int64 `[M]`, number of each item's prefix in `[0, P)`."""
    prefix_codes: np.ndarray
    """int32 `[P, L - 1]`."""
    distances: np.ndarray
    """float32 `[M, K]`, squared, of what the prefix leaves of an item to the codewords of the last level."""
    available: np.ndarray
    """bool `[P, K]`: no item that is alone on its code has this codeword after this prefix."""

    @classmethod
    def of(cls, codes: ItemCodes, latent: np.ndarray, codebooks: np.ndarray) -> Self:
        """Find them.

        Args:
            codes: N items on L levels, at least two of them with one code.
            latent: float32 `[N, H]`.
            codebooks: float32 `[L, K', H]`, K' the most codewords of a level.
        """
        groups = codes.prefix_groups(codes.num_levels)
        is_shared = np.bincount(groups)[groups] > 1
        rows, alone = np.flatnonzero(is_shared), np.flatnonzero(~is_shared)
        numbers = codes.prefix_groups(codes.num_levels - 1)
        used, first, prefixes = np.unique(numbers[rows], return_index=True, return_inverse=True)
        prefixes = prefixes.reshape(-1)
        alone = alone[np.isin(numbers[alone], used)]
        available = np.ones((len(used), codes.sizes[-1]), dtype=bool)
        available[np.searchsorted(used, numbers[alone]), codes.table[alone, -1]] = False
        above = torch.tensor(codes.table[rows, :-1], dtype=torch.int64)
        rest = torch.from_numpy(latent[rows]) - sum_of_codewords(above, torch.from_numpy(codebooks[:-1]))
        distances = squared_distances(rest, torch.from_numpy(codebooks[-1, : codes.sizes[-1]])).clamp(min=0)
        return cls(rows, prefixes, codes.table[rows[first], :-1], distances.numpy(), available)


class FreeCodes:
    """Which codes are free, and the nearest one of them.

    Counts the codes taken under a prefix when it is first asked for, from the rows in lexicographic order, and keeps
    the counts up to date from then on. So the memory grows with the number of moves, not with the number of codes.
    """

    def __init__(self, codes: ItemCodes, codebooks: np.ndarray, num_items: int) -> None:
        """Begin with the codes that are taken.

        Args:
            codes: the taken ones, in any number of copies.
            codebooks: float32 `[L, K, H]`.
            num_items: items that will have taken a code in the end, at least those of `codes`.
        """
        self.sizes = codes.sizes
        self.codebooks = codebooks
        self.taken = np.ascontiguousarray(codes.prefix_counts(codes.num_levels)[0].T)  # [L, distinct codes]
        # Codes under a prefix of each length; more than there are items is as good as infinite.
        self.capacities = [1]
        for size in reversed(codes.sizes):
            self.capacities.insert(0, min(self.capacities[0] * size, num_items + 1))
        self.counts: dict[tuple[int, ...], np.ndarray] = {}

    def take_nearest(self, latent_H: np.ndarray, code: tuple[int, ...]) -> tuple[int, ...]:
        """Take the nearest free code to a point whose own code is taken already."""
        depth = len(code) - 1
        while depth > 0 and not self._is_free(code[:depth]).any():
            depth -= 1
        rest_H = latent_H - sum(codebook[word] for codebook, word in zip(self.codebooks, code[:depth], strict=False))
        found = code[:depth]
        for level in range(depth, len(code)):
            codebook_KH = self.codebooks[level, : self.sizes[level]]
            distance_K = np.square(rest_H - codebook_KH).sum(axis=1)
            distance_K[~self._is_free(found)] = np.inf
            word = int(distance_K.argmin())
            rest_H = rest_H - codebook_KH[word]
            found = (*found, word)
        for depth in range(len(found)):
            self._under(found[:depth])[found[depth]] += 1
        return found

    def _is_free(self, prefix: tuple[int, ...]) -> np.ndarray:
        """For each codeword after a prefix, whether a code that goes on with it is free."""
        return self._under(prefix) < self.capacities[len(prefix) + 1]

    def _under(self, prefix: tuple[int, ...]) -> np.ndarray:
        """For each codeword after a prefix, how many codes that go on with it are taken."""
        if prefix not in self.counts:
            low, high = 0, self.taken.shape[1]
            for column, word in zip(self.taken, prefix, strict=False):
                low, high = low + np.searchsorted(column[low:high], [word, word + 1])
            level = len(prefix)
            self.counts[prefix] = np.bincount(self.taken[level, low:high], minlength=self.sizes[level])
        return self.counts[prefix]

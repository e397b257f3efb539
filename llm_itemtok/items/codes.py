"""ItemCodes: what an item tokenizer says about a catalogue, as one immutable table.

Row `n` is the code of the item in row `n` of the `Catalog`; column `l` is a codeword of level `l`, coarse first.

Decisions:
- Immutable. A change of item tokens makes a *new* `ItemCodes`; nothing that holds one has to watch it.
- Depth and level sizes belong to the table. A level appended to tell colliding items apart is a level like any other,
  so no later stage adds one by hand.
- `sizes` is the *capacity* of each level, not the number of codewords in use: the vocabulary is built from it, and it
  stays fixed for a run however the codes move.
- Codewords are tokens that a language model learns, or, where `words` says so, words that it has already: of such codes
  an item may have fewer than there are levels. The codeword `ENDED` fills what is left of its row.
- Two `ItemCodes` are equal when table, sizes and words are; names and provenance describe, they do not identify.

This module knows nothing of vectors, quantizers or token ids.

Shape letters in this file: N items, L levels, P distinct prefixes.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import safetensors
import safetensors.numpy

from llm_itemtok.artifacts import FORMAT_VERSION, sha256_of_arrays, write_bytes
from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.printable import one_line

FILE_NAME = "item_codes.safetensors"
ENDED = ""
"""The word of a codeword that stands for no token: the item has ended before this level."""
_FORMAT = "llm_itemtok.item_codes"


@final
class ItemCodes:
    """An immutable table of codes, one row an item and one column a level."""

    def __init__(
        self,
        table: np.ndarray,
        sizes: Sequence[int],
        *,
        names: Sequence[str] | None = None,
        words: Sequence[Sequence[str]] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Check and copy a table of codes.

        Args:
            table: integer `[N, L]`, N and L at least 1; column `l` holds values in `[0, sizes[l])`. Copied to int32.
            sizes: capacity of each level (number of codewords that may ever be used), L values in `[1, 2**31)`.
            names: one distinct name a level, for tables and pictures; `level-0`, `level-1`, ... when not given.
            words: for each level, the distinct words that its codewords are in the vocabulary of a language model, or
                `ENDED`; None for codewords that will be tokens of their own.
            provenance: where the codes come from: anything JSON can hold, kept with the table.

        Raises:
            DataError: if shape, dtype, range, sizes, names, words or provenance are not as above, or an item goes on
                after it has ended.
        """
        self._sizes = _check_sizes(sizes)
        self._table = _check_table(np.asarray(table), self._sizes)
        self._names = _check_names(names, len(self._sizes))
        self._words = _check_words(words, self._table, self._sizes)
        self._provenance = _as_json(provenance or {})

    @property
    def table(self) -> np.ndarray:
        """The codes, int32 `[N, L]`, read-only; `torch.tensor` copies them, `torch.from_numpy` warns."""
        return self._table

    @property
    def sizes(self) -> tuple[int, ...]:
        """Capacity of each level, L values; a codeword of level `l` is in `[0, sizes[l])`."""
        return self._sizes

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each level, L distinct values."""
        return self._names

    @property
    def words(self) -> tuple[tuple[str, ...], ...] | None:
        """The word of every codeword of each level; None where codewords are tokens of their own."""
        return self._words

    @property
    def lengths(self) -> np.ndarray:
        """Codewords of each item, int64 `[N]` in `[1, L]`: fewer than L where it has ended before the last level."""
        if self._words is None:
            return np.full(self.num_items, self.num_levels, dtype=np.int64)
        return _lengths(self._table, self._words)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the codes come from (a copy: changing it changes nothing)."""
        return json.loads(self._provenance)

    @property
    def num_items(self) -> int:
        """Number of items, N."""
        return self._table.shape[0]

    @property
    def num_levels(self) -> int:
        """Number of levels, L."""
        return self._table.shape[1]

    @property
    def num_describing_levels(self) -> int:
        """Levels that describe items: all, but for one that only counts those of a shared code (an extra level)."""
        counts = self.provenance.get("collisions", {}).get("policy") == "extra-level"
        return self.num_levels - int(counts)

    @property
    def capacity(self) -> int:
        """Number of codes the levels can spell, the product of `sizes` (exact, may exceed 64 bits)."""
        capacity = 1
        for size in self._sizes:
            capacity *= size
        return capacity

    @property
    def is_injective(self) -> bool:
        """Whether no two items share their full code."""
        return self.collision_rate == 0.0

    @property
    def collision_rate(self) -> float:
        """Share of items of *this table* that share their full code with another, in `[0, 1]`.

        The codes of a run have been resolved, so theirs is 0; the rate before resolution stands in their
        `provenance["collisions"]["collision_rate_before"]`.
        """
        keys, _ = self._keys(self.num_levels)
        keys.sort()
        same = keys[1:] == keys[:-1]
        shared = np.zeros(self.num_items, dtype=bool)
        shared[1:] = same
        shared[:-1] |= same
        return float(shared.mean())

    @property
    def sha256(self) -> str:
        """Hash of what makes two `ItemCodes` equal: table, sizes and words."""
        words = () if self._words is None else (json.dumps(self._words),)
        return sha256_of_arrays(self._table, np.asarray(self._sizes, dtype=np.int64), *words)

    def prefix_groups(self, depth: int) -> np.ndarray:
        """Number the prefixes of a length in lexicographic order.

        Args:
            depth: length of the prefix, in `[0, L]`.

        Returns:
            int64 `[N]`: items have the same number exactly when their first `depth` codewords agree; numbers are
            `0 .. P - 1` in the order of the prefixes.
        """
        rows, first = self.sorted_rows(depth)
        groups = np.empty(self.num_items, dtype=np.int64)
        groups[rows] = np.cumsum(first) - 1
        return groups

    def prefix_counts(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Count the items under each prefix of a length.

        Args:
            depth: length of the prefix, in `[0, L]`.

        Returns:
            prefixes: int32 `[P, depth]`, the prefixes in use, in lexicographic order.
            counts: int64 `[P]`, items under each; they add up to N.
        """
        rows, first = self.sorted_rows(depth)
        places = np.flatnonzero(first)
        return self._table[rows[places], :depth], np.diff(places, append=self.num_items)

    def sorted_rows(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Put the items in the lexicographic order of their prefixes.

        Args:
            depth: length of the prefixes, in `[0, L]`.

        Returns:
            rows: int64 `[N]`, every catalogue row once; rows of one prefix ascend.
            first: bool `[N]`, whether the prefix differs from the one before it in this order.

        Raises:
            DataError: if there are no prefixes of this length.
        """
        if not 0 <= depth <= self.num_levels:
            raise DataError(f"depth must be between 0 and the number of levels ({self.num_levels}), was: {depth}")
        keys, bits = self._keys(depth)
        first = np.ones(self.num_items, dtype=bool)
        row_bits = _bits(self.num_items)
        if bits + row_bits >= 64:
            rows = np.argsort(keys, kind="stable")
            keys = keys[rows]
            np.not_equal(keys[1:], keys[:-1], out=first[1:])
            return rows, first
        # Numbers that carry their row are sorted directly, several times faster than through an index.
        keys <<= row_bits
        keys |= np.arange(self.num_items)
        keys.sort()
        rows = keys & ((1 << row_bits) - 1)
        keys >>= row_bits
        np.not_equal(keys[1:], keys[:-1], out=first[1:])
        return rows, first

    def _keys(self, depth: int) -> tuple[np.ndarray, int]:
        """One number for each item, int64 `[N]`, that sorts as its prefix does; and the bits that numbers may take."""
        keys, bits = np.zeros(self.num_items, dtype=np.int64), 0
        for level in range(depth):
            more = _bits(self._sizes[level])
            if bits + more >= 64:
                # Fewer than 2**31 prefixes are in use, and no codeword takes more than 31 bits.
                keys = np.unique(keys, return_inverse=True)[1].reshape(-1)
                bits = _bits(int(keys.max()) + 1)
            keys <<= more
            keys |= self._table[:, level]
            bits += more
        return keys, bits

    def with_provenance(self, **entries: Any) -> Self:
        """The same codes with entries of the provenance added or replaced."""
        changed = copy.copy(self)  # the table cannot change, so both may hold it
        changed._provenance = _as_json(self.provenance | entries)
        return changed

    def save(self, folder: str | Path) -> Path:
        """Write `item_codes.safetensors` into a folder, atomically; the same codes give the same bytes.

        Returns:
            The path of the file.
        """
        header = {
            "format": _FORMAT,
            "format_version": FORMAT_VERSION,
            "sizes": list(self._sizes),
            "names": list(self._names),
            "provenance": self.provenance,
            "sha256": self.sha256,
        }
        if self._words is not None:
            header["words"] = self._words
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        # One metadata entry: safetensors does not promise the order of several.
        metadata = {"item_codes": json.dumps(header, sort_keys=True)}
        write_bytes(path, safetensors.numpy.save({"table": self._table}, metadata=metadata))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read codes written by `save`.

        Args:
            path: the folder `save` wrote into, or the file itself.

        Raises:
            ArtifactError: if the file is missing, not of this format or version, or not what was saved.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        table, header = _read(path)
        try:
            codes = cls(
                table,
                header["sizes"],
                names=header["names"],
                words=header.get("words"),
                provenance=header["provenance"],
            )
        except (DataError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: the item codes contradict their own description: {error}") from error
        if codes.sha256 != header.get("sha256"):
            raise ArtifactError(
                f"{path}: the item codes are not the ones that were saved (sha256 {codes.sha256[:12]}, saved as "
                f"{str(header.get('sha256'))[:12]}); restore the file or make the codes again"
            )
        return codes

    def __len__(self) -> int:
        """Number of items, N."""
        return self.num_items

    def __eq__(self, other: object) -> bool:
        """Whether table, sizes and words agree."""
        if not isinstance(other, ItemCodes):
            return NotImplemented
        same = (self._sizes, self._words) == (other._sizes, other._words)
        return same and np.array_equal(self._table, other._table)

    def __hash__(self) -> int:
        """Hash over table, sizes and words."""
        return hash(self.sha256)

    def __repr__(self) -> str:
        """Items, capacity of each level, hash."""
        return f"ItemCodes({self.num_items:,} items, sizes={self._sizes}, sha256={self.sha256[:12]})"


def _bits(count: int) -> int:
    """Bits that hold the numbers `0 .. count - 1`."""
    return (count - 1).bit_length()


def _check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int | np.integer) for size in sizes):
        raise DataError(f"`sizes` must be at least one whole number, one a level, was: {sizes!r}")
    checked = tuple(int(size) for size in sizes)
    if min(checked) < 1 or max(checked) >= 2**31:
        raise DataError(f"each level must hold between 1 and 2**31 - 1 codewords, was: {checked}")
    return checked


def _check_table(table: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] != len(sizes):
        raise DataError(
            f"a table of codes must have the shape (items, levels) with at least one item and {len(sizes)} levels "
            f"(as many as `sizes`), was: {table.shape}"
        )
    if not np.issubdtype(table.dtype, np.integer):
        raise DataError(f"a table of codes must hold whole numbers, was: {table.dtype}")
    for level, size in enumerate(sizes):
        lowest, highest = table[:, level].min(), table[:, level].max()  # by column: over axis 0 it is slow
        if lowest < 0 or highest >= size:
            raise DataError(f"codewords of level {level} must be in [0, {size}), was: {lowest} to {highest}")
    checked = np.array(table, dtype=np.int32, order="C")
    checked.setflags(write=False)
    return checked


def _check_names(names: Sequence[str] | None, num_levels: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"level-{level}" for level in range(num_levels))
    checked = tuple(names)
    texts = all(isinstance(name, str) and one_line(name) == name for name in checked)
    if not texts or len(checked) != num_levels or len(set(checked)) != num_levels:
        raise DataError(f"`names` must be {num_levels} distinct texts on one line, one a level, was: {checked!r}")
    return checked


def _check_words(
    words: Sequence[Sequence[str]] | None, table: np.ndarray, sizes: tuple[int, ...]
) -> tuple[tuple[str, ...], ...] | None:
    if words is None:
        return None
    checked = tuple(tuple(level) for level in words)
    if tuple(map(len, checked)) != sizes or any(len(set(level)) < len(level) for level in checked):
        raise DataError(
            f"`words` must be one distinct word a codeword, {sizes} of them, was: {tuple(map(len, checked))}, of which "
            f"distinct: {tuple(len(set(level)) for level in checked)}"
        )
    lengths = _lengths(table, checked)
    for level, texts in enumerate(checked):
        ended = lengths <= level
        if ended.any() and (ENDED not in texts or (table[ended, level] != texts.index(ENDED)).any()):
            raise DataError(f"an item that has ended before level {level} must have no word there, but one has")
    if not lengths.all():
        raise DataError("an item must have at least one word, but one has none")
    return checked


def _lengths(table: np.ndarray, words: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """The first level, int64 `[N]`, at which each item has ended; L for those that never do."""
    lengths = np.full(len(table), len(words), dtype=np.int64)
    for level in reversed(range(len(words))):
        if ENDED in words[level]:
            lengths[table[:, level] == words[level].index(ENDED)] = level
    return lengths


def _as_json(provenance: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(provenance), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the provenance of item codes must be plain JSON values: {error}") from error


def _read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The table and the header of a file of codes, before any check of their content."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no item codes there; expected a folder with {FILE_NAME}, or that file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("item_codes", "null"))
            table = file.get_tensor("table") if "table" in file.keys() else None  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file of item codes: {error}") from error
    if table is None or not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ArtifactError(f"{path}: a safetensors file, but not of item codes written by this package")
    if header.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: item codes of format version {header.get('format_version')!r}; this version of llm-itemtok reads "
            f"version {FORMAT_VERSION}"
        )
    if table.dtype != np.int32:
        raise ArtifactError(f"{path}: the table of codes must be int32, was: {table.dtype}")
    return table, header

"""Columns of a table: how millions of values stay small until somebody looks at them.

Columns of text files are plain lists. Those of Parquet files, of which a log may have many, stay packed in
`ArrowColumn`. What is the same in many rows, such as ids, is said by its distinct values and a number a row, so that
what is done for each id is done once. Knows nothing of items and users.

Shape letter in this file: N rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa


class ArrowColumn(Sequence[Any]):
    """A column of an Arrow table, whose values become Python's only where somebody looks at them.

    Times and dates are seconds since 1970, UUIDs their text.
    """

    def __init__(self, chunks: pa.ChunkedArray) -> None:
        """Wrap a column.

        Raises:
            pa.ArrowException: if a time is beyond what microseconds can say.
        """
        if isinstance(chunks.type, pa.UuidType):
            texts = [None if value is None else str(value) for value in chunks.to_pylist()]
            chunks = pa.chunked_array([texts], pa.string()).dictionary_encode()
        if isinstance(chunks.type, pa.BaseExtensionType):
            chunks = chunks.cast(chunks.type.storage_type)
        self._seconds = pa.types.is_timestamp(chunks.type) or pa.types.is_date(chunks.type)
        if self._seconds:
            chunks = chunks.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        self._chunks = widened(chunks)

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return list(map(self._value, self._chunks[index].to_pylist()))
        return self._value(self._chunks[index].as_py())

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._chunks.chunks:
            yield from map(self._value, chunk.to_pylist())

    def _value(self, value: Any) -> Any:
        return value / 1e6 if self._seconds and value is not None else value

    def numbers(self) -> np.ndarray | None:
        """All values, float64 [N], if they are numbers and none is missing; None otherwise."""
        kind = self._chunks.type
        if self._chunks.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return None
        values = self._chunks.to_numpy().astype(np.float64)
        return values / 1e6 if self._seconds else values

    @property
    def is_nested(self) -> bool:
        """Whether values are lists or objects, which `distinct` does not take."""
        return bool(pa.types.is_nested(self._chunks.type))

    def distinct(self) -> tuple[list[Any], np.ndarray]:
        """The distinct values in any order, and for each row which it has, int64 [N]; None is a value, too."""
        coded = self._chunks
        if not pa.types.is_dictionary(coded.type):
            coded = coded.dictionary_encode()
        chunks = coded.unify_dictionaries().chunks
        values = list(map(self._value, chunks[0].dictionary.to_pylist()))
        codes = [chunk.indices.fill_null(len(values)).to_numpy() for chunk in chunks]
        return [*values, None], np.concatenate(codes).astype(np.int64)


def widened(chunks: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column whose distinct values, if it is said by them, are counted in 32 bits.

    pandas counts in 8 where a file has few, and files that are read as one have more together.
    """
    if not pa.types.is_dictionary(chunks.type):
        return chunks
    return chunks.cast(pa.dictionary(pa.int32(), chunks.type.value_type))


def distinct(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Say a column by its distinct values.

    Args:
        values: hashable and, as `1` and `True` are equal, of one type; None may be among them.

    Returns:
        the distinct values in order of their first row, and for each row which it has, int64 [N].
    """
    if isinstance(values, ArrowColumn):
        return by_first_row(*values.distinct())
    places: dict[Any, int] = {}
    codes = np.fromiter((places.setdefault(value, len(places)) for value in values), dtype=np.int64, count=len(values))
    return list(places), codes


def by_first_row(values: Sequence[Any], codes: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """As `distinct`, of rows that are said by values already, some of which may be equal, or of no row.

    Args:
        values: as in `distinct`.
        codes: int64 [N], for each row which of them it has.
    """
    if len(set(values)) < len(values):
        values, places = distinct(values)
        codes = places[codes]
    first = np.full(len(values), len(codes), dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)  # of equal indices the last assignment counts
    order = np.argsort(first, kind="stable")[: int((first < len(codes)).sum())]
    places = np.zeros(len(values), dtype=np.int64)
    places[order] = np.arange(len(order))
    return [values[index] for index in order.tolist()], places[codes]

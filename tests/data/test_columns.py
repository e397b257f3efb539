"""Columns that are said by their distinct values are the columns that they were."""

import numpy as np
import pyarrow as pa
import pytest

from llm_itemtok.data.columns import ArrowColumn, by_first_row, distinct

VALUES = {
    "texts": ["b", "a", "b", None, "", "c", "a"],
    "numbers": [3, 1, 3, None, 2, 1, 3],
    "floats": [0.5, -1.0, None, 0.5, 2.0, 2.0, 0.5],
}


def column(values, *, chunks=1, encoded=False):
    """An Arrow column of these values in several chunks, each with a dictionary of its own if it is encoded."""
    parts = [pa.array(list(part)) for part in np.array_split(np.array(values, dtype=object), chunks)]
    return ArrowColumn(pa.chunked_array([part.dictionary_encode() for part in parts] if encoded else parts))


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_however_a_column_lies_in_memory_it_holds_the_same_values(values, chunks, encoded):
    ours = column(values, chunks=chunks, encoded=encoded)
    assert len(ours) == len(values)
    assert list(ours) == values == ours[:] == [ours[index] for index in range(len(values))]
    found, codes = distinct(ours)
    assert [found[code] for code in codes] == values
    assert (found, codes.tolist()) == (distinct(values)[0], distinct(values)[1].tolist())


def test_distinct_values_come_in_the_order_of_their_first_row():
    found, codes = distinct(["b", "a", "b", "c"])
    assert found == ["b", "a", "c"]
    assert codes.tolist() == [0, 1, 0, 2]


def test_equal_values_become_one_and_values_of_no_row_none():
    found, codes = by_first_row(["x", "7", "never", "7"], np.array([3, 0, 1, 3]))
    assert found == ["7", "x"]
    assert codes.tolist() == [0, 1, 0, 0]


def test_a_column_is_numbers_if_all_of_its_values_are():
    assert column([3, 1, 2]).numbers().tolist() == [3.0, 1.0, 2.0]
    assert column([3, None]).numbers() is None
    assert column(["3", "1"]).numbers() is None


def test_times_are_seconds_and_dates_their_first():
    times = np.array(["2020-01-01T00:00:01.5", "1969-12-31T23:59:59"], dtype="M8[ms]")
    assert list(ArrowColumn(pa.chunked_array([times]))) == [1577836801.5, -1.0]
    assert ArrowColumn(pa.chunked_array([times])).numbers().tolist() == [1577836801.5, -1.0]
    assert list(ArrowColumn(pa.chunked_array([pa.array([1, None], pa.date32())]))) == [86400.0, None]

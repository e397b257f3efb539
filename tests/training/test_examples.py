"""Every training interaction is a target exactly once, with the context it may have and nothing of its future."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_itemtok.errors import DataError
from llm_itemtok.training.examples import TASKS, build, chunks

ITEM = {"next-item": 1.0}
NONE = np.array([], dtype=np.int64)


def rows(sequence, kind: str, history_length: int) -> list[tuple[list[int], int]]:
    table = build([np.array(sequence)], kind=kind, history_length=history_length, tasks=ITEM, text_rows=NONE)
    return [(example["items"], example["first"]) for example in table]


@given(length=st.integers(0, 60), history_length=st.integers(1, 25))
def test_chunks_make_every_item_a_target_exactly_once_with_no_more_context_than_allowed(length, history_length):
    sequence = np.arange(100, 100 + length)
    targets = []
    for number, (items, first) in enumerate(chunks(sequence, history_length)):
        start = int(items[0]) - 100
        assert items.tolist() == sequence[start : start + len(items)].tolist()
        assert len(items) <= history_length + 1
        assert (first == 0) == (number == 0)
        if first:
            assert first >= history_length / 2
        targets += items[first:].tolist()
    assert targets == sequence.tolist()


@given(length=st.integers(0, 40), history_length=st.integers(1, 12))
def test_windows_give_each_target_but_the_first_all_the_context_allowed(length, history_length):
    sequence = np.arange(length)
    if length < 2:
        with pytest.raises(DataError, match="`windows` over 1 training sequences gives none"):
            rows(sequence, "windows", history_length)
        return
    made = rows(sequence, "windows", history_length)
    assert [items[-1] for items, _ in made] == list(range(1, length))
    for items, first in made:
        assert first == len(items) - 1 == min(items[-1], history_length)
        assert items == list(range(items[-1] - first, items[-1] + 1))


def test_rows_by_hand():
    assert rows([5, 6, 7, 8, 9], "all-positions", 20) == [([5, 6, 7, 8, 9], 0)]
    assert rows([5, 6, 7, 8, 9], "all-positions", 2) == [([5, 6, 7], 0), ([7, 8, 9], 1)]
    assert rows([5, 6, 7, 8], "all-positions", 3) == [([5, 6, 7, 8], 0)]
    assert rows([5, 6, 7, 8, 9], "all-positions", 3) == [([5, 6, 7, 8], 0), ([7, 8, 9], 2)]
    assert rows([5], "all-positions", 3) == [([5], 0)]
    assert rows([5, 6, 7, 8], "windows", 2) == [([5, 6], 1), ([5, 6, 7], 2), ([6, 7, 8], 2)]
    assert rows([5, 6, 7, 8], "last", 2) == [([6, 7, 8], 2)]
    assert rows([5, 6], "last", 9) == [([5, 6], 1)]


def test_examples_of_every_task_carry_their_weight_and_length():
    sequences = [np.array([3, 1]), NONE, np.array([2])]
    tasks = {"next-item": 1.0, "title-to-item": 0.25, "item-to-title": 0.0}
    table = build(sequences, kind="all-positions", history_length=5, tasks=tasks, text_rows=np.array([0, 4]))
    assert table.to_dict() == {
        "task": [0, 0, 1, 1],
        "items": [[3, 1], [2], [0], [4]],
        "first": [0, 0, 0, 0],
        "weight": [1.0, 1.0, 0.25, 0.25],
        "length": [2, 1, 1, 1],
    }
    assert TASKS == ("next-item", "title-to-item", "item-to-title")


def test_text_tasks_alone_need_no_sequences():
    table = build([], kind="last", history_length=5, tasks={"item-to-title": 2.0}, text_rows=np.array([7]))
    assert [(row["task"], row["items"]) for row in table] == [(2, [7])]


@pytest.mark.parametrize(("kind", "sequences"), [("windows", [[1]]), ("last", [[1], []]), ("all-positions", [[]])])
def test_no_examples_at_all_are_refused(kind, sequences):
    arrays = [np.array(sequence, dtype=np.int64) for sequence in sequences]
    with pytest.raises(DataError, match=f"`{kind}` over {len(arrays)} .*; `all-positions` needs one interaction"):
        build(arrays, kind=kind, history_length=3, tasks=ITEM, text_rows=NONE)

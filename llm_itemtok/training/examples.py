"""Training examples: catalogue rows, never token ids.

An example names a task, the catalogue rows it is about, and which of them are targets. The collator renders token ids
from the current `ItemVocab`, so a new version of the item tokens re-renders nothing on disk.

`all-positions` puts a user's items in one row with a loss at every item: one forward pass gives the same
log-probabilities as one example per target, at a fraction of the cost. A history longer than a row is cut into chunks
that overlap, so that every training interaction is a target exactly once. `windows` has one example per target and
`last` only each user's last target; they change the training distribution, which is why all three exist.

An encoder–decoder takes `windows` or `last`: its encoder looks both ways, so within one row every target but the last
would be read before it is predicted.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, List, Value

from llm_itemtok.errors import DataError

ExampleKind = Literal["all-positions", "windows", "last"]

TASKS = ("next-item", "title-to-item", "item-to-title")
"""Tasks by number: an example's `task` is an index into this tuple."""


def build(
    sequences: Sequence[np.ndarray],
    *,
    kind: ExampleKind,
    history_length: int,
    tasks: Mapping[str, float],
    text_rows: np.ndarray,
) -> Dataset:
    """Build the examples of every task with a positive weight.

    Args:
        sequences: each user's training items (rows), in time order.
        kind: how a sequence becomes next-item examples.
        history_length: items of context a target may have, at least 1.
        tasks: weight of each task's target tokens in the loss.
        text_rows: rows of the items that have text, for the text tasks.

    Returns:
        Columns `task` (index into `TASKS`), `items` (rows), `first` (index of the first target in `items`), `weight`
        (of each target token) and `length` (items, for length-grouped sampling).

    Raises:
        DataError: if no example comes out.
    """
    columns: dict[str, list] = {name: [] for name in ("task", "items", "first", "weight", "length")}

    def add(task: str, items: np.ndarray, first: int) -> None:
        columns["task"].append(TASKS.index(task))
        columns["items"].append(items)
        columns["first"].append(first)
        columns["weight"].append(tasks[task])
        columns["length"].append(len(items))

    if tasks.get("next-item", 0) > 0:
        for sequence in sequences:
            for items, first in _next_item(np.asarray(sequence), kind, history_length):
                add("next-item", items, first)
    for task in TASKS[1:]:
        if tasks.get(task, 0) > 0:
            for row in text_rows:
                add(task, np.asarray([row]), 0)
    if not columns["task"]:
        raise DataError(
            f"training needs at least one example, but `{kind}` over {len(sequences)} training sequences gives none; "
            "`all-positions` needs one interaction per user, `windows` and `last` need two"
        )
    features = Features(
        {
            "task": Value("int8"),
            "items": List(Value("int32")),
            "first": Value("int32"),
            "weight": Value("float32"),
            "length": Value("int32"),
        }
    )
    return Dataset.from_dict(columns, features=features)


def _next_item(sequence: np.ndarray, kind: ExampleKind, history_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (items, index of the first target) of one user's sequence."""
    if kind == "all-positions":
        yield from chunks(sequence, history_length)
    elif kind == "windows":
        for target in range(1, len(sequence)):
            start = max(0, target - history_length)
            yield sequence[start : target + 1], target - start
    elif len(sequence) > 1:
        items = sequence[-(history_length + 1) :]
        yield items, len(items) - 1


def chunks(sequence: np.ndarray, history_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cut a sequence into overlapping rows in which every item is a target exactly once.

    A row has at most `history_length + 1` items, so no target sees more than `history_length` before it; targets after
    the first row have at least half of that.

    Yields:
        The row's items, and the index of its first target: 0 for the first row, whose first item is predicted from
        the start token alone.
    """
    row_length = history_length + 1
    overlap = row_length // 2
    start, first = 0, 0
    while True:
        stop = min(start + row_length, len(sequence))
        if stop > start + first:
            yield sequence[start:stop], first
        if stop == len(sequence):
            return
        start, first = stop - overlap, overlap


class NextItems:
    """The examples of the task `next-item` in a table, without a look at each.

    Attributes:
        rows: int64 `[R]`, where they stand in the table of E examples.
        items: int64, the items of all examples of the table, one example after the other.
        begins: int64 `[E]`, where each example's begin among `items`.
        ends: int64 `[E]`, and where they end.
        first: int64 `[E]`, index of the first target among an example's own.
    """

    def __init__(self, table: Dataset) -> None:
        """Read the columns of a table that `build` made."""
        columns = table.with_format("arrow")[:]
        items = columns["items"].combine_chunks()
        lengths = np.asarray(items.value_lengths())
        self.items = items.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths
        self.first = columns["first"].to_numpy().astype(np.int64)
        self.rows = np.flatnonzero(columns["task"].to_numpy() == TASKS.index("next-item"))

    def example(self, row: int) -> dict[str, Any]:
        """As the table has it, with a weight of 1."""
        items = self.items[self.begins[row] : self.ends[row]]
        return {"task": TASKS.index("next-item"), "items": items, "first": int(self.first[row]), "weight": 1.0}

    def by_length(self, rows: np.ndarray) -> np.ndarray:
        """Where short ones stand among these rows `[n]`, and then longer ones: int64 `[n]`."""
        return np.argsort((self.ends - self.begins)[rows], kind="stable")

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """All targets of some examples, int64, one example after the other."""
        return self._from(rows, self.first[rows])

    def pairs(self, rows: np.ndarray, *, alone: bool) -> tuple[np.ndarray, np.ndarray]:
        """Targets that have a history, in the order of `alignment.pairs`, and how many each example has.

        Args:
            rows: of the examples.
            alone: whether a row may begin with a target, which then has none: of decoder-only models.
        """
        first = np.maximum(self.first[rows], int(alone))
        return self._from(rows, first), (self.ends - self.begins)[rows] - first

    def _from(self, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
        begins, counts = self.begins[rows] + first, (self.ends - self.begins)[rows] - first
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.items[np.repeat(begins, counts) + places]

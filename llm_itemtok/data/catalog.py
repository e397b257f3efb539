"""The catalogue: which items exist, in which row, and what is known about each in words.

A row of the catalogue is how every later stage names an item: vectors, codes and predictions
are arrays over catalogue rows, and only the edges of the program (files, the command line)
speak of item ids. Row order is the order of the items file. A catalogue never changes; taking
items away makes a new one (`subset`), with its own hash.

Missing text is normal in real data, so it is an empty string or an empty tuple here and never
None: what follows from having no text at all is decided by whoever needs text.

Further columns of the items file are kept only where somebody asked for them (`extra`). They group or order
items in the evaluation and nothing is trained on them, so they are no part of the hash: a model of this
catalogue stays a model of this catalogue whatever stands in them.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llm_itemtok.artifacts import sha256_of_arrays
from llm_itemtok.errors import DataError

_NEAREST_AMONG = 50_000
"""Ids searched for near misses in an error message; more would make the message slow, not better."""


@dataclass(frozen=True)
class Catalog:
    """Items in a fixed row order, with what is known about each in words.

    All tuples have one entry an item. Ids are distinct, texts have no surrounding white space.
    """

    item_ids: tuple[str, ...]
    """Distinct, never empty; text even where the file had numbers."""
    titles: tuple[str, ...]
    """Empty where the title is missing."""
    categories: tuple[tuple[str, ...], ...]
    """The parts of all category paths, each once, in the order of the file; `()` where missing."""
    brands: tuple[str, ...]
    """Brand, author or maker; empty where missing."""
    descriptions: tuple[str, ...]
    """Longer text; empty where missing."""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    """Further columns of the file that were asked for, as text; empty where missing. Not hashed."""

    def __post_init__(self) -> None:
        lengths = {len(column) for column in (*self._columns, *self.extra.values())}
        assert lengths == {len(self.item_ids)}, f"columns of a catalogue must be equally long, were: {lengths}"
        assert len(self._rows) == len(self.item_ids), "item ids of a catalogue must be distinct"

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def _columns(self) -> tuple[Sequence[object], ...]:
        return self.item_ids, self.titles, self.categories, self.brands, self.descriptions

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def sha256(self) -> str:
        """Hash of all columns in row order, 64 hexadecimal digits."""
        return sha256_of_arrays(*(json.dumps(column) for column in self._columns))

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._rows

    def row(self, item_id: str) -> int:
        """The catalogue row of an item.

        Returns:
            a row in `[0, len(self))`.

        Raises:
            DataError: if no item has this id; names the nearest ids there are.
        """
        row = self._rows.get(item_id)
        if row is None:
            raise DataError(
                f"item ids must be in the catalogue of {len(self):,} items, was: {item_id!r}; {self.nearest(item_id)}"
            )
        return row

    def rows(self, item_ids: Iterable[str]) -> np.ndarray:
        """The catalogue rows of several items.

        Returns:
            int64 rows, one an id, in the order given.

        Raises:
            DataError: as `row` does, for the first id that is unknown.
        """
        return np.array([self.row(item_id) for item_id in item_ids], dtype=np.int64)

    def nearest(self, item_id: str) -> str:
        """A clause for messages: the known ids most like an unknown one, or a few ids as samples."""
        near = difflib.get_close_matches(str(item_id), self.item_ids[:_NEAREST_AMONG], n=3, cutoff=0.75)
        if near:
            return "the nearest ids are " + ", ".join(map(repr, near))
        return "ids there look like " + ", ".join(map(repr, self.item_ids[:3]))

    def text(self, row: int, max_chars: int = 2000) -> str:
        """Everything known about an item in one line: title, categories, brand, description.

        Args:
            row: a catalogue row.
            max_chars: the text is cut after this many characters.

        Returns:
            the known parts joined by ". "; empty if nothing is known.
        """
        parts = (self.titles[row], ", ".join(self.categories[row]), self.brands[row], self.descriptions[row])
        return ". ".join(part for part in parts if part)[:max_chars]

    def texts(self, max_chars: int = 2000) -> list[str]:
        """`text` of every item, in row order."""
        return [self.text(row, max_chars) for row in range(len(self))]

    def column(self, name: str) -> tuple[str, ...]:
        """A column as text: one of `item_id, title, categories, brand, description`, or one of `extra`.

        Returns:
            one text an item, empty where missing; the parts of a category path are joined by a comma.

        Raises:
            DataError: if there is no such column; names those that there are.
        """
        columns = {
            "item_id": self.item_ids,
            "title": self.titles,
            "categories": tuple(", ".join(parts) for parts in self.categories),
            "brand": self.brands,
            "description": self.descriptions,
            **self.extra,
        }
        if name not in columns:
            raise DataError(f"the column must be one of the catalogue's, {', '.join(columns)}, was: {name!r}")
        return columns[name]

    @property
    def has_text(self) -> bool:
        """Whether anything is known in words about any item."""
        return any(map(any, (self.titles, self.categories, self.brands, self.descriptions)))

    def subset(self, rows: Iterable[int]) -> "Catalog":
        """The catalogue of some items only.

        Args:
            rows: distinct rows of this catalogue; they become rows 0, 1, ... in the order given.
        """
        kept = [int(row) for row in rows]
        return Catalog(
            item_ids=tuple(self.item_ids[row] for row in kept),
            titles=tuple(self.titles[row] for row in kept),
            categories=tuple(self.categories[row] for row in kept),
            brands=tuple(self.brands[row] for row in kept),
            descriptions=tuple(self.descriptions[row] for row in kept),
            extra={name: tuple(values[row] for row in kept) for name, values in self.extra.items()},
        )

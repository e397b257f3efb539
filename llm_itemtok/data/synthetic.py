"""Made-up readers of a made-up bookshop, and the oracle that knows how they choose.

What is planted, from what a count of items sees to what only a model of the whole history sees:
some books are popular; readers keep to a few genres, and their taste drifts from one mix of genres
to another; they linger in the sub-genres they read last; they go on with series, also with one that
they interrupted two or three books ago; they read nothing twice.

The next book depends on the reader's history, on its length (how far the taste has drifted) and on
the reader's own parameters (both tastes, length of the log), and on nothing else. Those parameters
are in the `Oracle`. Its scores are therefore the exact conditional distribution the log was drawn
from, not an estimate, and no model can expect to rank better. A model has to guess the parameters
from the history, so it cannot quite reach the oracle either.

The choice, at a history of `t` books: with probability `p = 0.85 W / (W + 0.3)` the next volume of
an open series, series `s` weighted by `exp(-age_s / 3)`, where `age_s` is the number of books read
since its last volume and `W` is the sum of these weights; else a book by browsing: its sub-genre
with 0.35 of the taste at `t` and 0.65 of the recent reading (decaying by 0.7 a book), the book
within the sub-genre by its appeal, unread books only.

Shape letters in this file: B histories, N items, G genres, K sub-genres, S series.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_itemtok.artifacts import write_text
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.interactions import Interactions, offsets_of
from llm_itemtok.data.synthetic_titles import GENRES, Structure, make_catalog
from llm_itemtok.errors import DataError

MIN_ITEMS = 20
"""Fewer books would leave nothing to choose from."""

_CONTINUE, _GIVE_UP, _SERIES_MEMORY = 0.85, 0.3, 3.0
_TASTE, _RECENT_DECAY = 0.35, 0.7
_LATER_VOLUME_APPEAL = 0.03
_BATCH = 1024


@dataclass(frozen=True)
class _Readers:
    """Parameters of readers: tastes float64 [B, G] at the first and at the last book, and how many books, [B]."""

    first_taste: np.ndarray
    last_taste: np.ndarray
    lengths: np.ndarray

    def take(self, indices: np.ndarray) -> "_Readers":
        return _Readers(self.first_taste[indices], self.last_taste[indices], self.lengths[indices])

    def taste(self, step: np.ndarray) -> np.ndarray:
        """Taste before the book number `step` (int [B], from 0): float64 [B, G], rows sum to 1."""
        drift = np.minimum(step / np.maximum(self.lengths - 1, 1), 1.0)[:, None]
        return (1 - drift) * self.first_taste + drift * self.last_taste


class _State:
    """What of B histories matters for the next choice; `read` moves it one book on."""

    def __init__(self, structure: Structure, readers: _Readers) -> None:
        size, num_series = len(readers.lengths), int(structure.series.max()) + 1
        self.structure = structure
        self.readers = readers
        self.step = np.zeros(size, dtype=np.int64)
        self.seen = np.zeros((size, len(structure.series)), dtype=bool)
        self.recent = np.zeros((size, 3 * len(GENRES)))
        self.pending = np.full((size, num_series), -1)  # the volume to read next, -1 while not begun or at the end
        self.age = np.zeros((size, num_series))

    def read(self, rows: np.ndarray, items: np.ndarray) -> None:
        """The readers in `rows` (distinct) read one book each."""
        self.step[rows] += 1
        self.seen[rows, items] = True
        self.recent[rows] *= _RECENT_DECAY
        self.recent[rows, self.structure.subgenres[items]] += 1
        self.age[rows] += 1
        series = self.structure.series[items]
        inside = series >= 0
        self.pending[rows[inside], series[inside]] = self.structure.next_volume[items[inside]]
        self.age[rows[inside], series[inside]] = 0

    def probabilities(self, rows: np.ndarray, appeal: np.ndarray) -> np.ndarray:
        """The distribution of the next book of the readers in `rows`: float64 [B, N], rows sum to 1."""
        seen, pending = self.seen[rows], self.pending[rows]
        at = np.arange(len(rows))[:, None]
        open_ = (pending >= 0) & ~seen[at, pending]
        weights = np.where(open_, np.exp(-self.age[rows] / _SERIES_MEMORY), 0.0)
        total = weights.sum(axis=1, keepdims=True)
        share = _CONTINUE / (total + _GIVE_UP)  # times a weight: the probability of that series

        taste = np.repeat(self.readers.taste(self.step)[rows] / 3, 3, axis=1)
        recent = self.recent[rows]
        mass = recent.sum(axis=1, keepdims=True)
        recent = np.where(mass > 0, recent / np.where(mass > 0, mass, 1), taste)
        mix = _TASTE * taste + (1 - _TASTE) * recent
        browse = np.where(seen, 0.0, mix[:, self.structure.subgenres] * appeal)
        browse *= (1 - share * total) / browse.sum(axis=1, keepdims=True)
        row, series = np.nonzero(open_)
        browse[row, pending[row, series]] += (share * weights)[row, series]  # an open series has one next volume
        return browse


class Oracle:
    """Knows the readers' parameters and how they choose: gives the true probability of every next book."""

    def __init__(self, structure: Structure, appeal: np.ndarray, user_ids: Sequence[str], readers: _Readers) -> None:
        self._structure = structure
        self._appeal = appeal
        self._index_of = {user: index for index, user in enumerate(user_ids)}
        self._readers = readers

    def scores(self, histories: Sequence[np.ndarray], users: Sequence[str]) -> np.ndarray:
        """The generator's own distribution of the next book.

        Args:
            histories: int64 catalogue rows of the generator's catalogue, oldest first. Complete histories:
                how far a reader's taste has drifted is read off the length, so a history cut short gets
                the right answer to another question.
            users: the reader of each history.

        Returns:
            float32 [B, N] probabilities; books of the history have probability 0.

        Raises:
            DataError: for a user whom `generate` did not make.
        """
        unknown = [user for user in users if user not in self._index_of]
        if unknown:
            raise DataError(f"the oracle knows only the readers it was made with, was: {unknown[0]!r}")
        indices = np.array([self._index_of[user] for user in users], dtype=np.int64)
        out = np.empty((len(indices), len(self._appeal)), dtype=np.float32)
        for start in range(0, len(indices), _BATCH):
            part = slice(start, start + _BATCH)
            out[part] = self._replay(histories[part], self._readers.take(indices[part]))
        return out

    def _replay(self, histories: Sequence[np.ndarray], readers: _Readers) -> np.ndarray:
        state = _State(self._structure, readers)
        lengths = np.array([len(history) for history in histories])
        for step in range(lengths.max(initial=0)):
            rows = np.flatnonzero(lengths > step)
            state.read(rows, np.array([histories[row][step] for row in rows.tolist()], dtype=np.int64))
        return state.probabilities(np.arange(len(lengths)), self._appeal)


def _appeal(structure: Structure, rng: np.random.Generator) -> np.ndarray:
    """How likely each book is within its sub-genre when browsing: float64 [N], sums to 1 in each sub-genre."""
    appeal = rng.pareto(1.5, size=len(structure.series)) + 0.2
    appeal[~structure.is_entry] *= _LATER_VOLUME_APPEAL
    return appeal / np.bincount(structure.subgenres, weights=appeal)[structure.subgenres]


def _draw_readers(num_users: int, longest: int, rng: np.random.Generator) -> _Readers:
    """Readers of a few genres each, whose last taste is a new mix that keeps some of the first."""
    concentration = np.full(len(GENRES), 0.15)
    some_of_all = 0.02 / len(GENRES)  # nothing is impossible, so that there is always a book to choose
    first, new = (0.98 * rng.dirichlet(concentration, size=num_users) + some_of_all for _ in range(2))
    return _Readers(
        first_taste=first,
        last_taste=0.3 * first + 0.7 * new,
        lengths=np.minimum(5 + rng.geometric(1 / 9, size=num_users), longest),
    )


def generate(*, num_items: int = 400, num_users: int = 600, seed: int = 0) -> tuple[Catalog, Interactions, Oracle]:
    """Make a catalogue, a log with timestamps, and the oracle of that log.

    Args:
        num_items: at least 20. Below 288 there are fewer than the 24 sub-genres, below 60 hardly any series.
        num_users: at least 1. Each reads 6 books or more, 14 on average, at most 40 and half of the shop.
        seed: the same seed and sizes give the same data, to the last bit.

    Returns:
        the catalogue; the log, with strictly increasing timestamps within a user; the oracle.

    Raises:
        DataError: if the sizes are too small.
    """
    if num_items < MIN_ITEMS or num_users < 1:
        raise DataError(
            f"a synthetic catalogue needs at least {MIN_ITEMS} items and 1 user, was: {num_items} and {num_users}"
        )
    shop, people, reading, clock = (np.random.default_rng([seed, stream]) for stream in range(4))
    catalog, structure = make_catalog(num_items, shop)
    appeal = _appeal(structure, shop)
    readers = _draw_readers(num_users, min(40, num_items // 2), people)
    offsets = offsets_of(readers.lengths)
    items = np.empty(offsets[-1], dtype=np.int64)
    for start in range(0, num_users, _BATCH):
        batch = np.arange(start, min(start + _BATCH, num_users))
        state = _State(structure, readers.take(batch))
        for step in range(readers.lengths[batch].max()):
            rows = np.flatnonzero(readers.lengths[batch] > step)
            cumulative = state.probabilities(rows, appeal).cumsum(axis=1)
            drawn = reading.random((len(rows), 1)) * cumulative[:, -1:]
            chosen = (cumulative <= drawn).sum(axis=1)
            state.read(rows, chosen)
            items[offsets[batch[rows]] + step] = chosen
    user_ids = tuple(f"u{index:05d}" for index in range(num_users))
    interactions = Interactions(user_ids, offsets, items, _timestamps(offsets, clock))
    return catalog, interactions, Oracle(structure, appeal, user_ids, readers)


def _timestamps(offsets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whole seconds, float64 [N]: readers begin in the first half of 2021, a book takes about two weeks.

    Gaps are at least a minute, so time alone orders a reader's books.
    """
    gaps = 60 + np.floor(rng.exponential(14 * 86_400, size=offsets[-1]))
    gaps[offsets[:-1]] = 1_609_459_200 + rng.integers(0, 182 * 86_400, size=len(offsets) - 1)
    elapsed = np.cumsum(gaps)
    before = np.concatenate([[0.0], elapsed])[offsets[:-1]]
    return elapsed - np.repeat(before, np.diff(offsets))


def write_folder(catalog: Catalog, interactions: Interactions, path: Path | str) -> None:
    """Write a data folder as `readers.read` takes it: `items.jsonl` and `interactions.csv`.

    Missing titles, categories, brands and descriptions become null. The log has `timestamp` where it
    has timestamps, and `position` within the user otherwise.

    Args:
        catalog: the items.
        interactions: a log of these items.
        path: folder, made when missing.
    """
    lines = [
        json.dumps(
            {
                "item_id": catalog.item_ids[row],
                "title": catalog.titles[row] or None,
                "categories": [list(catalog.categories[row])] if catalog.categories[row] else None,
                "brand": catalog.brands[row] or None,
                "description": catalog.descriptions[row] or None,
            },
            ensure_ascii=False,
        )
        for row in range(len(catalog))
    ]
    write_text(Path(path) / "items.jsonl", "\n".join(lines) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    times = interactions.timestamps
    writer.writerow(["user_id", "item_id", "position" if times is None else "timestamp"])
    if times is None:
        order = np.arange(len(interactions)) - np.repeat(interactions.offsets[:-1], interactions.lengths)
    else:
        order = times.astype(np.int64) if (times == np.floor(times)).all() else times
    columns = interactions.owners.tolist(), interactions.items.tolist(), order.tolist()
    for owner, item, when in zip(*columns, strict=True):
        writer.writerow([interactions.user_ids[owner], catalog.item_ids[item], when])
    write_text(Path(path) / "interactions.csv", table.getvalue())

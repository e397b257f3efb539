"""The log as sequences: what each user did, in time order, as catalogue rows.

The order of a user's interactions is the one fact everything else rests on. Timestamps order
first, positions break their ties, file order breaks the rest, so that a log which was in order
stays as it was. Ragged sequences are one flat array with offsets: user `u` owns
`items[offsets[u]:offsets[u + 1]]`.

Further columns of the log are kept only where somebody asked for them (`extra`). They follow their rows through
sorting, k-core and the dropping of duplicates, and decide on none of it; nor are they part of the hash.

Shape letters in this file: U users, N interactions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from llm_itemtok.artifacts import sha256_of_arrays
from llm_itemtok.data.columns import by_first_row, distinct
from llm_itemtok.errors import DataError

DEDUPLICATE = ("exact", "first", "last")
"""What `deduplicate` can do with a user's repeated items."""


@dataclass(frozen=True)
class Interactions:
    """Every user's items in time order. The arrays are read-only."""

    user_ids: tuple[str, ...]
    """Distinct users in order of their first row in the file, [U]."""
    offsets: np.ndarray
    """int64 [U + 1], from 0 to N, increasing."""
    items: np.ndarray
    """int64 [N] catalogue rows, user by user, each user's in time order."""
    timestamps: np.ndarray | None = None
    """float64 [N] in seconds, never decreasing within a user; None if the log has only positions."""
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further columns of the file that were asked for: texts (object) [N], empty where missing. Not hashed."""

    def __post_init__(self) -> None:
        assert self.offsets.shape == (len(self.user_ids) + 1,), "one offset a user and one for the end"
        assert (self.offsets[0], self.offsets[-1]) == (0, len(self.items)), "offsets must span the items"
        assert all(column.shape == self.items.shape for column in self.extra.values()), "one value an interaction"
        for array in (self.offsets, self.items, self.timestamps, *self.extra.values()):
            if array is not None:
                array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [U], interactions of each user."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """int64 [N], the user index of each interaction."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    def of(self, user_index: int) -> np.ndarray:
        """A view of one user's items in time order, int64."""
        return self.items[self.offsets[user_index] : self.offsets[user_index + 1]]

    @cached_property
    def sha256(self) -> str:
        """Hash of users, order and times, 64 hexadecimal digits."""
        times = b"no timestamps" if self.timestamps is None else self.timestamps
        return sha256_of_arrays(json.dumps(self.user_ids), self.offsets, self.items, times)

    def take(self, keep: np.ndarray) -> "Interactions":
        """The log with some interactions only; users left with none disappear.

        Args:
            keep: bool [N].
        """
        lengths = np.bincount(self.owners[keep], minlength=self.num_users)
        survives = lengths > 0
        return Interactions(
            user_ids=tuple(user for user, kept in zip(self.user_ids, survives.tolist(), strict=True) if kept),
            offsets=offsets_of(lengths[survives]),
            items=self.items[keep],
            timestamps=None if self.timestamps is None else self.timestamps[keep],
            extra={name: column[keep] for name, column in self.extra.items()},
        )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Offsets of ragged rows: int64 [len(lengths) + 1], starting at 0."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def from_log(
    user_ids: Sequence[str],
    items: np.ndarray,
    *,
    users: np.ndarray | None = None,
    timestamps: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    extra: Mapping[str, Sequence[str]] | None = None,
    duplicates: str = "exact",
) -> Interactions:
    """Group a log by user and put each user's interactions in time order.

    Args:
        user_ids: the user of each row of the log, [N]; with `users`, the users that its numbers stand for.
        items: int64 [N] catalogue rows.
        users: int64 [N], where the users of the rows are given by number.
        timestamps: float64 [N] in seconds, or None.
        positions: float64 [N], or None. They order rows of the same timestamp.
        labels: int64 [N]; rows that differ here are not exact duplicates (rating, kind of event).
        extra: further columns to keep, texts [N]; rows that differ only here are duplicates.
        duplicates: see `deduplicate`.
    """
    user_ids, users = distinct(user_ids) if users is None else by_first_row(user_ids, users)
    keys = [key for key in (positions, timestamps) if key is not None]
    order = np.lexsort((*keys, users))  # stable, so file order breaks what ties are left
    users, items = users[order], np.asarray(items, dtype=np.int64)[order]
    rest = [key[order] for key in (timestamps, positions, labels) if key is not None]
    keep = deduplicate(users, items, *rest, how=duplicates)
    lengths = np.bincount(users[keep], minlength=len(user_ids))
    return Interactions(
        user_ids=tuple(user_ids),
        offsets=offsets_of(lengths),
        items=items[keep],
        timestamps=None if timestamps is None else np.asarray(timestamps, dtype=np.float64)[order][keep],
        extra={name: np.array(column, dtype=object)[order][keep] for name, column in (extra or {}).items()},
    )


def deduplicate(users: np.ndarray, items: np.ndarray, *rest: np.ndarray, how: str) -> np.ndarray:
    """Which rows of a log stay when repetitions are dropped.

    Args:
        users: int64 [N], rows of one user in time order.
        items: int64 [N] catalogue rows.
        *rest: further columns of the log, each [N].
        how: `exact` drops a row that equals an earlier one in every column; `first` and `last` keep a
            user's first or last interaction with each item.

    Returns:
        bool [N]. No user loses all rows.

    Raises:
        DataError: if `how` is none of these.
    """
    if how not in DEDUPLICATE:
        raise DataError(f"`deduplicate` must be one of {', '.join(DEDUPLICATE)}, was: {how!r}")
    keep = np.ones(len(users), dtype=bool)
    columns = (users, items, *rest) if how == "exact" else (users, items)
    order = np.lexsort(columns[::-1])  # stable: within a group of equal rows, time order
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for column in columns:
        same &= column[order[1:]] == column[order[:-1]]
    keep[(order[:-1] if how == "last" else order[1:])[same]] = False
    return keep


def k_core(interactions: Interactions, k: int) -> tuple[Interactions, np.ndarray]:
    """Drop users and items with fewer than `k` interactions until none is left.

    Dropping an item shortens users and the other way round, so this runs to the fixed point, which
    is unique. Interactions are counted, not distinct partners: repetitions count.

    Args:
        interactions: the whole log, before any split.
        k: at least 1. With 1 only items that nobody touched go.

    Returns:
        the surviving log over the new catalogue, and the int64 catalogue rows that survive, increasing:
        old row `rows[r]` is new row `r`.

    Raises:
        DataError: if `k` is below 1 or nothing survives.
    """
    if k < 1:
        raise DataError(f"`k_core` must be at least 1 where it is applied, was: {k}")
    owners, items = interactions.owners, interactions.items
    keep = np.ones(len(items), dtype=bool)
    while True:
        enough_users = np.bincount(owners[keep], minlength=interactions.num_users) >= k
        enough_items = np.bincount(items[keep], minlength=1) >= k
        still = keep.copy()
        still[keep] = enough_users[owners[keep]] & enough_items[items[keep]]
        if still.sum() == keep.sum():
            break
        keep = still
    if not keep.any():
        raise DataError(
            f"nothing is left after `k_core: {k}`: no group of users and items among {interactions.num_users:,} users "
            f"and {len(np.unique(items)):,} items with interactions has {k} interactions each; use a smaller `k_core`"
        )
    rows, renumbered = np.unique(items[keep], return_inverse=True)
    return replace(interactions.take(keep), items=renumbered.astype(np.int64)), rows

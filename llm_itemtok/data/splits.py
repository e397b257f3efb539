"""Which interactions are trained on, and which are predicted.

Two splits, both decided by time alone. *Leave-last-out*: a user's last item is the test target, the
one before it the validation target, all earlier ones are training; at test time the validation item
is part of the history. It needs 3 interactions a user. *Temporal*: two cuts of global time;
training is what happened before the first cut, and a case is a user's first interaction between the
cuts (validation) or after the second (test), with all that the user did before it as the history.

In both a history is a prefix of the user's log and the target is the interaction that follows it.
`check_leaks` proves this for any `Split`, by counting, so that a repeated item (which may well be
both in a history and a target) is no false alarm.

Shape letters in this file: C cases, U training users, H items in all histories, T training interactions.
"""

from dataclasses import dataclass, field

import numpy as np

from llm_itemtok.data.interactions import Interactions, offsets_of
from llm_itemtok.errors import DataError

HEAD_SHARE = 0.2
"""Share of the catalogue's items, by training interactions, that make up the head."""

MIN_INTERACTIONS = 3
"""What leave-last-out needs of a user: one item each to train on, to validate on and to test on."""


@dataclass(frozen=True)
class Cases:
    """Evaluation cases, at most one a user: a history and the item that followed it."""

    users: tuple[str, ...]
    """[C] user ids."""
    offsets: np.ndarray
    """int64 [C + 1]; case `i` owns `items[offsets[i]:offsets[i + 1]]`."""
    items: np.ndarray
    """int64 [H] catalogue rows of the histories, oldest first."""
    targets: np.ndarray
    """int64 [C] catalogue rows."""
    ties: np.ndarray
    """bool [C]: the last item of the history and the target have the same timestamp, so their order is
    the file's. All False where the log has no timestamps."""

    def __len__(self) -> int:
        return len(self.users)

    def history(self, index: int) -> np.ndarray:
        """A view of one case's history, int64 catalogue rows, oldest first."""
        return self.items[self.offsets[index] : self.offsets[index + 1]]

    def histories(self) -> list[np.ndarray]:
        """All histories, in case order."""
        return [self.history(index) for index in range(len(self))]

    def take(self, indices: np.ndarray) -> "Cases":
        """Some of the cases, int64 indices, in the order given."""
        lengths = np.diff(self.offsets)[indices]
        return Cases(
            users=tuple(self.users[index] for index in indices.tolist()),
            offsets=offsets_of(lengths),
            items=self.items[_spans(self.offsets[:-1][indices], lengths)],
            targets=self.targets[indices],
            ties=self.ties[indices],
        )

    def head(self, n: int, seed: int) -> "Cases":
        """A sample of `n` cases drawn without replacement, in their old order; all of them if there are fewer."""
        if n >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), size=n, replace=False)))


@dataclass(frozen=True)
class Split:
    """Training sequences, validation cases and test cases over one catalogue."""

    kind: str
    """`leave-last-out` or `temporal`."""
    train_users: tuple[str, ...]
    """[U]."""
    train_offsets: np.ndarray
    """int64 [U + 1]."""
    train_items: np.ndarray
    """int64 [T] catalogue rows, user by user, oldest first."""
    validation: Cases
    test: Cases
    counts: dict[str, int]
    """Users, dropped users and interactions, sizes of the parts: what reports and `metrics.json` print."""
    num_items: int
    """Size of the catalogue, that is the number of candidates."""
    cuts: tuple[float, float] | None = field(default=None)
    """Temporal split only: validation begins at the first timestamp, test at the second."""

    def train_sequences(self) -> list[np.ndarray]:
        """Views of the training sequences, one a training user, oldest item first."""
        return np.split(self.train_items, self.train_offsets[1:-1]) if self.train_users else []

    def item_counts(self) -> np.ndarray:
        """How often each item occurs in training, int64 [num_items]."""
        return np.bincount(self.train_items, minlength=self.num_items)

    def followed_counts(self) -> np.ndarray:
        """How often each item occurs in training with another one after it, int64 [num_items]."""
        last = self.train_items[self.train_offsets[1:][np.diff(self.train_offsets) > 0] - 1]
        return self.item_counts() - np.bincount(last, minlength=self.num_items)


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of several runs, one after the other: `starts[0], starts[0] + 1, ...`; int64 [lengths.sum()]."""
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def _cases(interactions: Interactions, users: np.ndarray, targets: np.ndarray) -> Cases:
    """Cases of some users, each with the interaction at a flat index as target and all before it as history."""
    starts = interactions.offsets[users]
    lengths = targets - starts
    times = interactions.timestamps
    ties = np.zeros(len(users), dtype=bool)
    if times is not None and len(users):
        ties = (lengths > 0) & (times[targets] == times[np.maximum(targets - 1, 0)])
    return Cases(
        users=tuple(interactions.user_ids[user] for user in users.tolist()),
        offsets=offsets_of(lengths),
        items=interactions.items[_spans(starts, lengths)],
        targets=interactions.items[targets],
        ties=ties,
    )


def leave_last_out(interactions: Interactions, *, num_items: int) -> Split:
    """Split off each user's last item for test and the last but one for validation.

    Args:
        interactions: the log, after k-core.
        num_items: size of the catalogue.

    Returns:
        a split whose `counts` tell the users that were too short (`dropped_users`) and their interactions
        (`dropped_interactions`), which are in no part of it.

    Raises:
        DataError: if no user has 3 interactions.
    """
    lengths = interactions.lengths
    users = np.flatnonzero(lengths >= MIN_INTERACTIONS)
    if not len(users):
        raise DataError(
            f"leave-last-out needs users with at least {MIN_INTERACTIONS} interactions (training, validation, test), "
            f"but none of the {interactions.num_users:,} users has more than {lengths.max(initial=0)}; "
            "use a longer log, or `split: temporal` where it has timestamps"
        )
    ends = interactions.offsets[users + 1]
    train_lengths = lengths[users] - 2
    train = _spans(interactions.offsets[users], train_lengths)
    return Split(
        kind="leave-last-out",
        train_users=tuple(interactions.user_ids[user] for user in users.tolist()),
        train_offsets=offsets_of(train_lengths),
        train_items=interactions.items[train],
        validation=_cases(interactions, users, ends - 2),
        test=_cases(interactions, users, ends - 1),
        counts={
            "users": len(users),
            "items": num_items,
            "dropped_users": interactions.num_users - len(users),
            "dropped_interactions": int(lengths[lengths < MIN_INTERACTIONS].sum()),
            "train_users": len(users),
            "train_interactions": len(train),
            "validation_cases": len(users),
            "test_cases": len(users),
        },
        num_items=num_items,
    )


def _global_cuts(times: np.ndarray, validation_share: float, test_share: float) -> tuple[float, float]:
    """The two times that leave about these shares of all interactions after them."""
    if not (validation_share > 0 and test_share > 0 and validation_share + test_share < 1):
        raise DataError(
            "the temporal split's shares of validation and test must be above 0 and together below 1, "
            f"were: {validation_share} and {test_share}"
        )
    # Shares are decimal numbers: .2 + .1 is a hair more than .3, which must not cost a row.
    after = [int(np.floor(share * len(times) + 1e-9)) for share in (validation_share + test_share, test_share)]
    first, second = np.sort(times)[[len(times) - max(count, 1) for count in after]]
    return float(first), float(second)


def _refuse_empty(sizes: dict[str, int], cuts: tuple[float, float], times: np.ndarray) -> None:
    """Raise if the cuts leave a part without users."""
    for name, size in sizes.items():
        if not size:
            raise DataError(
                f"the temporal split leaves nothing for {name}: its cuts are at {cuts[0]:.0f} and {cuts[1]:.0f} "
                f"in a log from {times.min():.0f} to {times.max():.0f} (seconds), and {name} needs users on its side "
                "who have a history; use other shares, a longer log, or `split: leave-last-out`"
            )


def temporal(
    interactions: Interactions, *, num_items: int, validation_share: float = 0.1, test_share: float = 0.1
) -> Split:
    """Split at two points of global time, so that nothing is trained on that happened after the cut.

    Interactions of one timestamp are never divided: a cut lies before all of them. Users whose first
    interaction ever lies after a cut have no history to predict from; they make no case and are counted
    (`validation_users_without_history`, `test_users_without_history`).

    Args:
        interactions: the log, after k-core, with timestamps.
        num_items: size of the catalogue.
        validation_share: about this share of all interactions lies between the cuts.
        test_share: about this share of all interactions lies after the second cut.

    Raises:
        DataError: without timestamps, with shares that leave no room, or if a part would be empty.
    """
    times = interactions.timestamps
    if times is None:
        raise DataError(
            "the temporal split needs the column `timestamp` in the interactions file, which has only `position`; "
            "add timestamps, or use `split: leave-last-out`"
        )
    cuts = _global_cuts(times, validation_share, test_share)
    trained = times < cuts[0]
    owners = interactions.owners
    train_lengths = np.bincount(owners[trained], minlength=interactions.num_users)
    users = np.flatnonzero(train_lengths)
    counts = {
        "users": interactions.num_users,
        "items": num_items,
        "dropped_users": 0,
        "train_users": len(users),
        "train_interactions": int(trained.sum()),
    }
    parts = {}
    for name, after in (("validation", (times >= cuts[0]) & (times < cuts[1])), ("test", times >= cuts[1])):
        case_users, at = np.unique(owners[after], return_index=True)
        targets = np.flatnonzero(after)[at]
        known = targets > interactions.offsets[case_users]
        parts[name] = _cases(interactions, case_users[known], targets[known])
        counts[f"{name}_cases"] = len(parts[name])
        counts[f"{name}_users_without_history"] = int((~known).sum())
    _refuse_empty({"training": len(users), **{name: len(part) for name, part in parts.items()}}, cuts, times)
    train_users = tuple(interactions.user_ids[user] for user in users.tolist())
    used = {*train_users, *parts["validation"].users, *parts["test"].users}
    counts["dropped_users"] = interactions.num_users - len(used)
    return Split(
        kind="temporal",
        train_users=train_users,
        train_offsets=offsets_of(train_lengths[users]),
        train_items=interactions.items[trained],
        counts=counts,
        num_items=num_items,
        cuts=cuts,
        **parts,
    )


def _require(holds: np.ndarray, users: tuple[str, ...], rule: str) -> None:
    """Raise for the first of `users` for whom the rule does not hold."""
    if not holds.all():
        broken = np.flatnonzero(~holds)
        raise DataError(
            f"the split leaks: {rule}, but this does not hold for {len(broken):,} of {len(holds):,} users, "
            f"the first being {users[broken[0]]!r}; this is a fault of the split, do not use its numbers"
        )


def _check_prefixes(
    interactions: Interactions, users: tuple[str, ...], rows: np.ndarray, ragged: tuple[np.ndarray, np.ndarray], of: str
) -> np.ndarray:
    """Prove that sequences (offsets and items) are prefixes of the users' logs; returns their lengths, int64."""
    offsets, items = ragged
    lengths = np.diff(offsets)
    _require(np.bincount(rows, minlength=interactions.num_users)[rows] == 1, users, f"a user has one {of}")
    _require(lengths <= interactions.lengths[rows], users, f"a {of} is no longer than the user's log")
    different = items != interactions.items[_spans(interactions.offsets[rows], lengths)]
    wrong = np.bincount(np.repeat(np.arange(len(rows)), lengths)[different], minlength=len(rows))
    _require(wrong == 0, users, f"a {of} is the beginning of the user's log, in time order")
    return lengths


def check_leaks(split: Split, interactions: Interactions) -> None:
    """Prove that nothing that is to be predicted was trained on.

    For every user the training sequence is the beginning of the log; every validation or test target
    is an interaction that comes after the training sequence and directly after its history; a test
    target comes after the validation target. Leave-last-out: training plus two targets is the whole log.
    Temporal: training is exactly what lies before the first cut, and the targets lie on their side.

    Args:
        split: any split of `interactions`.
        interactions: the log the split was made from.

    Raises:
        DataError: naming the rule and the first user who breaks it.
    """
    index_of = {user: index for index, user in enumerate(interactions.user_ids)}
    unknown = {*split.train_users, *split.validation.users, *split.test.users} - index_of.keys()
    if unknown:
        raise DataError(f"the split has users that the log does not have: {sorted(unknown)[:3]}")
    train_rows = np.array([index_of[user] for user in split.train_users], dtype=np.int64)
    trained = np.zeros(interactions.num_users, dtype=np.int64)
    trained[train_rows] = _check_prefixes(
        interactions, split.train_users, train_rows, (split.train_offsets, split.train_items), "training sequence"
    )
    earlier = trained
    for name, cases in (("validation", split.validation), ("test", split.test)):
        rows = np.array([index_of[user] for user in cases.users], dtype=np.int64)
        at = _check_prefixes(interactions, cases.users, rows, (cases.offsets, cases.items), f"{name} history")
        _require(at >= earlier[rows], cases.users, f"a {name} target comes after all that was trained on or validated")
        _require(at < interactions.lengths[rows], cases.users, f"a {name} target is in the user's log")
        flat = interactions.offsets[rows] + at
        _require(interactions.items[flat] == cases.targets, cases.users, f"a {name} target follows its history")
        if split.cuts is not None and interactions.timestamps is not None:
            times = interactions.timestamps[flat]
            begin, end = split.cuts if name == "validation" else (split.cuts[1], np.inf)
            _require((times >= begin) & (times < end), cases.users, f"a {name} target lies on its side of the cuts")
        earlier = earlier.copy()
        earlier[rows] = at + 1
    if split.kind == "leave-last-out":
        whole = trained[train_rows] + 2 == interactions.lengths[train_rows]
        _require(whole, split.train_users, "training, validation and test are the whole log")
    if split.cuts is not None and interactions.timestamps is not None:
        before = np.bincount(interactions.owners[interactions.timestamps < split.cuts[0]], minlength=len(trained))
        _require(trained == before, interactions.user_ids, "training is exactly what lies before the first cut")


def head_items(item_counts: np.ndarray) -> np.ndarray:
    """The items that people interact with most, `HEAD_SHARE` of the catalogue as far as they have interactions at all.

    Args:
        item_counts: int64 `[N]`, training interactions of each item; of equal counts, catalogue order decides.

    Returns:
        bool `[N]`.
    """
    head = np.zeros(len(item_counts), dtype=bool)
    head[np.argsort(-item_counts, kind="stable")[: int(np.ceil(HEAD_SHARE * len(item_counts)))]] = True
    return head & (item_counts > 0)

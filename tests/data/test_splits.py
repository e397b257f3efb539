"""What is trained on, what is predicted, and the proof that they do not meet."""

from dataclasses import replace

import numpy as np
import pytest

from llm_itemtok.data.interactions import from_log
from llm_itemtok.data.splits import check_leaks, leave_last_out, temporal
from llm_itemtok.errors import DataError


def make_log(sequences, times=None):
    owners = [user for user, items in sequences.items() for _ in items]
    items = np.array([item for items in sequences.values() for item in items])
    if times is None:
        return from_log(owners, items, positions=np.arange(len(items)) * 1.0)
    return from_log(owners, items, timestamps=np.array([time for row in times for time in row], dtype=float))


def random_log(seed, users=60):
    rng = np.random.default_rng(seed)
    sequences = {f"u{user}": rng.integers(12, size=rng.integers(1, 15)).tolist() for user in range(users)}
    return make_log(sequences, [rng.integers(100, size=len(items)) for items in sequences.values()])


def test_leave_last_out_by_hand():
    log = make_log({"a": [0, 1, 2, 3], "short": [4, 5], "b": [3, 3, 3]})
    split = leave_last_out(log, num_items=6)
    assert split.train_users == ("a", "b")
    assert [sequence.tolist() for sequence in split.train_sequences()] == [[0, 1], [3]]
    assert [history.tolist() for history in split.validation.histories()] == [[0, 1], [3]]
    assert split.validation.targets.tolist() == [2, 3]
    assert [history.tolist() for history in split.test.histories()] == [[0, 1, 2], [3, 3]]
    assert split.test.targets.tolist() == [3, 3]
    assert split.item_counts().tolist() == [1, 1, 0, 1, 0, 0]
    assert split.followed_counts().tolist() == [1, 0, 0, 0, 0, 0]
    assert split.counts["dropped_users"] == 1
    assert split.counts["dropped_interactions"] == 2
    assert split.counts["train_interactions"] == 3
    assert not split.test.ties.any()


def test_ties_are_targets_at_the_time_of_the_last_history_item():
    split = leave_last_out(make_log({"a": [0, 1, 2], "b": [0, 1, 2]}, [[1, 5, 5], [5, 5, 6]]), num_items=3)
    assert split.test.ties.tolist() == [True, False]
    assert split.validation.ties.tolist() == [False, True]


def test_temporal_by_hand():
    sequences = {"a": [0, 1, 2, 3], "b": [4, 5], "c": [6, 7], "d": [8, 9]}
    log = make_log(sequences, [[1, 2, 6, 8], [3, 9], [4, 7], [6, 10]])
    split = temporal(log, num_items=10, validation_share=0.3, test_share=0.3)
    assert split.cuts == (6, 8)
    assert split.train_users == ("a", "b", "c")
    assert [sequence.tolist() for sequence in split.train_sequences()] == [[0, 1], [4], [6]]
    assert split.validation.users == ("a", "c")  # d has no history before its first interaction
    assert split.validation.targets.tolist() == [2, 7]
    assert split.test.users == ("a", "b", "d")
    assert [history.tolist() for history in split.test.histories()] == [[0, 1, 2], [4], [8]]
    assert split.test.targets.tolist() == [3, 5, 9]
    assert split.counts["validation_users_without_history"] == 1
    assert split.counts["test_users_without_history"] == 0
    assert split.counts["dropped_users"] == 0


@pytest.mark.parametrize(("rows", "cuts"), [(10, (7, 9)), (1000, (700, 900)), (36, (26, 33))])
def test_shares_leave_as_many_rows_as_they_say(rows, cuts):
    """.2 + .1 is a hair more than .3 in binary."""
    log = make_log({"a": [0] * (rows // 2), "b": [1] * (rows - rows // 2)}, [range(0, rows - 1, 2), range(1, rows, 2)])
    assert temporal(log, num_items=2, validation_share=0.2, test_share=0.1).cuts == cuts


def test_a_cut_never_divides_one_moment():
    log = make_log({"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2]}, [[1, 5, 8], [1, 5, 8], [1, 5, 9]])
    split = temporal(log, num_items=3, validation_share=0.3, test_share=0.3)
    assert split.cuts == (5, 8)
    assert split.train_items.tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_splits_of_random_logs_do_not_leak(seed):
    log = random_log(seed)
    for split in (leave_last_out(log, num_items=12), temporal(log, num_items=12)):
        check_leaks(split, log)
        assert split.counts["train_interactions"] == len(split.train_items) == split.item_counts().sum()
        assert len(split.test) == split.counts["test_cases"]


def broken(split, how):
    """A split with one fault."""
    case, test = split.validation, split.test
    if how == "trains on a target":
        items = np.concatenate([split.train_items, case.targets[-1:]])
        offsets = np.concatenate([split.train_offsets[:-1], split.train_offsets[-1:] + 1])
        return replace(split, train_items=items, train_offsets=offsets)
    if how == "forgets an interaction":
        offsets = np.concatenate([split.train_offsets[:-1], split.train_offsets[-1:] - 1])
        return replace(split, train_items=split.train_items[:-1], train_offsets=offsets)
    if how == "wrong target":
        return replace(split, test=replace(test, targets=(test.targets + 1) % 12))
    if how == "wrong order":
        return replace(split, train_items=split.train_items[::-1].copy())
    if how == "user twice":
        return replace(split, train_users=(split.train_users[1], *split.train_users[1:]))
    if how == "unknown user":
        return replace(split, train_users=("nobody", *split.train_users[1:]))
    assert how == "test is validation"
    return replace(split, test=case)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("trains on a target", "a validation target comes after all that was trained on"),
        ("forgets an interaction", "training, validation and test are the whole log"),
        ("wrong target", "a test target follows its history"),
        ("wrong order", "a training sequence is the beginning of the user's log"),
        ("user twice", "a user has one training sequence"),
        ("unknown user", "users that the log does not have: .*nobody"),
        ("test is validation", "a test target comes after all that was trained on or validated"),
    ],
)
def test_a_leak_is_found(how, match):
    log = random_log(1)
    with pytest.raises(DataError, match=match):
        check_leaks(broken(leave_last_out(log, num_items=12), how), log)


def test_a_temporal_leak_is_found():
    log = random_log(2)
    split = temporal(log, num_items=12)
    with pytest.raises(DataError, match=r"lies on its side of the cuts|what lies before the first cut"):
        check_leaks(replace(split, cuts=(split.cuts[0] + 1, split.cuts[1] + 1)), log)
    with pytest.raises(DataError, match="exactly what lies before the first cut"):
        check_leaks(broken(split, "forgets an interaction"), log)


def test_the_temporal_split_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="needs the column `timestamp`"):
        temporal(make_log({"a": [0, 1, 2]}), num_items=3)
    log = make_log({"a": [0, 1], "b": [0, 1]}, [[5, 5], [5, 5]])
    with pytest.raises(DataError, match=r"leaves nothing for training: its cuts are at 5 and 5"):
        temporal(log, num_items=2)
    with pytest.raises(DataError, match=r"above 0 and together below 1, were: 0.5 and 0.5"):
        temporal(log, num_items=2, validation_share=0.5, test_share=0.5)
    log = make_log({"a": [0, 1], "b": [0, 1]}, [[1, 2], [7, 8]])
    with pytest.raises(DataError, match="leaves nothing for validation"):
        temporal(log, num_items=2, validation_share=0.25, test_share=0.25)


def test_a_sample_of_cases_keeps_order_and_seed():
    cases = leave_last_out(random_log(4), num_items=12).test
    sample = cases.head(10, seed=1)
    assert len(sample) == 10
    places = [cases.users.index(user) for user in sample.users]
    assert places == sorted(places)
    assert [history.tolist() for history in sample.histories()] == [cases.history(at).tolist() for at in places]
    assert sample.targets.tolist() == cases.targets[places].tolist()
    assert cases.head(10, seed=1).users == sample.users
    assert cases.head(10, seed=2).users != sample.users
    assert cases.head(10_000, seed=0) is cases

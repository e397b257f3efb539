"""Logs in time order, without repetitions, down to their core."""

import numpy as np
import pytest

from llm_itemtok.data.interactions import deduplicate, from_log, k_core
from llm_itemtok.errors import DataError


def random_log(seed, users=40, items=30, rows=400):
    rng = np.random.default_rng(seed)
    owners = [f"u{user}" for user in rng.integers(users, size=rows)]
    return from_log(
        owners, np.floor(rng.random(rows) ** 2 * items).astype(int), timestamps=rng.integers(50, size=rows) * 1.0
    )


def test_users_stand_in_order_of_appearance_with_their_items_in_time_order():
    log = from_log(["b", "a", "b", "b"], np.array([3, 1, 2, 0]), timestamps=np.array([9.0, 1.0, 4.0, 9.0]))
    assert log.user_ids == ("b", "a")
    assert [log.of(user).tolist() for user in range(2)] == [[2, 3, 0], [1]]
    assert log.timestamps.tolist() == [4, 9, 9, 1]
    assert len(log) == 4


def test_arrays_cannot_be_changed():
    log = random_log(0)
    with pytest.raises(ValueError, match="read-only"):
        log.of(0)[0] = 1


def test_the_hash_sees_users_order_and_times():
    log = from_log(["a", "a"], np.array([0, 1]), timestamps=np.array([1.0, 2.0]))
    others = [
        from_log(["b", "b"], np.array([0, 1]), timestamps=np.array([1.0, 2.0])),
        from_log(["a", "a"], np.array([1, 0]), timestamps=np.array([1.0, 2.0])),
        from_log(["a", "a"], np.array([0, 1]), timestamps=np.array([1.0, 3.0])),
        from_log(["a", "a"], np.array([0, 1])),
    ]
    assert len({log.sha256, *(other.sha256 for other in others)}) == 5


def test_deduplicate_by_hand():
    users, items, times = np.array([0, 0, 0, 0, 1]), np.array([5, 5, 6, 5, 5]), np.array([1, 1, 1, 2, 1])
    assert deduplicate(users, items, times, how="exact").tolist() == [True, False, True, True, True]
    assert deduplicate(users, items, times, how="first").tolist() == [True, False, True, False, True]
    assert deduplicate(users, items, times, how="last").tolist() == [False, False, True, True, True]
    with pytest.raises(DataError, match="was: 'some'"):
        deduplicate(users, items, how="some")


@pytest.mark.parametrize("seed", range(5))
def test_k_core_is_the_fixed_point(seed):
    log = random_log(seed)
    core, rows = k_core(log, 6)
    assert core.lengths.min() >= 6
    assert np.bincount(core.items, minlength=len(rows)).min() >= 6
    again, all_rows = k_core(core, 6)
    assert again.sha256 == core.sha256
    assert all_rows.tolist() == list(range(len(rows)))


def test_k_core_drops_no_more_than_it_must():
    """Peeling one user or item at a time, in any order, ends in the same core."""
    log = random_log(3)
    pairs = list(zip(log.owners.tolist(), log.items.tolist(), strict=True))
    rng = np.random.default_rng(0)
    while True:
        counts = {}
        for user, item in pairs:
            counts[("user", user)] = counts.get(("user", user), 0) + 1
            counts[("item", item)] = counts.get(("item", item), 0) + 1
        short = sorted(key for key, count in counts.items() if count < 6)
        if not short:
            break
        side, drop = short[rng.integers(len(short))]
        pairs = [pair for pair in pairs if pair[side == "item"] != drop]
    core, rows = k_core(log, 6)
    index = {user: at for at, user in enumerate(log.user_ids)}
    found = [(index[core.user_ids[user]], int(rows[item])) for user, item in zip(core.owners, core.items, strict=True)]
    assert found == pairs


def test_k_core_keeps_order_and_times():
    log = from_log(["a", "a", "b", "b", "a"], np.array([9, 4, 4, 9, 2]), timestamps=np.array([3.0, 1.0, 1.0, 2.0, 2.0]))
    core, rows = k_core(log, 2)
    assert rows.tolist() == [4, 9]
    assert [core.of(user).tolist() for user in range(2)] == [[0, 1], [0, 1]]
    assert core.timestamps.tolist() == [1, 3, 1, 2]


def test_further_columns_stay_beside_their_rows_and_are_not_hashed():
    users, items, times = ["a", "b", "a", "a"], np.array([1, 2, 3, 3]), np.array([9.0, 1.0, 2.0, 2.0])
    log = from_log(users, items, timestamps=times, extra={"land": ["late", "b", "early", "a copy, but for this"]})
    assert log.extra["land"].tolist() == ["early", "late", "b"]
    assert log.take(np.array([False, True, True])).extra["land"].tolist() == ["late", "b"]
    assert log.sha256 == from_log(users, items, timestamps=times).sha256
    with pytest.raises(ValueError, match="read-only"):
        log.extra["land"][0] = ""

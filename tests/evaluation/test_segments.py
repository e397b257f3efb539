"""Segments partition the cases as their names say."""

from dataclasses import replace

import numpy as np
import pytest

from llm_itemtok.data.interactions import from_log, k_core
from llm_itemtok.data.splits import Cases, leave_last_out, temporal
from llm_itemtok.evaluation.metrics import METRIC_KEYS, metrics_from_ranks
from llm_itemtok.evaluation.segments import (
    MOST_VALUES,
    item_order_masks,
    segment_masks,
    segment_metrics,
    user_column_masks,
)


def make_cases(lengths, targets, ties=None):
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return Cases(
        users=tuple(f"u{i}" for i in range(len(targets))),
        offsets=offsets,
        items=np.zeros(offsets[-1], dtype=np.int64),
        targets=np.array(targets, dtype=np.int64),
        ties=np.zeros(len(targets), dtype=bool) if ties is None else np.array(ties),
    )


def test_head_is_the_fifth_of_the_items_with_most_interactions_and_cold_has_none():
    """Ten items: the two most counted (3 and 7) are head; 0 and 9 were never seen."""
    counts = np.array([0, 1, 1, 9, 1, 1, 1, 8, 1, 0])

    masks = segment_masks(make_cases([1] * 5, [3, 7, 1, 0, 9]), counts)

    assert masks["head"].tolist() == [True, True, False, False, False]
    assert masks["tail"].tolist() == [False, False, True, True, True]
    assert masks["cold"].tolist() == [False, False, False, True, True]


def test_an_item_without_interactions_is_never_head():
    masks = segment_masks(make_cases([1, 1], [0, 1]), np.array([0, 5, 0, 0, 0, 0, 0, 0, 0, 0]))

    assert masks["head"].tolist() == [False, True]


def test_equal_counts_at_the_edge_of_the_head_are_settled_by_the_order_of_the_catalogue():
    masks = segment_masks(make_cases([1] * 5, range(5)), np.full(5, 2))

    assert masks["head"].tolist() == [True, False, False, False, False]


def test_bands_hold_each_history_once():
    lengths = [1, 5, 6, 10, 11, 20, 21, 500]

    masks = segment_masks(make_cases(lengths, [0] * 8), np.ones(5))

    bands = {name: np.flatnonzero(mask).tolist() for name, mask in masks.items() if name.startswith("history")}
    assert bands == {"history 1-5": [0, 1], "history 6-10": [2, 3], "history 11-20": [4, 5], "history 21+": [6, 7]}


def test_empty_histories_have_a_band_of_their_own_where_there_are_any():
    masks = segment_masks(make_cases([0, 1], [0, 0]), np.ones(5))

    assert masks["history 0"].tolist() == [True, False]


def test_last_steps_within_one_time_are_told_apart_only_where_there_are_any():
    tied = segment_masks(make_cases([1, 1], [0, 0], ties=[True, False]), np.ones(5))
    free = segment_masks(make_cases([1, 1], [0, 0]), np.ones(5))

    assert tied["same-time step"].tolist() == [True, False]
    assert tied["other step"].tolist() == [False, True]
    assert not {"same-time step", "other step"} & set(free)


def make_steps(steps):
    """Cases whose histories end in the first item of each step, None being no history, and whose target is the second.

    Before the last item stands item 0, which no rule may look at.
    """
    histories = [[] if last is None else [0, last] for last, _ in steps]
    cases = make_cases([len(history) for history in histories], [target for _, target in steps])
    cases.items[:] = np.array([item for history in histories for item in history], dtype=np.int64)
    return cases


def where(masks):
    """The cases of each segment."""
    return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}


def test_the_last_step_goes_up_or_down_in_the_order_of_the_values_not_of_the_rows():
    values = ("B", "C", "A", "A")

    masks = item_order_masks("asin", make_steps([(0, 1), (1, 0), (1, 2), (2, 1), (0, 2)]), values)

    assert where(masks) == {"asin up": [0, 3], "asin down": [1, 2, 4]}


def test_equal_values_are_a_segment_of_their_own_where_a_step_joins_any():
    values = ("B", "A", "A")

    assert where(item_order_masks("x", make_steps([(1, 2), (1, 0), (1, 1)]), values)) == {
        "x up": [1],
        "x down": [],
        "x same": [0, 2],
    }


def test_a_missing_value_or_history_makes_no_claim():
    values = ("", "A", "B")

    masks = item_order_masks("x", make_steps([(0, 1), (1, 0), (0, 0), (None, 1), (1, 2)]), values)

    assert where(masks) == {"x up": [4], "x down": []}


@pytest.mark.parametrize(
    ("values", "up"),
    [
        (("9", "10"), True),  # as text, "10" stands before "9"
        (("9", "10", "x"), False),  # one value that is none makes all of them text
        (("9", "10", ""), True),  # a missing one does not
        (("-2", "-1.5"), True),
        (("9007199254740992", "9007199254740993"), True),  # one float, two numbers
        (("1_0", "9"), True),  # as text: no data file means ten
        (("nan", "9"), False),
        (("b", "É"), True),
    ],
)
def test_values_are_numbers_only_if_all_of_them_are(values, up):
    masks = item_order_masks("x", make_steps([(0, 1)]), values)

    assert [masks["x up"].item(), masks["x down"].item()] == [up, not up]


def test_two_spellings_of_a_number_are_the_same_value():
    assert where(item_order_masks("x", make_steps([(0, 1)]), ("1", "1.0")))["x same"] == [0]


def make_log(rows, **columns):
    """A log of (user, item) in time order, with further columns."""
    times = np.arange(len(rows), dtype=float)
    return from_log([user for user, _ in rows], np.array([item for _, item in rows]), timestamps=times, extra=columns)


ROWS = [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("b", 2), ("c", 3), ("c", 1), ("c", 0)]


def test_a_users_value_is_that_of_the_newest_interaction_before_the_target():
    log = make_log(ROWS, land=["NL", "NL", "DE", "FR", "NL", "NL", "", "DE", "", "DE"])
    split = leave_last_out(log, num_items=4)

    assert where(user_column_masks("land", split.test, log, "land")) == {
        "land: DE": [0],
        "land: NL": [1],
        "land: none": [2],
    }
    assert where(user_column_masks("land", split.validation, log, "land")) == {"land: NL": [0, 1], "land: DE": [2]}


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("kind", ["leave-last-out", "temporal"])
def test_what_stands_beside_the_target_and_later_is_never_used(kind, part):
    """Or a label that is known only with the purchase, such as a discount, would tell hits from misses."""
    rng = np.random.default_rng(0)
    rows = [(f"u{rng.integers(30)}", int(rng.integers(9))) for _ in range(400)]
    before = rng.choice(["NL", "DE", "FR", ""], size=400).tolist()
    log = make_log(rows, land=before)
    split = leave_last_out(log, num_items=9) if kind == "leave-last-out" else temporal(log, num_items=9)
    cases = getattr(split, part)
    after = log.extra["land"].copy()
    for index, user in enumerate(map(log.user_ids.index, cases.users)):
        target = log.offsets[user] + len(cases.history(index))
        assert log.items[target] == cases.targets[index]
        after[target : log.offsets[user + 1]] = "later"

    masks = user_column_masks("land", cases, replace(log, extra={"land": after}), "land")

    assert where(masks) == where(user_column_masks("land", cases, log, "land"))
    assert len(masks) >= 3
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()


def test_columns_follow_their_rows_through_k_core_and_duplicates():
    rows = [("a", 0), ("a", 0), ("a", 9), ("b", 1), ("a", 1), ("b", 0), ("a", 0), ("b", 1)]
    times = np.array([1.0, 1.0, 2.0, 1.0, 3.0, 2.0, 4.0, 3.0])
    log = from_log(
        [user for user, _ in rows],
        np.array([item for _, item in rows]),
        timestamps=times,
        extra={"land": ["first", "copy", "of 9", "b1", "a3", "b2", "a4", "b3"]},
    )

    core, _ = k_core(log, 2)

    assert core.extra["land"].tolist() == ["first", "a3", "a4", "b1", "b2", "b3"]
    assert where(user_column_masks("x", leave_last_out(core, num_items=2).test, core, "land")) == {
        "x: a3": [0],
        "x: b2": [1],
    }


def test_the_rarest_values_and_the_missing_ones_are_put_together():
    """Value `v00` has most users, `v11` one; of equally many the first in the order of text stays."""
    lands = [f"v{number:02d}" for number in range(12) for _ in range(12 - min(number, 10))] + ["", ""]
    rows = [(f"u{user:03d}", item) for user in range(len(lands)) for item in range(3)]
    log = make_log(rows, land=[land for land in lands for _ in range(3)])

    masks = user_column_masks("land", leave_last_out(log, num_items=3).test, log, "land")

    named = [f"land: v{number:02d}" for number in range(MOST_VALUES)]
    assert list(masks) == [*named, "land: other", "land: none"]
    assert [int(mask.sum()) for mask in masks.values()] == [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 4, 2]


def test_a_value_called_other_or_none_is_not_taken_for_those_without_a_name():
    lands = ["other", "none", '"other"', ""]
    rows = [(f"u{user}", item) for user in range(4) for item in range(3)]
    log = make_log(rows, land=[land for land in lands for _ in range(3)])

    masks = user_column_masks("land", leave_last_out(log, num_items=3).test, log, "land")

    assert where(masks) == {
        'land: "\\"other\\""': [2],
        'land: "none"': [1],
        'land: "other"': [0],
        "land: none": [3],
    }


def test_users_without_a_history_have_no_value():
    log = make_log([("a", 0), ("a", 1)], land=["NL", "NL"])
    cases = Cases(("a",), np.array([0, 0]), np.array([], dtype=np.int64), np.array([0]), np.array([False]))

    assert where(user_column_masks("land", cases, log, "land")) == {"land: none": [0]}


def test_a_segment_has_the_metrics_of_its_cases_and_an_empty_one_only_its_size():
    ranks = np.array([1.0, 0.0, 4.0])

    segments = segment_metrics(ranks, {"some": np.array([True, False, True]), "none": np.zeros(3, dtype=bool)})

    assert segments == {"some": {"users": 2, **metrics_from_ranks(ranks[[0, 2]])}, "none": {"users": 0}}
    assert tuple(segments["some"]) == ("users", *METRIC_KEYS)


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"segment `head` must mark each of 2 cases, was: shape \(3,\)"):
        segment_metrics(np.ones(2), {"head": np.ones(3, dtype=bool)})

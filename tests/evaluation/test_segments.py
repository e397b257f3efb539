"""Segments partition the cases as their names say."""

import numpy as np
import pytest

from llm_itemtok.data.splits import Cases
from llm_itemtok.evaluation.metrics import METRIC_KEYS, metrics_from_ranks
from llm_itemtok.evaluation.segments import segment_masks, segment_metrics


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


def test_a_segment_has_the_metrics_of_its_cases_and_an_empty_one_only_its_size():
    ranks = np.array([1.0, 0.0, 4.0])

    segments = segment_metrics(ranks, {"some": np.array([True, False, True]), "none": np.zeros(3, dtype=bool)})

    assert segments == {"some": {"users": 2, **metrics_from_ranks(ranks[[0, 2]])}, "none": {"users": 0}}
    assert tuple(segments["some"]) == ("users", *METRIC_KEYS)


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"segment `head` must mark each of 2 cases, was: shape \(3,\)"):
        segment_metrics(np.ones(2), {"head": np.ones(3, dtype=bool)})

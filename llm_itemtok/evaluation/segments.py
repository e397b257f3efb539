"""Segments: the same metrics for parts of the cases, to see for whom a model works.

Segments by the target (`head`: the 20 % of items with most training interactions; `tail`: all others; `cold`: items
with no training interaction, a part of the tail), by the length of the history, and, where the log has timestamps
with ties, by the last step (`same-time step`: the target carries the timestamp of the last history item, so that
their order may be an accident of the file). Segments overlap across these three groupings and are read on their own.

Two rules make further groupings under a name of the caller's: `item_order_masks` by the direction of the last step in
an order of the items, which is the same question where a log has no timestamps but ties were left in some known order;
`user_column_masks` by what the log says about the user. Names cannot collide as long as the callers' are distinct and
have no colon: the one kind is `NAME up`, the other `NAME: VALUE`, and none above ends or begins like that.

This module knows ranks and cases, not who made them. It imports no torch.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
from numpy.typing import NDArray

from llm_itemtok.data.interactions import Interactions
from llm_itemtok.data.splits import Cases, head_items
from llm_itemtok.evaluation.metrics import metrics_from_ranks

HISTORY_BANDS: tuple[tuple[int, int | None], ...] = ((0, 0), (1, 5), (6, 10), (11, 20), (21, None))
"""First and last history length of each band; None is no upper end. Length 0 is only listed where it occurs."""

MOST_VALUES = 10
"""Values of a user column that get a segment of their own, the most frequent ones."""


def segment_masks(cases: Cases, item_counts: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Say which cases belong to which segment.

    Args:
        cases: C cases.
        item_counts: int64 [N], training interactions of each item of the catalogue.

    Returns:
        bool [C] for `head`, `tail`, `cold`, `history 1-5`, `history 6-10`, `history 11-20`, `history 21+`, where
        there are cases without any history also `history 0`, and where there are ties in time also
        `same-time step` and `other step`.
    """
    head = head_items(item_counts)
    masks = {
        "head": head[cases.targets],
        "tail": ~head[cases.targets],
        "cold": item_counts[cases.targets] == 0,
    }
    lengths = np.diff(cases.offsets)
    for first, last in HISTORY_BANDS:
        inside = (lengths >= first) & (lengths <= (np.inf if last is None else last))
        if first > 0 or inside.any():
            masks[_band_name(first, last)] = inside
    if cases.ties.any():
        masks["same-time step"] = cases.ties
        masks["other step"] = ~cases.ties
    return masks


def item_order_masks(name: str, cases: Cases, values: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Say in which direction the last step of each case goes, from the last item of the history to the target.

    Values are compared as numbers, exactly, if all that are there are numbers, otherwise as text, character by
    character. A case without a history, or with a missing value at either end of the step, is in no segment.

    Args:
        name: what the segments are called after.
        cases: C cases.
        values: of each item of the catalogue; empty where missing.

    Returns:
        bool [C] for `NAME up` and `NAME down`, and where it occurs for `NAME same`.
    """
    places = _places(values)
    source = np.full(len(cases), -1)
    has_history = np.diff(cases.offsets) > 0
    source[has_history] = places[cases.items[cases.offsets[1:][has_history] - 1]]
    target = places[cases.targets]
    known = (source >= 0) & (target >= 0)
    masks = {f"{name} up": known & (target > source), f"{name} down": known & (target < source)}
    same = known & (target == source)
    return {**masks, f"{name} same": same} if same.any() else masks


def user_column_masks(name: str, cases: Cases, interactions: Interactions, column: str) -> dict[str, NDArray[np.bool_]]:
    """Group cases by what the log says about their user when the target is not known yet.

    A user's value is that of their newest interaction before the target; what stands beside the target and later is
    never looked at. The `MOST_VALUES` values with most cases are told apart (of equally many, the first in the order
    of text).

    Args:
        name: what the segments are called after.
        cases: C cases, whose histories are beginnings of their users' logs.
        interactions: the log that the cases are from.
        column: one of its `extra` columns.

    Returns:
        bool [C] for `NAME: VALUE`, most cases first, and where they occur for `NAME: other` (the values left over) and
        `NAME: none` (a missing value, or no history). Each case is in exactly one. A value that could be taken for
        one of the last two is written in double quotes.
    """
    index_of = {user: index for index, user in enumerate(interactions.user_ids)}
    starts = interactions.offsets[np.array([index_of[user] for user in cases.users], dtype=np.int64)]
    lengths = np.diff(cases.offsets)
    labels = np.full(len(cases), "", dtype=object)
    labels[lengths > 0] = interactions.extra[column][(starts + lengths - 1)[lengths > 0]]
    counts = Counter(labels.tolist())
    counts.pop("", None)
    most = sorted(counts, key=lambda value: (-counts[value], value))[:MOST_VALUES]
    masks = {f"{name}: {_unmistakable(value)}": labels == value for value in most}
    none = labels == ""
    other = ~np.logical_or.reduce([none, *masks.values()])
    rest = {f"{name}: other": other, f"{name}: none": none}
    return masks | {key: mask for key, mask in rest.items() if mask.any()}


def segment_metrics(
    ranks: NDArray[np.floating], masks: Mapping[str, NDArray[np.bool_]]
) -> dict[str, dict[str, float | int]]:
    """Measure each segment: the `segments` part of `metrics.json`.

    Args:
        ranks: float [C], as `metrics_from_ranks` takes them.
        masks: bool [C] under each segment's name.

    Returns:
        `{name: {"users": n, metric: value, …}}`; a segment without users has `"users": 0` and no metric.

    Raises:
        ValueError: if a mask has another length than `ranks`, or a value is no rank.
    """
    segments: dict[str, dict[str, float | int]] = {}
    for name, mask in masks.items():
        if mask.shape != ranks.shape:
            raise ValueError(f"segment `{name}` must mark each of {len(ranks)} cases, was: shape {mask.shape}")
        segments[name] = {"users": int(mask.sum())}
        if mask.any():
            segments[name] |= metrics_from_ranks(ranks[mask])
    return segments


def _places(values: Sequence[str]) -> NDArray[np.int64]:
    """Place of each value in the order of all of them, int64: equal values share one, a missing one has -1."""
    distinct = sorted({value for value in values if value})
    numbers = [_number(value) for value in distinct]
    keys = distinct if None in numbers else numbers
    place_of: dict[str, int] = {}
    place, before = -1, None
    for key, value in sorted(zip(keys, distinct, strict=True)):
        place += key != before
        place_of[value], before = place, key
    return np.array([place_of.get(value, -1) for value in values], dtype=np.int64)


def _number(text: str) -> Decimal | None:
    """The finite number that a text spells, without rounding: ids may have more digits than a float."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() and "_" not in text else None


def _unmistakable(value: str) -> str:
    """A value as it stands in a segment's name, never equal to what stands there for no value or several."""
    return json.dumps(value, ensure_ascii=False) if value in ("other", "none") or value.startswith('"') else value


def _band_name(first: int, last: int | None) -> str:
    """Name a band of history lengths, as in `history 6-10`."""
    if last is None:
        return f"history {first}+"
    return f"history {first}" if first == last else f"history {first}-{last}"

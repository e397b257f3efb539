"""Segments: the same metrics for parts of the cases, to see for whom a model works.

Segments by the target (`head`: the 20 % of items with most training interactions; `tail`: all others; `cold`: items
with no training interaction, a part of the tail), by the length of the history, and, where the log has timestamps
with ties, by the last step (`same-time step`: the target carries the timestamp of the last history item, so that
their order may be an accident of the file). Segments overlap across these three groupings and are read on their own.

This module knows ranks and cases, not who made them. It imports no torch.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llm_itemtok.data.splits import Cases
from llm_itemtok.evaluation.metrics import metrics_from_ranks

HEAD_SHARE = 0.2
"""Share of the catalogue's items, by training interactions, that make up the head."""

HISTORY_BANDS: tuple[tuple[int, int | None], ...] = ((0, 0), (1, 5), (6, 10), (11, 20), (21, None))
"""First and last history length of each band; None is no upper end. Length 0 is only listed where it occurs."""


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
    head = np.zeros(len(item_counts), dtype=bool)
    most_first = np.argsort(-item_counts, kind="stable")  # equal counts: catalogue order decides
    head[most_first[: int(np.ceil(HEAD_SHARE * len(item_counts)))]] = True
    head &= item_counts > 0
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


def _band_name(first: int, last: int | None) -> str:
    """Name a band of history lengths, as in `history 6-10`."""
    if last is None:
        return f"history {first}+"
    return f"history {first}" if first == last else f"history {first}-{last}"

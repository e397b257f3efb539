"""What is in the data, in numbers, for `itemtok check` and the report.

The numbers are those that decide whether results can be trusted: how long histories are, how much of
the order in time is arbitrary, how much text there is, and how many items or targets a model never
gets to train on.
"""

from collections import Counter

import numpy as np

from llm_itemtok.data.readers import RawData
from llm_itemtok.data.splits import Split

Found = dict[str, int | float | str]
"""Name of a count or share to its value."""


def describe(raw: RawData, split: Split) -> Found:
    """Count what matters.

    Args:
        raw: the data after k-core.
        split: a split of it.

    Returns:
        `split` (its kind); `users, items, interactions, history_{min,median,mean,max}` (interactions of a user);
        `dropped_users`, `dropped_interactions` (too short for the split); `time_ties` (share of
        neighbouring interactions of a user with the same timestamp, in [0, 1]; absent without
        timestamps); `missing_titles`, `missing_categories`, `items_sharing_a_title`; `cold_items` (never
        in training); `targets_never_in_training` (test cases); `repeated_pairs` (interactions with an item
        the user already had); `train_interactions`, `validation_cases`, `test_cases`; and what reading
        dropped (`filtered_rows, unknown_items, unknown_rows, duplicate_rows, k_core_dropped_*`).
    """
    log, catalog = raw.interactions, raw.catalog
    lengths = log.lengths
    trained = split.item_counts() > 0
    titles = Counter(title for title in catalog.titles if title)
    found: Found = {
        "split": split.kind,
        "users": log.num_users,
        "items": len(catalog),
        "interactions": len(log),
        "history_min": int(lengths.min()),
        "history_median": float(np.median(lengths)),
        "history_mean": round(float(lengths.mean()), 3),
        "history_max": int(lengths.max()),
        "dropped_users": split.counts["dropped_users"],
        "dropped_interactions": split.counts.get("dropped_interactions", 0),
        "missing_titles": catalog.titles.count(""),
        "missing_categories": catalog.categories.count(()),
        "items_sharing_a_title": sum(count for count in titles.values() if count > 1),
        "cold_items": int((~trained).sum()),
        "targets_never_in_training": int((~trained[split.test.targets]).sum()),
        "repeated_pairs": len(log) - len(np.unique(log.owners * len(catalog) + log.items)),
    }
    if log.timestamps is not None:
        neighbours = log.owners[1:] == log.owners[:-1]
        same = log.timestamps[1:] == log.timestamps[:-1]
        found["time_ties"] = round(float(same[neighbours].mean()), 4) if neighbours.any() else 0.0
    reading = ("filtered_rows", "unknown_items", "unknown_rows", "duplicate_rows")
    core = ("k_core", "k_core_dropped_users", "k_core_dropped_items", "k_core_dropped_interactions")
    return split.counts | found | {name: raw.notes[name] for name in (*reading, *core) if name in raw.notes}


def describe_text(found: Found) -> str:
    """What `describe` found as lines to read, without a line end at the end."""
    rows = [
        ("users", f"{found['users']:,}"),
        ("items", f"{found['items']:,}"),
        ("interactions", f"{found['interactions']:,}"),
        (
            "history lengths",
            f"min {found['history_min']:,}, median {found['history_median']:g}, "
            f"mean {found['history_mean']:.2f}, max {found['history_max']:,}",
        ),
        (
            f"split {found['split']}",
            f"{found['train_interactions']:,} interactions of {found['train_users']:,} users to train on, "
            f"{found['validation_cases']:,} validation and {found['test_cases']:,} test cases",
        ),
        *_split_rows(found),
        *_text_rows(found),
        ("cold items", f"{_share(found, 'cold_items', 'items')} never in training"),
        ("test targets", f"{_share(found, 'targets_never_in_training', 'test_cases')} never in training"),
        ("repeated", f"{_share(found, 'repeated_pairs', 'interactions')} with an item the user had before"),
        *_reading_rows(found),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _share(found: Found, part: str, whole: str) -> str:
    return f"{found[part]:,} of {found[whole]:,} ({int(found[part]) / max(int(found[whole]), 1):.1%})"


def _split_rows(found: Found) -> list[tuple[str, str]]:
    rows = []
    if found["dropped_users"]:
        why = f"{found['dropped_users']:,} users with {found['dropped_interactions']:,} interactions: too short"
        temporal = "validation_users_without_history" in found
        rows.append(("dropped", f"{found['dropped_users']:,} users: in no part of the split" if temporal else why))
    for part in ("validation", "test"):
        without = found.get(f"{part}_users_without_history", 0)
        if without:
            rows.append((f"no {part} case", f"{without:,} users whose first interaction is after the cut"))
    if "time_ties" in found:
        rows.append(("ties in time", f"{found['time_ties']:.1%} of neighbouring interactions have the same timestamp"))
    else:
        rows.append(("ties in time", "unknown: the log has positions only"))
    return rows


def _text_rows(found: Found) -> list[tuple[str, str]]:
    return [
        ("missing titles", _share(found, "missing_titles", "items")),
        ("missing categories", _share(found, "missing_categories", "items")),
        ("shared titles", f"{_share(found, 'items_sharing_a_title', 'items')} have the title of another item"),
    ]


def _reading_rows(found: Found) -> list[tuple[str, str]]:
    """What reading and k-core dropped, where they dropped anything."""
    rows = []
    if found.get("filtered_rows"):
        rows.append(("filtered", f"{found['filtered_rows']:,} rows of the log"))
    if found.get("unknown_rows"):
        rows.append(
            ("unknown items", f"{found['unknown_items']:,} items ({found['unknown_rows']:,} rows of the log) dropped")
        )
    if found.get("duplicate_rows"):
        rows.append(("duplicates", f"{found['duplicate_rows']:,} rows of the log dropped"))
    if "k_core" in found:
        users, items, log = (f"{found[f'k_core_dropped_{name}']:,}" for name in ("users", "items", "interactions"))
        rows.append((f"{found['k_core']}-core", f"dropped {users} users, {items} items, {log} interactions"))
    return rows

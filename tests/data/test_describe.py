"""What `itemtok check` says about data, counted by hand."""

import re

from llm_itemtok.data.describe import describe, describe_text
from llm_itemtok.data.readers import read
from llm_itemtok.data.splits import leave_last_out, temporal
from tests.data.folders import make_folder

ITEMS = [
    {"item_id": "a", "title": "Same", "categories": ["x"]},
    {"item_id": "b", "title": "Same"},
    {"item_id": "c", "title": None},
    {"item_id": "d", "title": "Other"},
]
LOG = "user_id,item_id,timestamp\nu,a,1\nu,b,1\nu,a,2\nu,d,2\nv,a,1\nv,b,2\nv,a,3\nw,c,5\nw,c,6\n"
LOG += "w,c,6\n"  # a duplicate


def test_described_by_hand(tmp_path):
    raw = read(make_folder(tmp_path, {"items.jsonl": ITEMS, "interactions.csv": LOG}))
    split = leave_last_out(raw.interactions, num_items=len(raw.catalog))
    found = describe(raw, split)
    expected = {
        "users": 3,
        "items": 4,
        "interactions": 9,
        "history_min": 2,
        "history_median": 3.0,
        "history_mean": 3.0,
        "history_max": 4,
        "dropped_users": 1,
        "dropped_interactions": 2,
        "time_ties": 0.3333,
        "missing_titles": 1,
        "missing_categories": 3,
        "items_sharing_a_title": 2,
        "cold_items": 2,
        "targets_never_in_training": 1,
        "repeated_pairs": 3,
        "duplicate_rows": 1,
        "train_users": 2,
        "train_interactions": 3,
        "validation_cases": 2,
        "test_cases": 2,
    }
    assert {name: found[name] for name in expected} == expected


def test_the_text_says_it_in_words(tmp_path):
    raw = read(make_folder(tmp_path, {"items.jsonl": ITEMS, "interactions.csv": LOG}))
    text = describe_text(describe(raw, leave_last_out(raw.interactions, num_items=4)))
    for line in (
        "missing titles  1 of 4 (25.0%)",
        "dropped  1 users with 2 interactions: too short",
        "ties in time  33.3% of neighbouring interactions have the same timestamp",
        "duplicates  1 rows of the log dropped",
        "cold items  2 of 4 (50.0%) never in training",
    ):
        assert line in [re.sub("  +", "  ", row) for row in text.split("\n")]


def test_a_log_without_timestamps_and_a_temporal_split_are_described(tmp_path):
    log = "user_id,item_id,position\n" + "".join(
        f"{user},{item},{at}\n" for user in "uv" for at, item in enumerate("abc")
    )
    raw = read(make_folder(tmp_path, {"items.jsonl": ITEMS, "interactions.csv": log}))
    split = leave_last_out(raw.interactions, num_items=4)
    assert "time_ties" not in describe(raw, split)
    assert "unknown: the log has positions only" in describe_text(describe(raw, split))
    log = "user_id,item_id,timestamp\nu,a,1\nu,b,5\nu,c,9\nv,a,2\nv,b,6\nw,d,8\nx,d,9\n"
    raw = read(make_folder(tmp_path, {"items.jsonl": ITEMS, "interactions.csv": log}))
    split = temporal(raw.interactions, num_items=4, validation_share=0.3, test_share=0.3)
    text = describe_text(describe(raw, split))
    assert "1 users: in no part of the split" in text or "users whose first interaction is after the cut" in text

"""The public data sets, where `ITEMTOK_DATA` names the folder that holds them: published counts, and seconds."""

import os
import time
from pathlib import Path

import pytest

from llm_itemtok.data.readers import read
from llm_itemtok.data.splits import check_leaks, leave_last_out, temporal

PUBLISHED = {  # users, items, interactions, training interactions, test targets never in training
    "amazon14-beauty": (22_363, 12_101, 198_502, 153_776, 138),
    "amazon18-instruments-lcrec": (24_772, 9_922, 206_153, 156_609, 35),
    "amazon18-scientific-small": (2_928, 1_585, 19_712, 13_856, 20),
    "movielens-latest-small": (671, 9_066, 100_004, 98_662, 35),
}
FOLDER = Path(os.environ.get("ITEMTOK_DATA", "no such folder"))
THERE = [name for name in PUBLISHED if (FOLDER / name).is_dir()]

if THERE:

    @pytest.mark.parametrize("name", THERE)
    def test_published_counts_are_reproduced_in_seconds(name):
        users, items, interactions, trained, cold_targets = PUBLISHED[name]
        start = time.process_time()
        raw = read(FOLDER / name)
        assert time.process_time() - start < 10
        split = leave_last_out(raw.interactions, num_items=len(raw.catalog))
        check_leaks(split, raw.interactions)
        assert (raw.interactions.num_users, len(raw.catalog), len(raw.interactions)) == (users, items, interactions)
        assert split.counts["train_interactions"] == trained
        assert (split.item_counts()[split.test.targets] == 0).sum() == cold_targets


if "movielens-latest-small" in THERE:

    def test_real_time_is_split_without_leaks():
        raw = read(FOLDER / "movielens-latest-small").core(5)
        split = temporal(raw.interactions, num_items=len(raw.catalog))
        check_leaks(split, raw.interactions)
        assert len(split.test) > 10

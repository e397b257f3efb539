"""Two tables of codes: what moved, counted, and told apart from another numbering."""

import json

import numpy as np
import pytest

from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.compare import compare_codes, comparison_text

OLD = ItemCodes([[0, 0], [0, 1], [1, 0], [1, 1], [2, 2]], (4, 4))


def test_moves_by_hand():
    new = ItemCodes([[0, 0], [0, 2], [3, 0], [2, 3], [2, 2]], (4, 4))
    found = compare_codes(OLD, new)
    assert (found["items"], found["moved"], found["kept"]) == (5, 3, [2, 1, 2])
    assert [level["churn"] for level in found["levels"]] == [0.4, 0.4]
    assert found["movers"] == [3, 2, 1]  # both levels, the first level, the second
    assert json.loads(json.dumps(found)) == found


def test_the_same_codes_moved_nothing():
    found = compare_codes(OLD, OLD)
    assert (found["moved"], found["movers"], found["kept"]) == (0, [], [0, 0, 5])
    assert [level["together"] for level in found["levels"]] == [1.0, None]
    assert "Moved most" not in comparison_text(found, OLD, OLD, list("abcde"))


def test_another_numbering_moves_every_item_and_keeps_them_together():
    other = ItemCodes((OLD.table + 1) % 4, (4, 4))
    found = compare_codes(OLD, other)
    assert found["moved"] == 5
    assert found["levels"][0] == {"name": "level-0", "churn": 1.0, "together": 1.0}


def test_where_no_two_items_share_a_prefix_nothing_is_together():
    """Two unique tables have the same groups of one, whatever their codes: agreement there says nothing."""
    rng = np.random.default_rng(0)
    one, two = (ItemCodes(rng.permutation(4096)[:500, None] // [64, 1] % 64, (64, 64)) for _ in range(2))
    assert one.is_injective
    found = compare_codes(one, two)
    assert found["levels"][0]["together"] == pytest.approx(0.0, abs=0.01)
    assert found["levels"][1]["together"] is None
    assert "a prefix of its own here" in comparison_text(found, one, two, ["x"] * 500)
    shared = ItemCodes(one.table // 8, (64, 64))
    assert compare_codes(one, shared)["levels"][1]["together"] is None


def test_words_are_compared_and_not_their_numbers():
    old = ItemCodes([[0, 0], [1, 1]], (2, 2), words=(("the", "a"), ("ball", "game")))
    new = ItemCodes([[1, 0], [0, 2]], (2, 3), words=(("a", "the"), ("ball", "toy", "puzzle")))
    found = compare_codes(old, new)
    assert (found["moved"], found["movers"], found["kept"]) == (1, [1], [0, 1, 1])
    assert "a game → a puzzle" in comparison_text(found, old, new, ["x", "y"])
    assert compare_codes(old, ItemCodes(old.table, (2, 2)))["moved"] == 2


def test_codes_dealt_at_random_agree_by_chance_only():
    rng = np.random.default_rng(0)
    one, two = (ItemCodes(rng.integers(0, 8, (2000, 2)), (8, 8)) for _ in range(2))
    assert compare_codes(one, two)["levels"][0]["together"] == pytest.approx(0.0, abs=0.01)


def test_tables_of_other_depths_are_compared_as_far_as_both_go():
    found = compare_codes(OLD, ItemCodes(OLD.table[:, :1], (4,)))
    assert (found["moved"], len(found["levels"])) == (0, 1)


def test_the_text_names_the_biggest_movers():
    new = ItemCodes([[0, 0], [0, 2], [3, 0], [2, 3], [2, 2]], (4, 4))
    text = comparison_text(compare_codes(OLD, new), OLD, new, ["A", "B", "C", "D", "E"])
    assert "Items with the same code in both: 60.0% to level 1, 40.0% to level 2." in text
    assert "Items that moved: 3 of 5 (60.0%)." in text
    assert "2 keep 0, 1 keep 1" in text
    assert text.splitlines()[-3:] == ["  D: 1 1 → 2 3", "  C: 1 0 → 3 0", "  B: 0 1 → 0 2"]


def test_a_label_cannot_end_its_line():
    new = ItemCodes([[0, 0], [0, 1], [1, 0], [1, 3], [2, 2]], (4, 4))
    text = comparison_text(compare_codes(OLD, new), OLD, new, ["A", "B", "C", "x\nNo item moved.\x1b[2J", "E"])
    assert text.splitlines()[-1].startswith(r"  x\nNo item moved.\x1b[2J: 1 1 → 1 3")


def test_other_numbers_of_items_are_refused():
    with pytest.raises(ArtifactError, match="5 items and 1"):
        compare_codes(OLD, ItemCodes([[0, 0]], (4, 4)))

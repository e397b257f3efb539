"""The item-token doctor: planted catalogues whose answer is known, and one test a rule."""

import json

import numpy as np
import pytest

from llm_itemtok.items import doctor
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collisions import extra_level
from llm_itemtok.items.doctor import examine, facts_text
from llm_itemtok.items.findings import WORST_FIRST, findings, gaps, verdict_text
from llm_itemtok.items.quality import quality, vector_pairs
from llm_itemtok.items.random_codes import RandomCodes
from llm_itemtok.items.residual_kmeans import ResidualKMeans

NUM = 512


def planted(num=NUM, seed=0):
    """Items of 8 categories, 8 kinds in each: vectors, codes that say so exactly, and category lists."""
    rng = np.random.default_rng(seed)
    kind = np.arange(num) % 64
    centres = 10 * rng.normal(size=(8, 16))[np.arange(64) % 8] + rng.normal(size=(64, 16))
    vectors = (centres[kind] + 0.05 * rng.normal(size=(num, 16))).astype(np.float32)
    table = np.stack([kind % 8, kind // 8, 4 * (np.arange(num) // 64) + kind % 4], axis=1)
    categories = [("Shop", f"category {number % 8}", f"kind {number}") for number in kind.tolist()]
    return ItemCodes(table, (8, 8, 32)), vectors, categories


def rules(codes, **given):
    facts = examine(codes, **given)
    return [finding.rule for finding in findings(quality(codes), facts)]


def test_a_perfect_hierarchy_is_healthy_and_pure():
    codes, vectors, categories = planted()
    near = {"vectors": vector_pairs(vectors)}
    facts = examine(codes, near=near, categories=categories)

    assert (facts["purity"]["place"], facts["purity"]["categories"]) == (1, 8)
    assert [row["share"] for row in facts["purity"]["levels"]] == [1.0, 1.0]
    assert facts["purity"]["levels"][0]["chance"] < 0.3
    assert facts["neighbours"]["vectors"][0]["share"] == 1.0
    assert findings(quality(codes), facts) == []


def test_only_codes_of_which_everything_was_judged_are_healthy():
    """A table of random codes has no fault of its own; that it means nothing is told by figures it does not have."""
    codes, vectors, categories = planted()
    table = RandomCodes(levels=3, codebook_size=8).deal(NUM // 8)
    alone = examine(table)
    assert findings(quality(table), alone) == []
    text = verdict_text([], gaps(quality(table), alone))
    assert "healthy" not in text
    assert "Not judged, for want of figures: whether prefixes follow item vectors; whether they follow training" in text
    near = {name: vector_pairs(vectors) for name in ("vectors", "training")}
    facts = examine(codes, near=near, categories=categories, item_counts=np.ones(NUM, int))
    assert gaps(quality(codes), facts) == ["how well codes rebuild item vectors"]
    facts["reconstruction_error"] = {"before": 0.1, "after": 0.1}
    assert gaps(quality(codes), facts) == []
    assert verdict_text([], []).startswith("Verdict: healthy")


def test_depths_at_which_no_items_share_a_prefix_were_not_judged():
    codes = ItemCodes([[0], [1], [2]], (4,))
    facts = examine(codes, near={"vectors": (np.array([0, 1]), np.array([1, 2]))}, categories=[("a",), ("a",), ("b",)])
    assert {"whether prefixes follow item vectors", "whether they follow categories"} <= set(gaps({}, facts))


def test_what_may_follow_from_idle_codewords_brings_no_advice_of_its_own():
    """3 of 256 codewords in use and nearly all items colliding: fewer codewords, and more, were both advised."""
    collapsed = extra_level(ItemCodes([[row % 3] for row in range(300)], (256,)))
    found = {finding.rule: finding for finding in findings(quality(collapsed), examine(collapsed))}
    assert {"collapsed", "collisions"} <= set(found)
    assert found["collisions"].change == 'first mend "collapsed", from which this may follow'
    assert not any("larger" in finding.change or "one more" in finding.change for finding in found.values())
    even = extra_level(ItemCodes([[row % 8] for row in range(300)], (8,)))
    found = {finding.rule: finding for finding in findings(quality(even), examine(even))}
    assert "larger" in found["collisions"].change


@pytest.mark.parametrize("seed", range(3))
def test_random_codes_preserve_neighbours_and_categories_as_chance_would(seed):
    """20 neighbours of 512 items share one of 8 codewords with a standard error of about 0.5 %."""
    _, vectors, categories = planted()
    codes = RandomCodes(levels=3, codebook_size=8, seed=seed).deal(NUM)
    facts = examine(codes, near={"vectors": vector_pairs(vectors)}, categories=categories)

    for row in facts["neighbours"]["vectors"]:
        assert row["share"] == pytest.approx(row["chance"], abs=0.02)
    row = facts["purity"]["levels"][0]
    assert row["share"] == pytest.approx(row["chance"], abs=0.03)
    assert {"prefixes mean little", "blind to categories"} <= set(rules(
        codes, near={"vectors": vector_pairs(vectors)}, categories=categories
    ))  # fmt: skip


def test_a_collapsed_tokenizer_is_named_first():
    _, vectors, _ = planted()
    table = np.stack([np.zeros(NUM, int), np.arange(NUM) % 32, np.arange(NUM) // 32], axis=1)
    codes = ItemCodes(table, (32, 32, 32))
    facts = examine(codes, near={"vectors": vector_pairs(vectors)})
    found = findings(quality(codes), facts)

    assert found[0].rule == "collapsed"
    assert "level-0 is used as if it had 1 of its 32 codewords (3%, should be 50%)" in found[0].what
    assert "1. collapsed: " in verdict_text(found, [])
    assert "change: `tokenizer.kind: residual-kmeans`" in verdict_text(found, [])


def test_chance_takes_popular_neighbours_into_account():
    """Everybody's neighbour is item 0: that many share its prefix says nothing, and chance says the same."""
    codes = ItemCodes([[0, 0], [0, 1], [0, 2], [1, 0]], (2, 3))
    items, neighbours = np.array([1, 2, 3]), np.array([0, 0, 0])
    (row,) = doctor.shared_prefixes(codes, items, neighbours)
    assert (row["depth"], row["share"], row["chance"]) == (1, pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_chance_pairs_no_item_with_itself():
    """Among two items with a code each, random pairs of distinct items share nothing."""
    codes = ItemCodes([[0, 0], [0, 1], [1, 0]], (2, 2))
    (row,) = doctor.shared_prefixes(codes, np.array([0, 1, 2]), np.array([1, 2, 0]))
    assert row["chance"] == pytest.approx(2 / 6)


def test_depths_end_where_no_two_items_share_a_prefix_or_a_level_only_counts():
    assert doctor.judged_depths(ItemCodes([[0, 0], [0, 1]], (2, 2))) == range(1, 2)
    assert doctor.judged_depths(ItemCodes([[0], [1]], (2,))) == range(1, 1)
    assert doctor.judged_depths(extra_level(ItemCodes([[0, 0], [0, 0]], (2, 2)))) == range(1, 3)


def test_purity_by_hand():
    """Under codeword 0 stand a, a, b, under 1 stands b: three of four; without the item that has no category."""
    codes = ItemCodes([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]], (2, 3))
    purity = doctor.category_purity(codes, [("a",), ("a",), ("b",), ("b",), ()])
    assert (purity["items"], purity["levels"][0]["share"]) == (4, 0.75)


def test_head_and_tail_by_hand():
    """The two most popular of ten items share a codeword, and all interactions but one go there."""
    codes = ItemCodes([[0, 0], [0, 1], *([1 + row // 2, row % 2] for row in range(8))], (5, 2))
    found = doctor.head_and_tail(codes, np.array([50, 49, 1, *[0] * 7]))
    level = found["levels"][0]
    assert (found["head"], found["tail"]) == (2, 8)
    assert (level["head"], level["tail"], level["fullest"]) == (1.0, pytest.approx(4.0), 0.99)


def test_popular_items_that_crowd_are_named():
    """The head is all under codeword 0, the others are even."""
    rows = np.arange(400)
    table = np.stack([np.where(rows < 80, 0, 1 + rows % 31), rows // 31, rows % 64], axis=1)
    codes = ItemCodes(table, (32, 13, 64))
    counts = np.where(rows < 80, 100, 1)
    assert rules(codes, item_counts=counts) == ["crowded head"]


def test_what_is_near_in_training_is_judged_by_itself():
    codes, vectors, _ = planted()
    rng = np.random.default_rng(0)
    anybody = rng.integers(0, NUM, (2, 4000))
    anybody = anybody[:, anybody[0] != anybody[1]]
    assert rules(codes, near={"vectors": vector_pairs(vectors), "training": tuple(anybody)}) == ["blind to behaviour"]


@pytest.mark.parametrize(
    ("codes", "rule"),
    [
        (ItemCodes([[row // 2 % 8, row // 16] for row in range(64)], (8, 8)), "not unique"),
        (ItemCodes([[row % 8, row // 8] for row in range(64)], (16, 8)), "dead codewords"),
        (ItemCodes([[row % 8, row // 8] for row in range(64)], (8, 8)), "little room"),
        (ItemCodes([[row % 8, row // 8 % 2, row // 16] for row in range(512)], (8, 32, 32)), "full prefix"),
        (extra_level(ItemCodes([[row % 8, row // 8, 0] for row in range(64)], (8, 8, 64))), "idle level"),
        (extra_level(ItemCodes([[row % 8, row // 8 % 8] for row in range(100)], (8, 8))), "collisions"),
        (
            ItemCodes([[row % 16, 0 if row % 256 < 224 else row % 16, row // 16] for row in range(512)], (16, 16, 64)),
            "crowded",
        ),
    ],
)  # fmt: skip
def test_a_table_alone_shows(codes, rule):
    assert rule in rules(codes)


@pytest.mark.parametrize(
    ("error", "rule"),
    [({"before": 0.8, "after": 0.8}, "coarse"), ({"before": 0.2, "after": 0.23}, "costly moves")],
)
def test_errors_of_rebuilt_vectors_are_judged(error, rule):
    codes, _, _ = planted()
    facts = examine(codes) | {"reconstruction_error": error}
    assert [finding.rule for finding in findings(quality(codes), facts)] == [rule]
    assert f"error of rebuilt vectors: {error['after']:.1%}" in facts_text(facts)


def test_residual_k_means_on_grouped_vectors_passes():
    _, vectors, categories = planted()
    codes = extra_level(ResidualKMeans(levels=2, codebook_size=8).fit(vectors))
    found = rules(codes, near={"vectors": vector_pairs(vectors)}, categories=categories)
    assert {"collapsed", "prefixes mean little", "blind to categories"}.isdisjoint(found)


def test_every_rule_has_its_place_and_findings_come_in_that_order():
    codes = ItemCodes(np.zeros((64, 2), int), (8, 8))
    found = rules(codes)
    assert found[:2] == ["not unique", "collapsed"]
    assert found == sorted(found, key=WORST_FIRST.index)
    assert len(set(WORST_FIRST)) == len(WORST_FIRST)


def test_facts_are_plain_json_and_print():
    codes, vectors, categories = planted()
    facts = examine(
        codes, near={"vectors": vector_pairs(vectors)}, item_counts=np.arange(NUM), categories=categories
    )  # fmt: skip
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    lines = facts_text(facts).splitlines()
    assert lines[0].split()[-4:] == ["length", "1", "length", "2"]
    assert lines[1].startswith("nearest by item vectors")
    assert "of the most frequent of 8 categories" in lines[2]
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


def test_what_is_not_known_is_left_out():
    codes, _, _ = planted()
    nothing = np.empty(0, dtype=np.int64)
    facts = examine(codes, near={"training": (nothing, nothing)}, item_counts=np.zeros(NUM, int), categories=[()] * NUM)
    assert set(facts) == {"sha256", "room"}
    assert facts_text(facts).startswith("room: 4.0 codes an item")


def test_one_item_can_be_examined():
    facts = examine(ItemCodes([[0]], (4,)), item_counts=np.array([3]), categories=[("a",)])
    assert facts["purity"]["levels"] == []
    assert facts["room"]["times"] == 4.0

"""The code tree is drawn to scale, loses no item, stays small, and has the same colours for the same catalogue."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.report.plots import SERIES_COLOURS
from llm_itemtok.report.tree import (
    LEAST_SHARE,
    category_groups,
    fullest_codewords,
    spelled,
    tree_chart,
    tree_levels,
)
from llm_itemtok.vocab.item_vocab import spellings

KINDS = ("Dolls", "Puzzles", "Kites", "")


def made_up(num_items, sizes, seed=0):
    """Codes as uneven as real ones, and categories that follow the first level in part."""
    rng = np.random.default_rng(seed)
    table = np.stack([np.minimum(rng.geometric(min(1.0, 4 / size), num_items), size) - 1 for size in sizes], axis=1)
    kinds = [KINDS[number % 4] if rng.random() < 0.8 else KINDS[rng.integers(4)] for number in table[:, 0]]
    return ItemCodes(table, sizes), [("Toys", kind) if kind else ("Toys",) for kind in kinds]


@given(st.integers(1, 3000), st.lists(st.integers(1, 64), min_size=1, max_size=4), st.integers(0, 9))
def test_every_level_holds_every_item_once_and_stands_under_the_level_above(num_items, sizes, seed):
    """However thin neighbours are joined, widths add up to the catalogue and no block crosses its parent's edge."""
    codes, categories = made_up(num_items, sizes, seed)

    levels = tree_levels(codes, category_groups(categories))

    assert len(levels) == len(sizes)
    above = None
    for depth, blocks in enumerate(levels, start=1):
        assert [block.start for block in blocks] == np.cumsum([0, *(block.items for block in blocks[:-1])]).tolist()
        assert sum(block.items for block in blocks) == num_items
        assert sum(block.codewords for block in blocks) == len(codes.prefix_counts(depth)[1])
        for block in blocks:
            parent = above[block.above] if above else None
            assert block.above == 0 or parent
            if parent:
                assert parent.start <= block.start
                assert block.start + block.items <= parent.start + parent.items
        above = blocks


@given(st.integers(1, 3000), st.integers(0, 9))
def test_only_neighbours_too_thin_alone_are_joined(num_items, seed):
    codes, categories = made_up(num_items, (40, 40), seed)
    counts = codes.prefix_counts(2)[1]

    blocks = tree_levels(codes, category_groups(categories))[1]

    alone = sorted(block.items for block in blocks if block.codewords == 1)
    wide = sorted(counts[counts >= LEAST_SHARE * num_items].tolist())
    assert [items for items in alone if items >= LEAST_SHARE * num_items] == wide


def test_a_block_knows_its_most_frequent_category_and_an_item_of_it():
    codes = ItemCodes(np.array([[0, 0], [0, 1], [0, 2], [1, 0]]), (4, 4))
    groups = category_groups([("Dolls",), ("Kites",), ("Kites",), ()])

    first, second = tree_levels(codes, groups)[0]

    assert groups.names == ("Kites", "Dolls")
    assert (first.items, groups.name(first.group), first.share, first.example) == (3, "Kites", pytest.approx(2 / 3), 1)
    assert (second.items, groups.name(second.group), second.share, second.example) == (1, "no category", 1.0, 3)


def test_siblings_stand_by_category_then_by_size():
    table = np.repeat([0, 1, 2, 3], [1, 2, 3, 4])[:, None]
    categories = [("Kites",)] + [("Dolls",)] * 2 + [("Kites",)] * 3 + [("Dolls",)] * 4

    blocks = tree_levels(ItemCodes(table, (4,)), category_groups(categories))[0]

    assert [block.items for block in blocks] == [4, 2, 3, 1]


def test_colours_are_given_by_frequency_and_do_not_depend_on_the_order_of_items():
    kinds = [f"kind {number}" for number in range(12) for _ in range(number + 1)]
    categories = [("All", kind) for kind in kinds] + [("All",)] * 3

    groups, turned = category_groups(categories), category_groups(categories[::-1])

    assert groups.names == turned.names == tuple(f"kind {number}" for number in range(11, 3, -1))
    assert groups.of_items.tolist() == turned.of_items.tolist()[::-1]
    assert groups.of_items.max() == SERIES_COLOURS + 1
    assert groups.style(0) == "s0"
    assert [groups.style(SERIES_COLOURS), groups.style(SERIES_COLOURS + 1)] == ["other", "none"]


@pytest.mark.parametrize(
    ("categories", "position"),
    [
        ([("Beauty", "Hair"), ("Beauty", "Skin"), ("Beauty", "Hair")], 1),
        ([("Comedy", "Drama"), ("Drama",), ("Horror",)], 0),
        ([("Beauty",)] * 19 + [("Beauty", "Hair")], 0),  # a second entry that hardly any item has
        ([("Beauty", "Hair")] * 19 + [("Clothes", "Hats")], 0),  # nothing tells items apart
        ([("Beauty", "Hair")] * 10 + [("Beauty", "Skin")] * 9 + [("Clothes", "Hats")], 1),  # one item is not enough
        ([()], 0),
    ],
)
def test_items_are_coloured_by_the_first_entry_that_tells_them_apart(categories, position):
    assert category_groups(categories).position == position


def test_a_catalogue_without_categories_is_drawn_without_colours():
    codes, _ = made_up(200, (8, 8))
    groups = category_groups([()] * 200)

    chart = tree_chart("The code tree", codes, groups, ["x"] * 200)

    assert chart.legend == ()
    assert set(re.findall(r'class="(\w+) p\d', chart.svg)) == {"none"}
    assert "category" not in chart.svg
    assert fullest_codewords(codes, groups, ["x"] * 200)[0]["category"] == ""


def test_blocks_are_drawn_to_scale_and_fill_the_picture():
    codes, categories = made_up(500, (16, 16))

    svg = tree_chart("The code tree", codes, category_groups(categories), ["x"] * 500).svg

    for level in range(2):
        rects = re.findall(rf'<rect x="([\d.]+)" y="{level}" width="([\d.]+)"', svg)
        places = [(float(x), float(width)) for x, width in rects]
        assert sum(width for _, width in places) == pytest.approx(1000, abs=0.01 * len(places))
        ends = np.cumsum([width for _, width in places])
        np.testing.assert_allclose([x for x, _ in places[1:]], ends[:-1], atol=0.01 * len(places))


def test_the_picture_of_a_large_catalogue_stays_small():
    """The page has a megabyte, whatever the catalogue; here 12,101 items on 3 levels of 256, with long titles."""
    codes, categories = made_up(12_101, (256, 256, 256))

    chart = tree_chart("The code tree", codes, category_groups(categories), ["An item with a long title " * 9] * 12_101)

    assert len(chart.svg.encode()) < 700_000


def test_words_of_a_block_are_escaped_and_name_its_codeword():
    codes = ItemCodes(np.array([[3, 1], [3, 2]]), (4, 4))
    groups = category_groups([("<b>",), ("<b>",)])

    svg = tree_chart("The code tree", codes, groups, ["<script>", "y"]).svg

    assert "<title>&lt;a_3&gt;: 2 items, &lt;b&gt; 100%, such as &lt;script&gt;</title>" in svg
    assert "<title>&lt;a_3&gt;&lt;b_2&gt;: 1 item, &lt;b&gt; 100%, such as y</title>" in svg
    assert "<script>" not in svg


def test_joined_neighbours_say_how_many_they_are_and_under_what():
    table = np.stack([np.zeros(3000), np.arange(3000) // 2], axis=1).astype(int)

    svg = tree_chart("The code tree", ItemCodes(table, (4, 2000)), category_groups([()] * 3000), ["x"] * 3000).svg

    assert "<title>2 codewords after &lt;a_0&gt;: 4 items, such as x</title>" in svg


def test_tokens_are_spelled_as_the_vocabulary_spells_them():
    tokens = spellings((4, 3))

    assert spelled([3, 1]) == tokens[3] + tokens[4 + 1]


def test_the_fullest_codewords_come_first_with_their_share():
    codes, categories = made_up(300, (32, 8))
    rows = fullest_codewords(codes, category_groups(categories), [f"Toy {row}" for row in range(300)])

    counts = np.bincount(codes.table[:, 0])
    assert len(rows) == 12
    assert [row["items"] for row in rows] == np.sort(counts)[::-1][:12].tolist()
    assert rows[0]["token"] == f"<a_{counts.argmax()}>"
    assert rows[0]["share"] == counts.max() / 300

"""Blocks hold a whole prefix tree: every path can be walked inside of one block, and every item ends once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_itemtok.decoding.blocks import Blocks, cut, join


@st.composite
def code_tables(draw: st.DrawFn) -> np.ndarray:
    """Distinct codes, in no order: 2 to 5 levels of 1 to 4 codewords, one item to all there can be."""
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    space = int(np.prod(sizes))
    flat = draw(st.lists(st.integers(0, space - 1), min_size=1, max_size=min(space, 60), unique=True))
    return np.stack(np.unravel_index(flat, sizes), axis=1)


def paths(blocks: Blocks) -> list[tuple[int, tuple[int, ...]]]:
    """Each leaf's item and the codewords on the way to it, by the parents in its block."""
    found = []
    for block in range(len(blocks)):
        for leaf in range(blocks.leaf_starts[block], blocks.leaf_starts[block + 1]):
            slot, path = int(blocks.leaf_slots[leaf]), [int(blocks.leaf_codes[leaf])]
            for depth in range(int(blocks.depths[block, slot]), 0, -1):
                assert blocks.depths[block, slot] == depth
                path.append(int(blocks.codes[block, slot]))
                slot = int(blocks.parents[block, slot])
            found.append((int(blocks.leaf_items[leaf]), tuple(reversed(path))))
    return found


def expected(table: np.ndarray) -> list[tuple[int, tuple[int, ...]]]:
    return [(item, tuple(code)) for item, code in enumerate(table.tolist())]


@settings(max_examples=100, deadline=None)
@given(table=code_tables(), spare=st.integers(0, 12))
def test_every_item_is_at_the_end_of_its_own_path_and_of_no_other(table, spare):
    width = table.shape[1] - 1 + spare
    blocks = cut(table, width)
    assert blocks.codes.shape == blocks.depths.shape == blocks.parents.shape == (len(blocks), width)
    assert sorted(paths(blocks)) == expected(table)
    assert (np.diff(blocks.leaf_starts) >= 0).all()


@settings(max_examples=50, deadline=None)
@given(table=code_tables(), spare=st.integers(0, 12))
def test_no_more_than_ancestors_is_repeated_and_none_is_left_out(table, spare):
    prefixes = {tuple(code[:depth]) for code in table.tolist() for depth in range(1, len(code))}
    blocks = cut(table, table.shape[1] - 1 + spare)
    filled = (blocks.depths > 0).sum(axis=1)
    assert (filled[:-1] == blocks.depths.shape[1]).all()
    repeated = int(filled.sum()) - len(prefixes)
    assert 0 <= repeated <= (len(blocks) - 1) * (table.shape[1] - 2)


@settings(max_examples=50, deadline=None)
@given(tables=st.lists(code_tables(), min_size=1, max_size=4), data=st.data())
def test_joined_trees_keep_their_paths_and_blocks_can_be_taken_in_any_order(tables, data):
    trees = [cut(table, 6) for table in tables]
    joined = join(trees)
    assert paths(joined) == [leaf for tree in trees for leaf in paths(tree)]
    numbers = data.draw(st.lists(st.integers(0, len(joined) - 1), max_size=8))
    taken = joined.take(np.array(numbers, dtype=np.int64))
    one_by_one = [leaf for number in numbers for leaf in paths(joined.take(np.array([number])))]
    assert paths(taken) == one_by_one
    assert len(taken) == len(numbers)


def test_one_block_of_a_small_tree_is_as_wide_as_the_tree():
    table = np.array([[1, 0, 2], [0, 0, 0], [1, 0, 1]])
    blocks = join([cut(table, 50)])
    assert blocks.depths.tolist() == [[1, 2, 1, 2]]
    assert blocks.codes.tolist() == [[0, 0, 1, 0]]
    assert blocks.parents.tolist() == [[0, 0, 2, 2]]
    assert blocks.leaf_items.tolist() == [1, 2, 0]
    assert blocks.leaf_slots.tolist() == [1, 3, 3]


@pytest.mark.parametrize("items", [1, 200])
def test_a_chain_without_branches_is_repeated_in_every_block(items):
    """The longest common beginnings there can be: all items differ in the last codeword but one."""
    table = np.zeros((items, 5), dtype=np.int64)
    table[:, 3] = np.arange(items)
    blocks = cut(table, 4)
    assert len(blocks) == items
    assert sorted(paths(blocks)) == expected(table)

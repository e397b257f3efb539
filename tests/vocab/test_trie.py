"""The trie accepts every item's code and nothing else."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_itemtok.errors import CollisionError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import tiny_codes


@st.composite
def code_tables(draw: st.DrawFn) -> ItemCodes:
    """Distinct codes: 1 to 5 levels of 1 to 4 codewords, one item to all there can be."""
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    space = int(np.prod(sizes))
    flat = draw(st.lists(st.integers(0, space - 1), min_size=1, max_size=min(space, 40), unique=True))
    return ItemCodes(np.stack(np.unravel_index(flat, sizes), axis=1), sizes)


def walk(trie: ItemTrie) -> dict[tuple[int, ...], int]:
    """Every path that `children` leads to, and the item at its end."""
    nodes: dict[tuple[int, ...], int] = {(): 0}
    for level in range(trie.num_levels):
        deeper = {}
        for prefix, node in nodes.items():
            children, codes, legal = trie.children(torch.tensor(node), level)
            assert len(children) == len(codes) == len(legal) == trie.max_children[level]
            assert codes.min() >= 0
            assert codes.max() < trie.sizes[level]
            for child, code in zip(children[legal].tolist(), codes[legal].tolist(), strict=True):
                assert (*prefix, code) not in deeper
                deeper[*prefix, code] = child
        nodes = deeper
    return {path: int(trie.leaf_items[node]) for path, node in nodes.items()}


def items_of(codes: ItemCodes) -> dict[tuple[int, ...], int]:
    return {tuple(code): row for row, code in enumerate(codes.table.tolist())}


@pytest.mark.parametrize("num_items", [1, 7, 24])
def test_all_items_are_accepted_and_nothing_else(num_items):
    codes = tiny_codes(num_items, (3, 2, 4))
    trie, items = ItemTrie(codes), items_of(codes)
    prefixes = {path[:depth] for path in items for depth in range(4)}
    for depth in range(4):
        for path in itertools.product(*(range(size) for size in (3, 2, 4)[:depth])):
            assert trie.accepts(path) == (path in prefixes), path
    assert walk(trie) == items


@settings(max_examples=80, deadline=None)
@given(codes=code_tables())
def test_random_tables_are_walked_as_they_are_written(codes):
    trie, items = ItemTrie(codes), items_of(codes)
    assert walk(trie) == items
    for path in itertools.product(*(range(size) for size in codes.sizes)):
        assert trie.accepts(path) == (path in items)


@pytest.mark.parametrize(
    ("table", "sizes"),
    [
        ([[4]], (9,)),
        ([[0], [2], [1]], (3,)),
        ([[1, 0, 1, 0, 1]], (2, 2, 2, 2, 2)),
        ([[2, 0], [2, 3], [2, 1]], (3, 4)),
        ([[0, 2], [1, 2], [2, 2]], (3, 4)),
    ],
    ids=["one item", "one level", "five levels", "all agree on the first level", "all agree on the last level"],
)
def test_odd_shapes_are_walked_too(table, sizes):
    codes = ItemCodes(np.array(table), sizes)
    trie = ItemTrie(codes)
    assert walk(trie) == items_of(codes)
    assert (trie.num_items, trie.num_levels) == (len(table), len(sizes))


def test_leaves_are_in_the_order_of_the_sorted_codes():
    codes = tiny_codes()
    leaves = ItemTrie(codes).leaf_items.tolist()
    assert codes.table[leaves].tolist() == sorted(codes.table.tolist())


def test_shared_codes_are_refused():
    codes = ItemCodes(np.array([[0, 1], [0, 1], [1, 1], [1, 0]]), (2, 2))
    with pytest.raises(CollisionError, match=r"one code per item, but 50.0% of the items share theirs; resolve"):
        ItemTrie(codes)


def test_children_of_many_nodes_come_at_once():
    trie = ItemTrie(tiny_codes())
    nodes = torch.arange(6).reshape(2, 3)
    children, codes, legal = trie.children(nodes, 1)
    assert children.shape == codes.shape == legal.shape == (2, 3, trie.max_children[1])
    one = trie.children(torch.tensor(4), 1)
    assert [part[1, 1].tolist() for part in (children, codes, legal)] == [part.tolist() for part in one]


@settings(max_examples=50, deadline=None)
@given(codes=code_tables())
def test_the_leaves_under_a_node_are_the_items_with_its_prefix(codes):
    trie = ItemTrie(codes)
    assert trie.item_leaves[trie.leaf_items].tolist() == list(range(codes.num_items))
    for level in range(codes.num_levels):
        prefixes = sorted({tuple(code[: level + 1]) for code in codes.table.tolist()})
        edges = trie.first_leaves[level].tolist()
        for node, prefix in enumerate(prefixes):
            items = trie.leaf_items[edges[node] : edges[node + 1]].tolist()
            assert {tuple(codes.table[item, : level + 1].tolist()) for item in items} == {prefix}
        assert (edges[0], edges[-1], len(edges)) == (0, codes.num_items, len(prefixes) + 1)

"""The trie accepts every item's code and nothing else."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from llm_itemtok.errors import CollisionError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.vocab.trie import ItemTrie
from tests.code_tables import code_tables
from tests.tiny import tiny_codes


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
    return {path: int(trie.items(torch.tensor(node))) for path, node in nodes.items()}


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


def test_what_comes_out_can_be_used_as_an_index():
    trie = ItemTrie(tiny_codes())
    nodes = torch.arange(6)
    children, codes, legal = trie.children(nodes, 1)
    spans = trie.leaf_span(nodes, 1)
    rows = [children, codes, *spans, trie.items(nodes), trie.leaves(nodes)]
    assert {each.dtype for each in rows} == {torch.int64}
    assert legal.dtype == torch.bool


@settings(max_examples=50, deadline=None)
@given(codes=code_tables())
def test_the_leaves_under_a_node_are_the_items_with_its_prefix(codes):
    trie = ItemTrie(codes)
    assert trie.leaves(trie.items(torch.arange(codes.num_items))).tolist() == list(range(codes.num_items))
    for depth in range(codes.num_levels + 1):
        prefixes = sorted({tuple(code[:depth]) for code in codes.table.tolist()})
        assert trie.num_nodes(depth) == len(prefixes)
        first, after = trie.leaf_span(torch.arange(len(prefixes)), depth)
        assert first.tolist() == [0, *after.tolist()[:-1]]
        assert after[-1] == codes.num_items
        for prefix, start, stop in zip(prefixes, first.tolist(), after.tolist(), strict=True):
            items = trie.items(torch.arange(start, stop)).numpy()
            assert {tuple(code) for code in codes.table[items, :depth].tolist()} == {prefix}


@pytest.mark.parametrize("size", [256, 257, 2**15, 2**15 + 1, 2**31 - 1])
def test_codewords_at_the_edge_of_a_narrow_type_come_out_whole(size):
    """Arrays are as narrow as their numbers allow; one too narrow would wrap round."""
    codes = ItemCodes(np.array([[size - 1, 0], [0, size - 1], [size - 1, size - 1]]), (size, size))
    assert walk(ItemTrie(codes)) == items_of(codes)
    assert ItemTrie(codes).accepts((size - 1, size - 1))
    assert not ItemTrie(codes).accepts((1,))


def test_codes_that_no_64_bits_hold_are_walked_too():
    """Then items are sorted in another way."""
    rng = np.random.default_rng(0)
    codes = ItemCodes(np.unique(rng.integers(2**31 - 4, 2**31 - 1, size=(60, 5)), axis=0), (2**31 - 1,) * 5)
    shuffled = ItemCodes(codes.table[rng.permutation(len(codes))], codes.sizes)
    assert walk(ItemTrie(shuffled)) == items_of(shuffled)


def test_a_large_catalogue_takes_10_bytes_an_item():
    """4 for the item's row, 1 for its codeword, the rest for its parents; the leaf of each item only when asked for."""
    codes = tiny_codes(200_000, (256, 256, 256), seed=3)
    trie = ItemTrie(codes)
    held = sum(array.nbytes for array in trie.arrays())
    assert held <= 10 * codes.num_items
    trie.leaves(torch.tensor([0]))
    assert sum(array.nbytes for array in trie.arrays()) == held + 4 * codes.num_items


@pytest.mark.scale
def test_ten_million_items_take_less_than_200_megabytes():
    flat = np.arange(10_000_000) * 2_654_435_761 % 2**32  # an odd factor: no number comes twice
    codes = ItemCodes(np.stack(np.unravel_index(flat, (256,) * 4), axis=1), (256,) * 4)
    trie = ItemTrie(codes)
    trie.leaves(torch.tensor([0]))
    assert sum(array.nbytes for array in trie.arrays()) <= 200e6
    rows = np.random.default_rng(0).integers(0, codes.num_items, size=1000)
    assert all(trie.accepts(tuple(code)) for code in codes.table[rows].tolist())

"""Item codes are an immutable, checked table that survives a round trip and compares by content."""

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.items.codes import FILE_NAME, ItemCodes

TABLE = np.array([[0, 1], [2, 0], [0, 1], [0, 0]])


def make(**changes):
    given = {"table": TABLE, "sizes": (3, 2), "names": None, "provenance": {"tokenizer": {"kind": "by hand"}}}
    given |= changes
    return ItemCodes(given["table"], given["sizes"], names=given["names"], provenance=given["provenance"])


def test_shape_sizes_and_default_names_are_read_off_the_table():
    codes = make()
    assert (codes.num_items, codes.num_levels, len(codes)) == (4, 2, 4)
    assert codes.table.dtype == np.int32
    assert codes.sizes == (3, 2)
    assert codes.capacity == 6
    assert codes.names == ("level-0", "level-1")


def test_collision_rate_counts_every_item_that_shares_its_code():
    assert make().collision_rate == 0.5  # items 0 and 2 of four
    assert not make().is_injective
    assert make(table=[[0, 0], [0, 1], [1, 0]]).is_injective


def test_prefix_groups_by_hand():
    codes = make()
    assert codes.prefix_groups(0).tolist() == [0, 0, 0, 0]
    assert codes.prefix_groups(1).tolist() == [0, 1, 0, 0]
    assert codes.prefix_groups(2).tolist() == [1, 2, 1, 0]
    prefixes, counts = codes.prefix_counts(2)
    assert prefixes.tolist() == [[0, 0], [0, 1], [2, 0]]
    assert counts.tolist() == [1, 2, 1]


def test_prefix_groups_of_huge_levels_do_not_overflow():
    size = 2**31 - 1
    codes = ItemCodes([[size - 1] * 5, [size - 1] * 4 + [0], [size - 1] * 5], (size,) * 5)
    assert codes.prefix_groups(5).tolist() == [1, 0, 1]
    assert codes.capacity == size**5


@st.composite
def tables(draw):
    """Codes with many collisions, at levels of a few codewords or nearly 2**31: some need more than 64 bits."""
    sizes = draw(st.lists(st.sampled_from([1, 3, 200, 2**31 - 1]), min_size=1, max_size=5))
    columns = [st.sampled_from(sorted({0, size // 2, size - 1})) for size in sizes]
    return ItemCodes(draw(st.lists(st.tuples(*columns), min_size=1, max_size=30)), sizes)


@settings(max_examples=100, deadline=None)
@given(codes=tables())
def test_prefixes_are_ordered_numbered_and_counted_as_tuples_are(codes):
    rows = codes.table.tolist()
    for depth in range(codes.num_levels + 1):
        prefixes = [tuple(row[:depth]) for row in rows]
        distinct = sorted(set(prefixes))
        order, first = codes.sorted_rows(depth)
        assert order.tolist() == sorted(range(len(rows)), key=lambda row: prefixes[row])
        assert np.flatnonzero(first).tolist() == [sorted(prefixes).index(prefix) for prefix in distinct]
        assert codes.prefix_groups(depth).tolist() == [distinct.index(prefix) for prefix in prefixes]
        found, counts = codes.prefix_counts(depth)
        assert [tuple(prefix) for prefix in found.tolist()] == distinct
        assert counts.tolist() == [prefixes.count(prefix) for prefix in distinct]
    full = [tuple(row) for row in rows]
    assert codes.collision_rate == sum(full.count(row) > 1 for row in full) / len(full)
    assert codes.is_injective == (len(set(full)) == len(full))


@pytest.mark.parametrize("depth", [-1, 3])
def test_prefixes_are_no_longer_than_codes(depth):
    with pytest.raises(DataError, match=rf"between 0 and the number of levels \(2\), was: {depth}"):
        make().sorted_rows(depth)


def test_codes_cannot_be_changed():
    source = TABLE.copy()
    codes = make(table=source)
    source[:] = 0
    assert codes.table.tolist() == TABLE.tolist()
    with pytest.raises(ValueError, match="read-only"):
        codes.table[0, 0] = 1
    codes.provenance["tokenizer"]["kind"] = "changed"
    assert codes.provenance == {"tokenizer": {"kind": "by hand"}}
    with pytest.raises(AttributeError):
        codes.sizes = (9, 9)


def test_equality_is_by_table_and_sizes_alone():
    assert make() == make(names=("a", "b"), provenance={})
    assert make() != make(sizes=(3, 3))
    assert make() != make(table=TABLE[::-1])
    assert make() != "codes"
    assert make().sha256 == make(names=("a", "b")).sha256 != make(sizes=(3, 3)).sha256
    assert len({make(), make(names=("a", "b")), make(sizes=(3, 3))}) == 2


def test_with_provenance_adds_and_keeps():
    codes = make().with_provenance(round=2)
    assert codes.provenance == {"tokenizer": {"kind": "by hand"}, "round": 2}
    assert codes == make()
    assert codes.names == make().names
    with pytest.raises(DataError, match="plain JSON"):
        codes.with_provenance(rate=float("inf"))


def test_with_provenance_leaves_the_old_codes_as_they_were():
    """The two share their table, which cannot change, and nothing else."""
    old = make()
    new = old.with_provenance(round=2)
    assert old.provenance == {"tokenizer": {"kind": "by hand"}}
    assert new.table is old.table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": [[0, 2]]}, r"level 1 must be in \[0, 2\), was: 2 to 2"),
        ({"table": [[-1, 0]]}, r"level 0 must be in \[0, 3\), was: -1 to -1"),
        ({"table": [[0.0, 1.0]]}, "whole numbers, was: float64"),
        ({"table": [0, 1]}, r"shape \(items, levels\).*was: \(2,\)"),
        ({"table": np.zeros((0, 2), int)}, "at least one item"),
        ({"table": [[0, 1, 0]]}, "2 levels"),
        ({"sizes": ()}, "at least one whole number"),
        ({"sizes": (3.0, 2)}, "whole number"),
        ({"sizes": (3, 0)}, "between 1 and"),
        ({"names": ("a", "a")}, "2 distinct texts"),
        ({"names": ("a",)}, "2 distinct texts"),
        ({"names": ("a", "b\nVerdict: healthy.")}, "2 distinct texts on one line"),
        ({"provenance": {"x": float("nan")}}, "plain JSON"),
        ({"provenance": {"x": TABLE}}, "plain JSON"),
    ],
)
def test_bad_codes_are_refused_with_what_was_found(changes, message):
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_save_then_load_is_the_identity_and_bytes_repeat(tmp_path):
    codes = make(names=("coarse", "fine"))
    first = codes.save(tmp_path / "a").read_bytes()
    assert codes.save(tmp_path / "b").read_bytes() == first
    for place in (tmp_path / "a", tmp_path / "a" / FILE_NAME):
        loaded = ItemCodes.load(place)
        assert loaded == codes
        assert loaded.names == codes.names
        assert loaded.provenance == codes.provenance
        assert not loaded.table.flags.writeable


def rewrite(path, *, table=None, **changes):
    """Write a file of codes with parts of it replaced."""
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["item_codes"])
        table = file.get_tensor("table") if table is None else table
    safetensors.numpy.save_file({"table": table}, path, metadata={"item_codes": json.dumps(header | changes)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": np.zeros((4, 2), np.int32)}, "not the ones that were saved"),
        ({"table": np.zeros((4, 2), np.int64)}, "must be int32, was: int64"),
        ({"table": np.full((4, 2), 7, np.int32)}, "contradict their own description"),
        ({"sizes": [3]}, "contradict their own description"),
        ({"sizes": None}, "contradict their own description"),
        ({"format_version": 99}, "format version 99"),
        ({"format": "other"}, "not of item codes"),
    ],
)
def test_load_refuses_what_was_not_saved(tmp_path, changes, message):
    path = make().save(tmp_path)
    rewrite(path, **changes)
    with pytest.raises(ArtifactError, match=message):
        ItemCodes.load(tmp_path)


def test_load_refuses_a_missing_a_broken_and_a_foreign_file(tmp_path):
    with pytest.raises(ArtifactError, match="no item codes there"):
        ItemCodes.load(tmp_path)
    path = make().save(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        ItemCodes.load(tmp_path)
    safetensors.numpy.save_file({"other": TABLE}, path)
    with pytest.raises(ArtifactError, match="not of item codes"):
        ItemCodes.load(tmp_path)

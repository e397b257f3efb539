"""The catalogue names items by row, and says what is known about them."""

import numpy as np
import pytest

from llm_itemtok.data.catalog import Catalog
from llm_itemtok.errors import DataError


def make_catalog(**columns):
    empty = {"titles": ("", "", ""), "categories": ((), (), ()), "brands": ("", "", ""), "descriptions": ("", "", "")}
    return Catalog(item_ids=("B001", "B002", "x"), **{**empty, **columns})


def test_rows_are_places_in_the_items_file():
    catalog = make_catalog()
    assert len(catalog) == 3
    assert catalog.row("x") == 2
    rows = catalog.rows(["x", "B001"])
    assert rows.dtype == np.int64
    assert rows.tolist() == [2, 0]


def test_an_unknown_id_is_answered_with_the_nearest():
    with pytest.raises(DataError, match="catalogue of 3 items, was: 'B003'; the nearest ids are 'B00"):
        make_catalog().row("B003")
    with pytest.raises(DataError, match="was: '17'; ids there look like 'B001', 'B002', 'x'"):
        make_catalog().rows(["x", "17"])


def test_text_joins_what_is_known_and_nothing_else():
    catalog = make_catalog(
        titles=("Bread", "", ""), categories=(("Books", "Cooking"), ("Books",), ()), descriptions=("Long.", "", "")
    )
    assert catalog.texts() == ["Bread. Books, Cooking. Long.", "Books", ""]
    assert catalog.text(0, max_chars=7) == "Bread. "
    assert catalog.has_text
    assert not make_catalog().has_text


def test_a_subset_is_another_catalogue():
    catalog = make_catalog(titles=("a", "b", "c"))
    subset = catalog.subset(np.array([2, 0]))
    assert subset.item_ids == ("x", "B001")
    assert subset.titles == ("c", "a")
    assert subset.row("x") == 0
    assert subset.sha256 != catalog.sha256
    assert catalog.subset(range(3)).sha256 == catalog.sha256


def test_further_columns_survive_a_subset_and_are_not_hashed():
    """A model of this catalogue must stay one, whichever columns an evaluation asks for."""
    catalog = make_catalog(titles=("a", "b", "c"), extra={"asin": ("A9", "", "A7")})
    assert catalog.subset([2, 0]).column("asin") == ("A7", "A9")
    assert catalog.sha256 == make_catalog(titles=("a", "b", "c")).sha256


def test_a_column_is_named_as_in_the_items_file():
    catalog = make_catalog(categories=(("Books", "Cooking"), (), ()), brands=("x", "", ""))
    assert catalog.column("item_id") == ("B001", "B002", "x")
    assert catalog.column("categories") == ("Books, Cooking", "", "")
    assert catalog.column("brand") == ("x", "", "")
    with pytest.raises(DataError, match=r"one of the catalogue's, item_id, title, .*, was: 'asin'"):
        catalog.column("asin")

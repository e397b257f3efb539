"""Which entry of category lists tells items apart."""

import pytest

from llm_itemtok.data.categories import telling_place


@pytest.mark.parametrize(
    ("categories", "place"),
    [
        ([("Toys", "Dolls"), ("Toys", "Kites")], 1),
        ([("Toys",), ("Games",)], 0),
        ([("Toys",), ("Toys",)], 0),  # none does: the first is taken
        ([("Toys", "Dolls"), ("Toys",), ("Toys",), ("Toys",)], 0),  # too few have a second one
        ([(), (), ("Toys", "Dolls"), ("Toys", "Kites")], 1),  # those without any do not count
        ([(), ()], 0),
        ([], 0),
    ],
)
def test_the_first_place_that_tells_items_apart(categories, place):
    assert telling_place(categories) == place

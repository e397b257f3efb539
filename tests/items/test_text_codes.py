"""Identifiers in words: unique whatever the titles are, closed by the end token, and blind to validation and test."""

import numpy as np
import pytest

from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ENDED, ItemCodes
from llm_itemtok.items.text_codes import TextCodes, random_numbers, sequential_numbers

END = "</s>"


def words(texts):
    """A vocabulary of whole words and of digits."""
    return [[part for word in text.split() for part in (word if word.isdigit() else [word])] for text in texts]


def named(codes: ItemCodes) -> list[str]:
    """Each item's words with spaces between."""
    return [
        " ".join(level[codeword] for level, codeword in zip(codes.words, row, strict=True) if level[codeword] != ENDED)
        for row in codes.table.tolist()
    ]


def titles(texts, max_tokens=3) -> list[str]:
    return named(TextCodes(words, end=END).of_titles(texts, max_tokens=max_tokens))


def test_titles_are_cut_and_closed():
    assert titles(["red lamp", "a very old lamp", "chair"]) == [f"red lamp {END}", f"a very old {END}", f"chair {END}"]


def test_all_but_the_first_of_equal_titles_get_a_number():
    found = titles(["red lamp", "red lamp", "old", "red lamp"])
    assert found == [f"red lamp {END}", f"red lamp 2 {END}", f"old {END}", f"red lamp 3 {END}"]


def test_titles_that_are_equal_once_cut_are_told_apart():
    assert titles(["a b c d", "a b c e"]) == [f"a b c {END}", f"a b c 2 {END}"]


def test_a_number_that_another_title_has_is_passed_over():
    assert titles(["lamp", "lamp 2", "lamp"]) == [f"lamp {END}", f"lamp 2 {END}", f"lamp 3 {END}"]


def test_items_without_a_title_have_a_name_of_their_own():
    assert titles(["", "lamp", ""]) == [f"item {END}", f"lamp {END}", f"item 2 {END}"]


def test_a_title_cannot_hold_the_end_token():
    """Otherwise its identifier would begin another one."""
    assert titles([f"red {END} lamp", END]) == [f"red lamp {END}", f"item {END}"]


def test_many_equal_titles_are_unique_and_none_begins_another():
    found = titles(["lamp"] * 300 + ["lamp 2", "lamp 2 2"])
    assert len(set(found)) == 302
    assert all(name.endswith(END) and name.count(END) == 1 for name in found)


def test_no_title_at_all_is_refused():
    with pytest.raises(DataError, match=r"needs titles, but no item has one; use `tokenizer.kind: numeric`"):
        titles(["", ""])


def test_numbers_are_spelt_and_closed():
    assert named(TextCodes(words, end=END).of_numbers([7, 12, 3])) == [f"7 {END}", f"1 2 {END}", f"3 {END}"]


@pytest.mark.parametrize("split", [lambda texts: [[] for _ in texts], lambda texts: [["<unk>"] for _ in texts]])
def test_a_vocabulary_without_digits_is_refused(split):
    with pytest.raises(DataError, match="must have all digits, but cannot spell '4'"):
        TextCodes(split, end=END, unknown="<unk>").of_numbers([4, 5])


def test_a_vocabulary_that_mixes_numbers_up_is_refused():
    with pytest.raises(DataError, match="must tell numbers apart, but spells '4' and '5' alike"):
        TextCodes(lambda texts: [["number"] for _ in texts], end=END).of_numbers([4, 5])
    with pytest.raises(DataError, match="must tell numbers apart"):
        TextCodes(lambda texts: [["x"] for _ in texts], end=END).of_titles(["a", "b"], max_tokens=2)


def test_the_end_token_comes_first_at_every_level():
    """Exact scoring cuts the tree of identifiers in this order: what ends stands before what goes on."""
    codes = TextCodes(words, end=END).of_titles(["a b", "a", "c", "c d e"], max_tokens=3)
    assert codes.words == (("a", "c"), (END, "b", "d"), (END, "e", ENDED), (END, ENDED))
    assert codes.lengths.tolist() == [3, 2, 2, 4]


def test_random_numbers_are_each_dealt_once_by_the_seed():
    numbers = random_numbers(50, seed=3)
    assert sorted(numbers.tolist()) == list(range(1, 51))
    assert numbers.tolist() != sorted(numbers.tolist())
    np.testing.assert_array_equal(numbers, random_numbers(50, seed=3))


def test_sequential_numbers_follow_training_and_deal_the_rest_at_random():
    numbers = sequential_numbers(np.array([4, 2, 4, 0]), num_items=7, seed=0)
    assert [int(numbers[row]) for row in (4, 2, 0)] == [1, 2, 3]
    assert sorted(numbers[[1, 3, 5, 6]].tolist()) == [4, 5, 6, 7]


def test_words_identify_codes_and_survive_saving(tmp_path):
    codes = TextCodes(words, end=END).of_titles(["a b", "c"], max_tokens=3)
    again = ItemCodes.load(codes.save(tmp_path))
    assert (again, again.sha256, again.words) == (codes, codes.sha256, codes.words)
    others = [["x" if word == "a" else word for word in level] for level in codes.words]
    assert ItemCodes(codes.table, codes.sizes, words=others) != codes
    assert ItemCodes(codes.table, codes.sizes).sha256 != codes.sha256


@pytest.mark.parametrize(
    ("table", "level_words", "message"),
    [
        ([[0, 0]], [["a"], ["b", "c"]], "`words` must be one distinct word a codeword"),
        ([[0, 0]], [["a", "a"], ["b", "c"]], "`words` must be one distinct word a codeword"),
        ([[0, 0]], [["", "a"], ["b", "c"]], "has ended before level 1 must have no word there"),
        ([[0, 1], [0, 0]], [["", "a"], ["b", ""]], "has ended before level 1 must have no word there"),
        ([[0, 0]], [["", "a"], ["", "c"]], "an item must have at least one word"),
    ],
)
def test_words_that_contradict_the_table_are_refused(table, level_words, message):
    with pytest.raises(DataError, match=message):
        ItemCodes(np.array(table), (2, 2), words=level_words)

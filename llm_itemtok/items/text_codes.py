"""Identifiers in words that the language model has already: the item's number, or its title.

What the papers compare item tokens with: random and sequential numbers and titles of "How to Index Item IDs" (Hua et
al. 2023, arXiv:2305.06569, section 3), numbers of P5 (arXiv:2203.13366). An identifier is the tokens of its text and
then the end token, so identifiers are of any length and none begins another. No token is new, so no row is trained for
them.

Decisions:
- Numbers are dealt at random by default. The place of an item in its file is no number to give: many files have items
  in the order of the log, so near numbers would tell who is bought after whom, also in validation and test. In the
  order `sequential` that is wanted, and made of training sequences alone.
- Equal titles, also those that are equal once cut, are told apart by a number behind them: 2 for the second item in
  catalogue order, 3 for the third, or the next one whose identifier is free. The first one keeps its title as it is.
- An item without a title is called `item`, and told apart in the same way.
- A level is a place in the identifier, its codewords are the words that stand there, in alphabetical order, but for the
  end token, which comes first: an identifier then stands before those that go on.

This module knows words as texts; what they are in a vocabulary is `vocab.text_vocab`'s.
"""

from collections.abc import Callable, Sequence
from typing import final

import numpy as np

from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ENDED, ItemCodes

UNTITLED = "item"
"""What an item without a title is called."""

Split = Callable[[Sequence[str]], list[list[str]]]
"""Cuts texts into words of a vocabulary."""


@final
class TextCodes:
    """Makes codes whose codewords are existing words."""

    def __init__(self, split: Split, *, end: str, unknown: str | None = None) -> None:
        """Set the vocabulary.

        Args:
            split: cuts texts into words; the end token in a text is left out.
            end: the word that closes every identifier.
            unknown: the word that stands for everything that the vocabulary lacks, if there is such a word.
        """
        self.split = split
        self.end = end
        self.unknown = unknown

    def of_numbers(self, numbers: Sequence[int]) -> ItemCodes:
        """Spell each item's number.

        Args:
            numbers: N distinct numbers.

        Raises:
            DataError: if the vocabulary does not tell two of them apart.
        """
        paths = self._words([str(number) for number in numbers])
        self._refuse_alike(paths, [str(number) for number in numbers])
        return self._codes(paths, {"kind": "numeric"})

    def of_titles(self, titles: Sequence[str], *, max_tokens: int) -> ItemCodes:
        """Spell each item's title.

        Args:
            titles: of N items, empty where an item has none.
            max_tokens: words of a title that are kept, at least 1; a number that tells it from others comes on top.

        Raises:
            DataError: if no item has a title, or the vocabulary does not tell numbers apart.
        """
        if not any(titles):
            raise DataError("`tokenizer.kind: title` needs titles, but no item has one; use `tokenizer.kind: numeric`")
        untitled = self._words([UNTITLED])[0]
        paths = [(words or untitled)[:max_tokens] for words in self._words(titles)]
        unique, shared = self._told_apart(paths)
        settings = {"max_tokens": max_tokens, "shared": shared, "untitled": sum(not title for title in titles)}
        return self._codes(unique, {"kind": "title", **settings})

    def _words(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        return [tuple(word for word in words if word not in (self.end, ENDED)) for words in self.split(texts)]

    def _told_apart(self, paths: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], int]:
        """Put numbers behind all but the first of equal paths; say how many."""
        taken, firsts = set(paths), set[tuple[str, ...]]()
        unique, counts = [], dict[tuple[str, ...], int]()
        numbers: list[tuple[str, ...]] = []  # how each is spelt, from 2 on
        for path in paths:
            if path not in firsts:
                firsts.add(path)
                unique.append(path)
                continue
            while True:
                place = counts[path] = counts.get(path, -1) + 1
                if place == len(numbers):
                    self._spell_more(numbers)
                if (*path, *numbers[place]) not in taken:
                    break
            unique.append((*path, *numbers[place]))
            taken.add(unique[-1])
        return unique, len(paths) - len(firsts)

    def _spell_more(self, numbers: list[tuple[str, ...]]) -> None:
        """Spell about twice as many numbers as there are."""
        texts = [str(number) for number in range(2 + len(numbers), 2 * len(numbers) + 32)]
        numbers += self._words(texts)
        self._refuse_alike(numbers, [str(number) for number in range(2, 2 + len(numbers))])

    def _refuse_alike(self, paths: Sequence[tuple[str, ...]], texts: Sequence[str]) -> None:
        """Raise `DataError` if the vocabulary lacks digits, or does not tell texts apart."""
        first: dict[tuple[str, ...], str] = {}
        for path, text in zip(paths, texts, strict=True):
            if not path or self.unknown in path:
                raise DataError(
                    f"the tokenizer must have all digits, but cannot spell {text!r}; choose another `model.name`"
                )
            if first.setdefault(path, text) != text:
                raise DataError(
                    f"the model's tokenizer must tell numbers apart, but spells {first[path]!r} and {text!r} alike; "
                    "choose another `model.name`"
                )

    def _codes(self, paths: Sequence[tuple[str, ...]], tokenizer: dict[str, object]) -> ItemCodes:
        """The table of closed identifiers."""
        closed = [(*path, self.end) for path in paths]
        depth = max(map(len, closed))
        table = np.empty((len(closed), depth), dtype=np.int32)
        words: list[list[str]] = []
        for level in range(depth):
            column = [path[level] if level < len(path) else ENDED for path in closed]
            rank = {self.end: 0, ENDED: 2}
            words.append(sorted(set(column), key=lambda word: (rank.get(word, 1), word)))
            places = {word: place for place, word in enumerate(words[-1])}
            table[:, level] = [places[word] for word in column]
        return ItemCodes(
            table,
            [len(level) for level in words],
            names=[f"token-{level}" for level in range(depth)],
            words=words,
            provenance={"tokenizer": tokenizer},
        )


def random_numbers(num_items: int, *, seed: int) -> np.ndarray:
    """Deal the numbers `1 … num_items` out at random, int64 `[num_items]`."""
    return np.random.default_rng(seed).permutation(num_items) + 1


def sequential_numbers(train_items: np.ndarray, *, num_items: int, seed: int) -> np.ndarray:
    """Number items as they first come up in training, user by user; those that do not, at random behind them.

    Args:
        train_items: catalogue rows of all training sequences, one user's after the other's, each in time order.
        num_items: of the catalogue.
        seed: for items that training does not have.

    Returns:
        int64 `[num_items]`, the numbers `1 … num_items`.
    """
    met, places = np.unique(train_items, return_index=True)
    order = met[np.argsort(places)]
    unmet = np.setdiff1d(np.arange(num_items), met)
    numbers = np.empty(num_items, dtype=np.int64)
    numbers[np.concatenate([order, np.random.default_rng(seed).permutation(unmet)])] = np.arange(num_items) + 1
    return numbers

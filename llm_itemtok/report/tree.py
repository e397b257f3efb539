"""The code tree as a picture: a block a codeword, as wide as its items, each level below the one before it.

Decisions. Codewords have no order of their own, so siblings are put by their most frequent category and then by size:
a tree that follows the categories shows as wide bands, one that does not as stripes. A block has the colour of its
most frequent category, paler where more of its items belong to others. Siblings too thin to be seen are drawn as one
block, within the block above; no item is left out, so every level is as wide as the catalogue, and the picture stays
small however many items there are. It is stretched to the page (`preserveAspectRatio="none"`) and holds no text but
the titles of its blocks, so that it fills a phone and a wide screen alike.

This module knows code tables and words for items; it knows nothing of runs or files.

Shape letters in this file: N items, P distinct prefixes of a level, G groups.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from llm_itemtok.data.categories import telling_place
from llm_itemtok.items.codes import ENDED, ItemCodes
from llm_itemtok.report.plots import SERIES_COLOURS, Chart, shortened

LEAST_SHARE = 0.001
"""Siblings narrower than this share of the picture are joined: about a pixel on a wide screen, a third on a phone."""

_WIDTH = 1000
_LEVEL_PIXELS = 76
_LABEL_LETTERS = 48
_FULLEST = 12


@dataclass(frozen=True)
class Groups:
    """What items are coloured by: the most frequent categories, the other ones, and none.

    Attributes:
        names: of the coloured categories, most frequent first, at most `SERIES_COLOURS`.
        of_items: int64 `[N]` in `[0, G)`, G = `len(names) + 2`: a place in `names`, then other categories, then none.
        position: at which place of their category lists items were told apart, 0 the first.
    """

    names: tuple[str, ...]
    of_items: NDArray[np.int64]
    position: int

    @property
    def number(self) -> int:
        """G, with the groups for other categories and for none."""
        return len(self.names) + 2

    def name(self, group: int) -> str:
        """What a group is called in the page."""
        return (*self.names, "other categories", "no category")[group]

    def style(self, group: int) -> str:
        """The group's class in the style sheet."""
        return f"s{group}" if group < len(self.names) else ("other", "none")[group - len(self.names)]


@dataclass(frozen=True)
class Block:
    """One block of a level: a codeword, or neighbours under the same block that are too thin alone.

    Attributes:
        start: items to the left of it.
        items: its width, at least 1.
        codewords: how many it stands for.
        above: its parent's place in the level above, 0 in the first level.
        group: the most frequent of its items.
        share: of its items in that group, in (0, 1].
        example: catalogue row of an item of that group in it.
    """

    start: int
    items: int
    codewords: int
    above: int
    group: int
    share: float
    example: int


def category_groups(categories: Sequence[Sequence[str]]) -> Groups:
    """Choose what items are coloured by: the first place of the category lists that tells items apart.

    Args:
        categories: of each item in catalogue order, coarse first; empty where an item has none.
    """
    position = telling_place(categories)
    chosen = [parts[position] if len(parts) > position else None for parts in categories]
    ranked = sorted(Counter(name for name in chosen if name is not None).items(), key=lambda entry: (-entry[1], entry))
    names = tuple(name for name, _ in ranked[:SERIES_COLOURS])
    numbers = {name: number for number, name in enumerate(names)}
    of_items = [len(names) + 1 if name is None else numbers.get(name, len(names)) for name in chosen]
    return Groups(names, np.array(of_items, dtype=np.int64), position)


def tree_levels(codes: ItemCodes, groups: Groups) -> list[list[Block]]:
    """Lay the tree out.

    Args:
        codes: N items.
        groups: of the same items.

    Returns:
        For each level its blocks from left to right. The widths of a level add up to N, and blocks stand within the
        block above.
    """
    order = _order(codes, groups)
    above = np.zeros(codes.num_items, dtype=np.int64)
    levels = []
    for depth in range(1, codes.num_levels + 1):
        prefixes = codes.prefix_groups(depth)[order]
        starts = np.append(0, np.flatnonzero(np.diff(prefixes)) + 1)
        firsts = np.flatnonzero(_begins(starts, above[starts], codes.num_items))
        blocks = _blocks(starts, firsts, above, groups, order)
        above = np.repeat(np.arange(len(blocks)), [block.items for block in blocks])
        levels.append(blocks)
    return levels


def tree_chart(title: str, codes: ItemCodes, groups: Groups, labels: Sequence[str]) -> Chart:
    """Draw the code tree.

    Args:
        title: caption.
        codes: N items.
        groups: of the same items.
        labels: a title or an id of each item, N of them.
    """
    coloured = bool(groups.names)
    levels = tree_levels(codes, groups)
    parts = []
    for depth, blocks in enumerate(levels):
        for number, block in enumerate(blocks):
            # Without colours, neighbours differ in shade, so that blocks can be told apart.
            shade = _shade(block.share) if coloured else (2, 4)[number % 2]
            style = f"{groups.style(block.group)} p{shade}" + _room(block.items / codes.num_items)
            words = _block_words(block, depth, levels, codes, groups, labels)
            x, width = block.start / codes.num_items * _WIDTH, block.items / codes.num_items * _WIDTH
            parts.append(
                Markup(
                    '<rect x="{:.2f}" y="{}" width="{:.2f}" height=".97" class="{}"><title>{}</title></rect>'
                ).format(x, depth, width, style, words)
            )
    counts = [f"{name} {len(codes.prefix_counts(depth + 1)[1]):,}" for depth, name in enumerate(codes.names)]
    summary = f"{title}: nodes from the first level to the last: " + ", ".join(counts) + "."
    svg = Markup(
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" class="tree" style="height:{}px" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(_WIDTH, codes.num_levels, codes.num_levels * _LEVEL_PIXELS, summary, Markup("").join(parts))
    return Chart(title, svg, tuple(_legend(groups)) if coloured else (), summary)


def fullest_codewords(codes: ItemCodes, groups: Groups, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Say in words what the widest blocks of the first level hold.

    Returns:
        For at most 12 codewords, the fullest first: `token`, `items`, `share` of the catalogue, `category` with its
        share (empty without categories), and `example`.
    """
    numbers = codes.prefix_groups(1)
    dominant, shares = _dominant(numbers, groups.of_items, groups.number)
    counts = np.bincount(numbers)
    rows = []
    for number in np.argsort(-counts, kind="stable")[:_FULLEST].tolist():
        group = int(dominant[number])
        example = int(np.flatnonzero((numbers == number) & (groups.of_items == group))[0])
        rows.append(
            {
                "token": spelled(codes.table[example, :1], codes.words),
                "items": int(counts[number]),
                "share": counts[number] / codes.num_items,
                "category": f"{groups.name(group)}, {shares[number]:.0%}" if groups.names else "",
                "example": labels[example],
            }
        )
    return rows


def spelled(code: Iterable[int], words: Sequence[Sequence[str]] | None = None) -> str:
    """Write a code, or its first codewords, as the tokens that a model reads, such as `<a_3><b_17>`, or as words."""
    if words is not None:
        found = [level[codeword] for level, codeword in zip(words, code, strict=False)]
        return " ".join(word for word in found if word != ENDED)
    # Codes of more levels than letters cannot become tokens, but can be looked at.
    letters = itertools.chain(ascii_lowercase, map(str, itertools.count(len(ascii_lowercase))))
    return "".join(f"<{letter}_{codeword}>" for letter, codeword in zip(letters, code, strict=False))


# ---------------------------------------------------------------------------------------------------------- layout


def _order(codes: ItemCodes, groups: Groups) -> NDArray[np.int64]:
    """Catalogue rows from left to right, int64 `[N]`: prefixes stand together, by group, then size, then code."""
    keys: list[NDArray[np.int64]] = []
    for depth in range(1, codes.num_levels + 1):
        numbers = codes.prefix_groups(depth)
        keys += [
            _dominant(numbers, groups.of_items, groups.number)[0][numbers],
            -np.bincount(numbers)[numbers],
            numbers,
        ]
    return np.lexsort(keys[::-1])  # the last key counts most


def _dominant(
    numbers: NDArray[np.int64], groups: NDArray[np.int64], num_groups: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Most frequent group, the lowest on a tie, and its share, `[P]` each, of items numbered `[N]` in `[0, P)`."""
    counts = np.bincount(numbers * num_groups + groups, minlength=(int(numbers.max()) + 1) * num_groups)
    counts = counts.reshape(-1, num_groups)
    return counts.argmax(axis=1), counts.max(axis=1) / counts.sum(axis=1)


def _begins(starts: NDArray[np.int64], above: NDArray[np.int64], num_items: int) -> NDArray[np.bool_]:
    """Say at which prefixes a block begins.

    Args:
        starts: int64 `[P]`, items to the left of each prefix, ascending from 0.
        above: int64 `[P]`, the block of the level above that each stands under.
        num_items: N.

    Returns:
        bool `[P]`. A run of thin neighbours under one block is cut into equal pieces, each wide enough.
    """
    sizes = np.diff(np.append(starts, num_items))
    least = LEAST_SHARE * num_items
    thin = sizes < least
    run_begins = np.ones(len(starts), dtype=bool)
    run_begins[1:] = ~thin[1:] | ~thin[:-1] | (above[1:] != above[:-1])
    run = np.cumsum(run_begins) - 1
    run_items = np.bincount(run, weights=sizes)[run]
    pieces = np.maximum(1, np.floor(run_items / least))
    piece = np.floor((starts - starts[run_begins][run]) * pieces / run_items)
    return run_begins | (np.diff(piece, prepend=-1) != 0)


def _blocks(
    starts: NDArray[np.int64],
    firsts: NDArray[np.int64],
    above: NDArray[np.int64],
    groups: Groups,
    order: NDArray[np.int64],
) -> list[Block]:
    """Make the blocks of a level; `firsts` are the prefixes that begin one, `above` is `[N]` from left to right."""
    items = np.diff(np.append(starts[firsts], len(order)))
    number = np.repeat(np.arange(len(firsts)), items)
    of_items = groups.of_items[order]
    dominant, shares = _dominant(number, of_items, groups.number)
    fitting = np.flatnonzero(of_items == dominant[number])
    examples = order[fitting[np.unique(number[fitting], return_index=True)[1]]]
    columns = (
        starts[firsts],
        items,
        np.diff(np.append(firsts, len(starts))),
        above[starts[firsts]],
        dominant,
        shares,
        examples,
    )
    return [Block(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


# ----------------------------------------------------------------------------------------------------------- words


def _block_words(
    block: Block, depth: int, levels: list[list[Block]], codes: ItemCodes, groups: Groups, labels: Sequence[str]
) -> str:
    code = codes.table[block.example]
    parent = levels[depth - 1][block.above] if depth else None
    if block.codewords == 1:
        name = spelled(code[: depth + 1], codes.words)
    elif parent is not None and parent.codewords == 1:
        name = f"{block.codewords} codewords after {spelled(code[:depth], codes.words)}"
    else:
        name = f"{block.codewords} neighbours on {codes.names[depth]}"
    category = f", {groups.name(block.group)} {block.share:.0%}" if groups.names else ""
    count = "1 item" if block.items == 1 else f"{block.items:,} items"
    return f"{name}: {count}{category}, such as {shortened(labels[block.example], _LABEL_LETTERS)}"


def _legend(groups: Groups) -> Iterable[tuple[str, str]]:
    shares = np.bincount(groups.of_items, minlength=groups.number) / len(groups.of_items)
    for group, share in enumerate(shares.tolist()):
        if share:
            yield groups.style(group), f"{shortened(groups.name(group), _LABEL_LETTERS)} {share:.0%}"


def _shade(share: float) -> int:
    """Shade 0 (pale) to 4 (full) of a block's colour."""
    return min(4, max(0, int((share - 0.25) / 0.15)))


def _room(share: float) -> str:
    """Class of a block that has room for a line around it: on any screen (`w`), on a wide one (`v`), or on none."""
    if share >= 0.012:
        return " w"
    return " v" if share >= 0.003 else ""

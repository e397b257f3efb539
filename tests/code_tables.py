"""Random catalogues of codes for property tests."""

import numpy as np
from hypothesis import strategies as st

from llm_itemtok.items.codes import ItemCodes


@st.composite
def code_tables(draw: st.DrawFn) -> ItemCodes:
    """Distinct codes: 1 to 5 levels of 1 to 4 codewords, one item to all there can be, 40 at most.

    Codes are scattered over what the levels can spell, or fill whole subtrees of it; at some levels all may agree.
    """
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    space = int(np.prod(sizes))
    if draw(st.booleans()):
        flat = draw(st.lists(st.integers(0, space - 1), min_size=1, max_size=min(space, 40), unique=True))
    else:
        first = draw(st.integers(0, space - 1))
        flat = draw(st.permutations(range(first, min(space, first + draw(st.integers(1, 40))))))
    table = np.stack(np.unravel_index(flat, sizes), axis=1)
    if draw(st.booleans()):
        level = draw(st.integers(0, len(sizes) - 1))
        table[:, level] = table[0, level]
        table = table[np.sort(np.unique(table, axis=0, return_index=True)[1])]
    return ItemCodes(table, sizes)

"""Collisions: item codes in, item codes with unique rows out.

Two items with one code cannot be told apart in decoding, so every run resolves collisions before codes become tokens.
The policies here change as little as they can: an item that shares its code with nobody keeps it.

- `extra_level` appends a level that counts within a code. Loses nothing, but the last token means nothing.
- `reassign` moves all but one of the items on a code to the nearest free code, one item after the other. No longer
  path, at the price of reconstruction error, which is recorded.
- `sinkhorn` spreads the items of shared codes over the codewords of the last level, all of a prefix at once.
- `matching` does that at the least cost there is.
- `forbid` refuses.

What was done, and the collision rate before it, is kept in the provenance under `collisions`.

Shape letters in this file: N items, L levels, K codewords of the last level, H dimensions of a codeword, M items of
shared codes, E candidates of all of them together.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from llm_itemtok.errors import CollisionError, DataError
from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.free_codes import FreeCodes, Shared, latent_space, squared_errors
from llm_itemtok.items.sinkhorn import sinkhorn_choices

MAX_ROUNDS = 20
"""Rounds of `sinkhorn` before what still collides goes to the nearest free code; as many as LC-Rec has."""


def extra_level(codes: ItemCodes, size: int | None = None) -> ItemCodes:
    """Append a level that counts the items of each code: 0 for the first in row order, 1 for the second, ...

    Args:
        codes: any codes. Every item gets the extra level, unshared ones a 0, so all paths are of one length.
        size: capacity of the extra level, at least the items on the fullest code. When not given: the size of the
            last level, or more if the fullest code needs more.

    Returns:
        Codes of one level more, named `extra`, with unique rows.

    Raises:
        CollisionError: if `size` is too small.
    """
    groups = codes.prefix_groups(codes.num_levels)
    needed = int(np.bincount(groups).max())
    size = max(codes.sizes[-1], needed) if size is None else size
    if size < needed:
        raise CollisionError(
            f"the extra level must count to the number of items on the fullest code, {needed:,}, but its size was: "
            f"{size:,}.\n  fix, in the recipe's `tokenizer` section: raise `codebook_size` or `levels` so that fewer "
            "items share a code, or leave the size of the extra level to be chosen"
        )
    table = np.concatenate([codes.table, _position_in_group(groups)[:, None]], axis=1)
    return ItemCodes(
        table,
        (*codes.sizes, size),
        names=(*codes.names, _free_name("extra", codes.names)),
        provenance=codes.provenance | {"collisions": _record(codes, "extra-level")},
    )


def reassign(codes: ItemCodes, vectors: np.ndarray | None, quantizer: Quantizer | None = None) -> ItemCodes:
    """Move all but one of the items on each shared code to the nearest free code.

    The item that its code describes best keeps it. The others follow in the order of how well they are described; each
    keeps the longest prefix under which a code is free, so the deepest levels change first, and below that prefix takes
    level by level the nearest codeword that still has a free code under it.

    Staying under the prefix costs more than the nearest free code anywhere would: on Beauty (3 x 256, MiniLM vectors,
    1,847 of 12,101 items moved) a moved item's squared error rises by 18 % instead of 8 %. But then 42 % of the moved
    items would change their level 1 as well, and prefixes are what tells a model which items are alike.

    Args:
        codes: N items on L levels.
        vectors: float32 `[N, D]`, in the units the quantizer was fitted on; None will do for codes without collisions.
        quantizer: that gave the codes, with the same levels. Without one, codebooks are estimated from the vectors.

    Returns:
        Codes of the same sizes with unique rows. The provenance records the number of items moved and what the moves
        cost in mean squared distance between items and what their codes stand for.

    Raises:
        CollisionError: if there are more items than codes.
        DataError: if codes, vectors and quantizer do not fit each other, or vectors are needed and missing.
    """
    _refuse_too_many(codes)
    if vectors is None:
        return _unmoved(codes, "reassign")
    latent, codebooks = latent_space(codes, vectors, quantizer)
    return _moved(codes, _reassigned(codes, latent, codebooks), "reassign", latent, codebooks)


def _reassigned(codes: ItemCodes, latent: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """The table that `reassign` gives, int32 `[N, L]`."""
    errors = squared_errors(latent, codes.table, codebooks)
    free = FreeCodes(codes, codebooks, codes.num_items)
    table = codes.table.copy()
    for row in _all_but_nearest(codes.prefix_groups(codes.num_levels), errors):
        table[row] = free.take_nearest(latent[row], tuple(table[row].tolist()))
    return table


def sinkhorn(codes: ItemCodes, vectors: np.ndarray | None, quantizer: Quantizer | None = None) -> ItemCodes:
    """Encode the last level of items that share a code again, so that those of one prefix spread over its codewords.

    In each round, the items of a prefix are assigned to the codewords that nobody else holds by entropic optimal
    transport (Sinkhorn's iteration: every item once, every codeword at most once), and each takes its largest share. Of
    those that take the same codeword the nearest keeps it, the others go on to the next round. After `MAX_ROUNDS`, or
    when a prefix is full, what still collides goes to the nearest free code as in `reassign`.

    LC-Rec's released code, where the idea comes from (Zheng et al. 2023, arXiv:2311.09049), looks at the items of one
    code at a time, does not know which codewords are taken, asks the few items to use *all* codewords evenly, so that
    which one is an item's largest share is nearly an accident, and leaves the collisions that remain after its rounds.

    Args:
        codes: N items on L levels.
        vectors: float32 `[N, D]`, in the units the quantizer was fitted on; None will do for codes without collisions.
        quantizer: that gave the codes, with the same levels. Without one, codebooks are estimated from the vectors.

    Returns:
        Codes of the same sizes with unique rows; items that shared their code with nobody keep it. The provenance
        records what `reassign` records, and besides the number of rounds and of items moved by the nearest free code.

    Raises:
        CollisionError: if there are more items than codes.
        DataError: if codes, vectors and quantizer do not fit each other, or vectors are needed and missing.
    """
    _refuse_too_many(codes)
    if vectors is None:
        return _unmoved(codes, "sinkhorn", rounds=0, nearest_free=0)
    latent, codebooks = latent_space(codes, vectors, quantizer)
    if codes.is_injective:
        return _moved(codes, codes.table, "sinkhorn", latent, codebooks, rounds=0, nearest_free=0)
    shared = Shared.of(codes, latent, codebooks)
    free = shared.available.copy()
    table, left, rounds = codes.table.copy(), np.arange(len(shared.rows)), 0
    while len(left) and rounds < MAX_ROUNDS:
        words = sinkhorn_choices(shared.distances[left], shared.prefixes[left], free)
        wanting = np.flatnonzero(words >= 0)
        if not len(wanting):
            break
        rounds += 1
        places, wanted = left[wanting], words[wanting]
        order = np.lexsort((places, shared.distances[places, wanted], wanted, shared.prefixes[places]))
        groups = shared.prefixes[places] * free.shape[1] + wanted
        first = order[np.unique(groups[order], return_index=True)[1]]
        settled = places[first]
        table[shared.rows[settled], -1] = wanted[first]
        free[shared.prefixes[settled], wanted[first]] = False
        left = np.setdiff1d(left, settled)
    rows = shared.rows[left]
    if len(rows):
        settled_codes = ItemCodes(np.delete(table, rows, axis=0), codes.sizes)
        others = FreeCodes(settled_codes, codebooks, codes.num_items)
        errors = squared_errors(latent[rows], table[rows], codebooks)
        for row in rows[np.argsort(errors, kind="stable")]:
            table[row] = others.take_nearest(latent[row], tuple(table[row].tolist()))
    return _moved(codes, table, "sinkhorn", latent, codebooks, rounds=rounds, nearest_free=len(rows))


def matching(codes: ItemCodes, vectors: np.ndarray | None, quantizer: Quantizer | None = None) -> ItemCodes:
    """Give the items of shared codes the codes that cost least, all of them together.

    Candidates of an item are the codes under its own first L - 1 codewords that nobody outside holds, nearest first,
    as many as there are items that may want them: more can never be needed. Where a prefix has fewer free codes than
    items, some must leave it, and for them the codes that `reassign` would give are candidates, too. So an assignment
    always exists, and the best one, which is taken, is never worse than that of `reassign` in mean squared error.

    Args:
        codes: N items on L levels.
        vectors: float32 `[N, D]`, in the units the quantizer was fitted on; None will do for codes without collisions.
        quantizer: that gave the codes, with the same levels. Without one, codebooks are estimated from the vectors.

    Returns:
        Codes of the same sizes with unique rows; items that shared their code with nobody keep it. The provenance
        records what `reassign` records, and besides the number of candidates.

    Raises:
        CollisionError: if there are more items than codes.
        DataError: if codes, vectors and quantizer do not fit each other, or vectors are needed and missing.

    Source: Jonker and Volgenant 1987 (doi:10.1007/BF02278710), in SciPy's version for sparse candidates.
    """
    _refuse_too_many(codes)
    if vectors is None:
        return _unmoved(codes, "matching", candidates=0)
    latent, codebooks = latent_space(codes, vectors, quantizer)
    if codes.is_injective:
        return _moved(codes, codes.table, "matching", latent, codebooks, candidates=0)
    shared = Shared.of(codes, latent, codebooks)
    items, candidates, costs = _candidates(codes, shared, latent, codebooks)
    columns = ItemCodes(candidates, codes.sizes).prefix_groups(codes.num_levels)
    # An explicit zero would be no candidate at all; the same for all, the 1 changes nothing about which is best.
    graph = csr_array((costs + 1.0, (items, columns)), shape=(len(shared.rows), int(columns.max()) + 1))
    row_of, column_of = min_weight_full_bipartite_matching(graph)
    table = codes.table.copy()
    code_of_column = np.unique(columns, return_index=True)[1]
    table[shared.rows[row_of]] = candidates[code_of_column[column_of]]
    return _moved(codes, table, "matching", latent, codebooks, candidates=len(items))


def _candidates(
    codes: ItemCodes, shared: Shared, latent: np.ndarray, codebooks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What may be assigned to whom: places in `shared` `[E]`, codes int32 `[E, L]`, squared errors `[E]`."""
    reassigned = _reassigned(codes, latent, codebooks)[shared.rows]
    leaving = np.flatnonzero((reassigned[:, :-1] != codes.table[shared.rows, :-1]).any(axis=1))
    wanting = np.bincount(shared.prefixes, minlength=len(shared.available))
    if len(leaving):
        wanting += _arriving(shared.prefix_codes, reassigned[leaving, :-1], codes.sizes[:-1])
    wanted = np.minimum(wanting, shared.available.sum(axis=1))[shared.prefixes]
    distances = np.where(shared.available[shared.prefixes], shared.distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")
    items, ranks = np.nonzero(np.arange(nearest.shape[1]) < wanted[:, None])
    words = nearest[items, ranks]
    own = codes.table[shared.rows[items]]
    own[:, -1] = words
    elsewhere = squared_errors(latent[shared.rows[leaving]], reassigned[leaving], codebooks)
    return (
        np.concatenate([items, leaving]),
        np.concatenate([own, reassigned[leaving]]),
        np.concatenate([distances[items, words], elsewhere]).astype(np.float64),
    )


def _arriving(prefixes: np.ndarray, wanted: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """For each of some distinct prefixes, how often it stands among the wanted ones; int64."""
    groups = ItemCodes(np.concatenate([prefixes, wanted]), sizes).prefix_groups(len(sizes))
    return np.bincount(groups[len(prefixes) :], minlength=int(groups.max()) + 1)[groups[: len(prefixes)]]


def forbid(codes: ItemCodes, item_ids: Sequence[str]) -> ItemCodes:
    """Refuse codes with collisions, and say which.

    Args:
        codes: any codes.
        item_ids: ids of the items, in the order of the rows.

    Returns:
        The codes, with the policy in their provenance.

    Raises:
        CollisionError: if two items share a code; names the fullest code and some of its items.
    """
    groups = codes.prefix_groups(codes.num_levels)
    counts = np.bincount(groups)
    num_shared = int(counts[counts > 1].sum())
    if num_shared:
        owners = np.flatnonzero(groups == counts.argmax())
        worst = tuple(codes.table[owners[0]].tolist())
        sample = ", ".join(item_ids[row] for row in owners[:3]) + (", ..." if len(owners) > 3 else "")
        raise CollisionError(
            f"{num_shared:,} of {codes.num_items:,} items ({num_shared / codes.num_items:.1%}) share their code with "
            "another item, so decoding could not tell them apart.\n"
            f"  worst: code {worst} stands for {len(owners)} items ({sample})\n"
            "  fix, in the recipe's `tokenizer` section: `collisions: extra-level` adds one level that counts within a "
            "code;\n  `sinkhorn`, `matching` and `reassign` move items to free codes by their item vectors;\n  "
            + _other_way(codes)
        )
    return codes.with_provenance(collisions=_record(codes, "forbid"))


def _more_room(codes: ItemCodes) -> str:
    return "give `sizes` more room" if codes.provenance.get("kind") == "file" else "raise `codebook_size` or `levels`"


def _other_way(codes: ItemCodes) -> str:
    """How to come by codes without collisions, by where they come from."""
    if codes.provenance.get("kind") == "file":
        return (
            f"or give every item of {codes.provenance['file']} a code of its own; `itemtok inspect` of that file shows "
            "usage level by level"
        )
    return "or raise `codebook_size` or `levels`, so that codes are fitted anew"


def _refuse_too_many(codes: ItemCodes) -> None:
    if codes.num_items > codes.capacity:
        raise CollisionError(
            f"{codes.num_items:,} items cannot have a code each: {codes.num_levels} levels of {codes.sizes} codewords "
            f"spell only {codes.capacity:,} codes.\n"
            "  fix, in the recipe's `tokenizer` section: set `collisions: extra-level`, "
            f"or {_more_room(codes)}"
        )


def _unmoved(codes: ItemCodes, policy: str, **figures: int) -> ItemCodes:
    """Codes without collisions as they are; others need vectors, and are refused."""
    if not codes.is_injective:
        raise DataError(f"`collisions: {policy}` needs item vectors to tell which free code is nearest; was: none")
    return codes.with_provenance(collisions=_record(codes, policy) | {"items_moved": 0} | figures)


def _moved(
    codes: ItemCodes, table: np.ndarray, policy: str, latent: np.ndarray, codebooks: np.ndarray, **figures: int
) -> ItemCodes:
    """Codes with another table, and what the moves cost in their provenance."""
    record = _record(codes, policy) | {
        "items_moved": int((table != codes.table).any(axis=1).sum()),
        "squared_error_before": float(squared_errors(latent, codes.table, codebooks).mean()),
        "squared_error_after": float(squared_errors(latent, table, codebooks).mean()),
    }
    provenance = codes.provenance | {"collisions": record | figures}
    return ItemCodes(table, codes.sizes, names=codes.names, provenance=provenance)


def _all_but_nearest(groups: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Rows that do not have the smallest error of their group, smallest first; a tie goes to the first row."""
    order = np.lexsort((np.arange(len(groups)), errors))
    _, keepers = np.unique(groups[order], return_index=True)
    return np.delete(order, keepers)


def _position_in_group(groups: np.ndarray) -> np.ndarray:
    """For each row, how many earlier rows are in its group."""
    order = np.argsort(groups, kind="stable")
    counts = np.bincount(groups)
    starts = np.cumsum(counts) - counts
    positions = np.empty(len(groups), dtype=np.int64)
    positions[order] = np.arange(len(groups)) - starts[groups[order]]
    return positions


def _free_name(wanted: str, taken: Sequence[str]) -> str:
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name


def _record(codes: ItemCodes, policy: str) -> dict[str, float | int | str]:
    return {"policy": policy, "collision_rate_before": codes.collision_rate, "levels_before": codes.num_levels}

"""Codes for items that come to a catalogue whose codes are in use.

A new item takes the code that its vector reads off the codebooks; where another item has that one, the nearest free
code, by the rule of `collisions.reassign`. Nobody else moves, so a model that has learnt the codes stays as it is.

Decisions:
- Of several new items that read the same code off, the one that it describes best takes it, so their order in a file
  decides nothing but ties.
- A level that only counts within a code (`extra-level`) has no codebook: there a new item takes the lowest free number.
- Without a quantizer, codebooks are estimated from the vectors of the items that have codes. Codewords that no item
  uses take no part in reading a code off: nothing is known of what they would mean.

Shape letters in this file: N items with codes, M new ones, L levels, K codewords of the largest level, D dimensions of
a vector, H of a codeword.
"""

from typing import NamedTuple

import numpy as np
import torch

from llm_itemtok.errors import CollisionError, DataError
from llm_itemtok.items.base import Quantizer, check_vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.free_codes import FreeCodes, refuse_unfit, squared_errors, with_room
from llm_itemtok.items.residual import estimate_codebooks, nearest_codes, used_codewords


class Newcomers(NamedTuple):
    """Codes of old and new items."""

    codes: ItemCodes
    """N + M items, the old ones first and as they were."""
    displaced: np.ndarray
    """bool `[M]`, whether a new item has another code than its vector reads off, because an item had that one."""


class _Readings(NamedTuple):
    """What vectors say before anybody asks what is free."""

    latent: np.ndarray  # float32 [M, H]
    table: np.ndarray  # int64 [M, L]
    codebooks: np.ndarray  # float32 [L, K, H]
    levels: int  # that are read off; one more may count


def add_items(
    codes: ItemCodes, vectors: np.ndarray, *, quantizer: Quantizer | None = None, known: np.ndarray | None = None
) -> Newcomers:
    """Give new items codes.

    Args:
        codes: of N items, with unique rows.
        vectors: float `[M, D]` of the new items, from the source of the old ones' and in its units.
        quantizer: that gave the codes, with the same levels but for one that counts within a code.
        known: float `[N', D]`, vectors of old items, the first ones or all; needed, and read, only without a quantizer.

    Returns:
        Codes of the same sizes and names; the provenance records the items added under `added`.

    Raises:
        CollisionError: if there are more items than codes.
        DataError: if codes are in words, or codes, vectors and quantizer do not fit each other.
    """
    if codes.words is not None:
        raise DataError(
            "new items can be given item tokens only, but these items are named in words of the language model, and "
            "their tables were made of the whole catalogue; run the recipe again with the new items in its data"
        )
    if codes.num_items + len(vectors) > codes.capacity:
        raise CollisionError(
            f"{codes.num_items + len(vectors):,} items cannot have a code each: levels of {codes.sizes} codewords "
            f"spell only {codes.capacity:,} codes, of which {codes.capacity - codes.num_items:,} are free.\n"
            "  fix: add fewer items, or run the recipe again with more room in its `tokenizer` section "
            "(`codebook_size`, `levels`, `collisions: extra-level`)"
        )
    vectors = check_vectors(vectors)
    readings = _by_quantizer(codes, vectors, quantizer) if quantizer is not None else _estimated(codes, vectors, known)
    errors = squared_errors(readings.latent, readings.table, readings.codebooks)
    table = readings.table.copy()
    late = _too_late(codes, table, errors)
    settled = np.concatenate([codes.table, table[~late]])
    free = FreeCodes(ItemCodes(settled, codes.sizes), readings.codebooks, codes.num_items + len(table))
    rows = np.flatnonzero(late)
    for row in rows[np.argsort(errors[rows], kind="stable")]:
        table[row] = free.take_nearest(readings.latent[row], tuple(table[row].tolist()))
    displaced = (table != readings.table)[:, : readings.levels].any(axis=1)
    added = [*codes.provenance.get("added", []), {"items": len(table), "displaced": int(displaced.sum())}]
    provenance = codes.provenance | {"added": added}
    whole = ItemCodes(np.concatenate([codes.table, table]), codes.sizes, names=codes.names, provenance=provenance)
    return Newcomers(whole, displaced)


def _too_late(codes: ItemCodes, table: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Which new items must take another code than `table` has for them: bool `[M]`."""
    both = ItemCodes(np.concatenate([codes.table, table]), codes.sizes)
    groups = both.prefix_groups(both.num_levels)
    old, new = groups[: codes.num_items], groups[codes.num_items :]
    order = np.lexsort((np.arange(len(new)), errors))
    first = order[np.unique(new[order], return_index=True)[1]]
    late = np.ones(len(new), dtype=bool)
    late[first] = False
    return late | np.isin(new, old)


def _by_quantizer(codes: ItemCodes, vectors: np.ndarray, quantizer: Quantizer) -> _Readings:
    """Codes that a quantizer gives, and its codebooks, with one of nothing for a level that it does not know."""
    refuse_unfit(codes, quantizer)
    levels, counted = quantizer.num_levels, codes.num_levels - quantizer.num_levels
    width = quantizer.settings()["dimensions"]
    if vectors.shape[1] != width:
        raise DataError(
            f"vectors of new items must have the {width} dimensions of those that the codes were made of, was: "
            f"{vectors.shape[1]}; make them as the others were made"
        )
    x_MD = torch.from_numpy(vectors)
    with torch.no_grad():
        table = quantizer.encode(x_MD).numpy()
        latent, codebooks = quantizer.to_latent(x_MD).numpy(), quantizer.used_codebooks().numpy()
    more = ((0, 0), (0, counted))
    return _Readings(latent, np.pad(table, more), with_room(codebooks, codes.sizes), levels)


def _estimated(codes: ItemCodes, vectors: np.ndarray, known: np.ndarray | None) -> _Readings:
    """Codes by codebooks that are estimated from the items that have codes."""
    if known is None:
        raise DataError("codes without a quantizer need the vectors of the items that have them, was: none")
    known = check_vectors(known)
    if len(known) > codes.num_items or known.shape[1] != vectors.shape[1]:
        raise DataError(
            f"vectors of old and new items must be from one source, at most one an item, {codes.num_items:,} old ones, "
            f"was: {known.shape} and {vectors.shape}"
        )
    levels = codes.num_describing_levels
    codes_NL = torch.from_numpy(codes.table[: len(known), :levels].astype(np.int64))
    num_codewords = max(codes.sizes[:levels])
    codebooks = estimate_codebooks(torch.from_numpy(known), codes_NL, num_codewords)
    used = used_codewords(codes_NL, num_codewords)
    table, _ = nearest_codes(torch.from_numpy(vectors), codebooks, torch.where(used, 0.0, torch.inf))
    more = ((0, 0), (0, codes.num_levels - levels))
    return _Readings(vectors, np.pad(table.numpy(), more), with_room(codebooks.numpy(), codes.sizes), levels)

"""T1: a trie of ten million items: seconds to build, megabytes held, milliseconds to list the children of 320 beams.

Codes are distinct and random, 4 levels of 256. Building is measured from item codes in memory to the finished trie.
Memory is every array that the trie holds, with the leaf of each item, which only searches with item lists need. Lookups
are of 16 users x 20 beams at random nodes, at every depth but the root, in catalogues of 12 thousand items, a million,
and ten million: the slowest counts. It grows with the widest node, 64 children at 12 thousand items and all 256 at a
million, and from there on no more.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

from llm_itemtok.bench import subjects
from llm_itemtok.bench.measure import Result, at_most, cpu_seconds, one_thread
from llm_itemtok.bench.subjects import LEVELS
from llm_itemtok.bench.usual import DictTrie
from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.tree import TreeDecoder
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.vocab.trie import ItemTrie

USERS, BEAM, TOKENS = 16, 20, 80
SMALL, MEDIUM = 12_000, 1_000_000
TEXT_VOCABULARY = 8192


def trie(scale: int = 10_000_000, repeats: int = 3) -> Iterator[Result]:
    """T1, with `scale` items in the largest catalogue."""
    with one_thread():
        yield from _build(scale, repeats)
        yield from _lookup(scale)


def scattered_codes(num_items: int) -> ItemCodes:
    """Distinct codes without visible order: a one-to-one map of 32 bits, applied to 0, 1, 2, ..."""
    mixed = np.arange(num_items, dtype=np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # odd factors and shifts to the right can be undone
        mixed ^= mixed >> np.uint32(shift)
        mixed *= np.uint32(factor)
    mixed ^= mixed >> np.uint32(16)
    return ItemCodes(mixed[:, None].view(np.uint8), LEVELS)


def _build(scale: int, repeats: int) -> Iterator[Result]:
    codes, medium = scattered_codes(scale), scattered_codes(min(MEDIUM, scale))
    build, build_medium = cpu_seconds(partial(ItemTrie, codes), partial(ItemTrie, medium), repeats=repeats)
    usual = cpu_seconds(lambda: DictTrie(iter(medium.table.tolist())), repeats=1)[0]
    details = {
        "items": codes.num_items,
        "baseline_s": usual,
        "same_items_s": build_medium,
        "ratio_same_items": usual / build_medium,
    }
    baseline = f"a trie of dictionaries, {medium.num_items:,} items (`baseline_s`)"
    yield at_most("T1-build-s", build, 3, details, unit="s", baseline=baseline)
    built = ItemTrie(codes)
    held = {"items": codes.num_items, "without_item_leaves_mb": _megabytes(built)}
    built.leaves(torch.zeros(1, dtype=torch.long))
    yield at_most("T1-mb", _megabytes(built), 200, held, unit="MB")


def _lookup(scale: int) -> Iterator[Result]:
    slowest, searches = {}, []
    model = subjects.item_model(subjects.SMALL, scattered_codes(min(SMALL, scale)))
    prompts = subjects.prompts(model.vocab, USERS, TOKENS)
    for num_items in sorted({min(SMALL, scale), min(MEDIUM, scale), scale}):
        subject = ItemTrie(scattered_codes(num_items))
        calls = [_listing(subject, level) for level in range(1, len(LEVELS))]
        slowest[num_items] = 1000 * max(cpu_seconds(*calls, repeats=50))
        searches.append(partial(beam_search, TreeDecoder(model), subject, prompts, beam=BEAM))
    decode = cpu_seconds(*searches, repeats=3)
    small, medium = min(SMALL, scale), min(MEDIUM, scale)
    usual = 1000 * cpu_seconds(_usual_mask(scattered_codes(small)), repeats=3)[0]
    details = {
        "beams": USERS * BEAM,
        "slowest_ms": {f"{num_items:,} items": worst for num_items, worst in slowest.items()},
        "largest_over_medium": slowest[scale] / slowest[medium],
        "baseline_ms": usual,
        "ratio_same_items": usual / slowest[small],
        "decode_s": {f"{num_items:,} items": seconds for num_items, seconds in zip(slowest, decode, strict=True)},
        "decode_largest_over_smallest": decode[-1] / decode[0],
    }
    baseline = f"the prefix processor of `transformers`, {small:,} items (`baseline_ms`)"
    yield at_most("T1-lookup-ms", max(slowest.values()), 1, details, unit="ms", baseline=baseline)


def _listing(subject: ItemTrie, level: int) -> Callable[[], object]:
    """List the children of random nodes of one depth."""
    nodes = np.random.default_rng(0).integers(0, subject.num_nodes(level), size=(USERS, BEAM))
    return partial(subject.children, torch.from_numpy(nodes), level)


def _usual_mask(codes: ItemCodes) -> Callable[[], Tensor]:
    """What `generate` does to allow the children of random nodes one level down: a mask over the whole vocabulary."""
    paths = codes.table + TEXT_VOCABULARY + np.concatenate([[0], np.cumsum(LEVELS)[:-1]])
    tokens = DictTrie(iter(paths.tolist()))
    rows = np.random.default_rng(0).integers(0, codes.num_items, size=USERS * BEAM)
    begun = torch.from_numpy(paths[rows, :1])
    process = PrefixConstrainedLogitsProcessor(lambda _batch, ids: tokens.allowed(ids.tolist()), BEAM)
    scores = torch.zeros(USERS * BEAM, TEXT_VOCABULARY + sum(LEVELS))
    return partial(process.__call__, begun, scores)


def _megabytes(subject: ItemTrie) -> float:
    """Megabytes (10**6 bytes) of every array held."""
    return sum(array.nbytes for array in subject.arrays()) / 1e6

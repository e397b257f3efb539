"""Rankings of a tiny model; as a script, one process of several that share them."""

import sys
from pathlib import Path

import numpy as np
import torch

from llm_itemtok.data.splits import Cases
from llm_itemtok.evaluation.full_ranking import Ranking, rank_cases
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab.trie import ItemTrie
from tests.tiny import tiny_item_model

SIZES = (37, 8, 3, 1, 0)
"""Numbers of cases. In batches of 4, two processes get five batches each, one each, one and none, or none at all."""


def make_cases(number: int) -> Cases:
    """Cases over 60 items, with histories of no item to 14."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(0, 15, size=number)
    return Cases(
        users=tuple(f"u{case}" for case in range(number)),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        items=rng.integers(0, 60, size=lengths.sum()),
        targets=rng.integers(0, 60, size=number),
        ties=np.zeros(number, dtype=bool),
    )


def ranked(cases: Cases, **changes: object) -> Ranking:
    """Lists of 20 by a tiny model that reads 10 items, in batches of 4."""
    model, tokenizer = tiny_item_model()
    settings = {"beam": 20, "history_length": 10, "normaliser": "level", "batch_size": 4, **changes}
    return rank_cases(model, ItemTrie(model.vocab.codes), Prompts(tokenizer, model.vocab), cases, **settings)


if __name__ == "__main__":
    folder, place, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=place, world_size=processes
    )
    for size in SIZES:
        ranking = ranked(make_cases(size), mask_seen=size == 8)
        parts = {"items": ranking.items, "scores": ranking.scores, "ranks": ranking.ranks}
        np.savez(folder / f"{size}-{place}.npz", **parts)
    torch.distributed.destroy_process_group()

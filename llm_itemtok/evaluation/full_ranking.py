"""Rank the whole catalogue for every case with constrained beams.

Candidates are all items, none sampled. Cases are decoded in batches of similar length, each history encoded once. A
target outside the beam has rank 0: with a beam of 20 or more, every metric up to cutoff 20 is that of the beam's list.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llm_itemtok.data.splits import Cases
from llm_itemtok.decoding.beams import DecodeNormaliser, beam_search
from llm_itemtok.decoding.tree import TreeDecoder
from llm_itemtok.evaluation.metrics import ranks_from_lists
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab.trie import ItemTrie


@dataclass(frozen=True)
class Ranking:
    """The lists of all cases, in the order of the cases.

    Attributes:
        items: int64 `[C, K]`, item rows, best first, -1 where a list is shorter.
        scores: float32 `[C, K]`, log-probabilities under the decoding normaliser.
        ranks: float64 `[C]`, rank of each target, 0 where it is not in the list.
    """

    items: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray


def rank_cases(
    model: ItemTokenModel,
    trie: ItemTrie,
    prompts: Prompts,
    cases: Cases,
    *,
    beam: int,
    history_length: int,
    normaliser: DecodeNormaliser,
    mask_seen: bool = False,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Decode every case and find its target.

    Args:
        model: put into evaluation mode here, and left in it.
        trie: of the model's current codes.
        prompts: of the model's current vocabulary.
        cases: histories and targets.
        beam: beams kept; the length of the lists.
        history_length: most recent items that the model reads.
        normaliser: of the item scores, see `decoding.beams`.
        mask_seen: leave out items of the user's whole history (never the target itself).
        batch_size: users a batch.
        progress: called with (cases done, cases).
    """
    model.eval()
    histories = cases.histories()
    order = np.argsort([len(history) for history in histories], kind="stable")
    width = min(beam, trie.num_items)
    items = np.full((len(cases), width), -1, dtype=np.int64)
    scores = np.full((len(cases), width), -np.inf, dtype=np.float32)
    decoder = TreeDecoder(model)
    trie.to(model.device)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        seen = [np.setdiff1d(histories[case], cases.targets[case]) for case in chosen] if mask_seen else None
        beams = beam_search(
            decoder,
            trie,
            [prompts.history(histories[case][-history_length:]) for case in chosen],
            beam=width,
            normaliser=normaliser,
            excluded=seen,
        )
        items[chosen], scores[chosen] = beams.items, beams.scores
        if progress is not None:
            progress(start + len(chosen), len(order))
    return Ranking(items, scores, ranks_from_lists(items, scores, cases.targets))

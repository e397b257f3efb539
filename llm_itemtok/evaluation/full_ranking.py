"""Rank the whole catalogue for every case with constrained beams.

Candidates are all items, none sampled. Cases are decoded in batches of similar length, each history encoded once. A
target outside the beam has rank 0: with a beam of 20 or more, every metric up to cutoff 20 is that of the beam's list.

Where `torch.distributed` runs, its processes share the work, and each gets all lists in the end. They share out whole
batches, dealt like cards: which cases are decoded together decides the last digits of their scores, and that must not
depend on the number of processes. Neighbouring batches cost about the same, so the shares do, too.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_itemtok.data.splits import Cases
from llm_itemtok.decoding.beams import Beams, beam_search
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.evaluation.metrics import ranks_from_lists
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import Normaliser
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.processes import added_up, dealt, place_among
from llm_itemtok.vocab.trie import ItemTrie

Search = Callable[[Sequence[np.ndarray], Sequence[np.ndarray] | None], Beams]
"""Finds the best items after each of some histories (arrays of catalogue rows), none of those that are excluded."""


@dataclass(frozen=True)
class Ranking:
    """The lists of all cases, in the order of the cases.

    Attributes:
        items: int64 `[C, K]`, catalogue rows, best first, -1 where a list is shorter.
        scores: float32 `[C, K]`, log-probabilities under the decoding normaliser, or means of them over several models.
        ranks: float64 `[C]`, rank of each target, 0 where it is not in the list.
        model_seconds: how long this process was inside the model, body and head; None where several models answer, and
            on an accelerator, which works on while the process goes ahead, so that only waiting for it would tell.
        decoder: how the beams of a user were decoded: `tree` or `encoder-decoder tree` in one row, `replicated`, or
            `recursive`; of several models each way once, joined by `+`.
    """

    items: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    model_seconds: float | None
    decoder: str


def rank_cases(
    model: ItemTokenModel,
    trie: ItemTrie,
    prompts: Prompts,
    cases: Cases,
    *,
    beam: int,
    history_length: int,
    normaliser: Normaliser,
    mask_seen: bool = False,
    repeats: bool = True,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Decode every case and find its target.

    Where a process group runs, every one of its processes must call this, with the same model and the same cases; one
    that calls it alone waits for the others. On machines of one kind the result is then that of one process, to the
    last digit; with another `batch_size` scores may differ by rounding, some 1e-5.

    Args:
        model: put into evaluation mode here, and left in it.
        trie: of the model's current codes.
        prompts: of the model's current vocabulary.
        cases: histories and targets.
        beam: beams kept; the length of the lists.
        history_length: most recent items that the model reads.
        normaliser: of the item scores, see `decoding.beams`.
        mask_seen: leave out items of the user's whole history (never the target itself).
        repeats: whether items of the history may come out; if not, a target among them is not found.
        batch_size: users a batch.
        progress: called with (cases done by all processes, cases).

    Returns:
        All lists, on every process.
    """
    model.eval()
    decoder = decoder_for(model)
    trie.to(model.device)

    def search(histories: Sequence[np.ndarray], excluded: Sequence[np.ndarray] | None) -> Beams:
        read = [prompts.history(history[-history_length:]) for history in histories]
        return beam_search(decoder, trie, read, beam=width, normaliser=normaliser, excluded=excluded)

    width = min(beam, trie.num_items)
    with _clocked(model) as calls:
        items, scores = best_lists(
            search,
            cases,
            width=width,
            mask_seen=mask_seen,
            repeats=repeats,
            batch_size=batch_size,
            device=model.device,
            progress=progress,
        )
    ranks = ranks_from_lists(items, scores, cases.targets)
    return Ranking(items, scores, ranks, sum(calls) if model.device.type == "cpu" else None, decoder.name)


def best_lists(
    search: Search,
    cases: Cases,
    *,
    width: int,
    mask_seen: bool,
    repeats: bool,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Search for every case, in batches of like length, shared out among the processes.

    Args:
        search: finds `width` items after each of the histories, none of those excluded.
        cases: as in `rank_cases`.
        width: length of the lists.
        mask_seen: as in `rank_cases`.
        repeats: the same.
        batch_size: the same.
        device: by which processes tell each other what they found.
        progress: as in `rank_cases`.

    Returns:
        Items int64 and scores float32, `[C, width]`, of all cases on every process.
    """
    histories = cases.histories()
    order = np.argsort([len(history) for history in histories], kind="stable")
    items = np.zeros((len(cases), width), dtype=np.int64)
    scores = np.zeros((len(cases), width), dtype=np.float32)
    _, processes = place_among()
    for number, chosen in enumerate(dealt(order, batch_size), start=1):
        of_batch = [histories[case] for case in chosen]
        beams = search(of_batch, left_out(of_batch, cases.targets[chosen], mask_seen=mask_seen, repeats=repeats))
        items[chosen], scores[chosen] = beams.items, beams.scores
        if progress is not None:
            progress(min(number * processes * batch_size, len(order)), len(order))
    return added_up(items, device), added_up(scores, device)


def left_out(
    histories: Sequence[np.ndarray], targets: np.ndarray, *, mask_seen: bool, repeats: bool
) -> list[np.ndarray] | None:
    """Items that must not come out after each history, when a model is measured.

    Args:
        histories: B arrays of catalogue rows.
        targets: int64 `[B]`.
        mask_seen: as in `rank_cases`.
        repeats: the same; it goes before, for who knows that nobody returns knows it of the target, too.

    Returns:
        B arrays of catalogue rows; None where everything may come out.
    """
    if not repeats:
        return list(histories)
    if not mask_seen:
        return None
    return [history[history != target] for history, target in zip(histories, targets, strict=True)]


@contextmanager
def _clocked(model: ItemTokenModel) -> Iterator[list[float]]:
    """Collect the seconds of each call of the model's body and head, by putting a clock before both for the while."""
    took: list[float] = []

    def clocked(part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            answer = part(*args, **kwargs)
            took.append(time.perf_counter() - began)
            return answer

        return call

    parts = {name: clocked(getattr(model, name)) for name in ("read", "hidden", "level_log_probs")}
    vars(model).update(parts)
    try:
        yield took
    finally:
        for name in parts:
            del vars(model)[name]

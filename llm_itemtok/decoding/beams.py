"""Beam search over the trie: the best items for a history, only legal ones, each once.

Works on any `BeamDecoder`. At every level the K beams are extended by the legal children of their trie nodes alone, so
an item that does not exist cannot come out, and top-k runs over K x children instead of K x vocabulary. With no more
legal paths than beams, the search is exact; a search as wide as the catalogue ranks as exhaustive scoring does.

Lists of what may or may not come out for a user leave the trie as it is: the items under a node are one range of
leaves, so the listed ones among them are counted by looking the range's ends up in the sorted list. That takes time by
the length of the lists, not by the size of the catalogue.

Identifiers in existing words end at unlike levels. Those that have ended hold no beam: as `generate` does it, they go
to a list of their own, if they are among the K best continuations of their level, and the beams go on without them.

The loop never waits for an accelerator: nothing in it depends on a value that is computed there.

Shape letters: B users, K beams, C widest node, H listed items of all users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.decoding.tree import BeamDecoder
from llm_itemtok.errors import DataError
from llm_itemtok.model.likelihood import Normaliser, PlainNormaliser
from llm_itemtok.vocab.trie import ItemTrie

State = TypeVar("State")

_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Beams:
    """Ranked items of B users.

    Attributes:
        items: int64 `[B, K]`, catalogue rows, best first; -1 where fewer than K items are left.
        scores: float32 `[B, K]`, log-probability of the item under the stated normaliser; -inf where there is none.
    """

    items: np.ndarray
    scores: np.ndarray


@torch.inference_mode()
def beam_search(
    decoder: BeamDecoder[State],
    trie: ItemTrie,
    prompts: Sequence[np.ndarray],
    *,
    beam: int,
    normaliser: Normaliser = "level",
    allowed: Sequence[np.ndarray | None] | None = None,
    excluded: Sequence[np.ndarray | None] | None = None,
) -> Beams:
    """Find the `beam` most probable items for each prompt.

    Args:
        decoder: the model behind the decoding interface.
        trie: the legal codes, on the model's device.
        prompts: B arrays of token ids.
        beam: beams kept at every level; at least 1. With no more allowed items than beams the search is exact.
        normaliser: as in training, or `children`: renormalised over the legal children of each prefix, whatever a user
            is allowed.
        allowed: catalogue rows that may come out, one array per user, None where all may; nothing comes out of an
            empty one.
        excluded: catalogue rows that may not come out, such as items already seen, one array per user or None. Counts
            for more than `allowed`. As many others come out as there are, up to `beam`.

    Returns:
        Lists of `beam` items, or of the whole catalogue where that has fewer.

    Raises:
        DataError: if `beam` is below 1, or a list is not of catalogue rows of the catalogue.
    """
    if beam < 1:
        raise DataError(f"`beam` must be at least 1, was: {beam}")
    width = min(beam, trie.num_items)
    lists = _read_lists(trie, len(prompts), allowed, excluded)
    longest = trie.num_items if lists is None else lists.longest
    if longest == 0:
        return Beams(np.full((len(prompts), width), -1), np.full((len(prompts), width), -np.inf, dtype=np.float32))
    state = decoder.encode(prompts)
    nodes = torch.zeros(len(prompts), 1, dtype=torch.long, device=trie.device)
    scores = torch.zeros(len(prompts), 1, device=trie.device)
    parents: Tensor | None = None
    codes: Tensor | None = None
    finished: _Finished | None = None
    for level in range(trie.num_levels):
        model_normaliser: PlainNormaliser = "level" if normaliser == "children" else normaliser
        log_probs = decoder.level_log_probs(state, parents, codes, level, model_normaliser)
        children, child_codes, legal = trie.children(nodes, level)
        steps = log_probs.gather(2, child_codes)
        if normaliser == "children":
            steps -= torch.where(legal, steps, -torch.inf).logsumexp(-1, keepdim=True)
        if lists is not None:
            legal = legal & lists.leave_open(trie, children, level + 1)
        candidates = torch.where(legal, steps + scores.unsqueeze(-1), -torch.inf).flatten(1)
        keep = min(beam, candidates.shape[1], trie.num_nodes(level + 1), longest)
        if trie.ended is not None:
            ended = trie.ended[level][children].flatten(1)
            leaves = trie.leaf_span(children, level + 1)[0].flatten(1)
            finished, candidates = _finish(finished, candidates, ended, leaves, keep, width)
        scores, chosen = candidates.topk(keep, dim=1)
        parents = chosen // children.shape[2]
        nodes = children.flatten(1).gather(1, chosen)
        codes = child_codes.flatten(1).gather(1, chosen)
    if finished is not None:
        nodes, scores = finished.leaves, finished.scores
    items, found = trie.items(nodes).masked_fill(scores == -torch.inf, -1).cpu().numpy(), scores.cpu().numpy()
    if items.shape[1] < width:
        missing = ((0, 0), (0, width - items.shape[1]))
        items, found = np.pad(items, missing, constant_values=-1), np.pad(found, missing, constant_values=-np.inf)
    return Beams(items, found)


@dataclass(frozen=True)
class _Finished:
    """Items of B users that have ended.

    Attributes:
        leaves: int64 `[B, n]`, leaves of the trie, best first.
        scores: float32 `[B, n]`; -inf where there is none.
    """

    leaves: Tensor
    scores: Tensor


def _finish(
    before: _Finished | None, candidates: Tensor, ended: Tensor, leaves: Tensor, keep: int, most: int
) -> tuple[_Finished, Tensor]:
    """Take the items that end out of the beams.

    Args:
        before: the items that ended at the levels before, if there were any.
        candidates: float32 `[B, K * C]`, the score of each continuation.
        ended: bool `[B, K * C]`, whether the item of a continuation ends with it.
        leaves: int64 `[B, K * C]`, the first leaf under each continuation: its item, where that ends.
        keep: how many of the continuations may end: the best ones.
        most: how many items that have ended are kept.

    Returns:
        The best items that have ended so far, and the continuations that go on; -inf where they do not.
    """
    best, places = candidates.topk(keep, dim=1)
    scores, ends = torch.where(ended.gather(1, places), best, -torch.inf), leaves.gather(1, places)
    if before is not None:
        scores, ends = torch.cat([before.scores, scores], dim=1), torch.cat([before.leaves, ends], dim=1)
    scores, places = scores.topk(min(most, scores.shape[1]), dim=1)
    ends = ends.gather(1, places)
    return _Finished(ends, scores), candidates.masked_fill(ended, -torch.inf)


@dataclass(frozen=True)
class _Listed:
    """One list of leaves for each of B users; users with the same list share it.

    Attributes:
        leaves: int64 `[H]`, leaves of all lists, sorted; the list's number times the number of items is added to each.
        offsets: int64 `[B, 1, 1]`: what was added in each user's list.
    """

    leaves: Tensor
    offsets: Tensor

    def between(self, first: Tensor, after: Tensor) -> Tensor:
        """Count the listed leaves in each range of leaves, int64 `[B, K, C]`."""
        below = torch.searchsorted(self.leaves, after + self.offsets)
        return below.sub_(torch.searchsorted(self.leaves, first + self.offsets))


@dataclass(frozen=True)
class _Lists:
    """What may come out for each of B users.

    Attributes:
        allowed: None where no user has such a list.
        has_allowed: bool `[B, 1, 1]`: whether the user has such a list.
        excluded: each item once, and where there is a list of allowed ones, only items of that; None where there are
            none at all.
        longest: the most items that may come out for one user.
    """

    allowed: _Listed | None
    has_allowed: Tensor
    excluded: _Listed | None
    longest: int

    def leave_open(self, trie: ItemTrie, nodes: Tensor, depth: int) -> Tensor:
        """Whether an item that may come out is under each node `[B, K, C]` of a depth, bool `[B, K, C]`.

        Other nodes must not hold a beam at any level: they would come to nothing, and the list would end short.
        """
        first, after = trie.leaf_span(nodes, depth)
        left = after - first
        if self.allowed is not None:
            left = torch.where(self.has_allowed, self.allowed.between(first, after), left)
        if self.excluded is not None:
            left = left - self.excluded.between(first, after)
        return left > 0


def _read_lists(
    trie: ItemTrie,
    users: int,
    allowed: Sequence[np.ndarray | None] | None,
    excluded: Sequence[np.ndarray | None] | None,
) -> _Lists | None:
    """Check and file the lists; None where nobody has any."""
    may = _tidy("allowed", allowed, users, trie.num_items)
    may_not = list(map(_that_count, _tidy("excluded", excluded, users, trie.num_items), may))
    has_allowed = [listed is not None for listed in may]
    if not any(has_allowed) and not any(map(len, may_not)):
        return None
    most = [trie.num_items if listed is None else len(listed) for listed in may]
    return _Lists(
        _file(trie, [_NOTHING if listed is None else listed for listed in may]) if any(has_allowed) else None,
        torch.tensor(has_allowed, device=trie.device).view(-1, 1, 1),
        _file(trie, may_not) if any(map(len, may_not)) else None,
        max(count - len(banned) for count, banned in zip(most, may_not, strict=True)),
    )


def _tidy(
    name: str, lists: Sequence[np.ndarray | None] | None, users: int, num_items: int
) -> Sequence[np.ndarray | None]:
    """Check lists of catalogue rows and sort them, each row once; an array that is given twice is read once."""
    if lists is None:
        return [None] * users
    if len(lists) != users:
        raise DataError(f"`{name}` must have one list per prompt, {users}, was: {len(lists)}")
    tidy: dict[int, np.ndarray] = {}
    for rows in lists:
        if rows is not None and id(rows) not in tidy:
            if len(rows) and not np.issubdtype(np.asarray(rows).dtype, np.integer):
                raise DataError(f"`{name}` must hold catalogue rows, whole numbers, was: {np.asarray(rows).dtype}")
            ordered = np.sort(np.asarray(rows, dtype=np.int64))  # `np.unique` takes 15 times as long for a million
            tidy[id(rows)] = ordered = ordered[np.diff(ordered, prepend=np.iinfo(np.int64).min) != 0]
            if len(ordered) and (ordered[0] < 0 or ordered[-1] >= num_items):
                raise DataError(
                    f"`{name}` must hold catalogue rows in [0, {num_items}), was: {ordered[0]} to {ordered[-1]}"
                )
    return [None if rows is None else tidy[id(rows)] for rows in lists]


def _that_count(banned: np.ndarray | None, listed: np.ndarray | None) -> np.ndarray:
    """Excluded rows among the allowed ones, both sorted; takes time by the logarithm of the number of allowed ones."""
    if banned is None:
        return _NOTHING
    if listed is None:
        return banned
    places = np.searchsorted(listed, banned)
    inside = places < len(listed)
    inside[inside] = listed[places[inside]] == banned[inside]
    return banned[inside]


def _file(trie: ItemTrie, lists: Sequence[np.ndarray]) -> _Listed:
    """Turn tidy catalogue rows into leaves that are looked up in one sorted array, the same array of two users once."""
    distinct = {id(rows): rows for rows in lists}
    numbers = {each: number for number, each in enumerate(distinct)}
    owners = np.repeat(np.arange(len(distinct)), [len(rows) for rows in distinct.values()])
    rows = torch.from_numpy(np.concatenate(list(distinct.values()))).to(trie.device)
    leaves = trie.leaves(rows).add_(torch.from_numpy(owners).to(trie.device), alpha=trie.num_items)
    # On a CPU numpy sorts many times faster.
    ordered = torch.from_numpy(np.sort(leaves.numpy())) if leaves.device.type == "cpu" else leaves.sort().values
    offsets = torch.tensor([numbers[id(rows)] for rows in lists], device=trie.device).mul_(trie.num_items)
    return _Listed(ordered, offsets.view(-1, 1, 1))

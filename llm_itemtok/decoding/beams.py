"""Beam search over the trie: the best items for a history, only legal ones, each once.

Works on any `BeamDecoder`. At every level the K beams are extended by the legal children of their trie nodes alone, so
an item that does not exist cannot come out, and top-k runs over K x children instead of K x vocabulary. With no more
legal paths than beams, the search is exact; a search as wide as the catalogue ranks as exhaustive scoring does.

Shape letters: B users, K beams, C widest node, H history items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.decoding.tree import BeamDecoder
from llm_itemtok.model.item_lm import Normaliser
from llm_itemtok.vocab.trie import ItemTrie

State = TypeVar("State")

DecodeNormaliser = Literal["level", "items", "vocab", "children"]


@dataclass(frozen=True)
class Beams:
    """Ranked items of B users.

    Attributes:
        items: int64 `[B, K]`, item rows, best first; -1 where fewer than K items are left.
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
    normaliser: DecodeNormaliser = "level",
    excluded: Sequence[np.ndarray] | None = None,
) -> Beams:
    """Find the `beam` most probable items for each prompt.

    Args:
        decoder: the model behind the decoding interface.
        trie: the legal codes, on the model's device.
        prompts: B arrays of token ids.
        beam: beams kept at every level; at least 1.
        normaliser: as in training, or `children`: renormalised over the legal children of each prefix.
        excluded: item rows that may not come out, one array per user, such as items already seen. As many others come
            out as there are, up to `beam`.
    """
    state = decoder.encode(prompts)
    device = trie.leaf_items.device
    banned = None if excluded is None else _leaves(trie, excluded)
    nodes = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
    scores = torch.zeros(len(prompts), 1, device=device)
    parents: Tensor | None = None
    codes: Tensor | None = None
    for level in range(trie.num_levels):
        model_normaliser: Normaliser = "level" if normaliser == "children" else normaliser
        log_probs = decoder.level_log_probs(state, parents, codes, level, model_normaliser)
        children, child_codes, legal = trie.children(nodes, level)
        steps = log_probs.gather(2, child_codes).masked_fill(~legal, -torch.inf)
        if normaliser == "children":
            steps = steps - steps.logsumexp(-1, keepdim=True)
        candidates = scores.unsqueeze(-1) + steps
        if banned is not None:
            candidates = candidates.masked_fill(_used_up(trie, children, level, banned), -torch.inf)
        flat = candidates.flatten(1)
        keep = min(beam, flat.shape[1], len(trie.child_codes[level]))
        scores, chosen = flat.topk(keep, dim=1)
        parents = chosen // children.shape[2]
        nodes = children.flatten(1).gather(1, chosen)
        codes = child_codes.flatten(1).gather(1, chosen)
    items = trie.leaf_items[nodes].masked_fill(scores == -torch.inf, -1)
    return Beams(items.cpu().numpy(), scores.float().cpu().numpy())


def _leaves(trie: ItemTrie, rows: Sequence[np.ndarray]) -> Tensor:
    """Leaves `[B, H]` of item rows, sorted, each once, filled up with a number beyond the last leaf."""
    leaves = [trie.item_leaves[torch.from_numpy(np.unique(np.asarray(row, dtype=np.int64)))] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(
        [each.sort().values for each in leaves], batch_first=True, padding_value=trie.num_items
    )


def _used_up(trie: ItemTrie, nodes: Tensor, level: int, banned: Tensor) -> Tensor:
    """Whether all items under each node `[B, K, C]` at depth `level + 1` are among the banned leaves `[B, H]`.

    Such nodes must not hold a beam at any level: they would come to nothing, and the list would end short.
    """
    first, after = trie.first_leaves[level][nodes], trie.first_leaves[level][nodes + 1]
    below = torch.searchsorted(banned, after.flatten(1)) - torch.searchsorted(banned, first.flatten(1))
    return below.reshape(nodes.shape) == after - first

"""Over what an item token's probability is normalised, and the negative log-likelihood of items' tokens.

At level `l`, `level` is the softmax over the codewords of that level, `items` over all item tokens, `vocab` over the
whole extended vocabulary, as plain `generate` has it, `children` over the codewords that go on towards an item from the
tokens before. Text tokens always use `vocab`, and so do identifiers in words of the existing vocabulary, which have no
item tokens and no rows.

Without `children` a model must learn which codewords go on towards an item at all: a third one is nearly given by the
two before it. With it, that is known, and the probabilities of all items sum to 1. IntRR's released code decodes that
way (arXiv:2602.20704); training that way is ours.

Shape letters: n items, L levels, K codewords of a level.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.vocab.trie import ItemTrie

PlainNormaliser = Literal["level", "items", "vocab"]
"""Those that do not ask for the tokens before."""
Normaliser = Literal[PlainNormaliser, "children"]


class OfCodes:
    """What follows from a code table, on a device: made when first asked for, and anew after an update."""

    def __init__(self) -> None:
        self._table: tuple[ItemCodes, Tensor] | None = None
        self._trie: tuple[ItemCodes, ItemTrie] | None = None

    def table(self, codes: ItemCodes, device: torch.device) -> Tensor:
        """The codes, int64 `[N, L]`."""
        if self._table is None or self._table[0] is not codes or self._table[1].device != device:
            self._table = codes, torch.from_numpy(codes.table.astype("int64")).to(device)
        return self._table[1]

    def trie(self, codes: ItemCodes, device: torch.device) -> ItemTrie:
        """Their tree."""
        if self._trie is None or self._trie[0] is not codes or self._trie[1].device != device:
            self._trie = codes, ItemTrie(codes).to(device)
        return self._trie[1]


def items_nll(
    logits: Sequence[Tensor], codes: Tensor, *, trie: ItemTrie | None = None, smoothing: float = 0.0
) -> Tensor:
    """Negative log-likelihood of every token of items.

    Args:
        logits: L times `[n, K]`, given the tokens before.
        codes: int64 `[n, L]`, of items; with a trie, of such that it has.
        trie: of all items, on their device, to normalise over the children of each prefix; None to normalise over the
            level.
        smoothing: in `[0, 1)`, share of the target spread evenly over what a token is normalised over.

    Returns:
        float32 `[n, L]`, in nats; 0 where a prefix has one child.
    """
    if trie is None:
        each = [
            F.cross_entropy(scores.float(), codes[:, level], reduction="none", label_smoothing=smoothing)
            for level, scores in enumerate(logits)
        ]
        return torch.stack(each, dim=1)
    each, nodes = [], torch.zeros_like(codes[:, 0])
    for level, scores in enumerate(logits):
        children, words, legal = trie.children(nodes, level)
        log_probs = scores.float().gather(1, words).masked_fill(~legal, -torch.inf).log_softmax(1)
        at = trie.place_of(words, legal, codes[:, level])
        own = -log_probs.gather(1, at).squeeze(1)
        if smoothing:
            spread = -log_probs.masked_fill(~legal, 0).sum(1) / legal.sum(1)
            own = (1 - smoothing) * own + smoothing * spread
        each.append(own)
        nodes = children.gather(1, at).squeeze(1)
    return torch.stack(each, dim=1)

"""Beams inside the recursive network: the backbone reads a history once, whatever the number of levels and beams.

An implementation of the decoding interface (`BeamDecoder`). A beam is its last codeword and nothing else: the
network goes by the codeword of the level before and by the backbone's state (`model/recursive.py`). So there is no
cache to extend, parents do not matter, and what can be scored at a level has no more forms than the level before has
codewords, however many items there are.

Shape letters: B users, K beams, n items, D model width, V codewords of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.decoding.padding import padded
from llm_itemtok.errors import ItemTokError
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import PlainNormaliser
from llm_itemtok.vocab.trie import ItemTrie


@dataclass(frozen=True)
class RecursiveState:
    """What is known of B users.

    Attributes:
        last: float32 `[B, D]`, the backbone's states after the prompts.
    """

    last: Tensor


class RecursiveDecoder:
    """Beams over an `ItemTokenModel` with a recursive network."""

    name = "recursive"

    def __init__(self, model: ItemTokenModel) -> None:
        """Decode with `model`, which should be in evaluation mode."""
        assert model.recursion is not None
        self.model = model
        self.recursion = model.recursion

    def encode(self, prompts: Sequence[np.ndarray]) -> RecursiveState:
        """Read B prompts, in one call of the backbone."""
        model = self.model
        ids, lengths = (part.to(model.device) for part in padded(prompts))
        if model.answer_start is None:
            states = model.hidden(ids, use_cache=False).last_hidden_state
            return RecursiveState(states[torch.arange(len(ids), device=ids.device), lengths - 1].float())
        seen = (torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)).long()
        start = torch.full_like(ids[:, :1], model.answer_start)
        read = model.read(ids, seen)
        states = model.hidden(
            start, use_cache=False, encoder_hidden_states=read, encoder_attention_mask=seen
        ).last_hidden_state
        return RecursiveState(states[:, 0].float())

    def level_log_probs(
        self,
        state: RecursiveState,
        parents: Tensor | None,
        codes: Tensor | None,
        level: int,
        normaliser: PlainNormaliser,
    ) -> Tensor:
        """The next level's log-probabilities of the chosen beams (see `BeamDecoder`).

        Raises:
            ItemTokError: for a normaliser other than `level`: the network has no other scores.
        """
        if normaliser != "level":
            raise ItemTokError(f"a recursive model is normalised over `level` or `children`, was: {normaliser}")
        return self._logits(state.last.unsqueeze(1), codes, level).log_softmax(-1)

    def _logits(self, states: Tensor, codes: Tensor | None, level: int) -> Tensor:
        """Logits float32 `[..., V]` after states `[..., D]` (or `[..., 1, D]`) and codewords of the level before."""
        codebooks = self.model.codebooks()
        before = None if codes is None else codebooks[level - 1][codes]
        states = states.to(codebooks[level].dtype)  # bfloat16 where weights are sharded and trained so
        return (self.recursion.query(level, states, before) @ codebooks[level].T).float()

    def score(self, state: Tensor, items: np.ndarray, trie: ItemTrie | None) -> Tensor:
        """Exact log-probabilities of items after one history.

        Args:
            state: `[D]`.
            items: int64 `[n]`, catalogue rows.
            trie: to normalise over the children of each prefix; None to normalise over the level.

        Returns:
            float32 `[n]`.
        """
        codes = self.model.codes_of(torch.from_numpy(items).to(state.device))
        total = torch.zeros(len(items), device=state.device)
        nodes = torch.zeros(len(items), dtype=torch.long, device=state.device)
        for level in range(codes.shape[1]):
            own = codes[:, level]
            if level == 0:
                rows, logits = torch.zeros_like(own), self._logits(state.unsqueeze(0), None, 0)
            else:
                known, rows = codes[:, level - 1].unique(return_inverse=True)
                logits = self._logits(state.unsqueeze(0), known, level)
            if trie is None:
                total += logits.log_softmax(-1)[rows, own]
                continue
            places, at = nodes.unique(return_inverse=True)
            children, child_codes, legal = trie.children(places, level)
            one = torch.zeros_like(places).scatter(0, at, torch.arange(len(at), device=at.device))  # any item under it
            under = logits[rows[one]].gather(1, child_codes).masked_fill(~legal, -torch.inf)
            total += logits[rows, own] - under.logsumexp(1)[at]
            nodes = children[at].gather(1, trie.place_of(child_codes[at], legal[at], own)).squeeze(1)
        return total

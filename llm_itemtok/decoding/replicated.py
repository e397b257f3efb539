"""Beams as rows of their own: for models whose attention takes 2-D masks only.

What plain `generate` does, less its waste: the histories are encoded once, not once a beam, the last codeword is never
fed, and of the cache only what differs between a user's beams is put in the order of the new beams. What remains is
what a cache of rows costs: every beam holds a copy of the history.

Prompts are padded on the left, so that places in the cache differ as position ids do. Sliding windows and ALiBi, which
go by either, then need no help.

Shape letters: B users, K beams, S prompt positions, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import PlainNormaliser


@dataclass
class ReplicatedState:
    """What is known of B users between two levels.

    Attributes:
        cache: keys and values, of B rows after the prompts, then of B * K.
        seen: int64 `[B, positions]`: 1 where a position is not padding.
        lengths: int64 `[B]`, prompt lengths.
        last: `[B, D]`, the state after the prompt.
        num_beams: rows a user in the cache.
    """

    cache: DynamicCache
    seen: Tensor
    lengths: Tensor
    last: Tensor
    num_beams: int = 1


class ReplicatedDecoder:
    """Beams over an `ItemTokenModel` of any supported family and any attention implementation."""

    name = "replicated"

    def __init__(self, model: ItemTokenModel) -> None:
        """Decode with `model`, which should be in evaluation mode."""
        self.model = model

    def encode(self, prompts: Sequence[np.ndarray]) -> ReplicatedState:
        """Encode B prompts of token ids, left-padded into one batch."""
        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        places = torch.arange(width) - (width - lengths).unsqueeze(1)
        seen, lengths = (places >= 0).long().to(device), lengths.to(device)
        # A cache built from the configuration would crop the history of sliding-window layers.
        cache = DynamicCache()
        hidden = self.model.hidden(
            input_ids.to(device),
            attention_mask=seen,
            position_ids=places.clamp(min=0).to(device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return ReplicatedState(cache, seen, lengths, hidden[:, -1])

    def level_log_probs(
        self,
        state: ReplicatedState,
        parents: Tensor | None,
        codes: Tensor | None,
        level: int,
        normaliser: PlainNormaliser,
    ) -> Tensor:
        """Feed the chosen beams, if any, and return the next level's log-probabilities (see `BeamDecoder`)."""
        if parents is None or codes is None:
            return self.model.level_log_probs(state.last.unsqueeze(1), level, normaliser)
        num_users, num_beams = codes.shape
        _follow(state, parents, history=state.seen.shape[1] - (level - 1))
        state.seen = torch.cat([state.seen, torch.ones_like(state.seen[:, :1])], dim=1)
        hidden = self.model.hidden(
            self.model.vocab.token_ids(codes, level - 1).view(-1, 1),
            attention_mask=state.seen.repeat_interleave(num_beams, dim=0),
            position_ids=(state.lengths + level - 1).repeat_interleave(num_beams).unsqueeze(1),
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.level_log_probs(hidden.view(num_users, num_beams, -1), level, normaliser)


def _follow(state: ReplicatedState, parents: Tensor, history: int) -> None:
    """Make the rows of the cache those of `parents` `[B, K]`; the first `history` positions are alike for a user."""
    users = torch.arange(parents.shape[0], device=parents.device).unsqueeze(1)
    rows = (users * state.num_beams + parents).flatten()
    same_number = parents.shape[1] == state.num_beams
    state.num_beams = parents.shape[1]
    for layer in state.cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        if same_number:
            layer.keys[:, :, history:] = layer.keys[rows, :, history:]
            layer.values[:, :, history:] = layer.values[rows, :, history:]
        else:
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)

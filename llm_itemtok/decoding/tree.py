"""Beams as a tree in one row.

`generate` repeats every history K times before it reads it. Here the B histories are encoded once; the K beams of a
user are fed as K more positions *of the same row*. A 4-D mask lets each beam see the history and its own ancestors
only, and position ids say that the K positions are alternatives for the same place. Nothing is replicated, re-ordered
or re-written, and the modules of `transformers` run unmodified.

This is the decoder-only implementation of the decoding interface (`BeamDecoder`): `encode(histories)` begins a state,
`level_log_probs(state, ...)` extends it by one level.

Shape letters: B users, K beams, S prompt positions, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from llm_itemtok.decoding.masks import attention_masks
from llm_itemtok.model.item_lm import ItemTokenModel, Normaliser

State = TypeVar("State")


class BeamDecoder(Protocol[State]):
    """What beam search needs of a model, whatever its family."""

    def encode(self, prompts: Sequence[np.ndarray]) -> State:
        """Read B prompts (token ids) once."""
        ...

    def level_log_probs(
        self, state: State, parents: Tensor | None, codes: Tensor | None, level: int, normaliser: Normaliser
    ) -> Tensor:
        """Log-probabilities float32 `[B, K, sizes[level]]` of the next codeword of each beam.

        At level 0, `parents` and `codes` are None and K is 1. Later, beam k of this level extends beam
        `parents[:, k]` of the last call by codeword `codes[:, k]` of `level - 1`; both are int64 `[B, K]`.
        """
        ...


@dataclass
class TreeState:
    """What is known of B users between two levels.

    Attributes:
        cache: keys and values of the prompts and of every beam position fed so far.
        visible: bool `[B, positions]`: prompt positions that are not padding; False for beam positions.
        places: int64 `[B, positions]`: position ids of what is in the cache.
        lengths: int64 `[B]`, prompt lengths.
        last: `[B, D]`, the state after the prompt.
        ancestors: int64 `[B, K, level]`: cache positions of each beam's tokens.
    """

    cache: DynamicCache
    visible: Tensor
    places: Tensor
    lengths: Tensor
    last: Tensor
    ancestors: Tensor


class TreeDecoder:
    """Tree-shaped beams over an `ItemTokenModel`."""

    def __init__(self, model: ItemTokenModel) -> None:
        """Decode with `model`, which should be in evaluation mode."""
        self.model = model

    def encode(self, prompts: Sequence[np.ndarray]) -> TreeState:
        """Encode B prompts of token ids, right-padded into one batch."""
        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        input_ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        input_ids, lengths = input_ids.to(device), lengths.to(device)
        # A cache built from the configuration would crop the history of sliding-window layers.
        cache = DynamicCache()
        hidden = self.model.hidden(input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
        places = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
        visible = places < lengths.unsqueeze(1)
        ancestors = torch.empty(len(prompts), 1, 0, dtype=torch.long, device=device)
        return TreeState(cache, visible, places, lengths, last, ancestors)

    def level_log_probs(
        self, state: TreeState, parents: Tensor | None, codes: Tensor | None, level: int, normaliser: Normaliser
    ) -> Tensor:
        """Feed the chosen beams, if any, and return the next level's log-probabilities (see `BeamDecoder`)."""
        if parents is None or codes is None:
            return self.model.level_log_probs(state.last.unsqueeze(1), level, normaliser)
        num_beams, before = codes.shape[1], state.visible.shape[1]
        own = torch.arange(before, before + num_beams, device=codes.device).expand_as(codes).unsqueeze(-1)
        inherited = state.ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, state.ancestors.shape[2]))
        state.ancestors = torch.cat([inherited, own], dim=-1)
        position_ids = (state.lengths + level - 1).unsqueeze(1).expand_as(codes)
        state.visible = torch.cat([state.visible, torch.zeros_like(codes, dtype=torch.bool)], dim=1)
        state.places = torch.cat([state.places, position_ids], dim=1)
        allowed = state.visible.unsqueeze(1).expand(-1, num_beams, -1).scatter(2, state.ancestors, True)
        token_ids = codes + self.model.vocab.first_id + self.model.vocab.level_starts[level - 1]
        hidden = self.model.hidden(
            token_ids,
            attention_mask=attention_masks(self.model.config, self.model.lm.dtype, allowed, position_ids, state.places),
            position_ids=position_ids,
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.level_log_probs(hidden, level, normaliser)

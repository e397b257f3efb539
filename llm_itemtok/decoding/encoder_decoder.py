"""Beams of an encoder–decoder as a tree in one row of its decoder.

`generate` repeats what the encoder made of a history K times, and so the keys and values of cross-attention. Here both
are made once a user; the K beams are K more positions of the user's one decoder row, as in `decoding.tree`.

One thing stands in the way. T5 adds to attention scores a bias that goes by the distance of two places, and takes for
places where query and key stand in the row. In a tree that is wrong: alternatives for one place stand side by side. A
mask that is added to the scores can put it right, because the bias is added, too: it carries, for each head, the bias
that is due less the one that the module will add. So the modules of `transformers` run unmodified.

Shape letters: B users, K beams, C context positions, H heads, Q queries, S keys, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from llm_itemtok.decoding.masks import additive
from llm_itemtok.decoding.padding import padded
from llm_itemtok.decoding.tree import TreeDecoder, TreeState, copied


@dataclass
class EncoderDecoderState(TreeState):
    """What is known of B users between two levels; "prompt" is the start token, the row's own.

    Attributes:
        encoded: `[B, C, D]`, what the encoder made of the prompts.
        encoded_seen: int64 `[B, C]`, 0 where that is padding.
    """

    encoded: Tensor
    encoded_seen: Tensor


class EncoderDecoderTree(TreeDecoder):
    """Tree-shaped beams over an `ItemTokenModel` with an encoder."""

    name = "encoder-decoder tree"

    def encode(self, prompts: Sequence[np.ndarray]) -> EncoderDecoderState:
        """Let the encoder read B prompts, and feed the decoder its start token."""
        device, start = self.model.device, self.model.answer_start
        assert start is not None
        context_ids, lengths = padded(prompts)
        seen = (torch.arange(context_ids.shape[1]) < lengths.unsqueeze(1)).long().to(device)
        zeros = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
        state = EncoderDecoderState(
            cache=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            visible=torch.ones_like(zeros, dtype=torch.bool),
            places=zeros,
            lengths=torch.ones_like(zeros[:, 0]),
            last=torch.empty(0, device=device),
            ancestors=torch.empty(len(prompts), 1, 0, dtype=torch.long, device=device),
            encoded=self.model.read(context_ids.to(device), seen),
            encoded_seen=seen,
        )
        state.last = self.feed(state, zeros + start, state.visible.unsqueeze(1), zeros, zeros)[:, 0]
        return state

    def feed(
        self, state: TreeState, token_ids: Tensor, allowed: Tensor, position_ids: Tensor, key_places: Tensor
    ) -> Tensor:
        """Run the decoder on Q more positions a row (see `TreeDecoder.feed`)."""
        assert isinstance(state, EncoderDecoderState)
        bias = bias_differences(self.model.lm, position_ids, key_places, places=self.model.vocab.num_levels)
        hidden: Tensor = self.model.hidden(
            token_ids,
            attention_mask=additive(allowed, self.model.lm.dtype) + bias,
            past_key_values=state.cache,
            use_cache=True,
            encoder_hidden_states=state.encoded,
            encoder_attention_mask=state.encoded_seen,
        ).last_hidden_state
        return hidden

    def rows(self, state: TreeState, users: Tensor) -> EncoderDecoderState:
        """A state of R rows, each a copy of that of its user (see `TreeDecoder.rows`)."""
        assert isinstance(state, EncoderDecoderState)
        cache = EncoderDecoderCache(
            copied(state.cache.self_attention_cache, users), copied(state.cache.cross_attention_cache, users)
        )
        alone = super().rows(replace(state, cache=DynamicCache()), users)
        assert isinstance(alone, EncoderDecoderState)
        return replace(alone, cache=cache, encoded=state.encoded[users], encoded_seen=state.encoded_seen[users])


def bias_differences(lm: PreTrainedModel, query_places: Tensor, key_places: Tensor, *, places: int) -> Tensor:
    """What is missing from the bias that a T5 decoder adds to the scores of queries which are the last of its row.

    Args:
        lm: of T5 kind; its first layer's self-attention makes the bias of all layers.
        query_places: int64 `[B, Q]`.
        key_places: int64 `[B, S]`, those of the queries last.
        places: number of different places, which are in `[0, places)`.

    Returns:
        `[B, H, Q, S]`.
    """
    attention = lm.get_decoder().block[0].layer[0].SelfAttention
    queries, keys = query_places.shape[1], key_places.shape[1]
    due = attention.compute_bias(places, places)[0][:, query_places.unsqueeze(2), key_places.unsqueeze(1)]
    added = attention.compute_bias(queries, keys, past_seen_tokens=keys - queries)
    return due.transpose(0, 1) - added

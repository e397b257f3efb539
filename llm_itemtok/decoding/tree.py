"""Beams as a tree in one row.

`generate` repeats every history K times before it reads it. Here the B histories are encoded once; the K beams of a
user are fed as K more positions *of the same row*. A 4-D mask lets each beam see the history and its own ancestors
only, and position ids say that the K positions are alternatives for the same place. Nothing is replicated, re-ordered
or re-written, and the modules of `transformers` run unmodified.

Not every attention takes such masks: some read positions off a 2-D mask (ALiBi), some know no masks but that of padding
(FlashAttention). `takes_tree_masks` tries it out; `decoding.replicated` is for those that do not.

This is the decoder-only implementation of the decoding interface (`BeamDecoder`): `encode(histories)` begins a state,
`level_log_probs(state, ...)` extends it by one level. `decoding.encoder_decoder` is another, with the same trees.

Shape letters: B users, K beams, S prompt positions, D model width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from llm_itemtok.decoding.masks import attention_masks
from llm_itemtok.decoding.padding import padded
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import PlainNormaliser
from llm_itemtok.model.rows import input_table

State = TypeVar("State")

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference of a state in the tree from the same state on a plain path, by the model's dtype."""

_log = logging.getLogger(__name__)


class BeamDecoder(Protocol[State]):
    """What beam search needs of a model, whatever its family.

    Attributes:
        name: the way it decodes, in a word.
    """

    name: str

    def encode(self, prompts: Sequence[np.ndarray]) -> State:
        """Read B prompts (token ids) once."""
        ...

    def level_log_probs(
        self,
        state: State,
        parents: Tensor | None,
        codes: Tensor | None,
        level: int,
        normaliser: PlainNormaliser,
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
        lengths: int64 `[B]`, prompt positions in the cache, padding aside.
        last: `[B, D]`, the state after the prompt.
        ancestors: int64 `[B, K, level]`: cache positions of each beam's tokens.
    """

    cache: Any
    visible: Tensor
    places: Tensor
    lengths: Tensor
    last: Tensor
    ancestors: Tensor


class TreeDecoder:
    """Tree-shaped beams over an `ItemTokenModel` whose attention takes 4-D masks (`takes_tree_masks`)."""

    name = "tree"

    def __init__(self, model: ItemTokenModel) -> None:
        """Decode with `model`, which should be in evaluation mode."""
        self.model = model

    def encode(self, prompts: Sequence[np.ndarray]) -> TreeState:
        """Encode B prompts of token ids, right-padded into one batch."""
        device = self.model.device
        input_ids, lengths = (part.to(device) for part in padded(prompts))
        # A cache built from the configuration would crop the history of sliding-window layers.
        cache = DynamicCache()
        hidden = self.model.hidden(input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
        places = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
        visible = places < lengths.unsqueeze(1)
        ancestors = torch.empty(len(prompts), 1, 0, dtype=torch.long, device=device)
        return TreeState(cache, visible, places, lengths, last, ancestors)

    def level_log_probs(
        self,
        state: TreeState,
        parents: Tensor | None,
        codes: Tensor | None,
        level: int,
        normaliser: PlainNormaliser,
    ) -> Tensor:
        """Feed the chosen beams, if any, and return the next level's log-probabilities (see `BeamDecoder`)."""
        if parents is None or codes is None:
            return self.model.level_log_probs(state.last.unsqueeze(1), level, normaliser)
        token_ids = self.model.vocab.token_ids(codes, level - 1)
        return self.model.level_log_probs(self.extend(state, parents, token_ids), level, normaliser)

    def extend(self, state: TreeState, parents: Tensor, token_ids: Tensor) -> Tensor:
        """Feed one token a beam, int64 `[B, K]`, behind beams `parents` `[B, K]`; return the states `[B, K, D]`."""
        num_beams, before = token_ids.shape[1], state.visible.shape[1]
        own = torch.arange(before, before + num_beams, device=token_ids.device).expand_as(token_ids).unsqueeze(-1)
        depth = state.ancestors.shape[2]
        inherited = state.ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, depth))
        state.ancestors = torch.cat([inherited, own], dim=-1)
        position_ids = (state.lengths + depth).unsqueeze(1).expand_as(token_ids)
        state.visible = torch.cat([state.visible, torch.zeros_like(token_ids, dtype=torch.bool)], dim=1)
        state.places = torch.cat([state.places, position_ids], dim=1)
        allowed = state.visible.unsqueeze(1).expand(-1, num_beams, -1).scatter(2, state.ancestors, True)
        return self.feed(state, token_ids, allowed, position_ids, state.places)

    def feed(
        self, state: TreeState, token_ids: Tensor, allowed: Tensor, position_ids: Tensor, key_places: Tensor
    ) -> Tensor:
        """Run the body on Q more positions a row; its cache grows by them, the rest of the state does not.

        Args:
            state: of B rows.
            token_ids: int64 `[B, Q]`.
            allowed: bool `[B, Q, S]`: which positions of the cache, the new ones included, each one sees.
            position_ids: int64 `[B, Q]`.
            key_places: int64 `[B, S]`, position ids of all that is then in the cache.

        Returns:
            States `[B, Q, D]`.
        """
        hidden: Tensor = self.model.hidden(
            token_ids,
            attention_mask=attention_masks(self.model.config, self.model.lm.dtype, allowed, position_ids, key_places),
            position_ids=position_ids,
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def rows(self, state: TreeState, users: Tensor) -> TreeState:
        """A state of R rows, each a copy of that of its user, int64 `[R]`; users may come more than once."""
        return replace(
            state,
            cache=copied(state.cache, users),
            visible=state.visible[users],
            places=state.places[users],
            lengths=state.lengths[users],
            last=state.last[users],
            ancestors=state.ancestors[users],
        )


def copied(cache: DynamicCache, users: Tensor) -> DynamicCache:
    """A cache of R rows, each a copy of that of its user."""
    copies = DynamicCache()
    for number, (keys, values, *_) in enumerate(cache):
        copies.update(keys[users], values[users], number)
    return copies


def takes_tree_masks(model: ItemTokenModel) -> bool:
    """Whether a model's states in a tree of beams are those of plain paths, tried out once on a small tree.

    The answer is kept on the model, and said once to the log. Nothing else of the model changes: neither its modes, nor
    gradients, nor the state of random numbers. The tree is too short to leave a sliding window of usual size; what
    windows do is for the tests of a family to prove.
    """
    implementation = str(model.config._attn_implementation)
    key = (implementation, model.lm.dtype)
    if key not in model.tree_masks:
        # FlashAttention's kernels know no such mask and would read beyond their tables; FlexAttention takes functions.
        compiled = "flash" in implementation or "flex" in implementation
        model.tree_masks[key] = not compiled and _tree_equals_paths(model)
        found = "share one row" if model.tree_masks[key] else "are rows of their own, because it takes no tree masks"
        _log.info("%s with %s attention: beams of a user %s", model.config.model_type, implementation, found)
    return model.tree_masks[key]


def _tree_equals_paths(model: ItemTokenModel) -> bool:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            tree, paths = _small_tree(model)
    except ValueError:
        # Seen: BLOOM and Falcon with ALiBi unpack the mask's shape into two.
        return False
    finally:
        for module, training in modes:
            module.training = training
    difference = (tree - paths).float().norm(dim=-1) / paths.float().norm(dim=-1)
    return bool((difference < TOLERANCE.get(model.lm.dtype, 1e-3)).all())  # False for what is not a number, too


def _small_tree(model: ItemTokenModel) -> tuple[Tensor, Tensor]:
    """States `[2, 5, D]` of a small tree, and the same from whole paths without cache or masks.

    Two users with prompts of unlike length; two beams, then three: the same token behind either of them, and another.
    Tokens are of the base's lower half, which has no padding and no item tokens that are still alike.
    """
    ids = torch.arange(8) * (input_table(model.lm).num_embeddings // 16)
    prompts = [ids[:5].numpy(), ids[1:4].numpy()]
    steps = ids[torch.tensor([5, 6, 7, 7, 4])].to(model.device)
    parents = torch.tensor([0, 0, 1, 0, 1], device=model.device)
    decoder = TreeDecoder(model)
    state = decoder.encode(prompts)
    first = decoder.extend(state, parents[:2].expand(2, -1), steps[:2].expand(2, -1))
    second = decoder.extend(state, parents[2:].expand(2, -1), steps[2:].expand(2, -1))

    rows = torch.zeros(2, 3, 7, dtype=torch.long, device=model.device)
    for user, prompt in enumerate(prompts):
        rows[user, :, : len(prompt)] = torch.from_numpy(prompt).to(model.device)
        rows[user, :, len(prompt)] = steps[parents[2:]]
        rows[user, :, len(prompt) + 1] = steps[2:]
    plain = model.hidden(rows.flatten(0, 1), use_cache=False).last_hidden_state.unflatten(0, (2, 3))
    at = [len(prompt) for prompt in prompts]
    paths = [torch.cat([plain[user, [1, 0], at[user]], plain[user, :, at[user] + 1]]) for user in range(2)]
    return torch.cat([first, second], dim=1), torch.stack(paths)

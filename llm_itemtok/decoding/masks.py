"""Who sees whom, as the attention modules of `transformers` read it.

A tree of beams breaks the rule that a position sees all before it, so the masks are made here: a key is seen when it is
allowed, and, in a layer with a sliding window, when it is near enough. Nearness goes by *places* (position ids), not by
where a key lies in the cache, where alternatives for one place stand side by side.

Shape letters: B rows, Q queries, S keys.
"""

from typing import Any

import torch
from torch import Tensor


def attention_masks(
    config: Any, dtype: torch.dtype, allowed: Tensor, query_places: Tensor, key_places: Tensor
) -> Tensor | dict[str, Tensor]:
    """Masks that are added to attention scores.

    Args:
        config: of the model.
        dtype: of the model's activations.
        allowed: bool `[B, Q, S]`: whether a query may see a key at all.
        query_places: int64 `[B, Q]`, position id of each query.
        key_places: int64 `[B, S]`, position id of each key; read for models with sliding windows only.

    Returns:
        `[B, 1, Q, S]`, 0 where a key is seen and the lowest number elsewhere; one for each kind of attention, by name,
        for a model whose layers differ.
    """
    full = additive(allowed, dtype)
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "sliding_window", None) is None or (kinds is not None and "sliding_attention" not in kinds):
        return full
    near = query_places.unsqueeze(2) - key_places.unsqueeze(1) < config.sliding_window
    sliding = additive(allowed & near, dtype)
    # Where a model does not say what each layer does (Mistral, Phi-3), every layer has the window.
    return sliding if kinds is None else {"full_attention": full, "sliding_attention": sliding}


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask `[B, 1, Q, S]` that is added to attention scores: 0 where a key is seen, the lowest number elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min).unsqueeze(1)

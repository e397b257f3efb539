"""Exact log-probabilities of given items, by running each item's whole path through the model.

The plain way, without cache, tree or trie: the check that beam search is measured against, and the re-ranker behind
`Recommender.score`. Cost grows with users x items; for long candidate lists use beams.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.decoding.beams import DecodeNormaliser
from llm_itemtok.model.item_lm import ItemTokenModel, Normaliser
from llm_itemtok.vocab.trie import ItemTrie


@torch.inference_mode()
def score_items(
    model: ItemTokenModel,
    trie: ItemTrie,
    prompts: Sequence[np.ndarray],
    items: Sequence[np.ndarray],
    *,
    normaliser: DecodeNormaliser = "level",
    batch_size: int = 256,
) -> list[np.ndarray]:
    """Score items after each prompt.

    Args:
        model: in evaluation mode.
        trie: of the model's current codes; read for the normaliser `children` only.
        prompts: B arrays of token ids.
        items: B arrays of item rows, of any lengths.
        normaliser: as in `beam_search`.
        batch_size: sequences a forward pass.

    Returns:
        B float32 arrays of log-probabilities, beside `items`.
    """
    pairs = [(user, int(item)) for user, rows in enumerate(items) for item in rows]
    scores = np.zeros(len(pairs), dtype=np.float32)
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        scores[start : start + len(chunk)] = _score_pairs(model, trie, prompts, chunk, normaliser).cpu().numpy()
    return np.split(scores, np.cumsum([len(rows) for rows in items])[:-1])


def _score_pairs(
    model: ItemTokenModel,
    trie: ItemTrie,
    prompts: Sequence[np.ndarray],
    pairs: Sequence[tuple[int, int]],
    normaliser: DecodeNormaliser,
) -> Tensor:
    """Log-probability `[n]` of each (prompt index, item row)."""
    device = model.device
    num_levels = model.vocab.num_levels
    paths = model.vocab.paths[torch.tensor([item for _, item in pairs])]
    lengths = torch.tensor([len(prompts[user]) for user, _ in pairs])
    input_ids = torch.zeros(len(pairs), int(lengths.max()) + num_levels - 1, dtype=torch.long)
    for row, (user, _) in enumerate(pairs):
        input_ids[row, : lengths[row]] = torch.from_numpy(np.asarray(prompts[user], dtype=np.int64))
        input_ids[row, lengths[row] : lengths[row] + num_levels - 1] = paths[row, :-1]
    hidden = model.hidden(input_ids.to(device), use_cache=False).last_hidden_state

    index = torch.arange(len(pairs), device=device)
    nodes = torch.zeros(len(pairs), dtype=torch.long, device=device)
    total = torch.zeros(len(pairs), device=device)
    codes = torch.from_numpy(model.vocab.codes.table[[item for _, item in pairs]].astype(np.int64)).to(device)
    model_normaliser: Normaliser = "level" if normaliser == "children" else normaliser
    for level in range(num_levels):
        log_probs = model.level_log_probs(hidden[index, lengths.to(device) - 1 + level], level, model_normaliser)
        total += log_probs.gather(1, codes[:, level : level + 1]).squeeze(1)
        if normaliser == "children":
            children, child_codes, legal = trie.children(nodes, level)
            total -= log_probs.gather(1, child_codes).masked_fill(~legal, -torch.inf).logsumexp(1)
            own = (legal & (child_codes == codes[:, level : level + 1])).int().argmax(1, keepdim=True)
            nodes = children.gather(1, own).squeeze(1)
    return total

"""The usual ways, in a few lines each: what a recommender built on `transformers` does today.

Baselines of the benchmarks. `generate_items` and `DictTrie` are how generative recommenders are decoded in public code
(LC-Rec, GENRE and those after them); `one_prefill` is the better loop that a careful user writes; `Windows` is training
with one example per target.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llm_itemtok.vocab.trie import ItemTrie


class DictTrie:
    """A prefix tree of dictionaries."""

    def __init__(self, paths: Iterator[Sequence[int]]) -> None:
        """Insert every path of token ids."""
        self.root: dict[int, dict] = {}
        for path in paths:
            node = self.root
            for token in path:
                node = node.setdefault(token, {})

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow a prefix."""
        node = self.root
        for token in prefix:
            node = node[token]
        return list(node)


@torch.inference_mode()
def generate_items(
    lm: PreTrainedModel, trie: DictTrie, prompts: Sequence[np.ndarray], *, beam: int, levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decode a batch with `generate` and a prefix function.

    Returns:
        Token ids of the paths, int64 `[B, beam, levels]`, best first, and their log-probabilities `[B, beam]`.
    """
    width = max(len(prompt) for prompt in prompts)
    before = 1 if lm.config.is_encoder_decoder else width  # of a T5 what is written begins with its start token alone
    input_ids, mask = np.zeros((len(prompts), width), dtype=np.int64), np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):  # left-padded, as `generate` needs it
        input_ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    out: Any = lm.generate(  # type: ignore[operator]  # transformers' stubs take the method for a buffer
        torch.from_numpy(input_ids).to(lm.device),
        attention_mask=torch.from_numpy(mask).to(lm.device),
        num_beams=beam,
        num_return_sequences=beam,
        max_new_tokens=levels,
        min_new_tokens=levels,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        prefix_allowed_tokens_fn=lambda _batch, ids: trie.allowed(ids[before:].tolist()),
        return_dict_in_generate=True,
        output_scores=True,
    )
    shape = (len(prompts), beam)
    return out.sequences[:, before:].reshape(*shape, levels).cpu().numpy(), out.sequences_scores.reshape(
        shape
    ).float().cpu().numpy()


@torch.inference_mode()
def one_prefill(
    lm: PreTrainedModel, trie: ItemTrie, first_ids: Sequence[int], prompts: np.ndarray, *, beam: int
) -> np.ndarray:
    """Decode a batch of equally long prompts with one prefill, then repeated and re-ordered keys and values.

    Args:
        lm: with item tokens in its table.
        trie: of the codes.
        first_ids: token id of codeword 0 of each level.
        prompts: int64 `[B, S]`.
        beam: K.

    Returns:
        Catalogue rows int64 `[B, K]`, best first.
    """
    users = len(prompts)
    cache = DynamicCache()
    out = lm(torch.from_numpy(prompts).to(lm.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    nodes = torch.zeros(users, 1, dtype=torch.long, device=lm.device)
    scores = torch.zeros(users, 1, device=lm.device)
    for level, first_id in enumerate(first_ids):
        log_probs = out.logits[:, -1].float().log_softmax(-1).view(users, nodes.shape[1], -1)
        width = nodes.shape[1]
        children, codes, legal = trie.children(nodes, level)
        steps = log_probs.gather(2, codes + first_id).masked_fill(~legal, -torch.inf)
        candidates = (scores.unsqueeze(-1) + steps).flatten(1)
        scores, chosen = candidates.topk(min(beam, candidates.shape[1]), dim=1)
        parents = chosen // children.shape[2]
        nodes, codes = children.flatten(1).gather(1, chosen), codes.flatten(1).gather(1, chosen)
        if level == len(first_ids) - 1:
            break
        if level == 0:
            cache.batch_repeat_interleave(nodes.shape[1])
        else:
            rows = torch.arange(users, device=lm.device).unsqueeze(1) * width + parents
            cache.reorder_cache(rows.flatten())
        out = lm((codes + first_id).view(-1, 1), past_key_values=cache, use_cache=True)
    return trie.leaf_items[nodes].cpu().numpy()


class Windows:
    """One training example per target: its history in front, a loss on its own tokens alone."""

    def __init__(self, paths: Tensor, sequences: Sequence[np.ndarray], *, start: int, history_length: int) -> None:
        """Cut sequences of catalogue rows into examples of token ids: `paths` `[N, L]`; prompts begin with `start`."""
        self.levels = paths.shape[1]
        self.examples: list[Tensor] = []
        for sequence in sequences:
            for target in range(len(sequence)):
                items = torch.from_numpy(sequence[max(0, target - history_length) : target + 1])
                self.examples.append(torch.cat([torch.tensor([start]), paths[items].flatten()]))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of input ids, attention mask and labels, int64 `[B, S]`, left-padded; labels -100 but on targets."""
        for begin in range(0, len(self.examples), size):
            chosen = self.examples[begin : begin + size]
            width = max(len(example) for example in chosen)
            ids, mask, labels = torch.zeros(3, len(chosen), width, dtype=torch.long)
            labels.fill_(-100)
            for row, example in enumerate(chosen):
                ids[row, width - len(example) :], mask[row, width - len(example) :] = example, 1
                labels[row, -self.levels :] = example[-self.levels :]
            yield ids, mask, labels

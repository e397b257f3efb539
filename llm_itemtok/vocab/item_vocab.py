"""`ItemVocab`: the path of token ids that stands for each item in the language model's vocabulary.

One new token per codeword and level, spelt `<a_17>` (level 0, codeword 17), added as *plain* tokens: special tokens
vanish with `skip_special_tokens=True`. The number of tokens is the capacity of the code table (the sum of the level
sizes), not what the items use today, so an update of the codes never resizes the model: `with_codes` gives a new
vocabulary over the same tokens.

Knows codes and token ids; knows nothing of models, prompts or losses.
"""

import re
import string
from typing import Self

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_itemtok.errors import ItemTokError
from llm_itemtok.items.codes import ItemCodes

ITEM_TOKEN = re.compile(r"<[a-z]_\d+>")
"""How every item token is spelt, whatever the sizes of the levels."""


def spellings(sizes: tuple[int, ...]) -> list[str]:
    """Spell every item token, level by level, codeword by codeword: `<a_0>, <a_1>, …, <b_0>, …`.

    Args:
        sizes: codewords of each level; at most 26 levels.

    Returns:
        `sum(sizes)` distinct strings.

    Raises:
        ItemTokError: if there are more levels than letters.
    """
    if len(sizes) > len(string.ascii_lowercase):
        raise ItemTokError(
            f"item tokens are called by a letter a level, so there must be at most 26 levels, was: {len(sizes)}"
        )
    return [f"<{string.ascii_lowercase[level]}_{code}>" for level, size in enumerate(sizes) for code in range(size)]


def refuse_known(tokenizer: PreTrainedTokenizerBase, sizes: tuple[int, ...]) -> None:
    """Raise `ItemTokError` if a tokenizer already knows a spelling of item tokens that are to be added to it."""
    tokens = spellings(sizes)
    if known := tokenizer.get_vocab().keys() & set(tokens):
        raise ItemTokError(
            f"item tokens must be new to the tokenizer, but it already has {len(known)} of {len(tokens)}, "
            f"such as {min(known)}; start from the model as it was before item tokens were added to it, or go on with "
            "its own (`vocab.init: base`)"
        )


class ItemVocab:
    """Each item's path of token ids, over one contiguous range of new token ids.

    Attributes:
        codes: the code table behind the paths.
        first_id: token id of codeword 0 of level 0; the item tokens fill `[first_id, first_id + num_tokens)`.
        num_tokens: how many item tokens there are, the capacity of the code table.
        level_starts: for each level, the offset of its first token from `first_id`.
        paths: int64 `[num_items, num_levels]`, token ids.
        lengths: None: every item has a token at every level (`vocab.text_vocab` has items that have not).
    """

    lengths: np.ndarray | None = None

    def __init__(self, codes: ItemCodes, first_id: int) -> None:
        self.codes = codes
        self.first_id = first_id
        self.num_tokens = sum(codes.sizes)
        self.level_starts = tuple(int(start) for start in np.cumsum((0, *codes.sizes))[:-1])
        offsets = np.asarray(self.level_starts, dtype=np.int64) + first_id
        self.paths: Tensor = torch.from_numpy(codes.table.astype(np.int64) + offsets)

    @classmethod
    def add_to(cls, tokenizer: PreTrainedTokenizerBase, codes: ItemCodes) -> Self:
        """Add the item tokens to a tokenizer and resolve their ids through it.

        Ids are never assumed to be the last rows of the embedding table: many checkpoints have padded tables.

        Raises:
            ItemTokError: if the tokenizer already knows one of the spellings, or gives ids that are not contiguous.
        """
        refuse_known(tokenizer, codes.sizes)
        tokens = spellings(codes.sizes)
        # Tokenizers of the first Llamas put a space mark before a text, and before the tokens they normalise too.
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        return cls.resolve(tokenizer, codes)

    @classmethod
    def resolve(cls, tokenizer: PreTrainedTokenizerBase, codes: ItemCodes) -> Self:
        """Find item tokens that a tokenizer already has, such as one loaded from a bundle.

        Raises:
            ItemTokError: if a token is missing or the ids are not contiguous.
        """
        vocab = tokenizer.get_vocab()
        if sum(codes.sizes) > len(vocab):  # before their spellings fill the memory: a file may name any size
            raise ItemTokError(
                f"the tokenizer must have all {sum(codes.sizes):,} item tokens, but it has {len(vocab):,} tokens in "
                "all; its codes and its tokenizer come from different runs"
            )
        tokens = spellings(codes.sizes)
        missing = [token for token in tokens if token not in vocab]
        if missing:
            raise ItemTokError(
                f"the tokenizer must have all {len(tokens)} item tokens, but {len(missing)} are missing, such as "
                f"{missing[0]}; its codes and its tokenizer come from different runs"
            )
        ids = [vocab[token] for token in tokens]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise ItemTokError(
                f"item tokens must have contiguous ids, but run from {ids[0]} to {ids[-1]} with {len(ids)} tokens; "
                "add them to the tokenizer in one go"
            )
        return cls(codes, ids[0])

    def with_codes(self, codes: ItemCodes) -> "ItemVocab":
        """Let the same tokens spell other codes, as after an update of the item tokens.

        Raises:
            ItemTokError: if the capacity differs; it is fixed for a run.
        """
        if codes.sizes != self.codes.sizes:
            raise ItemTokError(
                f"new codes must have the level sizes of the vocabulary, {self.codes.sizes}, was: {codes.sizes}"
            )
        return ItemVocab(codes, self.first_id)

    def token_ids(self, codes: Tensor, levels: int | Tensor) -> Tensor:
        """Token ids int64 `[...]` of codewords `[...]`, all of one level, or each of its own, int64 `[...]`."""
        if isinstance(levels, int):
            return codes + (self.first_id + self.level_starts[levels])
        return codes + self.first_id + torch.tensor(self.level_starts, device=codes.device)[levels]

    @property
    def num_levels(self) -> int:
        """Tokens of every item, or of the longest."""
        return self.codes.num_levels

    def spell(self, row: int) -> str:
        """Write an item's path as text, such as `<a_3><b_17><c_0>`."""
        return "".join(
            f"<{string.ascii_lowercase[level]}_{code}>" for level, code in enumerate(self.codes.table[row].tolist())
        )

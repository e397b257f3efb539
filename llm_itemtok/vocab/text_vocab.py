"""`TextVocab`: paths of token ids that the language model has had all along.

To whatever works on codes it is an `ItemVocab` without tokens of its own: `num_tokens` is 0, so no row is trained, no
table grows and nothing is added to a tokenizer. A codeword is a word, found through the tokenizer; where an item has
ended there is none, and what stands there in `paths` is not to be read.

`extended` and `resolved` make the vocabulary that fits the codes, whichever it is.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_itemtok.errors import ItemTokError
from llm_itemtok.items.codes import ENDED, ItemCodes
from llm_itemtok.vocab.item_vocab import ItemVocab


class TextVocab(ItemVocab):
    """Each item's path of token ids over existing tokens.

    Attributes:
        level_starts: for each level, the offset of its first codeword in the list of all.
        lengths: int64 `[num_items]`, tokens of each item, the end token included.
        ended: for each level, the codeword that stands for no token, or None.
    """

    def __init__(self, codes: ItemCodes, word_ids: np.ndarray) -> None:
        """Spell `codes` in the tokens `word_ids`, int64 `[sum(sizes)]`: of each codeword, level by level."""
        assert codes.words is not None
        self.codes = codes
        self.first_id = 0
        self.num_tokens = 0
        self.level_starts = tuple(int(start) for start in np.cumsum((0, *codes.sizes))[:-1])
        self.paths = torch.from_numpy(word_ids[codes.table + np.asarray(self.level_starts)])
        self.lengths = codes.lengths
        self.ended = tuple(level.index(ENDED) if ENDED in level else None for level in codes.words)
        self._ids = {torch.device("cpu"): torch.from_numpy(word_ids)}
        self._starts = {torch.device("cpu"): torch.tensor(self.level_starts)}

    @classmethod
    def resolve(cls, tokenizer: PreTrainedTokenizerBase, codes: ItemCodes) -> Self:
        """Find the words of codes in a tokenizer.

        Raises:
            ItemTokError: if a word is missing.
        """
        assert codes.words is not None
        known = tokenizer.get_vocab()
        words = [word for level in codes.words for word in level]
        missing = sorted({word for word in words if word != ENDED} - known.keys())
        if missing:
            raise ItemTokError(
                f"the tokenizer must have every word of the items' identifiers, but {len(missing)} are missing, such "
                f"as {missing[0]!r}; its codes and its tokenizer come from different models"
            )
        return cls(codes, np.array([known[word] if word != ENDED else 0 for word in words], dtype=np.int64))

    def with_codes(self, codes: ItemCodes) -> "TextVocab":
        """Refused: identifiers in words stay what they are.

        Raises:
            ItemTokError: always.
        """
        raise ItemTokError(f"identifiers in words of the vocabulary cannot change, were to become: {codes}")

    def token_ids(self, codes: Tensor, levels: int | Tensor) -> Tensor:
        """Token ids of codewords (see `ItemVocab.token_ids`); an arbitrary id where an item has ended."""
        if isinstance(levels, int):
            return self._on(self._ids, codes.device)[codes + self.level_starts[levels]]
        return self._on(self._ids, codes.device)[codes + self._on(self._starts, codes.device)[levels]]

    def level_ids(self, level: int, device: torch.device) -> Tensor:
        """Token ids int64 `[sizes[level]]` of a level's codewords."""
        start = self.level_starts[level]
        return self._on(self._ids, device)[start : start + self.codes.sizes[level]]

    def spell(self, row: int) -> str:
        """Write an item's tokens, with spaces between."""
        assert self.codes.words is not None
        code = self.codes.table[row].tolist()
        found = [words[codeword] for words, codeword in zip(self.codes.words, code, strict=True)]
        return " ".join(word for word in found if word != ENDED)

    def _on(self, copies: dict[torch.device, Tensor], device: torch.device) -> Tensor:
        """The copy on a device, made once: decoding asks at every level."""
        if device not in copies:
            copies[device] = copies[torch.device("cpu")].to(device)
        return copies[device]


def extended(tokenizer: PreTrainedTokenizerBase, codes: ItemCodes, *, known: bool = False) -> ItemVocab:
    """The vocabulary of codes; item tokens, where the codes need any, are added to the tokenizer unless it has them."""
    if codes.words is not None or known:
        return resolved(tokenizer, codes)
    return ItemVocab.add_to(tokenizer, codes)


def resolved(tokenizer: PreTrainedTokenizerBase, codes: ItemCodes) -> ItemVocab:
    """The vocabulary of codes over tokens that the tokenizer has, such as one loaded from a bundle."""
    return (ItemVocab if codes.words is None else TextVocab).resolve(tokenizer, codes)

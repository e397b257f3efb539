"""How histories and items are put to the model: the only place with prompt words.

Every prompt begins with the start token. A history is the item tokens of its items, one path after the other, so an
empty history is the start token alone and asks for the model's unconditional answer. Items are given by their rows;
token ids are looked up when a prompt is built, so prompts always follow the current codes.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_itemtok.model.load import start_id
from llm_itemtok.vocab.item_vocab import ItemVocab

TITLE, ITEM = "Title: ", "\nItem: "
"""`title-to-item` reads `Title: <text> Item: <item tokens>`,
`item-to-title` the reverse: `Item: <item tokens> Title: <text>`."""

MAX_TEXT_TOKENS = 64
"""Text of one item beyond this many tokens is cut off."""


class Prompts:
    """Token ids of histories and of item texts.

    Attributes:
        start: id of the start token.
        end: id that ends a text, or None if the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: ItemVocab, texts: Sequence[str] = ()) -> None:
        """Prepare for a vocabulary; `texts` (one per item row) are needed for text tasks only."""
        self.start = start_id(tokenizer)
        self.end = None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self._paths = vocab.paths.numpy()
        self._title_words = encode_text(tokenizer, [TITLE])[0] if texts else []
        self._item_words = encode_text(tokenizer, [ITEM])[0] if texts else []
        self._texts = encode_text(tokenizer, texts)

    def history(self, items: np.ndarray | Sequence[int]) -> np.ndarray:
        """Token ids int64 `[1 + len(items) * num_levels]` of a history of item rows."""
        return np.concatenate([[self.start], self._paths[np.asarray(items, dtype=np.int64)].reshape(-1)])

    def title_to_item(self, item: int) -> tuple[np.ndarray, int]:
        """Text first, then the item's path. Returns the ids and how many of the last ones are targets."""
        words = [self.start, *self._title_words, *self._texts[item], *self._item_words]
        return np.concatenate([words, self._paths[item]]), self._paths.shape[1]

    def item_to_title(self, item: int) -> tuple[np.ndarray, int]:
        """The item's path first, then its text and the end token. Returns as `title_to_item`."""
        target = [*self._texts[item], *([] if self.end is None else [self.end])]
        words = [self.start, *self._item_words]
        return np.concatenate([words, self._paths[item], self._title_words, target]).astype(np.int64), len(target)


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts without special tokens, each cut to `MAX_TEXT_TOKENS`."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=MAX_TEXT_TOKENS)
    return [list(ids) for ids in encoded["input_ids"]]

"""How histories and items are put to the model: the only place with prompt words.

A prompt of a decoder-only model begins with the start token. One that an encoder reads ends with the end token instead,
as T5 was trained to read and as TIGER has it (arXiv:2305.05065, released ports); its answer begins a row of its own. A
history is the item tokens of its items, one path after the other, so an empty history is that one token alone and asks
for the model's unconditional answer. Items are given by their rows; token ids are looked up when a prompt is built, so
prompts always follow the current codes. Identifiers of existing words stand there with their end token, which tells
where the next one begins.

What a model reads of an item may be other than what it writes (`Reads`): one that knows items beyond their tokens reads
an id below 0, -1 - row, in place of the last token, or of all of them.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_itemtok.errors import ItemTokError
from llm_itemtok.model.item_lm import ItemTokenModel, Reads
from llm_itemtok.model.load import start_id
from llm_itemtok.vocab.item_vocab import ITEM_TOKEN, ItemVocab

TITLE, ITEM = "Title: ", "\nItem: "
"""`title-to-item` reads `Title: <text> Item: <item tokens>`,
`item-to-title` the reverse: `Item: <item tokens> Title: <text>`."""

MAX_TEXT_TOKENS = 64
"""Text of one item beyond this many tokens is cut off."""


class Prompts:
    """Token ids of histories and of item texts.

    Attributes:
        start: id that a decoder-only model's prompt begins with, or the answer of a model that reads prompts by an
            encoder.
        end: id that ends a text, or None if the tokenizer has no EOS.
        encoded: whether an encoder reads the prompts.
        reads: how items stand in what the model reads.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab: ItemVocab,
        texts: Sequence[str] = (),
        *,
        answer_start: int | None = None,
        reads: Reads = "tokens",
    ) -> None:
        """Prepare for a vocabulary.

        Args:
            tokenizer: with the item tokens.
            vocab: the current item tokens.
            texts: one per catalogue row, for text tasks only.
            answer_start: `ItemTokenModel.answer_start`: None for a decoder-only model.
            reads: `ItemTokenModel.reads`.

        Raises:
            ItemTokError: if the tokenizer lacks the token that a prompt begins or ends with.
        """
        self.encoded = answer_start is not None
        self.end = None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        if self.encoded and self.end is None:
            raise ItemTokError("the tokenizer must have an EOS token to end a prompt with, but it has none")
        self.start = start_id(tokenizer) if answer_start is None else answer_start
        self.reads = reads
        self._paths = vocab.paths.numpy()
        self._lengths = vocab.lengths
        self._title_words = encode_text(tokenizer, [TITLE])[0] if texts else []
        self._item_words = encode_text(tokenizer, [ITEM])[0] if texts else []
        self._texts = encode_text(tokenizer, texts)

    @classmethod
    def of(
        cls,
        model: ItemTokenModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str] = (),
        *,
        vocab: ItemVocab | None = None,
    ) -> "Prompts":
        """Prepare for a model as it is; in the spelling of another vocabulary, if one is given."""
        return cls(tokenizer, vocab or model.vocab, texts, answer_start=model.answer_start, reads=model.reads)

    def history(self, items: np.ndarray | Sequence[int]) -> np.ndarray:
        """Ids int64 of a history of catalogue rows: `read`, begun or ended as the model takes it."""
        return self._prompt(self.read(items))

    def read(self, items: np.ndarray | Sequence[int]) -> np.ndarray:
        """Ids int64 of catalogue rows as the model reads them, one item after the other."""
        if self.reads == "tokens":
            return self.paths(items)
        rows = np.asarray(items, dtype=np.int64)
        if self.reads == "items":
            return -1 - rows
        paths: np.ndarray = self._paths[rows]
        paths[:, -1] = -1 - rows
        return paths.reshape(-1)

    def paths(self, items: np.ndarray | Sequence[int]) -> np.ndarray:
        """Token ids int64 of catalogue rows, one path after the other: `num_levels` an item, or fewer where it ends."""
        rows = np.asarray(items, dtype=np.int64)
        paths: np.ndarray = self._paths[rows]
        return paths.reshape(-1) if self._lengths is None else paths[self._counted(rows)]

    def levels(self, items: np.ndarray | Sequence[int]) -> np.ndarray:
        """The level int64 of each token of `paths`."""
        rows = np.asarray(items, dtype=np.int64)
        if self._lengths is None:
            return np.tile(np.arange(self._paths.shape[1]), len(rows))
        return np.nonzero(self._counted(rows))[1]

    def _counted(self, rows: np.ndarray) -> np.ndarray:
        """Which levels hold a token of each item, bool `[n, num_levels]`."""
        assert self._lengths is not None
        counted: np.ndarray = np.arange(self._paths.shape[1]) < self._lengths[rows, None]
        return counted

    def title_to_item(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Text first, then the item's path: token ids int64 of the prompt, and of the targets after it."""
        return self._prompt([*self._title_words, *self._texts[item], *self._item_words]), self.paths([item])

    def item_to_title(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """The item's path first, then its text and the end token: prompt and targets, as `title_to_item`."""
        target = np.array([*self._texts[item], *([] if self.end is None else [self.end])], dtype=np.int64)
        return self._prompt([*self._item_words, *self.read([item]), *self._title_words]), target

    def _prompt(self, words: np.ndarray | Sequence[int]) -> np.ndarray:
        """Begin or end a prompt."""
        before, after = ([], [self.end]) if self.encoded else ([self.start], [])
        return np.array([*before, *words, *after], dtype=np.int64)


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts without special tokens, each cut to `MAX_TEXT_TOKENS`.

    A text that spells a special token or an item's (`</s>`, `<a_3>`) has nothing in its place: who writes titles must
    not end prompts, nor name other items. Unknown letters stay.

    Cut here, because a tokenizer that was told to cut goes on doing it, and is saved with it.
    """
    if not texts:
        return []
    added = tokenizer.added_tokens_decoder
    barred = {id for id, token in added.items() if token.special or ITEM_TOKEN.fullmatch(token.content)}
    barred -= {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return [[id for id in ids if id not in barred][:MAX_TEXT_TOKENS] for ids in encoded["input_ids"]]

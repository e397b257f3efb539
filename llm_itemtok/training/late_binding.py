"""Batches that name items, and get their tokens at the moment they are trained on.

A loader works ahead: when item tokens change, batches that were rendered with the old ones are on their way already.
So where tokens may change, examples are rendered with *placeholders*, a token id for each item and level that no
vocabulary has, and the trainer puts the current tokens in their place, by one gather, just before the loss. A stale
batch cannot be; and as a placeholder names its item, a batch also tells which item each label belongs to.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.rows import input_table
from llm_itemtok.vocab.item_vocab import ItemVocab

BOUND = ("input_ids", "labels", "context_ids")
"""What of a batch holds token ids."""

READ = {"input_ids", "context_ids"}
"""What of these a model reads."""


class LateBinding:
    """Placeholders for the items of a model, and the way from them to its current item tokens.

    Attributes:
        first: the lowest placeholder; level l of item n is `first + n * L + l`.
    """

    def __init__(self, model: ItemTokenModel, *, names: bool = False) -> None:
        """Bind to whatever `model.vocab` is when a batch is bound.

        Args:
            model: whose `vocab` counts.
            names: whether the model's inputs are to tell items and levels, which are then looked up by the model
                itself, as ids below 0: -1 - (item * L + level) (`model.soft_inputs`).
        """
        self._model = model
        self._names = names
        vocab = model.vocab
        self._num_levels = vocab.num_levels
        self.first = max(input_table(model.lm).num_embeddings, vocab.first_id + vocab.num_tokens)
        self._vocab: ItemVocab | None = None
        self._paths = torch.empty(0, dtype=torch.long)

    def placeholders(self) -> ItemVocab:
        """The model's vocabulary with placeholders for paths: what examples are rendered with."""
        vocab = copy.copy(self._model.vocab)
        vocab.paths = torch.arange(vocab.paths.numel()).view_as(vocab.paths) + self.first
        return vocab

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the item tokens of now; what holds none is passed on as it is."""
        bound = {name: self._bound(value) if name in BOUND else value for name, value in batch.items()}
        if self._names:
            for name in READ & bound.keys():
                bound[name] = torch.where(batch[name] >= self.first, self.first - 1 - batch[name], batch[name])
        return bound

    def items(self, token_ids: Tensor) -> Tensor:
        """The catalogue row int64 of each placeholder; -1 for other token ids."""
        return torch.where(token_ids >= self.first, (token_ids - self.first) // self._num_levels, -1)

    def _bound(self, token_ids: Tensor) -> Tensor:
        if self._model.vocab is not self._vocab or self._paths.device != token_ids.device:
            self._vocab = self._model.vocab
            self._paths = self._vocab.paths.flatten().to(token_ids.device)
        places = token_ids - self.first
        return torch.where(places >= 0, self._paths[places.clamp(min=0)], token_ids)

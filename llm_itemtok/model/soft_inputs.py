"""Item tokens in what a model reads, through which gradients reach the quantizer that chose them.

An item token's embedding is a row of a table, and the choice of the row has no gradient. Here the row is *mixed* with
all rows of its level, weighted by how likely the quantizer finds each codeword for the item:

    o = s + sg[h - s],    s = sum_k P(k | item) E_k,    h = E_c

so the value is the hard row h, bit for bit, and the gradient is that of s: it goes to all rows of the level and, where
the quantizer is being trained, to its codebooks and encoder. Labels stay hard codes. With `own`, E is a constant in s:
the row that is read gets the whole gradient, as it would without a mixture, and the quantizer still gets that of s.

Which item a position belongs to, and which level, its token id must say: -1 - (item * L + level), as `LateBinding`
gives them. Other ids are read as ever. A level that only counts within a code has no probabilities, and stays hard.

Source: soft-to-hard inputs of BLOGER (arXiv:2510.21242), there s + sg[h - s]; written as h + (s - sg[s]) here, which
is the same but for rounding. Items occur often in a batch, so mixtures are made once for each.

Shape letters: N items, U distinct ones of a batch, L levels of a code, K codewords of a level, D model width, V
dimensions of an item vector, H of a codeword.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llm_itemtok.items.base import Quantizer
from llm_itemtok.model.rows import ItemRows, embedding_scale
from llm_itemtok.vocab.item_vocab import ItemVocab

BLOCK = 65_536
"""Items whose place in the space of the codebooks is looked up at a time."""


class SoftInputs:
    """Makes mixed embeddings.

    Not a module: the quantizer belongs to the composite module already, and item vectors are no state of it.
    """

    def __init__(
        self, quantizer: Quantizer, vectors: Tensor, *, straight_through_residual: bool = False, own: bool = False
    ) -> None:
        """Mix by a quantizer.

        Args:
            quantizer: of the first levels of the codes, on the device of the model once that is used.
            vectors: float32 `[N, V]`, the item vectors, in the processor's memory.
            straight_through_residual: see `Quantizer.soft_assign_latent`.
            own: whether rows learn as they are read, and not as they are mixed.
        """
        self._own = own
        self._quantizer = quantizer
        self._vectors = vectors
        self._straight_through = straight_through_residual
        self._latent: Tensor | None = None

    def forget(self) -> None:
        """Look items up anew: the quantizer has changed."""
        self._latent = None

    def embed(
        self, ids: Tensor, rows: ItemRows, base: nn.Embedding, vocab: ItemVocab, codes_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Embeddings `[B, S, D]` of token ids int64 `[B, S]`, mixed where an id below 0 names an item and a level.

        Args:
            ids: see the module.
            rows: of the item tokens.
            base: the base model's input table.
            vocab: of the items.
            codes_of: codes int64 `[n, L]` of items int64 `[n]`, on their device.
        """
        named = ids < 0
        if not named.any():
            return rows.embed(ids, base)
        places = -1 - ids[named]
        items, levels = places // vocab.num_levels, places % vocab.num_levels
        words = codes_of(items).gather(1, levels.unsqueeze(1)).squeeze(1)
        hard = rows.embed(ids.masked_scatter(named, vocab.token_ids(words, levels)), base)
        mixed = levels < self._quantizer.num_levels
        distinct, which = items[mixed].unique(return_inverse=True)
        soft = self._mixtures(distinct, rows, vocab)[which, levels[mixed]] * embedding_scale(base).to(hard.device)
        nothing = (soft - soft.detach()).to(hard.dtype)
        where = named.masked_scatter(named, mixed)
        values = hard if self._own else torch.where(where.unsqueeze(-1), hard.detach(), hard)
        return values.index_put(where.nonzero(as_tuple=True), nothing, accumulate=True)

    def _mixtures(self, items: Tensor, rows: ItemRows, vocab: ItemVocab) -> Tensor:
        """Mixed rows `[U, L', D]` of distinct items, for the L' levels of the quantizer."""
        # Codes are read off in full precision, so what they are likely to be is, too.
        with torch.autocast(items.device.type, enabled=False):
            mixtures = []
            for level, probabilities in enumerate(self._probabilities(items)):
                start = vocab.level_starts[level]
                words = rows.input_rows[start : start + vocab.codes.sizes[level]].to(probabilities.dtype)
                mixtures.append(probabilities @ (words.detach() if self._own else words))
            return torch.stack(mixtures, dim=1)

    def _probabilities(self, items: Tensor) -> list[Tensor]:
        quantizer, residual = self._quantizer, self._straight_through
        if quantizer.codebooks.requires_grad:
            vectors = self._vectors[items.cpu()].to(items.device)
            return quantizer.soft_assign(vectors, straight_through_residual=residual)
        with torch.no_grad():
            if self._latent is None:
                blocks = self._vectors.split(BLOCK)
                self._latent = torch.cat([quantizer.to_latent(block.to(items.device)) for block in blocks])
            return quantizer.soft_assign_latent(self._latent[items])

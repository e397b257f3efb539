"""Where the rows of new item tokens start.

A row that means something from the first step saves training: `text_mean` gives a token the mean of the language
model's own input embeddings over the text of the items that carry it; `codebook` projects the mean residual vector of
those items. Both work for any codes, with or without a quantizer. `normal` is the control. All three return rows at
the scale of the base table (the root mean square over its rows), because a row far off that scale would either drown
or be drowned by the text tokens around it.

The library's own default (`mean_resizing`) makes all new rows nearly identical (they differ by 1e-6); it is not used.

Shape letters: N items, L levels, T item tokens, D model width, E vector width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from llm_itemtok.errors import ItemTokError
from llm_itemtok.vocab.item_vocab import ItemVocab


def normal(vocab: ItemVocab, table: Tensor, *, seed: int) -> Tensor:
    """Draw rows `[T, D]` from a normal distribution with the scale of `table` `[V, D]`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(vocab.num_tokens, table.shape[1], generator=generator)
    return rows * _rms(table)


def text_mean(vocab: ItemVocab, table: Tensor, item_token_ids: Sequence[Sequence[int]], *, seed: int) -> Tensor:
    """Mean of the base model's input embeddings over the text of the items under each codeword.

    The mean over all items is taken off first and the rest brought back to the table's scale: what tells codewords
    apart is the deviation, which a plain mean over many items would shrink to almost nothing.

    Args:
        vocab: the item vocabulary.
        table: float `[V, D]`, the base model's input embeddings.
        item_token_ids: text token ids of each item, in row order; an item without text has none and counts for
            nothing.
        seed: for codewords without any item text, which start as `normal`.

    Returns:
        float32 `[T, D]`.

    Raises:
        ItemTokError: if no item has text.
    """
    if not any(len(ids) for ids in item_token_ids):
        raise ItemTokError("`vocab.init: text-mean` needs item text, but no item has any; use `codebook` or `normal`")
    table = table.detach().float()
    lengths = torch.tensor([len(ids) for ids in item_token_ids])
    flat = torch.tensor([token for ids in item_token_ids for token in ids], dtype=torch.long)
    vectors = embedding_bag(flat, table, lengths.cumsum(0) - lengths, mode="sum")  # never holds a row a text token
    has_text = lengths > 0
    vectors[has_text] = vectors[has_text] / lengths[has_text].unsqueeze(1)
    centred = torch.where(has_text.unsqueeze(1), vectors - vectors[has_text].mean(0), torch.zeros(()))
    return _codeword_means(vocab, centred, has_text, table, seed)


def codebook(vocab: ItemVocab, table: Tensor, vectors: np.ndarray, *, seed: int) -> Tensor:
    """Project what each codeword stands for in vector space, level by level.

    At each level the row of a codeword is the mean of what the levels above left over of its items' vectors, the
    residual that a residual quantizer would store there; a random orthogonal map brings it to the model's width. It
    keeps distances, exactly where the model is as wide as the vectors, otherwise on average.

    Args:
        vocab: the item vocabulary.
        table: float `[V, D]`, the base model's input embeddings; only its scale is used.
        vectors: float32 `[N, E]`, the vectors that the codes were made from.
        seed: of the orthogonal map, and of codewords without items, which start as `normal`.

    Returns:
        float32 `[T, D]`.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = max(vectors.shape[1], table.shape[1])
    basis, _ = torch.linalg.qr(torch.randn(wide, min(vectors.shape[1], table.shape[1]), generator=generator))
    projection = basis if vectors.shape[1] >= table.shape[1] else basis.T
    projected = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)) @ projection
    projected = projected - projected.mean(0)
    return _codeword_means(vocab, projected, torch.ones(len(projected), dtype=torch.bool), table, seed, residual=True)


def _codeword_means(
    vocab: ItemVocab, vectors: Tensor, counted: Tensor, table: Tensor, seed: int, *, residual: bool = False
) -> Tensor:
    """Mean of item vectors `[N, D]` under each codeword, scaled level by level; with `residual`, of what is left."""
    rows = normal(vocab, table, seed=seed)
    scale = _rms(table)
    codes = torch.from_numpy(vocab.codes.table.astype(np.int64))
    left = vectors
    for level, (start, size) in enumerate(zip(vocab.level_starts, vocab.codes.sizes, strict=True)):
        code = codes[:, level]
        counts = torch.zeros(size).index_add_(0, code[counted], torch.ones(int(counted.sum())))
        means = torch.zeros(size, left.shape[1]).index_add_(0, code[counted], left[counted])
        means = means / counts.clamp(min=1).unsqueeze(1)
        if residual:
            left = left - means[code]
        used = counts > 0
        level_rms = means[used].square().mean().sqrt()
        # A level whose codewords all have the same mean (one codeword, or codes unrelated to the vectors of a tiny
        # catalogue) carries no direction to scale up; it keeps its random rows.
        if level_rms > 1e-6 * scale:
            rows[start : start + size][used] = means[used] * (scale / level_rms)
    return rows


def _rms(table: Tensor) -> float:
    """Root mean square of the rows that were ever set: padded tables hold zero rows, which do not count."""
    norms = table.detach().float().square().mean(1)
    return float(norms[norms > 0].mean().sqrt()) if bool((norms > 0).any()) else 0.02

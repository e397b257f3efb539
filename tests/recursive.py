"""Tiny models that know items beyond their tokens: recursive ones, and such that carry embeddings of items."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.item_embeddings import ItemEmbeddings
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.load import with_item_tokens
from llm_itemtok.model.recursive import Mixing, Recursion
from llm_itemtok.vocab import init
from tests.tiny import tiny_codes, tiny_lm, tiny_tokenizer

COLD = (55, 56)
"""Items that no training has seen."""


def vectors_of(codes: ItemCodes, without: Sequence[int] = ()) -> torch.Tensor:
    """Item vectors `[N, 5]`, zeros for some."""
    found = torch.randn(codes.num_items, 5, generator=torch.Generator().manual_seed(1))
    found[list(without)] = 0
    return found


def embeddings(
    width: int, codes: ItemCodes, *, guidance: str = "uid", cold: Sequence[int] = COLD, silent: bool = False
) -> ItemEmbeddings:
    """Embeddings of items of three kinds of guidance; those of `cold` are not learnt."""
    known = torch.ones(codes.num_items, dtype=torch.bool)
    known[list(cold)] = False
    return ItemEmbeddings(
        width,
        known=known,
        dimensions=0 if guidance == "vectors" else 7,
        vectors=None if guidance == "uid" else vectors_of(codes, cold[:1]),
        silent=silent,
    )


def recursive_model(
    family: str = "llama",
    *,
    codes: ItemCodes | None = None,
    guidance: str = "uid",
    mixing: Mixing = "hard",
    aligns: bool = False,
    cold: Sequence[int] = COLD,
    **changes: object,
) -> tuple[ItemTokenModel, PreTrainedTokenizerBase]:
    """A tiny recursive model, in evaluation mode, whose item side differs from the items' codes, and its tokenizer."""
    model, tokenizer = _with_tokens(family, codes, one_table=True, **changes)
    codes, width = model.vocab.codes, model.rows.input_rows.shape[1]
    items = embeddings(width, codes, guidance=guidance, cold=cold)
    recursion = Recursion(items, levels=codes.num_levels, width=width, hidden=12, mixing=mixing, aligns=aligns)
    recursion.fit_scale(model.codebooks(), torch.from_numpy(codes.table.astype(np.int64)))
    model.recursion = recursion
    return model.eval(), tokenizer


def named_model(
    family: str = "llama", *, codes: ItemCodes | None = None, silent: bool = False, **changes: object
) -> tuple[ItemTokenModel, PreTrainedTokenizerBase]:
    """A tiny model whose items' last tokens carry embeddings, in evaluation mode, and its tokenizer."""
    model, tokenizer = _with_tokens(family, codes, one_table=False, **changes)
    model.own = embeddings(model.rows.input_rows.shape[1], model.vocab.codes, silent=silent)
    return model.eval(), tokenizer


def _with_tokens(
    family: str,
    codes: ItemCodes | None,
    *,
    one_table: bool,
    seed: int = 0,
    normaliser: str = "level",
    **changes: object,
) -> tuple[ItemTokenModel, PreTrainedTokenizerBase]:
    tokenizer, lm = tiny_tokenizer(), tiny_lm(family, seed=seed, **changes)
    codes = tiny_codes() if codes is None else codes
    rows = lambda vocab, table: init.normal(vocab, table, seed=seed)  # noqa: E731
    model = with_item_tokens(lm, tokenizer, codes, rows, normaliser=normaliser, one_table=one_table)
    with torch.no_grad():  # initial rows of 0.02 would give nearly uniform predictions
        for table in (model.rows.input_rows, model.rows.output_rows):
            if table is not None:
                table.add_(torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return model, tokenizer

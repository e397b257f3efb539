"""What a recipe's `scoring` makes of a model: whether it knows items beyond their tokens, and how it predicts them."""

from collections.abc import Callable

import numpy as np
import torch

from llm_itemtok.config import RunConfig
from llm_itemtok.model.item_embeddings import ItemEmbeddings
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.recursive import Recursion
from llm_itemtok.pipeline.prepare import Dataset
from llm_itemtok.pipeline.vectors import guided_by_vectors
from llm_itemtok.settings import TokensScoring


def give_items(
    config: RunConfig, data: Dataset, model: ItemTokenModel, vectors: Callable[[], np.ndarray | None]
) -> None:
    """Give a model what its scoring needs beside item tokens.

    Args:
        config: the recipe.
        data: its data; which items are in training decides whose embeddings are learnt.
        model: changed in place.
        vectors: gives the item vectors `[N, D]`; called if the model reads them.
    """
    chosen, width = config.scoring, model.rows.input_rows.shape[1]
    known = torch.from_numpy(data.split.item_counts() > 0)
    if isinstance(chosen, TokensScoring):
        if chosen.item_embedding:
            model.own = ItemEmbeddings(
                width, known=known, dimensions=chosen.item_embedding, silent=True, seed=config.seed
            )
        return
    matrix = vectors() if guided_by_vectors(config) else None
    items = ItemEmbeddings(
        width,
        known=known,
        dimensions=0 if chosen.guidance == "vectors" else chosen.embedding,
        vectors=None if matrix is None else torch.from_numpy(matrix),
        seed=config.seed,
    )
    recursion = Recursion(
        items,
        levels=model.vocab.num_levels,
        width=width,
        hidden=chosen.hidden,
        mixing=chosen.mixing,
        aligns=chosen.alignment > 0,
        seed=config.seed,
    )
    recursion.fit_scale(model.codebooks(), torch.from_numpy(model.vocab.codes.table.astype(np.int64)))
    model.recursion = recursion

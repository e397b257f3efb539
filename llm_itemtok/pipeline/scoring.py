"""What a recipe's `scoring` makes of a model: whether it knows items beyond their tokens, and how it predicts them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llm_itemtok.config import RunConfig
from llm_itemtok.model.item_embeddings import ItemEmbeddings
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.recursive import Recursion
from llm_itemtok.pipeline.prepare import Dataset
from llm_itemtok.pipeline.vectors import guided_by_vectors
from llm_itemtok.settings import Examples, TokensScoring


def give_items(
    config: RunConfig, data: Dataset, model: ItemTokenModel, vectors: Callable[[], np.ndarray | None]
) -> None:
    """Give a model what its scoring needs beside item tokens.

    Args:
        config: the recipe.
        data: its data; which items training reads decides whose embeddings are learnt.
        model: changed in place.
        vectors: gives the item vectors `[N, D]`; called if the model reads them.
    """
    chosen, width = config.scoring, model.rows.input_rows.shape[1]
    known = torch.from_numpy(items_read(config.examples, data))
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


def items_read(chosen: Examples, data: Dataset) -> np.ndarray:
    """Which items training reads, bool `[N]`: those before another one in a row, and those that shall give their title.

    Args:
        chosen: of the recipe.
        data: its data.
    """
    read = np.zeros(len(data.catalog), dtype=bool)
    if chosen.tasks.get("next-item") and chosen.kind == "last":
        for sequence in data.split.train_sequences():
            read[sequence[-(chosen.history_length + 1) : -1]] = True
    elif chosen.tasks.get("next-item"):
        read |= data.split.followed_counts() > 0
    if chosen.tasks.get("item-to-title"):
        read |= np.array([bool(title) for title in data.catalog.titles])
    return read


def item_parameters(config: RunConfig, items: int, levels: int, width: int) -> tuple[int, int, int]:
    """How many weights `give_items` adds: learnt embeddings of items, the network's, and those between the two.

    Item vectors are taken to be as wide as the model: how wide they are is not always known before they are made.

    Args:
        config: the recipe.
        items: N.
        levels: L.
        width: D.
    """
    chosen = config.scoring
    if isinstance(chosen, TokensScoring):
        return items * chosen.item_embedding, 0, chosen.item_embedding * width
    learnt = 0 if chosen.guidance == "vectors" else chosen.embedding
    network = (levels - 1) * (3 * width + 1) * chosen.hidden
    return items * learnt, network, (learnt + (width if chosen.guidance != "uid" else 0)) * width


@torch.no_grad()
def path_figures(model: ItemTokenModel, batch_size: int = 4096) -> dict[str, Any]:
    """What the report shows of a recursive model's item side; empty for other models, and where no item has a vector.

    Args:
        model: in any mode.
        batch_size: items looked at at a time.

    Returns:
        `items`, how many have an embedding to go by; of these `levels`, for each level the share whose vector is made
        of the codeword of their code, `whole`, the share with all of them, and `distinct`, the share of unlike paths.
    """
    if model.recursion is None:
        return {}
    rows = torch.arange(model.vocab.codes.num_items, device=model.device)
    rows = rows[model.recursion.items.has(rows)]
    if not len(rows):
        return {}
    codebooks, paths = model.codebooks(), []
    for part in rows.split(batch_size):
        logits = model.recursion.item_side(part, model.codes_of(part), codebooks).logits
        paths.append(torch.stack([scores.argmax(1) for scores in logits], dim=1))
    found = torch.cat(paths)
    same = found == model.codes_of(rows)
    return {
        "items": len(rows),
        "levels": same.float().mean(0).tolist(),
        "whole": same.all(1).float().mean().item(),
        "distinct": len(found.unique(dim=0)) / len(rows),
    }

"""What a model has learnt about each item: the mean of its states just before it names the item.

A state that predicts an item's first token sees a user's history and nothing of the item, so items that follow upon the
same histories have like states, whatever their tokens are now. States are normalised to length 1, so that no context
outweighs others, and summed as whole numbers (multiples of 2**-32): their sum does not depend on the order, and so not
on the number of processes.

Shape letters: N items, D model width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset as ExampleTable
from torch import Tensor

from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.processes import added_up, dealt
from llm_itemtok.training.examples import NextItems
from llm_itemtok.training.late_binding import LateBinding

_UNIT = 2.0**32


@torch.inference_mode()
def predicting_states(
    model: ItemTokenModel,
    table: ExampleTable,
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, Tensor]],
    binding: LateBinding,
    *,
    contexts: int = 0,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over the training examples.

    Args:
        model: in evaluation mode.
        table: training examples, of which those of the task `next-item` are read.
        collate: renders them with the placeholders of `binding`.
        binding: to the current item tokens.
        contexts: predictions of each item that are wanted: examples are gone through in an order drawn with the seed,
            and one is read if it predicts an item that has fewer; 0 reads all.
        batch_size: examples at a time.
        seed: of that draw.

    Returns:
        float32 `[N, D]`, zeros for items that are never predicted; and int64 `[N]`, how often each is.
    """
    num_items = model.vocab.codes.num_items
    rows = _chosen(table, contexts, seed)
    width = model.rows.input_rows.shape[1]
    sums, counts = torch.zeros(num_items, width, dtype=torch.long), torch.zeros(num_items, dtype=torch.long)
    for batch_rows in dealt(rows, batch_size):
        columns = table[batch_rows.tolist()]
        batch = collate([dict(zip(columns, example, strict=True)) for example in zip(*columns.values(), strict=True)])
        first = batch["levels"] == 0
        items = binding.items(batch["labels"])[first]
        first = first.unflatten(1, (batch["input_ids"].shape[1], -1))[..., 0]  # a position may have several labels
        bound = {name: value.to(model.device) for name, value in binding(batch).items()}
        states, _ = model.states(bound["input_ids"], bound.get("context_ids"), bound.get("context_seen"))
        units = torch.nn.functional.normalize(states[first.to(states.device)].float(), dim=-1)
        sums.index_add_(0, items, (units.cpu().double() * _UNIT).round().long())
        counts += torch.bincount(items, minlength=num_items)
    whole, number = (added_up(each.numpy(), model.device) for each in (sums, counts))
    return (whole / (_UNIT * np.maximum(number, 1)[:, None])).astype(np.float32), number


def shrunk(states: np.ndarray, counts: np.ndarray, prior: float) -> np.ndarray:
    """Take back means of few states: they tell more of the users that they are of than of the item.

    Args:
        states: float32 `[N, D]`, about 0 as their mean.
        counts: int64 `[N]`, how many states each is the mean of.
        prior: n at which a mean counts half, at least 0. By least squares it would be how much the states of one item
            vary over how much items do.

    Returns:
        float32 `[N, D]`, means of n states times `n / (n + prior)`.
    """
    return states * (counts / np.maximum(counts + prior, 1)).astype(np.float32)[:, None]


def _chosen(table: ExampleTable, contexts: int, seed: int) -> np.ndarray:
    """Rows of the examples to read, int64, short ones first."""
    examples = NextItems(table)
    rows = examples.rows
    if contexts:
        flat, begins, ends = examples.items.tolist(), examples.begins + examples.first, examples.ends
        read = [0] * (max(flat) + 1)
        chosen = []
        for row in np.random.default_rng(seed).permutation(rows).tolist():
            targets = flat[begins[row] : ends[row]]
            if min(read[item] for item in targets) < contexts:
                chosen.append(row)
                for item in targets:
                    read[item] += 1
        rows = np.sort(np.array(chosen, dtype=np.int64))
    return rows[examples.by_length(rows)]

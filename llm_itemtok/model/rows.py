"""`ItemRows`: the trainable rows of the item tokens, beside the base model's table and never inside it.

PEFT's token layer copies the whole table on every forward pass and trains only the input side of untied models. Here
the base table is shared and untouched: an input id below the item range reads the base table, an id inside it reads
its own row; logits over a level are one small matrix product with that level's rows. Only an export writes the rows
into a table of the usual form.

Shape letters: T item tokens, D model width, V rows of the base table.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ItemRows(nn.Module):
    """Input and output vectors of the item tokens.

    Attributes:
        first_id: token id of the first row.
        input_rows: parameter `[T, D]`, in the units of the base table (before any embedding scale of the model).
        output_rows: parameter `[T, D]`, or None on a model whose head is tied to its input table.
    """

    def __init__(self, rows: Tensor, *, first_id: int, tied: bool) -> None:
        """Start from `rows` `[T, D]` on both sides; with no rows (identifiers in existing words) nothing is trained."""
        super().__init__()
        self.first_id = first_id
        self.input_rows = nn.Parameter(rows.clone(), requires_grad=len(rows) > 0)
        self.output_rows = None if tied else nn.Parameter(rows.clone(), requires_grad=len(rows) > 0)

    def __len__(self) -> int:
        return len(self.input_rows)

    def embed(self, input_ids: Tensor, base: nn.Embedding) -> Tensor:
        """Look ids up in the base table or in the item rows.

        Args:
            input_ids: int64 `[...]`, ids of text tokens and of item tokens.
            base: the base model's input embedding, of any subclass; Gemma's multiplies by a scale, which the item
                rows must share.

        Returns:
            `[..., D]` in the base model's dtype.
        """
        if not len(self):
            found: Tensor = base(input_ids)
            return found
        slots = input_ids - self.first_id
        is_item = (slots >= 0) & (slots < len(self))
        text = base(input_ids.masked_fill(is_item, 0))
        rows = self.input_rows[slots.clamp(0, len(self) - 1)].to(text.dtype)
        return torch.where(is_item.unsqueeze(-1), rows * embedding_scale(base), text)

    def head(self) -> Tensor:
        """Rows `[T, D]` that hidden states are multiplied with."""
        return self.input_rows if self.output_rows is None else self.output_rows


def input_table(lm: PreTrainedModel) -> nn.Embedding:
    """The base model's input embedding; its weight is `[V, D]`."""
    table = lm.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


def output_head(lm: PreTrainedModel) -> nn.Linear:
    """The base model's output head; its weight is `[V, D]`, the input table itself on a tied model."""
    head = lm.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def embedding_scale(base: nn.Embedding) -> Tensor:
    """Factor that an embedding module applies to its rows: 1, or `sqrt(D)`, in its own dtype, for Gemma's."""
    return torch.tensor(getattr(base, "scalar_embed_scale", 1.0), dtype=base.weight.dtype)

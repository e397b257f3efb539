"""A vector of each item's own, learnt or from its item vector: what tells items apart beyond the tokens they share.

Two models read it. One that spells items by their tokens can carry it on each item's last token, which only what
follows the item ever sees. The recursive model (`model/recursive.py`) is guided by it.

An item that training never saw has no learnt embedding worth reading, so it counts as one without (`known`); neither
has an item that was added later. With item vectors beside, or instead, such items have an embedding, too.

Shape letters: N items, n items of a call, U distinct ones, D model width, E dimensions of a learnt embedding, V of an
item vector.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

ITEM_TABLES = ("own.table", "items.table")
"""How the names of learnt embeddings end in a model that has them."""


class Named(NamedTuple):
    """Items that ids below 0 name, each once, and what stands for them."""

    rows: Tensor
    """int64 `[U]`, ascending."""
    vectors: Tensor
    """`[U, D]`, at the scale that embeddings have inside the body."""
    logits: list[Tensor]
    """Of the item side of a recursive network, for each level `[U, K]`; empty without one."""


class ItemEmbeddings(nn.Module):
    """Learnt embeddings, projected to the model's width, and beside them (or instead) projected item vectors.

    Attributes:
        table: parameter `[N, E]`, or None where only item vectors are read.
        known: bool `[N]`: items whose row of the table was trained.
        vectors: float32 `[N, V]`, the item vectors, or None.
    """

    known: Tensor
    vectors: Tensor | None
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        width: int,
        *,
        known: Tensor,
        dimensions: int,
        vectors: Tensor | None = None,
        silent: bool = False,
        seed: int = 0,
    ) -> None:
        """Begin at random.

        Args:
            width: D.
            known: bool `[N]`, items that training reads.
            dimensions: E; 0 learns no embeddings, and then there must be item vectors.
            vectors: float32 `[N, V]`, zeros for an item without; None reads none.
            silent: begin with projections of 0, so that the model begins as one without.
            seed: of the initial values.
        """
        super().__init__()
        assert dimensions > 0 or vectors is not None
        self.register_buffer("known", known.clone())
        self.register_buffer("vectors", None if vectors is None else vectors.float().clone())
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to use up
            torch.default_generator.manual_seed(seed)
            self.table = nn.Parameter(torch.randn(len(known), dimensions)) if dimensions else None
            self.project = nn.Linear(dimensions, width) if dimensions else None
            self.translate = None if vectors is None else nn.Linear(vectors.shape[1], width)
        if vectors is not None:
            given = vectors[vectors.any(1)].float()
            self.register_buffer("mean", given.mean(0))
            self.register_buffer("scale", (given - given.mean(0)).square().mean().sqrt().clamp(min=1e-6))
        if silent:
            for layer in (self.project, self.translate):
                if layer is not None:
                    nn.init.zeros_(layer.weight)
                    nn.init.zeros_(layer.bias)

    @property
    def settings(self) -> dict[str, int]:
        """Shapes that build a module of the same kind."""
        return {
            "items": len(self.known),
            "dimensions": 0 if self.table is None else self.table.shape[1],
            "vector_dimensions": 0 if self.vectors is None else self.vectors.shape[1],
        }

    def has(self, rows: Tensor) -> Tensor:
        """Which items, int64 `[n]`, have an embedding, bool `[n]`."""
        found = torch.zeros_like(rows, dtype=torch.bool)
        if self.table is not None:
            found = found | self.known[rows]
        return found if self.vectors is None else found | self.vectors[rows].any(1)

    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings `[n, D]` of items, int64 `[n]`, in the weights' type; zeros for one that has none."""
        parts = []
        if self.table is not None and self.project is not None:
            parts.append(self.project(self.table[rows]) * self.known[rows].unsqueeze(1))
        if self.vectors is not None and self.translate is not None:
            vectors = self.vectors[rows]
            known = ((vectors - self.mean) / self.scale).to(self.translate.weight.dtype)
            parts.append(self.translate(known) * vectors.any(1, keepdim=True))
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def extend(self, more: int, vectors: Tensor | None = None) -> None:
        """Make room for more items, without learnt embeddings; with their vectors `[more, V]` if vectors are read."""
        self.known = torch.cat([self.known, self.known.new_zeros(more)])
        if self.table is not None:
            self.table = nn.Parameter(torch.cat([self.table, self.table.new_zeros(more, self.table.shape[1])]))
        if self.vectors is not None:
            assert vectors is not None
            self.vectors = torch.cat([self.vectors, vectors.to(self.vectors)])

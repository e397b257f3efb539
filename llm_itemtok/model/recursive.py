"""IntRR: one vector an item goes into the backbone, and a small recursive network yields the levels of the next item.

The same network stands at both ends, with the same weights. It goes through the levels under a *guidance* g of the
model's width, and meets each level's codebook, whose codewords are the item tokens' rows:

    x_1 = g,   x_l = MLP_l([c_{l-1}; g]),   s_l = x_l C_l^T,   p_l = softmax(s_l)

At the item side g is an embedding of the item's own (`ItemEmbeddings`), and c_l the codeword with the highest score,
through which the gradient passes as if it were the mean of all under p_l. Their sum is what the backbone reads of the
item: its code is redistributed over the codebooks by what is learnt of the item, and may differ from its code in the
table. At the user side g is the backbone's last state, c_l the codeword of the target (in training) or of a beam, and
s_l the logits. So the backbone runs once for a recommendation, over a row that is L times shorter.

Decisions:
- Codewords are the rows of the item tokens (`ItemRows`), as wide as the model: they begin with a meaning, updates of
  item tokens find them, and their scale is that of the base's table. Scores are products with them, as everywhere in a
  language model. The MLPs see them at scale 1 (`unit`), beside a guidance of that scale.
- An item's vector is brought to the scale of the base's table (`gain`, measured once on the items' codes).
- An item without an embedding of its own, new or never in training, is read as the sum of its code's codewords.
- Scores carry neither a bias nor `1/sqrt(D)`, as released.

Source: IntRR, arXiv:2602.20704, and its released code. There the codebooks begin as N(0, 1) beside an untrained T5.

Shape letters: n items or positions, L levels, K codewords of a level, D model width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from llm_itemtok.model.item_embeddings import ItemEmbeddings

Mixing = Literal["hard", "soft"]


class Assigned(NamedTuple):
    """What the network makes of guidances."""

    vectors: Tensor
    """float `[n, D]`, the sum of the codewords, at the scale of the base's table."""
    logits: list[Tensor]
    """For each level float `[n, K]`."""


@final
class Recursion(nn.Module):
    """The recursive network of both sides.

    Attributes:
        items: what guides it at the item side.
        steps: the MLPs of levels 1 to L - 1.
        mixing: `hard` reads the best codeword at the item side, `soft` the mean of all by their probability.
        aligns: whether the model should tell how likely the item side finds each item's code.
    """

    citation = """@misc{wang2026intrr,
  title         = {IntRR: A Framework for Integrating SID Redistribution and Length Reduction},
  author        = {Wang, Z. and Xu, L. and Deng, W. and Yan, H. and Liu, K. and Chu, X.},
  year          = {2026},
  eprint        = {2602.20704},
  archivePrefix = {arXiv}
}"""
    unit: Tensor
    gain: Tensor

    def __init__(
        self,
        items: ItemEmbeddings,
        *,
        levels: int,
        width: int,
        hidden: int,
        mixing: Mixing = "hard",
        aligns: bool = False,
        seed: int = 0,
    ) -> None:
        """Make an untrained network.

        Args:
            items: the guidance of items.
            levels: L.
            width: D.
            hidden: of the MLPs' inner layer.
            mixing: see the class.
            aligns: see the class.
            seed: of the initial weights.
        """
        super().__init__()
        self.items = items
        self.mixing: Mixing = mixing
        self.aligns = aligns
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to use up
            torch.manual_seed(seed)
            self.steps = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, width))
                for _ in range(levels - 1)
            )
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("gain", torch.ones(()))

    @torch.no_grad()
    def fit_scale(self, codebooks: Sequence[Tensor], codes: Tensor) -> None:
        """Measure `unit` and `gain` on the codebooks, L times `[K, D]`, and the items' codes, int64 `[N, L]`."""
        self.unit.copy_(torch.cat(list(codebooks)).square().mean().sqrt().clamp(min=1e-6))
        self.gain.copy_(self.unit / _spelled(codebooks, codes).square().mean().sqrt().clamp(min=1e-6))

    def query(self, level: int, guidance: Tensor, before: Tensor | None) -> Tensor:
        """What is multiplied with a level's codebook, `[..., D]`.

        Args:
            level: in `[0, L)`.
            guidance: `[..., D]`.
            before: `[..., D]`, the codeword of the level before; None at level 0.
        """
        if before is None:
            assert level == 0
            return guidance
        step: Tensor = self.steps[level - 1](torch.cat([before / self.unit, guidance], dim=-1))
        return step

    def item_side(self, rows: Tensor, codes: Tensor, codebooks: Sequence[Tensor]) -> Assigned:
        """What the backbone reads of items.

        Args:
            rows: int64 `[n]`, the items.
            codes: int64 `[n, L]`, their codes.
            codebooks: L times `[K, D]`.
        """
        guidance = self.items(rows)
        found, logits = guidance.new_zeros(guidance.shape), []
        before: Tensor | None = None
        for level, codebook in enumerate(codebooks):
            scores = self.query(level, guidance, before) @ codebook.T
            mean = scores.softmax(-1) @ codebook
            before = mean if self.mixing == "soft" else mean + (codebook[scores.argmax(-1)] - mean).detach()
            found = found + before
            logits.append(scores)
        vectors = torch.where(self.items.has(rows).unsqueeze(1), found, _spelled(codebooks, codes))
        return Assigned(vectors * self.gain, logits)

    def user_side(self, states: Tensor, codes: Tensor, codebooks: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each level, L times `[n, K]`, given the levels before.

        Args:
            states: `[n, D]`, of the backbone.
            codes: int64 `[n, L]`, of the targets; the last level is not read.
            codebooks: L times `[K, D]`.
        """
        logits = []
        before: Tensor | None = None
        for level, codebook in enumerate(codebooks):
            logits.append(self.query(level, states, before) @ codebook.T)
            before = codebook[codes[:, level]]
        return logits


def _spelled(codebooks: Sequence[Tensor], codes: Tensor) -> Tensor:
    """Sum of the codewords of codes, int64 `[n, L]`: `[n, D]`."""
    parts = [codebook[codes[:, level]] for level, codebook in enumerate(codebooks)]
    return torch.stack(parts).sum(0)

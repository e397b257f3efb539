"""Two more terms for an RQ-VAE, after LETTER (Wang et al. 2024, arXiv:2405.07314).

- Alignment: what an item's code stands for should tell its collaborative vector from those of other items, so that
  codes say who buys an item and not only what it is.
- Diversity: codewords are put into groups of about equal size, and a codeword should be nearer to one of its own group
  than to all others, which keeps codewords apart between groups and items from crowding on a few of them.

Ours differ from the paper in the map that alignment learns between the two spaces (the paper has them of one size), in
collaborative vectors and rebuilt ones of length 1 with one learned temperature, in cosines between codewords where
diversity has their inner products (so it cannot be lowered by longer codewords, and stays near its value for codewords
in no order: with 256 of them, between 4.70 and 5.54), and in groups made by prices instead of constrained k-means.

Shape letters in this file: B batch, L levels, K codewords a level, H dimensions of a codeword, C of a collaborative
vector.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_itemtok.items.balanced_kmeans import balanced_kmeans

GROUPS = 10
"""Of the codewords of a level, as in the paper's released settings."""


class Alignment(nn.Module):
    """The contrastive term between codes and collaborative vectors, and the map it learns for it."""

    def __init__(self, latent_dimensions: int, collaborative_dimensions: int) -> None:
        """Make the map.

        Args:
            latent_dimensions: H.
            collaborative_dimensions: C.
        """
        super().__init__()
        self.map = nn.Linear(latent_dimensions, collaborative_dimensions, bias=False)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, latent: Tensor, collaborative: Tensor) -> Tensor:
        """Minus the log-probability of an item's own collaborative vector among those of the batch.

        Args:
            latent: float `[B, H]`, sums of codewords.
            collaborative: float `[B, C]`; a zero vector says nothing, and its row is neither asked nor answered.

        Returns:
            float `[B]`, 0 for items without a collaborative vector.
        """
        known = collaborative.any(dim=1)
        own, others = F.normalize(self.map(latent[known]), dim=1), F.normalize(collaborative[known], dim=1)
        logits = own @ others.T * self.log_sharpness.exp().clamp(max=100.0)
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")
        return latent.new_zeros(len(latent)).masked_scatter(known, loss)


@torch.no_grad()
def codeword_groups(codebooks: Tensor, *, seed: int) -> Tensor:
    """Put the codewords of each level into groups of about equal size.

    Args:
        codebooks: float `[L, K, H]`.
        seed: of the groups.

    Returns:
        int64 `[L, K]`, each in `[0, GROUPS)`.
    """
    number = min(GROUPS, codebooks.shape[1])
    labels = [balanced_kmeans(codebook.numpy(), number, iterations=10, seed=seed).labels for codebook in codebooks]
    return torch.from_numpy(np.stack(labels))


def diversity(codebooks: Tensor, codes: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Minus the log-probability of a codeword of the own group among all others of the level.

    Args:
        codebooks: float `[L, K, H]`.
        codes: int64 `[B, L]`.
        groups: int64 `[L, K]`.
        generator: draws the codeword of the own group.

    Returns:
        float `[B]`, mean over levels; a codeword that is alone in its group adds 0.
    """
    losses = []
    if codebooks.shape[1] < 2:
        return codebooks.new_zeros(len(codes))
    for codebook, code, group in zip(codebooks, codes.T, groups, strict=True):
        directions = F.normalize(codebook, dim=1)
        itself = F.one_hot(code, len(codebook)).bool()
        logits = (directions[code] @ directions.T).masked_fill(itself, -torch.inf)
        friends = (group[code][:, None] == group) & ~itself
        # Where nobody is in the group, all are drawn from, and the term is struck out.
        alone = ~friends.any(dim=1)
        drawn = torch.multinomial((friends | (alone[:, None] & ~itself)).float(), 1, generator=generator)[:, 0]
        losses.append(F.cross_entropy(logits, drawn, reduction="none").masked_fill(alone, 0.0))
    return torch.stack(losses).mean(dim=0)


class LetterTerms(nn.Module):
    """Both terms, weighted, for training; a weight of 0 leaves a term out."""

    def __init__(
        self,
        latent_dimensions: int,
        collaborative: Tensor | None,
        *,
        alignment_weight: float,
        diversity_weight: float,
        seed: int,
    ) -> None:
        """Make what the terms need.

        Args:
            latent_dimensions: H.
            collaborative: float `[N, C]`, one row an item; None where alignment has no weight.
            alignment_weight: at least 0.
            diversity_weight: at least 0.
            seed: of groups, and of the codewords drawn from them.
        """
        super().__init__()
        self.collaborative = collaborative
        self.alignment_weight = alignment_weight
        self.diversity_weight = diversity_weight
        self.seed = seed
        self.draws = torch.Generator().manual_seed(seed)
        self.groups: Tensor | None = None
        if alignment_weight:
            assert collaborative is not None  # whoever gives the weight has checked it
            self.alignment = Alignment(latent_dimensions, collaborative.shape[1])

    def begin_epoch(self, codebooks: Tensor) -> None:
        """Group the codewords as they are now."""
        if self.diversity_weight:
            self.groups = codeword_groups(codebooks.detach(), seed=self.seed)

    def forward(self, rows: Tensor, codes: Tensor, latent: Tensor, codebooks: Tensor) -> Tensor:
        """The weighted sum of the terms.

        Args:
            rows: int64 `[B]`, of the items.
            codes: int64 `[B, L]`.
            latent: float `[B, H]`, sums of codewords.
            codebooks: float `[L, K, H]`.

        Returns:
            float `[B]`.
        """
        total = latent.new_zeros(len(rows))
        if self.alignment_weight and self.collaborative is not None:
            total = total + self.alignment_weight * self.alignment(latent, self.collaborative[rows])
        if self.diversity_weight and self.groups is not None:
            total = total + self.diversity_weight * diversity(codebooks, codes, self.groups, self.draws)
        return total

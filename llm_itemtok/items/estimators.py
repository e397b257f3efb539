"""How gradients pass the choice of codewords: three estimators of one signature.

Each takes points in the space of the codebooks, chooses a codeword a level, and returns what the decoder reads with the
two losses that tie points and codewords together. They differ in the gradient that the points get from the decoder.

- `straight_through`: as if nothing had been rounded. One estimate on the *sum* of the codewords: one a level would
  multiply the gradient by the number of levels.
- `rotation`: the sum of the codewords is written as the point turned and stretched, turn and stretch held constant, so
  gradients keep their angle to it. Fifty et al. 2024 (arXiv:2410.06424), on the sum for the same reason.
- `gumbel`: codewords are drawn, nearer ones more often, and the gradient is that of the soft choice; it reaches every
  level. Jang et al. 2017 (arXiv:1611.01144), straight-through. Ours: the distances are divided by the mean nearest one,
  so that a temperature means the same in every space.

Shape letters in this file: N points, L levels, K codewords a level, H dimensions of a codeword.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_itemtok.items.residual import lowest, squared_distances


class Estimate(NamedTuple):
    """A differentiable choice of codewords; losses are means over levels and dimensions, one a point."""

    codes: Tensor
    """int64 `[N, L]`."""
    quantized: Tensor
    """float `[N, H]`, in value the sum of the chosen codewords."""
    codebook_loss: Tensor
    """float `[N]`, pulls codewords to residuals; no gradient to the points."""
    commitment_loss: Tensor
    """float `[N]`, pulls residuals to codewords; no gradient to the codebooks."""


Estimator = Callable[[Tensor, Tensor, Tensor | None], Estimate]
"""Called with points `[N, H]`, codebooks `[L, K, H]`, and prices `[L, K]` or None."""


def straight_through(latent: Tensor, codebooks: Tensor, prices: Tensor | None = None) -> Estimate:
    """The nearest codewords; the points get the decoder's gradient as it is.

    Args:
        latent: float `[N, H]`.
        codebooks: float `[L, K, H]`.
        prices: float `[L, K]`, added to squared distances before the choice; None for none.
    """
    codes, residual, losses = _greedy(latent, codebooks, prices)
    return Estimate(codes, latent - residual.detach(), *losses)


def rotation(latent: Tensor, codebooks: Tensor, prices: Tensor | None = None) -> Estimate:
    """The nearest codewords; the points get the decoder's gradient turned back and stretched.

    With unit vectors `a` along the point and `b` along the sum of the codewords `q`, and `r` along `a + b`, the turn is
    `R = I - 2 r r^T + 2 b a^T`, and the result `(|q| / |x|) R x`, all but `x` held constant. A point at the origin has
    no direction and gets the straight-through gradient.

    Args:
        latent: float `[N, H]`.
        codebooks: float `[L, K, H]`.
        prices: as in `straight_through`.
    """
    codes, residual, losses = _greedy(latent, codebooks, prices)
    passed = latent - residual.detach()
    goal, own = passed.detach(), latent.detach()
    length = own.norm(dim=1, keepdim=True)
    a, b = F.normalize(own, dim=1), F.normalize(goal, dim=1)
    r = F.normalize(a + b, dim=1)
    turned = latent - 2 * (latent * r).sum(dim=1, keepdim=True) * r + 2 * (latent * a).sum(dim=1, keepdim=True) * b
    turned = turned * (goal.norm(dim=1, keepdim=True) / length.clamp(min=1e-12))
    turned = turned + (goal - turned).detach()  # the value without the rounding of the turn
    return Estimate(codes, torch.where(length > 1e-12, turned, passed), *losses)


def gumbel(
    latent: Tensor,
    codebooks: Tensor,
    prices: Tensor | None = None,
    *,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Codewords drawn by how near they are; points and codebooks get the gradient of the soft choice.

    Args:
        latent: float `[N, H]`.
        codebooks: float `[L, K, H]`.
        prices: as in `straight_through`.
        temperature: above 0, in mean squared distances to the nearest codeword; towards 0 the draw is the nearest.
        generator: of the draws.
    """
    residual = latent
    codes, codebook_losses, commitment_losses = [], [], []
    for level, codebook in enumerate(codebooks):
        distances = _priced(squared_distances(residual, codebook), prices, level)
        unit = distances.detach().min(dim=1).values.clamp(min=0).mean() + 1e-12
        uniform = torch.rand(distances.shape, generator=generator, device=distances.device)
        noise = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        soft = torch.softmax(-distances / (temperature * unit) + noise, dim=1)
        code = soft.argmax(dim=1)
        choice = F.one_hot(code, len(codebook)) + soft - soft.detach()
        codebook_losses.append((residual.detach() - codebook[code]).square().mean(dim=1))
        commitment_losses.append((residual - codebook[code].detach()).square().mean(dim=1))
        residual = residual - choice @ codebook
        codes.append(code)
    return Estimate(
        torch.stack(codes, dim=1),
        latent - residual,
        _mean_of_levels(codebook_losses),
        _mean_of_levels(commitment_losses),
    )


def _greedy(latent: Tensor, codebooks: Tensor, prices: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Codes `[N, L]`, what they leave of the points `[N, H]`, codebook and commitment loss `[N]` each."""
    residual = latent
    codes, codebook_losses, commitment_losses = [], [], []
    for level, codebook in enumerate(codebooks):
        code = lowest(_priced(squared_distances(residual.detach(), codebook.detach()), prices, level))
        codeword = codebook[code]
        codebook_losses.append((residual.detach() - codeword).square().mean(dim=1))
        commitment_losses.append((residual - codeword.detach()).square().mean(dim=1))
        residual = residual - codeword.detach()
        codes.append(code)
    return torch.stack(codes, dim=1), residual, (_mean_of_levels(codebook_losses), _mean_of_levels(commitment_losses))


def _priced(distances: Tensor, prices: Tensor | None, level: int) -> Tensor:
    return distances if prices is None else distances + prices[level]


def _mean_of_levels(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean(dim=0)

"""Codebooks that are trained: where they start, and how their codewords are kept in use.

Shape letters in this file: N items, L levels, K codewords a level, D dimensions of a vector.
"""

import torch
from torch import Tensor

from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.kmeans import kmeans
from llm_itemtok.items.residual import nearest_codes


@torch.no_grad()
def start_codebooks(quantizer: Quantizer, x_ND: Tensor, *, seed: int) -> None:
    """Set a quantizer's codebooks to residual k-means of the latents of all items."""
    residual = quantizer.to_latent(x_ND).numpy()
    for level in range(quantizer.num_levels):
        clusters = kmeans(residual, quantizer.num_codewords, iterations=20, seed=seed + level)
        quantizer.codebooks.data[level] = torch.from_numpy(clusters.centres)
        residual = residual - clusters.centres[clusters.labels]


@torch.no_grad()
def revive(
    quantizer: Quantizer,
    optimizer: torch.optim.Optimizer,
    x_ND: Tensor,
    used_LK: Tensor,
    generator: torch.Generator,
) -> int:
    """Move each codeword that no item chose onto the residual of an item, drawn by squared error at that level.

    The optimizer forgets what it knew of the codeword, or its momentum would carry the new one off.

    Args:
        quantizer: changed in place.
        optimizer: that trains its codebooks.
        x_ND: item vectors.
        used_LK: how often each codeword was chosen.
        generator: of the draws.

    Returns:
        Number of codewords moved.
    """
    dead_LK = used_LK == 0
    if not dead_LK.any():
        return 0
    residual = quantizer.to_latent(x_ND)
    state = optimizer.state[quantizer.codebooks]
    for level, dead_K in enumerate(dead_LK):
        codebook = quantizer.codebooks.data[level]
        rest = residual - codebook[nearest_codes(residual, codebook[None])[0][:, 0]]
        error = rest.square().sum(dim=1)
        dead = dead_K.nonzero()[:, 0][: int((error > 0).sum())]
        if len(dead):
            codebook[dead] = residual[torch.multinomial(error, len(dead), generator=generator)]
            for name in ("exp_avg", "exp_avg_sq"):
                state[name][level, dead] = 0
        residual = rest
    return int(dead_LK.sum())

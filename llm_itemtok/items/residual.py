"""Residual quantisation: describe an item vector by a short path of codewords.

Level 0 picks the codeword nearest to the item vector; each later level picks the codeword nearest to what the levels
above left over. The path `(c_0, ..., c_{L-1})` is the item's code, coarse first, so items that share a prefix are close
in the embedding space. RQ-VAE and residual k-means differ only in how they *learn* the codebooks; both read codes off
them with the functions here.

Sources: residual quantisation as in Lee et al. 2022 (arXiv:2203.01941); its use for item identifiers as in TIGER,
Rajput et al. 2023 (arXiv:2305.05065), 3.1.

Shape letters in this file: N items, L levels, K codewords a level, D dimensions.
"""

import torch
from torch import Tensor

from llm_itemtok.errors import DataError

BLOCK = 1024
"""Rows quantised at a time, so that `BLOCK * K` distances stay in the processor's cache."""


def squared_distances(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Squared Euclidean distance of every vector to every codeword.

    Expanded into a matrix product, because that is fast and, unlike `torch.cdist`, twice differentiable. The price is
    rounding: about 1e-7 of the squared length of the vectors.

    Args:
        x_ND: vectors, float.
        codebook_KD: codewords, float, same device.

    Returns:
        float `[N, K]`, squared units of `x_ND`; may be a rounding error below zero.
    """
    own_N1 = x_ND.square().sum(dim=1, keepdim=True)
    return own_N1 + codebook_KD.square().sum(dim=1) - 2 * (x_ND @ codebook_KD.T)


def lowest(distances_NK: Tensor) -> Tensor:
    """Index of the lowest value of each row, int64 `[N]`; a tie goes to the lowest index."""
    if distances_NK.device.type == "cpu" and distances_NK.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(distances_NK.detach().numpy().argmin(axis=1))  # several times faster than torch's
    return distances_NK.argmin(dim=1)


@torch.no_grad()
def nearest_codes(x_ND: Tensor, codebooks_LKD: Tensor, prices_LK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Read every item's code off fixed codebooks, greedily from level 0 down.

    Greedy search is the definition here, not an approximation of a joint search: a code must not depend on levels
    below it, or prefixes would lose their meaning.

    Args:
        x_ND: item vectors, float, in the space the codebooks were fitted in.
        codebooks_LKD: one codebook a level, float, same device as `x_ND`.
        prices_LK: added to squared distances before the choice, in squared units of `x_ND`; None for none.

    Returns:
        codes_NL: int64 codeword indices, each in `[0, K)`. A tie goes to the lowest index.
        error_N: squared Euclidean distance left after the last level, in squared units of `x_ND`. Zero means the code
            rebuilds the vector exactly.

    Raises:
        DataError: if the last dimensions of the two tensors differ.
    """
    if x_ND.shape[-1] != codebooks_LKD.shape[-1]:
        raise DataError(
            f"item vectors have {x_ND.shape[-1]} dimensions but the codebooks have {codebooks_LKD.shape[-1]}; "
            "embed the items with the model the item tokenizer was fitted on"
        )
    codes = torch.empty(len(x_ND), len(codebooks_LKD), dtype=torch.int64, device=x_ND.device)
    errors = torch.empty(len(x_ND), dtype=x_ND.dtype, device=x_ND.device)
    for start in range(0, len(x_ND), BLOCK):
        rows = slice(start, start + BLOCK)
        residual_ND = x_ND[rows]
        for level, codebook_KD in enumerate(codebooks_LKD):
            # As `squared_distances`, in place: half the time goes into memory otherwise.
            distances_NK = residual_ND.square().sum(dim=1, keepdim=True) + codebook_KD.square().sum(dim=1)
            distances_NK.sub_(residual_ND @ codebook_KD.T, alpha=2)
            if prices_LK is not None:
                distances_NK += prices_LK[level]
            code_N = lowest(distances_NK)
            residual_ND = residual_ND - codebook_KD[code_N]
            codes[rows, level] = code_N
        errors[rows] = residual_ND.square().sum(dim=1)
    return codes, errors


def sum_of_codewords(codes_NL: Tensor, codebooks_LKD: Tensor) -> Tensor:
    """Rebuild vectors from codes.

    Args:
        codes_NL: int64 codeword indices, each in `[0, K)`.
        codebooks_LKD: one codebook a level, float.

    Returns:
        float `[N, D]`: the sum of each item's codewords, differentiable in the codebooks.
    """
    sum_ND = codebooks_LKD.new_zeros(len(codes_NL), codebooks_LKD.shape[-1])
    for codebook_KD, code_N in zip(codebooks_LKD, codes_NL.T, strict=True):
        sum_ND = sum_ND + codebook_KD[code_N]  # one after the other: [N, L, D] would be L times as much memory
    return sum_ND


@torch.no_grad()
def estimate_codebooks(x_ND: Tensor, codes_NL: Tensor, num_codewords: int) -> Tensor:
    """Codebooks for codes that came without any: level by level, the mean residual of a codeword's items.

    For codes of residual k-means at its optimum this gives its codebooks back.

    Args:
        x_ND: item vectors, float.
        codes_NL: int64 codeword indices, each in `[0, num_codewords)`.
        num_codewords: K, the same for all levels.

    Returns:
        float `[L, K, D]`; a codeword without items is the zero vector, that is, it adds nothing.
    """
    residual_ND = x_ND.clone()
    codebooks = x_ND.new_zeros(codes_NL.shape[1], num_codewords, x_ND.shape[1])
    for codebook_KD, code_N in zip(codebooks, codes_NL.T, strict=True):
        counts_K = torch.bincount(code_N, minlength=num_codewords).clamp(min=1)
        codebook_KD.index_add_(0, code_N, residual_ND).div_(counts_K[:, None])
        residual_ND -= codebook_KD[code_N]
    return codebooks


def used_codewords(codes_NL: Tensor, num_codewords: int) -> Tensor:
    """Which codewords of each level some item uses: int64 `[N, L]` to bool `[L, K]`."""
    return torch.stack([torch.bincount(code_N, minlength=num_codewords) > 0 for code_N in codes_NL.T])

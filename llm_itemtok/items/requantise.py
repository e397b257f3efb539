"""Item vectors that have changed, and codes that are to follow them: codebooks that begin at the present codes.

Fitting a quantizer anew would number its codewords as it likes, and a model that has learnt what codeword 17 means
would have to begin again. Here the codebooks are estimated from the codes that items have, and a few steps of Lloyd's
algorithm let them follow the vectors: index by index, so meanings drift instead of being dealt anew.

A level is then read as a mixture of as many spherical Gaussians as it has codewords, of one variance and equal weight,
on what the levels above left over:

    log p(k | residual) = log softmax_k( -||residual - e_k||^2 / (2 sigma_l^2) )

with `sigma_l^2` the mean squared error within the codewords of the level, of one dimension. So an item's codes have
log-likelihoods in nats, as those of a language model have, and the two can be added.

Decisions:
- Codewords that no item uses take no part: nothing is known of what they would mean.
- Items without a vector (all zeros) are left out by whoever calls this.

Shape letters in this file: N items, L levels, K codewords of the largest level, D dimensions, B beams, F given codes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.residual import estimate_codebooks, nearest_codes, squared_distances, used_codewords

BLOCK = 256
"""Items looked at at a time."""


@dataclass(frozen=True)
class LevelMixtures:
    """What codes say about vectors, and how well.

    Attributes:
        codebooks: float32 `[L, K, D]`.
        closed: float32 `[L, K]`, infinite for codewords that take no part, else 0.
        variances: float32 `[L]`, mean squared error within the codewords of each level, of one dimension.
    """

    codebooks: Tensor
    closed: Tensor
    variances: Tensor

    @classmethod
    @torch.no_grad()
    def follow(cls, vectors: np.ndarray, codes: ItemCodes, rows: np.ndarray, *, steps: int) -> "LevelMixtures":
        """Estimate codebooks from present codes, and let them follow the vectors.

        Args:
            vectors: float32 `[N, D]`.
            codes: N items.
            rows: int64, the items that count.
            steps: of Lloyd's algorithm, at least 0.
        """
        x_ND = torch.from_numpy(vectors[rows])
        codes_NL = torch.from_numpy(codes.table[rows].astype(np.int64))
        num_codewords = max(codes.sizes)
        codebooks = estimate_codebooks(x_ND, codes_NL, num_codewords)
        closed = torch.where(used_codewords(codes_NL, num_codewords), 0.0, torch.inf)
        for _ in range(steps):
            codes_NL, _ = nearest_codes(x_ND, codebooks, closed)
            moved = estimate_codebooks(x_ND, codes_NL, num_codewords)
            codebooks = torch.where(used_codewords(codes_NL, num_codewords).unsqueeze(2), moved, codebooks)
        codes_NL, _ = nearest_codes(x_ND, codebooks, closed)
        variances, residual = [], x_ND
        for level, codebook in enumerate(codebooks):
            residual = residual - codebook[codes_NL[:, level]]
            variances.append(residual.square().mean().clamp(min=1e-12))
        return cls(codebooks, closed, torch.stack(variances))

    @torch.no_grad()
    def candidates(self, vectors: np.ndarray, beam: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the most likely codes of vectors by a beam over the levels.

        Args:
            vectors: float32 `[N, D]`.
            beam: B, at least 1.

        Returns:
            int32 `[N, B, L]` and log-likelihoods float32 `[N, B]`, the most likely first; -inf where there are fewer.
        """
        levels = len(self.codebooks)
        codes = np.zeros((len(vectors), beam, levels), dtype=np.int32)
        scores = np.full((len(vectors), beam), -np.inf, dtype=np.float32)
        for start in range(0, len(vectors), BLOCK):
            residual = torch.from_numpy(vectors[start : start + BLOCK]).unsqueeze(1)
            totals = torch.zeros(len(residual), 1)
            paths = torch.zeros(len(residual), 1, 0, dtype=torch.long)
            for level, codebook in enumerate(self.codebooks):
                ranked = (totals.unsqueeze(2) + self._log_probs(residual, level)).flatten(1)
                totals, chosen = ranked.topk(min(beam, ranked.shape[1]), dim=1)
                before, words = chosen // len(codebook), chosen % len(codebook)
                paths = torch.cat([_at(paths, before), words.unsqueeze(2)], dim=2)
                residual = _at(residual, before) - codebook[words]
            codes[start : start + BLOCK, : paths.shape[1]] = paths.numpy()
            scores[start : start + BLOCK, : totals.shape[1]] = totals.numpy()
        return codes, scores

    @torch.no_grad()
    def score(self, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Log-likelihoods float32 `[N, F]` of given codes int32 `[N, F, L]`; -inf for those that take no part."""
        scores = np.empty(codes.shape[:2], dtype=np.float32)
        for start in range(0, len(vectors), BLOCK):
            words = torch.from_numpy(codes[start : start + BLOCK].astype(np.int64))
            residual = torch.from_numpy(vectors[start : start + BLOCK]).unsqueeze(1).expand(-1, words.shape[1], -1)
            total = torch.zeros(words.shape[:2])
            for level, codebook in enumerate(self.codebooks):
                own = words[:, :, level]
                total = total + self._log_probs(residual, level).gather(2, own.unsqueeze(2)).squeeze(2)
                residual = residual - codebook[own]
            scores[start : start + BLOCK] = total.numpy()
        return scores

    def _log_probs(self, residual: Tensor, level: int) -> Tensor:
        """Of each codeword `[n, B, K]` for what is left of vectors `[n, B, D]`."""
        distances = squared_distances(residual.flatten(0, 1), self.codebooks[level]) + self.closed[level]
        return (-distances / (2 * self.variances[level])).log_softmax(1).view(*residual.shape[:2], -1)


def _at(values: Tensor, beams: Tensor) -> Tensor:
    """Values `[n, B, X]` of chosen beams `[n, C]`, `[n, C, X]`."""
    return values.gather(1, beams.unsqueeze(2).expand(-1, -1, values.shape[2]))

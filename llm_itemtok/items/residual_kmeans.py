"""Residual k-means: the same kind of codes as RQ-VAE in seconds, without training a network.

Level by level, k-means on what the levels above left over. There is no encoder: the space of the codebooks is the space
of the item vectors.

Source: residual quantisation by k-means, as in Chen, Guan and Wang 2010 (approximate nearest neighbour search by residual
vector quantization) and, for item tokens, OneRec (arXiv:2502.18965). Ours differs from the latter in that clusters are
not forced to equal size.
"""

from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from llm_itemtok.items.base import ItemTokenizer, Quantizer, check_codebook_shape, check_vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.kmeans import kmeans


@final
class ResidualKMeansQuantizer(Quantizer):
    """Codebooks in the space of the item vectors; encoder and decoder are the identity."""

    scale: Tensor

    def __init__(self, *, levels: int, codebook_size: int, dimensions: int) -> None:
        """Make codebooks of zeros, to be filled.

        Args:
            levels: number of levels, at least 1.
            codebook_size: codewords a level, at least 1.
            dimensions: of an item vector.

        Raises:
            DataError: if a number is below 1.
        """
        super().__init__()
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        self.codebooks = nn.Parameter(torch.zeros(levels, codebook_size, dimensions))
        self.register_buffer("scale", torch.ones(()))

    def to_latent(self, vectors: Tensor) -> Tensor:
        """The vectors themselves."""
        return vectors

    def from_latent(self, latent: Tensor) -> Tensor:
        """The vectors themselves."""
        return latent

    def loss_scale(self) -> Tensor:
        """Root mean square of the centred vectors the codebooks were fitted on."""
        return self.scale

    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return dict(zip(("levels", "codebook_size", "dimensions"), self.codebooks.shape, strict=True))


@final
class ResidualKMeans(ItemTokenizer):
    """Item tokenizer that runs k-means on the residuals, level by level."""

    def __init__(self, *, levels: int = 3, codebook_size: int = 256, iterations: int = 50, seed: int = 0) -> None:
        """Set the shape of the codes.

        Args:
            levels: number of levels, at least 1.
            codebook_size: codewords a level, at least 1; more than distinct items leaves some unused.
            iterations: upper bound on the rounds of k-means a level.
            seed: of the starts of k-means.

        Raises:
            DataError: if a number is below 1.
        """
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        self.levels = levels
        self.codebook_size = codebook_size
        self.iterations = iterations
        self.seed = seed

    def fit(self, vectors: np.ndarray) -> ItemCodes:
        """Make codes for a catalogue; see `ItemTokenizer.fit`."""
        vectors = check_vectors(vectors)
        quantizer = ResidualKMeansQuantizer(
            levels=self.levels, codebook_size=self.codebook_size, dimensions=vectors.shape[1]
        )
        quantizer.scale.fill_(spread(vectors))
        residual = vectors
        for level in range(self.levels):
            clusters = kmeans(residual, self.codebook_size, iterations=self.iterations, seed=self.seed + level)
            quantizer.codebooks.data[level] = torch.from_numpy(clusters.centres)
            residual = residual - clusters.centres[clusters.labels]
        self.quantizer = quantizer.eval()
        codes = quantizer.encode(torch.from_numpy(vectors)).numpy()
        return ItemCodes(
            codes,
            (self.codebook_size,) * self.levels,
            provenance={"tokenizer": {"kind": "residual-kmeans", **quantizer.settings(), "seed": self.seed}},
        )


def spread(vectors: np.ndarray) -> float:
    """Root mean square of the centred vectors, 1 when they are all the same: the unit of reconstruction losses."""
    return float(np.sqrt(np.square(vectors - vectors.mean(axis=0)).mean())) or 1.0

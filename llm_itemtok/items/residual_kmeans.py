"""Residual k-means: the same kind of codes as RQ-VAE in seconds, without training a network.

Level by level, k-means on what the levels above left over. The space of the codebooks is the space of the item vectors,
or of their first principal components.

Principal components are a trade. Residuals in hundreds of dimensions are nearly all equally far from each other, so
below level 0 a few codewords catch most items. Measured on Beauty (12,101 MiniLM vectors of 384 dimensions, 3 x 256):
all dimensions give 25 % collisions, 67 codewords' worth of use at level 2, and 68 % of nearest items share the first
codeword; 32 components give 9.5 %, 218 and 53 %.

With `balance`, the clusters of a level are of about equal size, by a price on each codeword (`balanced_kmeans`) that
the quantizer keeps: codes are read off distances plus prices. It wants few components, too: on Beauty, 3 x 256, it
brings 32 components from 9.4 % collisions to 7.3 % at the same reconstruction error (.56 to .57 of the variance), but
all 384 dimensions from 25 % to 31 %, and from .39 to .62.

For large catalogues, codebooks may be fitted on a sample; all items are coded by them, block by block, so the vectors
may lie in a memory-mapped file.

Source: residual quantisation by k-means, as in Chen, Guan and Wang 2010 (approximate nearest neighbour search by
residual vector quantization) and, for item tokens, OneRec (arXiv:2502.18965). Ours differs from the latter in that
clusters are of equal size only where asked for, and then about equal.
"""

from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from llm_itemtok.errors import DataError
from llm_itemtok.items.balanced_kmeans import BalancedClusters, balanced_kmeans
from llm_itemtok.items.base import ItemTokenizer, Quantizer, check_codebook_shape, check_vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.kmeans import Clusters, kmeans, take_away
from llm_itemtok.items.principal import principal_components, root_mean_square
from llm_itemtok.items.streaming import draw_rows, read_rows


@final
class ResidualKMeansQuantizer(Quantizer):
    """Codebooks in the space of the item vectors, or of some of their principal components."""

    mean: Tensor
    components: Tensor
    scale: Tensor
    price_table: Tensor

    def __init__(
        self,
        *,
        levels: int,
        codebook_size: int,
        dimensions: int,
        latent_dimensions: int | None = None,
        balanced: bool = False,
    ) -> None:
        """Make codebooks and principal components of zeros, to be filled.

        Args:
            levels: number of levels, at least 1.
            codebook_size: codewords a level, at least 1.
            dimensions: of an item vector, D.
            latent_dimensions: number of principal components, H; None for the item vectors as they are.
            balanced: whether codewords have prices.

        Raises:
            DataError: if a number is below 1.
        """
        super().__init__()
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        self.dimensions = dimensions
        self.latent_dimensions = latent_dimensions
        self.balanced = balanced
        self.codebooks = nn.Parameter(torch.zeros(levels, codebook_size, latent_dimensions or dimensions))
        self.register_buffer("scale", torch.ones(()))
        if latent_dimensions is not None:
            self.register_buffer("mean", torch.zeros(dimensions))
            self.register_buffer("components", torch.zeros(dimensions, latent_dimensions))
        if balanced:
            self.register_buffer("price_table", torch.zeros(levels, codebook_size))

    def to_latent(self, vectors: Tensor) -> Tensor:
        """The vectors themselves, or their principal components."""
        if self.latent_dimensions is None:
            return vectors
        return (vectors - self.mean) @ self.components

    def from_latent(self, latent: Tensor) -> Tensor:
        """The vectors themselves, or the vectors that have these principal components and no others."""
        if self.latent_dimensions is None:
            return latent
        return latent @ self.components.T + self.mean

    def loss_scale(self) -> Tensor:
        """Root mean square of the centred vectors the codebooks were fitted on."""
        return self.scale

    def prices(self) -> Tensor | None:
        """Prices of the codewords where clusters are balanced."""
        return self.price_table if self.balanced else None

    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        shape = {
            "levels": self.num_levels,
            "codebook_size": self.num_codewords,
            "dimensions": self.dimensions,
            "latent_dimensions": self.latent_dimensions,
        }
        return shape | {"balanced": True} if self.balanced else shape


@final
class ResidualKMeans(ItemTokenizer):
    """Item tokenizer that runs k-means on the residuals, level by level."""

    def __init__(
        self,
        *,
        levels: int = 3,
        codebook_size: int = 256,
        components: int | None = None,
        iterations: int = 50,
        balance: bool = False,
        sample: int | None = None,
        seed: int = 0,
    ) -> None:
        """Set the shape of the codes.

        Args:
            levels: number of levels, at least 1.
            codebook_size: codewords a level, at least 1; more than distinct items leaves some unused.
            components: number of principal components to look at, at least 1; None, or as many as there are
                dimensions, for the vectors as they are.
            iterations: upper bound on the rounds of k-means a level.
            balance: keep the clusters of a level at about equal size.
            sample: number of items, drawn with the seed, that codebooks are fitted on; None for all.
            seed: of the sample and of the starts of k-means.

        Raises:
            DataError: if a number is below 1.
        """
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        if sample is not None and sample < 1:
            raise DataError(f"`sample` must be at least 1, or none given, was: {sample}")
        if components is not None and components < 1:
            raise DataError(f"`components` must be at least 1, or none given, was: {components}")
        self.levels = levels
        self.codebook_size = codebook_size
        self.components = components
        self.iterations = iterations
        self.balance = balance
        self.sample = sample
        self.seed = seed

    def fit(self, vectors: np.ndarray) -> ItemCodes:
        """Make codes for a catalogue; see `ItemTokenizer.fit`. With a sample, `vectors` may be memory-mapped."""
        sampled = self.sample is not None and self.sample < len(vectors)
        if sampled:
            assert self.sample is not None
            looked_at = check_vectors(read_rows(vectors, draw_rows(len(vectors), self.sample, seed=self.seed)))
        else:
            vectors = looked_at = check_vectors(vectors)
        self.quantizer = self._fit_quantizer(looked_at)
        tokenizer = {"kind": "residual-kmeans", **self.quantizer.settings(), "seed": self.seed}
        return ItemCodes(
            self.quantizer.encode_blocks(vectors),
            (self.codebook_size,) * self.levels,
            provenance={"tokenizer": tokenizer | ({"sample": self.sample} if sampled else {})},
        )

    def _fit_quantizer(self, vectors: np.ndarray) -> ResidualKMeansQuantizer:
        num_components = self.components if self.components and self.components < vectors.shape[1] else None
        quantizer = ResidualKMeansQuantizer(
            levels=self.levels,
            codebook_size=self.codebook_size,
            dimensions=vectors.shape[1],
            latent_dimensions=num_components,
            balanced=self.balance,
        )
        quantizer.scale.fill_(root_mean_square(vectors))
        if num_components:
            quantizer.mean.copy_(torch.from_numpy(vectors.mean(axis=0)))
            quantizer.components.copy_(torch.from_numpy(principal_components(vectors, num_components)))
        residual = quantizer.to_latent(torch.from_numpy(vectors)).numpy()
        if not num_components:
            residual = residual.copy()  # it is the caller's
        for level in range(self.levels):
            found: Clusters | BalancedClusters
            if self.balance:
                found = balanced_kmeans(
                    residual, self.codebook_size, iterations=self.iterations, seed=self.seed + level
                )
                quantizer.price_table[level] = torch.from_numpy(found.prices)
            else:
                found = kmeans(residual, self.codebook_size, iterations=self.iterations, seed=self.seed + level)
            quantizer.codebooks.data[level] = torch.from_numpy(found.centres)
            take_away(residual, found.centres, found.labels)
        return quantizer.eval()

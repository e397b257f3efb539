"""Product quantisation: each level describes dimensions of its own, so levels are independent of each other.

The (turned) item vector is cut into L groups of dimensions, and each group has its own k-means. There is no coarse and
no fine: the order of the levels means nothing beyond the order in which tokens are spelled, and items that share a
prefix are alike in the dimensions of that prefix only. For the same room it rebuilds vectors worse than residual codes
do, but it uses its codewords evenly and no level is the refinement of another.

Decisions:
- A codeword is stored as a vector of all dimensions that is zero outside the group of its level. Then product codes are
  residual codes: the sum of the codewords is the reconstruction, the nearest codeword to the residual is the nearest in
  the group, and everything that works for a `Quantizer` works here. Outside the group a codeword is zero for ever:
  what is read off is masked, so no gradient gets there.
- `pca` deals the principal components out so that the product of the variances is about equal in all groups; `opq` goes
  on from there and turns the space in rounds of k-means and an orthogonal fit.

Sources: Jegou et al. 2011 (doi:10.1109/TPAMI.2010.57); Ge et al. 2014, both solutions of optimised product
quantisation (doi:10.1109/TPAMI.2013.240).

Shape letters in this file: N items, L levels, K codewords a level, D dimensions of a vector, H of a codeword.
"""

import itertools
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor, nn

from llm_itemtok.errors import DataError
from llm_itemtok.items.base import ItemTokenizer, Quantizer, check_codebook_shape, check_vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.kmeans import kmeans
from llm_itemtok.items.principal import principal_components, root_mean_square

Rotation = Literal["none", "pca", "opq"]

ROUNDS, ITERATIONS_A_ROUND = 10, 5
"""Of `opq`: turns of the space, and k-means steps for each."""


@final
class ProductQuantizer(Quantizer):
    """A codebook for each of several groups of dimensions of the turned item vectors."""

    mean: Tensor
    scale: Tensor
    turn: Tensor
    mask: Tensor

    def __init__(self, *, levels: int, codebook_size: int, dimensions: int, latent_dimensions: int) -> None:
        """Make codebooks and a turn of zeros, to be filled.

        Args:
            levels: number of groups of dimensions, at least 1.
            codebook_size: codewords a level, at least 1.
            dimensions: of an item vector, D.
            latent_dimensions: H, at least `levels`; the groups follow each other and differ in size by one at most.

        Raises:
            DataError: if a number is below 1, or a level would have no dimension.
        """
        super().__init__()
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        if latent_dimensions < levels:
            raise DataError(
                f"a product code must have at most one level a dimension, was: {levels} levels of {latent_dimensions} "
                "dimensions; lower `levels`, or give longer vectors"
            )
        self.codebooks = nn.Parameter(torch.zeros(levels, codebook_size, latent_dimensions))
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("turn", torch.zeros(dimensions, latent_dimensions))
        mask = torch.zeros(levels, 1, latent_dimensions)
        for level, group in enumerate(groups(levels, latent_dimensions)):
            mask[level, :, group] = 1
        self.register_buffer("mask", mask, persistent=False)

    def to_latent(self, vectors: Tensor) -> Tensor:
        """Centre and turn."""
        return (vectors - self.mean) @ self.turn

    def from_latent(self, latent: Tensor) -> Tensor:
        """Turn back; what the turn leaves out is lost."""
        return latent @ self.turn.T + self.mean

    def loss_scale(self) -> Tensor:
        """Root mean square of the centred vectors the codebooks were fitted on."""
        return self.scale

    def used_codebooks(self) -> Tensor:
        """The codebooks, zero outside the group of each level."""
        return self.codebooks * self.mask

    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        levels, codebook_size, latent_dimensions = self.codebooks.shape
        return {
            "levels": levels,
            "codebook_size": codebook_size,
            "dimensions": len(self.mean),
            "latent_dimensions": latent_dimensions,
        }


@final
class ProductKMeans(ItemTokenizer):
    """Item tokenizer that runs k-means on groups of dimensions."""

    def __init__(
        self,
        *,
        levels: int = 3,
        codebook_size: int = 256,
        rotation: Rotation = "pca",
        components: int | None = None,
        iterations: int = 50,
        seed: int = 0,
    ) -> None:
        """Set the shape of the codes.

        Args:
            levels: number of levels, at least 1 and at most as many as dimensions.
            codebook_size: codewords a level, at least 1.
            rotation: how the space is turned before it is cut: not at all, by principal components, or by `opq`.
            components: number of principal components to keep, at least `levels`; None, or as many as there are
                dimensions, for all. Not without a rotation.
            iterations: upper bound on the rounds of k-means a level.
            seed: of the starts of k-means.

        Raises:
            DataError: if a number is out of its range, or the rotation is not one of these.
        """
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        if rotation not in get_args(Rotation):
            raise DataError(f"`rotation` must be one of {', '.join(get_args(Rotation))}, was: {rotation}")
        if components is not None and (components < levels or rotation == "none"):
            raise DataError(
                "`components` must be at least the number of levels, and needs a rotation, "
                f"was: {components} for {levels} levels, rotation {rotation}"
            )
        self.levels = levels
        self.codebook_size = codebook_size
        self.rotation = rotation
        self.components = components
        self.iterations = iterations
        self.seed = seed

    def fit(self, vectors: np.ndarray) -> ItemCodes:
        """Make codes for a catalogue; see `ItemTokenizer.fit`."""
        vectors = check_vectors(vectors)
        dimensions = vectors.shape[1]
        num_components = min(self.components or dimensions, dimensions)
        quantizer = ProductQuantizer(
            levels=self.levels,
            codebook_size=self.codebook_size,
            dimensions=dimensions,
            latent_dimensions=num_components,
        )
        centred = vectors - vectors.mean(axis=0)
        turn = np.eye(dimensions, dtype=np.float32)
        if self.rotation != "none":
            turn = dealt_components(centred, num_components, self.levels)
        if self.rotation == "opq":
            turn = turn @ self._best_turn(centred @ turn)
        quantizer.scale.fill_(root_mean_square(vectors))
        quantizer.mean.copy_(torch.from_numpy(vectors.mean(axis=0)))
        quantizer.turn.copy_(torch.from_numpy(turn))
        latent = quantizer.to_latent(torch.from_numpy(vectors)).numpy()
        for level, (group, centres, _) in enumerate(self._cluster(latent, self.iterations)):
            quantizer.codebooks.data[level, :, group] = torch.from_numpy(centres)
        self.quantizer = quantizer.eval()
        settings = {"kind": "product", **quantizer.settings(), "rotation": self.rotation, "seed": self.seed}
        return ItemCodes(
            quantizer.encode_blocks(vectors),
            (self.codebook_size,) * self.levels,
            provenance={"tokenizer": settings},
        )

    def _cluster(self, latent: np.ndarray, iterations: int) -> list[tuple[slice, np.ndarray, np.ndarray]]:
        """k-means of each group: its dimensions, centres `[K, its size]`, labels `[N]`."""
        found = []
        for level, group in enumerate(groups(self.levels, latent.shape[1])):
            clusters = kmeans(latent[:, group], self.codebook_size, iterations=iterations, seed=self.seed + level)
            found.append((group, clusters.centres, clusters.labels))
        return found

    def _best_turn(self, latent: np.ndarray) -> np.ndarray:
        """Orthogonal map `[H, H]` after which product codes rebuild points better."""
        turn = np.eye(latent.shape[1], dtype=np.float32)
        for _ in range(ROUNDS):
            found = self._cluster(latent @ turn, ITERATIONS_A_ROUND)
            rebuilt = np.concatenate([centres[labels] for _, centres, labels in found], axis=1)
            left, _, right = np.linalg.svd(latent.T.astype(np.float64) @ rebuilt)
            turn = (left @ right).astype(np.float32)
        return turn


def groups(levels: int, dimensions: int) -> list[slice]:
    """Dimensions of each level, one after the other; numbers of dimensions differ by one at most."""
    edges = [dimensions * level // levels for level in range(levels + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def dealt_components(vectors: np.ndarray, num: int, levels: int) -> np.ndarray:
    """Principal components, dealt out to groups of about equal product of variances.

    Args:
        vectors: float32 `[N, D]`.
        num: number of components, H, at least `levels` and at most D.
        levels: number of groups, L.

    Returns:
        float32 `[D, H]`, orthonormal columns, the first group first; inside a group by falling variance.
    """
    directions = principal_components(vectors, num)
    variances = np.var(vectors @ directions, axis=0, dtype=np.float64)
    # Relative to the smallest, so that each component adds something: a full group would else be the lightest.
    weights = np.log(np.maximum(variances, variances.max() * 1e-9 + 1e-30))
    weights -= weights.min()
    rooms = [group.stop - group.start for group in groups(levels, num)]
    dealt: list[list[int]] = [[] for _ in range(levels)]
    loads = np.zeros(levels)
    for component in range(num):
        level = min((part for part in range(levels) if len(dealt[part]) < rooms[part]), key=loads.__getitem__)
        dealt[level].append(component)
        loads[level] += weights[component]
    return np.ascontiguousarray(directions[:, [component for group in dealt for component in group]])

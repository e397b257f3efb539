"""The two abstract things of this layer: an item tokenizer, and the trained module it may leave behind.

`ItemTokenizer.fit` turns item vectors into `ItemCodes`. Some tokenizers also leave a `Quantizer`: codebooks and the
map into their space, as a torch module. Updates of item tokens need it (gradients through `soft_assign` and `forward`,
a warm start), and so do new items (`encode`).

Decisions:
- A class is either abstract or final. Final quantizers say how to reach the space of the codebooks and back
  (`to_latent`, `from_latent`); everything residual is written here, once.
- A hard code is greedy and takes the lowest index on a tie; it is the argmax of `soft_assign` by construction, because
  both read the same distances.
- A quantizer may put a price on each codeword, which counts as distance: that is how clusters are kept of equal size
  without a list of who belongs where, so that new items are coded by the same rule.
- Losses are returned per item: who trains decides what to average over (all items, a batch, the distinct targets).
- A quantizer reads and writes vectors in the units it was fitted on; scaling that helps its training is stored in it.

Sources: soft assignment as in BLOGER and ETEGRec (softmax over minus the squared distance, temperature 1); losses as in
TIGER, Rajput et al. 2023 (arXiv:2305.05065), scaled as in the released LC-Rec code: means over dimensions and levels.

Shape letters in this file: N items, L levels, K codewords a level, D dimensions of a vector, H of a codeword.
"""

import abc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from llm_itemtok.artifacts import FORMAT_VERSION, write_bytes
from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.estimators import Estimator, straight_through
from llm_itemtok.items.residual import lowest, nearest_codes, squared_distances, sum_of_codewords
from llm_itemtok.items.streaming import read_blocks

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""

LARGEST = 1e12
"""Numbers of item vectors are at most so large, so that float32 can hold sums of their squares over a catalogue."""

QUANTIZER_FILE = "quantizer.safetensors"
QUANTIZER_FORMAT = "llm_itemtok.quantizer"


class Quantized(NamedTuple):
    """A differentiable pass through a quantizer; losses are means over dimensions (and levels), one a row."""

    codes: Tensor
    """int64 `[N, L]`."""
    reconstruction: Tensor
    """float `[N, D]`, in the units of the input; gradients pass straight through the choice of codewords."""
    reconstruction_loss: Tensor
    """float `[N]`, squared error in the quantizer's own scale."""
    codebook_loss: Tensor
    """float `[N]`, pulls codewords to residuals; no gradient to the encoder."""
    commitment_loss: Tensor
    """float `[N]`, pulls residuals to codewords, not yet weighted; no gradient to the codebooks."""
    latent: Tensor
    """float `[N, H]`, the sum of the codewords, as the decoder reads it."""


class Quantizer(nn.Module, abc.ABC):
    """Residual codebooks, and the way from item vectors to their space and back.

    Attributes:
        codebooks: parameter, float `[L, K, H]`, one codebook a level.
    """

    codebooks: nn.Parameter

    @abc.abstractmethod
    def to_latent(self, vectors: Tensor) -> Tensor:
        """Map item vectors, float `[N, D]`, to the space of the codebooks, float `[N, H]`; differentiable."""

    @abc.abstractmethod
    def from_latent(self, latent: Tensor) -> Tensor:
        """Map float `[N, H]` back to the space of the item vectors, float `[N, D]`; differentiable."""

    @abc.abstractmethod
    def loss_scale(self) -> Tensor:
        """What a vector is divided by, as a scalar, before its reconstruction error is taken."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that build an untrained module of the same shapes; plain JSON values."""

    def used_codebooks(self) -> Tensor:
        """The codebooks as codes are read off them, float `[L, K, H]`; differentiable."""
        return self.codebooks

    def prices(self) -> Tensor | None:
        """What a codeword costs beside its squared distance, float `[L, K]`; None where distance alone counts."""
        return None

    @property
    def num_levels(self) -> int:
        """Number of levels, L."""
        return self.codebooks.shape[0]

    @property
    def num_codewords(self) -> int:
        """Number of codewords a level, K."""
        return self.codebooks.shape[1]

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """Codes of item vectors, greedily from level 0 down; a tie goes to the lowest index.

        Args:
            vectors: float `[N, D]`, from the source the quantizer was fitted on.

        Returns:
            int64 `[N, L]`, each in `[0, K)`.
        """
        return nearest_codes(self.to_latent(vectors), self.used_codebooks(), self.prices())[0]

    def encode_blocks(self, vectors: np.ndarray) -> np.ndarray:
        """`encode` for any number of items: checked, coded and let go block by block.

        Args:
            vectors: float `[N, D]`, in memory or memory-mapped (`np.load(path, mmap_mode="r")`); N at least 1.

        Returns:
            int32 `[N, L]`, each in `[0, K)`. What is held beside it does not grow with N.

        Raises:
            DataError: if the vectors are not finite numbers of this shape.
        """
        codes = np.empty((len(vectors), self.num_levels), dtype=np.int32)
        for rows, block in read_blocks(vectors):
            there = torch.from_numpy(check_vectors(block)).to(self.codebooks.device)
            codes[rows] = self.encode(there).cpu().numpy()
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Item vectors that codes stand for.

        Args:
            codes: int64 `[N, L]`, each in `[0, K)`.

        Returns:
            float `[N, D]`, in the units of the vectors; differentiable in codebooks and decoder.
        """
        return self.from_latent(sum_of_codewords(codes, self.used_codebooks()))

    def soft_assign(self, vectors: Tensor, *, straight_through_residual: bool = False) -> list[Tensor]:
        """Probability of each codeword, level by level, differentiable in everything.

        Args:
            vectors: float `[N, D]`.
            straight_through_residual: see `soft_assign_latent`.

        Returns:
            L tensors, float `[N, K]`, rows summing to 1; the argmax is the hard code.
        """
        return self.soft_assign_latent(self.to_latent(vectors), straight_through_residual=straight_through_residual)

    def soft_assign_latent(self, latent: Tensor, *, straight_through_residual: bool = False) -> list[Tensor]:
        """`soft_assign` for points that are already in the space of the codebooks.

        `P(k | v_l) = softmax_k(-||v_l - e_k||^2)` and `v_{l+1} = v_l - sg[e_{hard code}]`; prices count as distance.

        Args:
            latent: float `[N, H]`.
            straight_through_residual: subtract the straight-through value instead, as the released code of LC-Rec,
                BLOGER and ETEGRec does. Its residual carries no gradient to `latent`, so only level 0 would train an
                encoder.

        Returns:
            L tensors, float `[N, K]`, rows summing to 1.
        """
        logits = self.assignment_logits(latent, straight_through_residual=straight_through_residual)
        return [torch.softmax(each, dim=1) for each in logits]

    def assignment_logits(self, latent: Tensor, *, straight_through_residual: bool = False) -> list[Tensor]:
        """What `soft_assign_latent` takes the softmax of: minus squared distances, L tensors, float `[N, K]`.

        Where probabilities are compared, their logarithms are made of these: far codewords have a probability of 0.
        """
        found = []
        residual, prices = latent, self.prices()
        for level, codebook in enumerate(self.used_codebooks()):
            distances = squared_distances(residual, codebook)
            if prices is not None:
                distances = distances + prices[level]
            found.append(-distances)
            residual = residual - codebook.detach()[lowest(distances)]
            if straight_through_residual:
                residual = residual.detach()
        return found

    def forward(self, vectors: Tensor, *, estimator: Estimator = straight_through) -> Quantized:
        """Quantise and rebuild, with the losses that train codebooks, encoder and decoder.

        Args:
            vectors: float `[N, D]`.
            estimator: how gradients pass the choice of codewords.
        """
        found = estimator(self.to_latent(vectors), self.used_codebooks(), self.prices())
        reconstruction = self.from_latent(found.quantized)
        return Quantized(
            codes=found.codes,
            reconstruction=reconstruction,
            reconstruction_loss=((reconstruction - vectors) / self.loss_scale()).square().mean(dim=1),
            codebook_loss=found.codebook_loss,
            commitment_loss=found.commitment_loss,
            latent=found.quantized,
        )

    def save(self, folder: str | Path) -> Path:
        """Write `quantizer.safetensors` into a folder, atomically.

        Returns:
            The path of the file.
        """
        header = {
            "format": QUANTIZER_FORMAT,
            "format_version": FORMAT_VERSION,
            "class": type(self).__name__,
            "settings": self.settings(),
        }
        path = Path(folder) / QUANTIZER_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"quantizer": json.dumps(header, sort_keys=True)}
        write_bytes(path, safetensors.torch.save(tensors, metadata=metadata))
        return path


class ItemTokenizer(abc.ABC):
    """Turns item vectors into item codes.

    Attributes:
        quantizer: the trained module behind the codes, after `fit`; None for kinds that train none.
    """

    quantizer: Quantizer | None = None

    @abc.abstractmethod
    def fit(self, vectors: np.ndarray) -> ItemCodes:
        """Make codes for a catalogue.

        Args:
            vectors: float32 `[N, D]`, finite, one row an item in the order of the catalogue.

        Returns:
            Codes for the same rows, collisions not yet resolved.

        Raises:
            DataError: if the vectors are not as above.
        """


def check_vectors(vectors: np.ndarray) -> np.ndarray:
    """Item vectors as contiguous, writable float32 `[N, D]`, after checking them; not copied if they are that.

    Raises:
        DataError: if the shape is not two-dimensional and non-empty, the dtype not a float, or a value not finite or
            beyond `LARGEST`.
    """
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise DataError(f"item vectors must have the shape (items, dimensions), both at least 1, was: {vectors.shape}")
    if not np.issubdtype(vectors.dtype, np.floating):
        raise DataError(f"item vectors must be floating-point numbers, was: {vectors.dtype}")
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite and is reported below
        checked = np.require(vectors, dtype=np.float32, requirements=["C", "W"])  # torch wants writable memory
    broken = rows_beyond(checked)
    if len(broken):
        raise DataError(
            f"item vectors must be finite numbers of at most {LARGEST:.0e}; {len(broken):,} of {len(checked):,} rows "
            f"hold NaN, infinity or a larger number, the first is row {broken[0]}; scale the vectors"
        )
    return checked


def rows_beyond(vectors: np.ndarray) -> np.ndarray:
    """Rows of float `[N, D]` with a number that is not finite or beyond `LARGEST`, int64, ascending."""
    if vectors.max() <= LARGEST and vectors.min() >= -LARGEST:  # without a copy; false for NaN
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(~(np.abs(vectors) <= LARGEST).all(axis=1))


def check_codebook_shape(*, levels: int, codebook_size: int) -> None:
    """Refuse numbers of levels and codewords that no codes can have.

    Raises:
        DataError: if one is below 1.
    """
    if levels < 1 or codebook_size < 1:
        raise DataError(f"`levels` and `codebook_size` must be at least 1, was: {levels} and {codebook_size}")

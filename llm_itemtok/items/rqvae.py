"""RQ-VAE: an autoencoder whose latent vector is a sum of codewords, one a level.

Decisions:
- Vectors are centred and divided by one number before the encoder sees them; both are stored in the quantizer, so it
  reads and writes vectors in their own units.
- Encoder and decoder are first trained for a few epochs without quantisation; then the codebooks start as residual
  k-means of all latents. Codebooks fitted to the latents of a random encoder are out of date after the first epochs.
- A codeword that no item chose in an epoch (or, if asked for, in so many steps) is moved onto the residual of an item
  that is served badly.
- Training stops when vectors have not been rebuilt better for a while, and the weights of the epoch with fewest
  collisions among those that rebuild nearly best are returned; `stopping` says how and why.
- Other gradients (`estimators`) and the terms of LETTER (`letter`) are for experiments, and off. What the terms learn
  beside the quantizer is thrown away after the fit.
- A plain loop in this file, not a trainer: one small network, one process.

Sources: Lee et al. 2022 (arXiv:2203.01941); for item tokens TIGER, Rajput et al. 2023 (arXiv:2305.05065), 3.1; scaling
of the losses (means over dimensions and levels) as in the released code of LC-Rec (arXiv:2311.09049). Ours differs in
the start of the codebooks, the revival of dead codewords and the residual's gradient (see `Quantizer.forward`).

Shape letters in this file: N items, B batch, L levels, K codewords a level, D dimensions of a vector, H of a codeword.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor, nn

from llm_itemtok.errors import DataError
from llm_itemtok.items.base import ItemTokenizer, Progress, Quantizer, check_codebook_shape, check_vectors
from llm_itemtok.items.codebooks import revive, start_codebooks
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.estimators import Estimator, gumbel, rotation, straight_through
from llm_itemtok.items.letter import LetterTerms
from llm_itemtok.items.principal import root_mean_square
from llm_itemtok.items.stopping import Look, StopRule, Watch

EstimatorName = Literal["straight-through", "rotation", "gumbel"]

HOT, COLD = 0.1, 0.01
"""Temperatures of `gumbel` in the first epoch and in the last possible one."""


@final
class RQVAEQuantizer(Quantizer):
    """Residual codebooks between an MLP encoder and its mirror image."""

    mean: Tensor
    scale: Tensor

    def __init__(
        self, *, levels: int, codebook_size: int, dimensions: int, widths: Sequence[int], latent_dimensions: int
    ) -> None:
        """Make an untrained module: Xavier-normal weights, codebooks of zeros.

        Args:
            levels: number of levels, at least 1.
            codebook_size: codewords a level, at least 1.
            dimensions: of an item vector, D.
            widths: of the hidden layers of the encoder; the decoder has them in reverse.
            latent_dimensions: of a codeword, H.

        Raises:
            DataError: if a number is below 1.
        """
        super().__init__()
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        layers = [dimensions, *widths, latent_dimensions]
        if min(layers) < 1:
            raise DataError(f"all layers of an RQ-VAE must be at least 1 wide, was: {layers}")
        self.widths = tuple(widths)
        self.encoder = _mlp(layers)
        self.decoder = _mlp(layers[::-1])
        self.codebooks = nn.Parameter(torch.zeros(levels, codebook_size, latent_dimensions))
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("scale", torch.ones(()))

    def to_latent(self, vectors: Tensor) -> Tensor:
        """Standardise and encode."""
        return self.encoder((vectors - self.mean) / self.scale)

    def from_latent(self, latent: Tensor) -> Tensor:
        """Decode and undo the standardisation."""
        return self.decoder(latent) * self.scale + self.mean

    def loss_scale(self) -> Tensor:
        """Root mean square of the centred vectors the module was fitted on."""
        return self.scale

    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        levels, codebook_size, latent_dimensions = self.codebooks.shape
        return {
            "levels": levels,
            "codebook_size": codebook_size,
            "dimensions": len(self.mean),
            "widths": list(self.widths),
            "latent_dimensions": latent_dimensions,
        }


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _check_training(
    epochs: int,
    batch_size: int,
    stop: str,
    patience: int,
    warmup_epochs: int,
    learning_rate: float,
    commitment: float,
    revive_every: int | None,
) -> None:
    if min(epochs, batch_size, patience) < 1 or warmup_epochs < 0:
        raise DataError(
            "`epochs`, `batch_size` and `patience` must be at least 1 and `warmup_epochs` at least 0, was: "
            f"{epochs}, {batch_size}, {patience} and {warmup_epochs}"
        )
    if stop not in get_args(StopRule):
        raise DataError(f"`stop` must be one of {', '.join(get_args(StopRule))}, was: {stop}")
    if learning_rate <= 0 or commitment < 0:
        raise DataError(
            f"`learning_rate` must be above 0 and `commitment` at least 0, was: {learning_rate} and {commitment}"
        )
    if revive_every is not None and revive_every < 1:
        raise DataError(f"`revive_every` must be at least 1 step, or none given, was: {revive_every}")


def _check_experiments(
    estimator: str, alignment_weight: float, diversity_weight: float, collaborative: np.ndarray | None
) -> None:
    if estimator not in get_args(EstimatorName):
        raise DataError(f"`estimator` must be one of {', '.join(get_args(EstimatorName))}, was: {estimator}")
    if min(alignment_weight, diversity_weight) < 0 or (alignment_weight > 0 and collaborative is None):
        raise DataError(
            "`alignment_weight` and `diversity_weight` must be at least 0, and alignment needs collaborative "
            f"vectors, was: {alignment_weight} and {diversity_weight}, "
            f"{'no' if collaborative is None else 'with'} vectors"
        )


@final
class RQVAE(ItemTokenizer):
    """Item tokenizer that trains an RQ-VAE on the item vectors.

    Attributes:
        history: what was seen every `look_every` epochs, after `fit`.
    """

    def __init__(
        self,
        *,
        levels: int = 3,
        codebook_size: int = 256,
        widths: Sequence[int] = (256, 128),
        latent_dimensions: int = 32,
        epochs: int = 500,
        warmup_epochs: int = 20,
        batch_size: int = 1024,
        learning_rate: float = 1e-3,
        commitment: float = 0.25,
        stop: StopRule = "reconstruction",
        patience: int = 50,
        revive_every: int | None = None,
        estimator: EstimatorName = "straight-through",
        collaborative: np.ndarray | None = None,
        alignment_weight: float = 0.0,
        diversity_weight: float = 0.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Set the shape of the codes and how to train.

        Args:
            levels: number of levels, at least 1.
            codebook_size: codewords a level, at least 1.
            widths: hidden layers of the encoder.
            latent_dimensions: of a codeword.
            epochs: upper bound on the epochs with quantisation, at least 1.
            warmup_epochs: epochs without quantisation before the codebooks start.
            batch_size: items a step.
            learning_rate: of AdamW; weight decay is 1e-4 on encoder and decoder.
            commitment: weight of the commitment loss.
            stop: what tells when to stop and which epoch to keep: the error of the rebuilt vectors, or, to repeat
                older runs, the total loss; see `stopping`.
            patience: stop after so many epochs without a fall of that by 0.1 %.
            revive_every: steps after which codewords that nobody chose are moved; None for after each epoch.
            estimator: how gradients pass the choice of codewords.
            collaborative: float32 `[N, C]` in the order of the items, zero for an item without one; what alignment
                aligns with.
            alignment_weight: of LETTER's alignment; above 0 it needs `collaborative`.
            diversity_weight: of LETTER's diversity.
            seed: of weights, order of the items, and k-means.
            progress: called after each epoch with (epochs done, epochs at most).

        Raises:
            DataError: if a number is out of its range.
        """
        check_codebook_shape(levels=levels, codebook_size=codebook_size)
        _check_training(epochs, batch_size, stop, patience, warmup_epochs, learning_rate, commitment, revive_every)
        _check_experiments(estimator, alignment_weight, diversity_weight, collaborative)
        self.levels = levels
        self.codebook_size = codebook_size
        self.widths = tuple(widths)
        self.latent_dimensions = latent_dimensions
        self.epochs = epochs
        self.warmup_epochs = warmup_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.commitment = commitment
        self.stop = stop
        self.patience = patience
        self.revive_every = revive_every
        self.estimator = estimator
        self.collaborative = collaborative
        self.alignment_weight = alignment_weight
        self.diversity_weight = diversity_weight
        self.seed = seed
        self.progress = progress
        self.look_every = 5
        self.history: list[Look] = []
        self._used_LK = torch.zeros(levels, codebook_size, dtype=torch.int64)  # since codewords were last revived
        self._steps = 0

    def fit(self, vectors: np.ndarray) -> ItemCodes:
        """Make codes for a catalogue; see `ItemTokenizer.fit`."""
        x_ND = torch.from_numpy(check_vectors(vectors))
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to use up
            torch.default_generator.manual_seed(self.seed)
            quantizer = RQVAEQuantizer(
                levels=self.levels,
                codebook_size=self.codebook_size,
                dimensions=x_ND.shape[1],
                widths=self.widths,
                latent_dimensions=self.latent_dimensions,
            )
            terms = self._terms(len(x_ND))
        quantizer.mean.copy_(x_ND.mean(dim=0))
        quantizer.scale.fill_(root_mean_square(x_ND.numpy()))
        shuffle = torch.Generator().manual_seed(self.seed)
        self._used_LK.zero_()
        self._steps = 0
        self._warm_up(quantizer, x_ND, shuffle)
        start_codebooks(quantizer, x_ND, seed=self.seed)
        best = self._train(quantizer, terms, x_ND, shuffle)
        self.quantizer = quantizer.eval()
        return ItemCodes(
            quantizer.encode(x_ND).numpy(),
            (self.codebook_size,) * self.levels,
            provenance={
                "tokenizer": {"kind": "rqvae", **quantizer.settings(), "seed": self.seed, "estimator": self.estimator},
                "training": {**best._asdict(), "epochs_run": self.history[-1].epoch, "stop": self.stop},
            },
        )

    def _terms(self, num_items: int) -> LetterTerms | None:
        """LETTER's terms, if one has a weight."""
        if not self.alignment_weight and not self.diversity_weight:
            return None
        collaborative = None
        if self.alignment_weight:
            assert self.collaborative is not None  # checked in the constructor
            if len(self.collaborative) != num_items:
                raise DataError(
                    f"there must be one collaborative vector an item, {num_items:,}, was: {len(self.collaborative):,}"
                )
            collaborative = torch.from_numpy(check_vectors(self.collaborative))
        return LetterTerms(
            self.latent_dimensions,
            collaborative,
            alignment_weight=self.alignment_weight,
            diversity_weight=self.diversity_weight,
            seed=self.seed,
        )

    def _warm_up(self, quantizer: RQVAEQuantizer, x_ND: Tensor, shuffle: torch.Generator) -> None:
        """Train encoder and decoder without quantisation."""
        optimizer = self._optimizer(quantizer, None)
        for _ in range(self.warmup_epochs):
            for rows in self._batches(x_ND, shuffle):
                x_BD = x_ND[rows]
                rebuilt_BD = quantizer.from_latent(quantizer.to_latent(x_BD))
                loss = ((rebuilt_BD - x_BD) / quantizer.scale).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def _train(
        self, quantizer: RQVAEQuantizer, terms: LetterTerms | None, x_ND: Tensor, shuffle: torch.Generator
    ) -> Look:
        """Train everything; leaves the best weights in the quantizer and says what was seen with them."""
        optimizer = self._optimizer(quantizer, terms)
        watch = Watch(self.stop, patience=self.patience)
        self.history = watch.looks
        for epoch in range(1, self.epochs + 1):
            loss, reconstruction = self._epoch(quantizer, terms, optimizer, x_ND, shuffle, epoch)
            last = watch.is_over(epoch, loss=loss, reconstruction=reconstruction) or epoch == self.epochs
            if last or epoch % self.look_every == 0:
                watch.look(_look(quantizer, x_ND, epoch, loss), quantizer)
            if self.progress is not None:
                self.progress(self.epochs if last else epoch, self.epochs)
            if last:
                break
            if self.revive_every is None:
                self._revive(quantizer, optimizer, x_ND, shuffle)
        best, weights = watch.best()
        quantizer.load_state_dict(weights)
        return best

    def _epoch(
        self,
        quantizer: RQVAEQuantizer,
        terms: LetterTerms | None,
        optimizer: torch.optim.Optimizer,
        x_ND: Tensor,
        shuffle: torch.Generator,
        epoch: int,
    ) -> tuple[float, float]:
        """One pass over the items: mean loss an item, and of it reconstruction. Counts who chooses which codeword."""
        estimator = self._estimator(epoch, shuffle)
        if terms is not None:
            terms.begin_epoch(quantizer.codebooks)
        total, rebuilt = 0.0, 0.0
        for rows in self._batches(x_ND, shuffle):
            out = quantizer(x_ND[rows], estimator=estimator)
            losses = out.reconstruction_loss + out.codebook_loss + self.commitment * out.commitment_loss
            if terms is not None:
                losses = losses + terms(rows, out.codes, out.latent, quantizer.codebooks)
            loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
            rebuilt += out.reconstruction_loss.sum().item()
            self._used_LK.scatter_add_(1, out.codes.T, torch.ones_like(out.codes.T))
            self._steps += 1
            if self.revive_every is not None and self._steps % self.revive_every == 0:
                self._revive(quantizer, optimizer, x_ND, shuffle)
        return total / len(x_ND), rebuilt / len(x_ND)

    def _revive(
        self, quantizer: RQVAEQuantizer, optimizer: torch.optim.Optimizer, x_ND: Tensor, shuffle: torch.Generator
    ) -> None:
        """Move the codewords that were not chosen since this was last called."""
        revive(quantizer, optimizer, x_ND, self._used_LK, shuffle)
        self._used_LK.zero_()

    def _estimator(self, epoch: int, draws: torch.Generator) -> Estimator:
        if self.estimator == "gumbel":
            done = (epoch - 1) / max(1, self.epochs - 1)
            return partial(gumbel, temperature=HOT * (COLD / HOT) ** done, generator=draws)
        return rotation if self.estimator == "rotation" else straight_through

    def _optimizer(self, quantizer: RQVAEQuantizer, terms: LetterTerms | None) -> torch.optim.Optimizer:
        networks = [*quantizer.encoder.parameters(), *quantizer.decoder.parameters()]
        groups = [
            {"params": networks, "weight_decay": 1e-4},
            {"params": [quantizer.codebooks], "weight_decay": 0.0},  # a codeword has no reason to shrink
        ]
        if terms is not None:
            groups.append({"params": list(terms.parameters()), "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    def _batches(self, x_ND: Tensor, shuffle: torch.Generator) -> tuple[Tensor, ...]:
        """Rows of each batch of an epoch."""
        return torch.randperm(len(x_ND), generator=shuffle).split(self.batch_size)


@torch.no_grad()
def _look(quantizer: RQVAEQuantizer, x_ND: Tensor, epoch: int, loss: float) -> Look:
    codes = quantizer.encode(x_ND)
    error = ((quantizer.decode(codes) - x_ND) / quantizer.scale).square().mean().item()
    sizes = (quantizer.num_codewords,) * quantizer.num_levels
    return Look(epoch, loss, ItemCodes(codes.numpy(), sizes).collision_rate, error)

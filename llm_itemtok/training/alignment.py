"""ETEGRec's two alignments of a recommender with the quantizer behind its item tokens.

Both look at pairs of a history and the item that follows it:

- `sequence`, between history and item: the mean of the history's states, taken into the space of the codebooks (z^E),
  and the target's own latent vector have code distributions at every level, P_z and P_E. Minimised is their symmetric
  divergence, `sum_l KL(P_z || P_E) + KL(P_E || P_z)`.
- `preference`, between preference and meaning: the state that predicts the target's first token, taken into the space
  of the item vectors (h^D), shall be most like, by cosine, the target's rebuilt vector (z~), and the other way round:
  InfoNCE in both directions, the other targets of the batch being the negatives.

Here are the two as pure functions, what the recommender learns for them (`Adapters`), and the objective of the
recommender's turn. The quantizer's turn is in `alternate`.

Decisions:
- Of a batch each distinct target counts once, where it stands first: no target is its own negative. The batch is that
  of all processes (two processes are one), and of one micro-batch: negatives do depend on accumulation.
- An encoder–decoder's history is what the encoder read, its h^D the decoder's first state. In a decoder-only model a
  row holds many pairs: the history of a target is what stands before it in the row, so its mean is cumulative, and its
  h^D is the state at the history's last token. `last` takes that state for both. A target without history is no pair.
- The divergence is computed of logarithms: far codewords have a probability of 0, and none is cut off.

`release` is what the released code does: distances enter the softmax with the wrong sign, so that the farthest codeword
is the likeliest; what a level leaves of a vector carries no gradient, so that only the first level teaches. Means over
the levels instead of sums, which it has too, are a choice of their own.

Source: Liu et al. 2025 (arXiv:2409.05546), equations 14 to 18, and the released code for what they leave open: the
temperature, unique targets, linear adapters. There negatives are those of one process.

Shape letters: B rows, S positions, C context positions, D model width, P pairs, U distinct targets, L levels, K
codewords, H width of a codeword, V of an item vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from llm_itemtok.items.base import Quantizer
from llm_itemtok.processes import together
from llm_itemtok.training.collator import TARGET_ITEMS
from llm_itemtok.training.examples import TASKS
from llm_itemtok.training.objective import Heard, Objective

Variant = Literal["paper", "release"]
Pool = Literal["mean", "last"]

SEQUENCE, PREFERENCE = "alignment/sequence", "alignment/preference"
"""Names of the two terms."""


def sequence_alignment(
    items: Sequence[Tensor], sequences: Sequence[Tensor], *, variant: Variant = "paper", means: bool = False
) -> Tensor:
    """Symmetric divergence of code distributions.

    Args:
        items: L tensors `[U, K]`, minus the squared distances of the targets (`Quantizer.assignment_logits`).
        sequences: those of the histories before them.
        variant: see the module.
        means: over the levels, in place of the sum.

    Returns:
        `[U]` in nats, at least 0 up to rounding; 0 where the distributions agree.
    """
    each = []
    for item, sequence in zip(items, sequences, strict=True):
        sign = 1 if variant == "paper" else -1
        ours, theirs = (sign * item).log_softmax(-1), (sign * sequence).log_softmax(-1)
        each.append(((ours.exp() - theirs.exp()) * (ours - theirs)).sum(-1))
    levels = torch.stack(each)
    return levels.mean(0) if means else levels.sum(0)


def preference_alignment(items: Tensor, preferences: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE in both directions, by cosine.

    Args:
        items: rebuilt vectors `[U, V]` of distinct targets.
        preferences: `[U, V]`, what the histories before them were taken to.
        temperature: what cosines are divided by, above 0.

    Returns:
        `[U]` in nats, the sum of both directions.
    """
    likeness = F.normalize(items, dim=-1) @ F.normalize(preferences, dim=-1).T / temperature
    own = torch.arange(len(items), device=items.device)
    return F.cross_entropy(likeness, own, reduction="none") + F.cross_entropy(likeness.T, own, reduction="none")


@dataclass(frozen=True)
class Alignments:
    """The two with their weights.

    Attributes:
        sequence: weight of the alignment of histories, at least 0.
        preference: weight of the alignment of preferences, at least 0.
        temperature: of the latter, above 0.
        variant: of the former.
        means: of the former.
    """

    sequence: float
    preference: float
    temperature: float = 0.07
    variant: Variant = "paper"
    means: bool = False

    @property
    def any(self) -> bool:
        """Whether one of them counts."""
        return self.sequence > 0 or self.preference > 0

    def __call__(
        self, quantizer: Quantizer, vectors: Tensor, rebuilt: Tensor, sequences: Tensor, preferences: Tensor
    ) -> dict[str, Tensor]:
        """Both, weighted, one value a target.

        Args:
            quantizer: differentiable in what of it is trained.
            vectors: item vectors `[U, V]` of distinct targets.
            rebuilt: what the quantizer makes of them, `[U, V]`.
            sequences: z^E `[U, H]`.
            preferences: h^D `[U, V]`.

        Returns:
            `[U]` by the names of the terms.
        """
        stopped = self.variant == "release"
        items = quantizer.assignment_logits(quantizer.to_latent(vectors), straight_through_residual=stopped)
        theirs = quantizer.assignment_logits(sequences, straight_through_residual=stopped)
        return {
            SEQUENCE: self.sequence * sequence_alignment(items, theirs, variant=self.variant, means=self.means),
            PREFERENCE: self.preference * preference_alignment(rebuilt, preferences, temperature=self.temperature),
        }


@final
class Adapters(nn.Module):
    """What the recommender learns for the alignments: the ways from its states to codebooks and item vectors.

    Attributes:
        sequence: D → H.
        preference: D → V.
        pool: what stands for a history in a decoder-only model.
    """

    def __init__(
        self,
        width: int,
        *,
        codeword: int,
        vector: int,
        middle: Tensor | None = None,
        pool: Pool = "mean",
        seed: int = 0,
    ) -> None:
        """Begin small, as the release does, and in the middle of the items, which may be far from 0.

        Args:
            width: D.
            codeword: H.
            vector: V.
            middle: `[H]`, where z^E begins; None begins at 0, as released.
            pool: the mean of the history's states, or the last one.
            seed: of the weights.
        """
        super().__init__()
        self.pool: Pool = pool
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to use up
            torch.default_generator.manual_seed(seed)
            self.sequence, self.preference = nn.Linear(width, codeword), nn.Linear(width, vector)
            for linear in (self.sequence, self.preference):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        if middle is not None:
            self.sequence.bias.data.copy_(middle)

    def forward(
        self, states: Tensor, context: Tensor | None, context_seen: Tensor | None, *, rows: Tensor, places: Tensor
    ) -> dict[str, Tensor]:
        """z^E and h^D of some pairs.

        Args:
            states: `[B, S, D]`.
            context: states of the encoder `[B, C, D]`; None for a decoder-only model, whose rows begin with one token
                that belongs to no item, and go on with items.
            context_seen: int64 `[B, C]`, 0 where there is padding.
            rows: int64 `[P]`, rows of the pairs.
            places: int64 `[P]`, positions that predict a target's first token, at least 1 in a decoder-only model.

        Returns:
            `sequence`, float32 `[P, H]`, and `preference`, float32 `[P, V]`.
        """
        with torch.autocast(states.device.type, enabled=False):  # in the model's turn as in the quantizer's
            return self._told(states, context, context_seen, rows, places)

    def _told(
        self, states: Tensor, context: Tensor | None, context_seen: Tensor | None, rows: Tensor, places: Tensor
    ) -> dict[str, Tensor]:
        here = states[rows, places].float()
        if context is not None and context_seen is not None:
            seen = context_seen.unsqueeze(-1).float()
            history = ((context.float() * seen).sum(1) / seen.sum(1))[rows]
        elif self.pool == "last":
            history = here
        else:
            history = states[:, 1:].float().cumsum(1)[rows, places - 1] / places.unsqueeze(-1)
        return {"sequence": self.sequence(history), "preference": self.preference(here)}


def pairs(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Histories and targets in a batch of `WithTargetItems`.

    Returns:
        Rows, positions and catalogue rows, int64 `[P]` each, row by row.
    """
    items = batch[TARGET_ITEMS]
    where = (batch["levels"] == 0) & (items >= 0) & (batch["tasks"] == TASKS.index("next-item")).unsqueeze(1)
    where &= batch["loss_weights"] > 0  # a blank row has a target that does not count
    if "context_ids" not in batch:
        where[:, 0] = False  # predicted from the start token alone
    rows, places = where.nonzero(as_tuple=True)
    return rows, places, items[where]


def first_of_each(items: Tensor) -> Tensor:
    """Where each distinct item `[P]` stands first: int64 `[U]`, ascending."""
    order = items.argsort(stable=True)
    ordered = items[order]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return order[is_first].sort().values


@final
class WithAlignments:
    """The `Objective` with the terms of both alignments beside those of another.

    Needs batches of `WithTargetItems`, and a model whose `beside` is `Adapters`. The quantizer teaches and does not
    learn here: gradients pass through it, none stays.

    Attributes:
        objective: the recommender's own.
        active: whether the alignments count at the present step; `alternate` says when.
    """

    def __init__(self, objective: Objective, alignments: Alignments, quantizer: Quantizer, vectors: Tensor) -> None:
        """Add to `objective`.

        Args:
            objective: L_REC.
            alignments: the terms.
            quantizer: that of the model, frozen at rest.
            vectors: item vectors, float32 `[N, V]`.
        """
        self.objective = objective
        self.active = alignments.any
        self._alignments = alignments
        self._quantizer = quantizer
        self._vectors = vectors

    def denominators(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the other, and the number of distinct targets in this micro-batch of all processes."""
        items = _gathered(pairs(batch)[2].unsqueeze(1))[:, 0]
        # The same on every process, as the terms are: the trainer divides the sum over processes by their number.
        return {**self.objective.denominators(batch), "aligned": torch.tensor(len(items.unique()), device=items.device)}

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Terms in nats; those of the alignments are the whole batch's, on every process."""
        if not self.active:
            return self.objective(model, batch, totals)
        rows, places, items = pairs(batch)
        heard = Heard(model, beside={"rows": rows, "places": places})
        terms = self.objective(heard, batch, totals)
        told = heard.told
        # One exchange for both, at the end of the forward pass, so at the beginning of the backward one everywhere.
        ours = _Exchange.apply(torch.cat([told["sequence"], told["preference"]], dim=1))
        items = _gathered(items.unsqueeze(1))[:, 0]
        first = first_of_each(items)
        sequences, preferences = ours[first].split([told["sequence"].shape[1], told["preference"].shape[1]], dim=1)
        if self._vectors.device != items.device:
            self._vectors = self._vectors.to(items.device)
        vectors = self._vectors[items[first]]
        with torch.autocast(items.device.type, enabled=False):  # differences of distances need all their digits
            with torch.no_grad():
                rebuilt = self._quantizer(vectors).reconstruction
            found = self._alignments(self._quantizer, vectors, rebuilt, sequences, preferences)
        # At least 1: a step may hold texts alone.
        return terms | {name: values.sum() / totals["aligned"].clamp(min=1) for name, values in found.items()}


class _Exchange(torch.autograd.Function):
    """Rows of all processes `[sum of n, W]`, in the order of the processes, from those of each `[n, W]`.

    Every process computes the same loss of them, and the gradients of all come back; averaged over processes, as a
    distributed wrapper does, they are those of the one loss.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        """Exchange."""
        ctx.own = slice(0, len(part))
        if not together():
            return part.clone()
        sizes = _sizes(part)
        begin = sum(sizes[: distributed.get_rank()])
        ctx.own = slice(begin, begin + len(part))
        return _joined(part, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Add up what all processes say, and take what is one's own."""
        whole = gradients[0].contiguous()
        if together():
            whole = whole.clone()
            distributed.all_reduce(whole)
        return whole[ctx.own]


def _gathered(part: Tensor) -> Tensor:
    """Rows of all processes, without gradients."""
    return _joined(part, _sizes(part)) if together() else part


def _sizes(part: Tensor) -> list[int]:
    """How many rows each process has."""
    own = torch.tensor([len(part)], device=part.device)
    sizes = [torch.zeros_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, own)
    return [int(size) for size in sizes]


def _joined(part: Tensor, sizes: Sequence[int]) -> Tensor:
    padded = F.pad(part, (0, 0, 0, max(sizes) - len(part))).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])

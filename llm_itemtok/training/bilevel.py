"""Item tokens as the upper level of a bi-level problem whose lower level trains the recommender (BLOGER).

The recommender theta is trained as ever, on soft-to-hard inputs (`model/soft_inputs.py`). Every so many steps the
quantizer phi takes one, by a look-ahead at what theta would become:

    theta' = theta - a grad_theta L_rec(phi, theta)
    G_rec  = grad_phi L_rec(phi, theta'),    G_tok = grad_phi L_tok(phi)
    phi   <- phi - AdamW( surgery(G_rec, G_tok) + lambda G_tok )

and all codes are read anew. G_rec has two parts: through the inputs at theta', and through theta' itself (`order: 2`):

    G_rec = d L_rec / d phi - a ( d / d phi ) <grad_theta L_rec(phi, theta), v>,   v = grad_theta' L_rec(phi, theta')

`order: 1` leaves the second part out. With a = 0 there is no look-ahead, and this is joint training on one level.

L_tok is the loss of the quantizer on the items of the batch, the mean over their occurrences: the error of the rebuilt
vectors, and the codebook and commitment losses. L_rec is whatever the training minimises.

Decisions:
- The second part is computed as it is written, one product of v with a derivative, piece by piece of the batch; nothing
  of the look-ahead is kept as a graph, and processes share the work and add up gradients, so that v is that of all.
- The batch is not that of the step, which the trainer has let go by then, but one drawn with the seed and the step.
  Both passes read it, as in the paper. Theta is as the step has left it.
- Dropout is on, with other masks in the two passes, as in the released code; masks depend on the seed, the step and the
  piece, so on no number of processes while pieces are of one size.
- Attention must be differentiable twice for `order: 2`, which fused kernels are not: the plain implementation of
  scaled dot products is asked for then, and the log says so.
- A body that computes its states anew for the backward pass would do so with theta, not theta'; so no checkpointing.
- Codebooks count as one tensor a level in the surgery, and weight decay leaves them alone.

Source: BLOGER (arXiv:2510.21242); `docs/bilevel.md` says where the released code differs, and what is ours.

Shape letters: N items, V dimensions of an item vector, L levels of a code.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from datasets import Dataset as ExampleTable
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.recode import recode
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.state import QUANTIZER
from llm_itemtok.processes import place_among, summed_up
from llm_itemtok.training.gradients import SURGERIES, Surgery, conflict
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.objective import Objective
from llm_itemtok.training.quantizer_optimizer import QuantizerOptimizer
from llm_itemtok.training.updates import Moment, Proposal

LOOK, STEP = 0, 1
"""The two passes, which have dropout masks of their own."""

PEAKS_OF = 1024
"""Items, drawn with the seed, on which it is measured how peaked mixtures are."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class UpperLevel:
    """How the quantizer is trained.

    Attributes:
        look_ahead: a, length of the step to theta'; None for the learning rate that the trainer has then.
        order: whether the gradient goes through theta' (2) or takes it as it is (1).
        surgery: what happens where G_rec points against G_tok (`gradients`).
        weight: lambda, of G_tok.
        learning_rate: of AdamW.
        weight_decay: of AdamW, for what is no codebook.
        codebook: weight of the codebook and commitment losses in L_tok.
        commitment: of the latter among them.
        margin: of `recode`.
        batch_size: examples of a step.
        piece: examples that are computed together.
        seed: of the batches, and of dropout.
    """

    look_ahead: float | None = None
    order: Literal[1, 2] = 2
    surgery: Surgery = "projection"
    weight: float = 0.5
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    codebook: float = 1.0
    commitment: float = 0.25
    margin: float = 0.0
    batch_size: int = 256
    piece: int = 256
    seed: int = 0


@dataclass(frozen=True)
class UpperMaterial:
    """What the upper level reads beside the model.

    Attributes:
        table: training examples.
        collate: renders them with placeholders.
        binding: to item tokens, as the model reads them.
        objective: L_rec.
        vectors: float32 `[N, V]`, the item vectors, in the quantizer's units.
        half: whether passes are in bfloat16 where the training's are.
    """

    table: ExampleTable
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, Tensor]]
    binding: LateBinding
    objective: Objective
    vectors: np.ndarray
    half: bool = False


@dataclass(frozen=True)
class _Work:
    """A batch of the upper level."""

    pieces: dict[int, Batch]  # number → with placeholders, on the model's device; those of this process
    totals: dict[str, Tensor]  # denominators of L_rec
    occurrences: int
    step: int


@dataclass(frozen=True)
class _Found:
    """Gradients and losses of a batch, the same on all processes."""

    recommendation: list[Tensor]
    tokenization: list[Tensor]
    losses: dict[str, float]


@final
class Bilevel:
    """The method; see the module."""

    def __init__(self, every: int, upper: UpperLevel, material: UpperMaterial, model: ItemTokenModel) -> None:
        """Prepare.

        Args:
            every: optimiser steps from one step of the quantizer to the next.
            upper: how it is trained.
            material: what it reads.
            model: holds its quantizer, and mixes its inputs.
        """
        assert model.quantizer is not None
        assert model.soft is not None
        self.every = every
        self.upper = upper
        self.material = material
        self._optimizer = QuantizerOptimizer(
            model.quantizer, learning_rate=upper.learning_rate, weight_decay=upper.weight_decay
        )

    def due(self, step: int) -> bool:
        """After every so many steps."""
        return step > 0 and step % self.every == 0

    def state(self) -> dict[str, Tensor]:
        """Of the quantizer's optimiser."""
        return self._optimizer.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._optimizer.load_state(state)

    def propose(self, moment: Moment) -> Proposal:
        """Train the quantizer by a step, and read all codes anew."""
        model = moment.model
        assert model.quantizer is not None
        assert model.soft is not None
        model.train()
        with self._optimizer.learning():
            found = self.gradients(model, _rates(model, moment.optimizer, self.upper.look_ahead), moment.step)
        changed, facts = self._operated(found)
        self._optimizer.step(changed)
        model.soft.forget()
        codes = recode(model.quantizer, self.material.vectors, model.vocab.codes, margin=self.upper.margin)
        unknown = np.full(len(codes.table), np.nan, dtype=np.float32)
        facts |= {"peaks": self._peaks(model.quantizer), "collisions": codes.collisions, "displaced": codes.displaced}
        return Proposal(codes.table, unknown, unknown, facts)

    # ------------------------------------------------------------------------------------------------- gradients

    def gradients(self, model: ItemTokenModel, rates: Mapping[str, float], step: int) -> _Found:
        """G_rec and G_tok of the batch of a step, while the quantizer is learning.

        Args:
            model: in the mode it is to be looked at in.
            rates: name → length of the look-ahead's step, of each parameter of theta.
            step: optimiser steps done.
        """
        work, phi = self._work(model, step), self._optimizer.parameters
        theta = {name: parameter for name, parameter in model.named_parameters() if name in rates}
        with self._attention():
            ahead: dict[str, Tensor] = dict(theta)
            looking = any(rates.values())
            if looking:
                inner, inside = self._summed(model, theta, list(theta.values()), work, LOOK)
                ahead = {
                    name: (parameter - rates[name] * gradient).detach().requires_grad_()
                    for (name, parameter), gradient in zip(theta.items(), inner, strict=True)
                }
            second = looking and self.upper.order == 2
            wanted = [*phi, *(ahead.values() if second else ())]
            outer, outside = self._summed(model, ahead, wanted, work, STEP)
            recommendation = outer[: len(phi)]
            if second:
                pull = {name: rates[name] * part for name, part in zip(ahead, outer[len(phi) :], strict=True)}
                through = self._through(model, theta, pull, work)
                recommendation = [one - other for one, other in zip(recommendation, through, strict=True)]
        tokenization, rebuilding = self._tokenization(model, work)
        losses = {"recommendation": outside, "tokenization": rebuilding}
        return _Found(recommendation, tokenization, losses | ({"before_look_ahead": inside} if looking else {}))

    def _work(self, model: ItemTokenModel, step: int) -> _Work:
        """Draw the batch of a step, the same on all processes, and deal its pieces."""
        upper, table = self.upper, self.material.table
        rng = np.random.default_rng([upper.seed, step])
        rows = rng.choice(len(table), size=min(upper.batch_size, len(table)), replace=False)
        place, processes = place_among()
        pieces: dict[int, Batch] = {}
        occurrences = 0
        totals: dict[str, Tensor] = {}
        for number, start in enumerate(range(0, len(rows), upper.piece)):
            batch = self.material.collate([table[int(row)] for row in rows[start : start + upper.piece]])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            for name, value in self.material.objective.denominators(batch).items():
                totals[name] = totals.get(name, torch.zeros((), device=model.device)) + value
            occurrences += len(self._occurring(batch, model.vocab.num_levels))
            if number % processes == place:
                pieces[number] = batch
        return _Work(pieces, totals, occurrences, step)

    def _occurring(self, batch: Batch, levels: int) -> Tensor:
        """Items int64 `[n]` that a batch reads, as often as it does: histories, and targets but for paths of one."""
        read = [
            batch[name][batch[name] >= self.material.binding.first]
            for name in ("context_ids", "input_ids")
            if name in batch
        ]
        places = torch.cat(read) - self.material.binding.first
        return places[places % levels == 0] // levels

    def _summed(
        self, model: ItemTokenModel, theta: Mapping[str, Tensor], wanted: Sequence[Tensor], work: _Work, which: int
    ) -> tuple[list[Tensor], float]:
        """Gradients of L_rec under theta, beside `wanted`, and its value; of all pieces and processes."""
        gradients, total = [torch.zeros_like(each) for each in wanted], torch.zeros((), device=model.device)
        for number, batch in work.pieces.items():
            loss = self._loss(model, theta, batch, work, (number, which))
            found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            gradients = [one + other for one, other in zip(gradients, found, strict=True)]
            total += loss.detach()
        *gradients, total = summed_up([*gradients, total])
        return gradients, float(total)

    def _through(
        self, model: ItemTokenModel, theta: Mapping[str, Tensor], pull: Mapping[str, Tensor], work: _Work
    ) -> list[Tensor]:
        """Derivative of <grad_theta L_rec(phi, theta), pull> by phi: the second-order part."""
        phi = self._optimizer.parameters
        gradients = [torch.zeros_like(each) for each in phi]
        for number, batch in work.pieces.items():
            loss = self._loss(model, theta, batch, work, (number, LOOK))
            inner = torch.autograd.grad(
                loss, list(theta.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            product = torch.stack([(one * other).sum() for one, other in zip(inner, pull.values(), strict=True)]).sum()
            found = torch.autograd.grad(product, phi, allow_unused=True, materialize_grads=True)
            gradients = [one + other for one, other in zip(gradients, found, strict=True)]
        return summed_up(gradients)

    def _loss(
        self, model: ItemTokenModel, theta: Mapping[str, Tensor], batch: Batch, work: _Work, pass_: tuple[int, int]
    ) -> Tensor:
        """This piece's share of L_rec under theta, a function of phi; `pass_` names the dropout masks."""
        devices = [model.device] if model.device.type == "cuda" else []
        kind = model.device.type

        def call(**inputs: Any) -> Any:
            return functional_call(model, dict(theta), (), inputs)

        with torch.random.fork_rng(devices=devices), torch.autocast(kind, torch.bfloat16, enabled=self.material.half):
            torch.manual_seed(int(np.random.SeedSequence([self.upper.seed, work.step, *pass_]).generate_state(1)[0]))
            terms = self.material.objective(_Called(model, call), self.material.binding(batch), work.totals)
            return torch.stack(list(terms.values())).sum()

    def _tokenization(self, model: ItemTokenModel, work: _Work) -> tuple[list[Tensor], float]:
        """G_tok and L_tok."""
        assert model.quantizer is not None
        phi, upper = self._optimizer.parameters, self.upper
        gradients, total = [torch.zeros_like(each) for each in phi], torch.zeros((), device=model.device)
        for batch in work.pieces.values():
            items, counts = self._occurring(batch, model.vocab.num_levels).unique(return_counts=True)
            found = model.quantizer(torch.from_numpy(self.material.vectors[items.cpu().numpy()]).to(model.device))
            quantization = found.codebook_loss + upper.commitment * found.commitment_loss
            each = found.reconstruction_loss + upper.codebook * quantization
            loss = (each * counts).sum() / max(1, work.occurrences)
            of_piece = torch.autograd.grad(loss, phi, allow_unused=True, materialize_grads=True)
            gradients = [one + other for one, other in zip(gradients, of_piece, strict=True)]
            total += loss.detach()
        *gradients, total = summed_up([*gradients, total])
        return gradients, float(total)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """An implementation that can be differentiated as often as is needed."""
        with ExitStack() as stack:
            if self.upper.order == 2:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    # ------------------------------------------------------------------------------------------------- what is done

    @torch.no_grad()
    def _peaks(self, quantizer: Quantizer) -> list[float]:
        """How likely the likeliest codeword of each level is, on average: near 1, a level hears little of the model."""
        vectors = self.material.vectors
        rows = np.random.default_rng(self.upper.seed).permutation(len(vectors))[:PEAKS_OF]
        levels = quantizer.soft_assign(torch.from_numpy(vectors[rows]).to(quantizer.codebooks.device))
        return [float(each.amax(dim=1).mean()) for each in levels]

    def _operated(self, found: _Found) -> tuple[list[Tensor], dict[str, Any]]:
        """Gradients for the step, and figures for the log."""
        names, upper = self._optimizer.names, self.upper
        of_rec = _by_tensor(dict(zip(names, found.recommendation, strict=True)))
        of_tok = _by_tensor(dict(zip(names, found.tokenization, strict=True)))
        told = conflict(of_rec, of_tok)
        cut = SURGERIES[upper.surgery]
        sums = {name: cut(of_rec[name], of_tok[name]) + upper.weight * of_tok[name] for name in of_rec}
        facts = {
            "losses": found.losses,
            "conflict": told.share,
            "cosines": told.cosines,
            "gradient_norms": {"recommendation": _norm(of_rec), "tokenization": _norm(of_tok), "sum": _norm(sums)},
            "attention": "math" if upper.order == 2 else "default",
        }
        return _whole(sums, names), facts


class _Called(torch.nn.Module):
    """A model under other parameters, for an objective that calls it."""

    def __init__(self, model: ItemTokenModel, call: Callable[..., Any]) -> None:
        super().__init__()
        self.training = model.training
        self._call = call

    def forward(self, **inputs: Any) -> Any:
        return self._call(**inputs)


def _rates(model: ItemTokenModel, optimizer: torch.optim.Optimizer, look_ahead: float | None) -> dict[str, float]:
    """Length of the look-ahead's step for each parameter of theta: what the trainer trains."""
    rate_of = {
        id(parameter): float(group["lr"] if look_ahead is None else look_ahead)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {
        name: rate_of[id(parameter)]
        for name, parameter in model.named_parameters()
        if not name.startswith(QUANTIZER) and id(parameter) in rate_of
    }


def _by_tensor(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same gradients, those of the codebooks level by level."""
    parts: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        if name == "codebooks":
            parts |= {f"codebooks.{level}": part for level, part in enumerate(gradient)}
        else:
            parts[name] = gradient
    return parts


def _whole(parts: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """Gradients beside `names`, from what `_by_tensor` gave."""
    levels = [part for name, part in parts.items() if name.startswith("codebooks.")]
    return [torch.stack(levels) if name == "codebooks" else parts[name] for name in names]


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return float(torch.stack([each.double().square().sum() for each in gradients.values()]).sum().sqrt())

"""IntRR: one vector an item goes into the backbone, and a small recursive network yields the levels of the next item.

The same network stands at both ends, with the same weights. It goes through the levels under a *guidance* g of the
model's width, and meets each level's codebook, whose codewords are the item tokens' rows:

    x_1 = g,   x_l = MLP_l([c_{l-1}; g]),   s_l = x_l C_l^T,   p_l = softmax(s_l)

At the item side g is an embedding of the item's own (`ItemEmbeddings`), and c_l the codeword with the highest score;
scores get the gradient that they would have if it were the mean of all under p_l. The sum of the c_l is what the
backbone reads of the item: its code is redistributed over the codebooks by what is learnt of the item, and may differ
from its code in the table. At the user side g is the backbone's last state, c_l the codeword of the target (in
training) or of a beam, and s_l the logits. So the backbone runs once for a recommendation, over a row that is L times
shorter.

Decisions:
- Codewords are the rows of the item tokens (`ItemRows`), as wide as the model: they begin with a meaning, updates of
  item tokens find them, and their scale is that of the base's table. Scores are products with them, as everywhere in a
  language model. The MLPs see them at scale 1 (`unit`), beside a guidance of that scale.
- An item's vector is brought to the scale of the base's table (`gain`, measured once on the vectors of items).
- Codewords of that scale would make p_l flat at the item side: no choice, and a gradient that is not the choice's.
  So scores are multiplied there by what gives them a spread of `SPREAD` nats at the beginning (`sharpness`).
- A codeword that is read gets its whole gradient, as an embedding does; in the release it gets its share under p_l.
- An item without an embedding of its own, new or never in training, is read as the sum of its code's codewords.
- Scores carry neither a bias nor `1/sqrt(D)`, as released.

Source: IntRR, arXiv:2602.20704, and its released code. There the codebooks begin as N(0, 1) beside an untrained T5.

Shape letters: n items or positions, L levels, K codewords of a level, D model width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_itemtok.model.item_embeddings import ItemEmbeddings

Mixing = Literal["hard", "soft"]

SPREAD = 3.0
"""Standard deviation of an item's scores at a level when training begins, in nats; that of the release is about 9."""

_MEASURED = 4096
"""Items that scales are measured on."""


class Assigned(NamedTuple):
    """What the network makes of guidances."""

    vectors: Tensor
    """float `[n, D]`, the sum of the codewords, at the scale of the base's table."""
    logits: list[Tensor]
    """For each level float `[n, K]`."""


@final
class Recursion(nn.Module):
    """The recursive network of both sides.

    Attributes:
        items: what guides it at the item side.
        steps: the MLPs of levels 1 to L - 1.
        hidden: width of their inner layer.
        mixing: `hard` reads the best codeword at the item side, `soft` the mean of all by their probability.
        aligns: whether the model should tell how likely the item side finds each item's code.
    """

    unit: Tensor
    gain: Tensor
    sharpness: Tensor

    def __init__(
        self,
        items: ItemEmbeddings,
        *,
        levels: int,
        width: int,
        hidden: int,
        mixing: Mixing = "hard",
        aligns: bool = False,
        seed: int = 0,
    ) -> None:
        """Make an untrained network.

        Args:
            items: the guidance of items.
            levels: L.
            width: D.
            hidden: of the MLPs' inner layer.
            mixing: see the class.
            aligns: see the class.
            seed: of the initial weights.
        """
        super().__init__()
        self.items = items
        self.hidden = hidden
        self.mixing: Mixing = mixing
        self.aligns = aligns
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to use up
            torch.default_generator.manual_seed(seed)
            self.steps = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, width))
                for _ in range(levels - 1)
            )
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("sharpness", torch.ones(levels))

    @torch.no_grad()
    def fit_scale(self, codebooks: Sequence[Tensor], codes: Tensor) -> None:
        """Measure `unit`, `sharpness` and `gain` on codebooks, L times `[K, D]`, and items' codes, int64 `[N, L]`."""
        self.unit.copy_(torch.cat(list(codebooks)).square().mean().sqrt().clamp(min=1e-6))
        self.sharpness.fill_(1.0)
        self.gain.fill_(1.0)
        guided = self.items.has(torch.arange(len(codes), device=codes.device)).nonzero()[:, 0]
        rows = guided[torch.linspace(0, len(guided) - 1, min(len(guided), _MEASURED)).long()]
        for level in range(len(codebooks) if len(rows) else 0):  # what a level reads of the one before is sharp by then
            scores = self.item_side(rows, codes[rows], codebooks).logits[level]
            spread = float(scores.std(dim=1, correction=0).mean())
            self.sharpness[level] = SPREAD / spread if spread > 1e-6 else 1.0  # a level of one codeword has none
        read = self.item_side(rows, codes[rows], codebooks).vectors if len(rows) else _spelled(codebooks, codes)
        size = (read - read.mean(0)).square().mean().sqrt()
        if size < 1e-3 * self.unit:  # of few items, that all begin alike
            size = read.square().mean().sqrt().clamp(min=1e-6)
        self.gain.copy_(self.unit / size)

    def query(self, level: int, guidance: Tensor, before: Tensor | None) -> Tensor:
        """What is multiplied with a level's codebook, `[..., D]`.

        Args:
            level: in `[0, L)`.
            guidance: `[..., D]`; where many codewords meet one guidance, its shape may be one that broadcasts.
            before: `[..., D]`, the codeword of the level before; None at level 0.
        """
        if before is None:
            assert level == 0
            return guidance
        return self._guided(level, guidance, self._told(level, before))

    def _told(self, level: int, before: Tensor) -> Tensor:
        """The part `[..., hidden]` of an MLP's inner layer that comes from codewords `[..., D]` of the level before."""
        first, _ = self._layers(level)
        return F.linear(before / self.unit, first.weight[:, : before.shape[-1]])

    def _guided(self, level: int, guidance: Tensor, told: Tensor) -> Tensor:
        """The MLP's result `[..., D]`, from both parts of `[c; g]`, which are multiplied apart: neither is repeated."""
        first, last = self._layers(level)
        inner = told + F.linear(guidance, first.weight[:, guidance.shape[-1] :], first.bias)
        result: Tensor = last(inner.relu())
        return result

    def _layers(self, level: int) -> tuple[nn.Linear, nn.Linear]:
        step = self.steps[level - 1]
        assert isinstance(step, nn.Sequential)
        first, last = step[0], step[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return first, last

    def item_side(self, rows: Tensor, codes: Tensor, codebooks: Sequence[Tensor]) -> Assigned:
        """What the backbone reads of items.

        Args:
            rows: int64 `[n]`, the items.
            codes: int64 `[n, L]`, their codes.
            codebooks: L times `[K, D]`.
        """
        with _as_given(codebooks[0]):
            guidance = self.items(rows)
            found, logits = guidance.new_zeros(guidance.shape), []
            before: Tensor | None = None
            for level, codebook in enumerate(codebooks):
                scores = self.query(level, guidance, before) @ codebook.T * self.sharpness[level]
                before = self._assigned(scores, codebook)
                found = found + before
                logits.append(scores)
            vectors = torch.where(self.items.has(rows).unsqueeze(1), found, _spelled(codebooks, codes))
            return Assigned(vectors * self.gain, logits)

    def _assigned(self, scores: Tensor, codebook: Tensor) -> Tensor:
        """The codewords, or mixtures, that scores `[n, K]` choose of a codebook `[K, D]`: `[n, D]`."""
        if self.mixing == "hard" and not torch.is_grad_enabled():
            return codebook[scores.argmax(-1)]
        if self.mixing == "soft":
            return scores.softmax(-1) @ codebook
        mean = scores.softmax(-1) @ codebook.detach()
        return codebook[scores.argmax(-1)] + (mean - mean.detach())  # the codeword itself, to the bit

    def user_side(self, states: Tensor, codes: Tensor, codebooks: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each level, L times `[n, K]`, given the levels before.

        Args:
            states: `[n, D]`, of the backbone.
            codes: int64 `[n, L]`, of the targets; the last level is not read.
            codebooks: L times `[K, D]`.
        """
        with _as_given(codebooks[0]):
            states = states.to(codebooks[0].dtype)
            logits = [states @ codebooks[0].T]
            for level, codebook in enumerate(codebooks[1:], start=1):
                # Of targets there are more than codewords: what a codeword tells is computed once.
                told = self._told(level, codebooks[level - 1])[codes[:, level - 1]]
                logits.append(self._guided(level, states, told) @ codebook.T)
            return logits


def _as_given(weights: Tensor) -> AbstractContextManager[None]:
    """Compute in the type of the weights, without autocast, as decoding does: rounded scores choose others."""
    return torch.autocast(weights.device.type, enabled=False)


def _spelled(codebooks: Sequence[Tensor], codes: Tensor) -> Tensor:
    """Sum of the codewords of codes, int64 `[n, L]`: `[n, D]`."""
    parts = [codebook[codes[:, level]] for level, codebook in enumerate(codebooks)]
    return torch.stack(parts).sum(0)

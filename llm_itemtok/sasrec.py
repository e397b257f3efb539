"""SASRec: a small causal transformer over item ids, the strong rival of this project that knows no text.

It is a baseline, and its item vectors are collaborative ones. Kang and McAuley 2018 (arXiv:1808.09781) for the network.
What we do otherwise, and why:
- The loss is a softmax over the catalogue, or for large catalogues over items drawn uniformly and shared by the batch.
  The published loss, one negative a target, leaves the model overconfident and far behind (Klenitskiy and Vasilev 2023,
  arXiv:2309.07602; Petrov and Macdonald 2023, arXiv:2308.07192). Drawn items count for all those that were not drawn
  (their logits are raised by log(catalogue / drawn)), so the loss estimates that over the whole catalogue and the
  number drawn is about speed only.
- Every window begins with a learned start vector. So an empty history has an answer, and a user's first item is a
  target too.
- Every interaction is a target once: a sequence longer than `max_length` is cut into windows that overlap by one item.
- Batches hold windows of about one length and about the same number of targets, so next to nothing is padding.
- Layers are normalised before attention and before the feed-forward part, not after.
- The weights kept are those that validated best; what that means is the caller's (`validate`).
- The defaults were chosen on Beauty's validation users (NDCG@10 .050): width 128 was no better at twice the time
  (.047), neither were cosines in place of products (.046) or a learning rate that falls steadily (.049).

On one thread of a CPU the same seed gives the same weights. This module knows catalogue rows and torch; it knows
nothing of language models, item tokens or how a ranking is measured.

Shape letters in this file: B windows of a batch, T places of a window, P targets of a batch, K drawn items, N items of
the catalogue, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from llm_itemtok.errors import DataError

Rows = NDArray[np.int64]
"""Catalogue rows in time order."""


class _Layer(nn.Module):
    """Causal self-attention and a feed-forward part, each added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self._drop(self._attend(self.before_attention(x_BTD)))
        return x_BTD + self._drop(self.down(F.gelu(self.up(self.before_feed(x_BTD)))))

    def _attend(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        query, key, value = (
            self.query_key_value(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind()
        )
        # Windows are padded at their end, so the causal mask hides the padding as well.
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.mix(mixed.transpose(1, 2).reshape(B, T, D))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


@final
class SASRec(nn.Module):
    """The network; `fit` trains one. The rows of `items` are the catalogue's, then the start vector."""

    def __init__(
        self,
        num_items: int,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        max_length: int = 50,
        dropout: float = 0.5,
    ) -> None:
        """Make an untrained network.

        Args:
            num_items: size of the catalogue, N.
            width: of an item vector and of every layer, D; a multiple of `heads`.
            layers: number of layers, at least 1.
            heads: of attention, at least 1.
            max_length: items of a history that are read, the newest ones; at least 1.
            dropout: in [0, 1), on the input, inside attention and after each half of a layer.

        Raises:
            DataError: if a number is out of range.
        """
        super().__init__()
        if min(num_items, width, layers, heads, max_length) < 1 or width % heads or not 0 <= dropout < 1:
            raise DataError(
                "SASRec needs sizes of at least 1, a width that its heads divide and a dropout in [0, 1), was: "
                f"{num_items} items, width {width}, {layers} layers, {heads} heads, length {max_length}, {dropout}"
            )
        self.num_items, self.max_length, self.dropout = num_items, max_length, dropout
        self.heads = heads
        self.items = nn.Embedding(num_items + 1, width)
        self.positions = nn.Embedding(max_length + 1, width)
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, inputs_BT: Tensor) -> Tensor:
        """Read windows.

        Args:
            inputs_BT: int64 [B, T], T at most `max_length + 1`: the start row `num_items`, then catalogue rows, then
                anything as padding.

        Returns:
            float32 [B, T, D]; place t has read the inputs up to t and no later ones, and its product with an item's
            vector is that item's logit as the next one.
        """
        # The factor of Vaswani et al. 2017: one table serves as input and output, and as input it would be too quiet.
        x_BTD = self.items(inputs_BT) * math.sqrt(self.items.embedding_dim)
        x_BTD = F.dropout(x_BTD + self.positions.weight[: inputs_BT.shape[1]], self.dropout, self.training)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.norm(x_BTD)

    @torch.inference_mode()
    def scores(self, histories: Sequence[Rows]) -> NDArray[np.float32]:
        """Score every item of the catalogue as the next one; leaves the network in evaluation mode.

        Args:
            histories: catalogue rows in time order, possibly empty; of longer ones the newest `max_length` are read.

        Returns:
            Logits, float32 [B, N].
        """
        self.eval()
        device = self.items.weight.device
        newest = [history[-self.max_length :] for history in histories]
        lengths = np.array([len(history) for history in newest], dtype=np.int64)
        inputs_BT = np.full((len(newest), int(lengths.max(initial=0)) + 1), self.num_items)
        for row, history in enumerate(newest):
            inputs_BT[row, 1 : len(history) + 1] = history
        hidden_BTD = self(torch.from_numpy(inputs_BT).to(device))
        last_BD = hidden_BTD[torch.arange(len(newest), device=device), torch.from_numpy(lengths).to(device)]
        scores: NDArray[np.float32] = (last_BD @ self.items.weight[: self.num_items].T).cpu().numpy()
        return scores

    def item_vectors(self) -> NDArray[np.float32]:
        """Return the items' vectors, float32 [N, D]: what comes in for an item, and what its logit is made with."""
        vectors: NDArray[np.float32] = self.items.weight[: self.num_items].detach().cpu().numpy().copy()
        return vectors


class Fitted(NamedTuple):
    """What training left."""

    model: SASRec
    """With the weights that validated best, in evaluation mode."""
    score: float
    """What `validate` said of them."""
    step: int
    """Steps they were trained for."""


def fit(
    sequences: Sequence[Rows],
    num_items: int,
    *,
    validate: Callable[[SASRec], float],
    width: int = 64,
    layers: int = 2,
    heads: int = 2,
    max_length: int = 50,
    dropout: float = 0.5,
    learning_rate: float = 3e-3,
    batch_targets: int = 1024,
    drawn: int = 1024,
    steps: int = 30_000,
    every: int = 300,
    patience: int = 3,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train a SASRec until validation stops getting better.

    Args:
        sequences: training sequences, catalogue rows in time order, one a user.
        num_items: size of the catalogue, N.
        validate: says how good the network is, higher is better; it must not look at what is tested on.
        width: see `SASRec`, as are `layers`, `heads`, `max_length` and `dropout`.
        layers: see `SASRec`.
        heads: see `SASRec`.
        max_length: see `SASRec`.
        dropout: see `SASRec`.
        learning_rate: of Adam, reached after 200 steps; when validation stalls, a fifth of it from the best weights on.
        batch_targets: about this many targets a step.
        drawn: items in the softmax beside a target; the whole catalogue where it is no larger.
        steps: upper bound.
        every: steps between validations; counted in steps because an epoch of a small log is only a few of them.
        patience: validations without a better score before the learning rate falls, and the next time training stops.
        seed: of weights, dropout, batches and drawn items.
        device: where to train, as torch names it.
        progress: called with (steps done, upper bound) at each validation.

    Returns:
        The network with the weights that validated best, their score, and after how many steps they came.

    Raises:
        DataError: if there is nothing to train on, or a number is out of range.
    """
    windows = list(_windows(sequences, max_length + 1))
    if not windows or min(batch_targets, drawn, steps, every, patience) < 1:
        raise DataError(
            "SASRec needs training interactions, and at least 1 target a batch, drawn item, step and validation; was: "
            f"{len(windows)} windows of interactions, {batch_targets}, {drawn}, {steps}, {every} and {patience}"
        )
    generator = np.random.default_rng(seed)
    # The caller's random numbers are not ours to use up.
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        model = SASRec(num_items, width=width, layers=layers, heads=heads, max_length=max_length, dropout=dropout)
        model.to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
        best, weights = Fitted(model, -math.inf, 0), model.state_dict()
        since, slower = 0, 1.0
        for step, batch in enumerate(_batches(windows, batch_targets, generator), start=1):
            model.train()
            loss = _loss(model, batch, drawn, generator)
            _descend(optimizer, loss, learning_rate * slower * min(1.0, step / 200))
            last = step == steps
            if step % every and not last:
                continue
            score = validate(model)
            if score > best.score:
                best, since = Fitted(model, score, step), step
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if progress is not None:
                progress(step, steps)
            stalled = step - since >= patience * every
            if last or (stalled and slower < 1):
                break
            if stalled:
                since, slower = step, 0.2
                model.load_state_dict(weights)
    model.load_state_dict(weights)
    model.eval()
    return best


class _Window(NamedTuple):
    """A stretch of one sequence."""

    items: Rows
    starts: bool
    """Whether it is the sequence's beginning. If not, its first item is a target of the window before."""


def _windows(sequences: Sequence[Rows], size: int) -> Iterator[_Window]:
    """Cut sequences into windows of at most `size` items, the newest one full, neighbours sharing one item."""
    for sequence in sequences:
        end = len(sequence)
        while end > 0:
            start = max(0, end - size)
            yield _Window(sequence[start:end], start == 0)
            end = start + 1 if start else 0


def _batches(windows: Sequence[_Window], targets: int, generator: np.random.Generator) -> Iterator[list[_Window]]:
    """Deal windows out, epoch after epoch without end, each epoch's batches in random order.

    A batch holds windows of about one length, and has `targets` targets, give or take a window's.
    """
    lengths = np.array([len(window.items) for window in windows])
    while True:
        order = np.lexsort((generator.random(len(windows)), lengths))
        batch_of = np.cumsum(lengths[order]) // targets
        batches = np.split(order, np.flatnonzero(np.diff(batch_of)) + 1)
        for batch in generator.permutation(len(batches)).tolist():
            yield [windows[window] for window in batches[batch].tolist()]


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """Take one step, its gradient cut to a norm of 5."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 5.0)
        group["lr"] = learning_rate
    optimizer.step()


def _loss(model: SASRec, batch: Sequence[_Window], drawn: int, generator: np.random.Generator) -> Tensor:
    """Mean cross-entropy of the next items of a batch, over the catalogue or an estimate of that."""
    longest = max(len(window.items) for window in batch)
    inputs_BT = np.full((len(batch), longest), model.num_items)
    targets_BT = np.full((len(batch), longest), -1)
    for row, (items, starts) in enumerate(batch):
        inputs_BT[row, 1 : len(items)] = items[:-1]
        targets_BT[row, : len(items)] = items
        if not starts:
            targets_BT[row, 0] = -1
    device = model.items.weight.device
    wanted_BT = torch.from_numpy(targets_BT >= 0).to(device)
    targets_P = torch.from_numpy(targets_BT[targets_BT >= 0]).to(device)
    hidden_PD = model(torch.from_numpy(inputs_BT).to(device))[wanted_BT]
    if drawn >= model.num_items:
        return F.cross_entropy(hidden_PD @ model.items.weight[: model.num_items].T, targets_P)
    drawn_K = torch.from_numpy(generator.choice(model.num_items, drawn, replace=False)).to(device)
    logits_PK = hidden_PD @ model.items(drawn_K).T + math.log(model.num_items / drawn)
    logits_PK = logits_PK.masked_fill(drawn_K == targets_P[:, None], -math.inf)  # it stands in the first column
    target_P1 = (hidden_PD * model.items(targets_P)).sum(dim=1, keepdim=True)
    return F.cross_entropy(torch.cat([target_P1, logits_PK], dim=1), torch.zeros_like(targets_P))

"""Beams over all codes that there could be: at each level every codeword is allowed, whoever has it.

A model that proposes new item tokens must not be held to the trie of the present ones, or all that could come out would
be their permutation. So the K beams of a prompt are extended by the codewords of the next level alone; codes that
nobody has may come out, and codes that somebody has.

Two ways to ask for variety, both off by default:

- `groups` of beams one after the other, each with a penalty on codewords that the groups before it have just chosen
  (Hamming diversity, Vijayakumar et al. 2018, arXiv:1610.02424): unlike candidates for one item;
- `penalties` on codewords, such as those that many items use already (`usage_penalties`): even use by all items.

Penalties decide what is kept, not what is said of it: log-probabilities are the model's own. Codes can be handed over
to be scored in the same pass (`scored`): they ride along as beams that are always kept, so that what an item has now is
compared with what it could have without another look at its prompt.

Works on any `BeamDecoder`, so for every family.

Shape letters: B prompts, K beams, F given codes, L levels, V codewords of a level.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.decoding.tree import BeamDecoder
from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.likelihood import PlainNormaliser

State = TypeVar("State")


class LevelBeams(NamedTuple):
    """Codes proposed for B prompts."""

    codes: np.ndarray
    """int32 `[B, K, L]`, the most probable first."""
    log_probs: np.ndarray
    """float32 `[B, K]`, of the whole code under the model; -inf where another group had found the same code before."""
    scored: np.ndarray
    """float32 `[B, F]`, of the codes that were given."""


@torch.inference_mode()
def level_beams(
    decoder: BeamDecoder[State],
    prompts: Sequence[np.ndarray],
    *,
    levels: int,
    beam: int,
    normaliser: PlainNormaliser = "level",
    groups: int = 1,
    diversity: float = 0.0,
    penalties: Sequence[Tensor] | None = None,
    scored: np.ndarray | None = None,
) -> LevelBeams:
    """Propose codes for each prompt.

    Args:
        decoder: the model behind the decoding interface.
        prompts: B arrays of token ids, at least one.
        levels: L.
        beam: K, codes for each prompt, at least 1; fewer come out where the levels spell fewer.
        normaliser: as in training.
        groups: into how many groups the beams are cut, of equal size; a divisor of `beam`.
        diversity: nats taken off a codeword for every beam of the groups before that chose it at this level.
        penalties: for each level nats float32 `[V]` taken off its codewords, on the model's device.
        scored: int32 `[B, F, L]`, codes to score beside; None for none.

    Raises:
        DataError: if `beam`, `groups` or `diversity` are out of range.
    """
    if beam < 1 or groups < 1 or beam % groups or diversity < 0:
        raise DataError(
            "level beams need at least 1 beam, as many in each group, and a diversity of at least 0, was: "
            f"{beam} beams in {groups} groups, diversity {diversity}"
        )
    state = decoder.encode(prompts)
    search = _Search(len(prompts), beam // groups, groups, diversity)
    parents: Tensor | None = None
    fed: Tensor | None = None
    for level in range(levels):
        log_probs = decoder.level_log_probs(state, parents, fed, level, normaliser)
        if level == 0:
            search.begin(log_probs.device, scored)
        search.step(log_probs, None if penalties is None else penalties[level])
        parents, fed = search.fed()
    return search.found()


def usage_penalties(codes: ItemCodes, weight: float, device: torch.device) -> list[Tensor]:
    """What codewords cost by how many items use them: `weight * log(usage / mean usage)`, counted from 1.

    Args:
        codes: the present ones.
        weight: nats for a codeword that is used e times as often as the mean; at least 0.
        device: of the model.

    Returns:
        L tensors float32 `[V]`, positive for codewords used more than the mean.
    """
    penalties = []
    for level, size in enumerate(codes.sizes):
        usage = np.bincount(codes.table[:, level], minlength=size) + 1.0
        penalties.append(torch.from_numpy(weight * np.log(usage / usage.mean())).float().to(device))
    return penalties


class _Search:
    """The beams between two levels: those of the groups side by side, then the given codes."""

    def __init__(self, num: int, each: int, groups: int, diversity: float) -> None:
        self.num, self.each, self.groups, self.diversity = num, each, groups, diversity

    def begin(self, device: torch.device, scored: np.ndarray | None) -> None:
        """Start behind the prompts: every group, and every given code, from the one beam there is."""
        given = np.zeros((self.num, 0, 0), np.int32) if scored is None else scored
        self.given = torch.from_numpy(given.astype(np.int64)).to(device)
        # `totals` are the model's log-probabilities, `ranks` those less the penalties.
        self.totals = [torch.zeros(self.num, 1, device=device) for _ in range(self.groups)]
        self.ranks = [torch.zeros(self.num, 1, device=device) for _ in range(self.groups)]
        self.paths = [torch.zeros(self.num, 1, 0, dtype=torch.long, device=device) for _ in range(self.groups)]
        self.scores = torch.zeros(self.given.shape[:2], device=device)
        self.parents: list[Tensor] = []

    def step(self, log_probs: Tensor, penalty: Tensor | None) -> None:
        """Extend all by a level; `log_probs` `[B, beams, V]`, of the beams as they were fed."""
        level, size = self.paths[0].shape[2], log_probs.shape[2]
        used = torch.zeros(self.num, size, device=log_probs.device)
        starts, self.parents = 0, []
        for group in range(self.groups):
            width = self.paths[group].shape[1]
            first = 0 if level == 0 else starts
            steps = log_probs[:, first : first + width]
            starts += width
            ranks = self.ranks[group].unsqueeze(2) + (steps if penalty is None else steps - penalty)
            wanted = (ranks - self.diversity * used.unsqueeze(1)).flatten(1)
            chosen = wanted.topk(min(self.each, wanted.shape[1]), dim=1).indices
            before, words = chosen // size, chosen % size
            self.ranks[group] = ranks.flatten(1).gather(1, chosen)
            self.totals[group] = self.totals[group].gather(1, before) + steps.flatten(1).gather(1, chosen)
            inherited = self.paths[group].gather(1, before.unsqueeze(2).expand(-1, -1, level))
            self.paths[group] = torch.cat([inherited, words.unsqueeze(2)], dim=2)
            self.parents.append(before + first)
            used.scatter_add_(1, words, torch.ones_like(words, dtype=used.dtype))
        if self.given.shape[1]:
            first = 0 if level == 0 else starts
            own = log_probs[:, first : first + self.given.shape[1]].expand(-1, self.given.shape[1], -1)
            self.scores = self.scores + own.gather(2, self.given[:, :, level : level + 1]).squeeze(2)
            places = torch.arange(self.given.shape[1], device=own.device) + first
            self.parents.append((places if level else torch.zeros_like(places)).expand(self.num, -1))

    def fed(self) -> tuple[Tensor, Tensor]:
        """Parents and codewords of all beams, int64 `[B, beams]` each, for the next level."""
        level = self.paths[0].shape[2] - 1
        words = [paths[:, :, -1] for paths in self.paths]
        if self.given.shape[1]:
            words.append(self.given[:, :, level])
        return torch.cat(self.parents, dim=1), torch.cat(words, dim=1)

    def found(self) -> LevelBeams:
        """All groups together, the most probable first."""
        codes, totals = torch.cat(self.paths, dim=1), torch.cat(self.totals, dim=1)
        same = (codes.unsqueeze(2) == codes.unsqueeze(1)).all(3)
        totals = totals.masked_fill(same.tril(-1).any(2), -torch.inf)
        totals, order = totals.sort(dim=1, descending=True, stable=True)
        codes = codes.gather(1, order.unsqueeze(2).expand_as(codes))
        return LevelBeams(
            codes.cpu().numpy().astype(np.int32), totals.float().cpu().numpy(), self.scores.float().cpu().numpy()
        )

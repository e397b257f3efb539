"""Self-improvement of item tokens: the model that is trained says which code each item should have.

SIIT (arXiv:2412.17171) begins with item tokens of any origin, and lets the model revise them at intervals: items whose
identifier contradicts what the model has learnt get another. The paper has no public code, and its text leaves open how
candidates are made, chosen and judged. What follows is a reconstruction; `docs/siit.md` says of each part whether it is
the paper's.

An item's *sources* say how likely each code is for it, in nats:

- `generate`: the model itself, which reads the item's title and writes its code (the task `title-to-item`, which it is
  trained on beside). Candidates are beams constrained by level, so codes that nobody has may come out.
- `embeddings`: what the model has learnt from histories, as the mean of the states that predict the item
  (`item_states`), beside the item vectors if they are to count; codebooks that begin at the present codes follow these
  vectors (`items.requantise`). Needs no text. Beside item vectors the mean of n states counts by n / (n + `shrinkage`),
  so the code of an item that is hardly ever predicted is left to its vector.
- both: candidates of either are scored by both, and log-likelihoods are added.

An item *conflicts* by how much more likely its best candidate is than the code it has. With `outliers` only so many of
the items may move, the most conflicting ones; who gets what is `items.assign`.

Decisions:
- An item that no source knows (no title; never in training) keeps its code.
- Items never lose their codes to others, so the fallbacks that a reconstruction which deals all codes anew would need
  (wider beams, the last level alone, the nearest free code, a further token) have no case here.
- The work is cut into batches of items that do not depend on the number of processes (`processes`).

Shape letters: N items, n items of a batch, L levels, B candidates of a source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from datasets import Dataset as ExampleTable
from torch import Tensor

from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.level_beams import level_beams, usage_penalties
from llm_itemtok.errors import ItemTokError
from llm_itemtok.items.assign import Candidates, assign
from llm_itemtok.items.assign import Method as AssignMethod
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.combine import concatenate, whitened
from llm_itemtok.items.requantise import LevelMixtures
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import PlainNormaliser
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.processes import added_up, dealt
from llm_itemtok.training.item_states import predicting_states, shrunk
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.updates import Moment, Proposal

ROUNDING = 1e-4
"""Nats by which a code may differ from itself, computed twice: less is no conflict."""

Source = Literal["generate", "embeddings", "both"]


@dataclass(frozen=True)
class Search:
    """How candidates are made, and who may move.

    Attributes:
        source: where likelihoods come from.
        candidates: of each item and source, at least 1.
        groups: of beams in `generate`, a divisor of `candidates`.
        diversity: see `decoding.level_beams`.
        usage_penalty: see `decoding.level_beams.usage_penalties`; 0 leaves it out.
        contexts: see `item_states.predicting_states`.
        vectors_weight: of the item vectors beside the states; 0 leaves them out.
        whiten: of states and item vectors (`items.combine.whitened`); 0 takes them as they are.
        shrinkage: see `item_states.shrunk`; only beside item vectors.
        steps: of Lloyd's algorithm on the codebooks.
        outliers: share of the items that may move, the most conflicting ones; None lets all.
        max_moves: share of all items that may move in a round at most.
        price: nats that a move must be worth.
        assignment: see `items.assign`.
        batch_size: items, or examples, looked at at a time.
        seed: of what is drawn.
    """

    source: Source = "both"
    candidates: int = 10
    groups: int = 1
    diversity: float = 0.0
    usage_penalty: float = 0.0
    contexts: int = 0
    vectors_weight: float = 0.0
    whiten: float = 0.5
    shrinkage: float = 30.0
    steps: int = 5
    outliers: float | None = 0.1
    max_moves: float = 1.0
    price: float = 0.0
    assignment: AssignMethod = "greedy"
    batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class SearchMaterial:
    """What sources read beside the model.

    Attributes:
        prompts: of the item titles, and of the placeholders of `binding`.
        text_rows: int64, items that have a title.
        table: training examples.
        collate: renders them with placeholders.
        binding: to the current item tokens.
        vectors: float32 `[N, V]`, the item vectors; None where they are not asked for.
    """

    prompts: Prompts
    text_rows: np.ndarray
    table: ExampleTable
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, Tensor]]
    binding: LateBinding
    vectors: np.ndarray | None = None


@final
class SelfImprove:
    """The `Method` of updates that asks the model."""

    def __init__(self, every: int, search: Search, material: SearchMaterial) -> None:
        """Update after every `every` optimiser steps."""
        self.every = every
        self.search = search
        self.material = material

    def due(self, step: int) -> bool:
        """Every so many steps, not before the first ones."""
        return step > 0 and step % self.every == 0

    @torch.no_grad()
    def propose(self, moment: Moment) -> Proposal:
        """Ask the sources, and deal out what suits."""
        model, search = moment.model, self.search
        model.eval()
        codes = model.vocab.codes
        found = self.candidates(model, moment.step)
        rows, conflicts = conflict(found)
        chosen = rows
        if search.outliers is not None:
            most = max(1, round(search.outliers * codes.num_items))
            chosen = rows[np.argsort(-conflicts, kind="stable")[:most]]
        assigned = assign(
            codes,
            found.of(chosen),
            method=search.assignment,
            price=search.price,
            max_moves=int(search.max_moves * codes.num_items),
        )
        before, after = np.full((2, codes.num_items), np.nan, dtype=np.float32)
        before[assigned.moved], after[assigned.moved] = assigned.before, assigned.after
        facts = {
            "collisions": assigned.collisions,
            "items_with_candidates": len(rows),
            "conflicting": float((conflicts > ROUNDING).mean()) if len(rows) else 0.0,
            "nats_a_level": float(-found.keep[rows].mean() / codes.num_levels) if len(rows) else None,
            "gain_a_move": float((assigned.after - assigned.before).mean()) if len(assigned.moved) else None,
        }
        return Proposal(assigned.table, before, after, facts)

    def candidates(self, model: ItemTokenModel, step: int) -> Candidates:
        """Candidates of all items that a source knows, with log-likelihoods; the same on every process.

        Args:
            model: in evaluation mode.
            step: of the training; a draw depends on it.
        """
        codes, search = model.vocab.codes, self.search
        learnt = None if search.source == "generate" else _Embeddings.learnt(model, self.material, search, step)
        written = None if search.source == "embeddings" else _Generate(model, self.material, search)
        sources = [source for source in (learnt, written) if source is not None]
        shape = (codes.num_items, search.candidates * len(sources))
        offered, values = np.zeros((*shape, codes.num_levels), dtype=np.int32), np.zeros(shape, dtype=np.float32)
        keep = np.zeros(codes.num_items, dtype=np.float32)
        known = np.flatnonzero(np.any([source.knows for source in sources], axis=0))
        for rows in dealt(self._in_order(known), search.batch_size):
            offered[rows], values[rows], keep[rows] = _of_batch(learnt, written, codes, rows, search.candidates)
        offered, values, keep = (added_up(each, model.device) for each in (offered, values, keep))
        fine = np.isfinite(values) & np.isfinite(keep)[:, None]
        items, places = np.nonzero(fine[known])
        items = known[items]
        return Candidates(items, offered[items, places], values[items, places], keep)

    def _in_order(self, rows: np.ndarray) -> np.ndarray:
        """Items of like titles together, so that little is padded."""
        if self.search.source == "embeddings":
            return rows
        lengths = [len(self.material.prompts.title_to_item(row)[0]) for row in rows.tolist()]
        return rows[np.argsort(lengths, kind="stable")]


def conflict(candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """How much more likely each item's best candidate is than the code it has.

    Returns:
        Rows of the items with candidates, int64 ascending, and nats float32 beside them; below 0 where the code that an
        item has is the best one known.
    """
    best = np.full(len(candidates.keep), -np.inf, dtype=np.float32)
    np.maximum.at(best, candidates.items, candidates.log_likelihoods)
    rows = np.unique(candidates.items)
    return rows, best[rows] - candidates.keep[rows]


def _of_batch(
    learnt: "_Embeddings | None", written: "_Generate | None", codes: ItemCodes, rows: np.ndarray, each: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates of some items: codes `[n, C, L]`, log-likelihoods `[n, C]`, and of their present codes `[n]`.

    With two sources, the second scores what the first offers in the same look at the titles, and the first what the
    second offers. Where one does not know an item, the other speaks alone.
    """
    offered, values = codes.table[rows][:, None], np.zeros((len(rows), 1), dtype=np.float32)
    for source in (learnt, written):
        if source is None:
            continue
        known = source.knows[rows]
        found = np.zeros((len(rows), each, codes.num_levels), dtype=np.int32)
        scores = np.full((len(rows), each), -np.inf, dtype=np.float32)
        if known.any():
            found[known], scores[known], of_others = source.offer(rows[known], offered[known])
            values[known] += of_others
        if source is written and learnt is not None:
            both = known & learnt.knows[rows]
            scores[both] += learnt.score(rows[both], found[both])
        offered, values = np.concatenate([offered, found], axis=1), np.concatenate([values, scores], axis=1)
    return offered[:, 1:], values[:, 1:], values[:, 0]


class _Embeddings:
    """Codes by what the model has learnt from histories."""

    def __init__(self, vectors: np.ndarray, knows: np.ndarray, mixtures: LevelMixtures, each: int) -> None:
        self.knows = knows
        self._vectors, self._mixtures, self._each = vectors, mixtures, each

    @classmethod
    def learnt(cls, model: ItemTokenModel, material: SearchMaterial, search: Search, step: int) -> "_Embeddings":
        states, counts = predicting_states(
            model,
            material.table,
            material.collate,
            material.binding,
            contexts=search.contexts,
            batch_size=search.batch_size,
            seed=search.seed + step,
        )
        parts, weights = [states], [1.0]
        if search.vectors_weight > 0:
            assert material.vectors is not None
            parts, weights = [states, material.vectors], [1.0, search.vectors_weight]
        if search.whiten > 0:
            parts = [whitened(part, search.whiten) for part in parts]
        if search.vectors_weight > 0:
            parts[0] = shrunk(parts[0], counts, search.shrinkage)
        vectors, known = concatenate(parts, weights), counts > 0
        mixtures = LevelMixtures.follow(vectors, model.vocab.codes, np.flatnonzero(known), steps=search.steps)
        return cls(vectors, known, mixtures, search.candidates)

    def offer(self, rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes `[n, B, L]` for items, their log-likelihoods `[n, B]`, and those of given codes `[n, F, L]`."""
        return *self._mixtures.candidates(self._vectors[rows], self._each), self.score(rows, others)

    def score(self, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Log-likelihoods `[n, F]` of given codes."""
        return self._mixtures.score(self._vectors[rows], codes)


class _Generate:
    """Codes that the model writes when it reads titles."""

    def __init__(self, model: ItemTokenModel, material: SearchMaterial, search: Search) -> None:
        if model.normaliser == "children":
            raise ItemTokError("codes that no item has cannot be told by a model of the normaliser `children`")
        self._normaliser: PlainNormaliser = model.normaliser
        self.knows = np.zeros(model.vocab.codes.num_items, dtype=bool)
        self.knows[material.text_rows] = True
        self._model, self._prompts, self._search = model, material.prompts, search
        self._decoder = decoder_for(model)
        self._penalties = None
        if search.usage_penalty > 0:
            self._penalties = usage_penalties(model.vocab.codes, search.usage_penalty, model.device)

    def offer(self, rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes `[n, B, L]` for items, their log-likelihoods `[n, B]`, and those of given codes `[n, F, L]`."""
        search, each = self._search, self._search.candidates
        found = level_beams(
            self._decoder,
            [self._prompts.title_to_item(row)[0] for row in rows.tolist()],
            levels=self._model.vocab.num_levels,
            beam=each,
            normaliser=self._normaliser,
            groups=search.groups,
            diversity=search.diversity,
            penalties=self._penalties,
            scored=others,
        )
        missing = each - found.codes.shape[1]
        codes = np.pad(found.codes, ((0, 0), (0, missing), (0, 0)))
        return codes, np.pad(found.log_probs, ((0, 0), (0, missing)), constant_values=-np.inf), found.scored


@final
class RandomMoves:
    """The control: as many moves, to codes drawn at random, whatever the model has learnt.

    What self-improvement does better than this, it does by where items go, not by moving them.
    """

    def __init__(self, every: int, share: float, *, seed: int = 0) -> None:
        """Move a share of the items after every `every` optimiser steps."""
        self.every, self.share, self.seed = every, share, seed

    def due(self, step: int) -> bool:
        """Every so many steps, not before the first ones."""
        return step > 0 and step % self.every == 0

    def propose(self, moment: Moment) -> Proposal:
        """Draw items, and a few codes for each, of which it takes the first free one."""
        codes = moment.model.vocab.codes
        rng = np.random.default_rng([self.seed, moment.step])
        rows = np.sort(rng.choice(codes.num_items, size=max(1, round(self.share * codes.num_items)), replace=False))
        items = np.repeat(rows, 10)
        drawn = rng.integers(0, codes.sizes, size=(len(items), codes.num_levels), dtype=np.int32)
        unknown = np.full(codes.num_items, np.nan, dtype=np.float32)
        offers = Candidates(items, drawn, np.zeros(len(items), "f4"), np.full(codes.num_items, -1, dtype=np.float32))
        assigned = assign(codes, offers, max_moves=len(rows))
        return Proposal(assigned.table, unknown, unknown, {"collisions": assigned.collisions})

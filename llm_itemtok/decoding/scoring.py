"""Exact log-probabilities of given items, a few or the whole catalogue, with the work they have in common done once.

A history is read once. Behind it goes the prefix tree of the items (`blocks.py`): every distinct beginning of a code is
one position that sees the history and its own ancestors, and its state gives the log-probabilities of all that may
follow. The tree is cut into blocks about as wide as the history is long: narrower ones would repeat the history more
often than it costs to attend to it, wider ones attend mostly to strangers, since attention is quadratic in a block. A
forward pass takes as many (history, block) rows as fit. Nothing of a pass is kept but scores. Models whose attention
takes no such masks run each item's whole path.

The tests measure beam search against this, and this against each item's path by itself.

Shape letters: U users of a group, R rows of a pass, Q slots of a block, S prompt positions, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_itemtok.decoding.blocks import Blocks, cut, join
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.recursive import RecursiveDecoder
from llm_itemtok.decoding.tree import TreeDecoder, TreeState
from llm_itemtok.errors import DataError, ItemTokError
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import Normaliser, PlainNormaliser
from llm_itemtok.vocab.trie import ItemTrie

NODES_PER_PASS = 1024
"""Positions of a forward pass. Measured on one CPU thread (4 layers x 256 wide, 80 history tokens)."""

NARROWEST = 64
"""Slots of a block behind a history that is shorter than this."""

LOGITS_AT_ONCE = 1 << 24
"""Logits that a head makes at a time: 64 MB as float32."""


@torch.inference_mode()
def score_items(
    model: ItemTokenModel,
    trie: ItemTrie,
    prompts: Sequence[np.ndarray],
    items: Sequence[np.ndarray],
    *,
    normaliser: Normaliser = "level",
    nodes_per_pass: int = NODES_PER_PASS,
) -> list[np.ndarray]:
    """Score items after each prompt.

    Args:
        model: in evaluation mode.
        trie: of the model's current codes, on the model's device; read for the normaliser `children` only, which
            counts the children of the whole catalogue.
        prompts: B arrays of token ids.
        items: B arrays of catalogue rows, of any lengths; an item may come more than once.
        normaliser: as in `beam_search`.
        nodes_per_pass: positions fed at a time, at least 1. Memory beside the model and the scores is that of this many
            positions (or of one prompt, or of one path, if that is longer) with a level's log-probabilities for each,
            of the keys and values of about as many more, and of `LOGITS_AT_ONCE` logits: however many users, items and
            text tokens there are, but the more the wider a level is.

    Returns:
        B float32 arrays of log-probabilities, beside `items`.

    Raises:
        DataError: if there are not as many lists as prompts, or a row is not in the catalogue.
    """
    if len(items) != len(prompts):
        raise DataError(f"there must be one list of items per prompt, {len(prompts)}, was: {len(items)}")
    for rows in items:
        if len(rows) and not 0 <= np.min(rows) <= np.max(rows) < trie.num_items:
            raise DataError(f"items must be rows in [0, {trie.num_items}), was: {np.min(rows)} to {np.max(rows)}")
    distinct = [np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True) for rows in items]
    scores = [np.empty(len(rows), dtype=np.float32) for rows, _ in distinct]
    _Scoring(model, trie, normaliser, nodes_per_pass).fill(prompts, [rows for rows, _ in distinct], scores)
    return [found[inverse] for found, (_, inverse) in zip(scores, distinct, strict=True)]


@torch.inference_mode()
def score_catalog(
    model: ItemTokenModel,
    trie: ItemTrie,
    prompts: Sequence[np.ndarray],
    *,
    normaliser: Normaliser = "level",
    nodes_per_pass: int = NODES_PER_PASS,
) -> np.ndarray:
    """Score every item after each prompt; as `score_items` with all items for each.

    Returns:
        float32 `[B, num_items]`, by catalogue row: 4 bytes a user and item.
    """
    scores = np.empty((len(prompts), trie.num_items), dtype=np.float32)
    everything = np.arange(trie.num_items)
    _Scoring(model, trie, normaliser, nodes_per_pass).fill(prompts, [everything] * len(prompts), list(scores))
    return scores


@dataclass(frozen=True)
class _Scoring:
    """What does not change between passes."""

    model: ItemTokenModel
    trie: ItemTrie
    normaliser: Normaliser
    nodes_per_pass: int

    def fill(self, prompts: Sequence[np.ndarray], items: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> None:
        """Write the scores of each user's distinct items into `scores`; users that share an array share its tree."""
        decoder = decoder_for(self.model)
        if isinstance(decoder, RecursiveDecoder):
            self._fill_recursive(decoder, prompts, items, scores)
            return
        if not isinstance(decoder, TreeDecoder):
            for prompt, rows, out in zip(prompts, items, scores, strict=True):
                self._fill_alone(prompt, rows, out)
            return
        asked = [user for user, rows in enumerate(items) if len(rows)]
        for group in _groups([len(prompt) for prompt in prompts], asked, self.nodes_per_pass):
            state = decoder.encode([prompts[user] for user in group])
            self._fill_group(decoder, state, [items[user] for user in group], [scores[user] for user in group])

    def _fill_recursive(
        self,
        decoder: RecursiveDecoder,
        prompts: Sequence[np.ndarray],
        items: Sequence[np.ndarray],
        scores: Sequence[np.ndarray],
    ) -> None:
        """Score by a recursive network, which needs nothing of a history but its last state."""
        if self.normaliser not in ("level", "children"):
            raise ItemTokError(f"a recursive model is normalised over `level` or `children`, was: {self.normaliser}")
        trie = self.trie if self.normaliser == "children" else None
        asked = [user for user, rows in enumerate(items) if len(rows)]
        for group in _groups([len(prompt) for prompt in prompts], asked, self.nodes_per_pass):
            states = decoder.encode([prompts[user] for user in group]).last
            for user, state in zip(group, states, strict=True):
                scores[user][:] = decoder.score(state, items[user], trie).cpu().numpy()

    def _fill_group(
        self, decoder: TreeDecoder, state: TreeState, items: Sequence[np.ndarray], scores: Sequence[np.ndarray]
    ) -> None:
        """Score the items of U users whose histories have been read."""
        first = self._log_probs(state.last, None, 0)
        table = self.model.vocab.codes.table
        if table.shape[1] == 1:
            for known, rows, out in zip(first.cpu().numpy(), items, scores, strict=True):
                out[:] = known[table[rows, 0]]
            return
        width = max(table.shape[1] - 1, min(self.nodes_per_pass, max(NARROWEST, int(state.lengths.max()))))
        lengths = self.model.vocab.lengths
        trees = {
            key: cut(table[rows], width, None if lengths is None else lengths[rows])
            for key, rows in {id(rows): rows for rows in items}.items()
        }
        starts = dict(zip(trees, np.cumsum([0, *map(len, trees.values())]), strict=False))
        blocks = join(list(trees.values()))
        users = np.repeat(np.arange(len(items)), [len(trees[id(rows)]) for rows in items])
        numbers = np.concatenate([starts[id(rows)] + np.arange(len(trees[id(rows)])) for rows in items])
        size = max(1, self.nodes_per_pass // blocks.codes.shape[1])
        for at in range(0, len(users), size):
            part = blocks.take(numbers[at : at + size])
            found = self._score_pass(decoder, state, first, users[at : at + size], part).cpu().numpy()
            ends = part.leaf_starts[1:-1]
            for user, leaves, values in zip(
                users[at : at + size], np.split(part.leaf_items, ends), np.split(found, ends), strict=True
            ):
                scores[user][leaves] = values

    def _score_pass(
        self, decoder: TreeDecoder, state: TreeState, first: Tensor, users: np.ndarray, blocks: Blocks
    ) -> Tensor:
        """Scores of the leaves of R blocks, each behind the history of its user.

        Args:
            decoder: of the model.
            state: of U users.
            first: `[U, sizes[0]]`, log-probabilities of the first level.
            users: int64 `[R]`, in `[0, U)`.
            blocks: R of them.
        """
        num_rows, width = blocks.codes.shape
        offsets = np.arange(num_rows) * width
        codes, depths = blocks.codes.reshape(-1), blocks.depths.reshape(-1)
        parents = (blocks.parents + offsets[:, None]).reshape(-1)
        leaf_parents = blocks.leaf_slots + np.repeat(offsets, np.diff(blocks.leaf_starts))
        states = self._states(decoder, decoder.rows(state, self._tensor(users)), blocks)
        nodes = self._trie_nodes(codes, depths, parents) if self.normaliser == "children" else None
        tops = np.flatnonzero(depths == 1)
        scores = torch.zeros(num_rows * width, device=states.device)
        scores[self._tensor(tops)] = first[self._tensor(users[tops // width]), self._tensor(codes[tops])]
        found, leaf_depths = torch.zeros(len(leaf_parents), device=states.device), depths[leaf_parents]
        for level in range(1, self.model.vocab.num_levels):
            holders = np.flatnonzero(depths == level)
            at = self._tensor(holders)
            log_probs = self._log_probs(states[at], None if nodes is None else nodes[at], level)
            takers, leaves = np.flatnonzero(depths == level + 1), np.flatnonzero(leaf_depths == level)
            heads = np.concatenate([parents[takers], leaf_parents[leaves]])
            next_codes = np.concatenate([codes[takers], blocks.leaf_codes[leaves]])
            steps = log_probs[self._tensor(np.searchsorted(holders, heads)), self._tensor(next_codes)]
            reached = scores[self._tensor(heads)] + steps
            scores[self._tensor(takers)] = reached[: len(takers)]
            found[self._tensor(leaves)] = reached[len(takers) :]
        return found

    def _states(self, decoder: TreeDecoder, state: TreeState, blocks: Blocks) -> Tensor:
        """The model's states `[R * Q, D]` at the slots of R blocks, each behind what its row has read."""
        codes, depths, parents = (self._tensor(each) for each in (blocks.codes, blocks.depths, blocks.parents))
        levels = (depths - 1).clamp(min=0)
        ancestors = parents.new_zeros(*parents.shape, parents.shape[1], dtype=torch.bool)
        slots = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
        for _ in range(self.model.vocab.num_levels - 1):
            ancestors.scatter_(2, slots.unsqueeze(-1), True)
            slots = parents.gather(1, slots)
        history = state.visible.unsqueeze(1).expand(-1, parents.shape[1], -1)
        position_ids = state.lengths.unsqueeze(1) + levels
        hidden = decoder.feed(
            state,
            self.model.vocab.token_ids(codes, levels),
            torch.cat([history, ancestors], dim=2),
            position_ids,
            torch.cat([state.places, position_ids], dim=1),
        )
        return hidden.flatten(0, 1)

    def _fill_alone(self, prompt: np.ndarray, items: np.ndarray, scores: np.ndarray) -> None:
        """Score one user's items by their whole paths: for models that take no tree masks."""
        history = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        size = max(1, self.nodes_per_pass // (len(prompt) + self.model.vocab.num_levels - 1))
        for start in range(0, len(items), size):
            rows = items[start : start + size]
            paths = self.model.vocab.paths[torch.from_numpy(rows)]
            codes = self._tensor(self.model.vocab.codes.table[rows].astype(np.int64))
            input_ids = torch.cat([history.expand(len(rows), -1), paths[:, :-1]], dim=1).to(self.model.device)
            hidden = self.model.hidden(input_ids, use_cache=False).last_hidden_state[:, len(prompt) - 1 :]
            nodes = torch.zeros(len(rows), dtype=torch.long, device=hidden.device)
            total = torch.zeros(len(rows), device=hidden.device)
            for level in range(self.model.vocab.num_levels):
                own = codes[:, level]
                total += self._log_probs(hidden[:, level], nodes, level).gather(1, own.unsqueeze(1)).squeeze(1)
                if self.normaliser == "children":
                    nodes = _child(self.trie, nodes, level, own)
            scores[start : start + size] = total.cpu().numpy()

    def _log_probs(self, states: Tensor, nodes: Tensor | None, level: int) -> Tensor:
        """Log-probabilities `[n, sizes[level]]` after states `[n, D]` at trie nodes `[n]` (None: all at the root)."""
        normaliser: PlainNormaliser = "level" if self.normaliser == "children" else self.normaliser
        width = len(self.model.rows) or self.model.vocab.codes.sizes[level]
        width += self.model.config.vocab_size if normaliser == "vocab" else 0
        pieces = states.split(max(1, LOGITS_AT_ONCE // width))
        log_probs = torch.cat([self.model.level_log_probs(piece, level, normaliser) for piece in pieces])
        if self.normaliser != "children":
            return log_probs
        nodes = torch.zeros(len(states), dtype=torch.long, device=states.device) if nodes is None else nodes
        _, codes, legal = self.trie.children(nodes, level)
        return log_probs - log_probs.gather(1, codes).masked_fill(~legal, -torch.inf).logsumexp(1, keepdim=True)

    def _trie_nodes(self, codes: np.ndarray, depths: np.ndarray, parents: np.ndarray) -> Tensor:
        """The trie's node id of each slot `[R * Q]`; 0 where a slot holds none."""
        nodes = torch.zeros(len(codes), dtype=torch.long, device=self.model.device)
        for level in range(self.model.vocab.num_levels - 1):
            slots = np.flatnonzero(depths == level + 1)
            above = torch.zeros_like(nodes[: len(slots)]) if level == 0 else nodes[self._tensor(parents[slots])]
            nodes[self._tensor(slots)] = _child(self.trie, above, level, self._tensor(codes[slots]))
        return nodes

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)


def _groups(lengths: Sequence[int], users: Sequence[int], positions: int) -> Iterator[list[int]]:
    """Users in groups whose prompts, padded to one length, fill `positions` at most (or one user); short ones first."""
    group: list[int] = []
    for user in sorted(users, key=lambda user: lengths[user]):
        if group and (len(group) + 1) * lengths[user] > positions:
            yield group
            group = []
        group.append(user)
    if group:
        yield group


def _child(trie: ItemTrie, nodes: Tensor, level: int, codes: Tensor) -> Tensor:
    """The children of nodes `[n]` at depth `level` that codewords `[n]` lead to."""
    children, child_codes, legal = trie.children(nodes, level)
    return children.gather(1, trie.place_of(child_codes, legal, codes)).squeeze(1)

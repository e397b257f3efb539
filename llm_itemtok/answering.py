"""What answers histories of item ids, whatever stands behind it: ids to rows, lists of what may come out, replies.

A trained model is one such thing (`Recommender`), several that answer as one are another (`Ensemble`). Either says how
it searches, scores and ranks rows of the catalogue; the rest is here.
"""

import abc
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from llm_itemtok.bundle import Generation
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.splits import Cases
from llm_itemtok.decoding.beams import Beams
from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.evaluation.full_ranking import Ranking, best_lists
from llm_itemtok.evaluation.metrics import ranks_from_lists
from llm_itemtok.printable import one_line


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        rank: 1 for the best.
        item_id: as in the catalogue.
        title: empty when the catalogue has none.
        score: natural logarithm of the item's probability under the decoding normaliser; a mean of several such
            logarithms where more than one model answers.
    """

    rank: int
    item_id: str
    title: str
    score: float


class Answering(abc.ABC):
    """Answers for histories of item ids.

    Attributes:
        item_ids: of the catalogue, by row.
        titles: of the catalogue, by row; empty strings where there is none.
    """

    def __init__(self, item_ids: Sequence[str], titles: Sequence[str]) -> None:
        """Answer by the items of a catalogue, and their titles."""
        self.item_ids = tuple(item_ids)
        self.titles = tuple(titles)
        self._rows = {item_id: row for row, item_id in enumerate(self.item_ids)}

    @property
    @abc.abstractmethod
    def generations(self) -> tuple[Generation, ...]:
        """How each of the models decodes, at least one; they agree on `mask_seen`."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where it answers."""

    @property
    def beam(self) -> int:
        """Beams kept, and so the length of a list, unless a request is for more items."""
        return max(generation.beam for generation in self.generations)

    @property
    def mask_seen(self) -> bool:
        """As in `Generation`."""
        return self.generations[0].mask_seen

    @property
    def repeats(self) -> bool:
        """As in `Generation`, of the first model."""
        return self.generations[0].repeats

    @abc.abstractmethod
    def search(
        self,
        histories: Sequence[np.ndarray],
        beam: int,
        *,
        allowed: Sequence[np.ndarray | None] | None = None,
        excluded: Sequence[np.ndarray | None] | None = None,
    ) -> Beams:
        """Find the most probable items.

        Args:
            histories: B arrays of catalogue rows, int64, oldest first, of any lengths.
            beam: beams kept.
            allowed: one array of catalogue rows a history, or None where all may come out.
            excluded: one array of catalogue rows a history that must not come out, or None.
        """

    @abc.abstractmethod
    def score_rows(self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Score given items.

        Args:
            histories: as in `search`.
            items: B arrays of catalogue rows.

        Returns:
            B float32 arrays of log-probabilities, beside `items`.
        """

    @property
    @abc.abstractmethod
    def decoder(self) -> str:
        """How beams are decoded, as `Ranking` says it."""

    def rank(self, cases: Cases, *, batch_size: int, progress: Callable[[int, int], None] | None = None) -> Ranking:
        """Rank the whole catalogue for every case; see `evaluation.full_ranking.rank_cases`."""
        width = min(self.beam, len(self.item_ids))
        items, scores = best_lists(
            lambda histories, excluded: self.search(histories, width, excluded=excluded),
            cases,
            width=width,
            mask_seen=self.mask_seen,
            repeats=self.repeats,
            batch_size=batch_size,
            device=self.device,
            progress=progress,
        )
        return Ranking(items, scores, ranks_from_lists(items, scores, cases.targets), None, self.decoder)

    def known(self, history: Iterable[str]) -> tuple[list[int], list[str]]:
        """Split a list of ids, such as a history, into rows of known items, in order, and unknown ids.

        Raises:
            DataError: if it is a text, whose letters would be read as ids.
        """
        ids = item_id_list(history)
        return [self._rows[i] for i in ids if i in self._rows], [i for i in ids if i not in self._rows]

    def recommend(
        self, history: Iterable[str], k: int = 10, *, allow: Iterable[str] | None = None, deny: Iterable[str] = ()
    ) -> list[Recommendation]:
        """Recommend for one history.

        Args:
            history: item ids, oldest first. Unknown ids, here and in the lists below, are skipped, with one warning; an
                empty history gives the unconditional answer.
            k: how many items, at least 1; fewer come out only if no more may.
            allow: the items that may come out, such as those in stock. All may when None; none when the list is empty
                or no id of it is known.
            deny: items that must not come out, whatever `allow` says.

        Returns:
            Items, best first, each once.
        """
        history, deny = item_id_list(history), item_id_list(deny)
        allow = None if allow is None else item_id_list(allow)
        self._warn_of_unknown({"the history": history, "`allow`": allow or [], "`deny`": deny})
        return self.recommend_batch([history], k, allow=[allow], deny=[deny])[0]

    def recommend_batch(
        self,
        histories: Sequence[Iterable[str]],
        k: int = 10,
        *,
        allow: Sequence[Iterable[str] | None] | None = None,
        deny: Sequence[Iterable[str] | None] | None = None,
    ) -> list[list[Recommendation]]:
        """Recommend for many histories at once; see `recommend`. Unknown ids are skipped; `known` tells which.

        Args:
            histories: of B requests.
            k: items for each.
            allow: one list per request, or None where all items may come out. A list given to many requests is best
                the same object, which is then read once.
            deny: one list per request, or None.

        Raises:
            DataError: if `k` is no whole number of at least 1, a history is no list, or there are not as many lists as
                histories.
        """
        if not isinstance(k, int | np.integer) or k < 1:
            raise DataError(f"the number of recommendations must be a whole number of at least 1, was: {k!r}")
        rows = [np.asarray(self.known(history)[0], dtype=np.int64) for history in histories]
        allowed, excluded = self._listed("allow", allow, len(rows)), self._listed("deny", deny, len(rows))
        if not rows:
            return []
        if self.generations[0].leaves_out_seen:
            excluded = [
                seen if denied is None else np.concatenate([seen, denied])
                for seen, denied in zip(rows, excluded, strict=True)
            ]
        beams = self.search(rows, max(k, self.beam), allowed=allowed, excluded=excluded)
        return [
            [
                Recommendation(rank, self.item_ids[item], self.titles[item], float(score))
                for rank, (item, score) in enumerate(zip(items[:k].tolist(), scores[:k], strict=True), start=1)
                if item >= 0
            ]
            for items, scores in zip(beams.items, beams.scores, strict=True)
        ]

    def _warn_of_unknown(self, lists: dict[str, list[str]]) -> None:
        """Warn once of the unknown ids of named lists."""
        told = [
            f"{len(unknown)} of {len(ids)} items of {name} are not in the catalogue and were skipped: "
            f"{', '.join(unknown[:3])}"
            for name, ids in lists.items()
            if (unknown := self.known(ids)[1])
        ]
        if told:
            warnings.warn("; ".join(told), stacklevel=3)

    def _listed(
        self, name: str, lists: Sequence[Iterable[str] | None] | None, requests: int
    ) -> list[np.ndarray | None]:
        """Rows of the known items of each request's list; one array for a list that is there more than once."""
        if lists is None:
            return [None] * requests
        if len(lists) != requests:
            raise DataError(f"`{name}` must have one list per history, {requests}, was: {len(lists)}")
        distinct = {id(ids): ids for ids in lists if ids is not None}
        rows = {key: np.asarray(self.known(ids)[0], dtype=np.int64) for key, ids in distinct.items()}
        return [None if ids is None else rows[id(ids)] for ids in lists]

    def score(self, history: Iterable[str], items: Iterable[str]) -> list[float]:
        """Score given items for re-ranking.

        Args:
            history: as in `recommend`.
            items: item ids of the catalogue, a few or all of it; what they have in common is computed once.

        Returns:
            Natural logarithms of the items' probabilities, in the order given.

        Raises:
            DataError: if an item is not in the catalogue.
        """
        rows, unknown = self.known(items)
        if unknown:
            raise DataError(f"items to score must be in the catalogue, {len(unknown)} are not: {unknown[:3]}")
        history_rows = np.asarray(self.known(history)[0], dtype=np.int64)
        scores = self.score_rows([history_rows], [np.asarray(rows, dtype=np.int64)])
        return cast(list[float], scores[0].tolist())

    def check_catalog(self, catalog: Catalog) -> None:
        """Raise `ArtifactError` unless this is the catalogue that it was trained on, item by item."""
        theirs = tuple(catalog.item_ids)
        if theirs != self.item_ids and set(theirs) == set(self.item_ids):
            row = next(at for at, pair in enumerate(zip(theirs, self.item_ids, strict=True)) if pair[0] != pair[1])
            raise ArtifactError(
                "the data must have the items in the order that the model was trained on, but it is another: from item "
                f"{row + 1:,} on, {one_line(theirs[row])} stands where {one_line(self.item_ids[row])} was; sort the "
                "items file so"
            )
        if len(theirs) and theirs == self.item_ids[: len(theirs)] != self.item_ids:
            raise ArtifactError(
                f"the data must have the model's {len(self.item_ids):,} items, but they lack the last "
                f"{len(self.item_ids) - len(theirs):,}; where `itemtok extend` gave it these, name a data folder that "
                "has them behind the others, else the data are those of another catalogue"
            )
        if theirs != self.item_ids:
            raise ArtifactError(
                "the data must have the catalogue that the model was trained on, but their items differ: "
                f"{len(self.item_ids)} in the model, {len(catalog)} in the data, "
                f"{len(set(self.item_ids) & set(catalog.item_ids))} in both"
            )


def best_scored(candidates: Sequence[np.ndarray], scores: Sequence[np.ndarray], width: int) -> Beams:
    """The best of some items.

    Args:
        candidates: B arrays of catalogue rows, int64, ascending, each once; of equal scores the lower row comes first.
        scores: B float arrays beside them.
        width: length of the lists.

    Returns:
        Lists, best first; where there are fewer items than `width`, -1 with a score of -inf.
    """
    items = np.full((len(candidates), width), -1, dtype=np.int64)
    values = np.full((len(candidates), width), -np.inf, dtype=np.float32)
    for place, (rows, found) in enumerate(zip(candidates, scores, strict=True)):
        best = np.argsort(-found, kind="stable")[:width]
        items[place, : len(best)], values[place, : len(best)] = rows[best], found[best]
    return Beams(items, values)


def item_id_list(given: Iterable[str]) -> list[str]:
    """Item ids as texts; a text itself is refused, because it would be taken for a list of letters.

    Raises:
        DataError: if `given` is a text, or no list of any kind.
    """
    if isinstance(given, str):
        raise DataError(f"a history, `allow` or `deny` must be a list of item ids, was: the text {given[:40]!r}")
    if not isinstance(given, Iterable):
        raise DataError(f"a history, `allow` or `deny` must be a list of item ids, was: {given!r}")
    return [str(item_id) for item_id in given]

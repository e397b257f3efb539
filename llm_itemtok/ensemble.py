"""Several trained models that answer as one.

Each member looks for its own best items. Whatever one of them found is scored by all of them, exactly, and the mean of
the log-probabilities decides (a logarithmic opinion pool, doi:10.1214/ss/1177013825). Members may have item codes,
backbones and ways of scoring of their own; what they share is the catalogue. They are no bundle: their folders are.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llm_itemtok.answering import Answering, best_scored
from llm_itemtok.bundle import Generation
from llm_itemtok.decoding.beams import Beams
from llm_itemtok.errors import ArtifactError
from llm_itemtok.recommender import Recommender


class Ensemble(Answering):
    """Answers for histories of item ids, by several models together.

    Scores are means of log-probabilities. Their exponentials do not add up to 1, and are comparable within one answer.

    Attributes:
        members: the models, at least two.
    """

    def __init__(self, members: Sequence[Recommender]) -> None:
        """Let models answer together; where `repeats` was chosen for each, the first one's choice holds for all.

        Raises:
            ArtifactError: if there are fewer than two, or they have different catalogues, or only some leave out the
                items of a history.
        """
        self.members = tuple(members)
        if len(self.members) < 2:
            raise ArtifactError(f"an ensemble must have at least 2 models, was: {len(self.members)}")
        first = self.members[0]
        for number, member in enumerate(self.members[1:], start=2):
            if member.item_ids != first.item_ids:
                raise ArtifactError(
                    "models that answer together must have the same items in the same order, but those of model 1 and "
                    f"model {number} differ: {len(first.item_ids)} and {len(member.item_ids)} items, "
                    f"{len(set(first.item_ids) & set(member.item_ids))} in both"
                )
            if member.mask_seen != first.mask_seen:
                raise ArtifactError(
                    "models that answer together must agree on whether items of a history may come out "
                    f"(`mask_seen`), but model 1 has {first.mask_seen} and model {number} has {member.mask_seen}"
                )
        super().__init__(first.item_ids, first.titles)

    @property
    def generations(self) -> tuple[Generation, ...]:
        """Of the members, in their order."""
        return tuple(member.generation for member in self.members)

    @property
    def device(self) -> torch.device:
        """Of the first member."""
        return self.members[0].device

    @property
    def decoder(self) -> str:
        """Each way of the members once, joined by `+`."""
        return "+".join(sorted({member.decoder for member in self.members}))

    def search(
        self,
        histories: Sequence[np.ndarray],
        beam: int,
        *,
        allowed: Sequence[np.ndarray | None] | None = None,
        excluded: Sequence[np.ndarray | None] | None = None,
    ) -> Beams:
        """See `Answering.search`; every member keeps `beam` beams."""
        found = [member.search(histories, beam, allowed=allowed, excluded=excluded).items for member in self.members]
        candidates = [np.unique(rows[rows >= 0]) for rows in np.concatenate(found, axis=1)]
        return best_scored(candidates, self.score_rows(histories, candidates), min(beam, len(self.item_ids)))

    def score_rows(self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Answering.score_rows`; means over the members."""
        by_member = [member.score_rows(histories, items) for member in self.members]
        return [np.stack(of_history).mean(axis=0) for of_history in zip(*by_member, strict=True)]


def load(
    paths: Sequence[str | Path], *, trust_remote_code: bool = False, device: str | torch.device | None = None
) -> Answering:
    """Load one model, or several to answer together.

    Args:
        paths: at least one; see `Recommender.from_pretrained`, also for the rest.
        trust_remote_code: for every model.
        device: of every model.

    Raises:
        ArtifactError: as `Recommender.from_pretrained` and `Ensemble` do.
    """
    models = [Recommender.from_pretrained(path, trust_remote_code=trust_remote_code, device=device) for path in paths]
    return models[0] if len(models) == 1 else Ensemble(models)

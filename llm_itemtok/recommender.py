"""`Recommender`: a trained model, its item tokens and its catalogue in one folder, and the answers it gives.

The folder (the *bundle*) holds what plain `transformers` and `peft` load without this package (a merged model, or a
PEFT adapter, with the extended tokenizer), the item codes, the items, and `generation.json`, which says how to decode.
It holds no user histories.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llm_itemtok import bundle, hub
from llm_itemtok import card as model_card
from llm_itemtok.answering import Answering, best_scored
from llm_itemtok.artifacts import ITEMS, atomic_folder, read_text, sha256_of_arrays, write_json, write_text
from llm_itemtok.bundle import CARD, GENERATION, Generation
from llm_itemtok.data.splits import Cases
from llm_itemtok.decoding.beams import Beams, beam_search
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.dense import Both, Rescorer, best_known
from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.errors import ArtifactError
from llm_itemtok.evaluation.full_ranking import Ranking, rank_cases
from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model import export, item_network
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab.trie import ItemTrie


class Recommender(Answering):
    """Answers for histories of item ids, by one model.

    Attributes:
        model: in evaluation mode.
        tokenizer: with the item tokens.
        item_ids: of the catalogue, by row.
        titles: of the catalogue, by row; empty strings where there is none.
        generation: how to decode.
        quantizer: that gave the item codes, by which new items can be given theirs; None for codes made without one.
        rescorer: the dense model that scores items, too, with the share `generation.dense_share`; None without.
    """

    def __init__(
        self,
        model: ItemTokenModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        item_ids: Sequence[str],
        titles: Sequence[str],
        generation: Generation,
        peft_model: PeftModel | None = None,
        quantizer: Quantizer | None = None,
        rescorer: Rescorer | None = None,
    ) -> None:
        """Bring the parts of a trained model together.

        Raises:
            ArtifactError: if codes, catalogue and dense model do not belong to each other.
        """
        if len(item_ids) != model.vocab.codes.num_items:
            raise ArtifactError(
                f"codes and catalogue must have the same items, found: {model.vocab.codes.num_items} codes and "
                f"{len(item_ids)} items"
            )
        if rescorer is None and generation.dense_share > 0:
            raise ArtifactError(f"a dense model has a share of {generation.dense_share:g} in the scores, found: none")
        if rescorer is not None and not _belong(rescorer, item_ids):
            raise ArtifactError(
                f"a dense model must be of the same catalogue, {len(item_ids):,} items, or of its first ones, found: "
                f"one of {rescorer.network.num_items:,} other items; were files mixed from two runs?"
            )
        assert generation.reads == model.reads
        self.model = model.eval()
        self.tokenizer = tokenizer
        super().__init__(item_ids, titles)
        self.generation = generation
        self.quantizer = quantizer
        self.rescorer = rescorer
        if rescorer is not None:
            rescorer.network.to(model.device)
        self._peft_model = peft_model
        self._prompts = Prompts.of(model, tokenizer)
        self._trie = ItemTrie(model.vocab.codes).to(model.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load a bundle from a folder or a Hub repository.

        Args:
            path: folder (a bundle, or a run folder that holds one as `model/`), or Hub id, `OWNER/NAME` or
                `OWNER/NAME@REVISION`.
            revision: branch, tag or commit of the Hub repository, unless `path` says it; its main branch when None.
            trust_remote_code: run code that comes with the base model of an adapter.
            device: where the model answers; a GPU if there is one when None.

        Raises:
            ArtifactError: if it is no bundle, a newer one, or its parts do not belong together.
        """
        folder = bundle.locate(path, revision)
        parts = bundle.read(folder)
        model, peft_model = bundle.load_model(
            folder, parts.vocab, parts.generation, trust_remote_code=trust_remote_code
        )
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            model,
            parts.tokenizer,
            item_ids=[item["id"] for item in parts.items],
            titles=[item["title"] for item in parts.items],
            generation=parts.generation,
            peft_model=peft_model,
            quantizer=parts.quantizer,
            rescorer=parts.rescorer,
        )

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Write the bundle, whole or not at all.

        Args:
            folder: where; a bundle that is there is replaced.
            card: text of the model card; one without measurements is written when None.

        Raises:
            ArtifactError: if something else is there.
        """
        bundle.refuse_others(Path(folder))
        vocab = self.model.vocab
        with atomic_folder(folder) as new:
            if self.generation.layout == "adapter":
                assert self._peft_model is not None
                assert self.generation.base is not None
                export.save_adapter(
                    self.model, self._peft_model, new, base=self.generation.base, revision=self.generation.revision
                )
            else:
                export.merged(self.model, self._peft_model).save_pretrained(new)
            item_network.save(self.model, new)
            export.save_tokenizer(self.tokenizer, new, pad_left=self.model.answer_start is None)
            vocab.codes.save(new)
            lines = [
                json.dumps({"id": item_id, "title": title, "code": vocab.spell(row)}, ensure_ascii=False)
                for row, (item_id, title) in enumerate(zip(self.item_ids, self.titles, strict=True))
            ]
            write_text(new / ITEMS, "\n".join(lines) + "\n")
            if self.quantizer is not None:
                self.quantizer.save(new)
            if self.rescorer is not None:
                self.rescorer.save(new)
            write_json(new / GENERATION, asdict(self.generation))
            write_text(new / CARD, card or self.card())
            if vocab.num_tokens > 0 and self.model.reads == "tokens":  # what else there is needs this package
                bundle.write_custom_generate(new)
        return Path(folder)

    def card(self, metrics: Mapping[str, Any] | None = None, recipe: Mapping[str, Any] | None = None) -> str:
        """Write the model card of this recommender, in the layout it would be saved in.

        Args:
            metrics: as in `metrics.json`; nothing was measured when None.
            recipe: resolved, as plain values; local paths and secrets in it are not told.
        """
        vocab, generation = self.model.vocab, self.generation
        shown = range(min(2, len(self.item_ids)))
        return model_card.card(
            model_card.Subject(
                generation=generation,
                items=len(self.item_ids),
                levels=vocab.num_levels,
                example=[self.item_ids[row] for row in shown],
                codes=[vocab.spell(row) for row in shown] if vocab.num_tokens > 0 else None,
                start=str(self.tokenizer.convert_ids_to_tokens(self._prompts.start)),
                end=str(self.tokenizer.eos_token) if self._prompts.encoded else None,
                tied=self.model.rows.output_rows is None,
                varied=vocab.lengths is not None,
                reads=self.model.reads,
            ),
            metrics,
            recipe,
        )

    def merged(self) -> "Recommender":
        """The same recommender, saved as one whole model instead of an adapter beside its base model."""
        return self.with_generation(layout="merged", base=None, revision=None, dtype="auto", quantization="none")

    def push_to_hub(
        self,
        repo: str,
        *,
        revision: str | None = None,
        private: bool = True,
        message: str = "Push a recommender",
        card: str | None = None,
        licence: str | None = None,
    ) -> hub.Pushed:
        """Save the bundle into a Hub repository, in one commit.

        Needs a token with write access, from `hf auth login` or `HF_TOKEN`.

        Args:
            repo: `OWNER/NAME`; made when missing.
            revision: branch, made when missing; the main one when None.
            private: whether a new repository is; into a public one nothing is pushed unless this is False.
            message: of the commit.
            card: text of the model card; one without measurements is written when None.
            licence: identifier such as `apache-2.0`, for the card.

        Raises:
            HubError: if it cannot be done; the repository then shows what it did before.
        """
        bundle.refuse_unshareable(self.generation)
        with tempfile.TemporaryDirectory() as place:
            folder = self.save_pretrained(Path(place) / "bundle", card=card)
            return push_folder(folder, repo, revision=revision, private=private, message=message, licence=licence)

    @property
    def generations(self) -> tuple[Generation, ...]:
        """Its own alone."""
        return (self.generation,)

    @property
    def decoder(self) -> str:
        """That of the language model."""
        return decoder_for(self.model).name

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.device

    def search(
        self,
        histories: Sequence[np.ndarray],
        beam: int,
        *,
        allowed: Sequence[np.ndarray | None] | None = None,
        excluded: Sequence[np.ndarray | None] | None = None,
    ) -> Beams:
        """See `Answering.search`."""
        if self.generation.dense_share == 0:
            return self._beams(histories, beam, allowed, excluded)
        found = self.both(histories, beam, allowed=allowed, excluded=excluded)
        return best_scored(found.items, found.mixed(self.generation.dense_share), min(beam, len(self.item_ids)))

    def both(
        self,
        histories: Sequence[np.ndarray],
        beam: int,
        *,
        allowed: Sequence[np.ndarray | None] | None = None,
        excluded: Sequence[np.ndarray | None] | None = None,
    ) -> Both:
        """What the language model and the dense one find, scored by either; for the rest see `Answering.search`."""
        assert self.rescorer is not None
        found = self._beams(histories, beam, allowed, excluded).items
        dense_BM = self.rescorer.log_probs(histories)
        others = best_known(dense_BM, beam, allowed, excluded)
        items = [np.unique(np.concatenate([rows[rows >= 0], more])) for rows, more in zip(found, others, strict=True)]
        return Both(items, self._own_scores(histories, items), dense_BM)

    def _beams(
        self,
        histories: Sequence[np.ndarray],
        beam: int,
        allowed: Sequence[np.ndarray | None] | None,
        excluded: Sequence[np.ndarray | None] | None,
    ) -> Beams:
        """What the language model finds, and its scores."""
        return beam_search(
            decoder_for(self.model),
            self._trie,
            self._read(histories),
            beam=min(beam, len(self.item_ids)),
            normaliser=self.generation.normaliser,
            allowed=allowed,
            excluded=excluded,
        )

    def score_rows(self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Answering.score_rows`."""
        own = self._own_scores(histories, items)
        if self.generation.dense_share == 0:
            return own
        assert self.rescorer is not None  # as `__init__` checks
        return Both(items, own, self.rescorer.log_probs(histories)).mixed(self.generation.dense_share)

    def _own_scores(self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of the language model."""
        return score_items(self.model, self._trie, self._read(histories), items, normaliser=self.generation.normaliser)

    def _read(self, histories: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Token ids that the model reads of each history: its most recent items."""
        return [self._prompts.history(history[-self.generation.history_length :]) for history in histories]

    def rank(self, cases: Cases, *, batch_size: int, progress: Callable[[int, int], None] | None = None) -> Ranking:
        """See `Answering.rank`."""
        if self.generation.dense_share > 0:
            return super().rank(cases, batch_size=batch_size, progress=progress)
        return rank_cases(
            self.model,
            self._trie,
            self._prompts,
            cases,
            beam=self.generation.beam,
            history_length=self.generation.history_length,
            normaliser=self.generation.normaliser,
            mask_seen=self.generation.mask_seen,
            repeats=self.generation.repeats,
            batch_size=batch_size,
            progress=progress,
        )

    def with_generation(self, **changes: Any) -> "Recommender":
        """The same model, decoded in another way: `beam=50`, or `dense_share=0.0` for the language model alone."""
        return self._changed(replace(self.generation, **changes), self.item_ids, self.titles)

    def with_rescorer(self, rescorer: Rescorer, share: float) -> "Recommender":
        """The same model with a dense one beside it, whose share in the scores is in [0, 1]."""
        return self._changed(replace(self.generation, dense_share=share), self.item_ids, self.titles, rescorer)

    def _changed(
        self,
        generation: Generation,
        item_ids: Sequence[str],
        titles: Sequence[str],
        rescorer: Rescorer | None = None,
    ) -> "Recommender":
        """The same model under another description, and beside another dense model where one is given."""
        return Recommender(
            self.model,
            self.tokenizer,
            item_ids=item_ids,
            titles=titles,
            generation=generation,
            peft_model=self._peft_model,
            quantizer=self.quantizer,
            rescorer=rescorer or self.rescorer,
        )

    def extended(
        self, codes: ItemCodes, item_ids: Sequence[str], titles: Sequence[str], vectors: np.ndarray | None = None
    ) -> "Recommender":
        """The same model with more items, to be used from now on instead of this one: none of its weights changes.

        Args:
            codes: of the items it has, as they are, and of M more, on the same levels.
            item_ids: of the M more, none known yet.
            titles: of the M more, empty where there is none.
            vectors: float32 `[M, V]`, item vectors of the M more, for a model that reads such.

        Raises:
            ArtifactError: if an item is known already, or an old one would move.
        """
        rows, _ = self.known(item_ids)
        twice = sorted(item for item, times in Counter(item_ids).items() if times > 1)
        if rows or twice:
            found = f"{len(rows):,} of {len(item_ids):,} are known already: {[self.item_ids[row] for row in rows[:3]]}"
            raise ArtifactError(
                f"new items must be new, each once, but {found if rows else f'{twice[0]!r} is there twice'}"
            )
        old = self.model.vocab.codes
        if codes.sizes != old.sizes or not np.array_equal(codes.table[: old.num_items], old.table):
            raise ArtifactError("the codes of the items that a model has must stay as they are, but some are others")
        item_network.extend(self.model, codes, vectors)
        whole = (*self.item_ids, *item_ids)
        generation = replace(
            self.generation,
            codes_sha256=codes.sha256,
            items_sha256=bundle.items_sha256(whole),
            catalog_sha256=sha256_of_arrays(self.generation.catalog_sha256, *item_ids, *titles),
        )
        return self._changed(generation, whole, (*self.titles, *titles))


def _belong(rescorer: Rescorer, item_ids: Sequence[str]) -> bool:
    """Whether a dense model knows the first of these items, in this order."""
    known = rescorer.network.num_items
    return known <= len(item_ids) and rescorer.items_sha256 == bundle.items_sha256(item_ids[:known])


def push_folder(
    folder: Path, repo: str, *, revision: str | None, private: bool, message: str, licence: str | None
) -> hub.Pushed:
    """Push a saved bundle as it is, its card made that of the repository; see `Recommender.push_to_hub`.

    Raises:
        ArtifactError: if it is no bundle, or its parts do not belong together.
        HubError: if it cannot be pushed.
    """
    generation = bundle.read(folder).generation
    bundle.refuse_unshareable(generation)
    files: dict[str, Path | bytes] = dict(bundle.files(folder))
    if generation.layout == "merged" and generation.base is not None:  # a place of this machine, of earlier versions
        with tempfile.TemporaryDirectory() as place:
            write_json(Path(place) / GENERATION, asdict(replace(generation, base=None, revision=None)))
            files[GENERATION] = (Path(place) / GENERATION).read_bytes()
    if CARD in files:
        text = read_text(folder / CARD)
        files[CARD] = model_card.for_repo(text, repo, licence).encode()
    return hub.push(repo, files, ours=bundle.FILES, revision=revision, private=private, message=message)

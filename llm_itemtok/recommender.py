"""`Recommender`: a trained model, its item tokens and its catalogue in one folder, and the answers it gives.

The folder (the *bundle*) holds what plain `transformers` and `peft` load without this package (a merged model, or a
PEFT adapter, with the extended tokenizer), the item codes, the items, and `generation.json`, which says how to decode.
It holds no user histories.
"""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llm_itemtok.artifacts import FORMAT_VERSION, ITEMS, RECIPE, atomic_folder, read_json, write_json, write_text
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.decoding.beams import DecodeNormaliser, beam_search
from llm_itemtok.decoding.replicated import decoder_for
from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model import export
from llm_itemtok.model.item_lm import ItemTokenModel, Normaliser
from llm_itemtok.model.load import DTYPES, load_base
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.model.rows import ItemRows, input_table, output_head
from llm_itemtok.vocab.item_vocab import ItemVocab
from llm_itemtok.vocab.trie import ItemTrie

GENERATION, CARD = "generation.json", "README.md"


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        rank: 1 for the best.
        item_id: as in the catalogue.
        title: empty when the catalogue has none.
        score: natural logarithm of the item's probability under the decoding normaliser.
    """

    rank: int
    item_id: str
    title: str
    score: float


@dataclass(frozen=True)
class Generation:
    """How a bundle is decoded.

    Attributes:
        layout: `merged` (a whole model) or `adapter` (PEFT files beside a base model elsewhere).
        base: Hub id or path of the base model, for `adapter`.
        revision: of the base model.
        normaliser: over what item scores are normalised.
        training_normaliser: the one of the loss.
        beam: beams kept at every level.
        history_length: most recent items read.
        mask_seen: whether items of the history are left out.
        catalog_sha256: of the catalogue that the codes belong to.
        codes_sha256: of the codes.
        dtype: of the base model's weights, for `adapter`: `float32`, `bfloat16` or `auto`.
        protocol: how the data were split, as the recipe's `data` section says it, without places and names.
        format_version: of the bundle.
    """

    layout: str
    base: str | None
    revision: str | None
    normaliser: DecodeNormaliser
    training_normaliser: Normaliser
    beam: int
    history_length: int
    mask_seen: bool
    catalog_sha256: str
    codes_sha256: str
    dtype: str = "auto"
    protocol: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


class Recommender:
    """Answers for histories of item ids.

    Attributes:
        model: in evaluation mode.
        tokenizer: with the item tokens.
        item_ids: of the catalogue, by row.
        titles: of the catalogue, by row; empty strings where there is none.
        generation: how to decode.
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
    ) -> None:
        """Bring the parts of a trained model together.

        Raises:
            ArtifactError: if codes and catalogue do not belong to each other.
        """
        if len(item_ids) != model.vocab.codes.num_items:
            raise ArtifactError(
                f"codes and catalogue must have the same items, found: {model.vocab.codes.num_items} codes and "
                f"{len(item_ids)} items"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.item_ids = tuple(item_ids)
        self.titles = tuple(titles)
        self.generation = generation
        self._peft_model = peft_model
        self._rows = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self._prompts = Prompts(tokenizer, model.vocab)
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
            path: folder (a bundle, or a run folder that holds one as `model/`) or Hub id.
            revision: branch, tag or commit of the Hub repository.
            trust_remote_code: run code that comes with the base model of an adapter.
            device: where the model answers; a GPU if there is one when None.

        Raises:
            ArtifactError: if it is no bundle, a newer one, or its parts do not belong together.
        """
        folder = _locate(path, revision)
        generation = _read_generation(folder / GENERATION)
        codes = ItemCodes.load(folder)
        if codes.sha256 != generation.codes_sha256:
            raise ArtifactError(
                f"{folder}: item codes and generation.json must belong together, but the codes' hash is "
                f"{codes.sha256[:12]} and {generation.codes_sha256[:12]} is expected; were files mixed from two runs?"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vocab = ItemVocab.resolve(tokenizer, codes)
        items = _read_items(folder / ITEMS, vocab)
        load = _load_adapter if generation.layout == "adapter" else _load_merged
        model, peft_model = load(folder, vocab, generation, trust_remote_code)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            model,
            tokenizer,
            item_ids=[item["id"] for item in items],
            titles=[item["title"] for item in items],
            generation=generation,
            peft_model=peft_model,
        )

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Write the bundle, whole or not at all.

        Args:
            folder: where; replaced if it exists.
            card: text of the model card; a short one is written when None.
        """
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
            self.tokenizer.save_pretrained(new)
            vocab.codes.save(new)
            lines = [
                json.dumps({"id": item_id, "title": title, "code": vocab.spell(row)}, ensure_ascii=False)
                for row, (item_id, title) in enumerate(zip(self.item_ids, self.titles, strict=True))
            ]
            write_text(new / ITEMS, "\n".join(lines) + "\n")
            write_json(new / GENERATION, asdict(self.generation))
            write_text(new / CARD, card or f"# Recommender\n\n{len(self.item_ids)} items.\n")
        return Path(folder)

    def known(self, history: Iterable[str]) -> tuple[list[int], list[str]]:
        """Split a list of ids, such as a history, into rows of known items, in order, and unknown ids.

        Raises:
            DataError: if it is a text, whose letters would be read as ids.
        """
        ids = _ids(history)
        return [self._rows[i] for i in ids if i in self._rows], [i for i in ids if i not in self._rows]

    def recommend(
        self, history: Iterable[str], k: int = 10, *, allow: Iterable[str] | None = None, deny: Iterable[str] = ()
    ) -> list[Recommendation]:
        """Recommend for one history.

        Args:
            history: item ids, oldest first. Unknown ids, here and in the lists below, are skipped, with one warning; an
                empty history gives the model's unconditional answer.
            k: how many items, at least 1; fewer come out only if no more may.
            allow: the items that may come out, such as those in stock. All may when None; none when the list is empty
                or no id of it is known.
            deny: items that must not come out, whatever `allow` says.

        Returns:
            Items, best first, each once.
        """
        history, deny = _ids(history), _ids(deny)
        allow = None if allow is None else _ids(allow)
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
            DataError: if `k` is below 1, or there are not as many lists as histories.
        """
        if k < 1:
            raise DataError(f"the number of recommendations must be at least 1, was: {k}")
        rows = [self.known(history)[0] for history in histories]
        allowed, excluded = self._listed("allow", allow, len(rows)), self._listed("deny", deny, len(rows))
        if not rows:
            return []
        if self.generation.mask_seen:
            excluded = [
                np.asarray(seen if denied is None else [*seen, *denied], dtype=np.int64)
                for seen, denied in zip(rows, excluded, strict=True)
            ]
        beams = beam_search(
            decoder_for(self.model),
            self._trie,
            [self._prompts.history(history[-self.generation.history_length :]) for history in rows],
            beam=min(max(k, self.generation.beam), len(self.item_ids)),
            normaliser=self.generation.normaliser,
            allowed=allowed,
            excluded=excluded,
        )
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
        prompt = self._prompts.history(self.known(history)[0][-self.generation.history_length :])
        scores = score_items(
            self.model, self._trie, [prompt], [np.asarray(rows, dtype=np.int64)], normaliser=self.generation.normaliser
        )
        return cast(list[float], scores[0].tolist())

    def check_catalog(self, catalog: Catalog) -> None:
        """Raise `ArtifactError` unless this is the catalogue the model was trained on, item by item."""
        if tuple(catalog.item_ids) != self.item_ids:
            raise ArtifactError(
                "the data must have the catalogue that the model was trained on, but their items differ: "
                f"{len(self.item_ids)} in the model, {len(catalog)} in the data, "
                f"{len(set(self.item_ids) & set(catalog.item_ids))} in both"
            )

    def with_generation(self, **changes: Any) -> "Recommender":
        """The same model, decoded in another way, such as `beam=50`."""
        return Recommender(
            self.model,
            self.tokenizer,
            item_ids=self.item_ids,
            titles=self.titles,
            generation=replace(self.generation, **changes),
            peft_model=self._peft_model,
        )


def _ids(given: Iterable[str]) -> list[str]:
    if isinstance(given, str):
        raise DataError(f"a history, `allow` or `deny` must be a list of item ids, was: the text {given[:40]!r}")
    return [str(item_id) for item_id in given]


def _locate(path: str | Path, revision: str | None) -> Path:
    """Folder of a bundle: itself, `model/` below it, or a download."""
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / GENERATION).is_file():
            return candidate
    if (folder / RECIPE).is_file():
        raise ArtifactError(f"{folder}: this run has no model yet; its stage `train` must finish first (`itemtok run`)")
    if folder.exists() or isinstance(path, Path):
        raise ArtifactError(
            f"{folder}: a bundle must hold {GENERATION}, which is missing; "
            "name a folder that a run wrote (`runs/NAME` or `runs/NAME/model`) or a Hub id"
        )
    try:
        downloaded = Path(snapshot_download(path, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{path}: neither a folder here nor a Hub repository that can be reached\n  {str(error).splitlines()[0]}"
        ) from error
    return _locate(downloaded, None)


def _read_generation(path: Path) -> Generation:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path}: a bundle's settings must be a JSON object, was: {str(settings)[:80]}")
    if settings.get("format_version", 0) > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: bundle format {settings['format_version']} is newer than this version reads ({FORMAT_VERSION}); "
            "update llm-itemtok"
        )
    wrong = sorted({field.name for field in fields(Generation)} ^ settings.keys())
    if wrong:
        raise ArtifactError(f"{path}: a bundle's settings must be all known and all there, these are not: {wrong}")
    if settings["layout"] not in ("merged", "adapter"):
        raise ArtifactError(f"{path}: `layout` must be merged or adapter, was: {settings['layout']!r}")
    return Generation(**settings)


def _read_items(path: Path, vocab: ItemVocab) -> list[dict[str, str]]:
    """Id, title and code of each item; the codes must be those of `vocab`, row by row."""
    if not path.is_file():
        raise ArtifactError(f"{path}: a bundle must hold this file, which is missing")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{path}:{number}: not JSON: {error.msg}; was the file cut short?") from error
        if not isinstance(item, dict) or not item.keys() >= {"id", "title", "code"}:
            raise ArtifactError(f"{path}:{number}: an item must have an id, a title and a code, was: {line[:80]}")
        items.append(item)
    if [item["code"] for item in items] != [vocab.spell(row) for row in range(vocab.codes.num_items)]:
        raise ArtifactError(
            f"{path}: codes and {ITEMS} must belong together, but their codes differ; were files mixed from two runs?"
        )
    return items


def _load_merged(
    folder: Path, vocab: ItemVocab, generation: Generation, _trust_remote_code: bool
) -> tuple[ItemTokenModel, None]:
    """The whole model: its item rows are read out of its tables."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES["auto"], use_safetensors=True)
    span = slice(vocab.first_id, vocab.first_id + vocab.num_tokens)
    rows = ItemRows(
        input_table(lm).weight[span].detach(),
        first_id=vocab.first_id,
        tied=bool(lm.config.tie_word_embeddings),
    )
    if rows.output_rows is not None:
        with torch.no_grad():
            rows.output_rows.copy_(output_head(lm).weight[span])
    return ItemTokenModel(lm, rows, vocab, normaliser=generation.training_normaliser), None


def _load_adapter(
    folder: Path, vocab: ItemVocab, generation: Generation, trust_remote_code: bool
) -> tuple[ItemTokenModel, PeftModel]:
    """The base model with the adapter's LoRA inside and the item rows beside it."""
    if generation.base is None:
        raise ArtifactError(f"{folder / GENERATION}: an adapter must name its base model, was: null")
    lm, _ = load_base(
        generation.base, revision=generation.revision, dtype=generation.dtype, trust_remote_code=trust_remote_code
    )
    config, weights, input_rows, output_rows = export.load_adapter(folder)
    peft_model = get_peft_model(lm, config)
    assert isinstance(peft_model, PeftModel)
    set_peft_model_state_dict(peft_model, weights)
    rows = ItemRows(input_rows, first_id=vocab.first_id, tied=output_rows is None)
    if rows.output_rows is not None and output_rows is not None:
        with torch.no_grad():
            rows.output_rows.copy_(output_rows)
    model = ItemTokenModel(lm, rows, vocab, normaliser=generation.training_normaliser)
    return model, peft_model

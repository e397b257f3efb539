"""Item vectors as a recipe asks for them: which source, from what, and where they are kept."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_itemtok import settings
from llm_itemtok.artifacts import cache_folder, kept_folder, sha256_of_arrays, write_text
from llm_itemtok.config import RunConfig
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.splits import Split
from llm_itemtok.errors import DataError
from llm_itemtok.items import collaborative, vectors
from llm_itemtok.items.base import Progress
from llm_itemtok.items.combine import concatenate
from llm_itemtok.objective_settings import FrontTarget, TokenWeightedObjective
from llm_itemtok.pipeline.stages import RESULTS_VERSION, input_hashes, scratch_version
from llm_itemtok.update_settings import SelfImproveUpdate

Log = Callable[[str], None]
Vectors = Callable[[], np.ndarray]

GIVE_VECTORS = "make vectors of the new items as those of the old ones were made, and give them with `--vectors`"
_VECTORS = "vectors.npy"
"""In the cache, float32 `[N, D]`; beside it `key.json`, what they depend on."""
MOVING = ("sinkhorn", "reassign", "matching")
"""Collision policies that need vectors."""


def needs_vectors(config: RunConfig) -> bool:
    """Tell whether a run cannot do without item vectors."""
    if weighs_by_vectors(config) or improves_by_vectors(config) or guided_by_vectors(config):
        return True
    if isinstance(config.tokenizer, settings.TextTokenizer):
        return False
    if config.vocab.init == "codebook":
        return True
    if isinstance(config.tokenizer, settings.FileTokenizer):
        return config.tokenizer.collisions in MOVING
    return not isinstance(config.tokenizer, settings.RandomTokenizer)


def weighs_by_vectors(config: RunConfig) -> bool:
    """Tell whether weights of target tokens are made of item vectors."""
    chosen = config.objective
    return isinstance(chosen, TokenWeightedObjective) and any(
        isinstance(target, FrontTarget) and target.gains != "entropy" for target in chosen.targets
    )


def improves_by_vectors(config: RunConfig) -> bool:
    """Tell whether updates of item tokens look at item vectors."""
    chosen = config.update
    if not isinstance(chosen, SelfImproveUpdate) or chosen.source not in ("embeddings", "both"):
        return False
    return chosen.vectors_weight > 0


def guided_by_vectors(config: RunConfig) -> bool:
    """Tell whether the model reads item vectors."""
    chosen = config.scoring
    return isinstance(chosen, settings.RecursiveScoring) and chosen.guidance in ("vectors", "both")


def text_sources(config: RunConfig) -> list[str]:
    """The sources of the item vectors that need item text, as `vectors.kind: tfidf-svd`."""
    textless = settings.FileVectors | settings.CollaborativeVectors
    sources = config.vector_sources.items()
    return [f"{name}.kind: {source.kind}" for name, source in sources if not isinstance(source, textless)]


@dataclass(frozen=True)
class Sources:
    """What item vectors can be made of.

    Attributes:
        config: the recipe.
        catalog: N items.
        split: whose training part alone is looked at.
        base_model: loads the language model of the recipe and its tokenizer, when it is needed.
        progress: called with (done, in all).
    """

    config: RunConfig
    catalog: Catalog
    split: Split
    base_model: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    progress: Progress

    def make(self, log: Log) -> np.ndarray:
        """Make item vectors, float32 `[N, D]`, each source cached by its content.

        Raises:
            DataError: if a source cannot be made of what there is.
        """
        chosen = self.config.vectors
        if text_sources(self.config):
            texts = self.catalog.texts()
            without = vectors.num_without_text(texts)
            if without:
                log(f"  {without:,} of {len(texts):,} items have no text; their vectors are zero")
        plain = self.config.to_dict()["vectors"]
        if not isinstance(chosen, settings.ConcatVectors):
            return self._source("vectors", chosen, plain, log)
        parts = [
            self._source(name, source, own, log)
            for (name, source), own in zip(self.config.vector_sources.items(), plain["parts"], strict=True)
        ]
        weights = chosen.weights or (1.0,) * len(parts)
        return concatenate(parts, weights, components=chosen.components)

    def aligned(self, source: settings.CollaborativeVectors, log: Log) -> np.ndarray:
        """Make the collaborative vectors that a tokenizer aligns its codes with, float32 `[N, C]`, cached."""
        plain = self.config.to_dict()["tokenizer"]["collaborative"]
        return self._source("tokenizer.collaborative", source, plain, log)

    def of_new(self, new: Catalog, log: Log) -> np.ndarray:
        """Make vectors of items that are not in the catalogue, in the space of those that are; nothing is fitted anew.

        Args:
            new: M items.
            log: called with progress lines.

        Returns:
            float32 `[M, D]`.

        Raises:
            DataError: if the source knows the items of the catalogue only.
        """
        chosen = self.config.vectors
        without = vectors.num_without_text(new.texts())
        if text_sources(self.config) and without:
            log(f"  {without:,} of {len(new):,} new items have no text; their vectors are zero")
        if not isinstance(chosen, settings.ConcatVectors):
            if isinstance(chosen, settings.CollaborativeVectors):
                raise DataError(
                    "vectors from training sequences (`vectors.kind: collaborative`) say nothing of items that nobody "
                    f"has had yet; {GIVE_VECTORS}"
                )
            return self._new(chosen, new)
        plain = self.config.to_dict()["vectors"]["parts"]
        parts = []
        for (name, source), own in zip(self.config.vector_sources.items(), plain, strict=True):
            old = self._source(name, source, own, log)
            unknown = isinstance(source, settings.CollaborativeVectors)
            more = np.zeros((len(new), old.shape[1]), dtype=np.float32) if unknown else self._new(source, new)
            parts.append(np.concatenate([old, more]))
        weights = chosen.weights or (1.0,) * len(parts)
        size = len(self.catalog)
        return concatenate(parts, weights, components=chosen.components, measured=size)[size:]

    def _new(self, source: settings.VectorSource, new: Catalog) -> np.ndarray:
        """Vectors of new items from one source, which is not collaborative."""
        if isinstance(source, settings.FileVectors):
            if not source.path.endswith(".parquet"):
                raise DataError(
                    f"{source.path}: this file of vectors has the items of the catalogue only; {GIVE_VECTORS}"
                )
            return vectors.from_file(source.path, new)
        if isinstance(source, settings.TfidfSvdVectors):
            return vectors.tfidf_svd(
                self.catalog.texts(),
                dimensions=source.dimensions,
                max_features=source.max_features,
                seed=self.config.seed,
                others=new.texts(),
            )[len(self.catalog) :]
        assert not isinstance(source, settings.CollaborativeVectors)
        return replace(self, catalog=new)._from_text(source)[1]()

    def _source(self, name: str, source: settings.VectorSource, plain: dict[str, Any], log: Log) -> np.ndarray:
        """Vectors of one source, whose dotted setting is `name` and which the recipe describes as `plain`."""
        if isinstance(source, settings.FileVectors):
            return vectors.from_file(source.path, self.catalog)
        inputs = {
            key.replace(name, "vectors", 1): content
            for key, content in input_hashes(self.config).items()
            if key.startswith((f"{name}.", "model."))
        }
        key: dict[str, Any] = {"settings": plain, "inputs": inputs}
        if isinstance(source, settings.CollaborativeVectors):
            more, compute = self._collaborative(source)
        else:
            more, compute = self._from_text(source)
        text = json.dumps(key | more, sort_keys=True, allow_nan=False)

        def fill(new: Path) -> None:
            np.save(new / _VECTORS, compute(), allow_pickle=False)
            write_text(new / "key.json", text)

        kept = kept_folder(cache_folder() / "vectors", sha256_of_arrays(text), fill, log)
        found: np.ndarray = np.load(kept / _VECTORS, allow_pickle=False)
        if isinstance(source, settings.CollaborativeVectors):
            unknown = int((~found.any(axis=1)).sum())
            if unknown:
                log(f"  {unknown:,} of {len(found):,} items have no vector from training sequences; theirs are zero")
        return found

    def _from_text(
        self,
        source: settings.TfidfSvdVectors | settings.SentenceTransformersVectors | settings.LlmVectors,
    ) -> tuple[dict[str, Any], Vectors]:
        """What the vectors depend on beside the settings of their source, and what makes them."""
        seed, texts = self.config.seed, self.catalog.texts()
        key: dict[str, Any] = {"texts": self.catalog.sha256}
        if isinstance(source, settings.TfidfSvdVectors):
            return (
                key | {"seed": seed, "scikit-learn": version("scikit-learn"), "results": RESULTS_VERSION},
                lambda: vectors.tfidf_svd(
                    texts, dimensions=source.dimensions, max_features=source.max_features, seed=seed
                ),
            )
        if isinstance(source, settings.SentenceTransformersVectors):
            return (
                key | {"versions": sentence_transformers_version()},
                lambda: vectors.sentence_transformers(
                    texts, model=source.model, batch_size=source.batch_size, progress=self.progress
                ),
            )

        def states() -> np.ndarray:
            lm, tokenizer = self.base_model()
            return vectors.language_model(
                texts,
                model=lm.to(PartialState().device),
                tokenizer=tokenizer,
                batch_size=source.batch_size,
                progress=self.progress,
            )

        model = self.config.to_dict()["model"]
        by = scratch_version() if model["name"] == "scratch" else f"transformers={version('transformers')}"
        return key | {"seed": seed, "model": model, "made_by": by, "results": RESULTS_VERSION}, states

    def _collaborative(self, source: settings.CollaborativeVectors) -> tuple[dict[str, Any], Vectors]:
        """What the vectors depend on beside the settings of their source, and what makes them."""
        split, seed = self.split, self.config.seed
        if not len(split.train_items):
            raise DataError("`vectors.kind: collaborative` needs training interactions, and the split leaves none")
        key = {"seed": seed, "training": sha256_of_arrays(split.train_offsets, split.train_items), "method": 1}
        if source.source == "sasrec":
            return (
                key | {"items": split.num_items, "torch": version("torch")},
                lambda: collaborative.sasrec_vectors(
                    split.train_sequences(),
                    num_items=split.num_items,
                    dimensions=source.dimensions,
                    steps=source.steps,
                    seed=seed,
                    device=str(PartialState().device),
                    progress=self.progress,
                ),
            )
        return (
            key | {"items": split.num_items, "scikit-learn": version("scikit-learn")},
            lambda: collaborative.ppmi_vectors(
                collaborative.co_occurrence(
                    split.train_items, split.train_offsets, num_items=split.num_items, window=source.window
                ),
                dimensions=source.dimensions,
                shift=source.shift,
                seed=seed,
            ),
        )


def sentence_transformers_version() -> str:
    """Version of the optional package, or what stands for its absence until it is asked for."""
    try:
        return version("sentence-transformers")
    except PackageNotFoundError:
        return "not installed"

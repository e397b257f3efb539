"""The stages before training: data, item vectors, codes, base model, vocabulary."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_itemtok import settings
from llm_itemtok.artifacts import (
    CHECKPOINTS,
    CODES,
    QUALITY,
    atomic_folder,
    cache_folder,
    code_versions,
    kept_folder,
    sha256_of_arrays,
    write_json,
)
from llm_itemtok.config import RunConfig
from llm_itemtok.data import splits, synthetic
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.interactions import Interactions
from llm_itemtok.data.readers import RawData, read
from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.items import collisions
from llm_itemtok.items.base import ItemTokenizer, Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collaborative import co_occurrence, draw_sequences, near_pairs
from llm_itemtok.items.doctor import examine
from llm_itemtok.items.files import read_codes
from llm_itemtok.items.findings import judged
from llm_itemtok.items.hierarchical import HierarchicalCodes
from llm_itemtok.items.product import ProductKMeans
from llm_itemtok.items.quality import (
    NEIGHBOURS,
    Pairs,
    estimated_errors,
    quality,
    reconstruction_error,
    vector_pairs,
)
from llm_itemtok.items.quantizers import load_quantizer
from llm_itemtok.items.random_codes import RandomCodes
from llm_itemtok.items.residual_kmeans import ResidualKMeans
from llm_itemtok.items.rqvae import RQVAE
from llm_itemtok.items.text_codes import TextCodes, random_numbers, sequential_numbers
from llm_itemtok.model.prompts import encode_text
from llm_itemtok.pipeline.base_model import base_model
from llm_itemtok.pipeline.stages import made_by
from llm_itemtok.pipeline.vectors import Log, Sources, needs_vectors, text_sources

PROTOCOL = ("split", "k_core", "deduplicate", "unknown_items", "filter", "validation_share", "test_share")
"""Settings of `data` that decide what is trained on and tested; a bundle carries them."""

DOCTORS_LOG = 2_000_000
"""Training interactions, of users drawn at random, by which the doctor says which items are neighbours: for 8 million
it would take 3 GB and a minute and a half."""


@dataclass(frozen=True)
class Dataset:
    """What a run is trained and tested on.

    Attributes:
        raw: catalogue (the candidates) and log, after k-core, and what was found while reading.
        split: training, validation and test.
        oracle: the generator's own answers, for synthetic data only.
    """

    raw: RawData
    split: splits.Split
    oracle: synthetic.Oracle | None

    @property
    def catalog(self) -> Catalog:
        """The candidates."""
        return self.raw.catalog

    @property
    def interactions(self) -> Interactions:
        """The log."""
        return self.raw.interactions

    @property
    def sha256(self) -> str:
        """Hash of catalogue and log."""
        return sha256_of_arrays(self.catalog.sha256, self.interactions.sha256)

    @property
    def segments_sha256(self) -> str:
        """Hash of the columns that only segments are made from."""
        columns = {name: column.tolist() for name, column in self.interactions.extra.items()}
        return sha256_of_arrays(json.dumps([dict(self.catalog.extra), columns], sort_keys=True))


def load_data(data: settings.Data, seed: int, segments: Mapping[str, settings.Segments]) -> Dataset:
    """Read, filter, split, and prove that the split does not leak.

    Args:
        data: what to read and how.
        seed: of made-up data.
        segments: rules whose columns are read, too; none where the data are not for an evaluation.

    Raises:
        DataError: for everything wrong with the input.
    """
    oracle = None
    if data.source == "synthetic":
        catalog, interactions, oracle = synthetic.generate(num_items=data.items, num_users=data.users, seed=seed)
        raw = RawData(catalog, interactions, {})
    else:
        rule = None if data.filter is None else dataclasses.asdict(data.filter)
        raw = read(
            data.path,
            source=data.source,
            columns=data.columns,
            unknown_items=data.unknown_items,
            event_filter=rule and {key: value for key, value in rule.items() if value is not None},
            deduplicate=data.deduplicate,
            item_columns=_columns(segments, settings.ItemOrderSegments),
            log_columns=_columns(segments, settings.UserColumnSegments),
        )
    core = raw.core(data.k_core)
    if len(core.catalog) < len(raw.catalog):
        oracle = None  # it knows the whole catalogue only
    raw = core
    if data.split == "temporal":
        split = splits.temporal(
            raw.interactions,
            num_items=len(raw.catalog),
            validation_share=data.validation_share,
            test_share=data.test_share,
        )
    else:
        split = splits.leave_last_out(raw.interactions, num_items=len(raw.catalog))
    splits.check_leaks(split, raw.interactions)
    return Dataset(raw, split, oracle)


def _columns(segments: Mapping[str, settings.Segments], kind: type) -> list[str]:
    """The columns that rules of one kind name, each once."""
    return list(dict.fromkeys(rule.column for rule in segments.values() if isinstance(rule, kind)))


def refuse_textless(config: RunConfig, catalog: Catalog) -> None:
    """Raise `DataError` if the recipe needs item text, or titles, and the catalogue has none at all."""
    tasks = [task for task in ("title-to-item", "item-to-title") if config.examples.tasks.get(task, 0) > 0]
    if tasks and not any(catalog.titles):
        raise DataError(
            "no item of the catalogue has a title, but the recipe needs them: "
            + ", ".join(f"`examples.tasks.{task}` (set it to 0)" for task in tasks)
        )
    if isinstance(config.tokenizer, settings.TitleTokenizer) and not any(catalog.titles):
        raise DataError(
            "no item of the catalogue has a title, so there is none to name it by; use another kind than "
            "`tokenizer.kind: title`, such as `numeric`"
        )
    if catalog.has_text or isinstance(config.tokenizer, settings.TextTokenizer):
        return
    needs = []
    sources = text_sources(config)
    if sources and needs_vectors(config):
        needs += [f"`{source}` (use `collaborative` or `file`, or `tokenizer.kind: random`)" for source in sources]
    if config.vocab.init == "text-mean":
        needs.append("`vocab.init: text-mean` (use `codebook` or `normal`)")
    if config.vocab.init == "codebook" and sources:
        needs.append(
            "`vocab.init: codebook` on text vectors (use `vectors.kind: collaborative` or `file`, or `normal`)"
        )
    if needs:
        raise DataError("no item of the catalogue has any text, but the recipe needs it:\n  " + "\n  ".join(needs))


def item_vectors(config: RunConfig, data: Dataset, folder: Path, log: Log) -> np.ndarray | None:
    """Vectors float32 `[N, D]`, cached by content; None for codes that need none."""
    return _sources(config, data, folder, log).make(log) if needs_vectors(config) else None


def _sources(config: RunConfig, data: Dataset, folder: Path, log: Log) -> Sources:
    return Sources(
        config,
        data.catalog,
        data.split,
        base_model=lambda: base_model(config, data.catalog, folder, log),
        progress=progress_lines(log, "item vectors"),
    )


def progress_lines(log: Log, what: str) -> Callable[[int, int], None]:
    """A progress callback that says every tenth, if that takes a few seconds."""
    last = [0, time.monotonic()]

    def report(done: int, total: int) -> None:
        tenth, now = done * 10 // max(1, total), time.monotonic()
        if tenth > last[0] and now - last[1] > 5:
            last[:] = [tenth, now]
            log(f"  {what}: {done:,} of {total:,}")

    return report


def item_tokenizer(config: RunConfig, data: Dataset, folder: Path, log: Log) -> ItemTokenizer:
    """The tokenizer that the recipe names; of interactions it sees those of training only."""
    chosen = config.tokenizer
    assert isinstance(chosen, settings.FittedTokenizer | settings.RandomTokenizer)
    shape = {"levels": chosen.levels, "codebook_size": chosen.codebook_size, "seed": config.seed}
    if isinstance(chosen, settings.RandomTokenizer):
        return RandomCodes(**shape)
    if isinstance(chosen, settings.ResidualKMeansTokenizer):
        return ResidualKMeans(
            iterations=chosen.iterations,
            components=chosen.components or None,
            balance=chosen.balance,
            sample=chosen.sample or None,
            **shape,
        )
    if isinstance(chosen, settings.ProductTokenizer):
        components = chosen.components or None
        return ProductKMeans(iterations=chosen.iterations, rotation=chosen.rotation, components=components, **shape)
    if isinstance(chosen, settings.HierarchicalTokenizer):
        together, split = None, data.split
        if chosen.source == "co-occurrence":
            together = co_occurrence(
                split.train_items, split.train_offsets, num_items=split.num_items, window=chosen.window
            )
        return HierarchicalCodes(together=together, iterations=chosen.iterations, **shape)
    aligned = _sources(config, data, folder, log).aligned(chosen.collaborative, log) if chosen.alignment else None
    return RQVAE(
        widths=chosen.hidden,
        latent_dimensions=chosen.latent,
        epochs=chosen.epochs,
        stop=chosen.stop,
        patience=chosen.patience,
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        commitment=chosen.commitment,
        revive_every=chosen.revive or None,
        estimator=chosen.estimator,
        collaborative=aligned,
        alignment_weight=chosen.alignment,
        diversity_weight=chosen.diversity,
        progress=progress_lines(log, "RQ-VAE epochs"),
        **shape,
    )


def make_codes(config: RunConfig, data: Dataset, folder: Path, log: Log) -> ItemCodes:
    """Make codes, resolve collisions, write `codes/v0` with its quality and its quantizer."""
    matrix = item_vectors(config, data, folder, log)
    codes, quantizer = fit_codes(config, data, matrix, folder, log)
    log(f"  {config.tokenizer.kind}: {codes.collision_rate:.1%} of the items share their code before resolution")
    near = None if matrix is None else vector_pairs(matrix)
    figures = quality(codes, matrix, near=near)
    policy = "forbid" if isinstance(config.tokenizer, settings.TextTokenizer) else config.tokenizer.collisions
    if policy == "extra-level":
        unique = collisions.extra_level(codes)
    elif codes.is_injective and "collisions" in codes.provenance:
        unique = codes  # of a file of ours: resolved when they were made
    elif policy == "forbid":
        unique = collisions.forbid(codes, data.catalog.item_ids)
    else:
        moves = {"sinkhorn": collisions.sinkhorn, "reassign": collisions.reassign, "matching": collisions.matching}
        unique = moves[policy](codes, matrix, quantizer=quantizer)
    if _codes_before(folder) != unique:
        for path in (*(path for number, path in code_versions(folder) if number), folder / CHECKPOINTS):
            shutil.rmtree(path, ignore_errors=True)  # of other codes than these
    with atomic_folder(folder / CODES / "v0") as new:
        unique.save(new)
        if quantizer is not None:
            quantizer.save(new)
        resolved = quality(unique, matrix, near=near)
        facts = doctor_facts(unique, data, near)
        if matrix is not None and (error := _rebuilding(config, codes, unique, matrix, quantizer)):
            facts["reconstruction_error"] = error
            figures["reconstruction_error"] = error["before"]
        write_json(new / QUALITY, {**figures, "resolved": resolved, "doctor": judged(resolved, facts)})
    return unique


def _codes_before(folder: Path) -> ItemCodes | None:
    """The codes that a run began with until now; None where there are none that can be read."""
    try:
        return ItemCodes.load(folder / CODES / "v0")
    except ArtifactError:
        return None


def _rebuilding(
    config: RunConfig, codes: ItemCodes, unique: ItemCodes, matrix: np.ndarray, quantizer: Quantizer | None
) -> dict[str, float | bool]:
    """How well codes rebuild item vectors, `before` and `after` resolution; empty where that cannot be said."""
    if quantizer is not None:
        before, after = (reconstruction_error(table, matrix, quantizer) for table in (codes, unique))
        return {"before": before, "after": after}
    if isinstance(config.tokenizer, settings.FileTokenizer):
        before, after = estimated_errors(codes, unique, matrix)
        return {"before": before, "after": after, "estimated": True}
    return {}  # a codeword of random codes, or of a tree without its prefix, stands for nothing


def fit_codes(
    config: RunConfig, data: Dataset, matrix: np.ndarray | None, folder: Path, log: Log
) -> tuple[ItemCodes, Quantizer | None]:
    """Codes as the tokenizer of the recipe makes them, collisions not yet resolved, and what it learned."""
    chosen = config.tokenizer
    if isinstance(chosen, settings.FileTokenizer):
        sizes = chosen.sizes or None
        codes = read_codes(chosen.path, data.catalog.item_ids, sizes=sizes, unknown_items=chosen.unknown_items)
        return codes, None
    if isinstance(chosen, settings.TextTokenizer):
        _, words = base_model(config, data.catalog, folder, log)
        return text_codes(chosen, words, data, config.seed), None
    tokenizer = item_tokenizer(config, data, folder, log)
    if isinstance(tokenizer, RandomCodes):
        return tokenizer.deal(len(data.catalog)), None
    assert matrix is not None  # only codes that are not fitted do without
    if isinstance(tokenizer, RQVAE):
        return _kept_fit(tokenizer, matrix, config, log)
    codes = tokenizer.fit(matrix)
    return codes, tokenizer.quantizer


def _kept_fit(tokenizer: RQVAE, matrix: np.ndarray, config: RunConfig, log: Log) -> tuple[ItemCodes, Quantizer | None]:
    """Fit an RQ-VAE, which takes minutes, once for all runs that begin with the same."""

    def fill(new: Path) -> None:
        tokenizer.fit(matrix).save(new)
        assert tokenizer.quantizer is not None  # it is fitted
        tokenizer.quantizer.save(new)

    assert isinstance(config.tokenizer, settings.RqVaeTokenizer)
    chosen = repr(dataclasses.replace(config.tokenizer, collisions="forbid"))  # they are resolved later
    aligned = [] if tokenizer.collaborative is None else [tokenizer.collaborative]
    key = sha256_of_arrays(matrix, *aligned, chosen, str(config.seed), made_by("torch"))
    kept = kept_folder(cache_folder() / "rqvae", key, fill, log)
    return ItemCodes.load(kept), load_quantizer(kept)


def text_codes(
    chosen: settings.TextTokenizer, tokenizer: PreTrainedTokenizerBase, data: Dataset, seed: int
) -> ItemCodes:
    """Items named in words of the language model's tokenizer; of interactions, training alone is looked at.

    Raises:
        DataError: if the tokenizer has no end token, or does not tell numbers apart.
    """
    if tokenizer.eos_token is None:
        raise DataError(f"`tokenizer.kind: {chosen.kind}` needs a tokenizer with an EOS token to end names with")
    named = TextCodes(
        lambda texts: [list(tokenizer.convert_ids_to_tokens(ids)) for ids in encode_text(tokenizer, texts)],
        end=str(tokenizer.eos_token),
        unknown=None if tokenizer.unk_token is None else str(tokenizer.unk_token),
    )
    if isinstance(chosen, settings.TitleTokenizer):
        return named.of_titles(data.catalog.titles, max_tokens=chosen.max_tokens)
    size = len(data.catalog)
    if chosen.order == "random":
        return named.of_numbers(random_numbers(size, seed=seed).tolist())
    return named.of_numbers(sequential_numbers(data.split.train_items, num_items=size, seed=seed).tolist())


def doctor_facts(codes: ItemCodes, data: Dataset, near_vectors: Pairs | None) -> dict[str, Any]:
    """What the item-token doctor finds in codes that are in use; of interactions it sees those of training only.

    Args:
        codes: of the catalogue.
        data: the catalogue and its log.
        near_vectors: what `vector_pairs` says of the item vectors; None without vectors.
    """
    split = data.split
    drawn = draw_sequences(split.train_items, split.train_offsets, most=DOCTORS_LOG)
    counts = co_occurrence(*drawn, num_items=split.num_items)
    near = {"training": near_pairs(counts, NEIGHBOURS)}
    if near_vectors is not None:
        near = {"vectors": near_vectors, **near}
    return examine(codes, near=near, item_counts=split.item_counts(), categories=data.catalog.categories)

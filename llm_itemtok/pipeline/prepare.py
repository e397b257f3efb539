"""The stages before training: data, item vectors, codes, base model, vocabulary."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_itemtok import settings
from llm_itemtok.artifacts import CODES, QUALITY, atomic_folder, cache_folder, read_json, sha256_of_arrays, write_json
from llm_itemtok.config import RunConfig
from llm_itemtok.data import splits, synthetic
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.interactions import Interactions
from llm_itemtok.data.readers import RawData, read
from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.items import collisions, vectors
from llm_itemtok.items.base import ItemTokenizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.quality import quality
from llm_itemtok.items.random_codes import RandomCodes
from llm_itemtok.items.residual_kmeans import ResidualKMeans
from llm_itemtok.items.rqvae import RQVAE
from llm_itemtok.model import scratch
from llm_itemtok.model.load import load_base
from llm_itemtok.model.prompts import encode_text
from llm_itemtok.model.rows import input_table
from llm_itemtok.pipeline.stages import input_hashes
from llm_itemtok.vocab import init
from llm_itemtok.vocab.item_vocab import ItemVocab

BASE, VOCAB = "base", "vocab"
Log = Callable[[str], None]


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
    if catalog.has_text:
        return
    needs = []
    from_text = not isinstance(config.vectors, settings.FileVectors)
    if from_text and not isinstance(config.tokenizer, settings.RandomTokenizer):
        needs.append(f"`vectors.kind: {config.vectors.kind}` (use `file`, or `tokenizer.kind: random`)")
    if config.vocab.init == "text-mean":
        needs.append("`vocab.init: text-mean` (use `codebook` or `normal`)")
    if config.vocab.init == "codebook" and from_text:
        needs.append("`vocab.init: codebook` on text vectors (use `vectors.kind: file`, or `normal`)")
    if needs:
        raise DataError("no item of the catalogue has any text, but the recipe needs it:\n  " + "\n  ".join(needs))


def base_model(
    config: RunConfig, catalog: Catalog, folder: Path, log: Log
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model; for `scratch`, make it once per run folder."""
    model = config.model
    if model.name != "scratch":
        return load_base(
            model.name, revision=model.revision, dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
    place, sizes = folder / BASE, model.scratch
    key = sha256_of_arrays(catalog.sha256, repr(sizes), str(config.seed), scratch_version())
    if not (place / "key.json").exists() or read_json(place / "key.json") != key:
        texts = catalog.texts()
        tokenizer = scratch.train_tokenizer(texts, vocab_size=sizes.vocab_size)
        lm = scratch_model(config, tokenizer)
        log(f"  base model: {sum(p.numel() for p in lm.parameters()):,} parameters, {len(tokenizer):,} text tokens")
        report = _every_fifth(log, "pre-training on the item texts")
        scratch.pretrain(lm, tokenizer, texts, epochs=sizes.pretrain_epochs, seed=config.seed, progress=report)
        with atomic_folder(place) as new:
            lm.save_pretrained(new)
            tokenizer.save_pretrained(new)
            write_json(new / "key.json", key)
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype), AutoTokenizer.from_pretrained(place)


def scratch_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained `scratch` model of the recipe's size."""
    sizes = config.model.scratch
    return scratch.build_model(
        tokenizer,
        family=sizes.family,
        layers=sizes.layers,
        width=sizes.width,
        heads=sizes.heads,
        dropout=sizes.dropout,
        seed=config.seed,
    )


def sentence_transformers_version() -> str:
    """Version of the optional package, or what stands for its absence until it is asked for."""
    try:
        return version("sentence-transformers")
    except PackageNotFoundError:
        return "not installed"


def scratch_version() -> str:
    """What, beside the recipe, decides how a scratch model comes out."""
    return " ".join(f"{name}={version(name)}" for name in ("torch", "transformers", "sentencepiece"))


def _every_fifth(log: Log, what: str) -> Callable[[int, int, float], None]:
    def report(step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 5) == 0 or step == steps:
            log(f"  {what}: step {step:,} of {steps:,}, loss {loss:.3f}")

    return report


def item_vectors(config: RunConfig, catalog: Catalog, folder: Path, log: Log) -> np.ndarray | None:
    """Vectors float32 `[N, D]`, cached by content; None for random codes that need none."""
    kind = config.vectors
    if isinstance(config.tokenizer, settings.RandomTokenizer) and config.vocab.init != "codebook":
        return None
    if isinstance(kind, settings.FileVectors):
        return vectors.from_file(kind.path, catalog)
    texts = catalog.texts()
    without = vectors.num_without_text(texts)
    if without:
        log(f"  {without:,} of {len(texts):,} items have no text; their vectors are zero")
    key: dict[str, Any] = {
        "texts": catalog.sha256,
        "settings": config.to_dict()["vectors"],
        "inputs": input_hashes(config),
    }
    compute: Callable[[], np.ndarray]
    if isinstance(kind, settings.TfidfSvdVectors):
        key |= {"seed": config.seed, "scikit-learn": version("scikit-learn")}

        def compute() -> np.ndarray:
            return vectors.tfidf_svd(
                texts, dimensions=kind.dimensions, max_features=kind.max_features, seed=config.seed
            )
    elif isinstance(kind, settings.SentenceTransformersVectors):
        key["versions"] = sentence_transformers_version()

        def compute() -> np.ndarray:
            return vectors.sentence_transformers(
                texts, model=kind.model, batch_size=kind.batch_size, progress=progress_lines(log, "item vectors")
            )
    else:
        key |= {"seed": config.seed, "model": config.to_dict()["model"], "transformers": version("transformers")}

        def compute() -> np.ndarray:
            lm, tokenizer = base_model(config, catalog, folder, log)
            return vectors.language_model(
                texts,
                model=lm.to(PartialState().device),
                tokenizer=tokenizer,
                batch_size=kind.batch_size,
                progress=progress_lines(log, "item vectors"),
            )

    return vectors.cached(key, cache_folder() / "vectors", compute)


def progress_lines(log: Log, what: str) -> Callable[[int, int], None]:
    """A progress callback that says every tenth, if that takes a few seconds."""
    last = [0, time.monotonic()]

    def report(done: int, total: int) -> None:
        tenth, now = done * 10 // max(1, total), time.monotonic()
        if tenth > last[0] and now - last[1] > 5:
            last[:] = [tenth, now]
            log(f"  {what}: {done:,} of {total:,}")

    return report


def item_tokenizer(config: RunConfig, log: Log) -> ItemTokenizer:
    """The tokenizer that the recipe names."""
    chosen = config.tokenizer
    shape = {"levels": chosen.levels, "codebook_size": chosen.codebook_size, "seed": config.seed}
    if isinstance(chosen, settings.RandomTokenizer):
        return RandomCodes(**shape)
    if isinstance(chosen, settings.ResidualKMeansTokenizer):
        return ResidualKMeans(iterations=chosen.iterations, components=chosen.components or None, **shape)
    return RQVAE(
        widths=chosen.hidden,
        latent_dimensions=chosen.latent,
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        commitment=chosen.commitment,
        progress=progress_lines(log, "RQ-VAE epochs"),
        **shape,
    )


def make_codes(config: RunConfig, data: Dataset, folder: Path, log: Log) -> ItemCodes:
    """Fit the tokenizer, resolve collisions, write `codes/v0` with its quality and its quantizer."""
    matrix = item_vectors(config, data.catalog, folder, log)
    tokenizer = item_tokenizer(config, log)
    if isinstance(tokenizer, RandomCodes):
        codes = tokenizer.deal(len(data.catalog))
    else:
        assert matrix is not None  # only random codes do without
        codes = tokenizer.fit(matrix)
    log(f"  {config.tokenizer.kind}: {codes.collision_rate:.1%} of the items share their code before resolution")
    figures = quality(codes, matrix, quantizer=tokenizer.quantizer)
    policy = config.tokenizer.collisions
    if policy == "forbid":
        unique = collisions.forbid(codes, data.catalog.item_ids)
    elif policy == "extra-level":
        unique = collisions.extra_level(codes)
    else:
        unique = collisions.reassign(codes, matrix, quantizer=tokenizer.quantizer)
    with atomic_folder(folder / CODES / "v0") as new:
        unique.save(new)
        if tokenizer.quantizer is not None:
            tokenizer.quantizer.save(new)
        write_json(new / QUALITY, {**figures, "resolved": quality(unique, matrix)})
    return unique


def make_vocab(config: RunConfig, data: Dataset, codes: ItemCodes, folder: Path, log: Log) -> None:
    """Compute the initial rows of the item tokens; write them to `vocab/`."""
    lm, tokenizer = base_model(config, data.catalog, folder, log)
    vocab = ItemVocab.add_to(tokenizer, codes)
    table = input_table(lm).weight.detach().float()
    if config.vocab.init == "text-mean":
        rows = init.text_mean(vocab, table, encode_text(tokenizer, data.catalog.texts()), seed=config.seed)
    elif config.vocab.init == "codebook":
        matrix = item_vectors(config, data.catalog, folder, log)
        assert matrix is not None
        rows = init.codebook(vocab, table, matrix, seed=config.seed)
    else:
        rows = init.normal(vocab, table, seed=config.seed)
    with atomic_folder(folder / VOCAB) as new:
        save_file({"rows": rows.contiguous()}, new / "initial_rows.safetensors")
    log(f"  {vocab.num_tokens:,} item tokens from id {vocab.first_id:,}; an item is such as {vocab.spell(0)}")


def read_vocab(folder: Path) -> tuple[ItemCodes, Tensor]:
    """Codes and initial rows float32 `[T, D]` of a run.

    Raises:
        ArtifactError: if a stage before has not run.
    """
    rows = folder / VOCAB / "initial_rows.safetensors"
    if not rows.is_file():
        raise ArtifactError(
            f"{rows}: the stage `vocab` must have run, but its file is missing; start with `--from vocab`"
        )
    return ItemCodes.load(folder / CODES / "v0"), load_file(rows)["rows"]

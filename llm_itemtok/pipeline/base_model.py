"""The base model of a run: loaded, or for `scratch` made of the catalogue's texts, once for all runs that share it."""

import shutil
import string
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_itemtok import settings
from llm_itemtok.artifacts import (
    CONTENT,
    atomic_folder,
    cache_folder,
    kept_folder,
    read_json,
    sha256_of_arrays,
    write_json,
)
from llm_itemtok.config import RunConfig
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.errors import RecipeError
from llm_itemtok.model import scratch
from llm_itemtok.model.load import load_base, load_lm
from llm_itemtok.model_settings import ALL_POSITIONS_REASON, LOST_STEPS
from llm_itemtok.pipeline.stages import scratch_version
from llm_itemtok.pipeline.vectors import Log

BASE = "base"


def base_model(
    config: RunConfig, catalog: Catalog, folder: Path, log: Log
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model; for `scratch`, make it once, for this run and others with the same texts and seed."""
    model = config.model
    if model.name != "scratch":
        return load_base(
            model.name,
            revision=model.revision,
            dtype=model.dtype,
            quantization=model.quantization,
            trust_remote_code=model.trust_remote_code,
        )
    place, letters = folder / BASE, needed_letters(config)
    inputs = [catalog.sha256, repr(model.scratch), str(config.seed), scratch_version(), *([letters] if letters else [])]
    key = sha256_of_arrays(*inputs)
    if not (place / "key.json").exists() or read_json(place / "key.json") != key:
        kept = kept_folder(
            cache_folder() / "models", key, lambda new: _make_scratch(config, catalog, letters, new, log), log
        )
        with atomic_folder(place) as new:  # a copy: other machines of a run may share its folder and no cache
            shutil.copytree(kept, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CONTENT))
            write_json(new / "key.json", key)
    dtype = "bfloat16" if model.dtype == "bfloat16" else "float32"
    return load_lm(place, AutoConfig.from_pretrained(place), dtype=dtype), AutoTokenizer.from_pretrained(place)


def refuse_model(config: RunConfig, lm: PreTrainedModel, levels: int) -> None:
    """Raise `RecipeError` if the model cannot take the recipe's examples (their kind or length), or learn as asked."""
    if lm.config.is_encoder_decoder and config.examples.kind == "all-positions":
        raise RecipeError(f"{ALL_POSITIONS_REASON}; `model.name: {config.model.name}` is an encoder–decoder")
    each = 1 if isinstance(config.scoring, settings.RecursiveScoring) else levels
    needed = 1 + (config.examples.history_length + 1) * each
    positions = most_positions(lm.config)
    if positions is not None and needed > positions:
        raise RecipeError(
            f"`examples.history_length: {config.examples.history_length}` needs {needed:,} positions at {each} "
            f"an item, but the model has {positions:,}; shorten the histories or choose another model"
        )
    if config.model.adapter == "none" and config.model.dtype == "auto" and lm.dtype != torch.float32:
        raise RecipeError(f"{LOST_STEPS}; `model.dtype: auto` is {str(lm.dtype)[6:]} here")


def most_positions(config: PreTrainedConfig) -> int | None:
    """Longest row that a model reads as it should; None for T5, which goes by distances.

    LongRoPE (Phi-3-128k, Phi-4-mini) changes all its frequencies when a row of a batch grows beyond the original
    length, so there a user's scores would depend on who shares the batch: only what is shorter counts.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings", config.original_max_position_embeddings)
        return int(original)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def _make_scratch(config: RunConfig, catalog: Catalog, letters: str, place: Path, log: Log) -> None:
    """Train a `scratch` model and its text tokenizer on the catalogue's texts, and save them."""
    sizes, texts = config.model.scratch, catalog.texts()
    tokenizer = scratch.train_tokenizer(texts, vocab_size=sizes.vocab_size, letters=letters)
    lm = scratch_model(config, tokenizer)
    log(f"  base model: {sum(p.numel() for p in lm.parameters()):,} parameters, {len(tokenizer):,} text tokens")
    report = _every_fifth(log, "pre-training on the item texts")
    scratch.pretrain(lm, tokenizer, texts, epochs=sizes.pretrain_epochs, seed=config.seed, progress=report)
    lm.save_pretrained(place)
    tokenizer.save_pretrained(place)


def needed_letters(config: RunConfig) -> str:
    """Letters that a scratch tokenizer must have whatever the texts hold: digits, where items are named in words."""
    return string.digits if isinstance(config.tokenizer, settings.TextTokenizer) else ""


def scratch_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained `scratch` model of the recipe's size."""
    sizes = config.model.scratch
    return scratch.build_model(
        tokenizer,
        family=sizes.family,
        layers=sizes.layers,
        width=sizes.width,
        heads=sizes.heads,
        decoder_layers=sizes.decoder_layers,
        head_dim=sizes.head_dim,
        inner=sizes.inner,
        dropout=sizes.dropout,
        seed=config.seed,
    )


def _every_fifth(log: Log, what: str) -> Callable[[int, int, float], None]:
    def report(step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 5) == 0 or step == steps:
            log(f"  {what}: step {step:,} of {steps:,}, loss {loss:.3f}")

    return report

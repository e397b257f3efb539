"""`itemtok check`: validate a recipe and its data, and estimate what a run will take. Trains and writes nothing."""

import math
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainingArguments

from llm_itemtok.config import RunConfig
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.describe import describe, describe_text
from llm_itemtok.errors import CollisionError, DataError, ItemTokError, UnsupportedModelError
from llm_itemtok.items import vectors
from llm_itemtok.model.item_lm import SUPPORTED_FAMILIES, refuse_unsupported
from llm_itemtok.model.rows import input_table
from llm_itemtok.model.scratch import train_tokenizer
from llm_itemtok.pipeline.fit import count_steps, make_examples, refuse_long_histories
from llm_itemtok.pipeline.prepare import load_data, refuse_textless, scratch_model
from llm_itemtok.settings import FileVectors, SentenceTransformersVectors
from llm_itemtok.training.arguments import build_arguments, check_settings


def check(config: RunConfig) -> str:
    """Check everything that can be checked without training.

    Returns:
        What was found in the data, and sizes, memory and time to expect, as text.

    Raises:
        ItemTokError: for everything wrong with the recipe or the data.
    """
    data = load_data(config.data, config.seed, config.evaluation.segments)
    refuse_textless(config, data.catalog)
    _refuse_codes(config, data.catalog)
    table = make_examples(config, data)
    check_settings(config.trainer)
    arguments = _arguments(config)
    steps, total = count_steps(arguments, len(table))
    tokens = sum(table["length"]) * _levels(config)
    lines = [
        describe_text(describe(data.raw, data.split)),
        "",
        "training",
        f"  {len(table):,} examples, about {tokens:,} item tokens an epoch, {steps:,} steps an epoch",
        f"  {total:,} steps in all, validation and a checkpoint every {config.evaluation.every:g} epochs",
    ]
    if config.model.name == "scratch" and "learning_rate" not in config.trainer:
        lines.append(
            f"  warning: no `trainer.learning_rate`; the library's {arguments.learning_rate:g} suits pre-trained "
            "models, a `scratch` model wants about 2.0e-3"
        )
    lm = _empty_model(config)
    if lm is None:
        lines.append(f"  `{config.model.name}` cannot be reached from here, so its size and memory are not known")
    else:
        refuse_long_histories(config, lm, _levels(config))
        lines += _cost(config, lm, tokens * total / max(1, steps), arguments.device.type)
    return "\n".join(lines)


def estimate_seconds(config: RunConfig) -> float | None:
    """About how long training takes here on one CPU thread, validation left out; None if the model is out of reach."""
    lm = _empty_model(config)
    if lm is None:
        return None
    table = make_examples(config, load_data(config.data, config.seed, {}))
    steps, total = count_steps(_arguments(config), len(table))
    tokens = sum(table["length"]) * _levels(config) * total / max(1, steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = _seconds(_work(config, lm, tokens))
    torch.set_num_threads(threads)
    return seconds


def _arguments(config: RunConfig) -> TrainingArguments:
    """The recipe's `trainer` section; one for a GPU is checked on machines without one."""
    portable = {name: value for name, value in config.trainer.items() if name not in ("bf16", "fp16", "tf32")}
    return build_arguments(portable, output_dir=Path("checkpoints"), seed=config.seed)


def _body(lm: PreTrainedModel) -> int:
    """Parameters beside the input table."""
    return sum(p.numel() for p in lm.parameters()) - input_table(lm).weight.numel()


def _work(config: RunConfig, lm: PreTrainedModel, tokens: float) -> float:
    """Floating-point operations of training on a number of tokens."""
    return tokens * (4 if config.model.adapter == "lora" else 6) * _body(lm)


def _seconds(work: float) -> float:
    """Time for it on this CPU."""
    # Measured on small models: about half of the matrix rate is reached; attention and optimiser take the rest.
    return work / _matmul_rate() * 2


def _levels(config: RunConfig) -> int:
    return config.tokenizer.levels + (config.tokenizer.collisions == "extra-level")


def _refuse_codes(config: RunConfig, catalog: Catalog) -> None:
    """Raise what the stage `items` would raise, as far as it can be known beforehand."""
    if isinstance(config.vectors, FileVectors):
        vectors.from_file(config.vectors.path, catalog)
    if isinstance(config.vectors, SentenceTransformersVectors):
        path = config.vectors.model
        if path.startswith((".", "/", "~")) and not Path(path).is_dir():
            raise DataError(f"`vectors.model` must be a folder or a Hub id, but there is no folder {path}")
    capacity = config.tokenizer.codebook_size**config.tokenizer.levels
    if config.tokenizer.collisions != "extra-level" and capacity < len(catalog):
        raise CollisionError(
            f"every item needs a code of its own, but {config.tokenizer.levels} levels of "
            f"{config.tokenizer.codebook_size} codewords make {capacity:,} codes for {len(catalog):,} items; raise "
            "`tokenizer.levels` or `tokenizer.codebook_size`, or use `collisions: extra-level`"
        )


def _empty_model(config: RunConfig) -> PreTrainedModel | None:
    """The base model without its weights; None if it is out of reach."""
    model = config.model
    if model.name == "scratch":
        with torch.device("meta"):
            return scratch_model(config, train_tokenizer([], vocab_size=model.scratch.vocab_size))
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if model.name.startswith((".", "/", "~")) or Path(model.name).exists():
            first = str(error).splitlines()[0]
            raise ItemTokError(f"`model.name` must be a folder with a model, was: {model.name}\n  {first}") from error
        return None  # a Hub id, which may well be reachable where the run takes place
    if found.model_type not in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(
            f"`model.name: {model.name}` is of type {found.model_type}; tested are {', '.join(SUPPORTED_FAMILIES)}"
        )
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(found)
    refuse_unsupported(lm)
    return lm


def _cost(config: RunConfig, lm: PreTrainedModel, tokens: float, device: str) -> list[str]:
    """Lines on parameters, memory and time of training on a number of tokens."""
    width = input_table(lm).embedding_dim
    words = config.model.scratch.vocab_size if config.model.name == "scratch" else input_table(lm).num_embeddings
    body = _body(lm)
    rows = _levels(config) * config.tokenizer.codebook_size * width * (1 if lm.config.tie_word_embeddings else 2)
    lora = config.model.adapter == "lora"
    if lora:
        matrices = [
            p for p in lm.base_model.parameters() if p.ndim == 2 and p.shape[0] != input_table(lm).num_embeddings
        ]
        trained = rows + config.model.lora.rank * sum(sum(matrix.shape) for matrix in matrices)
    else:
        trained = rows + body + words * width
    size = 2 if config.model.dtype == "bfloat16" else 4
    memory = (body + words * width) * size + trained * (size + 8)  # weights; gradients and two moments
    work = _work(config, lm, tokens)
    lines = [
        f"  base model: about {_scaled(body + words * width)}parameters; trained: about {_scaled(trained)}",
        f"  memory for weights, gradients and optimiser: about {_scaled(memory)}B, activations besides",
        f"  work: {_scaled(work)}FLOP",
    ]
    if device == "cpu":
        minutes = _seconds(work) / 60
        lines.append(
            "  time here: "
            + (f"about {minutes:.0f} minutes" if minutes >= 1 else "less than a minute")
            + ", and validation"
        )
    return lines


def _scaled(number: float) -> str:
    """Write a number with two digits or so and a prefix of a thousand, such as `3.2 G`."""
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    power = min(len(prefixes) - 1, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {prefixes[power]}"


def _matmul_rate(size: int = 512, repeats: int = 8) -> float:
    """Floating-point operations a second of float32 matrix products on this machine."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best

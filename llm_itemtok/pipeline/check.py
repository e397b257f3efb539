"""`itemtok check`: validate a recipe and its data, and estimate what a run will take. Trains and writes nothing."""

import math
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from llm_itemtok.config import RunConfig
from llm_itemtok.data.describe import describe, describe_text
from llm_itemtok.errors import UnsupportedModelError
from llm_itemtok.model.item_lm import SUPPORTED_FAMILIES
from llm_itemtok.model.scratch import train_tokenizer
from llm_itemtok.pipeline.fit import make_examples
from llm_itemtok.pipeline.prepare import load_data, refuse_textless, scratch_model
from llm_itemtok.training.arguments import build_arguments, check_settings


def check(config: RunConfig) -> str:
    """Check everything that can be checked without training.

    Returns:
        What was found in the data, and sizes, memory and time to expect, as text.

    Raises:
        ItemTokError: for everything wrong with the recipe or the data.
    """
    data = load_data(config.data, config.seed)
    refuse_textless(config, data.catalog)
    lines = [describe_text(describe(data.raw, data.split)), "", "training"]
    table = make_examples(config, data)
    check_settings(config.trainer)
    # A recipe for a GPU is checked on machines without one; precision changes neither steps nor batches.
    portable = {name: value for name, value in config.trainer.items() if name not in ("bf16", "fp16", "tf32")}
    arguments = build_arguments(portable, output_dir=Path("checkpoints"), seed=config.seed)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = math.ceil(len(table) / batch)
    total = arguments.max_steps if arguments.max_steps > 0 else math.ceil(steps * arguments.num_train_epochs)
    levels = config.tokenizer.levels + (config.tokenizer.collisions == "extra-level")
    tokens = sum(table["length"]) * levels
    lines.append(
        f"  {len(table):,} examples, about {tokens:,} item tokens an epoch, {steps:,} steps of {batch} an epoch"
    )
    lines.append(f"  {total:,} steps in all, validation and a checkpoint every {config.evaluation.every:g} epochs")
    size = _parameters(config)
    if size is None:
        lines.append(f"  `{config.model.name}` cannot be reached from here, so its size and memory are not known")
        return "\n".join(lines)
    body, vocabulary = size
    item_rows = levels * config.tokenizer.codebook_size
    lines += _cost(config, body, vocabulary, item_rows, tokens * total / max(1, steps), arguments.device.type)
    return "\n".join(lines)


def _parameters(config: RunConfig) -> tuple[int, int] | None:
    """Parameters of the body and of the input table, without loading weights; None if the model is out of reach."""
    model = config.model
    if model.name == "scratch":
        with torch.device("meta"):
            lm = scratch_model(config, train_tokenizer([], vocab_size=model.scratch.vocab_size))
        return sum(p.numel() for p in lm.parameters()), model.scratch.vocab_size * model.scratch.width
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except OSError:
        return None
    if found.model_type not in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(
            f"`model.name: {model.name}` is of type {found.model_type}; tested are {', '.join(SUPPORTED_FAMILIES)}"
        )
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(found)
    table = lm.get_input_embeddings().weight.numel()
    return sum(p.numel() for p in lm.parameters()) - table, table


def _cost(config: RunConfig, body: int, vocabulary: int, item_rows: int, tokens: float, device: str) -> list[str]:
    """Lines on parameters, memory and time."""
    lora = config.model.adapter == "lora"
    # A LoRA pair of rank r on a d x d matrix adds 2 d r to d^2; d is about the square root of a layer's matrices.
    trainable = int(body * 0.02 * config.model.lora.rank / 16) + item_rows if lora else body + vocabulary
    width = 2 if config.model.dtype == "bfloat16" else 4
    memory = (body + vocabulary) * width + trainable * (width + 8)
    work = tokens * (4 if lora else 6) * body
    lines = [
        f"  {body + vocabulary:,} parameters of the base model, about {trainable:,} of them or beside them trainable",
        f"  memory for weights, gradients and optimiser: about {_scaled(memory)}B, activations besides",
        f"  work: {_scaled(work)}FLOP",
    ]
    if device == "cpu":
        rate = _matmul_rate()
        # Measured on small models: about half of the matrix rate is reached; attention and optimiser take the rest.
        lines.append(
            f"  time here, at {rate / 1e9:.0f} GFLOP/s: about {work / rate * 2 / 60:.0f} minutes and validation"
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

"""What training costs: parameters, memory, and time by the rate at which this machine multiplies matrices."""

import math
import time

import torch
from transformers import PreTrainedModel

from llm_itemtok.config import RunConfig
from llm_itemtok.model.rows import input_table
from llm_itemtok.pipeline.fit import with_lora
from llm_itemtok.settings import RecursiveScoring

GPU_SIZED = 50_000_000
"""Parameters from which on matrix products are large enough to keep a GPU busy, so that its rate tells the time."""


def body_parameters(lm: PreTrainedModel) -> int:
    """Parameters beside the input table."""
    return sum(p.numel() for p in lm.parameters()) - input_table(lm).weight.numel()


def seconds_of(work: float) -> float:
    """Time for it on this CPU."""
    # Measured on small models: about half of the matrix rate is reached; attention and optimiser take the rest.
    return work / _matmul_rate() * 2


def cost_lines(
    config: RunConfig, lm: PreTrainedModel, codewords: int, beside: int, work: float, device: str
) -> list[str]:
    """Lines on parameters, memory and time of that much work in training.

    Args:
        config: the recipe.
        lm: the base model, without its weights.
        codewords: in all.
        beside: parameters of embeddings of items and of a recursive network.
        work: floating-point operations.
        device: where it is trained.
    """
    width = input_table(lm).embedding_dim
    words = config.model.scratch.vocab_size if config.model.name == "scratch" else input_table(lm).num_embeddings
    body = body_parameters(lm)
    one_table = lm.config.tie_word_embeddings or isinstance(config.scoring, RecursiveScoring)
    rows = codewords * width * (1 if one_table else 2)
    if config.model.adapter == "lora":
        with_lora(config, lm)  # on no weights, for its refusals
        trained = rows + beside + sum(p.numel() for p in lm.parameters() if p.requires_grad)
    else:
        trained = rows + beside + body + words * width
    size = 2 if config.model.dtype == "bfloat16" else 4
    of_body = 0.5 if config.model.quantization == "nf4" else size
    memory = body * of_body + words * width * size + trained * (size + 8)  # weights; gradients and two moments
    lines = [
        f"  base model: about {_scaled(body + words * width)}parameters; trained: about {_scaled(trained)}",
        f"  memory for weights, gradients and optimiser: about {_scaled(memory)}B, activations besides",
        f"  work: {_scaled(work)}FLOP",
    ]
    if device == "cpu":
        lines.append(f"  time here: {in_minutes(seconds_of(work))} if nothing else runs, and validation")
    if body >= GPU_SIZED:
        lines.append(f"  on a GPU at 100 TFLOP/s, a third of an A100: {in_minutes(work / 1e14)}, and validation")
    return lines


def in_minutes(seconds: float) -> str:
    """Write a time."""
    return f"about {seconds / 60:.0f} minutes" if seconds >= 60 else "less than a minute"


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

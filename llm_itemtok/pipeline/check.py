"""`itemtok check`: validate a recipe and its data, and estimate what a run will take. Trains and writes nothing."""

import math
import time
from pathlib import Path

import torch
from datasets import Dataset as ExampleTable
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, TrainingArguments

from llm_itemtok.config import RunConfig
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.describe import describe, describe_text
from llm_itemtok.errors import CollisionError, DataError, ItemTokError, UnsupportedModelError
from llm_itemtok.items import collisions, vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.files import read_codes
from llm_itemtok.model.item_lm import SUPPORTED_FAMILIES, of_encoder, refuse_unsupported
from llm_itemtok.model.load import auto_class
from llm_itemtok.model.rows import input_table
from llm_itemtok.model.scratch import train_tokenizer
from llm_itemtok.pipeline.fit import count_steps, make_examples, refuse_model
from llm_itemtok.pipeline.prepare import Dataset, load_data, refuse_textless, scratch_model
from llm_itemtok.pipeline.vectors import needs_vectors
from llm_itemtok.settings import CollaborativeVectors, FileTokenizer, FileVectors, SentenceTransformersVectors
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
    lm = _empty_model(config)
    check_settings(config.trainer)
    arguments = _arguments(config)
    steps, total = count_steps(arguments, len(table))
    sizes = code_sizes(config, data.catalog)
    tokens = sum(table["length"]) * len(sizes)
    lines = [
        describe_text(describe(data.raw, data.split)),
        *_vector_lines(config, data),
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
    if lm is None:
        lines.append(f"  `{config.model.name}` cannot be reached from here, so its size and memory are not known")
    else:
        refuse_model(config, lm, len(sizes))
        work = _work(config, lm, table, len(sizes)) * total / max(1, steps)
        lines += _cost(config, lm, sum(sizes), work, arguments.device.type)
    return "\n".join(lines)


def estimate_seconds(config: RunConfig) -> float | None:
    """About how long training takes here on one CPU thread, validation left out; None if the model is out of reach."""
    lm = _empty_model(config)
    if lm is None:
        return None
    data = load_data(config.data, config.seed, {})
    table = make_examples(config, data)
    steps, total = count_steps(_arguments(config), len(table))
    work = _work(config, lm, table, len(code_sizes(config, data.catalog))) * total / max(1, steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = _seconds(work)
    torch.set_num_threads(threads)
    return seconds


def _vector_lines(config: RunConfig, data: Dataset) -> list[str]:
    """Lines on item vectors that are made of interactions; the others take their model's time."""
    lines = []
    for source in config.vector_sources.values():
        if not isinstance(source, CollaborativeVectors) or not needs_vectors(config):
            continue
        cold = int((data.split.item_counts() == 0).sum())
        lines.append(
            f"  {source.source} of {len(data.split.train_items):,} training interactions, {source.dimensions} "
            f"dimensions; {cold:,} of {len(data.catalog):,} items have none and get zeros"
        )
        if source.source == "sasrec":
            # Two layers of 12 squares of the width, and a softmax over about as many drawn items as there are targets.
            work = 6 * 1024 * (24 * source.dimensions**2 + 1024 * source.dimensions) * source.steps
            lines.append(f"  at most {source.steps:,} steps, which would take {_minutes(_seconds(work))} here on a CPU")
    return ["", "item vectors", *lines] if lines else []


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds >= 60 else "less than a minute"


def _arguments(config: RunConfig) -> TrainingArguments:
    """The recipe's `trainer` section; one for a GPU is checked on machines without one."""
    portable = {name: value for name, value in config.trainer.items() if name not in ("bf16", "fp16", "tf32")}
    return build_arguments(portable, output_dir=Path("checkpoints"), seed=config.seed)


def _body(lm: PreTrainedModel) -> int:
    """Parameters beside the input table."""
    return sum(p.numel() for p in lm.parameters()) - input_table(lm).weight.numel()


def _work(config: RunConfig, lm: PreTrainedModel, table: ExampleTable, levels: int) -> float:
    """Floating-point operations of training on every example once; text is left out."""
    each, tokens = 4 if config.model.adapter == "lora" else 6, sum(table["length"]) * levels
    if not lm.config.is_encoder_decoder:
        return float(tokens * each * _body(lm))
    answers = len(table) * levels  # the decoder writes one item an example, the encoder reads all before it
    read = sum(p.numel() for name, p in lm.named_parameters() if of_encoder(name))
    return float(each * ((tokens - answers) * read + answers * (_body(lm) - read)))


def _seconds(work: float) -> float:
    """Time for it on this CPU."""
    # Measured on small models: about half of the matrix rate is reached; attention and optimiser take the rest.
    return work / _matmul_rate() * 2


def code_sizes(config: RunConfig, catalog: Catalog) -> tuple[int, ...]:
    """Codewords of each level, as far as that is known before codes are made: an extra level may need more."""
    chosen = config.tokenizer
    if isinstance(chosen, FileTokenizer):
        sizes = _codes_of_file(chosen, catalog).sizes
    else:
        sizes = (chosen.codebook_size,) * chosen.levels
    return (*sizes, sizes[-1]) if chosen.collisions == "extra-level" else sizes


def _codes_of_file(chosen: FileTokenizer, catalog: Catalog) -> ItemCodes:
    sizes = chosen.sizes or None
    return read_codes(chosen.path, catalog.item_ids, sizes=sizes, unknown_items=chosen.unknown_items)


def _refuse_codes(config: RunConfig, catalog: Catalog) -> None:
    """Raise what the stage `items` would raise, as far as it can be known beforehand."""
    for name, source in config.vector_sources.items():
        if isinstance(source, FileVectors):
            vectors.from_file(source.path, catalog)
        if isinstance(source, SentenceTransformersVectors):
            path = source.model
            if path.startswith((".", "/", "~")) and not Path(path).is_dir():
                raise DataError(f"`{name}.model` must be a folder or a Hub id, but there is no folder {path}")
    chosen = config.tokenizer
    if isinstance(chosen, FileTokenizer):
        codes = _codes_of_file(chosen, catalog)
        if chosen.collisions == "forbid":
            collisions.forbid(codes, catalog.item_ids)
        levels, capacity = f"{codes.num_levels} levels of {codes.sizes}", codes.capacity
    else:
        levels = f"{chosen.levels} levels of {chosen.codebook_size}"
        capacity = chosen.codebook_size**chosen.levels
    if chosen.collisions != "extra-level" and capacity < len(catalog):
        raise CollisionError(
            f"every item needs a code of its own, but {levels} codewords make {capacity:,} codes for "
            f"{len(catalog):,} items; raise `tokenizer.levels` or `tokenizer.codebook_size`, or use "
            "`collisions: extra-level`"
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
        lm: PreTrainedModel = auto_class(found).from_config(found)
    refuse_unsupported(lm)
    return lm


def _cost(config: RunConfig, lm: PreTrainedModel, codewords: int, work: float, device: str) -> list[str]:
    """Lines on parameters, memory and time of that much work in training, with that many codewords in all."""
    width = input_table(lm).embedding_dim
    words = config.model.scratch.vocab_size if config.model.name == "scratch" else input_table(lm).num_embeddings
    body = _body(lm)
    rows = codewords * width * (1 if lm.config.tie_word_embeddings else 2)
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
    lines = [
        f"  base model: about {_scaled(body + words * width)}parameters; trained: about {_scaled(trained)}",
        f"  memory for weights, gradients and optimiser: about {_scaled(memory)}B, activations besides",
        f"  work: {_scaled(work)}FLOP",
    ]
    if device == "cpu":
        lines.append(f"  time here: {_minutes(_seconds(work))}, and validation")
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

"""`itemtok check`: validate a recipe and its data, and estimate what a run will take. Trains and writes nothing."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset as ExampleTable
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from llm_itemtok.config import RunConfig
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.describe import describe, describe_text
from llm_itemtok.errors import CollisionError, DataError, ItemTokError
from llm_itemtok.items import collisions, vectors
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.files import MOST_LEVELS, read_codes
from llm_itemtok.items.findings import LEAST_ROOM
from llm_itemtok.model.families import of_encoder, refuse_type, refuse_unsupported
from llm_itemtok.model.load import auto_class, refuse_four_bits
from llm_itemtok.model.rows import input_table
from llm_itemtok.model.scratch import train_tokenizer
from llm_itemtok.objective_settings import FrequencyTarget, TokenWeightedObjective
from llm_itemtok.pipeline.alternate import described
from llm_itemtok.pipeline.base_model import needed_letters, refuse_model, scratch_model
from llm_itemtok.pipeline.cost import body_parameters, cost_lines, in_minutes, seconds_of
from llm_itemtok.pipeline.engines import refuse_engine
from llm_itemtok.pipeline.fit import count_steps, make_examples
from llm_itemtok.pipeline.prepare import Dataset, load_data, refuse_textless, text_codes
from llm_itemtok.pipeline.scoring import item_parameters
from llm_itemtok.pipeline.updates import Schedule, every_steps, quantizer_steps
from llm_itemtok.pipeline.vectors import needs_vectors
from llm_itemtok.pipeline.vocabulary import refuse_network
from llm_itemtok.settings import (
    CodeTokenizer,
    CollaborativeVectors,
    FileTokenizer,
    FileVectors,
    RecursiveScoring,
    SasrecRescoring,
    SentenceTransformersVectors,
    TextTokenizer,
    TitleTokenizer,
)
from llm_itemtok.training.arguments import build_arguments, check_settings
from llm_itemtok.update_settings import AlternateUpdate, BilevelUpdate, SelfImproveUpdate
from llm_itemtok.vocab.item_vocab import ItemVocab, refuse_known

LEAST_ROOM_USED = 0.5
"""Share of the codewords that a level of a file has room for which should be in use."""

MANY_RANKED = 1_000_000
"""Users ranked in all validations from which on a sample is spoken of."""


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
    shape = _item_shape(config, data)
    table = make_examples(config, data)
    lm = _empty_model(config)
    _refuse_item_tokens(config, data.catalog)
    check_settings(config.trainer)
    refuse_engine(config, here=False)
    arguments = _arguments(config)
    steps, total = count_steps(arguments, len(table))
    tokens = round(sum(table["length"]) * shape.mean)
    kind = "item tokens" if shape.new else "tokens of items"
    if isinstance(config.scoring, RecursiveScoring):
        kind = "items, a position each"
    lines = [
        describe_text(describe(data.raw, data.split)),
        *_vector_lines(config, data),
        *_file_lines(config, data.catalog),
        *_room_lines(config, data.catalog),
        "",
        "training",
        f"  {len(table):,} examples, about {tokens:,} {kind} an epoch, {steps:,} steps an epoch",
        f"  {total:,} steps in all, validation and a checkpoint every {config.evaluation.every:g} epochs",
        _validation_line(config, data, total / max(1, steps)),
        *_curriculum_lines(config, total),
        *_update_lines(config, steps, total),
    ]
    if config.model.name == "scratch" and "learning_rate" not in config.trainer:
        lines.append(
            f"  warning: no `trainer.learning_rate`; the library's {arguments.learning_rate:g} suits pre-trained "
            "models, a `scratch` model wants about 2.0e-3"
        )
    if lm is None:
        lines.append(f"  `{config.model.name}` cannot be reached from here, so its size and memory are not known")
    else:
        refuse_model(config, lm, shape.longest)
        work = _work(config, lm, table, shape) * total / max(1, steps)
        beside = item_parameters(config, len(data.catalog), shape.levels, input_table(lm).embedding_dim)
        lines += cost_lines(config, lm, shape.new, sum(beside), work, arguments.device.type)
    lines += _rescoring_lines(config, data)
    return "\n".join(lines)


def estimate_seconds(config: RunConfig) -> float | None:
    """About how long training takes here on one CPU thread, validation left out; None if the model is out of reach."""
    lm = _empty_model(config)
    if lm is None:
        return None
    data = load_data(config.data, config.seed, {})
    table = make_examples(config, data)
    steps, total = count_steps(_arguments(config), len(table))
    work = _work(config, lm, table, _item_shape(config, data)) * total / max(1, steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = seconds_of(work)
    torch.set_num_threads(threads)
    return seconds


def _vector_lines(config: RunConfig, data: Dataset) -> list[str]:
    """Lines on item vectors that are made of interactions; the others take their model's time, where it is in reach."""
    lines = []
    for name, source in config.vector_sources.items():
        if (
            isinstance(source, SentenceTransformersVectors)
            and needs_vectors(config)
            and not _in_reach(source.model, f"{name}.model")
        ):
            lines.append(f"  `{source.model}` cannot be reached from here, so its vectors cannot be made here")
        if not isinstance(source, CollaborativeVectors) or not needs_vectors(config):
            continue
        cold = int((data.split.item_counts() == 0).sum())
        lines.append(
            f"  {source.source} of {len(data.split.train_items):,} training interactions, {source.dimensions} "
            f"dimensions; {cold:,} of {len(data.catalog):,} items have none and get zeros"
        )
        if source.source == "sasrec":
            lines.append(_sasrec_line(source.dimensions, source.steps))
    return ["", "item vectors", *lines] if lines else []


def _rescoring_lines(config: RunConfig, data: Dataset) -> list[str]:
    """Lines on a dense model that scores items as well."""
    chosen = config.rescoring
    if not isinstance(chosen, SasrecRescoring):
        return []
    items = f"  {chosen.kind} of {len(data.catalog):,} items, {chosen.width} dimensions, beside what is above"
    return ["", "dense model", items, _sasrec_line(chosen.width, chosen.steps)]


def _sasrec_line(width: int, steps: int) -> str:
    # Two layers of 12 squares of the width, and a softmax over about as many drawn items as there are targets.
    work = 6 * 1024 * (24 * width**2 + 1024 * width) * steps
    return f"  at most {steps:,} steps, which would take {in_minutes(seconds_of(work))} here on a CPU"


def _curriculum_lines(config: RunConfig, total: int) -> list[str]:
    """When the targets of the loss have equal shares, if they ever do, in a training of `total` steps."""
    chosen = config.objective
    if not isinstance(chosen, TokenWeightedObjective) or len(chosen.targets) == 1 or chosen.curriculum == "none":
        return []
    if not any(isinstance(target, FrequencyTarget) for target in chosen.targets):
        return [
            "  warning: no share rises without `frequency` among `objective.targets`, so the curriculum changes "
            "nothing; write `objective.curriculum: none`"
        ]
    level = math.log(2) / chosen.pace
    line = f"  by the curriculum, targets have equal shares after {level:,.0f} steps"
    line += ", but for what is learned beside it" if chosen.mix == "learned" else ""
    if level > total:
        line += f"\n  warning: training ends before; `objective.pace: {2 * math.log(2) / total:.1e}` would be halfway"
    return [line]


def _update_lines(config: RunConfig, steps: int, total: int) -> list[str]:
    """When item tokens are updated; raises `RecipeError` if no round could end before training does."""
    if isinstance(config.update, AlternateUpdate):
        return [described(config.update, every_steps(config.update.every, steps), (steps, total))]
    if isinstance(config.update, BilevelUpdate):
        every = quantizer_steps(config.update, steps, total)
        taken = min((total - 1) // every, config.update.rounds or total)
        return [f"  the quantizer takes a step every {every:,} steps, {taken:,} in all; codes follow"]
    if not isinstance(config.update, SelfImproveUpdate):
        return []
    schedule = Schedule.of(config.update, steps, total)
    trial = "" if config.update.gate == "none" else f", each tried out for {schedule.adapt:,}"
    return [f"  item tokens are updated every {schedule.every:,} steps, {schedule.rounds} times at most{trial}"]


def _file_lines(config: RunConfig, catalog: Catalog) -> list[str]:
    """Lines on codes from a file: how they were joined, and rooms that cost rows and hold nothing."""
    chosen = config.tokenizer
    if not isinstance(chosen, FileTokenizer):
        return []
    codes = _codes_of_file(chosen, catalog)
    lines = [f"  {codes.provenance['file']}: {codes.num_levels} levels, joined by {codes.provenance['joined_by']}"]
    for level, (name, size) in enumerate(zip(codes.names, codes.sizes, strict=True)):
        used = len(np.unique(codes.table[:, level]))
        if used < LEAST_ROOM_USED * size and config.vocab.init != "base":  # a bundle's rooms are the model's
            lines.append(
                f"  warning: {name} has room for {size:,} codewords, of which {used:,} are used; each is a row of the "
                "model, so number them 0, 1, 2, ... unless updates or new items will need them"
            )
    return ["", "item codes", *lines]


def _room_lines(config: RunConfig, catalog: Catalog) -> list[str]:
    """Lines on how many codes there are for each item, where the recipe says how many."""
    chosen = config.tokenizer
    if isinstance(chosen, FileTokenizer | TextTokenizer):
        return []
    times = chosen.codebook_size**chosen.levels / len(catalog)
    lines = [
        "",
        "item codes",
        f"  room for {times:,.{1 if times < 10 else 0}f} codes an item; an extra level is not counted",
    ]
    if times < LEAST_ROOM:
        lines.append(
            f"  warning: there should be {LEAST_ROOM:.0f} at least, since codes are never spread evenly; raise "
            "`tokenizer.levels` or `tokenizer.codebook_size`"
        )
    return lines


def _validation_line(config: RunConfig, data: Dataset, epochs: float) -> str:
    """How often how many users are ranked while training goes on."""
    users = min(len(data.split.validation), config.evaluation.validation_users or len(data.split.validation))
    passes = max(1, math.floor(epochs / config.evaluation.every))
    more = "; `evaluation.validation_users` takes a sample" if users * passes > MANY_RANKED else ""
    return f"  validation ranks {users:,} users, {passes:,} times; the test {len(data.split.test):,} users once{more}"


def _in_reach(model: str, setting: str) -> bool:
    """Whether a model of sentence-transformers is here or on a Hub that is.

    Raises:
        ItemTokError: if it needs code of its own, which is not run for item vectors.
    """
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False)  # left out, the library asks at the terminal
    except (OSError, ValueError) as error:
        if _wants_trust(error):
            raise ItemTokError(
                f"`{setting}` must be a model without code of its own, which is never run for item vectors, was: "
                f"{model}; choose another one, or make the vectors elsewhere (`vectors.kind: file`)"
            ) from error
        return False
    return True


def _wants_trust(error: Exception) -> bool:
    """Whether the library did not read a model because it brings code; it has no error of its own for that."""
    return "trust_remote_code" in str(error)


def _arguments(config: RunConfig) -> TrainingArguments:
    """The recipe's `trainer` section; one for a GPU is checked on machines without one."""
    portable = {name: value for name, value in config.trainer.items() if name not in ("bf16", "fp16", "tf32")}
    return build_arguments(portable, output_dir=Path("checkpoints"), seed=config.seed)


def _work(config: RunConfig, lm: PreTrainedModel, table: ExampleTable, shape: "_ItemShape") -> float:
    """Floating-point operations of training on every example once; text is left out."""
    each, items = 4 if config.model.adapter == "lora" else 6, sum(table["length"])
    tokens = items * shape.mean
    if not lm.config.is_encoder_decoder:
        answers, work = items, tokens * each * body_parameters(lm)
    else:
        answers = len(table)  # the decoder writes one item an example, the encoder reads all before it
        written = answers * shape.mean
        read = sum(p.numel() for name, p in lm.named_parameters() if of_encoder(name))
        work = each * ((tokens - written) * read + written * (body_parameters(lm) - read))
    _, network, of_embeddings = item_parameters(config, 0, shape.levels, input_table(lm).embedding_dim)
    return float(work + 6 * (network * (items + answers) + of_embeddings * items))


@dataclass(frozen=True)
class _ItemShape:
    """What items are as tokens.

    Attributes:
        mean: positions an item, on average over training.
        longest: positions of the longest item.
        new: tokens that the language model does not have yet.
        levels: tokens of the longest item, which a recursive network predicts from one position.
    """

    mean: float
    longest: int
    new: int
    levels: int


def _item_shape(config: RunConfig, data: Dataset) -> _ItemShape:
    """What is known of it before codes are made: an extra level may need more codewords."""
    chosen = config.tokenizer
    if not isinstance(chosen, TextTokenizer):
        sizes = _code_sizes(chosen, data.catalog)
        positions = 1 if isinstance(config.scoring, RecursiveScoring) else len(sizes)
        return _ItemShape(positions, positions, sum(sizes), len(sizes))
    tokenizer = _words(config, data.catalog)
    if tokenizer is None:
        longest = chosen.max_tokens if isinstance(chosen, TitleTokenizer) else len(str(len(data.catalog)))
        return _ItemShape(longest + 1, longest + 1, 0, longest + 1)
    lengths = text_codes(chosen, tokenizer, data, config.seed).lengths
    return _ItemShape(float(lengths[data.split.train_items].mean()), int(lengths.max()), 0, int(lengths.max()))


def _words(config: RunConfig, catalog: Catalog) -> PreTrainedTokenizerBase | None:
    """The language model's tokenizer; None if it is out of reach."""
    model = config.model
    if model.name == "scratch":
        return train_tokenizer(catalog.texts(), vocab_size=model.scratch.vocab_size, letters=needed_letters(config))
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError):
        return None  # `_empty_model` says why
    return found


def _code_sizes(chosen: CodeTokenizer, catalog: Catalog) -> tuple[int, ...]:
    """Codewords of each level."""
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
    if isinstance(chosen, TextTokenizer):
        return  # unique by construction
    if isinstance(chosen, FileTokenizer):
        codes = _codes_of_file(chosen, catalog)
        if chosen.collisions == "forbid":
            collisions.forbid(codes, catalog.item_ids)
        levels, capacity = f"{codes.num_levels} levels of {codes.sizes}", codes.capacity
        more = "give `tokenizer.sizes` more room"
        if len(_code_sizes(chosen, catalog)) > MOST_LEVELS:
            raise DataError(
                f"codes must have at most {MOST_LEVELS} levels, called a to z, with the extra one, was: "
                f"{codes.num_levels + 1}; use another way of `tokenizer.collisions`"
            )
    else:
        levels = f"{chosen.levels} levels of {chosen.codebook_size}"
        more = "raise `tokenizer.levels` or `tokenizer.codebook_size`"
        capacity = chosen.codebook_size**chosen.levels
    if chosen.collisions != "extra-level" and capacity < len(catalog):
        raise CollisionError(
            f"every item needs a code of its own, but {levels} codewords make {capacity:,} codes for "
            f"{len(catalog):,} items; {more}, or use `collisions: extra-level`"
        )


def _refuse_item_tokens(config: RunConfig, catalog: Catalog) -> None:
    """Raise what the stage `vocab` would raise of a base model that has item tokens, or has none to go on with."""
    chosen = config.tokenizer
    if config.model.name == "scratch" or isinstance(chosen, TextTokenizer):
        return
    if config.vocab.init == "base":
        refuse_network(config)
    tokenizer = _words(config, catalog)
    if tokenizer is None:
        return
    if config.vocab.init == "base" and isinstance(chosen, FileTokenizer):
        ItemVocab.resolve(tokenizer, _codes_of_file(chosen, catalog))
    else:
        refuse_known(tokenizer, _code_sizes(chosen, catalog))


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
        if _wants_trust(error):
            raise ItemTokError(
                "`model.name` must be a model without code of its own unless `model.trust_remote_code: true` says to "
                f"run it, was: {model.name}; read that code first, or choose another model"
            ) from error
        if model.name.startswith((".", "/", "~")) or Path(model.name).exists():
            first = str(error).splitlines()[0]
            raise ItemTokError(f"`model.name` must be a folder with a model, was: {model.name}\n  {first}") from error
        return None  # a Hub id, which may well be reachable where the run takes place
    refuse_type(found, model.name)
    with torch.device("meta"):
        lm: PreTrainedModel = auto_class(found).from_config(found)
    refuse_unsupported(lm)
    if model.quantization == "nf4":
        refuse_four_bits(found)
    return lm

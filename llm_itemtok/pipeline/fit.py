"""The training stage: examples, model and trainer of a recipe; ends with the bundle of the best checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as ExampleTable
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from llm_itemtok import hub
from llm_itemtok.artifacts import (
    CHECKPOINTS,
    CODES,
    ITEM_PATHS,
    MEASURED,
    METRICS_LOG,
    MODEL,
    RESCORING,
    TOKEN_WEIGHTS,
    TRAINING,
    write_json,
)
from llm_itemtok.bundle import Generation, items_sha256, refuse_others
from llm_itemtok.card import redacted
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import DataError
from llm_itemtok.items.base import Quantizer
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.quantizers import load_quantizer
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.load import add_lora, with_item_tokens
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.model.state import hold_quantizer
from llm_itemtok.pipeline.alternate import with_alignments
from llm_itemtok.pipeline.base_model import base_model, refuse_model
from llm_itemtok.pipeline.engines import asks_for_fsdp, on_processors
from llm_itemtok.pipeline.objective import make_aim, token_figures
from llm_itemtok.pipeline.prepare import PROTOCOL, Dataset, Log, item_vectors
from llm_itemtok.pipeline.rescoring import chosen_metrics, with_rescoring
from llm_itemtok.pipeline.scoring import give_items, path_figures
from llm_itemtok.pipeline.stages import environment
from llm_itemtok.pipeline.updates import (
    Surroundings,
    keep_quantizer,
    keep_versions_until,
    make_updates,
    newest_version,
    trains_quantizer,
)
from llm_itemtok.pipeline.validation import Validation, decode_normaliser, measure_all
from llm_itemtok.pipeline.vectors import needs_vectors
from llm_itemtok.pipeline.vocabulary import read_vocab
from llm_itemtok.recommender import Recommender
from llm_itemtok.settings import RecursiveScoring
from llm_itemtok.training import examples
from llm_itemtok.training.arguments import OURS, build_arguments
from llm_itemtok.training.callbacks import MetricsLog, Progress, StopOnSignal
from llm_itemtok.training.checkpoints import Begin, WholeCheckpoints, last_checkpoint, stop_if_finished
from llm_itemtok.training.collator import Collator
from llm_itemtok.training.effort import training_flops
from llm_itemtok.training.late_binding import LateBinding
from llm_itemtok.training.limits import limits
from llm_itemtok.training.sharding import ShardedTrainer, is_sharded
from llm_itemtok.training.trainer import ItemTokenTrainer


class Stopped(Exception):
    """Training was stopped by a signal, after a checkpoint."""


def make_examples(config: RunConfig, data: Dataset) -> ExampleTable:
    """Training examples of every task of the recipe."""
    titles = data.catalog.titles
    return examples.build(
        data.split.train_sequences(),
        kind=config.examples.kind,
        history_length=config.examples.history_length,
        tasks={str(task): weight for task, weight in config.examples.tasks.items()},
        text_rows=np.array([row for row, title in enumerate(titles) if title], dtype=np.int64),
    )


def make_model(
    config: RunConfig, data: Dataset, codes: ItemCodes, folder: Path, log: Log
) -> tuple[ItemTokenModel, PreTrainedTokenizerBase, PeftModel | None]:
    """Base model with item tokens, as training begins; PEFT's view of it when it has LoRA."""
    lm, tokenizer = base_model(config, data.catalog, folder, log)
    refuse_model(config, lm, codes.num_levels)
    peft_model = None
    if config.model.adapter == "lora":
        lm, peft_model = with_lora(config, lm)
    _, rows = read_vocab(folder)
    model = with_item_tokens(
        lm,
        tokenizer,
        codes,
        lambda _vocab, _table: rows,
        normaliser=config.objective.normaliser,
        label_smoothing=config.objective.label_smoothing,
        input_dropout=config.model.input_dropout,
        output_dropout=config.model.output_dropout,
        one_table=isinstance(config.scoring, RecursiveScoring),
        known=config.vocab.init == "base",
    )
    give_items(config, data, model, lambda: item_vectors(config, data, folder, log))
    return model, tokenizer, peft_model


def with_lora(config: RunConfig, lm: PreTrainedModel) -> tuple[PreTrainedModel, PeftModel]:
    """Put the recipe's adapter into the base model; raises `UnsupportedModelError` where PEFT has no such adapter."""
    lora = config.model.lora
    return add_lora(
        lm,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        rslora=lora.rslora,
        dora=lora.dora,
        seed=config.seed,
    )


def count_steps(arguments: TrainingArguments, num_examples: int) -> tuple[int, int]:
    """Optimiser steps of an epoch, and of the whole training."""
    batches = num_examples / (arguments.train_batch_size * arguments.world_size)
    whole = max(1, math.floor(batches)) if arguments.dataloader_drop_last else math.ceil(batches)
    an_epoch = math.ceil(whole / arguments.gradient_accumulation_steps)
    return an_epoch, arguments.max_steps if arguments.max_steps > 0 else math.ceil(
        an_epoch * arguments.num_train_epochs
    )


def training_arguments(config: RunConfig, folder: Path, num_examples: int) -> TrainingArguments:
    """The recipe's `trainer` section, with validation and checkpoints at the recipe's interval."""
    settings = dict(config.trainer)
    if on_processors(settings):
        settings["use_cpu"] = True  # the library asks Accelerate again, and would forget the other processes
    arguments = build_arguments(settings, output_dir=folder / CHECKPOINTS, seed=config.seed)
    steps_an_epoch, total = count_steps(arguments, num_examples)
    interval = min(max(1, round(config.evaluation.every * steps_an_epoch)), total)
    return replace(
        arguments,
        eval_strategy="steps",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=None,  # `WholeCheckpoints` deletes old ones
        load_best_model_at_end=True,
        metric_for_best_model="ndcg@10",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # the count of `evaluation.patience`
        # Pinning needs an accelerator; without one the library would warn at every epoch.
        dataloader_pin_memory=arguments.dataloader_pin_memory and torch.cuda.is_available(),
    )


def train(
    config: RunConfig, data: Dataset, folder: Path, *, key: str, trained: str | None, begin: Begin, log: Log
) -> None:
    """Train, keep the best checkpoint by validation NDCG@10, write the bundle.

    Args:
        config: the recipe.
        data: its data.
        folder: the run folder.
        key: hash of everything that training depends on; a checkpoint of other inputs is not resumed.
        trained: the same of the last training that came to its end here.
        begin: what a checkpoint of the same inputs is for.
        log: called with progress lines.

    Raises:
        Stopped: on SIGTERM, after a checkpoint.
        DataError: if no validation case exists, by which the best checkpoint could be chosen.
        ArtifactError: if the folder that the bundle will take the place of holds something else.
    """
    if not len(data.split.validation):
        raise DataError("training needs at least one validation case to choose the best checkpoint by, found none")
    refuse_others(folder / MODEL)  # now, and not after hours
    codes, _ = read_vocab(folder)
    model, tokenizer, peft_model = make_model(config, data, codes, folder, log)
    if config.update.kind != "fixed":
        model.hold_codes()
    if trains_quantizer(config):
        hold_quantizer(model, load_quantizer(folder / CODES / "v0"))
    table = make_examples(config, data)
    arguments = training_arguments(config, folder, len(table))
    sharded, writes = asks_for_fsdp(config.trainer), arguments.should_save
    last = last_checkpoint(folder / CHECKPOINTS, key, trained, begin, sharded=sharded, writes=writes, log=log)
    stop = StopOnSignal()
    whole = WholeCheckpoints(keep=config.trainer.get("save_total_limit", OURS["save_total_limit"]))
    callbacks = [MetricsLog(folder / METRICS_LOG), Progress(log), whole, stop]
    trainer = _trainer(config, data, model, tokenizer, table, folder, arguments, callbacks, log)
    stop_if_finished(trainer.args, last, count_steps(arguments, len(table))[0])
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log(f"  {trainable:,} trainable parameters, {len(table):,} examples{_idle_devices(arguments)}")
    try:
        with limits(arguments, folder):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    finally:
        stop.release()
    if stop.stopped:
        raise Stopped
    state = trainer.state
    at = f"step {state.best_global_step:,} of {state.global_step:,}"
    log(f"  best validation NDCG@10 {state.best_metric:.4f} at {at}")
    if is_sharded(model):
        model, tokenizer, peft_model = _whole(config, data, codes, folder, trainer, log)
    validation, repeats, by_repeats = measure_all(config, model, tokenizer, data.split.validation, log)
    if arguments.should_save:
        if trainer.updates is not None:
            saved, later = keep_versions_until(folder, model.vocab.codes)
            model.take_codes(saved)
            log(
                f"  the best model has item codes {newest_version(folder).name}"
                + (f"; {later} later version{'s' if later > 1 else ''} removed" if later else "")
            )
        else:
            keep_versions_until(folder, codes)  # later ones are of items that `extend` gave to a model before this one
        effort = trainer.effort
        quantizer = keep_quantizer(folder, model)
        alone = make_recommender(config, data, model, tokenizer, peft_model, quantizer, repeats=repeats)
        seconds = effort.seconds
        recommender, shares = with_rescoring(config, data, alone, log)
        flops = training_flops(model, effort.positions, effort.context_positions)
        facts = _took(trainer, seconds, flops, trainable, shares)
        facts |= by_repeats | ({"repeats": shares["repeats"]} if "repeats" in shares else {})
        write_json(folder / TRAINING, {**facts, "validation": chosen_metrics(shares) or validation})
        weights = token_figures(trainer.objective, table)
        _write_figures(folder, {TOKEN_WEIGHTS: weights, ITEM_PATHS: path_figures(model), RESCORING: shares})
        for name in MEASURED:
            (folder / name).unlink(missing_ok=True)  # of the model before this one
        recommender.save_pretrained(folder / MODEL)


def _idle_devices(arguments: TrainingArguments) -> str:
    """What a line of the log says where GPUs have nothing to do."""
    idle = torch.cuda.device_count() - 1 if arguments.device.type == "cuda" and arguments.world_size == 1 else 0
    return f"; {idle} more GPUs are idle, which `accelerate launch` would use" if idle > 0 else ""


def _write_figures(folder: Path, figures: dict[str, dict[str, Any]]) -> None:
    """Write down what the report shows of this kind of run, by the name of the file."""
    for name, found in figures.items():
        if found:
            write_json(folder / name, found)


def _whole(
    config: RunConfig, data: Dataset, codes: ItemCodes, folder: Path, trainer: ItemTokenTrainer, log: Log
) -> tuple[ItemTokenModel, PreTrainedTokenizerBase, PeftModel | None]:
    """As `make_model`, with the weights of the best checkpoint of a training that sharded them."""
    best = trainer.state.best_model_checkpoint
    assert best is not None
    model, tokenizer, peft_model = make_model(config, data, codes, folder, log)
    model.load_state_dict(load_file(Path(best) / "model.safetensors"))
    return model.to(trainer.args.device), tokenizer, peft_model


def _took(
    trainer: ItemTokenTrainer, seconds: float, flops: float, trainable: int, shares: Mapping[str, Any]
) -> dict[str, Any]:
    """Facts about a finished training; seconds and parameters with those of a dense model, arithmetic without.

    Args:
        trainer: that has ended.
        seconds: that it took, without the dense model and the choice of its share.
        flops: that it took, estimated.
        trainable: parameters.
        shares: of a dense model (`with_rescoring`); empty where there is none.
    """
    dense = shares.get("training", {"seconds": 0.0, "parameters": 0})
    seconds += dense["seconds"] + shares.get("choosing_seconds", 0.0)
    state, effort = trainer.state, trainer.effort
    key = "validation/ndcg@10"
    return {
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "targets_seen": effort.targets,
        "flops": flops,
        "seconds": round(seconds, 3),
        "peak_mb": round(effort.peak_mb),
        "parameters": trainable + dense["parameters"],
        "kind": "decoder" if trainer.effort.context_positions == 0 else "encoder-decoder",
        "made_by": environment(),
        "curve": [[line["step"], line[key]] for line in state.log_history if key in line],
    }


def _trainer(
    config: RunConfig,
    data: Dataset,
    model: ItemTokenModel,
    tokenizer: PreTrainedTokenizerBase,
    table: ExampleTable,
    folder: Path,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
    log: Log,
) -> ItemTokenTrainer:
    """The trainer of a recipe, ready to run."""
    tasks = [task for task, weight in config.examples.tasks.items() if weight > 0]
    texts = data.catalog.titles if set(tasks) - {"next-item"} else ()
    fixed = config.update.kind == "fixed"
    binding = None if fixed else LateBinding(model, names=config.update.kind == "bilevel")
    vocab = model.vocab if binding is None else binding.placeholders()
    prompts = Prompts.of(model, tokenizer, texts, vocab=vocab)
    vectors = partial(item_vectors, config, data, folder, log)
    repeats = config.evaluation.repeats != "drop"  # whoever leaves the choice to validation trains as if they came out
    validate = Validation(config, model, tokenizer, data.split.validation, repeats=repeats)
    aim = make_aim(config, model, prompts, Collator(prompts, model.vocab.num_levels), table, vectors)
    updates = None
    if binding is not None:
        steps = count_steps(arguments, len(table))
        around = Surroundings(model, prompts, binding, table, aim, arguments, steps)
        updates = make_updates(config, data, around, validate=validate, vectors=vectors, folder=folder, log=log)
        aim = with_alignments(aim, model, updates)
    callbacks = [*aim.callbacks, *callbacks]
    if config.evaluation.patience:
        callbacks = [*callbacks, EarlyStoppingCallback(early_stopping_patience=config.evaluation.patience)]
    chosen = ShardedTrainer if asks_for_fsdp(config.trainer) else ItemTokenTrainer
    trainer = chosen(
        model=model,
        args=arguments,
        train_dataset=table,
        eval_dataset=table.select([0]),  # validation ranks cases; Trainer only asks that something is here
        data_collator=aim.collator,
        objective=aim.objective,
        validate=validate,
        bind=binding,
        updates=updates,
        callbacks=callbacks,
    )
    for library_printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(library_printer)
    return trainer


def _told(vectors: dict[str, Any]) -> dict[str, Any]:
    """What a bundle says of its item vectors: not by which folder here, whose name could be another's."""
    told = redacted(vectors)
    return told if told.get("model") == vectors.get("model") else {**told, "model": None}


def make_recommender(
    config: RunConfig,
    data: Dataset,
    model: ItemTokenModel,
    tokenizer: PreTrainedTokenizerBase,
    peft_model: PeftModel | None,
    quantizer: Quantizer | None,
    *,
    repeats: bool = True,
) -> Recommender:
    """The trained model as what users load: an adapter beside its base, or a whole model."""
    name = config.model.name
    layout = "merged" if name == "scratch" or peft_model is None else "adapter"
    place = str(Path(name).resolve()) if Path(name).exists() else name
    generation = Generation(
        layout=layout,
        base=place if layout == "adapter" else None,  # a whole model needs none, and a path tells of this machine
        # The very commit, since a branch moves on and an adapter is of no use beside other weights.
        revision=hub.commit_of(name, config.model.revision) or config.model.revision if layout == "adapter" else None,
        normaliser=decode_normaliser(config),
        training_normaliser=config.objective.normaliser,
        beam=config.evaluation.beam,
        history_length=config.examples.history_length,
        mask_seen=config.evaluation.mask_seen,
        catalog_sha256=data.catalog.sha256,
        codes_sha256=model.vocab.codes.sha256,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        items_sha256=items_sha256(data.catalog.item_ids),
        protocol={name: value for name, value in config.to_dict()["data"].items() if name in PROTOCOL},
        vectors=_told(config.to_dict()["vectors"]) if needs_vectors(config) else {},
        reads=model.reads,
        repeats=repeats,
    )
    return Recommender(
        model,
        tokenizer,
        item_ids=data.catalog.item_ids,
        titles=data.catalog.titles,
        generation=generation,
        peft_model=peft_model,
        quantizer=quantizer,
    )

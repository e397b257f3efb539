"""The recipe's `trainer` section as `transformers.TrainingArguments`: none mirrored, all checked.

Names, types and defaults are the installed library's own, read off its annotations, so a new release brings its
settings without a change here. Added are: the hint for a name that a release took away, ranges (the library accepts
a learning rate of -1), and a refusal, with the reason, of what the pipeline itself decides. Accepted values reach
the library as they were written.

Validation is not the library's: `evaluation` in the recipe ranks the whole catalogue, keeps the best model by
NDCG@10 and stops early, hence `eval_*`, `load_best_model_at_end` and their kin are refused here.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from llm_itemtok.errors import RecipeError
from llm_itemtok.strict import Checker, Within, type_name

_VALIDATION = (
    "validation ranks the whole catalogue: see `evaluation.every`, `evaluation.patience`, `evaluation.batch_size`"
)
_PUSH = "a training pushes nothing; `itemtok push` does, when it is finished"

CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
"""What the installed library calls computing states anew; up to transformers 5.22 it is the second name alone."""

OWNED: Mapping[str, str] = {
    "output_dir": "checkpoints go into the run folder: `--out`",
    "seed": "one seed rules the whole run: write `seed` at the top of the recipe",
    "data_seed": "one seed rules the whole run: write `seed` at the top of the recipe",
    "resume_from_checkpoint": "a run goes on with `--resume`",
    "do_train": "stages are chosen with `--from` and `--until`",
    "do_eval": "stages are chosen with `--from` and `--until`",
    "do_predict": "stages are chosen with `--from` and `--until`",
    "remove_unused_columns": "batches are made by our collator, whose columns are all used",
    "label_names": "batches are made by our collator, and the objective knows its targets",
    "label_smoothing_factor": "the library's smoothing would bypass the objective: write `objective.label_smoothing`",
    "neftune_noise_alpha": "its noise would reach text tokens alone: write `model.input_dropout`",
    "average_tokens_across_devices": "the loss is divided by the targets of all processes, always",
    "save_strategy": "a checkpoint is written at every validation: see `evaluation.every`",
    "save_steps": "a checkpoint is written at every validation: see `evaluation.every`",
    "save_only_model": "a checkpoint must hold all that `--resume` needs",
    "restore_callback_states_from_checkpoint": "a resumed run always goes on counting `evaluation.patience`",
    "local_rank": "the launcher sets it",
    "parallelism_config": "it is an object: set it in the configuration file of `accelerate launch`",
    **dict.fromkeys(
        (
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "per_device_eval_batch_size",
            "prediction_loss_only",
            "batch_eval_metrics",
            "include_for_metrics",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
        ),
        _VALIDATION,
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        _PUSH,
    ),
}
"""Settings that the pipeline decides → what to write instead, or why there is nothing to write."""

REMOVED: Mapping[str, str] = {
    "evaluation_strategy": _VALIDATION,
    "group_by_length": "write `trainer.train_sampling_strategy: group_by_length`",
    "warmup_ratio": "write `trainer.warmup_steps` with a share of the steps, such as 0.1",
    "logging_dir": "it is gone; trackers have settings of their own",
    "overwrite_output_dir": "it is gone; `--fresh` starts a run folder anew",
    "save_safetensors": "it is gone; weights are always safetensors",
    "no_cuda": "write `trainer.use_cpu: true`",
    "use_mps_device": "it is gone; the device is found",
    "per_gpu_train_batch_size": "write `trainer.per_device_train_batch_size`",
    "lr": "write `trainer.learning_rate`",
    "tokenizer": "the recipe's `model.name` decides it",
    "torch_dtype": "write `model.dtype`",
    "dtype": "write `model.dtype`",
    "batch_size": "write `trainer.per_device_train_batch_size`",
    "epochs": "write `trainer.num_train_epochs`",
}
"""Names of earlier releases, and of other libraries, that are not in the installed one → what to write."""

_COUNT, _NOT_NEGATIVE, _SHARE = Within(low=1), Within(low=0), Within(low=0, below=1)
RANGES: Mapping[str, Within] = {
    "num_train_epochs": Within(above=0),
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Within(above=0),
    "logging_steps": Within(above=0),
    "save_total_limit": Within(low=2),  # the best checkpoint and the newest, which `--resume` goes on from
    "torch_empty_cache_steps": _COUNT,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
}
"""What the library accepts but cannot mean."""

OURS: Mapping[str, Any] = {"report_to": "none", "save_total_limit": 2, "ddp_timeout": 86_400}
"""Defaults that are not the library's: no tracker; the best checkpoint and the newest, which `--resume` goes on from; a
day, as processes wait while the main one prepares or measures."""

_SHARE_OR_COUNT = ("warmup_steps", "logging_steps")
_ALSO: Mapping[str, Any] = {"fsdp": bool | str | None}
"""Types that the library takes beside what its annotation says."""


class OneDevice(TrainingArguments):
    """The library's arguments for processes that train on one device each.

    Where a machine has several GPUs and nobody launched several processes, the library would spread one process over
    all of them (`nn.DataParallel`): with batches that are larger than the recipe says, and losses that are wrong where
    parts of a batch belong together.
    """

    @property
    def n_gpu(self) -> int:
        """Devices that this process trains on."""
        return min(super().n_gpu, 1)


def explain_setting(name: str) -> str:
    """Say what a setting of the `trainer` section means, what it takes and what it is by default, as the library does.

    Raises:
        RecipeError: if there is no such setting, or the pipeline decides it; the message names `trainer.x`.
    """
    _check_name(name, Checker("explain"))
    field = TrainingArguments.__dataclass_fields__[name]
    annotation = typing.get_type_hints(TrainingArguments, include_extras=True)[name]
    takes = f"one of {', '.join(field.metadata['choices'])}" if "choices" in field.metadata else type_name(annotation)
    library = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = json.dumps(OURS.get(name, library))
    given = f"{takes}{f' {RANGES[name]}' if name in RANGES else ''}; default {default}"
    return f"  trainer.{name}: {field.metadata.get('help', 'see transformers.TrainingArguments.')}\n      ({given})"


def check_settings(settings: Mapping[str, Any], *, source: str = "recipe") -> None:
    """Check a `trainer` section without building anything, so without touching a device.

    Args:
        settings: names and values of `transformers.TrainingArguments`, as read from YAML.
        source: what a message starts with: the recipe's path.

    Raises:
        RecipeError: for a name that does not exist or that the pipeline decides, a value of another type or out of
            range, and values that contradict each other; the message names `trainer.x`.
    """
    checker = Checker(source)
    annotations = typing.get_type_hints(TrainingArguments, include_extras=True)
    fields = TrainingArguments.__dataclass_fields__
    for name, value in settings.items():
        _check_name(name, checker)
        path = ("trainer", name)
        checked = checker.value(_ALSO.get(name, annotations[name]), value, path)
        choices = fields[name].metadata.get("choices")
        if choices and isinstance(value, str) and value not in choices:
            checker.fail(path, f"must be one of {', '.join(str(choice) for choice in choices)}, was: {value!r}")
        if name in RANGES and checked is not None:
            checker.value(Annotated[float, RANGES[name]], value, path)
    _check_together(settings, checker)


def _check_name(name: str, checker: Checker) -> None:
    """Refuse what is no setting, or none for a recipe."""
    path, fields = ("trainer", name), TrainingArguments.__dataclass_fields__
    if name in OWNED:
        checker.fail(path, f"is not for the recipe to set; {OWNED[name]}")
    if name in fields:
        return
    if name in REMOVED:
        checker.fail(path, f"is not a setting of the installed transformers; {REMOVED[name]}")
    checker.fail_unknown(path, set(fields) - set(OWNED))


def _check_together(settings: Mapping[str, Any], checker: Checker) -> None:
    steps = settings.get("max_steps", -1)
    if steps != -1 and steps < 1:
        checker.fail(("trainer", "max_steps"), f"must be at least 1, or -1 to go by epochs, was: {steps}")
    for name in _SHARE_OR_COUNT:
        value = settings.get(name, 1)
        if value > 1 and value != int(value):
            checker.fail(("trainer", name), f"must be a share below 1 or a whole number of steps, was: {value}")
    if settings.get("fp16") and settings.get("bf16"):
        checker.fail(("trainer", "fp16"), "and `trainer.bf16` are both true; choose one")
    if settings.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
        checker.fail(
            ("trainer", "lr_scheduler_type"),
            f"must not wait for the library's own evaluation, which does not run, was: {settings['lr_scheduler_type']}",
        )
    if settings.get("dataloader_prefetch_factor") is not None and not settings.get("dataloader_num_workers"):
        checker.fail(("trainer", "dataloader_prefetch_factor"), "needs `trainer.dataloader_num_workers` of at least 1")


def build_arguments(
    settings: Mapping[str, Any], *, output_dir: Path | str, seed: int, source: str = "recipe"
) -> TrainingArguments:
    """Build the library's arguments out of a `trainer` section and what the pipeline decides.

    Nothing is reported to a tracker unless `report_to` says so.

    Args:
        settings: names and values of `transformers.TrainingArguments`, as read from YAML.
        output_dir: folder for checkpoints.
        seed: of the order of examples, dropout and everything else random while training.
        source: what a message starts with: the recipe's path.

    Raises:
        RecipeError: as `check_settings`, and for what the library finds impossible on this machine, such as bf16 on
            a device without it.
    """
    check_settings(settings, source=source)
    given = {"report_to": OURS["report_to"], **settings}
    try:
        arguments = OneDevice(
            output_dir=str(output_dir),
            seed=seed,
            data_seed=seed,
            remove_unused_columns=False,
            eval_strategy="no",
            **given,
        )
        get_reporting_integration_callbacks(arguments.report_to)  # refuses names that no tracker has
    except (ValueError, ImportError, TypeError) as error:
        raise RecipeError(f"{source}: `trainer` cannot be carried out here: {error}") from error
    return arguments

"""Which engine trains on several processes, and what it cannot do here, refused before anything is trained.

The engine is the launcher's choice (`accelerate launch --config_file recipes/accelerate/X.yaml`), or FSDP the recipe's
(`trainer.fsdp`); nothing of the recipe's meaning may hang on it. Accelerate passes over in silence what it cannot do:
FSDP and DeepSpeed on CPUs or in one process are plain training there, and a precision in the launcher's file overrules
the recipe's. Here both are errors, and so is every setting of an engine under which this project was not tested.

What is decided: DDP for everything. FSDP2 for item tokens that stay what they are and weights that are not quantised.
DeepSpeed not at all, as nothing could be tested with it: `recipes/accelerate` says what a test would have to show.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.objective_settings import TokenWeightedObjective
from llm_itemtok.training.arguments import CHECKPOINTING

UNSHARDED_DEVICES = ("cpu", "mps")
"""Where Accelerate trains without FSDP whatever it is asked for."""


class _Fixed(NamedTuple):
    """A setting of FSDP that must be one thing.

    Attributes:
        name: in the launcher's file after `fsdp_`, in a recipe's `trainer.fsdp_config` without.
        variable: in which the launcher hands it on, after `FSDP_`.
        launched: what it is where the launcher says nothing.
        trained: what it is where the recipe asks for FSDP and says nothing else.
        wanted: what it must be.
        reason: why.
    """

    name: str
    variable: str
    launched: str
    trained: str
    wanted: str
    reason: str


_FSDP = (
    _Fixed("version", "VERSION", "1", "2", "2", "parts of a model that the first version shards cannot be called"),
    _Fixed(
        *("state_dict_type", "STATE_DICT_TYPE", "SHARDED_STATE_DICT", "FULL_STATE_DICT", "FULL_STATE_DICT"),
        "the model is made of a checkpoint that has all weights in one file",
    ),
    _Fixed(
        *("cpu_ram_efficient_loading", "CPU_RAM_EFFICIENT_LOADING", "false", "false", "false"),
        "it would hand on what checkpoints hold, and they leave the frozen weights out",
    ),
    _Fixed("cpu_offload", "OFFLOAD_PARAMS", "false", "false", "false", "it was not tested"),
    _Fixed(
        *("activation_checkpointing", "ACTIVATION_CHECKPOINTING", "false", "false", "false"),
        f"it was not tested; write `trainer.{CHECKPOINTING}: true` in the recipe",
    ),
)

_ONE = ("TP", "CP", "SP", "DP_REPLICATE")
"""Ways to be parallel of which none was tested."""


def asks_for_fsdp(trainer: Mapping[str, Any]) -> bool:
    """Whether a recipe's `trainer` section, or the launcher, asks for FSDP."""
    return bool(trainer.get("fsdp")) or _is_on("ACCELERATE_USE_FSDP")


def on_processors(trainer: Mapping[str, Any]) -> bool:
    """Whether the processes of a launcher work on CPUs: by the recipe's `trainer.use_cpu`, or where there is no other.

    Accelerate asks to be told: without it, processes on a machine without accelerators would each train by themselves.
    """
    return bool(trainer.get("use_cpu")) or (
        int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    )


def refuse_engine(config: RunConfig, *, here: bool) -> None:
    """Refuse what the engine that is asked for cannot do.

    Args:
        config: the recipe.
        here: training is to take place on this machine and in this group of processes; otherwise this is only asked of
            what the launcher, if there is one, says.

    Raises:
        RecipeError: with what to change.
    """
    for complaint in _complaints(config, here=here):
        raise RecipeError(complaint)


def _complaints(config: RunConfig, *, here: bool) -> Iterator[str]:
    trainer = config.trainer
    yield from _precision_complaints(trainer)
    if _is_on("ACCELERATE_USE_DEEPSPEED") or trainer.get("deepspeed"):
        yield (
            "DeepSpeed is asked for, but nothing of this project was tested with it: validation calls parts of the "
            "model, whose weights it may hold in pieces; launch with recipes/accelerate/fsdp2.yaml, which shards the "
            "same, or ddp.yaml"
        )
    if _is_on("ACCELERATE_USE_MEGATRON_LM"):
        yield "Megatron-LM is asked for, but has models of its own; launch with recipes/accelerate/ddp.yaml"
    for way in _ONE:
        if int(os.environ.get(f"PARALLELISM_CONFIG_{way}_SIZE", "1")) > 1:
            yield (
                f"`parallelism_config_{way.lower()}_size` in the launcher's file must be 1, was: "
                f"{os.environ[f'PARALLELISM_CONFIG_{way}_SIZE']}; models are sharded over all processes, or not at all"
            )
    if asks_for_fsdp(trainer):
        yield from _fsdp_complaints(config, here=here or _is_on("ACCELERATE_USE_FSDP"))


def _precision_complaints(trainer: Mapping[str, Any]) -> Iterator[str]:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    recipe = next((name for name in ("bf16", "fp16") if trainer.get(name)), "no")
    if launcher not in ("no", recipe):
        yield (
            f"the launcher's `mixed_precision: {launcher}` would train what the recipe does not say; write "
            f"`trainer.{launcher}: true` in the recipe, or `mixed_precision: 'no'` in the launcher's file"
        )


def _fsdp_complaints(config: RunConfig, *, here: bool) -> Iterator[str]:
    if config.update.kind != "fixed":
        yield (
            f"`update.kind: {config.update.kind}` must be able to take weights back, which FSDP shards; launch with "
            "recipes/accelerate/ddp.yaml, or write `update.kind: fixed`"
        )
    if config.model.quantization != "none":
        yield (
            f"`model.quantization: {config.model.quantization}` packs weights, and FSDP cannot cut packed ones; launch "
            "with recipes/accelerate/ddp.yaml, or write `model.quantization: none`"
        )
    if isinstance(config.objective, TokenWeightedObjective) and config.objective.mix == "learned":
        yield (
            "`objective.mix: learned` is read between the steps, where FSDP has cut it; launch with "
            "recipes/accelerate/ddp.yaml, or write `objective.mix: frozen`"
        )
    given = _fsdp_config(config.trainer)
    for setting in _FSDP:
        found = given.get(setting.name, setting.trained)
        if not config.trainer.get("fsdp"):
            found = os.environ.get(f"FSDP_{setting.variable}", setting.launched)
        if found.lower() != setting.wanted.lower():
            yield f"`fsdp_{setting.name}` must be {setting.wanted}, was: {found}; {setting.reason}"
    if not here:
        return
    state = PartialState()
    if state.device.type in UNSHARDED_DEVICES:
        yield (
            f"FSDP is asked for, but the processes work on {state.device.type}, where Accelerate trains without it "
            "and does not say so; launch with recipes/accelerate/cpu-2.yaml, or on GPUs"
        )
    if state.num_processes < 2:
        yield "FSDP shards over processes, of which there must be at least 2, was: 1; launch more, or without FSDP"


def _fsdp_config(trainer: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe says of FSDP beside that it wants it; the library takes a file, too, and names with a prefix."""
    chosen: Any = trainer.get("fsdp_config") or {}
    if isinstance(chosen, str):
        chosen = json.loads(Path(chosen).read_text(encoding="utf-8"))
    return {key.removeprefix("fsdp_"): str(value) for key, value in chosen.items()}


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"

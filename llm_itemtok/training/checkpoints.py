"""Checkpoints that are whole: told by their checksums, kept as many as asked for, and found again.

The library writes the files of a checkpoint one by one, so a kill in between leaves a folder that looks like one. Here
a checkpoint is whole when a list of its files and their hashes stands in it, which is written last, in one step. One
that a kill cut short has no list; in one that a disk damaged later some file differs from it. Neither is gone on from:
the newest one that is whole is, and that knows a best one that is whole, or none yet. What comes after it is trained
again, to the same results.

Old ones are deleted here, after the list of the new one stands, and not by the library, which would do it before.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_itemtok.artifacts import CHECKPOINTS, read_json, sha256_of_file, write_json
from llm_itemtok.errors import ArtifactError

CHECKSUMS, TRAINER_STATE = "checksums.json", "trainer_state.json"
"""In a checkpoint: the list of its files; the library's account of the training so far."""
SHARDED = "pytorch_model_fsdp.bin"
"""In a checkpoint of a training that shards the model: the library's own copy of it."""
KEY = "key.json"
"""Beside the checkpoints: the hash of the inputs that they were trained on."""
Begin = Literal["new", "resume", "again"]
"""A checkpoint of the same inputs is an error, or what training goes on from, or thrown away."""


class WholeCheckpoints(TrainerCallback):
    """Writes the checksums of each checkpoint, and deletes those that are no longer wanted."""

    def __init__(self, keep: int | None) -> None:
        """Keep at most so many, at least 2: the best one, and the newest ones; all of them if None."""
        self.keep = keep

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Find the best checkpoint where it is now: the folder may have been moved since."""
        if state.best_model_checkpoint is not None:
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / Path(state.best_model_checkpoint).name)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal the checkpoint of this step."""
        folder = Path(str(args.output_dir))
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes a file of its own
        if args.should_save:
            seal(folder / f"checkpoint-{state.global_step}")
            if self.keep is not None:
                best = state.best_model_checkpoint
                _delete_old(folder, self.keep, None if best is None else Path(best).name)


def seal(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files and their hashes, after what is in them has reached the disk."""
    for name in _files(checkpoint):
        with (checkpoint / name).open("rb") as file:
            os.fsync(file.fileno())
    write_json(checkpoint / CHECKSUMS, {name: sha256_of_file(checkpoint / name) for name in _files(checkpoint)})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        listed = read_json(checkpoint / CHECKSUMS)
    except ArtifactError:
        return "its list of files is missing or cut short, so it was not written to its end"
    found = set(_files(checkpoint))
    if missing := sorted(set(listed) - found):
        return f"{missing[0]} is missing"
    for name, sha256 in sorted(listed.items()):
        if sha256_of_file(checkpoint / name) != sha256:
            return f"{name} is not what was written"
    return None


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from.

    Args:
        folder: that holds checkpoints, or is not there.
        say: told of those that are damaged.

    Returns:
        The newest one that is whole, and whose best one is; None if there is none.
    """
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        wrong = damage(checkpoint)
        if wrong is None:
            best = read_json(checkpoint / TRAINER_STATE)["best_model_checkpoint"]
            place = None if best is None else folder / Path(best).name
            if place is None or place == checkpoint or (wrong := damage(place)) is None:
                return checkpoint
            wrong = f"the best one that it knows, {place.name}, is damaged: {wrong}"
        say(f"  {checkpoint.name} cannot be gone on from: {wrong}")
    return None


def foreign(checkpoint: Path, *, processes: int, sharded: bool) -> str | None:
    """Why training that is cut up in another way than a checkpoint's would not be the same, in words; None if it is.

    The library would leave out what it does not find, such as the optimiser of another engine, and say nothing.

    Args:
        checkpoint: that is whole.
        processes: that are to go on from it.
        sharded: whether they shard the model by FSDP.
    """
    there = len(list(checkpoint.glob("rng_state*.pth")))
    if there != processes:
        return (
            f"{checkpoint}: training goes on with as many processes as it began with, or its steps would be of another "
            f"batch; it began with {there}, was: {processes}; launch {there}, or begin anew with `--from train`"
        )
    if (checkpoint / SHARDED).is_file() != sharded:
        began, now = ("without FSDP", "with it") if sharded else ("with FSDP", "without it")
        return (
            f"{checkpoint}: training goes on with the engine that it began with, as each writes its optimiser in its "
            f"own way; it began {began}, was: {now}; launch it as then, or begin anew with `--from train`"
        )
    return None


def stop_if_finished(arguments: TrainingArguments, checkpoint: Path | None, steps_an_epoch: int) -> None:
    """Let a trainer that goes on from a checkpoint behind which nothing was left load the best one, and no more.

    The library looks whether training is over after a step only, so it would train one too many.

    Args:
        arguments: of the trainer, changed in place.
        checkpoint: that is gone on from, if one is.
        steps_an_epoch: optimiser steps.
    """
    if checkpoint is not None and _is_finished(checkpoint):
        arguments.max_steps, arguments.num_train_epochs = -1, _step(checkpoint) // steps_an_epoch


def _is_finished(checkpoint: Path) -> bool:
    """Whether all steps, or all patience, were used up."""
    state = read_json(checkpoint / TRAINER_STATE)
    stopping = state["stateful_callbacks"].get("EarlyStoppingCallback")
    if stopping is None:
        return bool(state["global_step"] >= state["max_steps"])
    patience, used = (
        stopping["args"]["early_stopping_patience"],
        stopping["attributes"]["early_stopping_patience_counter"],
    )
    return bool(used >= patience or state["global_step"] >= state["max_steps"])


def remove_after(folder: Path, checkpoint: Path) -> None:
    """Delete the checkpoints after one that training goes on from: they belong to a future that is not had yet."""
    for other in _checkpoints(folder):
        if _step(other) > _step(checkpoint):
            shutil.rmtree(other)


def _delete_old(folder: Path, keep: int, best: str | None) -> None:
    """Delete all but the best checkpoint and the newest ones, `keep` in all."""
    by_age = sorted(_checkpoints(folder), key=_step, reverse=True)
    wanted = [path for path in by_age if path.name == best]
    others = [path for path in by_age if path.name != best]
    for path in others[keep - len(wanted) :]:
        shutil.rmtree(path)


def refuse_to_forget(folder: Path, key: str, trained: str | None) -> None:
    """Raise `ArtifactError` if a run folder holds checkpoints of a training that was cut short and had other inputs.

    Asked before any stage is run, because what comes before a training, such as codes, belongs to its checkpoints.

    Args:
        folder: the run folder.
        key: hash of the inputs that a training would have now.
        trained: the same of the last training that came to its end, whose checkpoints are of no more use.
    """
    note = folder / CHECKPOINTS / KEY
    if not note.is_file() or read_json(note) in (key, trained) or not _checkpoints(note.parent):
        return
    raise ArtifactError(
        f"{note.parent} holds checkpoints of a training that was cut short, with another recipe, data, base model or "
        "version of this package; put those back to go on with it, or begin anew with `--from data`, which deletes them"
    )


def last_checkpoint(
    folder: Path,
    key: str,
    trained: str | None,
    begin: Begin,
    *,
    sharded: bool,
    writes: bool,
    log: Callable[[str], None],
) -> Path | None:
    """The checkpoint to go on from, if it was trained on the same inputs; others, of trainings that ended, are deleted.

    All processes ask together.

    Args:
        folder: of the checkpoints; need not be there.
        key: hash of everything that training depends on.
        trained: the same of the last training that came to its end, whose checkpoints only `resume` goes on from.
        begin: what a checkpoint of the same inputs is for.
        sharded: whether weights are sharded now.
        writes: whether this process deletes and writes.
        log: called with what is gone on from, and with each checkpoint that is passed over.

    Raises:
        ArtifactError: if there is one of the same inputs that nobody asked to go on from, so that no work is lost by
            oversight; or one that cannot be gone on from in this way.
    """
    note = folder / KEY
    processes, newest = PartialState().num_processes, None
    wanted = begin == "resume" or (begin == "new" and key != trained)
    if PartialState().is_main_process and wanted and note.is_file() and read_json(note) == key:
        newest = newest_whole(folder, log)
    complaint = newest and foreign(newest, processes=processes, sharded=sharded)
    if newest and not complaint and begin == "new":
        complaint = (
            f"{folder} holds checkpoints of this very training, up to {newest.name}; go on from there with --resume, "
            "or begin anew with `--from train`"
        )
    found: list[Any] = [newest, complaint]
    broadcast_object_list(found)  # reading all of it is the work of one process; nobody deletes before it has looked
    newest, complaint = found
    if complaint:
        raise ArtifactError(complaint)
    if newest is not None:
        if writes:
            remove_after(folder, newest)
        log(f"  resumed from {newest.name}")
        return newest
    if begin == "resume":
        log("  nothing to resume from: no checkpoint of these inputs; training starts over")
    if writes:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(note, key)
    return None


def _files(checkpoint: Path) -> list[str]:
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS)


def _checkpoints(folder: Path) -> list[Path]:
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    return [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])

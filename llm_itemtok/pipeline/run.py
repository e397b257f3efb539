"""Carry a recipe out: from any stage to any stage, each once for its inputs."""

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout

from llm_itemtok.artifacts import CODES, remove_leftovers
from llm_itemtok.config import RunConfig
from llm_itemtok.data.describe import describe, describe_text
from llm_itemtok.errors import ArtifactError, RecipeError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.pipeline import evaluate, fit, prepare, stages, vocabulary
from llm_itemtok.pipeline.engines import on_processors, refuse_engine
from llm_itemtok.report.page import write_report
from llm_itemtok.training.arguments import OURS, check_settings
from llm_itemtok.training.checkpoints import Begin, refuse_to_forget

IN_USE = "only one process may work in a folder, and another does now"
"""What a second process is told."""

SHARED = ("train", "evaluate")
"""Stages that all processes of a distributed run carry out together; the main one does the others alone."""


def run(
    config: RunConfig,
    out: Path | str,
    *,
    start: str | None = None,
    until: str | None = None,
    resume: bool = False,
    fresh: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Carry a recipe out.

    Args:
        config: the recipe.
        out: run folder; made when missing. Stages finished there with the same inputs are not run again.
        start: run this stage and all after it again.
        until: the last stage to run.
        resume: let training go on from its last checkpoint; without it, or `start`, one that is there is an error.
        fresh: empty the folder first.
        log: called with progress lines, on the main process only.

    Returns:
        The run folder.

    Raises:
        ItemTokError: for everything wrong with the recipe, the data or the folder, before anything is done.
        Stopped: on SIGTERM while training, after a checkpoint.
    """
    folder = Path(out)
    last = _last_stage(start, until)
    check_settings(config.trainer)
    patience = timedelta(seconds=config.trainer.get("ddp_timeout", OURS["ddp_timeout"]))
    state = PartialState(cpu=on_processors(config.trainer), timeout=patience)
    refuse_engine(config, here=last >= stages.STAGE_NAMES.index("train"))
    say = log if state.is_main_process else lambda _line: None
    data = prepare.load_data(config.data, config.seed, config.evaluation.segments)
    prepare.refuse_textless(config, data.catalog)
    keys = stages.keys(config, data.sha256, stages.input_hashes(config), data.segments_sha256)
    if state.is_main_process:
        stages.refuse_unless_run(folder)  # before there is a lock beside it
    if start is not None:
        stages.Stages.open(folder, fresh=fresh, writes=False).require_before(start, keys)
    state.wait_for_everyone()  # nobody writes before everybody has read
    with alone_in(folder) if state.is_main_process else nullcontext():
        book = stages.Stages.open(folder, fresh=fresh, writes=state.is_main_process)
        if start is not None:
            book.require_before(start, keys)
        state.wait_for_everyone()
        if state.is_main_process:
            stages.claim(folder, config, fresh=fresh, book=book, keys=keys)
            remove_leftovers(folder)
        state.wait_for_everyone()
        if start is not None:
            book.forget_from(start)
        begin: Begin = "resume" if resume else "new" if start is None else "again"
        if begin != "again" and state.is_main_process:
            refuse_to_forget(folder, keys["train"], book.trained)
        for stage in stages.STAGE_NAMES[: last + 1]:
            if book.done(stage, keys[stage]):
                say(f"{stage}: done before, kept")
                continue
            say(f"{stage}:")
            book.forget_from(stage)  # what comes after it was made of something else
            began = time.perf_counter()
            if stage in SHARED or state.is_main_process:
                _carry_out(stage, config, data, folder, keys[stage], book.trained, begin, say)
            state.wait_for_everyone()
            book.mark(stage, keys[stage])
            say(f"{stage}: finished in {time.perf_counter() - began:.0f} s")
    return folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which the system gives back also when the process is killed.

    Raises:
        ArtifactError: if another process holds it.
    """
    folder = folder.resolve()  # `.` has a name, too
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")  # beside it: `--fresh` exchanges the folder itself
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(f"{folder}: {IN_USE}; wait for it, stop it, or choose another `--out`") from None
    try:
        yield
    finally:
        lock.release()


def _last_stage(start: str | None, until: str | None) -> int:
    """Index of the last stage to run."""
    names = stages.STAGE_NAMES
    for flag, stage in (("--from", start), ("--until", until)):
        if stage is not None and stage not in names:
            raise RecipeError(f"`{flag}` must be one of {', '.join(names)}, was: {stage}")
    last = len(names) - 1 if until is None else names.index(until)
    if start is not None and names.index(start) > last:
        raise RecipeError(f"`--from {start}` comes after `--until {until}`; nothing would run")
    return last


def _carry_out(
    stage: str,
    config: RunConfig,
    data: prepare.Dataset,
    folder: Path,
    key: str,
    trained: str | None,
    begin: Begin,
    log: prepare.Log,
) -> None:
    """Run one stage."""
    if stage == "data":
        log(textwrap.indent(describe_text(describe(data.raw, data.split)), "  "))
    elif stage == "items":
        prepare.make_codes(config, data, folder, log)
    elif stage == "vocab":
        vocabulary.make_vocab(config, data, ItemCodes.load(folder / CODES / "v0"), folder, log)
    elif stage == "train":
        fit.train(config, data, folder, key=key, trained=trained, begin=begin, log=log)
    elif stage == "evaluate":
        evaluate.evaluate(config, data, folder, log)
    else:
        log(f"  {write_report(folder)}")

"""A run of `itemtok` in a process that may have to die: at a place in its work, as if the machine had stopped there.

Forked from a server that has imported the libraries, as starting Python takes longer than the runs do.
"""

import functools
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

import llm_itemtok.pipeline.run  # noqa: F401  # what takes its time, once for all children
from llm_itemtok.cli import main
from llm_itemtok.training.self_improve import SelfImprove

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.chaos.child"])

PLACES = ("torch.save", "safetensors", "replace", "rmtree", "update")
"""Where a process can die: in the middle of a file of a checkpoint; before what was written takes its place; while old
checkpoints are deleted; while new codes are proposed."""


class Run:
    """`itemtok run RECIPE --out OUT --resume` in a process of its own; what it says goes to a file beside `OUT`."""

    def __init__(
        self,
        recipe: Path,
        out: Path,
        *,
        said: Path | None = None,
        place: str | None = None,
        count: int = 1,
        delay: float = 0.0,
    ) -> None:
        """Start; die at a place, when it is come to for the `count`-th time, in an update `delay` seconds after."""
        self._said = said or out.with_name(f"{out.name}.txt")
        self._process = SERVER.Process(target=_work, args=(recipe, out, self._said, place, count, delay))
        self._process.start()

    def wait(self, seconds: float) -> int | None:
        """The exit status after so long at most, negative for a signal; None if it is still running."""
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Send a signal, if it is running."""
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def end(self) -> int:
        """Wait for the end, which must come, and return the exit status."""
        status = self.wait(200)
        if status is None:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"still running after 200 seconds:\n{self.said()}")
        return status

    def said(self) -> str:
        """What it said, and all runs of this folder before it."""
        return self._said.read_text(encoding="utf-8")


def _work(recipe: Path, out: Path, said: Path, place: str | None, count: int, delay: float) -> None:
    with said.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if place is not None:
        _arm(place, count, delay)
    sys.exit(main(["run", str(recipe), "--out", str(out), "--resume"]))


def _arm(place: str, count: int, delay: float) -> None:
    """Let this process die when it comes to a place for the `count`-th time."""
    owner, name, last_words = {
        "torch.save": (torch, "save", _half_of_torch_save(torch.save)),
        "safetensors": (safetensors.torch, "save_file", _half_of_save_file),
        "replace": (os, "replace", lambda *_: None),
        "rmtree": (shutil, "rmtree", _half_of_rmtree),
        "update": (SelfImprove, "propose", lambda *_: threading.Timer(delay, _die).start()),
    }[place]
    work, left = getattr(owner, name), itertools.count(count - 1, -1)

    @functools.wraps(work)
    def dying(*args, **kwargs):
        if next(left) == 0:
            last_words(*args)
            if place != "update":
                _die()
        return work(*args, **kwargs)

    setattr(owner, name, dying)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_of_torch_save(save: Callable) -> Callable:
    def half(value, path):
        whole = io.BytesIO()
        save(value, whole)
        Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])

    return half


def _half_of_save_file(tensors, path):
    whole = safetensors.torch.save(tensors)
    Path(path).write_bytes(whole[: len(whole) // 2])


def _half_of_rmtree(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    for path in files[: (len(files) + 1) // 2]:
        path.unlink()

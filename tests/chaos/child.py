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
from llm_itemtok.training.alternate import Alternate
from llm_itemtok.training.bilevel import Bilevel
from llm_itemtok.training.quantizer_optimizer import QuantizerOptimizer
from llm_itemtok.training.self_improve import SelfImprove
from tests.process_pairs import PATIENCE

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.chaos.child"])

PLACES = {"torch.save": 3, "safetensors": 3, "replace": 8, "rmtree": 3}
"""Where a process can die, and how often it comes there at least: in the middle of a file of a checkpoint; before what
was written takes its place; while old checkpoints are deleted."""
SIIT = {"update": 3}
"""While new codes are proposed."""
ETEGREC = {"turn": 3, "batch": 12, "learnt": 12}
"""In a turn of the quantizer: some time after its beginning; before a batch; behind a step that it has taken."""
BLOGER = {"upper": 3, "ahead": 6, "learnt": 6}
"""In a step of the quantizer: some time after its beginning; at the model of the look-ahead, on the way back from
there; behind the step, before codes are read anew."""


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
        """Start; die at a place, when it is come to for the `count`-th time; where that is a time, `delay` after it."""
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
        status = self.wait(PATIENCE)
        if status is None:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"still running after {PATIENCE:g} seconds:\n{self.said()}")
        return status

    def said(self) -> str:
        """What it said, and all runs of this folder before it."""
        return self._said.read_text(encoding="utf-8")


def _work(recipe: Path, out: Path, said: Path, place: str | None, count: int, delay: float) -> None:
    with said.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ["ITEMTOK_CACHE"] = str(out.with_name(f"{out.name}-cache"))  # or it would find there what it could lose
    if place is not None:
        _arm(place, count, delay)
    sys.exit(main(["run", str(recipe), "--out", str(out), "--resume"]))


def _arm(place: str, count: int, delay: float) -> None:
    """Let this process die when it comes to a place for the `count`-th time."""
    later = _Later(delay)
    owner, name, last_words = {
        "torch.save": (torch, "save", _half_of_torch_save(torch.save)),
        "safetensors": (safetensors.torch, "save_file", _half_of_save_file),
        "replace": (os, "replace", _nothing),
        "rmtree": (shutil, "rmtree", _half_of_rmtree),
        "update": (SelfImprove, "propose", later),
        "turn": (Alternate, "propose", later),
        "batch": (Alternate, "learn", _nothing),
        "upper": (Bilevel, "propose", later),
        "ahead": (Bilevel, "_through", _nothing),
        "learnt": (QuantizerOptimizer, "step", QuantizerOptimizer.step),
    }[place]
    work, left = getattr(owner, name), itertools.count(count - 1, -1)

    @functools.wraps(work)
    def dying(*args, **kwargs):
        if next(left) == 0:
            last_words(*args)
            if last_words is not later:
                _die()
        return work(*args, **kwargs)

    setattr(owner, name, dying)


class _Later:
    """Death after some seconds, whatever is done then."""

    def __init__(self, delay: float) -> None:
        self._delay = delay

    def __call__(self, *_: object) -> None:
        threading.Timer(self._delay, _die).start()


def _nothing(*_: object) -> None:
    """What is done before death where death itself is all."""


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

"""Runs of recipes as processes of their own, a few at a time, that any stop leaves resumable.

Each worker is `itemtok run … --resume` on one thread, in a session of its own: a Ctrl-C at the terminal reaches the
plan only, which then asks its workers for a checkpoint. If the plan itself is killed, workers go on; the lock of their
run folders tells the next one.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_itemtok.artifacts import ENVIRONMENT, read_json, write_text
from llm_itemtok.errors import ArtifactError
from llm_itemtok.experiments.pool import Job, Pool
from llm_itemtok.pipeline.run import IN_USE, alone_in
from llm_itemtok.pipeline.stages import RESULTS_VERSION

_PROGRESS = re.compile(r"step ([\d,]+) of ([\d,]+): .* about ([\d.]+) min left")
_STOPPED = 143
_LAST_BYTES = 20_000
"""Of a log, which holds every start of a run; enough for the newest lines."""


@dataclass
class Worker:
    """A run in progress.

    Attributes:
        job: what it runs.
        process: who runs it.
        log: file of its lines, and of those of earlier starts.
        log_from: where this start's begin in it, in bytes.
        began: on the monotonic clock.
    """

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    log_from: int
    began: float

    @classmethod
    def start(cls, job: Job, pool: Pool, variables: Mapping[str, str] | None = None) -> "Worker":
        """Begin, or go on with, a run; screening ends before test is opened."""
        recipe = pool.folder(job).with_suffix(".yaml")
        log = pool.folder(job).with_suffix(".log")
        write_text(recipe, job.cell.config.to_yaml())
        begin = "--fresh" if is_stale(pool.folder(job)) else "--resume"
        command = [sys.executable, "-m", "llm_itemtok", "run", str(recipe), "--out", str(pool.folder(job)), begin]
        if job.cell.stage == "screen":
            command += ["--until", "train"]
        # One thread each: results depend on their number, and two threads of one run gain less than two runs.
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("ab") as file:
            size = file.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, **(variables or {})},
                start_new_session=True,
            )
        return cls(job, process, log, size, time.monotonic())

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.poll()

    @property
    def interrupted(self) -> bool:
        """Whether it ended because it was asked to, or was killed from outside, and can be gone on with."""
        return self.status in (_STOPPED, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL)

    @property
    def kept_out(self) -> bool:
        """Whether it ended because another process works in its run folder."""
        return self.status == 2 and IN_USE in self.last_lines

    @property
    def last_lines(self) -> str:
        """The end of its log."""
        return "\n".join(self._text().splitlines()[-8:])

    def progress(self) -> tuple[float, float] | None:
        """Share of the training done, in [0, 1], and the seconds that it says are left; None before it has begun."""
        found = _PROGRESS.findall(self._text())
        if not found:
            return None
        done, total, minutes = (float(number.replace(",", "")) for number in found[-1])
        return done / total, 60 * minutes

    def _text(self) -> str:
        """The newest lines of this start."""
        with self.log.open("rb") as file:
            file.seek(max(self.log_from, self.log.stat().st_size - _LAST_BYTES))
            return file.read().decode("utf-8", errors="replace")


def is_stale(folder: Path) -> bool:
    """Whether a run folder was begun by code that gives other numbers, so that nothing in it can be gone on from."""
    begun = folder / ENVIRONMENT
    return begun.is_file() and read_json(begun)["results"] != RESULTS_VERSION


def in_use(job: Job, pool: Pool) -> bool:
    """Tell whether another process works in a job's run folder, such as a worker of a plan that was killed."""
    if not pool.folder(job).exists():
        return False
    try:
        with alone_in(pool.folder(job)):
            return False
    except ArtifactError:
        return True


def stop_all(workers: list[Worker]) -> None:
    """Ask for checkpoints and wait until all are written."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.wait()

"""Carry an experiment plan out: what is missing is run, what is finished is written down at once.

The order is the plan's: first the tuning, by validation alone, then the best point of each arm with fresh seeds. A plan
that is stopped, or killed, at any moment has lost nothing that was done, and the same command goes on.
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from llm_itemtok import artifacts
from llm_itemtok.errors import RecipeError
from llm_itemtok.experiments.book import Book
from llm_itemtok.experiments.findings import CHOOSE_BY
from llm_itemtok.experiments.plan import Cell, LoadedPlan, Point
from llm_itemtok.experiments.pool import Job, Pool
from llm_itemtok.experiments.workers import Worker, in_use, stop_all
from llm_itemtok.pipeline.check import check, estimate_seconds
from llm_itemtok.pipeline.run import alone_in

_POLL_SECONDS = 1.0
_LOOK_SECONDS = 10.0
"""Between looks for other processes at work in the pool."""
_SAY_SECONDS = 60.0
_MOST_STARTS = 3
"""Of a run that is killed from outside again and again."""

Log = Callable[[str], None]


class Interrupted(Exception):
    """The plan was stopped before it was finished; `signal` is the signal's number, 0 for the end of its time."""

    def __init__(self, number: int) -> None:
        """Keep the number."""
        super().__init__(number)
        self.signal = number


class Failed(Exception):
    """Runs of the plan failed; the message says which and why."""


def reproduce(
    path: Path,
    *,
    results: Path,
    runs: Path,
    workers: int = 2,
    minutes: float | None = None,
    log: Log = lambda line: None,
) -> Path:
    """Carry a plan out, or go on with it.

    Args:
        path: the plan.
        results: where `NAME.json`, `NAME.ranks.parquet`, `NAME.md` and the records of runs are written.
        runs: where run folders are kept.
        workers: runs at a time, of one thread each.
        minutes: stop, with checkpoints, after this time; None for no limit.
        log: called with progress lines.

    Returns:
        The page.

    Raises:
        ItemTokError: for a plan or an input that is not right, before anything runs.
        Interrupted: after SIGTERM, Ctrl-C or `minutes`, with all that was done written down.
        Failed: if a run failed, after all others are finished.
    """
    book = Book(LoadedPlan.load(path), Pool(results, runs))
    plan = book.loaded.plan
    later = book.loaded.confirm_cells({})
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with alone_in(runs / f"plan-{plan.name}"), _signals() as received:
        _check_all(book, later)
        _Shift(book, book.tuning(), later, workers, deadline, received, log).work()
        if plan.tuning:
            log("chosen on validation: " + "; ".join(f"{arm}: {_point(at)}" for arm, at in book.chosen().items()))
        _Shift(book, book.confirm(), (), workers, deadline, received, log).work()
        book.write()
    return results / f"{plan.name}.md"


def _check_all(book: Book, cells: Sequence[Cell]) -> None:
    """Check a run of every arm on every data set: what is wrong is told now and not after hours of tuning."""
    book.loaded.check()
    for cell in {(cell.block, cell.arm): cell for cell in reversed(cells)}.values():
        job = book.pool.job(cell)
        if book.pool.record(job) is None and (job.after is None or book.pool.record(job.after) is not None):
            check(job.cell.config)


@dataclass
class _Shift:
    """Workers at the jobs of one stage.

    Attributes:
        book: of the plan; finished jobs are written into it.
        jobs: all of the stage.
        later: cells of the stage after it, for the estimate.
        workers: runs at a time.
        deadline: on the monotonic clock, None for no limit.
        received: signals so far, filled by the handler.
        log: called with progress lines.
    """

    book: Book
    jobs: Sequence[Job]
    later: Sequence[Cell]
    workers: int
    deadline: float | None
    received: list[int]
    log: Log
    waiting: list[Job] = field(default_factory=list)
    running: list[Worker] = field(default_factory=list)
    others: list[Job] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def work(self) -> None:
        """Run what is not finished; raise if that was stopped, or if a run failed."""
        self.waiting = [job for job in self.jobs if job.sha256 not in self.book.records]
        looked = said = -_SAY_SECONDS
        try:
            while self.waiting or self.running:
                for worker in [worker for worker in self.running if worker.status is not None]:
                    self.running.remove(worker)
                    self._end(worker)
                if self.received or (self.deadline is not None and time.monotonic() > self.deadline):
                    raise Interrupted(self.received[0] if self.received else 0)
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self.others = [job for job in self.waiting if in_use(job, self.book.pool)]
                self._start()
                if time.monotonic() - said > _SAY_SECONDS:
                    said = time.monotonic()
                    self.log(self._progress())
                time.sleep(_POLL_SECONDS)
        finally:
            stop_all(self.running)
        if self.failed:
            raise Failed("\n".join(self.failed))

    def _start(self) -> None:
        """Fill free places; a process that a killed plan left behind takes one, too."""
        free = self.workers - len(self.running) - len(self.others)
        ready = [job for job in self.waiting if job.after is None or job.after.sha256 in self.book.records]
        for job in [job for job in ready if job not in self.others][: max(0, free)]:
            self.waiting.remove(job)
            record = self.book.pool.record(job)  # another plan may have run it meanwhile
            if record is not None:
                self.book.records[job.sha256] = record
                self.book.write()
                continue
            self.running.append(Worker.start(job, self.book.pool))
            self.starts[job.sha256] = self.starts.get(job.sha256, 0) + 1
            self.log(f"{job.cell.name}: {job.short} begins")

    def _end(self, worker: Worker) -> None:
        """File a worker that has ended: as finished, as one that waits again, or as failed."""
        job = worker.job
        said = f"{job.cell.name}: {job.short}"
        if worker.status == 0:
            self.book.finish(job)
            validation = self.book.records[job.sha256]["metrics"]["validation"][CHOOSE_BY]
            minutes = (time.monotonic() - worker.began) / 60
            self.log(f"{said} finished, {minutes:.1f} min, validation NDCG@10 {validation:.4f}")
        elif worker.kept_out:
            self.waiting.append(job)
            self.others.append(job)
            self.log(f"{said} is in the hands of another process")
        elif worker.interrupted and self.starts[job.sha256] < _MOST_STARTS:
            self.waiting.append(job)
            self.log(f"{said} was stopped from outside; it goes on later")
        else:
            why = f"{said} failed (status {worker.status}):\n{worker.last_lines}\n  whole log: {worker.log}"
            self.failed.append(why)
            self.log(why)
            lost = [other for other in self.waiting if other.after is not None and other.after.sha256 == job.sha256]
            self.waiting = [other for other in self.waiting if other not in lost]
            self.failed += [f"{other.cell.name}: {other.short} needs the item tokens of that run" for other in lost]

    def _progress(self) -> str:
        """One line: what is done, what runs how far, how long the rest will take."""
        parts = [
            f"{worker.job.cell.arm} seed {worker.job.cell.config.seed} {progress[0]:.0%}"
            for worker in self.running
            if (progress := worker.progress()) is not None
        ]
        left = self._seconds_left()
        words = f"; about {left / self.workers / 3600:.1f} h left" if left is not None else ""
        done, total = self.book.done(self.jobs), len(self.jobs) + len(self.later)
        return f"{done} of {total} done; running: {', '.join(parts) or 'starting'}{words}"

    def _seconds_left(self) -> float | None:
        """Seconds of training left, by the finished runs of the same data set or what the running ones promise."""
        known = self.book.typical_seconds()
        left, promised = 0.0, [0.0]
        for worker in self.running:
            progress, spent = worker.progress(), time.monotonic() - worker.began
            if progress is not None:
                left += progress[1]
                promised.append(progress[1] / max(1e-9, 1 - progress[0]))
            elif worker.job.cell.dataset in known:
                left += max(0.0, known[worker.job.cell.dataset] - spent)
            else:
                return None
        cells = [*(job.cell for job in self.waiting), *self.later]
        rest = [known.get(cell.dataset, max([*known.values(), *promised])) for cell in cells]
        return left + sum(rest) if all(rest) else None


def _own_cache(runs: Path) -> Path:
    """A cache for one run, in which vectors and baselines are those of everybody, and the rest is made anew."""
    cache = runs / "cache"
    for kind in ("vectors", "baselines"):
        (artifacts.cache_folder() / kind).mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / kind).exists():
            (cache / kind).symlink_to((artifacts.cache_folder() / kind).resolve())
    return cache


def rerun(
    path: Path, which: str, *, results: Path, runs: Path, log: Callable[[str], None] = lambda line: None
) -> tuple[bool, str]:
    """Run one row of a plan again, beside its pool, and compare.

    Item vectors and baselines may come from the cache, nothing that is trained for the row does.

    One that was interrupted is gone on with.

    Args:
        path: the plan.
        which: first digits of the row's `recipe_sha256`.
        results: where its record stands.
        runs: the new run folder goes to `rerun-…` there.
        log: called with progress lines.

    Returns:
        Whether all metrics are the same to the last bit, and what to tell.

    Raises:
        RecipeError: if no finished row, or more than one, begins so.
        Interrupted: after SIGTERM or Ctrl-C.
        Failed: if the run fails.
    """
    book = Book(LoadedPlan.load(path), Pool(results, runs))
    finished = [job for job in (*book.tuning(), *book.confirm()) if job.sha256 in book.records]
    found = [job for job in finished if job.sha256.startswith(which)]
    if len(found) != 1:
        names = ", ".join(job.short for job in finished) or "none"
        raise RecipeError(f"`--rerun` must begin the hash of one finished run, was: {which}; finished are: {names}")
    (job,) = found
    again = Pool(results, runs / f"rerun-{job.short}")
    last = artifacts.METRICS if job.cell.stage == "confirm" else artifacts.TRAINING
    with alone_in(again.runs), _signals() as received:
        if (again.folder(job) / last).exists():
            shutil.rmtree(again.runs)
        log(f"{job.cell.name}: {job.short} runs again in {again.folder(job)}")
        worker = Worker.start(job, again, {"ITEMTOK_CACHE": str(_own_cache(again.runs))})
        while worker.status is None and not received:
            time.sleep(_POLL_SECONDS)
        stop_all([worker])
    if received:
        raise Interrupted(received[0])
    if worker.status != 0:
        raise Failed(f"{job.cell.name} failed:\n{worker.last_lines}")
    old, new = book.records[job.sha256]["metrics"], again.measured(job)
    parts = [part for part in ("test", "validation", "segments") if part in old and part in new]
    different = [
        f"  {part} {key}: {value} before, {new[part].get(key)} now"
        for part in parts
        for key, value in old[part].items()
        if new[part].get(key) != value
    ]
    if different:
        return False, "\n".join([f"{job.short}: not the same", *different])
    return True, f"{job.short}: the same in all of {', '.join(parts)}"


def dry_run(path: Path, *, results: Path, runs: Path, workers: int = 2) -> str:
    """Say what a plan would run, what of it is done, and about how long the rest will take. Runs nothing.

    Raises:
        ItemTokError: for a plan or an input that is not right.
    """
    loaded = LoadedPlan.load(path)
    loaded.check()
    book = Book(loaded, Pool(results, runs))
    tuning, confirm = book.tuning(), book.confirm()
    tuned = bool(confirm) or not tuning
    # Until tuning has chosen, most recipes of `confirm` are not known; their number and size are.
    confirm = confirm or book.foreseen()
    seconds, guessed = _estimates([*tuning, *confirm], book)
    lines = [f"plan {loaded.plan.name}: {loaded.plan.question}", ""]
    total = 0.0
    for stage, jobs in (("tuning, on validation only", tuning), ("confirm, on test", confirm)):
        lines += [f"{stage}: {len(jobs)} runs"] if jobs else []
        for job in jobs:
            state = _state(job, book)
            total += 0.0 if state == "done" else seconds[job.cell.dataset]
            name = job.short if tuned or job.cell.stage == "screen" else "after tuning"
            about = f"{seconds[job.cell.dataset] / 60:4.0f} min"
            lines.append(f"  {name:<12}  {state:<7}  {about}  {job.cell.name}")
    done = book.done((*tuning, *confirm))
    lines += [
        "",
        f"{done} of {len(tuning) + len(confirm)} runs done; training of the rest takes about {total / 3600:.1f} "
        f"thread-hours, {total / workers / 3600:.1f} hours with {workers} workers"
        + ("" if not guessed else f" (not measured yet on {', '.join(guessed)}: a rule of thumb)"),
    ]
    return "\n".join(lines)


def _estimates(jobs: Sequence[Job], book: Book) -> tuple[dict[str, float], list[str]]:
    """Data set → seconds of a run, and the data sets for which that is no measurement."""
    seconds = book.typical_seconds()
    guessed = []
    for job in jobs:
        if job.cell.dataset not in seconds:
            guessed.append(job.cell.dataset)
            seconds[job.cell.dataset] = estimate_seconds(job.cell.config) or 0.0
    return seconds, guessed


def _state(job: Job, book: Book) -> str:
    if job.sha256 in book.records:
        return "done"
    if in_use(job, book.pool):
        return "running"
    return "begun" if book.pool.folder(job).exists() else "to run"


def _point(point: Point) -> str:
    return ", ".join(f"{name} {value}" for name, value in point) or "as in the recipe"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list in place of ending the process."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

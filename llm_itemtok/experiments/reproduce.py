"""Carry an experiment plan out: what is missing is run, what is finished is written down at once.

The order is the plan's: first the tuning, by validation alone, then the best point of each arm with fresh seeds. After
every run the rows, the ranks and the page are written anew from all that is finished, so a plan that is stopped, or
killed, at any moment has lost nothing that was done, and the same command goes on.
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm_itemtok.artifacts import write_bytes, write_json, write_text
from llm_itemtok.errors import RecipeError
from llm_itemtok.experiments.page import render_page
from llm_itemtok.experiments.plan import Cell, LoadedPlan, Point
from llm_itemtok.experiments.pool import Job, Pool, row
from llm_itemtok.experiments.workers import Worker, in_use, stop_all
from llm_itemtok.pipeline.check import estimate_seconds
from llm_itemtok.pipeline.run import alone_in

CHOOSE_BY = "ndcg@10"
"""Validation metric by which tuning chooses."""
_POLL_SECONDS = 1.0
_SAY_EVERY = 60.0


class Interrupted(Exception):
    """The plan was stopped before it was finished; `signal` is the signal's number, 0 for the end of its time."""

    def __init__(self, number: int) -> None:
        """Keep the number."""
        super().__init__(number)
        self.signal = number


class Failed(Exception):
    """Runs of the plan failed; the message says which and why."""


@dataclass
class Book:
    """What a plan has done so far.

    Attributes:
        loaded: the plan.
        pool: of runs.
        records: hash → record of each finished run.
        jobs: hash → job of every cell known so far, in the plan's order.
    """

    loaded: LoadedPlan
    pool: Pool
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)

    def plan_jobs(self) -> tuple[list[Job], list[Job]]:
        """The jobs of tuning, and of confirm once tuning is finished (empty before)."""
        tuning = [self._known(cell) for cell in self.loaded.tuning_cells()]
        if any(job.sha256 not in self.records for job in tuning):
            return tuning, []
        return tuning, [self._known(cell) for cell in self.loaded.confirm_cells(self.chosen())]

    def _known(self, cell: Cell) -> Job:
        job = self.pool.job(cell)
        twin = self.jobs.setdefault(job.sha256, job)
        if twin.cell.name != cell.name:
            raise RecipeError(
                f"{self.loaded.path}: every run of a plan must have a recipe of its own, but these two have the same: "
                f"{twin.cell.name}; {cell.name}"
            )
        found = self.records.get(job.sha256) or self.pool.record(job)
        if found is not None:
            self.records[job.sha256] = found
        return job

    def chosen(self) -> dict[str, Point]:
        """The best point of each arm by validation; of equal ones the first."""
        best: dict[str, tuple[float, Point]] = {}
        for job in self.jobs.values():
            if job.cell.stage == "screen" and job.sha256 in self.records:
                value = self.records[job.sha256]["metrics"]["validation"][CHOOSE_BY]
                if job.cell.arm not in best or value > best[job.cell.arm][0]:
                    best[job.cell.arm] = (value, job.cell.point)
        return {arm: point for arm, (_, point) in best.items()}

    def finish(self, job: Job) -> None:
        """Take a finished run into the pool and write everything down."""
        self.records[job.sha256] = self.pool.adopt(job)
        self.write()

    def write(self) -> None:
        """Write rows, ranks and page of all that is finished."""
        arms = self.loaded.plan.arms
        done = [job for job in self.jobs.values() if job.sha256 in self.records]
        rows = [
            row(job, self.records[job.sha256], control=arms[job.cell.arm].control, probe=arms[job.cell.arm].probe)
            for job in done
        ]
        name, results = self.loaded.plan.name, self.pool.results
        ranks = self._ranks([job for job in done if job.cell.stage == "confirm"])
        write_json(results / f"{name}.json", rows)
        sink = pa.BufferOutputStream()
        pq.write_table(ranks, sink, compression="zstd")
        write_bytes(results / f"{name}.ranks.parquet", sink.getvalue().to_pybytes())
        page, pictures = render_page(
            name=name,
            question=self.loaded.plan.question,
            titles={arm: given.title or arm for arm, given in arms.items()},
            rows=rows,
            ranks=ranks,
            records={job.sha256: self.records[job.sha256] for job in done},
            not_run=[job.cell.name for job in self.jobs.values() if job.sha256 not in self.records],
        )
        write_text(results / f"{name}.md", page)
        for file, picture in pictures.items():
            write_text(results / file, picture)

    def _ranks(self, done: Sequence[Job]) -> pa.Table:
        schema = pa.schema([("recipe_sha256", pa.string()), ("user", pa.string()), ("rank", pa.float32())])
        tables = [schema.empty_table()]
        for job in done:
            found = self.pool.ranks(job)
            if found is not None:
                names = pa.array([job.sha256] * len(found), pa.string())
                tables.append(found.select(["user", "rank"]).add_column(0, "recipe_sha256", names).cast(schema))
        return pa.concat_tables(tables)


def reproduce(
    path: Path,
    *,
    results: Path,
    runs: Path,
    workers: int = 2,
    minutes: float | None = None,
    log: Callable[[str], None] = lambda line: None,
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
    loaded = LoadedPlan.load(path)
    book = Book(loaded, Pool(results, runs))
    for cell in loaded.confirm_cells({}):
        book.pool.job(cell)  # an input missing for a later run is told now and not after hours of tuning
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with alone_in(runs / f"plan-{loaded.plan.name}"), _signals() as received:
        tuning, _ = book.plan_jobs()
        _run_all(tuning, book, workers, deadline, received, log)
        _, confirm = book.plan_jobs()
        if book.chosen():
            log("chosen on validation: " + "; ".join(f"{arm}: {_point(at)}" for arm, at in book.chosen().items()))
        _run_all(confirm, book, workers, deadline, received, log)
        book.write()
    return results / f"{loaded.plan.name}.md"


def rerun(
    path: Path, which: str, *, results: Path, runs: Path, log: Callable[[str], None] = lambda line: None
) -> tuple[bool, str]:
    """Run one row of a plan again, from nothing and beside its pool, and compare.

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
        Failed: if the run fails.
    """
    book = Book(LoadedPlan.load(path), Pool(results, runs))
    tuning, confirm = book.plan_jobs()
    found = [job for job in (*tuning, *confirm) if job.sha256.startswith(which) and job.sha256 in book.records]
    if len(found) != 1:
        names = ", ".join(sha256[:12] for sha256 in book.records) or "none"
        raise RecipeError(f"`--rerun` must begin the hash of one finished run, was: {which}; finished are: {names}")
    (job,) = found
    again = Pool(results, runs / f"rerun-{job.short}")
    shutil.rmtree(again.runs, ignore_errors=True)
    log(f"{job.cell.name}: {job.short} runs again in {again.folder(job)}")
    worker = Worker.start(job, again)
    try:
        worker.process.wait()
    finally:
        stop_all([worker])
    if worker.status != 0:
        raise Failed(f"{job.cell.name} failed:\n{worker.last_lines}")
    old, new = book.records[job.sha256]["metrics"], again.measured(job)
    parts = [part for part in ("test", "validation", "segments") if part in old]
    different = [
        f"  {part} {key}: {value} before, {new[part].get(key)} now"
        for part in parts
        for key, value in old[part].items()
        if new[part].get(key) != value
    ]
    if different:
        return False, "\n".join([f"{job.short}: not the same", *different])
    return True, f"{job.short}: the same in all of {', '.join(parts)}"


def _run_all(
    jobs: Sequence[Job],
    book: Book,
    workers: int,
    deadline: float | None,
    received: list[int],
    log: Callable[[str], None],
) -> None:
    """Run the jobs that are not finished; raise if that was stopped, or if one of them failed."""
    waiting = [job for job in jobs if job.sha256 not in book.records]
    running: list[Worker] = []
    failed: dict[str, str] = {}
    said = 0.0
    try:
        while waiting or running:
            for worker in [worker for worker in running if worker.status is not None]:
                running.remove(worker)
                _end(worker, book, waiting, failed, received, log)
            if received or (deadline is not None and time.monotonic() > deadline):
                raise Interrupted(received[0] if received else 0)
            for job in [job for job in waiting if not in_use(job, book.pool)][: workers - len(running)]:
                waiting.remove(job)
                running.append(Worker.start(job, book.pool))
                log(f"{job.cell.name}: {job.short} begins")
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                log(_progress(jobs, waiting, running, book, workers))
            time.sleep(_POLL_SECONDS)
    finally:
        stop_all(running)
    if failed:
        raise Failed("\n".join(f"{name} failed:\n{why}" for name, why in failed.items()))


def _end(
    worker: Worker,
    book: Book,
    waiting: list[Job],
    failed: dict[str, str],
    received: list[int],
    log: Callable[[str], None],
) -> None:
    """File a worker that has ended: as finished, as interrupted (it waits again), or as failed."""
    job, minutes = worker.job, (time.monotonic() - worker.began) / 60
    if worker.status == 0:
        book.finish(job)
        validation = book.records[job.sha256]["metrics"]["validation"][CHOOSE_BY]
        log(f"{job.cell.name}: {job.short} finished, {minutes:.1f} min, validation NDCG@10 {validation:.4f}")
    elif worker.interrupted and received:
        log(f"{job.cell.name}: {job.short} stopped after a checkpoint")
    elif worker.interrupted:
        waiting.append(job)
        log(f"{job.cell.name}: {job.short} was stopped from outside; it goes on later")
    else:
        failed[job.cell.name] = f"{worker.last_lines}\n  whole log: {worker.log}"
        log(f"{job.cell.name}: {job.short} failed")


def _progress(jobs: Sequence[Job], waiting: Sequence[Job], running: Sequence[Worker], book: Book, workers: int) -> str:
    """One line: what is done, what runs how far, how long the rest will take."""
    done = sum(job.sha256 in book.records for job in jobs)
    parts = [
        f"{worker.job.cell.arm} seed {worker.job.cell.config.seed} {progress[0]:.0%}"
        for worker in running
        if (progress := worker.progress()) is not None
    ]
    left = _seconds_left(waiting, running, book)
    words = f"; about {left / workers / 3600:.1f} h left" if left is not None else ""
    return f"{done} of {len(jobs)} done; running: {', '.join(parts) or 'starting'}{words}"


def _seconds_left(waiting: Sequence[Job], running: Sequence[Worker], book: Book) -> float | None:
    """Seconds of work left, from the finished runs of the same data set or what the running ones promise."""
    known = typical_seconds(book)
    left, promised = 0.0, [0.0]
    for worker in running:
        progress, spent = worker.progress(), time.monotonic() - worker.began
        if progress is not None:
            left += progress[1]
            promised.append(progress[1] / max(1e-9, 1 - progress[0]))
        elif worker.job.cell.dataset in known:
            left += max(0.0, known[worker.job.cell.dataset] - spent)
        else:
            return None
    rest = [known.get(job.cell.dataset, max(promised)) for job in waiting]
    return left + sum(rest) if all(rest) else None


def typical_seconds(book: Book) -> dict[str, float]:
    """Data set → mean seconds of its finished runs."""
    seconds: dict[str, list[float]] = {}
    for sha256, record in book.records.items():
        seconds.setdefault(book.jobs[sha256].cell.dataset, []).append(record["metrics"]["training"]["seconds"])
    return {dataset: sum(values) / len(values) for dataset, values in seconds.items()}


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


def dry_run(path: Path, *, results: Path, runs: Path, workers: int = 2) -> str:
    """Say what a plan would run, what of it is done, and about how long the rest will take. Runs nothing.

    Raises:
        ItemTokError: for a plan or an input that is not right.
    """
    loaded = LoadedPlan.load(path)
    book = Book(loaded, Pool(results, runs))
    tuning, confirm = book.plan_jobs()
    tuned = bool(confirm) or not tuning
    # Until tuning has chosen, the recipes of `confirm` are not known; their number and size are.
    confirm = confirm or [book.pool.job(cell) for cell in loaded.confirm_cells({})]
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
    done = sum(job.sha256 in book.records for job in (*tuning, *confirm))
    lines += [
        "",
        f"{done} of {len(tuning) + len(confirm)} runs done; the rest about {total / 3600:.1f} thread-hours, "
        f"{total / workers / 3600:.1f} hours with {workers} workers"
        + ("" if not guessed else f" (not measured yet on {', '.join(guessed)}: a rule of thumb)"),
    ]
    return "\n".join(lines)


def _estimates(jobs: Sequence[Job], book: Book) -> tuple[dict[str, float], list[str]]:
    """Data set → seconds of a run, and the data sets for which that is no measurement."""
    seconds = typical_seconds(book)
    guessed = []
    for job in jobs:
        if job.cell.dataset not in seconds:
            guessed.append(job.cell.dataset)
            seconds[job.cell.dataset] = estimate_seconds(job.cell.config) or 0.0
    return seconds, guessed


def _state(job: Job, book: Book) -> str:
    if job.sha256 in book.records:
        return "done"
    if not book.pool.folder(job).exists():
        return "to run"
    return "running" if in_use(job, book.pool) else "begun"

"""What a plan has done so far, and the files that tell it: rows, ranks, page.

After every run all of them are written anew from what is finished, each atomically.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm_itemtok.artifacts import write_bytes, write_json, write_text
from llm_itemtok.errors import RecipeError
from llm_itemtok.experiments.findings import best_points
from llm_itemtok.experiments.page import render_page
from llm_itemtok.experiments.plan import Cell, LoadedPlan, Point
from llm_itemtok.experiments.pool import Job, Pool, row

_RANKS = pa.schema([("recipe_sha256", pa.string()), ("user", pa.string()), ("rank", pa.float32())])


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

    def tuning(self) -> list[Job]:
        """The jobs of tuning."""
        return [self._known(cell) for cell in self.loaded.tuning_cells()]

    def confirm(self) -> list[Job]:
        """The jobs of confirm; none before tuning is finished."""
        if any(job.sha256 not in self.records for job in self.tuning()):
            return []
        return [self._known(cell) for cell in self.loaded.confirm_cells(self.chosen())]

    def foreseen(self) -> list[Job]:
        """The jobs of confirm while tuning goes on; only those of arms without a choice have their own recipes yet."""
        chosen = self.loaded.foregone()
        jobs = []
        for cell in self.loaded.confirm_cells(chosen):
            job = self.pool.job(cell)
            known = not self.loaded.plan.tuning or self._tuned(cell.arm) <= set(chosen)
            found = self.pool.record(job) if known else None
            if found is not None:
                self.jobs.setdefault(job.sha256, job)
                self.records[job.sha256] = found
            jobs.append(job)
        return jobs

    def _tuned(self, arm: str) -> set[str]:
        """The arms whose tuning decides the recipes of an arm."""
        given = self.loaded.plan.arms[arm]
        return {given.based_on or arm} | (self._tuned(given.codes_of) if given.codes_of else set())

    def done(self, jobs: Sequence[Job]) -> int:
        """How many jobs are finished."""
        return sum(job.sha256 in self.records for job in jobs)

    def chosen(self) -> dict[str, Point]:
        """The best point of each arm by validation; of equal ones the first."""
        tuned = [job for job in self._done() if job.cell.stage == "screen"]
        best = best_points([self._row(job) for job in tuned])
        return {arm: self.jobs[row["recipe_sha256"]].cell.point for arm, row in best.items()}

    def typical_seconds(self) -> dict[str, float]:
        """Data set → mean seconds of training of its finished runs."""
        seconds: dict[str, list[float]] = {}
        for sha256, record in self.records.items():
            seconds.setdefault(self.jobs[sha256].cell.dataset, []).append(record["metrics"]["training"]["seconds"])
        return {dataset: sum(values) / len(values) for dataset, values in seconds.items()}

    def finish(self, job: Job) -> None:
        """Take a finished run into the pool and write everything down."""
        self.records[job.sha256] = self.pool.adopt(job)
        self.write()

    def write(self) -> None:
        """Write rows, ranks and page of all that is finished."""
        plan, results = self.loaded.plan, self.pool.results
        done = self._done()
        rows = [self._row(job) for job in done]
        ranks = self._ranks([job for job in done if job.cell.stage == "confirm"])
        page = render_page(
            name=plan.name,
            question=plan.question,
            titles={arm: given.title or arm for arm, given in plan.arms.items()},
            rows=rows,
            ranks=ranks.filter(pc.is_in(ranks["recipe_sha256"], pa.array(list(self.records), pa.string()))),
            records={job.sha256: self.records[job.sha256] for job in done},
            not_run=[self._titled(job.cell) for job in self.jobs.values() if job.sha256 not in self.records],
            plan_path=None if self.loaded.path.match(f"recipes/plans/{plan.name}.yaml") else self.loaded.path.name,
        )
        write_json(results / f"{plan.name}.json", rows)
        sink = pa.BufferOutputStream()
        pq.write_table(ranks, sink, compression="zstd")
        write_bytes(results / f"{plan.name}.ranks.parquet", sink.getvalue().to_pybytes())
        write_text(results / f"{plan.name}.md", page.markdown)
        for file, picture in page.pictures.items():
            write_text(results / file, picture)

    def _done(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.sha256 in self.records]

    def _row(self, job: Job) -> dict[str, Any]:
        arm = self.loaded.plan.arms[job.cell.arm]
        return row(job, self.records[job.sha256], control=arm.control, probe=arm.probe)

    def _titled(self, cell: Cell) -> str:
        """What to call a cell on the page."""
        title = self.loaded.plan.arms[cell.arm].title or cell.arm
        return ", ".join([cell.block, title, *cell.own, f"seed {cell.config.seed}"])

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

    def _ranks(self, confirmed: Sequence[Job]) -> pa.Table:
        """Ranks of the confirmed runs.

        Those of other runs that stood in the file stay until the plan is finished: while a changed plan is tuned again
        its confirmed runs are not known, and run folders may be gone.
        """
        tables = [_RANKS.empty_table()]
        for job in confirmed:
            found = self.pool.ranks(job, self.records[job.sha256]["metrics"]["test"])
            if found is not None:
                names = pa.array([job.sha256] * len(found), pa.string())
                tables.append(found.add_column(0, "recipe_sha256", names).cast(_RANKS))
        finished = bool(confirmed) and len(self.records) == len(self.jobs)
        before = self.pool.results / f"{self.loaded.plan.name}.ranks.parquet"
        if before.exists() and not finished:
            old = pq.read_table(before)
            mine = pa.array([job.sha256 for job in confirmed], pa.string())
            tables.append(old.filter(pc.invert(pc.is_in(old["recipe_sha256"], mine))).cast(_RANKS))
        return pa.concat_tables(tables)

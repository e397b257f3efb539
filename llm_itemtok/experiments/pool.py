"""The pool of runs: what was run once serves every plan that asks for the same recipe.

A run is named by the hash of its portable recipe: seed included, every local path replaced by the hash of its content.
Two things are kept of it. The run folder, `RUNS/<first 12 digits>`, is for this machine: checkpoints, model, report.
The record, `RESULTS/runs/<first 12 digits>.json`, is for the repository: recipe, metrics, commit, versions, without
machine paths. Anybody can check a record: its recipe hashes to its name.

A record of another `RESULTS_VERSION` is stale and counts as absent: the code has changed so that the recipe gives
other numbers.
"""

import hashlib
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm_itemtok import artifacts
from llm_itemtok.artifacts import read_json, write_json
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError
from llm_itemtok.experiments.plan import Cell
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.stages import RESULTS_VERSION, environment, input_hashes

DIGITS = 12
"""Of a hash, in the names of files and folders."""


@dataclass(frozen=True)
class Job:
    """A cell and the name of its run.

    Attributes:
        cell: what to run.
        recipe: portable, as hashed.
        sha256: 64 hexadecimal digits.
    """

    cell: Cell
    recipe: dict[str, Any]
    sha256: str

    @property
    def short(self) -> str:
        """The name of its files."""
        return self.sha256[:DIGITS]


@dataclass
class Pool:
    """Run folders here, records in the repository.

    Attributes:
        results: folder of results pages, ranks and records.
        runs: folder of run folders.
    """

    results: Path
    runs: Path
    _hashes: dict[str, dict[str, str]] = field(default_factory=dict)  # inputs as written in a recipe → their contents

    def job(self, cell: Cell) -> Job:
        """Name a cell's run; reads and hashes its inputs, each once.

        Raises:
            ItemTokError: if an input cannot be read.
        """
        hashes = self._path_hashes(cell.config)
        recipe = json.loads(json.dumps(cell.config.portable(hashes), default=str))
        return Job(cell, recipe, recipe_hash(recipe))

    def folder(self, job: Job) -> Path:
        """The run folder."""
        return self.runs / job.short

    def record_path(self, sha256: str) -> Path:
        """Where a run's record stands."""
        return self.results / "runs" / f"{sha256[:DIGITS]}.json"

    def record(self, job: Job) -> dict[str, Any] | None:
        """The record of a run, if there is one that is not stale and holds what the cell's stage reports.

        Raises:
            ArtifactError: if the file is not the record of this recipe.
        """
        path = self.record_path(job.sha256)
        if not path.exists():
            return None
        found: dict[str, Any] = read_json(path)
        if recipe_hash(found.get("recipe")) != job.sha256:
            raise ArtifactError(
                f"{path}: the recipe in a record must hash to the record's name, but this one does not; it was edited, "
                "or the form of recipes has changed: delete it to run it again"
            )
        if found["versions"].get("results") != RESULTS_VERSION:
            return None
        return found if job.cell.stage == "screen" or "test" in found["metrics"] else None

    def adopt(self, job: Job) -> dict[str, Any]:
        """Write the record of a run that has just finished in its folder.

        Raises:
            ArtifactError: if the folder does not hold what the cell's stage leaves.
        """
        packages = environment()["packages"]
        versions = {"results": RESULTS_VERSION, **{name: packages[name] for name in ("llm-itemtok", "torch")}}
        versions |= {name: packages[name] for name in ("transformers", "peft", "accelerate")}
        record = {"recipe": job.recipe, "metrics": self.measured(job), "commit": commit(), "versions": versions}
        write_json(self.record_path(job.sha256), record)
        return record

    def measured(self, job: Job) -> dict[str, Any]:
        """Metrics in a finished run folder: all of them, or for screening validation and training only."""
        found: dict[str, Any]
        if job.cell.stage == "confirm":
            found = read_json(self.folder(job) / artifacts.METRICS)
            return found
        found = read_json(self.folder(job) / artifacts.TRAINING)
        return {"validation": found.pop("validation"), "training": found}

    def ranks(self, job: Job) -> pa.Table | None:
        """Ranks of a run's test users (columns user, rank): from its folder, or from a plan that reported it."""
        own = self.folder(job) / artifacts.RANKS
        if own.exists():
            return pq.read_table(own)
        for path in sorted(self.results.glob("*.ranks.parquet")):
            table = pq.read_table(path)
            mine = table.filter(pc.equal(table["recipe_sha256"], job.sha256))
            if len(mine):
                return mine.select(["user", "rank"])
        return None

    def _path_hashes(self, config: RunConfig) -> dict[str, str]:
        plain = config.to_dict()
        named = [plain["data"], plain["vectors"], {**plain["model"], "scratch": None}, config.seed]
        key = json.dumps(named if plain["data"]["source"] == "synthetic" else named[:-1], default=str)
        if key not in self._hashes:
            self._hashes[key] = input_hashes(config)
            if plain["data"].get("path"):
                self._hashes[key]["data.path"] = load_data(config.data, config.seed, {}).sha256
        return self._hashes[key]


def recipe_hash(recipe: Any) -> str:
    """Hash of a portable recipe as it stands in a record; equal to `RunConfig.recipe_sha256`."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def row(job: Job, record: dict[str, Any], *, control: bool, probe: bool) -> dict[str, Any]:
    """A run as a row of `docs/results/NAME.json`."""
    cell, metrics = job.cell, record["metrics"]
    training = metrics["training"]
    return {
        "stage": cell.stage,
        "block": cell.block,
        "dataset": cell.dataset,
        "arm": cell.arm,
        "control": control,
        "probe": probe,
        "initial_codes": cell.config.tokenizer.kind,
        "backbone": _backbone(cell.config),
        "seed": cell.config.seed,
        "settings": dict(cell.point),
        **{name: training[name] for name in ("steps", "targets_seen", "flops")},
        "test": metrics["test"] if cell.stage == "confirm" else None,
        "validation": metrics["validation"],
        **{name: training[name] for name in ("seconds", "peak_mb")},
        "recipe_sha256": job.sha256,
        "versions": record["versions"],
    }


def commit() -> str:
    """The commit of the code that runs, with `-dirty` if it was changed since; empty outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""  # an installed package has a version instead


def _backbone(config: RunConfig) -> str:
    if config.model.name != "scratch":
        return f"decoder {config.model.name}"
    sizes = config.model.scratch
    return f"decoder {sizes.layers}x{sizes.width}"

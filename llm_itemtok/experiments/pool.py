"""The pool of runs: what was run once serves every plan that asks for the same recipe.

A run is named by the hash of its portable recipe: seed included, every local path replaced by the hash of its content.
Two things are kept of it. The run folder, `RUNS/<first 12 digits>`, is for this machine: checkpoints, model, report.
The record, `RESULTS/runs/<first 12 digits>.json`, is for the repository: recipe, metrics, commit, versions, without
machine paths. Anybody can check a record: its recipe hashes to its name.

A run that begins with the item tokens that another run ended with has that run's hash in place of their path: it has a
name before they exist.

A record of another `RESULTS_VERSION` is stale and counts as absent: the code has changed so that the recipe gives
other numbers. A record made before a setting existed serves a recipe that has the setting at its default, because that
default leaves alone what was there before; where it does not, `BEFORE` says what was.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm_itemtok import artifacts
from llm_itemtok.artifacts import read_json, write_json
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError
from llm_itemtok.evaluation.metrics import metrics_from_ranks
from llm_itemtok.experiments.plan import Cell
from llm_itemtok.pipeline.prepare import load_data
from llm_itemtok.pipeline.stages import RESULTS_VERSION, input_hashes
from llm_itemtok.settings import FileTokenizer

DIGITS = 12
"""Of a hash, in the names of files and folders."""

BEFORE: Mapping[str, Any] = {"tokenizer.stop": "loss", "update.whiten": 0.0, "update.shrinkage": 0.0}
"""Dotted setting → what held before it existed, where that is not its default."""


@dataclass(frozen=True)
class Job:
    """A cell and the name of its run.

    Attributes:
        cell: what to run.
        recipe: portable, as hashed.
        sha256: 64 hexadecimal digits.
        after: the run that must be finished before, because this one begins with its item tokens.
    """

    cell: Cell
    recipe: dict[str, Any]
    sha256: str
    after: "Job | None" = None

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
        after = None if cell.codes_of is None else self.job(cell.codes_of)
        hashes = self._path_hashes(cell.config)
        if after is not None:
            cell = _with_codes(cell, self.folder(after) / artifacts.MODEL)
            hashes = hashes | {"tokenizer.path": after.sha256}
        recipe = json.loads(json.dumps(cell.config.portable(hashes), default=str))
        job = Job(cell, recipe, recipe_hash(recipe), after)
        if self.record_path(job.sha256).exists():
            return job
        stood_for, sections = unwritten(cell.config), json.loads(json.dumps(RunConfig().to_dict(), default=str))
        for path in sorted(self.record_path(job.sha256).parent.glob("*.json")):
            older = _read_record(path)["recipe"]
            # Without a whole section, its default held, whatever kind is chosen of it now.
            missing = {name: section for name, section in sections.items() if name not in older}
            if serves(older, recipe, stood_for | missing):
                return Job(cell, older, recipe_hash(older), after)
        return job

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
        found = _read_record(path)
        if found["versions"].get("results") != RESULTS_VERSION:
            return None
        return found if job.cell.stage == "screen" or "test" in found["metrics"] else None

    def adopt(self, job: Job) -> dict[str, Any]:
        """Write the record of a run that has just finished in its folder.

        Raises:
            ArtifactError: if the folder does not hold what the cell's stage leaves.
        """
        made_by = read_json(self.folder(job) / artifacts.TRAINING)["made_by"]
        record = {
            "recipe": job.recipe,
            "metrics": self.measured(job),
            "commit": made_by["commit"],
            "versions": {"results": made_by["results"], **made_by["packages"]},
            "device": made_by["cuda"][0] if made_by["cuda"] else "cpu",
        }
        write_json(self.record_path(job.sha256), record)
        return record

    def measured(self, job: Job) -> dict[str, Any]:
        """Metrics in a finished run folder: all of them, or for screening validation and training only."""
        found: dict[str, Any]
        if job.cell.stage == "confirm":
            found = read_json(self.folder(job) / artifacts.METRICS)
            return found
        found = read_json(self.folder(job) / artifacts.TRAINING)
        del found["made_by"]
        return {"validation": found.pop("validation"), "training": found}

    def ranks(self, job: Job, test: Mapping[str, float]) -> pa.Table | None:
        """Ranks of a run's test users (columns user, rank), from its folder or from a plan that reported it.

        Args:
            job: whose ranks.
            test: its recorded metrics; ranks that give others, such as those of a stale run, are passed over.
        """
        own = self.folder(job) / artifacts.RANKS
        told = (
            pq.read_table(path, columns=["user", "rank"], filters=pc.field("recipe_sha256") == job.sha256)
            for path in sorted(self.results.glob("*.ranks.parquet"))
        )
        sources = itertools.chain([pq.read_table(own)] if own.exists() else [], told)
        return next((table for table in sources if len(table) and _give(table, test)), None)

    def _path_hashes(self, config: RunConfig) -> dict[str, str]:
        plain = config.to_dict()
        codes = plain["tokenizer"].get("path")
        named = [plain["data"], plain["vectors"], codes, {**plain["model"], "scratch": None}, config.seed]
        key = json.dumps(named if plain["data"]["source"] == "synthetic" else named[:-1], default=str)
        if key not in self._hashes:
            self._hashes[key] = input_hashes(config)
            if plain["data"].get("path"):
                self._hashes[key]["data.path"] = load_data(config.data, config.seed, {}).sha256
        return self._hashes[key]


def recipe_hash(recipe: Any) -> str:
    """SHA-256 of a portable recipe, seed included; the order of its keys does not matter.

    Args:
        recipe: of `RunConfig.portable`, or as it stands in a record.

    Returns:
        64 hexadecimal digits.
    """
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
        "initial_codes": _initial_codes(cell),
        # Records from before there were two kinds do not say which.
        "backbone": _backbone(cell.config, training.get("kind", "decoder")),
        "seed": cell.config.seed,
        "settings": dict(cell.point),
        **{name: training[name] for name in ("steps", "targets_seen", "flops")},
        "test": metrics["test"] if cell.stage == "confirm" else None,
        "validation": metrics["validation"],
        **{name: training[name] for name in ("seconds", "peak_mb")},
        "recipe_sha256": job.sha256,
        "versions": record["versions"],
    }


def _with_codes(cell: Cell, bundle: Path) -> Cell:
    """The cell, with the codes of a bundle, which need not be there yet."""
    assert isinstance(cell.config.tokenizer, FileTokenizer)
    tokenizer = replace(cell.config.tokenizer, path=str(bundle.absolute()))
    return replace(cell, config=replace(cell.config, tokenizer=tokenizer))


def unwritten(config: RunConfig) -> dict[str, Any]:
    """What settings of the chosen kinds are in a record that does not have them: their default, or as `BEFORE` says."""
    found: dict[str, Any] = json.loads(json.dumps(config.defaults(), default=str))
    for dotted, value in BEFORE.items():
        *above, name = dotted.split(".")
        section: Any = found
        for step in above:
            section = section.get(step, {})
        if name in section:
            section[name] = value
    return found


def serves(older: Any, recipe: Any, stood_for: Any) -> bool:
    """Tell whether a record's recipe is this one but for younger settings, which are here what then stood for them.

    Args:
        older: the record's recipe, or a part of it.
        recipe: the one that is asked for, or the same part.
        stood_for: the same part of what `unwritten` says.
    """
    if not isinstance(recipe, dict) or not isinstance(older, dict):
        return bool(older == recipe)
    stood_for = stood_for if isinstance(stood_for, dict) else {}
    return set(older) <= set(recipe) and all(
        serves(older[name], value, stood_for.get(name))
        if name in older
        else name in stood_for and stood_for[name] == value
        for name, value in recipe.items()
    )


def _give(table: pa.Table, test: Mapping[str, float]) -> bool:
    """Tell whether ranks give these metrics, but for rounding to float32."""
    found = metrics_from_ranks(table["rank"].to_numpy().astype(np.float64))
    return all(abs(found[key] - value) < 1e-6 for key, value in test.items())


def _read_record(path: Path) -> dict[str, Any]:
    """A record whose form is right and whose recipe hashes to its name."""
    found = read_json(path)
    parts = {"recipe": dict, "metrics": dict, "versions": dict, "commit": str}
    if not isinstance(found, dict) or any(not isinstance(found.get(part), kind) for part, kind in parts.items()):
        raise ArtifactError(f"{path}: a record must hold {', '.join(parts)}; delete it to run it again")
    if recipe_hash(found["recipe"])[:DIGITS] != path.stem:
        raise ArtifactError(
            f"{path}: the recipe in a record must hash to the record's name, but this one was changed; delete it to "
            "run it again"
        )
    return found


def _initial_codes(cell: Cell) -> str:
    tokenizer = cell.config.tokenizer
    if not isinstance(tokenizer, FileTokenizer):
        return tokenizer.kind
    return f"file:{Path(tokenizer.path).name if cell.codes_of is None else cell.codes_of.arm}"


def _backbone(config: RunConfig, kind: str) -> str:
    name, sizes = config.model.name, config.model.scratch
    if name != "scratch":
        return f"{kind} {Path(name).name if Path(name).exists() else name}"
    layers = f"{sizes.layers}+{sizes.decoder_layers or sizes.layers}" if sizes.family == "t5" else str(sizes.layers)
    return f"{kind} {layers}x{sizes.width}"

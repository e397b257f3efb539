"""Which stages a run has, which of them are finished, and for which inputs.

A stage is finished when `stages.json` holds its key, and the key is a hash of everything that went into it: its
sections of the recipe, the content of the data, the keys of the stages before it. So an interrupted run goes on where
it stopped, and a changed input runs exactly what it touches.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llm_itemtok import plain_yaml
from llm_itemtok.artifacts import (
    CHECKPOINTS,
    ENVIRONMENT,
    MODEL,
    RECIPE,
    STAGES,
    atomic_folder,
    is_leftover,
    is_run,
    read_json,
    read_text,
    sha256_of_arrays,
    sha256_of_file,
    write_json,
    write_text,
)
from llm_itemtok.bundle import CARD, GENERATION
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import ArtifactError, RecipeError
from llm_itemtok.evaluation.baselines import fingerprint

RESULTS_VERSION = 1
"""Raised with every change of the code after which a recipe of a kind that has been recorded gives other numbers;
`tests/test_pinned.py` tells when.

Finished stages and checkpoints of another version are not gone on from, and recorded runs of another are stale.
"""

STAGE_NAMES = ("data", "items", "vocab", "train", "evaluate", "report")

_TRAINED = "trained"
"""In `stages.json` beside the stages: `Stages.trained`."""

LOCAL = "local"
"""In `environment.json`: settings that named a file or folder of this machine, other than the data."""

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "data": ("seed", "data"),
    "items": ("vectors", "tokenizer", "model"),
    "vocab": ("vocab",),
    "train": ("examples", "objective", "update", "scoring", "rescoring", "trainer", "evaluation"),
    "evaluate": (),
    "report": (),
}
"""Sections of the recipe that each stage reads first; later stages depend on it through its key."""

MEASURING = ("k", "baselines", "segments", "batch_size")
"""Settings of `evaluation` that training does not depend on."""

PACKAGES = (
    *("llm-itemtok", "torch", "transformers", "peft", "accelerate", "datasets", "trl"),
    *("tokenizers", "sentencepiece", "numpy", "scipy", "scikit-learn"),
)


@dataclass
class Stages:
    """The book of finished stages in a run folder.

    Attributes:
        folder: the run folder.
        finished: stage → key.
        trained: key of the last training that came to its end, whatever was run again since; None if none did.
        writes: whether this process keeps the book on disk; every process keeps it in mind.
    """

    folder: Path
    finished: dict[str, str]
    trained: str | None
    writes: bool

    @classmethod
    def open(cls, folder: Path, *, fresh: bool, writes: bool) -> "Stages":
        """Read the book, or begin one: for a new folder, or a `fresh` one."""
        path = folder / STAGES
        finished = read_json(path) if path.exists() and not fresh else {}
        if not isinstance(finished, dict) or any(not isinstance(key, str) for key in finished.values()):
            raise ArtifactError(f"{path}: must hold the keys of stages, found something else; start with `--fresh`")
        trained = finished.pop(_TRAINED, finished.get("train"))
        return cls(folder, finished, trained, writes)

    def done(self, stage: str, key: str) -> bool:
        """Say whether a stage was finished with exactly these inputs."""
        return self.finished.get(stage) == key

    def require_before(self, stage: str, keys: Mapping[str, str]) -> None:
        """Raise `RecipeError` if a run is to begin at a stage before which not all is finished, with these inputs."""
        before = STAGE_NAMES[: STAGE_NAMES.index(stage)]
        if missing := [name for name in before if name not in self.finished]:
            raise RecipeError(f"`--from {stage}` needs the stages before it, but {', '.join(missing)} never ran here")
        if stale := [name for name in before if not self.done(name, keys[name])]:
            raise RecipeError(
                f"`--from {stage}` needs the stages before it, but inputs of {', '.join(stale)} have changed since; "
                f"begin with `--from {stale[0]}`"
            )

    def mark(self, stage: str, key: str) -> None:
        """Note a stage as finished."""
        self.finished[stage] = key
        self.trained = self.finished.get("train", self.trained)
        self._write()

    def forget_from(self, stage: str) -> None:
        """Strike a stage and all after it out."""
        for name in STAGE_NAMES[STAGE_NAMES.index(stage) :]:
            self.finished.pop(name, None)
        self._write()

    def _write(self) -> None:
        if self.writes:
            write_json(self.folder / STAGES, {**self.finished, **({_TRAINED: self.trained} if self.trained else {})})


def keys(config: RunConfig, data_sha256: str, file_sha256: Mapping[str, str], segments_sha256: str) -> dict[str, str]:
    """Key of every stage.

    Args:
        config: the recipe.
        data_sha256: hash of catalogue and interactions as read.
        file_sha256: hash of each other local input (vectors file, base model), by recipe key.
        segments_sha256: hash of the columns that only segments are made from. Nothing is trained on them, so where
            nothing else changed, evaluation and report alone are done again.
    """
    settings = config.to_dict()
    settings["data"] = {**settings["data"], "path": data_sha256}
    result: dict[str, str] = {}
    before = f"results {RESULTS_VERSION}"
    for stage in STAGE_NAMES:
        inputs = {section: settings[section] for section in SECTIONS[stage]}
        if stage == "train":
            if settings["rescoring"]["kind"] == "none":
                del inputs["rescoring"]  # as in runs from before there was such a section
            else:
                inputs["dense"] = fingerprint("sasrec")
            inputs["evaluation"] = {key: value for key, value in settings["evaluation"].items() if key not in MEASURING}
            if inputs["evaluation"]["repeats"] == "keep":
                del inputs["evaluation"]["repeats"]  # as in runs from before there was such a setting
        if stage == "evaluate":
            inputs |= {key: settings["evaluation"][key] for key in MEASURING}
            inputs["segment columns"] = segments_sha256
            inputs["fingerprints"] = [fingerprint(name) for name in settings["evaluation"]["baselines"]]
        files = {key: value for key, value in file_sha256.items() if key.split(".")[0] in SECTIONS[stage]}
        before = sha256_of_arrays(before, repr(_sorted(inputs)), repr(_sorted(files)))
        result[stage] = before
    return result


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(key, _sorted(inner)) for key, inner in sorted(value.items())]
    return [_sorted(inner) for inner in value] if isinstance(value, list | tuple) else value


def input_hashes(config: RunConfig) -> dict[str, str]:
    """Hash local files and folders that the recipe names, other than the data, by recipe key."""
    return {key: _hash_path(path) for key, path in _local_inputs(config).items()}


def _local_inputs(config: RunConfig) -> dict[str, Path]:
    """Those files and folders."""
    settings = config.to_dict()
    sources = {"vectors": settings["vectors"]}
    sources |= {f"vectors.parts.{place}": part for place, part in enumerate(settings["vectors"].get("parts", ()))}
    paths = {f"{name}.{key}": source.get(key) for name, source in sources.items() for key in ("path", "model")} | {
        "tokenizer.path": settings["tokenizer"].get("path"),
        "model.name": None if settings["model"]["name"] == "scratch" else settings["model"]["name"],
    }
    return {key: Path(path) for key, path in paths.items() if path and Path(path).exists()}


def _hash_path(path: Path) -> str:
    if path.is_file():
        return sha256_of_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if (path / GENERATION).is_file():  # a bundle, whose card may be edited, and which may be a clone
        files = [file for file in files if file.name != CARD and not str(file.relative_to(path)).startswith(".")]
    return sha256_of_arrays(*(text for file in files for text in (str(file.relative_to(path)), sha256_of_file(file))))


def claim(folder: Path, config: RunConfig, *, fresh: bool, book: Stages, keys: Mapping[str, str]) -> None:
    """Make the run folder this recipe's.

    Args:
        folder: made when missing.
        config: the resolved recipe, written to the folder.
        fresh: empty the folder first, whatever run it holds.
        book: stages that were finished there. While none beyond `data` is, nothing would be lost and a corrected
            recipe simply takes the folder over; and so does one that differs in where equal inputs lie, or in what
            the test alone depends on.
        keys: key of every stage for this recipe.

    Raises:
        ArtifactError: if the folder holds another resolved recipe, and `fresh` is not set.
    """
    recipe, text = folder / RECIPE, config.to_yaml()
    there = _there(folder)
    if there - {ENVIRONMENT}:
        old = read_text(recipe)
        same = all(book.done(stage, keys[stage]) for stage in book.finished)
        moved = not fresh and same and _without_paths(old) == _without_paths(text)
        trained = all(book.done(stage, keys[stage]) for stage in ("data", "items", "vocab", "train"))
        lost = set(book.finished) - {"data"} or there & {CHECKPOINTS, MODEL}
        if not fresh and lost and old != text and not moved and not trained:
            raise ArtifactError(
                f"{folder}: this folder holds another run, whose {RECIPE} differs in: {_difference(old, text)}\n"
                "  choose another `--out`, or start it anew with `--fresh`"
            )
    if fresh and Path.cwd().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder}: `--fresh` cannot empty the folder that one stands in; start it from elsewhere")
    if fresh:
        with atomic_folder(folder):
            pass
    folder.mkdir(parents=True, exist_ok=True)
    # Seen from another folder, `models/ours` looks like a name on the Hub; here it is known which of the two it is.
    local = sorted(_local_inputs(config))
    write_json(folder / ENVIRONMENT, environment() | ({LOCAL: local} if local else {}))
    write_text(recipe, text)


def refuse_unless_run(folder: Path) -> None:
    """Raise `ArtifactError` where a run folder would be something else: a file, or a folder with other files."""
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder}: the run folder must be a folder, found: a file; choose another `--out`")
    if _there(folder) - {ENVIRONMENT} and not is_run(folder):
        raise ArtifactError(f"{folder}: the run folder must be new or a run, found other files; choose another `--out`")


def _there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not is_leftover(path)} if folder.is_dir() else set()


def _without_paths(text: str) -> Any:
    """A resolved recipe without the settings that may name a local path, and without what came later."""
    recipe = plain_yaml.parse(text, RECIPE)
    if not isinstance(recipe, dict):
        return recipe  # nothing of ours
    names = {"data": ("path",), "vectors": ("path", "model"), "tokenizer": ("path",), "model": ("name",)}
    if recipe.get("rescoring") == {"kind": "none"}:
        del recipe["rescoring"]  # as in runs from before there was such a section
    if recipe.get("evaluation", {}).get("repeats") == "keep":
        del recipe["evaluation"]["repeats"]
    for section, keys in names.items():
        for part in (recipe.get(section, {}), *recipe.get(section, {}).get("parts", ())):
            for key in keys:
                part.pop(key, None)
    return recipe


def _difference(old: str, new: str) -> str:
    try:
        before, after = (_settings(plain_yaml.parse(text, RECIPE)) for text in (old, new))
    except RecipeError:  # the old one is none of ours, or damaged
        before, after = old.splitlines(), new.splitlines()
    sides = {"the folder has": [line for line in before if line not in after],
             "this recipe": [line for line in after if line not in before]}  # fmt: skip
    told = {side: "; ".join(lines[:3]) + (" …" * (len(lines) > 3)) for side, lines in sides.items()}
    return ", ".join(f"{side} {lines or 'nothing'}" for side, lines in told.items())


def _settings(value: Any, name: str = "") -> list[str]:
    """A line a setting: its dotted name, and its value as JSON, in which `"null"` does not look like `null`."""
    if isinstance(value, dict) and value:
        parts = [_settings(part, f"{name}.{key}" if name else str(key)) for key, part in value.items()]
        return [line for lines in parts for line in lines]
    return [f"{name}: {json.dumps(value, ensure_ascii=False, default=str)}"]


def environment() -> dict[str, Any]:
    """Versions, hardware, and the commit of the code where it runs from a checkout."""
    return {
        "commit": commit(),
        "results": RESULTS_VERSION,
        "packages": {name: version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def scratch_version() -> str:
    """What, beside the recipe, decides how a scratch model comes out."""
    return made_by("torch", "transformers", "sentencepiece")


def made_by(*packages: str) -> str:
    """What decides, beside its inputs, how a thing that is trained comes out, to the last digit."""
    versions = [f"{name}={version(name)}" for name in packages]
    machine = f"threads={torch.get_num_threads()} processor={torch.backends.cpu.get_cpu_capability()}"
    return " ".join([*versions, f"results={RESULTS_VERSION}", machine])


def commit() -> str:
    """The commit of this package's checkout, with `-dirty` if its code was changed since; empty if it is installed."""
    package = Path(__file__).parents[1]
    if not (package.parent / ".git").exists():
        return ""
    try:
        named = _git(package.parent, "rev-parse", "HEAD")
        return named + ("-dirty" if _git(package.parent, "status", "--porcelain", "--", package.name) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""  # no git here, or a folder that only looks like a checkout


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()

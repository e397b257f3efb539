"""What a run folder is made of, and how its files are written.

The names below are the contract of the run folder: stages write them, the report and the
model card read them, and no other module spells a file name of the run folder out.
Every write is atomic: a reader sees the old content or the new one, never half of it, even
if the process is killed or the machine stops in between. JSON is strict: NaN and infinity
are refused on writing, because other languages' readers refuse them on reading.

Knows bytes, JSON and hashes; knows nothing of items, models or torch.
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from llm_itemtok.errors import ArtifactError

_TEMPORARY = r"\.[^.].*\.(itemtok-new|itemtok-old)\.[a-z0-9_]{8}"
"""Names that `tempfile` makes for the functions below; nobody else's look like them, since leftovers are deleted."""
_ASIDE = r"\.(?P<name>[^.].*)\.itemtok-old\.[a-z0-9_]{8}"
"""Those among them of folders that stepped aside for new ones, and whose place may still be empty."""
CONTENT = "content.json"
"""In a kept folder: the hash of each of its files, written last."""
FORMAT_VERSION = 1
"""Version of the files below; a reader refuses a newer one."""

RECIPE = "recipe.yaml"
"""The resolved recipe: every setting, after `extends` and `--set`."""
ENVIRONMENT = "environment.json"
"""Versions, hardware and seeds of the run."""
METRICS_LOG = "metrics.jsonl"
"""One line a logging event of training."""
TRAINING = "training.json"
"""What training took and how validation went."""
TOKEN_WEIGHTS = "token_weights.json"
"""Weights of target tokens by level and by popularity, where the objective has any."""
RESCORING = "rescoring.json"
"""Metrics on validation by the dense model's share in the scores, and the share that was chosen."""
ITEM_PATHS = "item_paths.json"
"""How far the vectors of items go by their codes, where a recursive network makes them."""
METRICS = "metrics.json"
"""Test and validation metrics, baselines and protocol."""
CODES = "codes"
"""Folder of item codes: `v0`, `v1`, ..."""
PREDICTIONS = "predictions.parquet"
"""Columns user, rank, item, score."""
RANKS = "ranks.parquet"
"""Columns user, rank: where each test user's target was found, 0 if it was not."""
CHECKPOINTS = "checkpoints"
"""Of the training: the best one by validation and the newest."""
MODEL = "model"
"""The bundle that `Recommender.from_pretrained` loads."""
REPORT = "report.html"
"""The self-contained report."""
QUALITY = "quality.json"
"""Beside the codes of each version: usage, collisions and verdict."""
EXAMPLES = "examples.json"
"""A few users with history, target and recommendations, for the report."""
ITEMS = "items.jsonl"
"""In the bundle: id, title and code of every item."""
MEASURED = (METRICS, PREDICTIONS, RANKS, EXAMPLES, REPORT)
"""What tells how good a run's model is: a model that takes the place of another begins without."""
CATEGORIES = "categories.parquet"
"""Columns item, categories: every item of the catalogue in its order, for the report."""
TRACE = "trace.parquet"
"""Beside the codes of a version that an update made: item, old, new, why, of the items whose code changed, and the
log-likelihood of either code where the update went by it."""
UPDATES = "updates.jsonl"
"""One line a round of updates of item tokens: what moved, how it was judged, what it cost."""
STAGES = "stages.json"
"""Which stages are finished, and the hashes of what went into each."""


def cache_folder() -> Path:
    """Folder of what is worth keeping between runs: item vectors, RQ-VAEs, `scratch` models and baselines.

    Each stands under a hash of what went into it. The folder is `$ITEMTOK_CACHE`, else `llm_itemtok` under
    `$XDG_CACHE_HOME`, else `~/.cache/llm_itemtok`. It may be deleted.
    """
    if given := os.environ.get("ITEMTOK_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_itemtok"


def kept_folder(
    parent: Path, key: str, fill: Callable[[Path], None], log: Callable[[str], None] = lambda line: None
) -> Path:
    """Find a folder that is kept, or fill it now; processes that need the same one wait for the first of them.

    A folder whose files are not those that were written, such as after a clean-up by age, is filled anew. Who fills it
    holds a lock beside it, which the system gives back when its process ends, however it ends.

    Args:
        parent: what it stands in, as a rule a folder of `cache_folder()`; made when missing.
        key: hash of all that its content depends on.
        fill: writes the content, files without folders, into an empty folder. If it raises, nothing is kept.
        log: told if another process is at work on it.

    Returns:
        The folder, to be read and not changed.

    Raises:
        OSError: if the cache cannot be written to.
    """
    place = parent / key[:32]
    if _is_whole(place):
        return place
    parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_suffix(".lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log(f"  waiting for {place}, which another process makes")
        lock.acquire()
    try:
        if not _is_whole(place):
            for left in filter(is_leftover, place.parent.glob(f".{place.name}.*")):  # of those that were killed
                shutil.rmtree(left, ignore_errors=True)
            with atomic_folder(place) as new:
                fill(new)
                write_json(new / CONTENT, {path.name: sha256_of_file(path) for path in sorted(new.iterdir())})
    finally:
        lock.release()
    return place


def _is_whole(place: Path) -> bool:
    """Whether a kept folder has the files that were written, as they were."""
    if not (place / CONTENT).is_file():
        return False
    try:
        content = read_json(place / CONTENT)
    except ArtifactError:
        return False
    names = content if isinstance(content, dict) else {}
    return bool(names) and all(
        (place / name).is_file() and sha256_of_file(place / name) == found for name, found in names.items()
    )


def sha256_of_arrays(*arrays: np.ndarray | bytes | str) -> str:
    """Hash arrays, bytes and texts together, in the order given.

    Type, dtype and shape are hashed with the content, so `[1, 2], [3]` and `[1], [2, 3]` differ, and so do
    int32 and int64 of the same numbers. Byte order and memory layout do not matter.

    Args:
        *arrays: numeric or boolean arrays of any shape, bytes, or texts (hashed as UTF-8).

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: for an array of Python objects, whose bytes would be addresses.
    """
    digest = hashlib.sha256()
    for part in arrays:
        if isinstance(part, str):
            header, content = "text", part.encode("utf-8", "surrogatepass")
        elif isinstance(part, bytes):
            header, content = "bytes", part
        else:
            if part.dtype.hasobject:
                raise TypeError(f"only arrays of numbers can be hashed, was: dtype {part.dtype}")
            little = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
            header, content = f"array {little.dtype.str} {part.shape}", little.tobytes()
        digest.update(f"{header} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def sha256_of_file(path: Path | str) -> str:
    """Hash a file's content.

    Returns:
        64 hexadecimal digits, the same that `sha256sum` prints.

    Raises:
        OSError: if the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path | str, content: bytes) -> None:
    """Replace a file's content atomically; its folder is made when missing.

    Raises:
        OSError: if the file cannot be written; the old content then still stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.itemtok-new.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; a run folder is made to be read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Replace a file's content atomically by a text in UTF-8.

    Raises:
        OSError: if the file cannot be written; the old content then still stands.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Replace a file's content atomically by a value as JSON: indented, keys in the order given.

    NumPy numbers and arrays are written as numbers and lists.

    Raises:
        ArtifactError: if a number in it is NaN or infinite, with the place it stands in.
        TypeError: if a value has no JSON form.
        OSError: if the file cannot be written; the old content then still stands.
    """
    text = json.dumps(_plain(value, where="", path=Path(path)), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_text(path: Path | str) -> str:
    """Read a text file.

    Raises:
        ArtifactError: if there is no such file, or it is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: a text file must be here, found: {'a folder' if path.is_dir() else 'nothing'}")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: it must be text in UTF-8, found another byte at {error.start}") from error


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: if there is no such file, or it is not JSON in UTF-8 that can be read; the message names the
            file and line.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ArtifactError(f"{path}: a JSON file must be here, found: {found}")
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: JSON must be UTF-8, found another byte at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}:{error.lineno}: not JSON: {error.msg}; was the file cut short?") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        raise ArtifactError(f"{path}: JSON must have numbers and depths that can be read: {error}") from error


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Fill a folder beside its place, then move it there in one step, in place of what stood there before.

    If the body raises, the old folder stays as it was and the new one is removed.

    Args:
        path: where the folder will stand; its parent is made when missing.

    Yields:
        An empty folder to write into.

    Raises:
        OSError: if the folder cannot be made or moved.
    """
    path = Path(path).resolve()  # of a link to a folder elsewhere the folder is meant, of `.` the one with a name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.itemtok-new."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                os.chmod(file, 0o666 & ~_umask())  # safetensors makes private files, too
                _sync_file(file)
        _swap_in(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def code_versions(run: Path) -> list[tuple[int, Path]]:
    """Numbers and folders of the versions of a run's item codes, the first one first; none where there is no run."""
    named = [(re.fullmatch(r"v(\d+)", path.name), path) for path in (run / CODES).glob("v*")]
    return sorted((int(name[1]), path) for name, path in named if name)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: a recipe alone makes none, as whoever keeps models may have recipes there."""
    return (folder / RECIPE).is_file() and (folder / ENVIRONMENT).is_file()


def run_of(place: Path) -> Path | None:
    """The run folder that a folder is, or whose model it is; None if it is neither."""
    place = place.resolve()
    around = (place, place.parent) if place.name == MODEL else (place,)
    return next(filter(is_run, around), None)


def refuse_model_of_run(out: Path) -> None:
    """Raise `ArtifactError` where another bundle would take the place of a run's model, which belongs to its codes."""
    if run_of(out) is not None:
        raise ArtifactError(f"{out}: a run folder keeps the model that the run made; choose another folder")


def refuse_aside(folder: Path) -> None:
    """Raise `ArtifactError` where a folder is missing that had stepped aside for a new one which never came."""
    pattern = re.compile(_ASIDE)
    for path in () if folder.exists() or not folder.parent.is_dir() else folder.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and found["name"] == folder.name:
            raise ArtifactError(
                f"{folder}: it is being exchanged, or a process was killed meanwhile; if nobody is at work there, put "
                f"it back: mv {shlex.quote(str(path))} {shlex.quote(str(folder))}"
            )


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is one that a killed process had begun to write, by its name."""
    return re.fullmatch(_TEMPORARY, path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes had begun to write in a folder, at any depth; no other may be at work there.

    A folder that had stepped aside for a new one which never came is put back.
    """
    for path in [path for path in folder.rglob(".*") if is_leftover(path)]:
        aside = re.fullmatch(_ASIDE, path.name)
        if aside and not (path.parent / aside["name"]).exists():
            path.rename(path.parent / aside["name"])
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # one may lie in another
        else:
            path.unlink(missing_ok=True)


def _swap_in(new: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(new, path)
        return
    # A folder that is not empty cannot be replaced in one call: it steps aside first and comes back on failure.
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.itemtok-old."))
    os.replace(path, aside)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(aside, path)
        raise
    shutil.rmtree(aside)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's file mode mask; there is no way to read it but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _plain(value: Any, *, where: str, path: Path) -> Any:
    """Turn NumPy values into Python's, and name the place of a number that JSON cannot hold."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        places = {str(key): f"{where}.{key}" if where else str(key) for key in value}
        return {str(key): _plain(inner, where=places[str(key)], path=path) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, where=f"{where}[{i}]", path=path) for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError(f"{path}: `{where}` must be a finite number to be written as JSON, was: {value}")
    return value

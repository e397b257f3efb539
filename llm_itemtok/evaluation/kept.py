"""Ranks of baselines that are kept: measured once, for all runs and processes that need them.

Decisions:
- A file is named by a hash of all that decides its ranks, and the whole hash stands in it, with a hash of what is kept.
  A file that was cut, changed or is about something else counts as absent and is made again.
- Who measures holds a lock beside the file, and others who need the same wait for it, because a baseline can take
  minutes. The system gives a lock back when its process ends, however it ends; the empty lock file stays.
- Nothing depends on a folder that can be written to: without one there is no lock, and the next run measures again.

Knows files and numbers; what is measured, and what decides it, is the caller's.

Shape letters in this file: C cases.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from llm_itemtok.artifacts import read_json, sha256_of_arrays, write_json
from llm_itemtok.errors import ArtifactError


class Measured(NamedTuple):
    """What is kept of a baseline on a split."""

    test: NDArray[np.float64]
    """Ranks of the test cases, float64 [C]."""
    validation: NDArray[np.float64]
    """Ranks of the validation cases, float64 [C]."""
    settings: dict[str, Any]
    """What was chosen on validation."""
    seconds: float
    """Taken to tune, fit and rank."""


def measured_once(
    path: Path, key: str, sizes: tuple[int, int], measure: Callable[[], Measured], log: Callable[[str], None]
) -> Measured:
    """Find what was kept when it was measured before, or measure it while no other process does.

    Args:
        path: where it is kept; the folder is made when missing. Beside it stands a file of the same name with the
            ending `.lock`.
        key: hash of all that decides the ranks.
        sizes: numbers of test and validation cases.
        measure: what to call when nothing is kept.
        log: called with a line when another process is waited for, and when the file cannot be written.
    """
    kept = _read(path, key, sizes)
    if kept is None:
        with _alone(path.with_suffix(".lock"), log):
            kept = _read(path, key, sizes)  # it may have been made while this process waited
            if kept is None:
                kept = measure()
                _write(path, key, kept, log)
    return kept


@contextmanager
def _alone(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock, waiting for it as long as it takes; go on without one where files cannot be written."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"  another process is measuring {path.stem}; waiting for it …")
            lock.acquire()
    except OSError:
        pass  # `_write` says what is wrong
    try:
        yield
    finally:
        lock.release()  # nothing happens if it is not held


def _write(path: Path, key: str, measured: Measured, log: Callable[[str], None]) -> None:
    try:
        write_json(path, {"key": key, "content": _content(measured), **measured._asdict()})
    except OSError as error:
        log(f"  {path} could not be written, so this baseline is measured again next time: {error}")


def _read(path: Path, key: str, sizes: tuple[int, int]) -> Measured | None:
    """Read what was kept under a key; None if there is nothing, or nothing that can be trusted."""
    try:
        kept = read_json(path)
        ranks = [np.array(kept[part], dtype=np.float64) for part in ("test", "validation")]
        measured = Measured(ranks[0], ranks[1], dict(kept["settings"]), float(kept["seconds"]))
        trusted = kept["key"] == key and kept["content"] == _content(measured)
    except (ArtifactError, OSError, KeyError, TypeError, ValueError):
        return None
    return measured if trusted and [part.shape for part in ranks] == [(size,) for size in sizes] else None


def _content(measured: Measured) -> str:
    """Hash what is kept, so that a file that was changed or cut is known as such."""
    settings, seconds = sorted(measured.settings.items()), float(measured.seconds)
    return sha256_of_arrays(measured.test, measured.validation, f"{settings} {seconds}")

"""Ranks of baselines that are kept: measured once, for all runs and processes that need them.

They stand in a folder of the cache (`artifacts.kept_folder`), whose name is a hash of all that decides them. A cache
that cannot be written to does no harm: the next run measures again.

Knows files and numbers; what is measured, and what decides it, is the caller's.

Shape letters in this file: C cases.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_itemtok.artifacts import kept_folder, read_json, write_json

_RANKS = "ranks.json"


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


def measured_once(folder: Path, key: str, measure: Callable[[], Measured], log: Callable[[str], None]) -> Measured:
    """Find what was kept when it was measured before, or measure it while no other process does.

    Args:
        folder: what it is kept in, under the key; made when missing.
        key: hash of all that decides the ranks.
        measure: what to call when nothing is kept.
        log: called with a line when another process is waited for, and when nothing can be written.
    """
    made: list[Measured] = []

    def fill(new: Path) -> None:
        made.append(measure())
        write_json(new / _RANKS, made[0]._asdict())

    try:
        kept = read_json(kept_folder(folder, key, fill, log) / _RANKS)
    except OSError as error:
        log(f"  {folder} could not be written, so this baseline is measured again next time: {error}")
        return made[0] if made else measure()
    test, validation = (np.array(kept[part], dtype=np.float64) for part in ("test", "validation"))
    return Measured(test, validation, kept["settings"], kept["seconds"])

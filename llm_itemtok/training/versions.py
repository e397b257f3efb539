"""The versions of a run's item codes on disk, and the log of the rounds that made them.

`codes/v0` is what training begins with. An update that is accepted leaves the next version, with its quality and a
trace of what moved; a line of `updates.jsonl` tells each round, accepted or not. A training that begins, or goes on
from a checkpoint, first removes what belongs to a future that it has not had yet, and then writes it again the same.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm_itemtok.artifacts import CODES, QUALITY, TRACE, UPDATES, atomic_folder, code_versions, write_json, write_text
from llm_itemtok.items.codes import ItemCodes

FREE, LEFT = "to a code that nobody had", "to a code that another item left"
"""Why an item has its new code, as far as codes tell."""


@dataclass(frozen=True)
class Moves:
    """Items whose code an update changed.

    Attributes:
        rows: int64 `[M]`, ascending.
        before: float32 `[M]`, log-likelihood of the old code, in nats; NaN where the update did not go by it.
        after: float32 `[M]`, that of the new one.
    """

    rows: np.ndarray
    before: np.ndarray
    after: np.ndarray


class Versions:
    """Item codes and rounds in a run folder.

    Attributes:
        folder: the run folder.
        item_ids: of the items, in the order of the codes.
    """

    def __init__(self, folder: Path, item_ids: Sequence[str]) -> None:
        """Work in `folder`, whose `codes/v0` is another stage's."""
        self.folder = folder
        self.item_ids = item_ids

    def path(self, number: int) -> Path:
        """The folder of a version."""
        return self.folder / CODES / f"v{number}"

    def rewind(self, number: int, rounds: int) -> None:
        """Remove versions after `number`, and the lines of all rounds but the first `rounds`."""
        for there, path in code_versions(self.folder):
            if there > number:
                shutil.rmtree(path)
        log = self.folder / UPDATES
        lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
        kept = [line for line in lines if json.loads(line)["round"] <= rounds]
        write_text(log, "".join(f"{line}\n" for line in kept))

    def tell(self, line: Mapping[str, Any]) -> None:
        """Add the line of a round."""
        with (self.folder / UPDATES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write(self, number: int, old: ItemCodes, new: ItemCodes, moves: Moves, quality: Mapping[str, Any]) -> None:
        """Write a version: its codes, their quality, and the trace of what moved."""
        with atomic_folder(self.path(number)) as folder:
            new.save(folder)
            write_json(folder / QUALITY, quality)
            pq.write_table(self._trace(old, new, moves), folder / TRACE)

    def _trace(self, old: ItemCodes, new: ItemCodes, moves: Moves) -> pa.Table:
        left = _held(old, new.table[moves.rows])
        codes = pa.list_(pa.int32())
        return pa.table(
            {
                "item": pa.array([self.item_ids[row] for row in moves.rows.tolist()], pa.string()),
                "old": pa.array(old.table[moves.rows].tolist(), codes),
                "new": pa.array(new.table[moves.rows].tolist(), codes),
                "why": pa.array([LEFT if held else FREE for held in left.tolist()], pa.string()),
                "likelihood_before": pa.array(moves.before, pa.float32(), from_pandas=True),  # NaN is null
                "likelihood_after": pa.array(moves.after, pa.float32(), from_pandas=True),
            }
        )


def usage_of(codes: ItemCodes) -> list[dict[str, Any]]:
    """Of each level its name, how many codewords are in use, and the entropy of their use in bits."""
    usage = []
    for name, size, column in zip(codes.names, codes.sizes, codes.table.T, strict=True):
        shares = np.bincount(column, minlength=size) / codes.num_items
        used = shares[shares > 0]
        usage.append({"name": name, "used": len(used), "entropy_bits": float(-(used * np.log2(used)).sum())})
    return usage


def _held(codes: ItemCodes, table: np.ndarray) -> np.ndarray:
    """Whether each of some codes `[M, L]` is that of an item, bool `[M]`."""
    both = ItemCodes(np.concatenate([codes.table, table]), codes.sizes)
    numbers = both.prefix_groups(both.num_levels)
    return np.isin(numbers[codes.num_items :], numbers[: codes.num_items])

"""Print the adapter matrix of `docs/adapters.md`: what becomes of logits on every way out of training and back.

From a checkout: `.venv/bin/python scripts/adapter_matrix.py`. Tiny models, a minute in all.
"""

import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.model.matrix import FAMILIES, MODES, TIES, Cell, measure

HEAD = "| model | head | training | load | plain PEFT | merged | resumed | adapter, bytes | of it LoRA and rows |"


def row(family: str, tie: str, mode: str, cell: Cell) -> str:
    """One line of the table."""
    peft = "refused" if cell.peft is None else f"{cell.peft:.1g}"
    sizes = "none | none" if cell.peft is None else f"{cell.file:,} | {cell.tensors:,}"
    numbers = f"{cell.load:.1g} | {peft} | {cell.merge:.1g} | {cell.resume:.1g}"
    return f"| {family} | {tie} | {mode} | {numbers} | {sizes} |"


def main() -> None:
    """Measure and print all cells."""
    warnings.simplefilter("ignore")
    print(HEAD)
    print("|---" * 9 + "|")
    for family in FAMILIES:
        for tie in TIES:
            for mode in MODES:
                with tempfile.TemporaryDirectory() as folder:
                    print(row(family, tie, mode, measure(family, tie, mode, Path(folder))), flush=True)


if __name__ == "__main__":
    main()

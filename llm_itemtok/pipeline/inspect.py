"""`itemtok inspect`: the quality of item tokens, wherever they are kept."""

from pathlib import Path

import numpy as np

from llm_itemtok.artifacts import CODES, MODEL
from llm_itemtok.errors import ArtifactError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.quality import quality, quality_table


def inspect(path: Path, compare: Path | None = None) -> str:
    """Describe the item tokens of a run, a bundle or a codes folder.

    Args:
        path: what to look at; of a run, the newest version.
        compare: other codes of the same items.

    Raises:
        ArtifactError: if there are no codes, or the two have different numbers of items.
    """
    codes, place = _load(path)
    text = f"{place}\n{quality_table(quality(codes))}"
    if compare is None:
        return text
    other, other_place = _load(compare)
    if other.num_items != codes.num_items:
        raise ArtifactError(
            f"codes to compare must be of the same items, found: {codes.num_items:,} in {place} and "
            f"{other.num_items:,} in {other_place}"
        )
    text += f"\n\n{other_place}\n{quality_table(quality(other))}\n\n"
    shared = min(codes.num_levels, other.num_levels)
    same = np.cumprod(codes.table[:, :shared] == other.table[:, :shared], axis=1).mean(0)
    kept = ", ".join(f"{share:.1%} to level {level + 1}" for level, share in enumerate(same))
    return text + f"Items with the same code in both: {kept}."


def _load(path: Path) -> tuple[ItemCodes, Path]:
    """Codes in a folder, in its `model/`, or the newest version of its `codes/`."""
    versions = sorted((path / CODES).glob("v[0-9]*"), key=lambda folder: int(folder.name[1:])) if path.is_dir() else []
    for place in (path, *reversed(versions), path / MODEL):
        if (place / "item_codes.safetensors").is_file():
            return ItemCodes.load(place), place
    raise ArtifactError(
        f"{path}: no item codes here; name a run, a model folder or a folder with item_codes.safetensors"
    )

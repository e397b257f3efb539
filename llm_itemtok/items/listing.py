"""The items of a bundle as its `items.jsonl` lists them: one a line, by row, with id, title and item tokens.

Bundles are exchanged, so nothing in the file is taken on trust: whoever reads ids and titles gets texts that a file can
hold, and no id twice.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llm_itemtok.errors import ArtifactError

_TEXTS = {"id", "title", "code"}


def read_listing(path: Path, needed: Sequence[str] = ("id",)) -> list[dict[str, str]]:
    """Read the items of a bundle.

    Args:
        path: of the file.
        needed: what each item must have, of `id`, `title` and `code`; ids are distinct, titles may be empty.

    Raises:
        ArtifactError: if the file is missing, or a line holds no such item.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: a bundle must hold this file, which is missing")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: items must be UTF-8, found another byte at {error.start}") from error
    items = []
    # Not `splitlines`: titles may hold other line ends, which JSON leaves as they are.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or brackets without end
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ArtifactError(f"{path}:{number}: not JSON: {reason}; was the file cut short?") from error
        if not isinstance(item, dict) or not all(_is_text(item.get(name)) for name in {*needed, *item} & _TEXTS):
            told = " and ".join(f"`{name}`" for name in needed)
            raise ArtifactError(
                f"{path}:{number}: a line must hold an item with {told}, each a text in UTF-8, was: {line[:80]!r}"
            )
        items.append(item)
    item_id, times = Counter(item["id"] for item in items).most_common(1)[0]
    if times > 1:
        raise ArtifactError(f"{path}: each item must be there once, but {item_id!r} is there {times} times")
    return items


def _is_text(value: object) -> bool:
    """Whether a value of JSON is a text that a file can hold; JSON can also name half a pair of code units."""
    return isinstance(value, str) and re.search(r"[\ud800-\udfff]", value) is None

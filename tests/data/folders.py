"""Small data folders for tests: content is text, bytes, or lists of records."""

import json
from pathlib import Path

ITEMS = [
    {"item_id": 7, "title": "The Ember Crown", "categories": [["Books", "Fantasy"]], "brand": "Ada Marsh"},
    {"item_id": "007", "title": "Licence to Bake", "categories": "Books|Cooking", "brand": None},
    {"item_id": "b", "title": None, "categories": None, "brand": ""},
    {
        "item_id": "c",
        "title": "  Beyond \n the   Signal ",
        "categories": ["Books", "Books", ""],
        "description": "Long.",
    },
]
LOG = "user_id,item_id,timestamp\nu1,7,10\nu1,007,20\nu1,b,30\nu2,c,5\nu2,7,5\nu2,b,6\n"


def text_of(content) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    return "".join(json.dumps(record) + "\n" for record in content).encode()


def make_folder(path: Path, files=None) -> Path:
    """A good folder, with some files replaced, added, or (None) left out."""
    for name, content in {"items.jsonl": ITEMS, "interactions.csv": LOG, **(files or {})}.items():
        if content is not None:
            (path / name).write_bytes(text_of(content))
    return path

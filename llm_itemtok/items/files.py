"""Files of item codes: reading codes that were made elsewhere, writing ours for other programs.

- `index`, `*.index.json`: `{item: ["<a_12>", "<b_3>", ...]}` of LC-Rec, LETTER and MiniOneRec, by id or row number.
- `catalogue`, any other `*.json`: `{"12,3,7": [items]}` as FlashRec reads it, codewords separated by commas.
- `csv`, `*.csv`: a column `item_id`, then one column of whole numbers a level.
- `safetensors`, `item_codes.safetensors`: our own, joined by id where the `items.jsonl` of a bundle stands beside it,
  else in the order of the catalogue.

Decisions:
- A name says in which format a file is written. Read, JSON shows by its content whether it is an index.
- Codes are joined to the catalogue by item id, so order does not matter. An index whose keys are the numbers 0, 1, ...
  and none of them an id of the catalogue is in its order. Which of the two it was is kept in the provenance.
- How many codewords a level has room for stands only in our own format. Elsewhere it is the largest codeword in use
  plus one, unless it is given. Every one becomes a row of a model, so a level with more of them than items and than any
  recipe may ask for is taken for a slip, such as an item number among the codewords.
- Read as they are: codes that items share are the business of `collisions`.
- All but our own may be compressed (`.gz`) when read.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

import numpy as np

from llm_itemtok.artifacts import ITEMS, sha256_of_file, write_text
from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import FILE_NAME, ItemCodes
from llm_itemtok.items.listing import read_listing

Format = Literal["index", "catalogue", "csv", "safetensors"]
Code = tuple[int, ...]

MOST_LEVELS = len(ascii_lowercase)
"""Item tokens are called by a letter a level."""
MOST_CODEWORDS = 65_536
"""Of a level with fewer items than that; as many as a recipe's `codebook_size` goes to."""

_TOKEN = re.compile(r"<(.+)_(\d+)>")
_ID_KEYS = ("item_id", "id", "pid", "iid", "vid")
"""Where catalogues of others keep the item, when they say more of it than its id."""


def format_of(path: str | Path) -> Format:
    """Tell a file's format by its name.

    Raises:
        DataError: if no format has such a name.
    """
    name = Path(path).name.removesuffix(".gz")
    if name == FILE_NAME:
        return "safetensors"
    if name.endswith(".csv"):
        return "csv"
    if name.endswith(".json"):
        return "index" if name.endswith(".index.json") else "catalogue"
    raise DataError(
        f"{path}: a file of item codes must be called *.index.json, *.json (a catalogue), *.csv or {FILE_NAME}, "
        f"was: {name}"
    )


def read_codes(
    path: str | Path,
    item_ids: Sequence[str],
    *,
    sizes: Sequence[int] | None = None,
    unknown_items: Literal["error", "drop"] = "error",
) -> ItemCodes:
    """Read codes for a catalogue.

    Args:
        path: of one of the formats above; for our own also the folder that holds it.
        item_ids: of the catalogue, N distinct ids in its order.
        sizes: capacity of each level; when not given, what the file says, or else the largest codeword plus one.
        unknown_items: what to do with items of the file that the catalogue does not have.

    Returns:
        Codes of the N items, perhaps shared, with the file's name and hash in their provenance, and whether they were
        `joined_by` "id" or "row"; those of our own format with how their collisions were resolved.

    Raises:
        ArtifactError: if a file of our own format is not readable.
        DataError: if there is no such file, or it is not of its format, or an item is missing, unknown or there twice,
            or codes are not of one length, or levels or codewords too many, or `sizes` do not fit.
    """
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        model = path.parent / "model"
        advice = f"; a run has them in its model: {model}" if (model / FILE_NAME).is_file() else ""
        raise DataError(
            f"{path}: a file of item codes (a recipe's `tokenizer.path`) must be here, found: nothing{advice}"
        )
    kind, provenance = format_of(path), {"kind": "file", "file": path.name, "sha256": sha256_of_file(path)}
    if kind == "safetensors":
        saved = _read_safetensors(path, item_ids, unknown_items)
        provenance["joined_by"] = "id" if (path.parent / ITEMS).is_file() else "row"
        if saved.words is not None:
            raise DataError(
                f"{path}: a file must hold codes that become item tokens, but these are in words of a language model; "
                "use `tokenizer.kind: numeric` or `title`"
            )
        _refuse_too_much(path, sizes or saved.sizes, saved.num_items)
        if "collisions" in saved.provenance:
            provenance["collisions"] = saved.provenance["collisions"]  # whether the last level only counts
        return ItemCodes(saved.table, sizes or saved.sizes, names=saved.names, provenance=provenance)
    codes, names, of_items = _read_text(path, kind)
    by_row = of_items and are_rows(codes, item_ids)
    if by_row:
        codes = {item_id: codes[str(row)] for row, item_id in enumerate(item_ids)}
    _refuse_other_items(codes, item_ids, unknown_items, path)
    table = np.array([codes[item_id] for item_id in item_ids], dtype=np.int64)
    if sizes is None:
        sizes = (table.max(axis=0) + 1).tolist()
    _refuse_too_much(path, sizes, len(table))
    provenance["joined_by"] = "row" if by_row else "id"
    return ItemCodes(table, sizes, names=names, provenance=provenance)


def read_items_and_codes(path: str | Path) -> tuple[tuple[str, ...], ItemCodes]:
    """Read the codes of a file for whatever items it has.

    Args:
        path: of one of the formats above but our own, which may say nothing of items.

    Returns:
        Ids in the order of the file, or 0, 1, ... in their own if they are those numbers; and the codes of the items.

    Raises:
        DataError: if there is no such file, or it is not of its format, or codes are not of one length, or levels or
            codewords too many.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: a file of item codes (a recipe's `tokenizer.path`) must be here, found: nothing")
    codes, names, _ = _read_text(path, format_of(path))
    rows = tuple(str(row) for row in range(len(codes)))
    item_ids = rows if all(row in codes for row in rows) else tuple(codes)
    table = np.array([codes[item_id] for item_id in item_ids], dtype=np.int64)
    sizes = (table.max(axis=0) + 1).tolist()
    _refuse_too_much(path, sizes, len(table))
    provenance = {"kind": "file", "file": path.name, "sha256": sha256_of_file(path)}
    return item_ids, ItemCodes(table, sizes, names=names, provenance=provenance)


def _read_text(path: Path, kind: Format) -> tuple[dict[str, Code], list[str] | None, bool]:
    """Codes by item, all of one length, of a file that is not our own; names of levels; whether it is an index."""
    names, of_items = None, False
    if kind == "csv":
        codes, names = _read_csv(path)
    else:
        content = _json(path)
        of_items = any(map(_looks_like_an_index, content.items()))
        codes = (_read_index if of_items else _read_catalogue)(path, content)
    _refuse_ragged(codes, path)
    return codes, names, of_items


def export_codes(codes: ItemCodes, item_ids: Sequence[str], path: str | Path, format: Format | None = None) -> Path:
    """Write codes for another program, atomically.

    Args:
        codes: N items.
        item_ids: their ids, in the order of the rows; our own format does not hold them.
        path: of the file; for our own format it is called `item_codes.safetensors`.
        format: told by the name when not given.

    Returns:
        The path.

    Raises:
        DataError: if the name says no format, an index is to have more levels than letters, ids and codes do not fit,
            our own format is to have another name, or codewords are existing words and the format is another one.
        OSError: if the file cannot be written.
    """
    path, kind = Path(path), format or format_of(path)
    if kind == "safetensors":
        if path.name != FILE_NAME:
            raise DataError(f"{path}: a file of our own item codes must be called {FILE_NAME}, was: {path.name}")
        return codes.save(path.parent)
    if len(item_ids) != codes.num_items or len(set(item_ids)) != len(item_ids):
        raise DataError(
            f"codes to export need one distinct id an item, {codes.num_items:,} of them, was: {len(set(item_ids)):,} "
            f"distinct among {len(item_ids):,}"
        )
    if codes.words is not None:
        raise DataError(
            f"{path}: other programs read codes of item tokens, but these are in words of a language model; "
            f"the model's {ITEMS} has them, and {FILE_NAME} can be written"
        )
    rows = codes.table.tolist()
    if kind == "csv":
        lines = [["item_id", *codes.names], *([item_id, *row] for item_id, row in zip(item_ids, rows, strict=True))]
        write_text(path, "".join(",".join(map(_csv_cell, line)) + "\n" for line in lines))
        return path
    content: dict[str, Any] = {}
    if kind == "index":
        if codes.num_levels > len(ascii_lowercase):
            raise DataError(f"an index names levels a to z, so there must be at most 26, was: {codes.num_levels}")
        for item_id, row in zip(item_ids, rows, strict=True):
            content[item_id] = [f"<{ascii_lowercase[level]}_{word}>" for level, word in enumerate(row)]
    else:
        for item_id, row in zip(item_ids, rows, strict=True):
            content.setdefault(",".join(map(str, row)), []).append(item_id)
    write_text(path, json.dumps(content, ensure_ascii=False) + "\n")
    return path


def _csv_cell(value: object) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\r\n]', text) else text


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: item codes must be text in UTF-8: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, none of whose keys stands twice."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"{path}: each key must stand there once, but {twice!r} stands there several times")
        return found

    try:
        value = json.loads(_text(path), object_pairs_hook=distinct)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}; was the file cut short?") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
        raise DataError(f"{path}: not JSON that can be read: {error}") from error
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path}: item codes must be a JSON object with an entry an item, was: {type(value).__name__}")
    return value


def _looks_like_an_index(entry: tuple[str, Any]) -> bool:
    """Whether an entry of a JSON object is an item with its tokens, rather than a code with its items."""
    tokens = entry[1]
    return (
        isinstance(tokens, list) and bool(tokens) and isinstance(tokens[0], str) and bool(_TOKEN.fullmatch(tokens[0]))
    )


def _read_index(path: Path, content: Mapping[str, Any]) -> dict[str, Code]:
    codes: dict[str, Code] = {}
    letters: dict[int, str] = {}
    for item, tokens in content.items():
        listed = tokens if isinstance(tokens, list) and tokens else [None]
        matches = [_TOKEN.fullmatch(token) if isinstance(token, str) else None for token in listed]
        if not all(matches):
            raise DataError(
                f'{path}: an item must have a list of tokens such as ["<a_12>", "<b_3>"], but {item!r} has: {tokens!r}'
            )
        for level, match in enumerate(filter(None, matches)):
            if letters.setdefault(level, match[1]) != match[1]:
                raise DataError(
                    f"{path}: tokens of one level must begin alike, but level {level} of {item!r} is {match[0]} where "
                    f"others are <{letters[level]}_...>"
                )
        codes[item] = tuple(_codeword(match[2], path) for match in filter(None, matches))
    return codes


def _read_catalogue(path: Path, content: Mapping[str, Any]) -> dict[str, Code]:
    codes: dict[str, Code] = {}
    for key, value in content.items():
        words = [word.strip() for word in key.split(",")]
        if not all(word.isdecimal() for word in words):
            raise DataError(
                f"{path}: must be an index, items with tokens such as <a_12>, or a catalogue, codewords separated by "
                f'commas ("12,3,7") with items, was: {key!r} with {value!r}'
            )
        code = tuple(_codeword(word, path) for word in words)
        for entry in value if isinstance(value, list) else [value]:
            item = next((entry[name] for name in _ID_KEYS if name in entry), None) if isinstance(entry, dict) else entry
            if isinstance(item, bool) or not isinstance(item, str | int):
                raise DataError(f"{path}: a code must have the ids of its items, but {key!r} has: {entry!r}")
            if codes.setdefault(str(item), code) != code:
                raise DataError(f"{path}: each item must have one code, but item {str(item)!r} has several")
    return codes


def _read_csv(path: Path) -> tuple[dict[str, Code], list[str]]:
    try:
        reader = csv.reader(io.StringIO(_text(path), newline=""))
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise DataError(f"{path}: not a csv file that can be read: {error}") from error
    header = lines[0][1] if lines else ["nothing"]
    if header[0] != "item_id" or len(header) < 2 or len(set(header)) < len(header):
        found = ", ".join(header)
        raise DataError(f"{path}: the columns must be item_id and one a level, with distinct names, was: {found}")
    codes: dict[str, Code] = {}
    for number, (item, *words) in lines[1:]:
        if len(words) != len(header) - 1 or not all(word.strip().isdecimal() for word in words):
            raise DataError(
                f"{path}: line {number} must have a whole number from 0 a level, {len(header) - 1} of them, was: "
                f"{', '.join(words)}"
            )
        if item in codes:
            raise DataError(f"{path}: each item must stand there once, but item {item!r} stands there several times")
        codes[item] = tuple(_codeword(word, path) for word in words)
    if not codes:
        raise DataError(f"{path}: there must be a line an item below the names of the columns, found: none")
    return codes, header[1:]


def _codeword(digits: str, path: Path) -> int:
    text = digits.strip().lstrip("0")
    if len(text) > 9:  # a table holds int32; and numbers of thousands of digits cannot even be read
        shown = text if len(text) <= 30 else f"a number of {len(text):,} digits"
        raise DataError(
            f"{path}: codewords must be small numbers from 0, one a row of the model, was: {shown}; number the "
            "codewords of each level 0, 1, 2, ..."
        )
    return int(text or "0")


def _read_safetensors(path: Path, item_ids: Sequence[str], unknown_items: str) -> ItemCodes:
    saved = ItemCodes.load(path)
    beside = path.parent / ITEMS
    if not beside.is_file():
        if saved.num_items != len(item_ids):
            raise DataError(
                f"{path}: codes without ids must be those of the catalogue's {len(item_ids):,} items in its order, "
                f"was: {saved.num_items:,} codes; put {ITEMS} of their bundle beside them to join by id"
            )
        return saved
    rows = {item["id"]: row for row, item in enumerate(read_listing(beside))}
    if len(rows) != saved.num_items:
        raise DataError(f"{beside}: must hold the {saved.num_items:,} items of {path.name}, was: {len(rows):,}")
    _refuse_other_items(rows, item_ids, unknown_items, beside)
    table = saved.table[[rows[item_id] for item_id in item_ids]]
    return ItemCodes(table, saved.sizes, names=saved.names, words=saved.words, provenance=saved.provenance)


def are_rows(keys: Collection[str], item_ids: Sequence[str]) -> bool:
    """Tell whether keys are the numbers of the catalogue's rows: all of them, and none an id of the catalogue.

    Args:
        keys: distinct; a mapping or a set, so that looking one up is quick.
        item_ids: of the catalogue.
    """
    if len(keys) != len(item_ids) or any(item_id in keys for item_id in item_ids):
        return False
    return all(str(row) in keys for row in range(len(item_ids)))


def _refuse_too_much(path: Path, sizes: Sequence[int], num_items: int) -> None:
    """Refuse what no vocabulary of item tokens could hold."""
    if len(sizes) > MOST_LEVELS:
        raise DataError(f"{path}: codes must have at most {MOST_LEVELS} levels, called a to z, was: {len(sizes)}")
    if max(sizes) > max(MOST_CODEWORDS, num_items):
        raise DataError(
            f"{path}: a level must have at most {max(MOST_CODEWORDS, num_items):,} codewords, each a row of the model, "
            f"but level {int(np.argmax(sizes))} goes up to {max(sizes) - 1:,}; number the codewords of each level "
            "0, 1, 2, ..."
        )


def _refuse_ragged(codes: Mapping[str, Code], path: Path) -> None:
    of_length: dict[int, str] = {}
    for item, code in codes.items():
        of_length.setdefault(len(code), item)
    if len(of_length) > 1:
        found = ", ".join(f"{length} ({item!r})" for length, item in sorted(of_length.items()))
        raise DataError(
            f"{path}: all codes must have the same number of levels, was: {found}; give the items without a collision "
            "a last codeword 0 as well"
        )


def _refuse_other_items(found: Mapping[str, Any], item_ids: Sequence[str], unknown_items: str, path: Path) -> None:
    absent = [item_id for item_id in item_ids if item_id not in found]
    if absent:
        raise DataError(
            f"{path}: every item of the catalogue must have a code; {len(absent):,} of {len(item_ids):,} have none, "
            f"e.g. {', '.join(map(repr, absent[:3]))}. Ids in the file look like "
            f"{', '.join(map(repr, list(found)[:3]))}; a model gives new items theirs by `itemtok extend`"
        )
    if unknown_items == "error" and len(found) > len(item_ids):
        known = set(item_ids)
        others = [item for item in found if item not in known]
        raise DataError(
            f"{path}: {len(others):,} items have a code but are not in the catalogue, e.g. "
            f"{', '.join(map(repr, others[:3]))}; `tokenizer.unknown_items: drop` leaves them out"
        )

"""Files to columns: the one place that opens data files, and that says what is wrong with one.

A `Table` holds the columns that were asked for, still as the file has them, and knows the row each entry stands in, so
that whoever finds a bad value can name file, row and column. In text files the row is the line number as an editor
shows it (a CSV file's header is row 1; where a quoted field spans lines, the last of them); in Parquet files, JSON
documents and data sets it counts records from 1.

Text files are read strictly: UTF-8 (a byte order mark is dropped), no NUL bytes, quotes that close,
as many fields as the header has. Knows nothing of items and users.
"""

import ast
import csv
import gzip
import io
import json
import re
import warnings
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from llm_itemtok.errors import DataError

_BLANK_LINE = object()
_FIELD_LIMIT = 2**31 - 1


def shown(value: object) -> str:
    """A value for a message: its repr, cut to a readable length."""
    text = repr(value)
    if len(text) <= 80:
        return text
    return f"{text[:60]}... ({len(value) if isinstance(value, str) else len(text):,} characters)"


def fault(path: Path | str, problem: str, *, row: int | None = None, column: str | None = None) -> DataError:
    """The error for something wrong in a file: `path, row 3, column 'item_id': problem`."""
    place = [str(path)]
    if row is not None:
        place.append(f"row {row}")
    if column is not None:
        place.append(f"column {column!r}")
    return DataError(f"{', '.join(place)}: {problem}")


@dataclass(frozen=True)
class Table:
    """Some columns of a file, as plain values, and where they came from."""

    path: str
    """For messages."""
    columns: Mapping[str, Sequence[Any]]
    """Our name of a column to its values; only columns that the file has. All are equally long."""
    rows: Sequence[int]
    """Where each entry stands in the file, counted from 1."""
    names: Mapping[str, str]
    """Our name of a column to the file's."""
    there: Sequence[str]
    """The file's names of all its columns, those included that nobody asked for; for messages."""
    parts: Sequence[tuple[str, int]] = ()
    """Where the rows are of several files: each with its number of them; for messages."""

    def __len__(self) -> int:
        return len(self.rows)

    def fault(self, index: int, column: str, problem: str) -> DataError:
        """The error for the entry at `index` of one of the columns."""
        path, row = self.path, self.rows[index]
        for part, rows in self.parts:
            path = part
            if row <= rows:
                break
            row -= rows
        return fault(path, problem, row=row, column=self.names.get(column, column))

    def with_columns(self, **columns: list[Any]) -> "Table":
        """The same rows with some columns replaced or added."""
        return replace(self, columns={**self.columns, **columns})


def find_file(folder: Path | str, pattern: str, *, what: str, folders: Collection[str] = ()) -> Path:
    """The one file of a folder whose name matches a pattern, or one of its folders that may stand for it.

    Args:
        folder: where to look, not below.
        pattern: regular expression of the whole name.
        what: the names in words, for messages.
        folders: names of folders that are taken, too.

    Raises:
        DataError: if the folder is missing or a file, if no file matches, if several do, or if the match
            is another folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise fault(folder, "the data folder does not exist; check `data.path` of the recipe, or `--data`")
    if not folder.is_dir():
        raise fault(folder, "the data path must be a folder, was: a file; give the folder that holds the files")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise fault(folder, f"the data folder cannot be read: {error.strerror}") from error
    found = [name for name in names if re.fullmatch(pattern, name) or (name in folders and (folder / name).is_dir())]
    if not found:
        there = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"
        raise fault(folder, f"a file {what} is missing; the folder holds: {there}")
    if len(found) > 1:
        raise fault(folder, f"there must be one file {what}, was: {', '.join(found)}; remove or rename all but one")
    path = folder / found[0]
    if path.is_dir() and path.name not in folders:
        raise fault(path, f"must be a file {what}, was: a folder")
    return path


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in `.gz`.

    Raises:
        DataError: as `open_bytes`.
    """
    with open_bytes(path) as file:
        return file.read()


def open_bytes(path: Path) -> BinaryIO:
    """Open a file to read, from what is in memory if it must be unpacked because its name ends in `.gz`.

    Raises:
        DataError: if it is missing, a folder, unreadable, empty, or not the gzip file its name says.
    """
    if path.is_dir():
        raise fault(path, "must be a file, was: a folder")
    try:
        with path.open("rb") as file:
            begin = file.read(2)
    except FileNotFoundError as error:
        raise fault(path, "the file does not exist") from error
    except OSError as error:
        raise fault(path, f"the file cannot be read: {error.strerror}") from error
    if not begin:
        raise fault(path, "the file is empty")
    packed = begin == b"\x1f\x8b"
    if path.suffix != ".gz":
        if packed:
            raise fault(path, "the file is packed with gzip; let its name end in `.gz` or unpack it")
        return path.open("rb")
    if not packed:
        raise fault(path, "the name ends in `.gz` but the file is not packed with gzip; rename it or pack it")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise fault(path, f"the gzip file is broken ({error}); copy or download it again") from error
    if not content:
        raise fault(path, "the file is empty once unpacked")
    return io.BytesIO(content)


def read_text(path: Path, *, fallback: str | None = None) -> str:
    """The text of a UTF-8 file, without byte order mark.

    Args:
        path: the file; unpacked if its name ends in `.gz`.
        fallback: an encoding that takes every byte, for old formats that are not UTF-8.

    Raises:
        DataError: as `read_bytes`, and for NUL bytes, for bytes that are not UTF-8, for white space only.
    """
    content = read_bytes(path)
    nul = content.find(b"\0")
    if nul >= 0:
        row = content.count(b"\n", 0, nul) + 1
        raise fault(path, "there is a NUL byte; the file must be text in UTF-8, not UTF-16 or binary", row=row)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if fallback is None:
            row = content.count(b"\n", 0, error.start) + 1
            byte = content[error.start]
            problem = f"the text must be UTF-8, was: byte 0x{byte:02x}; save the file in UTF-8"
            raise fault(path, problem, row=row) from error
        text = content.decode(fallback)
    if not text.strip():
        raise fault(path, "the file is empty (white space only)")
    return text


def check_columns(
    path: Path | str, there: Sequence[str], wanted: Mapping[str, str], required: Collection[str]
) -> dict[str, str]:
    """Which wanted columns a file has: our name to the file's. Raises DataError if a required one is missing."""
    names = {ours: theirs for ours, theirs in wanted.items() if theirs in there}
    missing = [ours for ours in wanted if ours in required and ours not in names]
    if missing:
        theirs = wanted[missing[0]]
        mapped = "" if theirs == missing[0] else f" (mapped from `{missing[0]}` in `data.columns`)"
        separators = [mark for mark in ";\t|" if len(there) == 1 and mark in there[0]]
        advice = (
            f"fields must be separated by commas, not {separators[0]!r}"
            if separators
            else f"add it, or map another one (`data.columns: {{{missing[0]}: ITS NAME}}` of the run's recipe)"
        )
        found = ", ".join(map(shown, there[:20])) or "none"
        raise fault(path, f"the column `{theirs}`{mapped} is missing; there are: {found}; {advice}")
    for ours, theirs in names.items():
        if list(there).count(theirs) > 1:
            raise fault(path, f"the column `{theirs}` (`{ours}`) stands in the header twice; rename or remove one")
    return names


def read_delimited(
    path: Path,
    text: str,
    wanted: Mapping[str, str],
    required: Collection[str],
    *,
    delimiter: str = ",",
    header: Sequence[str] | None = None,
    rename: Callable[[str], str] | None = None,
) -> Table:
    r"""Read text with one record a line and fields set apart by a delimiter.

    Args:
        path: for messages.
        text: the content.
        wanted: our name of a column to the file's.
        required: those of our names that must be there.
        delimiter: quotes have a meaning (RFC 4180) only if this is a comma.
        header: names of the fields if the first line does not hold them.
        rename: applied to the names of the header, for formats with decorated names.
    """
    source = io.StringIO(text, newline="")
    quoting: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE}
    lines = csv.reader(source, strict=True, delimiter=delimiter, **quoting)
    rows = array("q")
    done = 0
    limit = csv.field_size_limit(_FIELD_LIMIT)  # so that a long field is named by its column, not by the parser
    try:
        there = list(header) if header is not None else next(lines)
        if rename is not None:
            there = [rename(name) for name in there]
        names = check_columns(path, there, wanted, required)
        columns: dict[str, list[Any]] = {ours: [] for ours in names}
        fields = [(columns[ours].append, there.index(theirs)) for ours, theirs in names.items()]
        done = lines.line_num
        for record in lines:
            done = lines.line_num
            if len(record) != len(there):
                if not record:
                    continue
                problem = f"the row must have {len(there)} fields as the header has, was: {len(record)}"
                hint = "; put fields that hold a comma in double quotes" if delimiter == "," else ""
                raise fault(path, problem + hint, row=done)
            rows.append(done)
            for append, place in fields:
                append(record[place])
    except csv.Error as error:
        raise fault(path, f"the record that begins here is broken: {error}", row=done + 1) from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise fault(path, "the file has a header but no rows")
    return Table(str(path), columns, rows, names, there)


def read_json_lines(
    path: Path,
    wanted: Mapping[str, str],
    required: Collection[str],
    *,
    parse: Callable[[str], object] = json.loads,
) -> Table:
    """Read a file with one JSON object a line; blank lines are passed over.

    Args:
        path: the file.
        wanted: our name of a column to the file's.
        required: those of our names that some line must have.
        parse: a line to its object; raises ValueError, SyntaxError, RecursionError or MemoryError if it cannot.
    """
    columns: dict[str, list[Any]] = {ours: [] for ours in wanted}
    fields = [(columns[ours], theirs) for ours, theirs in wanted.items()]
    rows: list[int] = []
    there: dict[str, None] = {}
    for row, line in enumerate(read_text(path).split("\n"), start=1):
        record = _json_object(path, row, line, parse)
        if record is _BLANK_LINE:
            continue
        assert isinstance(record, dict)
        there.update(dict.fromkeys(record))
        rows.append(row)
        for values, theirs in fields:
            values.append(record.get(theirs))
    names = check_columns(path, list(there), wanted, required)
    return Table(str(path), {ours: columns[ours] for ours in names}, rows, names, list(there))


def _json_object(path: Path, row: int, line: str, parse: Callable[[str], object]) -> object:
    if not line or line.isspace():
        return _BLANK_LINE
    try:
        record = parse(line)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        problem = f"the line must be one JSON object, was: {shown(line)} ({error})"
        raise fault(path, problem, row=row) from error
    if not isinstance(record, dict):
        raise fault(path, f"the line must be one JSON object, was: {shown(record)}", row=row)
    return record


def python_literal(text: str) -> object:
    """The value a Python literal spells, without warnings about odd escapes in it.

    Raises:
        ValueError: if it is no literal; also SyntaxError, TypeError (a list as a key of an object), RecursionError,
            MemoryError (nested too deep).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


def read_json(path: Path) -> object:
    """Read a file that is one JSON document.

    Raises:
        DataError: as `read_text`, and if it is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        row = error.lineno if isinstance(error, json.JSONDecodeError) else None
        raise fault(path, f"the file must be one JSON document ({error})", row=row) from error


def combined(path: str, records: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """A table of records made in memory, numbered from 1; it has those columns that some record has."""
    listed = list(records)
    there = list(dict.fromkeys(name for record in listed for name in record))
    columns = {name: [record.get(name) for record in listed] for name in names if name in there}
    return Table(path, columns, range(1, len(listed) + 1), {name: name for name in columns}, there)

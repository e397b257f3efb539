"""What the values of a column mean: ids, texts, categories, times, positions, ratings.

Ids are text everywhere, so JSON `7`, CSV `7` and Parquet `7.0` are one id and `007` is another. Texts
are stripped and their white space is made single spaces, so that a title is always one line. Every
function names file, row and column of the first value it cannot take.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np

from llm_itemtok.data.columns import ArrowColumn, by_first_row, distinct
from llm_itemtok.data.tables import Table, python_literal, shown
from llm_itemtok.errors import DataError

MAX_TITLE_CHARS = 20_000
"""A title, a brand or a category longer than this is a broken file, not a title."""
MAX_DESCRIPTION_CHARS = 1_000_000
"""The same for descriptions."""
MAX_ID_CHARS = 512
"""The same for ids."""

_WRONG_CHARACTERS = "the text holds NUL or half a character, was: {}"
_EPOCH = datetime(1970, 1, 1)
_SECOND = timedelta(seconds=1)
_UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
_UNIT_LIMITS = (1e11, 1e14, 1e17)
"""Beyond 1e11 seconds lies the year 5138; the same moment in milliseconds is 1973."""


def ids(table: Table, column: str) -> tuple[list[str], np.ndarray]:
    """A column of ids as text.

    Returns:
        the distinct ids in order of their first row, and for each row which it has, int64 [N].

    Raises:
        DataError: for an empty id, a truth value, a number that is not whole, anything else.
    """
    values = table.columns[column]
    of_one_kind = not values.is_nested if isinstance(values, ArrowColumn) else set(map(type, values)) in ({int}, {str})
    if not of_one_kind:
        values = list(map(_id, values))
        if None in values:
            raise _no_id(table, column, values.index(None))
    found, codes = distinct(values)
    named = list(map(_id, found))

    def row(place: int) -> int:
        return int(np.argmax(codes == place))

    for place, value in enumerate(named):
        if value is None:
            raise _no_id(table, column, row(place))
        if not value or value.isspace():
            raise table.fault(row(place), column, f"ids must not be empty, was: {shown(found[place])}")
        if len(value) > MAX_ID_CHARS:
            problem = f"ids must have at most {MAX_ID_CHARS} characters, was: {shown(value)}"
            raise table.fault(row(place), column, problem)
    texts = [value for value in named if value is not None]
    wrong = _wrong_characters(texts)
    if wrong is not None:
        raise table.fault(row(wrong), column, _WRONG_CHARACTERS.format(shown(texts[wrong])))
    return by_first_row(texts, codes)


def _id(value: object) -> str | None:
    """The text of an id, empty where it is missing; None if it is none."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Decimal) and value == int(value):
        return str(int(value))
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return None


def _no_id(table: Table, column: str, index: int) -> DataError:
    value = table.columns[column][index]
    return table.fault(index, column, f"ids must be text or whole numbers, was: {shown(value)} ({_kind(value)})")


def _kind(value: object) -> str:
    names = {bool: "a truth value", float: "a number", int: "a number", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), type(value).__name__)


def _check_characters(table: Table, column: str, values: list[str]) -> None:
    """Refuse NUL and halves of surrogate pairs, which JSON can spell but no text file can hold."""
    wrong = _wrong_characters(values)
    if wrong is not None:
        raise table.fault(wrong, column, _WRONG_CHARACTERS.format(shown(values[wrong])))


def _wrong_characters(values: list[str]) -> int | None:
    """Place of the first text with NUL or half of a surrogate pair; None if there is none."""
    joined = "".join(values)
    if "\0" not in joined and (joined.isascii() or _is_utf8(joined)):
        return None
    return next(index for index, value in enumerate(values) if "\0" in value or not _is_utf8(value))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def texts(table: Table, column: str, *, limit: int = MAX_TITLE_CHARS) -> list[str]:
    """A column of texts, with white space made single spaces; missing ones are empty.

    Lists of texts are joined by a space, as the descriptions of Amazon's metadata are lists.

    Raises:
        DataError: for a value that is no text, or is longer than `limit` characters.
    """
    if column not in table.columns:
        return [""] * len(table)
    cleaned = []
    for index, value in enumerate(table.columns[column]):
        text = _text(value)
        if text is None:
            raise table.fault(index, column, f"must be text or null, was: {shown(value)} ({_kind(value)})")
        if len(text) > limit:
            problem = f"must have at most {limit:,} characters, was: {shown(text)}; is a quote or a line end missing?"
            raise table.fault(index, column, problem)
        cleaned.append(" ".join(text.split()))
    _check_characters(table, column, cleaned)
    return cleaned


def _text(value: object) -> str | None:
    """A text value; None if it is none. Missing values are empty texts."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return None


def labels(table: Table, column: str, *, limit: int = MAX_TITLE_CHARS) -> list[str]:
    """A column of which nothing is known but that equal values mean the same, as text; missing ones are empty.

    White space is made single spaces. Numbers are text (`7` and `7.0` of JSON and Parquet are one value, as ids
    are), truth values are `true` and `false`.

    Raises:
        DataError: for a list or an object, or a text that is longer than `limit` characters.
    """
    result = []
    for index, value in enumerate(table.columns[column]):
        if isinstance(value, list | dict):
            raise table.fault(index, column, f"must be text, a number or null, was: {shown(value)} ({_kind(value)})")
        text = label(value)
        if len(text) > limit:
            raise table.fault(index, column, f"must have at most {limit:,} characters, was: {shown(text)}")
        result.append(text)
    _check_characters(table, column, result)
    return result


def label(value: object) -> str:
    """A value as text, equal for values that mean the same; empty where it is missing. See `labels`."""
    if isinstance(value, str):
        return " ".join(value.split())
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Decimal):
        value = int(value) if value == int(value) else float(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value)


def categories(table: Table, column: str = "categories") -> list[tuple[str, ...]]:
    """The parts of each item's category paths, each part once, in order.

    A value is null, a text (parts set apart by `|`, or a list written out, as in CSV files), a list of
    texts, or a list of paths.

    Raises:
        DataError: for anything else, or a part that is too long.
    """
    if column not in table.columns:
        return [()] * len(table)
    result = []
    for index, value in enumerate(table.columns[column]):
        parts = _category_parts(value)
        if parts is None:
            problem = f"must be null, text, a list of texts or a list of such lists, was: {shown(value)}"
            raise table.fault(index, column, problem)
        cleaned = dict.fromkeys(" ".join(part.split()) for part in parts)
        cleaned.pop("", None)
        if any(len(part) > MAX_TITLE_CHARS for part in cleaned):
            raise table.fault(index, column, f"must have at most {MAX_TITLE_CHARS:,} characters, was: {shown(value)}")
        result.append(tuple(cleaned))
    _check_characters(table, column, ["".join(parts) for parts in result])
    return result


def _category_parts(value: object) -> list[str] | None:
    """All texts of a category value; None if it is not one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        listed = _written_list(value)
        if listed is None:
            return value.split("|")
        value = listed
    if not isinstance(value, list):
        return None
    parts: list[str] = []
    for entry in value:
        for part in entry if isinstance(entry, list) else [entry]:
            if part is not None and not isinstance(part, str):
                return None
            parts.append(part or "")
    return parts


def _written_list(text: str) -> object:
    """The list that a text spells in JSON or Python, None if it spells none."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    parse: Callable[[str], object]
    for parse in (json.loads, python_literal):
        try:
            return parse(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def numbers(table: Table, column: str) -> np.ndarray:
    """A column of finite numbers, float64.

    Raises:
        DataError: for a value that is empty, no number, infinite or not a number.
    """
    values = table.columns[column]
    fast = _plain_numbers(values)
    return np.array(_numbers(table, column, values), dtype=np.float64) if fast is None else fast


def _plain_numbers(values: Sequence[Any]) -> np.ndarray | None:
    """All values at once where they are finite numbers of one type, as in almost every file; None otherwise."""
    if isinstance(values, ArrowColumn):
        numbers = values.numbers()
        return numbers if numbers is not None and np.isfinite(numbers).all() else None
    kinds = set(map(type, values))
    if not (kinds <= {int, float} or (kinds == {str} and not any("_" in value for value in values))):
        return None
    try:
        result = np.fromiter(map(float, values), dtype=np.float64, count=len(values))
    except (ValueError, OverflowError):
        return None
    return result if np.isfinite(result).all() else None


def _numbers(table: Table, column: str, values: Iterable[object]) -> list[float]:
    result = []
    for index, value in enumerate(values):
        parsed = number(value)
        if parsed is None:
            found = "empty" if value is None or value == "" else f"{shown(value)} ({_kind(value)})"
            raise table.fault(index, column, f"must be a number, was: {found}")
        if not math.isfinite(parsed):
            raise table.fault(index, column, f"must be a finite number, was: {shown(value)}")
        result.append(parsed)
    return result


def number(value: object) -> float | None:
    """A number or a text that spells one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        return None
    if isinstance(value, str) and "_" in value:  # Python's float() would take 1_000
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def positions(table: Table, column: str = "position") -> np.ndarray:
    """A column of positions, float64, finite and not negative.

    Raises:
        DataError: as `numbers`, and for a negative one.
    """
    values = numbers(table, column)
    if (values < 0).any():
        index = int(np.argmax(values < 0))
        raise table.fault(index, column, f"positions must not be negative, was: {shown(table.columns[column][index])}")
    return values


def times(table: Table, column: str = "timestamp") -> np.ndarray:
    """A column of times as seconds since 1970, float64.

    Either all are numbers (of seconds, or of milli-, micro- or nanoseconds where they are too large for
    seconds), or all are ISO 8601 dates with a time zone, or all are such dates without (taken as UTC).

    Raises:
        DataError: for a value that is none of these, and for a mixture.
    """
    numeric = _plain_numbers(table.columns[column])
    if numeric is not None:
        return _seconds(table, column, numeric)
    seconds, first_kind = [], ""
    for index, value in enumerate(table.columns[column]):
        number, kind = _time(value)
        if number is None:
            found = "empty" if value is None or value == "" else f"{shown(value)} ({_kind(value)})"
            problem = f"must be a time: seconds or milliseconds since 1970, or an ISO 8601 date, was: {found}"
            raise table.fault(index, column, problem)
        if not math.isfinite(number):
            raise table.fault(index, column, f"must be a finite time, was: {shown(value)}")
        first_kind = first_kind or kind
        if kind != first_kind:
            raise _mixed(table, column, index, kind, first_kind)
        seconds.append(number)
    result = np.array(seconds, dtype=np.float64)
    return _seconds(table, column, result) if first_kind == "a number" else result


def _seconds(table: Table, column: str, numeric: np.ndarray) -> np.ndarray:
    """Numeric times as seconds; which unit they are in shows from their size, which must be one for all."""
    units = np.digitize(np.abs(numeric), _UNIT_LIMITS)
    if (units != units[0]).any():
        index = int(np.argmax(units != units[0]))
        kinds = [f"a number of {_UNITS[units[at]]}" for at in (index, 0)]
        raise _mixed(table, column, index, *kinds)
    return numeric / 1000.0 ** int(units[0])


def _mixed(table: Table, column: str, index: int, kind: str, first_kind: str) -> Exception:
    first, value = (shown(table.columns[column][at]) for at in (0, index))
    problem = f"times must be of one kind, was: {value} ({kind}), but row {table.rows[0]} has {first} ({first_kind})"
    return table.fault(index, column, problem)


def _time(value: object) -> tuple[float | None, str]:
    """Seconds, or a number in an unknown unit, and which kind it was; None if it is no time."""
    parsed = number(value)
    if parsed is not None:
        return parsed, "a number"
    if not isinstance(value, str):
        return None, ""
    try:
        moment = datetime.fromisoformat(value.strip())
    except ValueError:
        return None, ""
    offset = moment.utcoffset()
    if offset is None:
        return (moment - _EPOCH) / _SECOND, "a date without time zone"
    # Not by `astimezone`, which knows no year 0: the first hours of the year 1 may lie there in UTC.
    return (moment.replace(tzinfo=None) - _EPOCH - offset) / _SECOND, "a date with time zone"

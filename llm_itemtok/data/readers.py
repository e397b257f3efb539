"""A path to a checked catalogue and log.

`read` is the only entrance for real data. Whatever the source, it ends in the same two tables (items and
log, in `foreign` or here), so every source is checked by the same rules and answers bad input in the
same words. What was dropped or found is counted in `RawData.notes`, never hidden.

The data folder: `items.(jsonl|csv|parquet)[.gz]` with `item_id`, `title` and any of `categories`, `brand`,
`description`; `interactions.(csv|jsonl|parquet)[.gz]` with `user_id`, `item_id`, and `timestamp` or
`position` or both; `rating` and `event` are for filters. Either may be a folder of Parquet files, `interactions` or
`interactions.parquet`, read as one in the order of their names. Other columns are ignored, unless the caller asks for
them by name: then they come along as text, are checked to be there, and change nothing else.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_itemtok.data import foreign, values
from llm_itemtok.data.catalog import Catalog
from llm_itemtok.data.columns import ArrowColumn, by_first_row, distinct
from llm_itemtok.data.interactions import DEDUPLICATE, Interactions, from_log, k_core
from llm_itemtok.data.parquet import read_parquet
from llm_itemtok.data.tables import Table, fault, find_file, read_delimited, read_json_lines, read_text, shown
from llm_itemtok.errors import DataError

SOURCES = ("folder", *foreign.SOURCES)
"""What `source` can be. (The recipe's `synthetic` is made by `synthetic.generate`, not read.)"""

_FILTER_KEYS = ("column", "min", "max", "keep")


@dataclass(frozen=True)
class RawData:
    """What was read, before k-core and split."""

    catalog: Catalog
    interactions: Interactions
    notes: dict[str, int | float | str]
    """What was found and dropped: rows, users, items; `filtered_rows`, `unknown_items`, `unknown_rows`,
    `duplicate_rows`, `missing_titles`, `missing_categories`; names of the files."""

    def core(self, k: int) -> "RawData":
        """Apply k-core to log and catalogue; with 0 everything stays, items nobody touched included.

        Raises:
            DataError: if `k` is negative or nothing is left.
        """
        if k == 0:
            return self
        interactions, rows = k_core(self.interactions, k)
        notes = {
            **self.notes,
            "k_core": k,
            "k_core_dropped_users": self.interactions.num_users - interactions.num_users,
            "k_core_dropped_items": len(self.catalog) - len(rows),
            "k_core_dropped_interactions": len(self.interactions) - len(interactions),
        }
        return RawData(self.catalog.subset(rows), interactions, notes)


def read(
    path: Path | str,
    *,
    source: str = "folder",
    columns: Mapping[str, str] | None = None,
    unknown_items: str = "error",
    event_filter: Mapping[str, object] | None = None,
    deduplicate: str = "exact",
    item_columns: Sequence[str] = (),
    log_columns: Sequence[str] = (),
) -> RawData:
    """Read items and log, check every row, and put the log in order.

    Args:
        path: the folder (for `hub` a Hub id or a saved data set).
        source: one of `SOURCES`.
        columns: our name of a column to the file's, where they differ. `items.item_id` or
            `interactions.item_id` instead of `item_id` maps the column of one file only.
        unknown_items: `error`, or `drop` rows whose item is not in the items file.
        event_filter: which rows of the log count: `{"column": "rating", "min": 4}` (also `max`; both ends
            count) or `{"column": "event", "keep": ["purchase"]}` (numbers as numbers, all else as text). The column
            may be any of the file.
        deduplicate: `exact` drops rows equal to an earlier one in user, item, timestamp,
            position, rating, event and the filter's; `first` and `last` keep one interaction of each user and item.
        item_columns: columns that the items file must have; those that are none of ours are kept in the catalogue's
            `extra`. Our name, or the file's where we have none.
        log_columns: the same for the log, all of which are kept in its `extra`.

    Returns:
        the catalogue (all of the items file), the log and what was found.

    Raises:
        DataError: for everything wrong with the input, naming file, row and column.
    """
    _check_choice("source", source, SOURCES)
    _check_choice("unknown_items", unknown_items, ("error", "drop"))
    _check_choice("deduplicate", deduplicate, DEDUPLICATE)
    keep = _check_filter(event_filter or {})
    known = [*foreign.LOG_COLUMNS]
    if event_filter and event_filter["column"] not in known:
        known.append(str(event_filter["column"]))
    wanted_items, wanted_log = _wanted(foreign.ITEM_COLUMNS, known, columns or {})
    wanted_items = {**{name: name for name in item_columns}, **wanted_items}
    wanted_log = {**{name: name for name in log_columns}, **wanted_log}
    if source == "folder":
        items, log = _read_folder(Path(path), wanted_items, wanted_log)
    else:
        items, log = foreign.load(path, source=source, wanted_items=wanted_items, wanted_log=wanted_log)
    _refuse_missing(items, item_columns)
    _refuse_missing(log, log_columns)
    catalog = _catalog(items, item_columns)
    interactions, notes = _interactions(
        log, items, catalog, unknown_items, event_filter or {}, keep, deduplicate, log_columns
    )
    return RawData(
        catalog,
        interactions,
        {
            "source": source,
            "items_file": Path(items.path).name,
            "interactions_file": Path(log.path).name,
            "items": len(catalog),
            "users": interactions.num_users,
            "interactions": len(interactions),
            **notes,
            "missing_titles": catalog.titles.count(""),
            "missing_categories": catalog.categories.count(()),
        },
    )


def read_items(path: Path | str, *, columns: Mapping[str, str] | None = None) -> Catalog:
    """Read a file of items alone.

    Args:
        path: `.csv`, `.jsonl` or `.parquet`, packed or not, with the columns of a data folder's items file.
        columns: as in `read`; those of the log are passed over.

    Raises:
        DataError: for everything wrong with the file, naming row and column.
    """
    path = Path(path)
    kinds = ("csv", "jsonl", "parquet")
    if not path.is_file() or path.name.removesuffix(".gz").rsplit(".", 1)[-1] not in kinds:
        found = "another kind of file" if path.is_file() else "no such file"
        raise DataError(f"{path}: items must be in a file .csv, .jsonl or .parquet (or packed, .gz), found: {found}")
    wanted, _ = _wanted(foreign.ITEM_COLUMNS, foreign.LOG_COLUMNS, columns or {})
    return _catalog(_read_table(path, wanted, foreign.REQUIRED_ITEM_COLUMNS), ())


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise DataError(f"`{name}` must be one of {', '.join(choices)}, was: {value!r}")


def _check_filter(event_filter: Mapping[str, object]) -> frozenset[str | float]:
    """Refuse a filter that makes no sense; returns what to keep, numbers as numbers and all else as text."""
    if not event_filter:
        return frozenset()
    example = "{column: rating, min: 4} or {column: event, keep: [purchase]}"
    extra = set(event_filter) - set(_FILTER_KEYS)
    limits = {"min", "max"} & set(event_filter)
    if extra or not event_filter.get("column") or bool(limits) == ("keep" in event_filter):
        raise DataError(f"a filter must be like {example}, was: {dict(event_filter)}")
    for name in limits:
        limit = event_filter[name]
        if isinstance(limit, bool) or not isinstance(limit, (int, float)):
            raise DataError(f"`{name}` of a filter must be a number, was: {limit!r}")
    keep = event_filter.get("keep", [])
    listed = keep if isinstance(keep, list | tuple) else [keep]
    return frozenset(spelling for value in listed for spelling in _spellings(value))


def _spellings(value: object) -> tuple[str | float, ...]:
    """What a column may hold where a recipe says `value`."""
    if isinstance(value, bool):
        return (str(value), str(value).lower(), str(value).upper())
    return (float(value),) if isinstance(value, int | float) else (values.label(value),)


def _wanted(
    item_columns: Sequence[str], log_columns: Sequence[str], columns: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Our names to the files' names, of the items file and of the log."""
    known = {*item_columns, *log_columns}
    known |= {f"items.{name}" for name in item_columns} | {f"interactions.{name}" for name in log_columns}
    for name in columns:
        if name not in known:
            ours = ", ".join(sorted(known))
            raise DataError(f"`columns` maps our names to the file's; ours are {ours}; was: {name!r}")
    items = {name: columns.get(f"items.{name}", columns.get(name, name)) for name in item_columns}
    log = {name: columns.get(f"interactions.{name}", columns.get(name, name)) for name in log_columns}
    return items, log


def _read_folder(folder: Path, wanted_items: Mapping[str, str], wanted_log: Mapping[str, str]) -> tuple[Table, Table]:
    kinds = r"\.(csv|jsonl|parquet)(\.gz)?"
    names = "`{0}.jsonl`, `{0}.csv` or `{0}.parquet` (or packed, `.gz`, or a folder `{0}` of Parquet files)"
    items, log = (
        find_file(folder, name + kinds, what=names.format(name), folders=(name, f"{name}.parquet"))
        for name in ("items", "interactions")
    )
    return (
        _read_table(items, wanted_items, foreign.REQUIRED_ITEM_COLUMNS),
        _read_table(log, wanted_log, foreign.REQUIRED_LOG_COLUMNS),
    )


def _read_table(path: Path, wanted: Mapping[str, str], required: Collection[str]) -> Table:
    """Read a file by the format that its name says, or a folder of Parquet files."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "csv":
        return read_delimited(path, read_text(path), wanted, required)
    if kind == "jsonl":
        return read_json_lines(path, wanted, required)
    return read_parquet(path, wanted, required)


def _refuse_missing(table: Table, names: Sequence[str]) -> None:
    """Raise for a column that somebody asked for and the file does not have."""
    for name in names:
        if name not in table.columns:
            near = difflib.get_close_matches(name, table.there, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            found = ", ".join(map(shown, table.there[:20])) + (", ..." if len(table.there) > 20 else "")
            problem = f"the column `{name}`, which a segment of `evaluation.segments` is made from, is missing; "
            raise fault(table.path, f"{problem}{hint}there are: {found}")


def _catalog(items: Table, extra: Sequence[str]) -> Catalog:
    item_ids, numbers = values.ids(items, "item_id")
    if len(item_ids) < len(items):
        again = int(np.argmax(numbers != np.arange(len(items))))  # the first row whose id is not new
        first = int(np.argmax(numbers == numbers[again]))
        problem = f"item ids must be distinct, was: {item_ids[numbers[again]]!r}, which row {items.rows[first]} has too"
        raise items.fault(again, "item_id", problem)
    return Catalog(
        item_ids=tuple(item_ids),
        titles=tuple(values.texts(items, "title")),
        categories=tuple(values.categories(items)),
        brands=tuple(values.texts(items, "brand")),
        descriptions=tuple(values.texts(items, "description", limit=values.MAX_DESCRIPTION_CHARS)),
        extra={name: tuple(values.labels(items, name)) for name in extra if name not in foreign.ITEM_COLUMNS},
    )


def _interactions(
    log: Table,
    items: Table,
    catalog: Catalog,
    unknown_items: str,
    event_filter: Mapping[str, object],
    keep: frozenset[str | float],
    deduplicate: str,
    extra: Sequence[str],
) -> tuple[Interactions, dict[str, int | float | str]]:
    user_ids, users = values.ids(log, "user_id")
    item_ids, numbers = values.ids(log, "item_id")
    if not {"timestamp", "position"} & set(log.columns):
        raise fault(log.path, "a column `timestamp` or `position` must be there, or the interactions have no order")
    times = values.times(log) if "timestamp" in log.columns else None
    places = values.positions(log) if "position" in log.columns else None
    counts = _passes(log, event_filter, keep)
    if not counts.any():
        raise fault(log.path, f"the filter {dict(event_filter)} leaves none of {len(log):,} rows")
    index_of = {item_id: row for row, item_id in enumerate(catalog.item_ids)}
    rows = np.array([index_of.get(item_id, -1) for item_id in item_ids], dtype=np.int64)[numbers]
    unknown = counts & (rows < 0)
    unknown_ids, _ = by_first_row(item_ids, numbers[unknown])
    if unknown_ids and (unknown_items != "drop" or unknown.sum() == counts.sum()):
        used, _ = by_first_row(item_ids, numbers[counts])
        raise _unknown(log, items, catalog, used, unknown_ids, unknown)
    kept = np.flatnonzero(counts & ~unknown)
    labels = _labels(log, {"rating", "event", event_filter.get("column")})
    more = {name: values.labels(log, name, limit=values.MAX_ID_CHARS) for name in extra}
    interactions = from_log(
        user_ids,
        rows[kept],
        users=users[kept],
        timestamps=None if times is None else times[kept],
        positions=None if places is None else places[kept],
        labels=None if labels is None else labels[kept],
        extra={name: [column[index] for index in kept.tolist()] for name, column in more.items()},
        duplicates=deduplicate,
    )
    return interactions, {
        "log_rows": len(log),
        "filtered_rows": int((~counts).sum()),
        "unknown_items": len(unknown_ids),
        "unknown_rows": int(unknown.sum()),
        "duplicate_rows": len(kept) - len(interactions),
    }


def _passes(log: Table, event_filter: Mapping[str, object], keep: frozenset[str | float]) -> np.ndarray:
    """Which rows of the log count: bool, one a row."""
    if not event_filter:
        return np.ones(len(log), dtype=bool)
    column = str(event_filter["column"])
    if column not in log.columns:
        raise fault(log.path, f"the filter's column `{column}` is missing; map it in `data.columns` or drop the filter")
    if keep or "keep" in event_filter:
        found, codes = _distinct_texts(log, column)
        counts = [value in keep or values.label(value) in keep or values.number(value) in keep for value in found]
        return np.array(counts, dtype=bool)[codes]
    numbers = values.numbers(log, column)
    low, high = (float(str(event_filter.get(name, limit))) for name, limit in (("min", "-inf"), ("max", "inf")))
    return (numbers >= low) & (numbers <= high)


def _labels(log: Table, names: Set[object]) -> np.ndarray | None:
    """What some columns say of each row: int64, equal where all of it is; None if the log has none of them.

    A view and a purchase at one moment are two interactions, whatever the column is called that tells them apart.
    """
    labels = None
    for name in log.columns:
        if name in names - {"timestamp", "position"}:
            found, codes = _distinct_texts(log, name)
            # Small numbers again after each column, however many there are.
            labels = codes if labels is None else np.unique(labels * len(found) + codes, return_inverse=True)[1]
    return labels


def _distinct_texts(log: Table, column: str) -> tuple[list[str], np.ndarray]:
    """A column by its distinct values as text, and for each row which it has, int64."""
    values = log.columns[column]
    if isinstance(values, ArrowColumn) and not values.is_nested:
        found, codes = distinct(values)
        return list(map(str, found)), codes
    return distinct(list(map(str, values)))


def _unknown(
    log: Table, items: Table, catalog: Catalog, used: Sequence[str], missing: Sequence[str], unknown: np.ndarray
) -> DataError:
    """The error for items of the log that the items file does not have.

    Args:
        log: the log.
        items: the items file.
        catalog: what was read of it.
        used: distinct ids in the rows of the log that count.
        missing: those of them that the catalogue does not have, in order of their first row.
        unknown: bool, which rows of the log have such an item.
    """
    first = int(np.argmax(unknown))
    share = f"{len(missing):,} of the {len(used):,} items in the log are not in {Path(items.path).name}"
    if len(missing) * 2 > len(used):
        theirs = ", ".join(map(shown, sorted(missing)[:5]))
        ours = ", ".join(map(shown, catalog.item_ids[:5]))
        problem = (
            f"the ids of the two files do not meet: {share}.\n  ids in the log look like: {theirs}\n"
            f"  ids in the items file look like: {ours}\n"
            "  ids are compared as text (`007` is not `7`); map the right columns with `data.columns`"
        )
        return log.fault(first, "item_id", problem)
    item_id = missing[0]
    problem = (
        f"the item must be in the items file, was: {shown(item_id)} ({catalog.nearest(item_id)}); "
        f"{share} ({int(unknown.sum()):,} rows); complete the items file, or set `data.unknown_items: drop`"
    )
    return log.fault(first, "item_id", problem)

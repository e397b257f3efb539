"""Formats that are not ours, turned into the two tables every source ends in.

Each function below knows one publisher's file names, columns and quirks, and nothing else: values are
checked by `readers`, whatever the source. Quirks that are repaired here, because the published files
have them: Amazon metadata with HTML in texts, page scripts in place of titles and repeated items (the
first stays); MovieLens' `::`, Latin-1 and genre flags; RecBole's typed headers; LC-Rec's comma-joined
categories. Amazon metadata covers whole shops: set `k_core` to make the catalogue what the log has.

Formats: Amazon reviews 2014 (jmcauley.ucsd.edu/data/amazon), 2018 (nijianmo.github.io/amazon) and 2023
(amazon-reviews-2023.github.io); MovieLens (files.grouplens.org/datasets/movielens); RecBole atomic
files (recbole.io/docs/user_guide/data/atomic_files.html); `X.inter.json` and `X.item.json` as in LC-Rec,
LETTER and MiniOneRec; data sets of the package `datasets`.
"""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_itemtok.data.parquet import table_of_arrow
from llm_itemtok.data.tables import (
    Table,
    check_columns,
    combined,
    fault,
    find_file,
    python_literal,
    read_delimited,
    read_json,
    read_json_lines,
    read_text,
    shown,
)
from llm_itemtok.errors import DataError

SOURCES = ("amazon-2014", "amazon-2018", "amazon-2023", "movielens", "recbole", "lcrec", "hub")
"""What `load` can read."""

ITEM_COLUMNS = ("item_id", "title", "categories", "brand", "description")
"""Columns of the table of items."""
REQUIRED_ITEM_COLUMNS = ("item_id", "title")
LOG_COLUMNS = ("user_id", "item_id", "timestamp", "position", "rating", "event")
"""Columns of the log."""
REQUIRED_LOG_COLUMNS = ("user_id", "item_id")

_AMAZON_ITEMS = {
    "amazon-2014": ("asin", "title", "categories", "brand", "description"),
    "amazon-2018": ("asin", "title", "category", "brand", "description"),
    "amazon-2023": ("parent_asin", "title", "categories", "store", "description"),
}
_AMAZON_LOG_NAMES = ("user_id", "item_id", "rating", "timestamp")
_AMAZON_LOG = {
    "amazon-2014": ("reviewerID", "asin", "overall", "unixReviewTime"),
    "amazon-2018": ("reviewerID", "asin", "overall", "unixReviewTime"),
    "amazon-2023": ("user_id", "parent_asin", "rating", "timestamp"),
}
_AMAZON_CSV_HEADER = {
    "amazon-2014": ("user_id", "item_id", "rating", "timestamp"),
    "amazon-2018": ("item_id", "user_id", "rating", "timestamp"),
}
"""Fields of the ratings-only files, which have no header in 2014 and 2018."""

_MOVIELENS_100K_GENRES = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
)
_RECBOLE_ALIASES = {
    "title": ("movie_title", "item_title", "item_name", "name"),
    "categories": ("category", "genre", "genres", "class"),
    "brand": ("store", "artist", "author"),
}


def load(
    path: Path | str, *, source: str, wanted_items: Mapping[str, str], wanted_log: Mapping[str, str]
) -> tuple[Table, Table]:
    """Read items and log of a foreign format.

    Args:
        path: the folder; for `hub` a Hub id or a folder.
        source: one of `SOURCES`.
        wanted_items: our name of each column of the items to the file's; formats with fixed columns
            take no other names than ours. Columns that are none of ours are looked for under their own name.
        wanted_log: the same for the log.

    Returns:
        the items and the log with our column names.

    Raises:
        DataError: for files that are missing or broken.
    """
    if source == "hub":
        return _hub(path, wanted_items, wanted_log)
    folder = Path(path)
    if source == "recbole":
        return _recbole(folder, wanted_items, wanted_log)
    renamed = {ours: theirs for ours, theirs in {**wanted_items, **wanted_log}.items() if ours != theirs}
    if renamed:
        raise DataError(f"`source: {source}` has fixed columns, so `columns` must be empty, was: {renamed}")
    more_items = {name: name for name in wanted_items if name not in ITEM_COLUMNS}
    more_log = {name: name for name in wanted_log if name not in LOG_COLUMNS}
    if source == "movielens":
        return _movielens(folder, more_items, more_log)
    if source == "lcrec":
        return _lcrec(folder, more_items)
    return _amazon(folder, source, more_items, more_log)


def _amazon(
    folder: Path, source: str, more_items: Mapping[str, str], more_log: Mapping[str, str]
) -> tuple[Table, Table]:
    meta = find_file(folder, r"meta_.+\.jsonl?(\.gz)?", what="of metadata (`meta_*.json`, `meta_*.jsonl` or `.gz`)")
    reviews = find_file(
        folder, r"(?!meta_).+\.(jsonl?|csv)(\.gz)?", what="of reviews or ratings (`.json`, `.jsonl`, `.csv` or `.gz`)"
    )
    wanted = {**dict(zip(ITEM_COLUMNS, _AMAZON_ITEMS[source], strict=True)), **more_items}
    items = read_json_lines(meta, wanted, REQUIRED_ITEM_COLUMNS, parse=_json_or_python)
    log_names = {**dict(zip(_AMAZON_LOG_NAMES, _AMAZON_LOG[source], strict=True)), **more_log}
    required = ("user_id", "item_id", "timestamp")
    if ".csv" not in reviews.suffixes:
        log = read_json_lines(reviews, log_names, required)
    elif source in _AMAZON_CSV_HEADER:
        same = {name: name for name in _AMAZON_LOG_NAMES}
        log = read_delimited(reviews, read_text(reviews), same, required, header=_AMAZON_CSV_HEADER[source])
    else:
        log = read_delimited(reviews, read_text(reviews), log_names, required)
    return _repaired_amazon_items(items), log


def _json_or_python(line: str) -> object:
    """The metadata of 2014 are Python literals, of later years JSON."""
    return python_literal(line) if line.startswith("{'") else json.loads(line)


def _repaired_amazon_items(items: Table) -> Table:
    """First occurrence of each item, without HTML, and without titles that are page scripts."""
    first: dict[object, int] = {}
    for index, item_id in enumerate(items.columns["item_id"]):
        first.setdefault(item_id if isinstance(item_id, str) else index, index)
    kept = list(first.values())
    columns = {name: [_plain(column[index]) for index in kept] for name, column in items.columns.items()}
    columns["item_id"] = [items.columns["item_id"][index] for index in kept]
    columns["title"] = [None if "getTime()" in str(title) else title for title in columns["title"]]
    return Table(items.path, columns, [items.rows[index] for index in kept], items.names, items.there)


def _plain(value: Any) -> Any:
    """A text, or the texts of a list, without HTML tags and entities."""
    if isinstance(value, str):
        return html.unescape(re.sub(r"<[^<>]*>", " ", value)) if "<" in value or "&" in value else value
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _movielens(folder: Path, more_items: Mapping[str, str], more_log: Mapping[str, str]) -> tuple[Table, Table]:
    log_file = find_file(
        folder, r"(ratings\.(csv|dat)|u\.data)(\.gz)?", what="of ratings (`ratings.csv`, `ratings.dat` or `u.data`)"
    )
    kind = log_file.name.removesuffix(".gz")
    log_header, item_header = ("userId", "movieId", "rating", "timestamp"), ("movieId", "title", "genres")
    log_required, item_required = ("user_id", "item_id", "rating", "timestamp"), ("item_id", "title", "categories")
    log_names = {**dict(zip(log_required, log_header, strict=True)), **more_log}
    item_names = {**dict(zip(item_required, item_header, strict=True)), **more_items}
    if kind == "ratings.csv":
        item_file = find_file(folder, r"movies\.csv(\.gz)?", what="`movies.csv`")
        log = read_delimited(log_file, read_text(log_file), log_names, log_required)
        items = read_delimited(item_file, read_text(item_file), item_names, item_required)
    elif kind == "ratings.dat":
        item_file = find_file(folder, r"movies\.dat(\.gz)?", what="`movies.dat`")
        ratings, movies = (read_text(file, fallback="latin-1").replace("::", "\t") for file in (log_file, item_file))
        log = read_delimited(log_file, ratings, log_names, log_required, delimiter="\t", header=log_header)
        items = read_delimited(item_file, movies, item_names, item_required, delimiter="\t", header=item_header)
    else:
        item_file = find_file(folder, r"u\.item(\.gz)?", what="`u.item`")
        log = read_delimited(log_file, read_text(log_file), log_names, log_required, delimiter="\t", header=log_header)
        items = _movielens_100k_items(item_file, more_items)
    genres = [None if genre == "(no genres listed)" else genre for genre in items.columns["categories"]]
    return items.with_columns(categories=genres), log


def _movielens_100k_items(path: Path, more_items: Mapping[str, str]) -> Table:
    """Items of `u.item`: id, title, three columns that only segments use, one 0 or 1 for each genre."""
    genres = _MOVIELENS_100K_GENRES.split("|")
    header = ("item_id", "title", "release", "video", "url", *genres)
    wanted = {**{name: name for name in ("item_id", "title", *genres)}, **more_items}
    text = read_text(path, fallback="latin-1")
    table = read_delimited(path, text, wanted, ("item_id",), delimiter="|", header=header)
    flags = zip(*(table.columns[genre] for genre in genres), strict=True)
    named = [[genre for genre, flag in zip(genres, row, strict=True) if flag == "1"] for row in flags]
    return table.with_columns(categories=named)


def _recbole(folder: Path, wanted_items: Mapping[str, str], wanted_log: Mapping[str, str]) -> tuple[Table, Table]:
    item_file = find_file(folder, r".+\.item(\.gz)?", what="`*.item`")
    log_file = find_file(folder, r".+\.inter(\.gz)?", what="`*.inter`")
    text = read_text(item_file)
    kinds = dict((field.strip() + ":").split(":")[:2] for field in text.split("\n", 1)[0].split("\t"))
    wanted = dict(wanted_items)
    for ours, aliases in _RECBOLE_ALIASES.items():
        if wanted.get(ours) == ours and ours not in kinds:
            wanted[ours] = next((alias for alias in aliases if alias in kinds), ours)

    def bare(name: str) -> str:
        return name.strip().split(":")[0]

    items = read_delimited(item_file, text, wanted, REQUIRED_ITEM_COLUMNS, delimiter="\t", rename=bare)
    log = read_delimited(log_file, read_text(log_file), wanted_log, REQUIRED_LOG_COLUMNS, delimiter="\t", rename=bare)
    if "categories" in items.columns and kinds[items.names["categories"]] == "token_seq":
        items = items.with_columns(categories=[_sequence(value) for value in items.columns["categories"]])
    return items, log


def _sequence(value: str) -> list[str]:
    """A RecBole token sequence: set apart by commas where there are any, by spaces otherwise."""
    return [part.strip(" '\"") for part in (value.split(",") if "," in value else value.split())]


def _lcrec(folder: Path, more_items: Mapping[str, str]) -> tuple[Table, Table]:
    item_file = find_file(folder, r".+\.item\.json(\.gz)?", what="`*.item.json`")
    log_file = find_file(folder, r".+\.inter\.json(\.gz)?", what="`*.inter.json`")
    records = []
    for row, (item_id, features) in enumerate(_mapping(item_file).items(), start=1):
        if not isinstance(features, dict):
            raise fault(item_file, f"item {item_id!r} must be an object with a title, was: {shown(features)}", row=row)
        listed = features.get("categories")
        if isinstance(listed, str):
            features = {**features, "categories": [part.strip() for part in listed.split(",")]}
        records.append({**features, "item_id": item_id})
    if records and not any("title" in record for record in records):
        raise fault(item_file, f"no item has a `title`; the first has: {', '.join(records[0])}")
    log: list[dict[str, object]] = []
    for row, (user_id, history) in enumerate(_mapping(log_file).items(), start=1):
        if not isinstance(history, list):
            raise fault(log_file, f"user {user_id!r} must have a list of items, was: {shown(history)}", row=row)
        log += [{"user_id": user_id, "item_id": item, "position": at} for at, item in enumerate(history)]
    if not log:
        raise fault(log_file, "the file has no interactions")
    return (
        combined(str(item_file), records, (*ITEM_COLUMNS, *more_items)),
        combined(str(log_file), log, ("user_id", "item_id", "position")),
    )


def _mapping(path: Path) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict) or not document:
        raise fault(path, f"the file must be one JSON object with at least one entry, was: {shown(document)}")
    return document


def _hub(path: Path | str, wanted_items: Mapping[str, str], wanted_log: Mapping[str, str]) -> tuple[Table, Table]:
    tables = []
    for name, wanted, required in (
        ("items", wanted_items, REQUIRED_ITEM_COLUMNS),
        ("interactions", wanted_log, REQUIRED_LOG_COLUMNS),
    ):
        data = _hub_table(path, name)
        label = f"{path} [{name}]"
        there = data.column_names
        tables.append(table_of_arrow(label, data, check_columns(label, there, wanted, required), there))
    return tables[0], tables[1]


def _hub_table(path: Path | str, name: str) -> Any:
    """One of the two tables of a data set: a configuration, a split, or a folder of that name."""
    import datasets
    import pyarrow as pa

    try:
        if (Path(path) / name / "state.json").exists():
            data = datasets.load_from_disk(str(Path(path) / name))
        elif Path(path).joinpath("dataset_dict.json").exists():
            data = datasets.load_from_disk(str(path))
        elif name in datasets.get_dataset_config_names(str(path)):
            data = datasets.load_dataset(str(path), name)
        else:
            data = datasets.load_dataset(str(path))
    except (OSError, ValueError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise fault(path, f"the data set cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(data, dict):
        splits = [split for split in (name, "train") if split in data] or list(data)[: len(data) == 1]
        if not splits:
            there = ", ".join(map(str, data))
            raise fault(path, f"the data set must have a split or a configuration `{name}`, was: splits {there}")
        data = data[splits[0]]
    return data.with_format("arrow")[:]

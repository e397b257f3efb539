"""Every bad input is answered by one message that names file, row and column."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_itemtok.data.interactions import k_core
from llm_itemtok.data.readers import read
from llm_itemtok.data.splits import leave_last_out
from llm_itemtok.errors import DataError
from tests.data.folders import ITEMS, LOG, make_folder

LINES = [json.dumps(item) + "\n" for item in ITEMS]
HEAD = "user_id,item_id,timestamp\n"


def parquet(table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    return buffer.getvalue()


def only_log(name, content):
    return {"interactions.csv": None, name: content}


def only_items(name, content):
    return {"items.jsonl": None, name: content}


FILES = {
    "missing items file": (
        {"items.jsonl": None},
        r"a file `items\.jsonl`.*\) is missing; the folder holds: interactions\.csv",
    ),
    "missing interactions file": ({"interactions.csv": None}, r"`interactions\.jsonl`.* is missing"),
    "empty items file": ({"items.jsonl": ""}, r"items\.jsonl: the file is empty"),
    "empty log": ({"interactions.csv": ""}, r"interactions\.csv: the file is empty"),
    "white space only": ({"interactions.csv": " \n\n"}, r"empty \(white space only\)"),
    "empty once unpacked": (only_log("interactions.csv.gz", gzip.compress(b"")), "empty once unpacked"),
    "header only": ({"interactions.csv": HEAD}, r"interactions\.csv: the file has a header but no rows"),
    "parquet without rows": (
        only_log("interactions.parquet", parquet({"user_id": [], "item_id": [], "position": []})),
        r"interactions\.parquet: the file has columns but no rows",
    ),
    "two items files": (
        {"items.csv": "item_id,title\n7,x\n"},
        r"there must be one file .*, was: items\.csv, items\.jsonl",
    ),
    "two logs": ({"interactions.csv.gz": b"x"}, r"was: interactions\.csv, interactions\.csv\.gz"),
    "gzip that is none": (only_log("interactions.csv.gz", LOG), "ends in `.gz` but the file is not packed"),
    "gzip cut off": (
        only_log("interactions.csv.gz", gzip.compress(LOG.encode())[:-12]),
        r"interactions\.csv\.gz: the gzip file is broken",
    ),
    "gzip with wrong bytes": (
        only_log("interactions.csv.gz", gzip.compress(LOG.encode())[:20] + b"\xff\xff\xff\xff" + b"0" * 20),
        r"interactions\.csv\.gz: the gzip file is broken",
    ),
    "gzip without the name": ({"interactions.csv": gzip.compress(LOG.encode())}, "let its name end in `.gz`"),
    "broken parquet": (
        only_log("interactions.parquet", b"PAR1 nonsense PAR1"),
        r"interactions\.parquet: the Parquet file is broken",
    ),
    "parquet cut off": (
        only_log("interactions.parquet", parquet({"user_id": ["u"], "item_id": ["7"], "position": [1]})[:-20]),
        r"interactions\.parquet: the Parquet file is broken",
    ),
    "broken JSON line": (
        {"items.jsonl": LINES[0] + '{"item_id": 8, "title": \n' + LINES[2]},
        r"items\.jsonl, row 2: the line must be one JSON object",
    ),
    "JSON line that is no object": ({"items.jsonl": LINES[0] + "[1, 2]\n"}, r"row 2: .* was: \[1, 2\]"),
    "JSON nested too deep": (
        {"items.jsonl": LINES[0] + "[" * 100_000 + "\n"},
        r"row 2: the line must be one JSON object",
    ),
    "a list as a key in categories": (
        {
            "items.jsonl": '{"item_id": "a", "title": "", "categories": "[{[]: 1}]"}\n',
            "interactions.csv": HEAD + "u,b,1\n",
        },
        "the ids of the two files do not meet",  # the categories are that text
    ),
    "JSON number too long": ({"items.jsonl": '{"item_id": 1%s}\n' % ("0" * 5000)}, "row 1: the line must be one JSON"),
    "NUL bytes": ({"interactions.csv": HEAD + "u1,7,1\nu1,\0,2\n"}, r"interactions\.csv, row 3: there is a NUL byte"),
    "UTF-16": ({"interactions.csv": LOG.encode("utf-16")}, "must be text in UTF-8, not UTF-16"),
    "NUL in JSON": ({"items.jsonl": '{"item_id": "a\\u0000", "title": "x"}\n'}, r"row 1, column 'item_id': .*NUL"),
    "half a character in JSON": (
        {"items.jsonl": '{"item_id": "a", "title": "x\\ud800"}\n'},
        r"row 1, column 'title': the text holds NUL or half a character",
    ),
    "not UTF-8": (
        {"interactions.csv": HEAD.encode() + "u1,7,1\nü,7,2\n".encode("latin-1")},
        r"interactions\.csv, row 3: the text must be UTF-8, was: byte 0xfc",
    ),
}

ROWS = {
    "missing column": (
        {"interactions.csv": "user,item_id,timestamp\nu,7,1\n"},
        r"the column `user_id` is missing; there are: 'user', 'item_id', 'timestamp'",
    ),
    "wrong separator": (
        {"interactions.csv": "user_id;item_id;timestamp\nu;7;1\n"},
        "must be separated by commas, not ';'",
    ),
    "column twice": ({"interactions.csv": "user_id,item_id,item_id,position\nu,7,7,1\n"}, "stands in the header twice"),
    "no title column": ({"items.jsonl": [{"item_id": 1, "name": "x"}]}, r"items\.jsonl: the column `title` is missing"),
    "no order": ({"interactions.csv": "user_id,item_id\nu,7\n"}, "`timestamp` or `position` must be there"),
    "too few fields": ({"interactions.csv": HEAD + "u1,7,1\nu1,7\n"}, r"row 3: the row must have 3 fields .* was: 2"),
    "too many fields": ({"interactions.csv": HEAD + "u1,7,1,9\n"}, r"row 2: the row must have 3 fields .* was: 4"),
    "quote left open": ({"interactions.csv": HEAD + 'u1,7,1\nu1,"7,2\nu2,7,3\n'}, r"row 3: the record .* is broken"),
    "quote left open in the header": (
        {"interactions.csv": 'user_id,"item_id\nu,7\n'},
        r"csv, row 1: the record .* broken",
    ),
    "blank header": ({"interactions.csv": "\nu,7,1\n"}, "the column `user_id` is missing; there are: none"),
    "text after a quote": ({"interactions.csv": HEAD + 'u1,"7"7,2\n'}, r"row 2: the record .* is broken"),
    "title of the wrong type": (
        {"items.jsonl": [{"item_id": 1, "title": "x"}, {"item_id": 2, "title": 1984}]},
        r"items\.jsonl, row 2, column 'title': must be text or null, was: 1984 \(a number\)",
    ),
    "brand of the wrong type": (
        {"items.jsonl": [{"item_id": 1, "title": "x", "brand": {"name": "y"}}]},
        r"row 1, column 'brand': must be text or null",
    ),
    "categories of the wrong type": (
        {"items.jsonl": [{"item_id": 1, "title": "x", "categories": [[["deep"]]]}]},
        r"row 1, column 'categories': must be null, text, a list",
    ),
    "title of 1 MB": (
        {"items.jsonl": [ITEMS[0], {"item_id": 2, "title": "x" * 1_000_000}]},
        r"row 2, column 'title': must have at most 20,000 characters, was: 'xxx.* \(1,000,000 characters\)",
    ),
    "title of 1 MB in CSV": (
        only_items("items.csv", "item_id,title\n1,a\n2," + "x" * 1_000_000 + "\n"),
        r"items\.csv, row 3, column 'title': must have at most 20,000 characters",
    ),
    "empty user id": ({"interactions.csv": HEAD + ",7,1\n"}, r"row 2, column 'user_id': ids must not be empty"),
    "blank item id": ({"interactions.csv": HEAD + "u, ,1\n"}, r"row 2, column 'item_id': ids must not be empty"),
    "null id": ({"items.jsonl": [ITEMS[0], {"title": "x"}]}, r"row 2, column 'item_id': ids must not be empty"),
    "id that is a truth value": (
        {"items.jsonl": [{"item_id": True, "title": "x"}]},
        r"row 1, column 'item_id': ids must be text or whole numbers, was: True",
    ),
    "id that is a fraction": ({"items.jsonl": [{"item_id": 7.5, "title": "x"}]}, r"ids must be .* was: 7\.5"),
    "id that is a list": ({"items.jsonl": [{"item_id": ["a"], "title": "x"}]}, r"was: \['a'\] \(a list\)"),
    "id of a thousand characters": (
        {"interactions.csv": HEAD + "u" * 1000 + ",7,1\n"},
        r"row 2, column 'user_id': ids must have at most 512 characters",
    ),
    "duplicate item ids": (
        {"items.jsonl": [*ITEMS, {"item_id": "7", "title": "again"}]},
        r"items\.jsonl, row 5, column 'item_id': item ids must be distinct, was: '7', which row 1 has too",
    ),
    "timestamp that is none": (
        {"interactions.csv": HEAD + "u,7,10\nu,b,yesterday\n"},
        r"row 3, column 'timestamp': must be a time.*was: 'yesterday' \(text\)",
    ),
    "empty timestamp": ({"interactions.csv": HEAD + "u,7,\n"}, r"row 2, column 'timestamp': .* was: empty"),
    "timestamp that is no number": ({"interactions.csv": HEAD + "u,7,nan\n"}, "must be a finite time, was: 'nan'"),
    "infinite timestamp": ({"interactions.csv": HEAD + "u,7,1e999\n"}, "must be a finite time"),
    "timestamp that is a truth value": (
        only_log("interactions.jsonl", [{"user_id": "u", "item_id": 7, "timestamp": True}]),
        r"row 1, column 'timestamp': must be a time.*was: True \(a truth value\)",
    ),
    "numbers and dates mixed": (
        {"interactions.csv": HEAD + "u,7,1400000000\nu,b,2014-05-13\n"},
        r"row 3, column 'timestamp': times must be of one kind, was: '2014-05-13' .* row 2 has '1400000000'",
    ),
    "seconds and milliseconds mixed": (
        {"interactions.csv": HEAD + "u,7,1400000000\nu,b,1400000000000\n"},
        r"row 3, .*of one kind, was: .* \(a number of milliseconds\), but row 2 has .* \(a number of seconds\)",
    ),
    "time zones mixed": (
        {"interactions.csv": HEAD + "u,7,2014-05-13T10:00:00\nu,b,2014-05-13T10:00:00Z\n"},
        r"of one kind, was: .* \(a date with time zone\), but row 2 has",
    ),
    "negative position": (
        {"interactions.csv": "user_id,item_id,position\nu,7,0\nu,b,-1\n"},
        r"row 3, column 'position': positions must not be negative, was: '-1'",
    ),
    "NaN position": (
        {"interactions.csv": "user_id,item_id,position\nu,7,NaN\n"},
        "must be a finite number, was: 'NaN'",
    ),
    "infinite position": ({"interactions.csv": "user_id,item_id,position\nu,7,inf\n"}, "must be a finite number"),
    "infinite position in JSON": (
        only_log("interactions.jsonl", '{"user_id": "u", "item_id": 7, "position": Infinity}\n'),
        r"row 1, column 'position': must be a finite number, was: inf",
    ),
    "position that is text": (
        {"interactions.csv": "user_id,item_id,position\nu,7,first\n"},
        r"row 2, column 'position': must be a number, was: 'first' \(text\)",
    ),
    "position missing in a line": (
        only_log(
            "interactions.jsonl",
            [{"user_id": "u", "item_id": 7, "position": 0}, {"user_id": "u", "item_id": "b"}],
        ),
        r"row 2, column 'position': must be a number, was: empty",
    ),
    "unknown item": (
        {"interactions.csv": LOG + "u2,bb,9\n"},
        r"row 8, column 'item_id': the item must be in the items file, was: 'bb' .*1 of the 5 .*unknown_items: drop",
    ),
    "ids that do not meet": (
        {"interactions.csv": HEAD + "u,B001,1\nu,B002,2\nu,7,3\n"},
        r"(?s)do not meet: 2 of the 3 items .*log look like: 'B001', 'B002'.*items file look like: '7', '007', 'b'",
    ),
}


@pytest.mark.parametrize(("files", "match"), [*FILES.values(), *ROWS.values()], ids=[*FILES, *ROWS])
def test_bad_files_are_answered_with_one_message(tmp_path, files, match):
    with pytest.raises(DataError, match=match):
        read(make_folder(tmp_path, files))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: the data folder does not exist"):
        read(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"items\.jsonl: the data path must be a folder, was: a file"):
        read(make_folder(tmp_path) / "items.jsonl")


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    make_folder(tmp_path, {"items.jsonl": None})
    (tmp_path / "items.csv").mkdir()
    with pytest.raises(DataError, match=r"items\.csv: must be a file .*, was: a folder"):
        read(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path):
    make_folder(tmp_path, {"items.jsonl": None})
    (tmp_path / "items.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"items\.csv: the file does not exist"):
        read(tmp_path)


def test_dropping_every_item_is_an_error_too(tmp_path):
    make_folder(tmp_path, {"interactions.csv": HEAD + "u,x,1\nu,y,2\n"})
    with pytest.raises(DataError, match="the ids of the two files do not meet: 2 of the 2"):
        read(tmp_path, unknown_items="drop")


def test_users_too_short_for_the_split_are_an_error_when_none_remain(tmp_path):
    raw = read(make_folder(tmp_path, {"interactions.csv": HEAD + "u,7,1\nu,b,2\nv,7,1\n"}))
    with pytest.raises(DataError, match=r"at least 3 interactions .* none of the 2 users has more than 2"):
        leave_last_out(raw.interactions, num_items=len(raw.catalog))


def test_nothing_left_after_k_core_is_an_error(tmp_path):
    raw = read(make_folder(tmp_path))
    with pytest.raises(DataError, match=r"nothing is left after `k_core: 5`: .* 2 users and 4 items"):
        raw.core(5)
    with pytest.raises(DataError, match="`k_core` must be at least 1 where it is applied, was: -1"):
        k_core(raw.interactions, -1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"source": "csv"}, "`source` must be one of folder, .*, was: 'csv'"),
        ({"unknown_items": "keep"}, "`unknown_items` must be one of error, drop, was: 'keep'"),
        ({"deduplicate": "all"}, "`deduplicate` must be one of exact, first, last, was: 'all'"),
        ({"columns": {"user": "customer"}}, "`columns` maps our names .* was: 'user'"),
        ({"columns": {"user_id": "customer"}}, r"`customer` \(mapped from `user_id` in `data.columns`\) is missing"),
        ({"event_filter": {"column": "rating"}}, "a filter must be like"),
        ({"event_filter": {"column": "rating", "min": 1, "keep": [1]}}, "a filter must be like"),
        ({"event_filter": {"column": "rating", "above": 1}}, "a filter must be like"),
        ({"event_filter": {"column": "rating", "min": "4"}}, "`min` of a filter must be a number, was: '4'"),
        ({"event_filter": {"column": "rating", "min": 4}}, "the filter's column `rating` is missing"),
        ({"event_filter": {"column": "timestamp", "min": 99}}, "leaves none of 6 rows"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, arguments, match):
    with pytest.raises(DataError, match=match):
        read(make_folder(tmp_path), **arguments)


def test_a_rating_that_is_no_number_is_named_when_ratings_are_filtered(tmp_path):
    make_folder(tmp_path, {"interactions.csv": "user_id,item_id,position,rating\nu,7,1,5\nu,b,2,good\n"})
    with pytest.raises(DataError, match=r"row 3, column 'rating': must be a number, was: 'good'"):
        read(tmp_path, event_filter={"column": "rating", "min": 4})

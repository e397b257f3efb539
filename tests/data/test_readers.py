"""A good data folder is read the same way whatever its format."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_itemtok.data.readers import read
from llm_itemtok.errors import DataError
from tests.data.folders import ITEMS, LOG, make_folder, text_of

ROWS = [line.split(",") for line in LOG.splitlines()[1:]]


def sequences(raw):
    return {
        user: [raw.catalog.item_ids[item] for item in raw.interactions.of(index)]
        for index, user in enumerate(raw.interactions.user_ids)
    }


def test_ids_are_text_in_every_format(tmp_path):
    raw = read(make_folder(tmp_path))
    assert raw.catalog.item_ids == ("7", "007", "b", "c")
    assert sequences(raw) == {"u1": ["7", "007", "b"], "u2": ["c", "7", "b"]}


def test_texts_are_one_line_and_missing_ones_are_empty(tmp_path):
    catalog = read(make_folder(tmp_path)).catalog
    assert catalog.titles == ("The Ember Crown", "Licence to Bake", "", "Beyond the Signal")
    assert catalog.categories == (("Books", "Fantasy"), ("Books", "Cooking"), (), ("Books",))
    assert catalog.brands == ("Ada Marsh", "", "", "")
    assert catalog.descriptions == ("", "", "", "Long.")


def test_every_format_gives_the_same_data(tmp_path):
    expected = read(make_folder(tmp_path))
    items = [{**item, "item_id": str(item["item_id"]), "categories": None} for item in ITEMS]
    columns = {name: [item.get(name) for item in items] for name in ("item_id", "title", "brand")}
    log = {"user_id": [row[0] for row in ROWS], "item_id": [row[1] for row in ROWS]}
    times = [float(row[2]) for row in ROWS]
    variants = {
        "parquet": ("items.parquet", columns, "interactions.parquet", log | {"timestamp": times}),
        "dates": (
            "items.parquet",
            columns,
            "interactions.parquet",
            log | {"timestamp": np.array(times).astype("M8[s]")},
        ),
    }
    for name, (items_name, items_table, log_name, log_table) in variants.items():
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.table(items_table), folder / items_name)
        pq.write_table(pa.table(log_table), folder / log_name)
        raw = read(folder)
        assert raw.catalog.titles == expected.catalog.titles
        assert raw.interactions.sha256 == expected.interactions.sha256
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "items.jsonl.gz").write_bytes(gzip.compress(text_of(ITEMS)))
    records = [{"user_id": user, "item_id": item, "timestamp": int(time)} for user, item, time in ROWS]
    (packed / "interactions.jsonl.gz").write_bytes(gzip.compress(text_of(records)))
    raw = read(packed)
    assert raw.catalog.sha256 == expected.catalog.sha256
    assert raw.interactions.sha256 == expected.interactions.sha256


def test_whole_floats_of_parquet_are_the_ids_they_stand_for(tmp_path):
    make_folder(tmp_path, {"interactions.csv": None})
    log = {"user_id": [1.0, 1.0], "item_id": ["7", "b"], "position": [0, 1]}
    pq.write_table(pa.table(log), tmp_path / "interactions.parquet")
    assert sequences(read(tmp_path)) == {"1": ["7", "b"]}


def test_csv_items_may_hold_quotes_commas_line_ends_and_lists(tmp_path):
    items = (
        '\ufeffitem_id,title,categories\n7,"Bread, ""the"" book\nof bread","[[""Books"", ""Cooking""]]"\n'
        "b,,\"['A', 'B']\"\n\nc,x,[odd\n"
    )
    make_folder(
        tmp_path, {"items.jsonl": None, "items.csv": items, "interactions.csv": "user_id,item_id,position\n1,b,0\n"}
    )
    catalog = read(tmp_path).catalog
    assert catalog.titles == ('Bread, "the" book of bread', "", "x")
    assert catalog.categories == (("Books", "Cooking"), ("A", "B"), ("[odd",))


def test_columns_are_mapped_in_both_files_or_in_one(tmp_path):
    make_folder(
        tmp_path,
        {
            "items.jsonl": [{"asin": "a", "name": "x"}, {"asin": "b", "name": "y"}],
            "interactions.csv": "who,asin,when\n1,b,0\n1,a,1\n",
        },
    )
    columns = {"user_id": "who", "item_id": "asin", "title": "name", "timestamp": "when"}
    assert sequences(read(tmp_path, columns=columns)) == {"1": ["b", "a"]}
    (tmp_path / "interactions.csv").write_text("user_id,item_id,position\n1,b,0\n")
    columns = {"items.item_id": "asin", "items.title": "name"}
    assert sequences(read(tmp_path, columns=columns)) == {"1": ["b"]}


def test_timestamps_order_then_positions_then_the_file(tmp_path):
    log = "user_id,item_id,timestamp,position\nu,7,5,2\nu,007,5,1\nu,b,4,9\nu,c,5,1\n"
    assert sequences(read(make_folder(tmp_path, {"interactions.csv": log}))) == {"u": ["b", "007", "c", "7"]}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (["1400000000", "1400000060.5"], [1_400_000_000, 1_400_000_060.5]),
        (["1400000000000", "1400000060500"], [1_400_000_000, 1_400_000_060.5]),
        (["2014-05-13T16:53:20", "2014-05-13 16:54:20.5"], [1_400_000_000, 1_400_000_060.5]),
        (["2014-05-13T16:53:20Z", "2014-05-13T18:54:20.500+02:00"], [1_400_000_000, 1_400_000_060.5]),
        (["2014-05-13", "2014-05-14"], [1_399_939_200, 1_400_025_600]),
        (["-5", "3"], [-5, 3]),
        (["0001-01-01T00:00:00+01:00", "1970-01-01T00:00:00Z"], [-62_135_600_400, 0]),  # how .NET spells "never"
    ],
)
def test_times_are_seconds_whatever_they_were_written_as(tmp_path, written, seconds):
    log = "user_id,item_id,timestamp\n" + "".join(f"u,7,{time}\n" for time in written)
    raw = read(make_folder(tmp_path, {"interactions.csv": log}))
    np.testing.assert_allclose(raw.interactions.timestamps, seconds, rtol=0, atol=1e-3)


def test_a_log_with_positions_only_has_no_timestamps(tmp_path):
    log = "user_id,item_id,position\nu,7,1\nu,b,0\n"
    raw = read(make_folder(tmp_path, {"interactions.csv": log}))
    assert raw.interactions.timestamps is None
    assert sequences(raw) == {"u": ["b", "7"]}


def test_only_exact_duplicates_are_dropped_unless_told_otherwise(tmp_path):
    log = "user_id,item_id,timestamp,rating\nu,7,1,5\nu,7,1,5\nu,7,1,4\nu,b,2,5\nu,7,3,5\n"
    make_folder(tmp_path, {"interactions.csv": log})
    raw = read(tmp_path)
    assert sequences(raw) == {"u": ["7", "7", "b", "7"]}
    assert raw.notes["duplicate_rows"] == 1
    assert sequences(read(tmp_path, deduplicate="first")) == {"u": ["7", "b"]}
    assert sequences(read(tmp_path, deduplicate="last")) == {"u": ["b", "7"]}


def test_rows_that_differ_in_the_column_of_the_filter_are_no_duplicates(tmp_path):
    """Columns that only segments are made from change nothing of the data."""
    log = "user_id,item_id,timestamp,action,shop\nu,b,1,view,x\nu,b,1,buy,x\nu,b,1,buy,y\nu,b,1,buy,y\n"
    make_folder(tmp_path, {"interactions.csv": log})
    assert read(tmp_path).notes["duplicate_rows"] == 3  # nobody asked for the two columns
    raw = read(tmp_path, event_filter={"column": "action", "keep": ["buy", "view"]}, log_columns=["shop"])
    assert raw.notes["duplicate_rows"] == 2
    assert sequences(raw) == {"u": ["b", "b"]}
    by_time = read(tmp_path, event_filter={"column": "timestamp", "min": 0})
    assert by_time.notes["duplicate_rows"] == 3


@pytest.mark.parametrize("keep", [5, 5.0, True, "x", "5.0"])
def test_what_a_filter_keeps_is_compared_by_meaning(tmp_path, keep):
    """YAML, CSV, JSON and Parquet spell one number in several ways, and so truth values."""
    spelled = {5: ["5", "5.0", "05"], True: ["true", "True", "TRUE"], "x": ["x", " x", "x "], "5.0": ["5.0"] * 3}[keep]
    rows = [f"u,b,{time},{kind}\n" for time, kind in enumerate([*spelled, "4", "false", "False", "y"])]
    make_folder(tmp_path, {"interactions.csv": "user_id,item_id,timestamp,kind\n" + "".join(rows)})
    assert len(read(tmp_path, event_filter={"column": "kind", "keep": [keep]}).interactions) == 3


def test_filters_keep_what_they_say(tmp_path):
    log = "user_id,item_id,position,rating,event,dwell\nu,7,0,5,buy,1\nu,b,1,3.5,view,9\nu,c,2,4,buy,\n"
    log += "u,nope,3,1,view,5\n"
    make_folder(tmp_path, {"interactions.csv": log})
    raw = read(tmp_path, event_filter={"column": "rating", "min": 4})
    assert sequences(raw) == {"u": ["7", "c"]}
    assert raw.notes["filtered_rows"] == 2
    assert sequences(read(tmp_path, event_filter={"column": "rating", "min": 3, "max": 4})) == {"u": ["b", "c"]}
    assert sequences(read(tmp_path, event_filter={"column": "event", "keep": ["buy"]})) == {"u": ["7", "c"]}
    assert sequences(read(tmp_path, event_filter={"column": "dwell", "keep": 9})) == {"u": ["b"]}


def test_unknown_items_are_dropped_and_counted_when_told(tmp_path):
    make_folder(tmp_path, {"interactions.csv": LOG + "u1,zz,1\nu1,zz,2\nu3,yy,2\n"})
    raw = read(tmp_path, unknown_items="drop")
    assert sequences(raw) == {"u1": ["7", "007", "b"], "u2": ["c", "7", "b"]}
    assert (raw.notes["unknown_items"], raw.notes["unknown_rows"]) == (2, 3)


def test_the_catalogue_is_the_items_file_without_k_core_and_the_survivors_with_it(tmp_path):
    log = "user_id,item_id,position\n" + "".join(f"u{user},{item},0\n" for user in range(3) for item in ("c", "7"))
    raw = read(make_folder(tmp_path, {"interactions.csv": log + "u0,b,1\n"}))
    assert raw.core(0) is raw
    core = raw.core(2)
    assert core.catalog.item_ids == ("7", "c")
    assert sequences(core) == {f"u{user}": ["c", "7"] for user in range(3)}
    assert core.notes["k_core_dropped_items"] == 2
    assert core.notes["k_core_dropped_interactions"] == 1


def test_other_columns_are_ignored_whatever_they_hold(tmp_path):
    items = [{**ITEMS[0], "asin": 5, "text": {"deep": []}}, *ITEMS[1:]]
    raw = read(make_folder(tmp_path, {"items.jsonl": items}))
    assert raw.catalog.sha256 == read(make_folder(tmp_path)).catalog.sha256


MORE_ITEMS = [{**item, "asin": asin} for item, asin in zip(ITEMS, (7, " B  7 ", None, 2.0), strict=True)]
MORE_LOG = "\n".join(f"{row},{land}" for row, land in zip(LOG.split(), ("land", *"abcdef"), strict=True)) + "\n"


def test_columns_that_are_asked_for_come_along_as_text_and_change_nothing_else(tmp_path):
    make_folder(tmp_path, {"items.jsonl": MORE_ITEMS, "interactions.csv": MORE_LOG})
    raw = read(tmp_path, item_columns=["asin", "title", "item_id"], log_columns=["land", "timestamp"])
    assert raw.catalog.extra == {"asin": ("7", "B 7", "", "2")}
    assert {name: column.tolist() for name, column in raw.interactions.extra.items()} == {
        "land": ["a", "b", "c", "d", "e", "f"],
        "timestamp": ["10", "20", "30", "5", "5", "6"],
    }
    plain = read(tmp_path)
    assert (plain.catalog.extra, plain.interactions.extra) == ({}, {})
    assert (plain.catalog.sha256, plain.interactions.sha256) == (raw.catalog.sha256, raw.interactions.sha256)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_further_columns_are_read_from_every_format(tmp_path, kind):
    asins = ["A1", None, "10", "9"]
    table = pa.table({"item_id": ["7", "007", "b", "c"], "title": ["x"] * 4, "asin": asins})
    content = {
        "csv": "item_id,title,asin\n7,x,A1\n007,x,\nb,x,10\nc,x,9\n",
        "jsonl": table.to_pylist(),
        "parquet": b"",
    }[kind]
    make_folder(tmp_path, {"items.jsonl": None, f"items.{kind}": content})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "items.parquet")
    assert read(tmp_path, item_columns=["asin"]).catalog.extra == {"asin": ("A1", "", "10", "9")}


def test_further_columns_survive_k_core_and_filters(tmp_path):
    make_folder(tmp_path, {"items.jsonl": MORE_ITEMS, "interactions.csv": MORE_LOG})
    raw = read(
        tmp_path,
        item_columns=["asin"],
        log_columns=["land"],
        event_filter={"column": "land", "keep": ["a", "c", "e", "f"]},
    ).core(2)
    assert raw.catalog.extra == {"asin": ("7", "")}
    assert raw.interactions.extra["land"].tolist() == ["a", "c", "e", "f"]


def test_a_mapped_column_is_asked_for_under_our_name_or_the_files(tmp_path):
    make_folder(tmp_path, {"items.jsonl": [{"asin": "7", "title": "x"}], "interactions.csv": None})
    (tmp_path / "interactions.csv").write_text("user_id,item_id,position\nu,7,0\n")
    raw = read(tmp_path, columns={"items.item_id": "asin"}, item_columns=["item_id", "asin"])
    assert raw.catalog.column("item_id") == raw.catalog.column("asin") == ("7",)


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    make_folder(tmp_path, {"items.jsonl": MORE_ITEMS, "interactions.csv": MORE_LOG})
    with pytest.raises(
        DataError, match=r"items\.jsonl: the column `asn`, .* is missing; did you mean `asin`\? there are"
    ):
        read(tmp_path, item_columns=["asn"])
    with pytest.raises(
        DataError, match=r"interactions\.csv: the column `x`.*there are: 'user_id', .*'timestamp', 'land'"
    ):
        read(tmp_path, log_columns=["x"])
    make_folder(tmp_path, {"items.jsonl": [{"item_id": "7", "title": "x"}], "interactions.csv": LOG})
    with pytest.raises(DataError, match="the column `brand`"):
        read(tmp_path, item_columns=["brand"], unknown_items="drop")


def test_a_column_of_lists_is_refused_with_its_row(tmp_path):
    make_folder(tmp_path, {"items.jsonl": [{**ITEMS[0], "size": {"cm": 3}}, *ITEMS[1:]]})
    with pytest.raises(DataError, match=r"row 1, column 'size': must be text, a number or null, was: .* \(an object\)"):
        read(tmp_path, item_columns=["size"])

"""A folder of Parquet files is one table, and a fault in it is told by file and row."""

import uuid
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_itemtok.data.readers import read
from llm_itemtok.errors import DataError
from tests.data.folders import make_folder

ITEMS = {"item_id": ["7", "b", "c"], "title": ["Seven", None, "C"]}
LOG = {
    "user_id": ["u2", "u1", "u2", "u1", "u3", "u1"],
    "item_id": ["b", "7", "7", "c", "c", "b"],
    "timestamp": [4, 9, 1, 2, 5, 3],
    "event": ["buy", "view", "buy", "buy", None, "buy"],
}


def write(folder, log=LOG, *, items=ITEMS, shards=3, name="interactions"):
    """A data folder whose log lies in so many files."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(items), folder / "items.parquet")
    (folder / name).mkdir()
    table = pa.table(log)
    for place, rows in enumerate(np.array_split(np.arange(len(table)), shards)):
        pq.write_table(table.take(rows), folder / name / f"part-{place:05}.parquet")
    return folder


@pytest.mark.parametrize("name", ["interactions", "interactions.parquet"])
def test_files_of_a_folder_are_read_as_one(tmp_path, name):
    one = write(tmp_path / "one", shards=1)
    many = write(tmp_path / "many", name=name)
    (many / name / "_SUCCESS").write_bytes(b"")
    (many / name / "_metadata.parquet").write_bytes(b"not looked at")
    first, second = read(one), read(many)
    assert second.interactions.sha256 == first.interactions.sha256
    assert second.interactions.user_ids == ("u2", "u1", "u3")
    assert {**first.notes, "interactions_file": name} == second.notes
    kept = read(many, event_filter={"column": "event", "keep": ["buy"]})
    assert kept.interactions.sha256 == read(one, event_filter={"column": "event", "keep": ["buy"]}).interactions.sha256
    assert kept.notes["filtered_rows"] == 2


def test_texts_of_a_file_are_those_of_any_other_format(tmp_path):
    text = make_folder(tmp_path)
    rows = [line.split(",") for line in (text / "interactions.csv").read_text().splitlines()]
    expected = read(text).interactions
    (text / "interactions.csv").unlink()
    columns = {name: [row[place] for row in rows[1:]] for place, name in enumerate(rows[0])}
    (text / "interactions").mkdir()
    pq.write_table(pa.table(columns), text / "interactions" / "all.parquet", use_dictionary=False)
    assert read(text).interactions.sha256 == expected.sha256


def test_ids_of_databases_are_texts(tmp_path):
    """UUIDs, and whole numbers beyond what a float can tell apart."""
    uuids = [uuid.UUID(int=place).bytes for place in (1, 2, 1)]
    wide = [Decimal("76561198000000001"), Decimal("76561198000000002"), Decimal("3.00")]
    items = {"item_id": pa.array(wide, pa.decimal128(22, 2)), "title": ["a", "b", "c"]}
    log = {"user_id": pa.array(uuids, pa.uuid()), "item_id": items["item_id"], "position": [0, 0, 1]}
    found = read(write(tmp_path, log, items=items, shards=2))
    assert found.catalog.item_ids == ("76561198000000001", "76561198000000002", "3")
    assert found.interactions.user_ids == (str(uuid.UUID(int=1)), str(uuid.UUID(int=2)))


FAULTS = {
    "an unknown item": ({"item_id": ["b", "7", "7", "c", "x", "b"]}, r"part-00002\.parquet, row 1, .*was: 'x'"),
    "an empty id": ({"user_id": ["u2", "u1", "u2", "", "u3", "u1"]}, r"part-00001\.parquet, row 2, .*not be empty"),
    "no time": ({"timestamp": [4, 9, None, 2, 5, 3]}, r"part-00001\.parquet, row 1, .*must be a time.*empty"),
    "an endless time": ({"timestamp": [4, 9, 1, 2, 5, np.inf]}, r"part-00002\.parquet, row 2, .*finite"),
    "lists as ids": ({"user_id": [["u"]] * 6}, r"part-00000\.parquet, row 1, .*must be text or whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "match"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_by_file_and_row(tmp_path, columns, match):
    with pytest.raises(DataError, match=match):
        read(write(tmp_path / "data", {**LOG, **columns}))


def test_files_of_a_folder_must_have_the_same_columns(tmp_path):
    folder = write(tmp_path / "data")
    table = pa.table({**LOG, "timestamp": ["late"] * 6})
    pq.write_table(table, folder / "interactions" / "part-00001.parquet")
    match = r"part-00001\.parquet: the columns must be those of part-00000\.parquet, .*timestamp: int64.*timestamp: str"
    with pytest.raises(DataError, match=match):
        read(folder)
    pq.write_table(pa.table({**LOG, "rating": [1.0] * 6}), folder / "interactions" / "part-00001.parquet")
    with pytest.raises(DataError, match=r"part-00001\.parquet: the columns must be those of .*was: .*rating: double"):
        read(folder)


def test_files_of_a_folder_may_count_their_distinct_values_as_they_like(tmp_path):
    """pandas writes categories with the smallest numbers that do, and a column without any value as one of no type."""
    folder = write(tmp_path / "data")
    for path in (folder / "interactions").iterdir():
        path.unlink()
    users = [[f"u{start + user}" for user in range(count)] for start, count in ((0, 100), (100, 128), (228, 300))]
    for part, (names, index, ratings) in enumerate(
        zip(users, (pa.int8(), pa.int8(), pa.int16()), (pa.nulls(100), [5.0] * 128, [None] * 300), strict=True)
    ):
        coded = pa.array(names).dictionary_encode().cast(pa.dictionary(index, pa.string()))
        columns = {"user_id": coded, "item_id": ["b"] * len(names), "timestamp": range(len(names)), "rating": ratings}
        pq.write_table(pa.table(columns), folder / "interactions" / f"part-{part}.parquet")
    raw = read(folder)
    assert raw.interactions.user_ids == tuple(user for names in users for user in names)
    assert len(raw.interactions) == 528


def test_a_folder_must_hold_parquet_files_and_stand_alone(tmp_path):
    folder = write(tmp_path / "data")
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match=r"must be one file .*, was: interactions, interactions\.csv"):
        read(folder)
    (folder / "interactions.csv").unlink()
    for path in (folder / "interactions").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"interactions: the folder must hold files whose names end in `.parquet`"):
        read(folder)

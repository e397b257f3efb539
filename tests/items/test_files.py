"""Files of item codes: what is written comes back, what others write is read, what does not fit is refused."""

import gzip
import json

import numpy as np
import pytest

from llm_itemtok.errors import ArtifactError, DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.collisions import extra_level
from llm_itemtok.items.files import export_codes, format_of, read_codes, read_items_and_codes

IDS = ("a", "b,1", 'c "x"', "d\nd")
CODES = ItemCodes([[0, 3, 1], [0, 3, 2], [2, 0, 0], [1, 1, 1]], (3, 4, 3), names=("x", "y", "z"))
NAMES = {
    "index": "x.index.json", "catalogue": "x.json", "csv": "x.csv", "safetensors": "item_codes.safetensors"
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_written_comes_back(tmp_path, kind):
    path = export_codes(CODES, IDS, tmp_path / NAMES[kind])
    assert format_of(path) == kind
    back = read_codes(path, IDS)
    assert back == CODES
    assert back.provenance["kind"] == "file"
    assert back.provenance["file"] == NAMES[kind]
    if kind in ("csv", "safetensors"):
        assert back.names == CODES.names
    else:
        assert export_codes(CODES, IDS, tmp_path / "other", kind).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["index", "catalogue", "csv"])
def test_codes_are_joined_by_id_in_any_order_and_from_a_larger_catalogue(tmp_path, kind):
    path = export_codes(CODES, IDS, tmp_path / NAMES[kind])
    some = (IDS[2], IDS[0])
    assert read_codes(path, some, unknown_items="drop").table.tolist() == [[2, 0, 0], [0, 3, 1]]
    with pytest.raises(DataError, match=r"2 items have a code but are not in the catalogue, e.g. 'b,1'.*: drop"):
        read_codes(path, some)


def test_shared_codes_come_back_shared(tmp_path):
    shared = ItemCodes([[0, 1], [0, 1], [1, 0]], (2, 2))
    for name in ("x.index.json", "x.json", "x.csv"):
        assert read_codes(export_codes(shared, IDS[:3], tmp_path / name), IDS[:3]) == shared
    assert json.loads((tmp_path / "x.json").read_text()) == {"0,1": ["a", "b,1"], "1,0": ['c "x"']}


def test_an_index_is_written_as_others_read_it(tmp_path):
    path = export_codes(CODES, IDS, tmp_path / "x.index.json")
    assert json.loads(path.read_text())["a"] == ["<a_0>", "<b_3>", "<c_1>"]


@pytest.mark.parametrize("name", ["x.index.json", "x.index.json.gz"])
def test_an_index_by_row_number_is_in_catalogue_order(tmp_path, name):
    text = json.dumps({str(row): [f"<a_{word}>" for word in code[:1]] for row, code in enumerate(CODES.table.tolist())})
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_codes(tmp_path / name, IDS).table[:, 0].tolist() == [0, 0, 2, 1]
    assert read_codes(tmp_path / name, ("3", "2", "1", "0")).table[:, 0].tolist() == [1, 2, 0, 0]  # these are the ids


def test_a_catalogue_may_say_more_of_its_items(tmp_path):
    """FlashRec reads keys only; the values are whatever its user kept there."""
    content = {"0,1": [{"pid": 7, "title": "seven"}], "1,0": 8, "1, 1": ["9"]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_codes(tmp_path / "x.json", ("7", "8", "9")).table.tolist() == [[0, 1], [1, 0], [1, 1]]


def test_sizes_are_the_largest_codewords_unless_given(tmp_path):
    path = export_codes(ItemCodes([[0, 3]], (16, 16)), ["a"], tmp_path / "x.csv")
    assert read_codes(path, ["a"]).sizes == (1, 4)
    assert read_codes(path, ["a"], sizes=(16, 16)).sizes == (16, 16)
    with pytest.raises(DataError, match=r"codewords of level 1 must be in \[0, 3\), was: 3 to 3"):
        read_codes(path, ["a"], sizes=(1, 3))
    ours = export_codes(ItemCodes([[0, 3]], (16, 16)), ["a"], tmp_path / "item_codes.safetensors")
    assert read_codes(ours, ["a"]).sizes == (16, 16)


def test_a_level_may_have_a_codeword_an_item_however_many(tmp_path):
    """The last level of a tree may number the items of its fullest leaf."""
    item_ids = [str(row) for row in range(70_000)]
    path = export_codes(ItemCodes(np.arange(70_000)[:, None], (70_000,)), item_ids, tmp_path / "x.csv")
    assert read_codes(path, item_ids).sizes == (70_000,)
    with pytest.raises(DataError, match="at most 70,000 codewords"):
        read_codes(path, item_ids, sizes=(70_001,))


@pytest.mark.parametrize("by_id", [False, True])
def test_codes_of_our_own_still_say_that_their_last_level_only_counts(tmp_path, by_id):
    codes = extra_level(ItemCodes([[0], [0], [1]], (2,)))
    codes.save(tmp_path)
    if by_id:
        (tmp_path / "items.jsonl").write_text("".join(json.dumps({"id": item_id}) + "\n" for item_id in "cba"))
    back = read_codes(tmp_path, "abc")
    assert back.num_describing_levels == 1
    assert back.provenance["collisions"] == codes.provenance["collisions"]


@pytest.mark.parametrize("name", NAMES.values())
def test_it_is_recorded_how_codes_were_joined(tmp_path, name):
    path = export_codes(CODES, IDS, tmp_path / name)
    assert read_codes(path, IDS).provenance["joined_by"] == ("row" if name.endswith(".safetensors") else "id")


def test_keys_that_are_ids_are_never_taken_for_rows(tmp_path):
    """Ids 1 to 5 and a file from 0 to 4: joined by row, items 1 to 4 would all get the code of the one before."""
    path = export_codes(ItemCodes(np.arange(5)[:, None], (5,)), list("01234"), tmp_path / "x.index.json")
    with pytest.raises(DataError, match=r"1 of 5 have none, e.g. '5'"):
        read_codes(path, tuple("12345"))
    by_row = read_codes(path, tuple("abcde"))
    assert (by_row.table[:, 0].tolist(), by_row.provenance["joined_by"]) == ([0, 1, 2, 3, 4], "row")


@pytest.mark.parametrize("kind", ["index", "catalogue", "csv"])
def test_a_file_alone_says_which_items_it_is_of(tmp_path, kind):
    path = export_codes(CODES, IDS, tmp_path / NAMES[kind])
    item_ids, codes = read_items_and_codes(path)
    order = [item_ids.index(item_id) for item_id in IDS]
    np.testing.assert_array_equal(codes.table[order], CODES.table)
    assert codes.sizes == CODES.sizes


def test_a_file_by_row_number_is_read_in_the_order_of_the_numbers(tmp_path):
    path = export_codes(ItemCodes([[2], [0], [1]], (3,)), ("2", "0", "1"), tmp_path / "x.index.json")
    item_ids, codes = read_items_and_codes(path)
    assert (item_ids, codes.table[:, 0].tolist()) == (("0", "1", "2"), [0, 1, 2])
    with pytest.raises(DataError, match="must be here, found: nothing"):
        read_items_and_codes(tmp_path / "none.csv")


def test_our_own_codes_are_joined_by_the_items_beside_them(tmp_path):
    CODES.save(tmp_path)
    with pytest.raises(DataError, match="those of the catalogue's 2 items in its order, was: 4 codes"):
        read_codes(tmp_path, IDS[:2])
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"id": item_id}) + "\n" for item_id in IDS))
    assert read_codes(tmp_path, (IDS[1], IDS[0]), unknown_items="drop").table.tolist() == [[0, 3, 2], [0, 3, 1]]
    (tmp_path / "items.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match=r"must hold the 4 items of item_codes\.safetensors, was: 1"):
        read_codes(tmp_path, IDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.index.json", '{"a": ["<a_1>"], "b": ["<a_1>", "<b_2>"]}', r"levels, was: 1 \('a'\), 2 \('b'\)"),
        ("x.index.json", '{"a": ["<a_1>"], "a": ["<a_2>"]}', "'a' stands there several times"),
        ("x.index.json", '{"a": ["<a_1>"]}', "1 of 2 have none, e.g. 'b'. Ids in the file look like 'a'"),
        ("x.index.json", '{"a": ["a1"], "b": ["<a_1>"]}', r"""a list of tokens such as .*, but 'a' has: \['a1'\]"""),
        ("x.index.json", '{"a": "<a_1>", "b": ["<a_1>"]}', "but 'a' has: '<a_1>'"),
        ("x.index.json", '{"a": ["<a_1>"], "b": []}', r"but 'b' has: \[\]"),
        ("x.index.json", '{"a": ["<a_1>"], "b": ["<b_1>"]}', "begin alike, but level 0 of 'b' is <b_1> where others"),
        ("x.index.json", '["a"]', "a JSON object with an entry an item, was: list"),
        ("x.index.json", '{"a": [', "not JSON"),
        ("x.json", '{"a": ["<a_1>"]}', "1 of 2 have none"),
        ("x.json", '{"a": [7]}', r"must be an index, .* or a catalogue, .*, was: 'a' with \[7\]"),
        ("x.json", '{"1,2": ["a", "b"], "1,3": "a"}', "one code, but item 'a' has several"),
        ("x.json", '{"1,2": [{"title": "a"}]}', "the ids of its items, but '1,2' has: {'title': 'a'}"),
        ("x.json", '{"1,-2": "a"}', "separated by commas"),
        ("x.csv", "item_id,l0\na,1\nb,x\n", "line 3 must have a whole number from 0 a level, 1 of them, was: x"),
        ("x.csv", "\nitem_id,l0\n\na,1\n\nb,x\n", "line 6 must have"),
        ("x.csv", "item_id,l0\na,1,2\n", "line 2"),
        ("x.csv", "item_id,l0\na,1\na,1\n", "'a' stands there several times"),
        ("x.csv", "id,l0\na,1\n", "the columns must be item_id and one a level, with distinct names, was: id, l0"),
        ("x.csv", "", "was: nothing"),
        ("x.txt", "", r"must be called .*, was: x.txt"),
        ("x.json.gz", "{}", "must be text in UTF-8"),
        ("x.csv", "item_id,l0\n", "a line an item below the names of the columns, found: none"),
        ("x.csv", "item_id,l0\na,1\nb,100000000000000000000\n", "small numbers from 0, .*was: 100000000000000000000;"),
        ("x.csv", f"item_id,l0\na,1\nb,{'9' * 5000}\n", "was: a number of 5,000 digits; number the codewords"),
        ("x.csv", f"item_id,l0\na,1\n{'b' * 200_000},1\n", "not a csv file that can be read: field larger"),
        ("x.csv", "item_id,x,y\na,1,0\nb,65536,1\n", "at most 65,536 codewords, .*but level 0 goes up to 65,536;"),
        ("x.json", f'{{"1,{"9" * 5000}": ["a"]}}', "was: a number of 5,000 digits"),
        ("x.json", f'{{"1,2": [{"9" * 5000}]}}', "not JSON that can be read"),
        ("x.index.json", f'{{"a": ["<a_{"9" * 5000}>"], "b": ["<a_1>"]}}', "was: a number of 5,000 digits"),
        ("x.csv", f"item_id,{','.join(map(str, range(27)))}\na{',0' * 27}\nb{',1' * 27}\n", "26 levels, .*: 27"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_codes_for_the_catalogue_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_codes(tmp_path / name, ("a", "b"))


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a file of item codes .* must be here, found: nothing"):
        read_codes(tmp_path / "x.csv", IDS)
    ItemCodes(np.array([[0], [1]]), (2,)).save(tmp_path / "run" / "model")
    with pytest.raises(DataError, match=r"found: nothing; a run has them in its model: .*run.model"):
        read_codes(tmp_path / "run", IDS)
    (tmp_path / "item_codes.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        read_codes(tmp_path, IDS)
    packed = bytearray(gzip.compress(b'{"1,2": ["a"]}' * 99))
    packed[12:20] = bytes(8)
    (tmp_path / "x.json.gz").write_bytes(packed)
    with pytest.raises(DataError, match="must be text in UTF-8"):
        read_codes(tmp_path / "x.json.gz", IDS)


def test_exports_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(DataError, match="one distinct id an item, 4 of them, was: 1 distinct among 2"):
        export_codes(CODES, ["a", "a"], tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"must be called item_codes.safetensors, was: x.bin"):
        export_codes(CODES, IDS, tmp_path / "x.bin", "safetensors")
    deep = ItemCodes(np.zeros((1, 27), int), (1,) * 27)
    with pytest.raises(DataError, match="at most 26, was: 27"):
        export_codes(deep, ["a"], tmp_path / "x.index.json")

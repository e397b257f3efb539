"""Published formats, with the quirks their files really have."""

import json

import pytest

from llm_itemtok.data.readers import SOURCES, read
from llm_itemtok.errors import DataError
from tests.data.folders import text_of
from tests.data.test_readers import sequences

REVIEWS_2014 = [
    {"reviewerID": "A1", "asin": "B2", "overall": 5.0, "unixReviewTime": 1400000000, "reviewText": "good"},
    {"reviewerID": "A1", "asin": "B1", "overall": 2.0, "unixReviewTime": 1300000000},
]
META_2014 = (
    "{'asin': 'B1', 'title': 'Shea &amp; Butter', 'categories': [['Beauty', 'Skin'], ['Gifts']], 'brand': 'X'}\n"
    "{'asin': 'B2', 'categories': [['Beauty']], 'description': 'It\\'s <b>good</b>'}\n"
)
META_2018 = [
    {"asin": "B1", "title": "<span>Glue</span>", "category": ["Home", "</span>", "Tapes"], "brand": "X"},
    {"asin": "B2", "title": "var aPageStart = (new Date()).getTime();" * 900, "description": ["One.", "Two."]},
    {"asin": "B1", "title": "the same again", "category": [], "brand": ""},
]
REVIEWS_2023 = [
    {"user_id": "A1", "asin": "V9", "parent_asin": "B2", "rating": 5.0, "timestamp": 1400000000123},
    {"user_id": "A1", "asin": "B1", "parent_asin": "B1", "rating": 4.0, "timestamp": 1300000000123},
]
META_2023 = [
    {"parent_asin": "B1", "title": "Drum", "categories": ["Music", "Drums"], "store": "Y", "description": ["A", "B"]},
    {"parent_asin": "B2", "title": None, "categories": [], "store": None, "description": []},
]


def write(folder, **files):
    for name, content in files.items():
        (folder / name).write_bytes(text_of(content))
    return folder


def test_amazon_2014(tmp_path):
    write(tmp_path, **{"reviews_Beauty_5.json": REVIEWS_2014, "meta_Beauty.json": META_2014})
    raw = read(tmp_path, source="amazon-2014")
    assert sequences(raw) == {"A1": ["B1", "B2"]}
    assert raw.catalog.titles == ("Shea & Butter", "")
    assert raw.catalog.categories == (("Beauty", "Skin", "Gifts"), ("Beauty",))
    assert raw.catalog.brands == ("X", "")
    assert raw.catalog.descriptions == ("", "It's good")
    high = read(tmp_path, source="amazon-2014", event_filter={"column": "rating", "min": 4})
    assert sequences(high) == {"A1": ["B2"]}


def test_amazon_ratings_files_have_no_header_and_change_their_order_in_2018(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    write(tmp_path / "old", **{"ratings_Beauty.csv": "A1,B2,5.0,20\nA1,B1,4.0,10\n", "meta_Beauty.json": META_2014})
    write(tmp_path / "new", **{"Beauty.csv": "B2,A1,5.0,20\nB1,A1,4.0,10\n", "meta_Beauty.json": META_2018})
    assert sequences(read(tmp_path / "old", source="amazon-2014")) == {"A1": ["B1", "B2"]}
    assert sequences(read(tmp_path / "new", source="amazon-2018")) == {"A1": ["B1", "B2"]}


def test_amazon_2018(tmp_path):
    raw = read(write(tmp_path, **{"X_5.json": REVIEWS_2014, "meta_X.json": META_2018}), source="amazon-2018")
    assert sequences(raw) == {"A1": ["B1", "B2"]}
    assert raw.catalog.titles == ("Glue", "")
    assert raw.catalog.categories == (("Home", "Tapes"), ())
    assert raw.catalog.descriptions == ("", "One. Two.")


@pytest.mark.parametrize("log", ["jsonl", "csv"])
def test_amazon_2023(tmp_path, log):
    rows = "".join(
        f"{row['user_id']},{row['parent_asin']},{row['rating']},{row['timestamp']}\n" for row in REVIEWS_2023
    )
    content = REVIEWS_2023 if log == "jsonl" else "user_id,parent_asin,rating,timestamp\n" + rows
    raw = read(write(tmp_path, **{f"X.{log}": content, "meta_X.jsonl": META_2023}), source="amazon-2023")
    assert sequences(raw) == {"A1": ["B1", "B2"]}
    assert raw.interactions.timestamps.tolist() == [1_300_000_000.123, 1_400_000_000.123]
    assert raw.catalog.brands == ("Y", "")
    assert raw.catalog.descriptions == ("A B", "")


def test_amazon_metadata_that_is_broken_is_named(tmp_path):
    write(tmp_path, **{"reviews_X.json": REVIEWS_2014, "meta_X.json": META_2014 + "{'asin': 'B3', \n"})
    with pytest.raises(DataError, match=r"meta_X\.json, row 3: the line must be one JSON object"):
        read(tmp_path, source="amazon-2014")


MOVIELENS = {
    "latest": {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,2,4.0,20\n1,1,3.5,10\n",
        "movies.csv": (
            'movieId,title,genres\n1,"Misérables, Les (1995)",Drama|War\n2,Jumanji (1995),(no genres listed)\n'
        ),
    },
    "1m": {
        "ratings.dat": "1::2::4::20\n1::1::3::10\n",
        "movies.dat": "1::Misérables, Les (1995)::Drama|War\n2::Jumanji (1995)::\n".encode("latin-1"),
    },
    "100k": {
        "u.data": "1\t2\t4\t20\n1\t1\t3\t10\n",
        "u.item": (
            "1|Misérables, Les (1995)|01-Jan-1995||http://x|0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|1|0\n"
            "2|Jumanji (1995)|01-Jan-1995||http://x|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        ).encode("latin-1"),
    },
}


@pytest.mark.parametrize("edition", MOVIELENS)
def test_movielens(tmp_path, edition):
    raw = read(write(tmp_path, **MOVIELENS[edition]), source="movielens")
    assert sequences(raw) == {"1": ["1", "2"]}
    assert raw.catalog.titles == ("Misérables, Les (1995)", "Jumanji (1995)")
    assert raw.catalog.categories == (("Drama", "War"), ())
    assert sequences(read(tmp_path, source="movielens", event_filter={"column": "rating", "min": 4})) == {"1": ["2"]}


def test_recbole(tmp_path):
    write(
        tmp_path,
        **{
            "ml.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t4\t20.0\n1\t1\t3\t10.0\n",
            "ml.item": (
                'item_id:token\tmovie_title:token_seq\tclass:token_seq\n1\tToy "Story\tComedy Drama\n2\tJumanji\t\n'
            ),
        },
    )
    raw = read(tmp_path, source="recbole")
    assert sequences(raw) == {"1": ["1", "2"]}
    assert raw.catalog.titles == ('Toy "Story', "Jumanji")
    assert raw.catalog.categories == (("Comedy", "Drama"), ())


def test_recbole_category_sequences_may_be_set_apart_by_commas(tmp_path):
    write(
        tmp_path,
        **{
            "x.inter": "user_id:token\titem_id:token\ttimestamp:float\n1\ta\t1\n",
            "x.item": "item_id:token\tname:token\tcategories:token_seq\na\tx\t'Beauty', 'Hair Care'\n",
        },
    )
    raw = read(tmp_path, source="recbole", columns={"title": "name"})
    assert raw.catalog.categories == (("Beauty", "Hair Care"),)


def test_lcrec_json(tmp_path):
    items = {
        "0": {"title": "Drum", "categories": "Music, Drums", "brand": "Y", "description": "d"},
        "1": {"title": "X"},
    }
    write(tmp_path, **{"X.inter.json": json.dumps({"5": [1, 0]}), "X.item.json": json.dumps(items)})
    raw = read(tmp_path, source="lcrec")
    assert sequences(raw) == {"5": ["1", "0"]}
    assert raw.catalog.titles == ("Drum", "X")
    assert raw.catalog.categories == (("Music", "Drums"), ())
    assert raw.interactions.timestamps is None


@pytest.mark.parametrize(
    ("inter", "item", "match"),
    [
        ('{"5": [0,', '{"0": {"title": "x"}}', r"X\.inter\.json, row 1: the file must be one JSON document"),
        ("[]", '{"0": {"title": "x"}}', r"X\.inter\.json: the file must be one JSON object with at least one entry"),
        ('{"5": 0}', '{"0": {"title": "x"}}', r"X\.inter\.json, row 1: user '5' must have a list of items, was: 0"),
        ('{"5": []}', '{"0": {"title": "x"}}', r"X\.inter\.json: the file has no interactions"),
        ('{"5": [0]}', '{"0": "x"}', r"X\.item\.json, row 1: item '0' must be an object with a title, was: 'x'"),
        ('{"5": [0]}', '{"0": {"name": "x"}}', r"X\.item\.json: no item has a `title`; the first has: name"),
    ],
)
def test_lcrec_json_that_is_broken_is_named(tmp_path, inter, item, match):
    with pytest.raises(DataError, match=match):
        read(write(tmp_path, **{"X.inter.json": inter, "X.item.json": item}), source="lcrec")


@pytest.mark.parametrize("layout", ["one", "two"])
def test_data_sets_saved_on_disk(tmp_path, layout):
    import datasets

    items = datasets.Dataset.from_dict({"item_id": [7, 8], "title": ["a", None], "categories": [["x"], []]})
    log = datasets.Dataset.from_dict({"who": ["u", "u"], "item_id": ["8", "7"], "position": [1, 0]})
    if layout == "one":
        for name, data in (("items", items), ("interactions", log)):
            data.save_to_disk(tmp_path / name)
    else:
        datasets.DatasetDict({"items": items.remove_columns("categories"), "interactions": log}).save_to_disk(tmp_path)
    raw = read(tmp_path, source="hub", columns={"user_id": "who"})
    assert sequences(raw) == {"u": ["7", "8"]}
    assert raw.catalog.titles == ("a", "")


def test_a_data_set_that_is_none_is_named(tmp_path):
    with pytest.raises(DataError, match="the data set cannot be loaded"):
        read(tmp_path, source="hub")


@pytest.mark.parametrize("source", [source for source in SOURCES if source not in ("folder", "hub")])
def test_a_folder_without_the_files_of_the_format_is_named(tmp_path, source):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=r"is missing; the folder holds: readme\.txt"):
        read(tmp_path, source=source)


def test_formats_with_fixed_columns_refuse_a_mapping(tmp_path):
    with pytest.raises(DataError, match="`source: movielens` has fixed columns"):
        read(tmp_path, source="movielens", columns={"user_id": "who"})


def test_further_columns_come_from_the_formats_that_have_them(tmp_path):
    (tmp_path / "amazon").mkdir()
    (tmp_path / "lcrec").mkdir()
    verified = [{**row, "verified": row["overall"] > 3} for row in REVIEWS_2014]
    write(tmp_path / "amazon", **{"X_5.json": verified, "meta_X.json": META_2018})
    raw = read(tmp_path / "amazon", source="amazon-2018", item_columns=["asin"], log_columns=["verified"])
    assert raw.catalog.extra == {"asin": ("B1", "B2")}
    assert raw.interactions.extra["verified"].tolist() == ["false", "true"]

    items = {"0": {"title": "Drum", "asin": "A9"}, "1": {"title": "X", "asin": "A7"}}
    write(tmp_path / "lcrec", **{"X.inter.json": json.dumps({"5": [1, 0]}), "X.item.json": json.dumps(items)})
    assert read(tmp_path / "lcrec", source="lcrec", item_columns=["asin"]).catalog.extra == {"asin": ("A9", "A7")}
    with pytest.raises(DataError, match=r"the column `brand`.* is missing; there are: 'title', 'asin', 'item_id'"):
        read(tmp_path / "lcrec", source="lcrec", item_columns=["brand"])


def test_further_columns_of_movielens_and_recbole(tmp_path):
    (tmp_path / "movielens").mkdir()
    (tmp_path / "recbole").mkdir()
    write(tmp_path / "movielens", **MOVIELENS["100k"])
    raw = read(tmp_path / "movielens", source="movielens", item_columns=["release"])
    assert raw.catalog.extra == {"release": ("01-Jan-1995", "01-Jan-1995")}
    log = "user_id:token\titem_id:token\ttimestamp:float\tland:token\n1\ta\t1\tNL\n"
    item = "item_id:token\tname:token\tyear:float\na\tx\t1995\n"
    write(tmp_path / "recbole", **{"x.inter": log, "x.item": item})
    raw = read(
        tmp_path / "recbole", source="recbole", columns={"title": "name"}, item_columns=["year"], log_columns=["land"]
    )
    assert (raw.catalog.extra, raw.interactions.extra["land"].tolist()) == ({"year": ("1995",)}, ["NL"])

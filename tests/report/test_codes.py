"""What the report says of item tokens: the newest codes, and what changed from version to version."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm_itemtok import artifacts
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.doctor import category_purity
from llm_itemtok.report.codes import changes, code_tree, quality_rows
from llm_itemtok.report.run_folder import read_run

OLD = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 2]])


def make_run(folder, *tables, sizes=(4, 4), items=True):
    """A run folder with nothing but a recipe, versions of the codes, and the items."""
    artifacts.write_text(folder / "recipe.yaml", "seed: 0\n")
    for number, table in enumerate(tables):
        ItemCodes(table, sizes).save(folder / "codes" / f"v{number}")
    if items:
        lines = [json.dumps({"id": f"B{row}", "title": f"Toy {row}", "code": ""}) for row in range(len(OLD))]
        artifacts.write_text(folder / "model" / "items.jsonl", "\n".join(lines) + "\n")
    return folder


def changed(**rows):
    """`OLD` with other codes: `r3=(1, 2)` gives row 3 the code (1, 2)."""
    table = OLD.copy()
    for name, code in rows.items():
        table[int(name[1:])] = code
    return table


def test_changes_are_counted_from_the_tables(tmp_path):
    (change,) = changes(read_run(make_run(tmp_path, OLD, changed(r1=(0, 2), r2=(3, 0)))))

    assert (change.versions, change.items, change.share) == ("v0 → v1", 2, 0.4)
    assert change.levels == (("level-0", 0.2), ("level-1", 0.2))
    assert change.reasons == ()


def test_examples_are_those_changed_at_the_earliest_level_first_then_in_catalogue_order(tmp_path):
    (change,) = changes(read_run(make_run(tmp_path, OLD, changed(r0=(0, 3), r1=(0, 2), r4=(3, 3)))))

    assert [row["label"] for row in change.examples] == ["Toy 4", "Toy 0", "Toy 1"]
    assert change.examples[0] == {"label": "Toy 4", "old": "<a_2><b_2>", "new": "<a_3><b_3>", "why": ""}


def test_a_trace_says_why(tmp_path):
    run = make_run(tmp_path, OLD, changed(r0=(0, 3), r1=(0, 2), r4=(3, 3)))
    trace = {"item": ["B0", "B1", "B4"], "old": ["", "", ""], "new": ["", "", ""], "why": ["nearer", "nearer", "moved"]}
    pq.write_table(pa.table(trace), run / "codes" / "v1" / "trace.parquet")

    (change,) = changes(read_run(run))

    assert change.reasons == (("nearer", 2), ("moved", 1))
    assert [row["why"] for row in change.examples] == ["moved", "nearer", "nearer"]


def test_each_version_is_compared_with_the_one_before_in_the_order_of_their_numbers(tmp_path):
    tables = [OLD] * 10 + [changed(r0=(3, 3))]

    found = changes(read_run(make_run(tmp_path, *tables)))

    assert [change.versions for change in found][-1] == "v9 → v10"
    assert [change.items for change in found] == [0] * 9 + [1]


def test_versions_of_other_shapes_are_not_compared(tmp_path):
    run = make_run(tmp_path, OLD)
    ItemCodes(OLD, (8, 8)).save(run / "codes" / "v1")

    assert changes(read_run(run)) == []


def test_without_a_model_items_are_named_by_their_row(tmp_path):
    (change,) = changes(read_run(make_run(tmp_path, OLD, changed(r3=(3, 3)), items=False)))

    assert change.examples[0]["label"] == "row 3"


def test_the_tree_is_that_of_the_newest_codes(tmp_path):
    tree = code_tree(read_run(make_run(tmp_path, OLD, changed(r3=(3, 3)))))

    assert "level-0 (4), level-1 (5)" in tree.reading
    assert "&lt;a_3&gt;" in tree.chart.svg


def test_a_tree_without_colours_says_why(tmp_path):
    run = make_run(tmp_path, OLD)

    assert "because the run folder does not say which categories" in code_tree(read_run(run)).reading
    lists = pa.array([[]] * len(OLD), pa.list_(pa.string()))
    pq.write_table(
        pa.table({"item": [f"B{row}" for row in range(len(OLD))], "categories": lists}), run / "categories.parquet"
    )
    assert "because the items of this catalogue have no categories" in code_tree(read_run(run)).reading


def test_a_tree_says_what_its_colours_are(tmp_path):
    run = make_run(tmp_path, OLD)
    lists = [["Toys", "Dolls"], ["Toys", "Dolls"], ["Toys", "Kites"], ["Toys", "Kites"], ["Toys"]]
    pq.write_table(
        pa.table({"item": [f"B{row}" for row in range(len(OLD))], "categories": lists}), run / "categories.parquet"
    )

    tree = code_tree(read_run(run))

    assert "entry 2, the first that differs, of each item's list" in tree.reading
    assert "by chance" not in tree.reading
    assert tree.chart.legend == (("s0", "Dolls 40%"), ("s1", "Kites 40%"), ("none", "no category 20%"))
    assert tree.fullest[0]["category"] == "Dolls, 100%"


def test_the_tree_says_of_categories_what_the_table_below_it_says(tmp_path):
    run = make_run(tmp_path, OLD)
    categories = [("Dolls",), ("Dolls",), ("Kites",), ("Dolls",), ()]
    lists = pa.array(list(map(list, categories)), pa.list_(pa.string()))
    pq.write_table(pa.table({"item": [f"B{row}" for row in range(5)], "categories": lists}), run / "categories.parquet")
    purity = category_purity(ItemCodes(OLD, (4, 4)), categories)
    artifacts.write_json(run / "codes" / "v0" / "quality.json", {"doctor": {"purity": purity}})

    found = read_run(run)

    chance = f"{purity['levels'][0]['chance']:.1%}"
    assert purity["levels"][0]["share"] == 0.75
    assert f"75.0% have the most frequent one of their first codeword; {chance} would by chance." in (
        code_tree(found).reading
    )
    rows = dict(quality_rows(found.quality))
    assert rows["Items of the most frequent category of their first codeword (by chance)"] == [f"75.0% ({chance})"]

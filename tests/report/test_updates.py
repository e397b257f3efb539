"""What the report says of updates: rounds as they were judged, flows that add up, items chosen by rule."""

import json

import numpy as np
import pytest

from llm_itemtok import artifacts
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.report.page import render_report
from llm_itemtok.report.plots import Flow
from llm_itemtok.report.run_folder import read_run
from llm_itemtok.report.updates import charts, most_moved, neighbours, rounds, token_flow
from tests.report.test_codes import OLD, changed, make_run

LINE = {
    "round": 1, "step": 10, "epoch": 1.0, "moves": 2, "share": 0.4, "churn": [0.2, 0.2], "collisions": 0.25,
    "metric": "ndcg@10", "before": 0.03, "after": 0.031, "pass_seconds": 1.5, "training_seconds": 60.0,
    "pass_share": 0.025, "refreshed": 0, "accepted": True, "decided": 20, "version": 1,
    "levels": [{"name": "a", "used": 3, "entropy_bits": 1.5}, {"name": "b", "used": 3, "entropy_bits": 1.25}],
    "neighbours": [{"depth": 1, "share": 0.5, "chance": 0.1}],
}  # fmt: skip
REFUSED = {**LINE, "round": 2, "step": 30, "decided": 40, "accepted": False, "after": 0.02}
NEW = changed(r1=(0, 2), r2=(3, 0))


@pytest.fixture
def folder(tmp_path):
    run = make_run(tmp_path, OLD, NEW)
    artifacts.write_text(run / "recipe.yaml", "seed: 0\nupdate: {kind: self-improve}\n")
    lines = [LINE, REFUSED, {**LINE, "round": 3, "moves": 0, "after": None, "accepted": False}]
    artifacts.write_text(run / artifacts.UPDATES, "".join(json.dumps(line) + "\n" for line in lines))
    log = [
        *({"step": step, "validation/ndcg@10": step / 1000} for step in (10, 20, 30, 40)),
        {"step": 35, "trial/ndcg@10": 0.01},
    ]
    artifacts.write_text(run / artifacts.METRICS_LOG, "".join(json.dumps(line) + "\n" for line in log))
    return run


def test_rounds_stand_as_they_were_judged(folder):
    first, second, third = rounds(read_run(folder))
    assert first["Verdict"] == "✓ accepted as v1"
    assert first["Judged by"] == "ndcg@10 0.0300 → 0.0310"
    assert first["Wanted the same code"] == "25.0%"
    assert first["Pass over the items"] == "1.5 s, 2.5% of the training of its round"
    assert second["Verdict"] == "✗ refused, rolled back"
    assert third["Verdict"] == "nothing to move"


def test_an_accepted_version_that_the_model_does_not_have_is_said(folder):
    line = {**LINE, "version": 2}
    artifacts.write_text(folder / artifacts.UPDATES, json.dumps(line) + "\n")
    assert rounds(read_run(folder))[0]["Verdict"] == "✓ accepted as v2, later than the best model"


def test_the_page_has_a_part_on_updates_with_marks_on_the_curve_and_a_picture_of_flow(folder):
    drawn = charts(read_run(folder))
    assert [chart.title for chart in drawn] == [
        "Validation ndcg@10 and the rounds", "Items that changed their first codeword, v0 → v1"
    ]  # fmt: skip
    assert "round 1 was accepted at step 20" in drawn[0].summary
    assert "round 2 was refused at step 40" in drawn[0].summary
    assert drawn[0].svg.count("✓") == 1
    assert drawn[0].svg.count("✗") == 1
    assert "1 items; most: <a_1> → <a_3> 1" in drawn[1].summary
    page = render_report(folder)
    assert "Updates of item tokens" in page
    assert "Near it before" in page
    assert "<script" not in page


def test_flows_add_up_to_the_items_that_moved_and_quiet_codewords_are_drawn_as_one():
    old, new = ItemCodes(OLD, (4, 4)), ItemCodes(NEW, (4, 4))
    assert token_flow(old, old) == []
    flows = token_flow(old, new)
    assert flows == [Flow(1, 3, 1)]
    rng = np.random.default_rng(0)
    old, new = (ItemCodes(rng.integers(0, 30, size=(200, 1)), (30,)) for _ in range(2))
    flows = token_flow(old, new)
    assert sum(flow.items for flow in flows) == (old.table != new.table).sum()
    assert len({flow.source for flow in flows} | {flow.target for flow in flows}) == 11


def test_the_items_that_moved_most_stand_with_who_was_near_them_and_who_is(folder):
    first, second = most_moved(read_run(folder))
    assert (first.label, first.old, first.new) == ("Toy 2", "<a_1><b_0>", "<a_3><b_0>")
    assert (first.before, first.after) == (("Toy 3",), ())
    assert (second.label, second.before, second.after) == ("Toy 1", ("Toy 0",), ("Toy 0",))
    assert neighbours(OLD, 4) == []


def test_items_that_an_extension_added_later_have_not_moved(folder):
    """They stand behind the others in the newest table alone."""
    before = most_moved(read_run(folder))
    ItemCodes(np.concatenate([NEW, [[3, 3]]]), (4, 4)).save(folder / "codes" / "v2")
    with (folder / "model" / "items.jsonl").open("a") as items:
        items.write('{"id": "B5", "title": "Toy 5", "code": ""}\n')
    first, second = most_moved(read_run(folder))
    assert (first.label, first.old, first.new) == ("Toy 2", "<a_1><b_0>", "<a_3><b_0>")
    assert (first.before, first.after) == (("Toy 3",), ("Toy 5",))
    assert second == before[1]
    assert "Updates of item tokens" in render_report(folder)


def test_rounds_that_come_often_are_curves_and_the_table_has_some_of_them(folder):
    lines = [
        {**LINE, "round": number, "step": 10 * number, "decided": 10 * number, "metric": None, "before": None,
         "after": None, "version": 1, "conflict": 0.5, "cosines": {"a": -0.25, "b": 0.75}}
        for number in range(1, 301)
    ]  # fmt: skip
    artifacts.write_text(folder / artifacts.UPDATES, "".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    assert [row["Round"] for row in rounds(run)] == ["1", "34", "67", "101", "134", "167", "200", "234", "267", "300"]
    assert rounds(run)[0]["Gradients in conflict"] == "50% of the tensors"
    drawn = {chart.title: chart for chart in charts(run)}
    assert list(drawn)[1:5] == [
        "Share of items that a round gave another codeword",
        "Share of items that wanted the same code as another",
        "Codewords in use, bits",
        "Gradients of recommendation and of reconstruction",
    ]
    assert "✓" not in drawn["Validation ndcg@10 and the rounds"].svg
    assert "mean cosine" in drawn["Gradients of recommendation and of reconstruction"].summary
    assert "The table has 10 of 300 rounds." in render_report(folder)


def test_of_many_versions_the_first_is_compared_with_the_newest(tmp_path):
    run = make_run(tmp_path, OLD, *(changed(r1=(0, 2)) for _ in range(4)), NEW)
    artifacts.write_text(run / "recipe.yaml", "seed: 0\nupdate: {kind: bilevel}\n")
    artifacts.write_text(run / artifacts.UPDATES, json.dumps(LINE) + "\n")
    assert [chart.title for chart in charts(read_run(run))] == ["Items that changed their first codeword, v0 → v5"]


def test_a_run_with_fixed_codes_has_no_such_part(tmp_path):
    run = read_run(make_run(tmp_path, OLD))
    assert (rounds(run), charts(run), most_moved(run)) == ([], [], [])
    assert "Updates of item tokens" not in render_report(tmp_path)

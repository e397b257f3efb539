"""The report shows what stands in a run folder, says what does not, and is one page that can harm nobody."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_itemtok import artifacts
from llm_itemtok.errors import ArtifactError
from llm_itemtok.evaluation.metrics import bootstrap, metrics_from_ranks
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.pipeline.evaluate import _chosen_users
from llm_itemtok.report.page import write_report

PARTS = ("environment", "log", "metrics", "codes", "examples", "predictions", "model", "categories")
KINDS = ("Dolls", "Puzzles", "<b>Kites</b>")
NASTY = '<script>alert("1")</script> & "Soap"'


def make_run(folder: Path, parts=PARTS, *, steps=40) -> Path:
    """Write a run folder as the stages do, or only some of its parts."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = "seed: 7\ndata: {path: /data/toys, split: leave-last-out}\ntokenizer: {kind: rqvae, levels: 3, "
    recipe += "codebook_size: 16}\nmodel: {name: scratch, adapter: none}\nupdate: {kind: fixed}\n# <b>no markup</b>\n"
    (folder / "recipe.yaml").write_text(recipe)
    writers = {
        "environment": lambda: artifacts.write_json(
            folder / "environment.json", {"python": "3.11.2", "packages": {"torch": "2.13.0"}, "threads": 2}
        ),
        "log": lambda: (folder / "metrics.jsonl").write_text("".join(_log(rng, steps))),
        "metrics": lambda: artifacts.write_json(folder / "metrics.json", _metrics(rng)),
        "codes": lambda: _codes(folder / "codes" / "v0", rng),
        "examples": lambda: artifacts.write_json(folder / "examples.json", _examples()),
        "predictions": lambda: _predictions(folder / "predictions.parquet"),
        "model": lambda: artifacts.write_text(
            folder / "model" / "items.jsonl",
            "".join(
                json.dumps({"id": f"B{i}", "title": NASTY if i == 3 else f"Toy {i}", "code": f"<a_{i}>"}) + "\n"
                for i in range(300)
            ),
        ),
        "categories": lambda: _categories(folder / "categories.parquet", [["Toys", KINDS[i % 3]] for i in range(300)]),
    }
    for part in parts:
        writers[part]()
    return folder


def _log(rng, steps):
    for step in range(10, 10 * steps + 1, 10):
        item, text = 5 * np.exp(-step / 150) + 2 + rng.normal(0, 0.08), 1.5 * np.exp(-step / 90) + 0.4
        line = {"step": step, "epoch": step / 100, "loss": item + text, "learning_rate": 1e-3 * (1 - step / 400)}
        yield json.dumps(line | {"loss/next-item": item, "loss/title-to-item": text, "grad_norm": 1.0}) + "\n"
        if step % 50 == 0:
            value = 0.05 * (1 - np.exp(-step / 100)) - 0.00001 * max(step - 300, 0)
            yield json.dumps({"step": step, "epoch": step / 100, "validation/ndcg@10": value}) + "\n"
            yield json.dumps({"step": step, "epoch": step / 100, "validation/recall@10": 1.9 * value}) + "\n"


def _metrics(rng):
    def ranks(strength):
        return np.floor(rng.exponential(1 / strength, 2500)) + 1

    ours, popularity, markov = ranks(0.008), ranks(0.001), ranks(0.0065)
    part = {
        name: {"test": metrics_from_ranks(r), "ci95": bootstrap(r)}
        for name, r in {"ours": ours, "popularity": popularity, "markov": markov}.items()
    }
    return {
        "protocol": {"split": "leave-last-out", "k_core": 0, "history_length": 20, "mask_seen": False,
                     "candidates": "full", "beam": 50, "normaliser": "level", "seed": 7,
                     "catalog_sha256": "c0ffee" * 10 + "abcd", "counts": {"users": 2500, "items": 1200}},
        **part["ours"],
        "segments": {
            "head": {"users": 1500, **metrics_from_ranks(ours[:1500])},
            "tail": {"users": 1000, **metrics_from_ranks(ours[1500:])},
            "cold": {"users": 0},
            "history 1-5": {"users": 2000, **metrics_from_ranks(ours[:2000])},
            "history 6-10": {"users": 500, **metrics_from_ranks(ours[2000:])},
        },
        "validation": part["ours"]["test"],
        "baselines": {name: part[name] for name in ("popularity", "markov")},
        "speed": {"train_seconds": 81.5, "examples_per_second": 1520.0},
    }  # fmt: skip


def _codes(folder, rng):
    table = np.stack([rng.integers(0, 12, 300), rng.geometric(0.15, 300) % 16, np.arange(300) % 9], axis=1)
    ItemCodes(table, (16, 16, 16), names=("level-0", "level-1", "extra")).save(folder)
    levels = []
    for column, name in enumerate(("level-0", "level-1", "extra")):
        share = np.unique(table[:, column], return_counts=True)[1] / 300
        bits = float(-(share * np.log2(share)).sum())
        levels.append({"name": name, "size": 16, "used": len(share), "usage": len(share) / 16, "entropy_bits": bits,
                       "perplexity": 2**bits, "dead": 16 - len(share), "counts_only": name == "extra"})  # fmt: skip
    fitted = {"items": 300, "capacity": 256, "collision_rate": 0.0421, "unique": False, "levels": levels[:2],
              "neighbours": [{"depth": 1, "share": 0.453, "chance": 0.0911}], "reconstruction_error": 0.25,
              "verdict": "Look at: codes are not unique."}  # fmt: skip
    resolved = {"items": 300, "capacity": 4096, "collision_rate": 0.0421, "unique": True, "levels": levels,
                "verdict": "Good: few items collide."}  # fmt: skip
    artifacts.write_json(folder / "quality.json", {**fitted, "resolved": resolved})


def _categories(path, lists):
    ids = [f"B{i}" for i in range(len(lists))]
    pq.write_table(pa.table({"item": ids, "categories": pa.array(lists, pa.list_(pa.string()))}), path)


def _examples():
    def items(*numbers):
        return [{"item_id": f"B{i}", "title": NASTY if i == 3 else "" if i == 5 else f"Toy {i}"} for i in numbers]

    def recommend(*numbers):
        return [entry | {"score": -1.25 - place} for place, entry in enumerate(items(*numbers))]

    return [
        {"user": "u<1>", "rule": "best", "older": 0, "history": items(*range(10, 20)), "target": items(3)[0], "rank": 2,
         "recommendations": recommend(7, 3, 5)},
        {"user": "u2", "rule": "worst", "older": 7, "history": items(1), "target": items(30)[0], "rank": 0,
         "recommendations": recommend(8, 9)},
    ]  # fmt: skip


def _predictions(path):
    pq.write_table(
        pa.table({"user": ["a", "a", "b", "b", "b"], "rank": [1, 2, 1, 2, 11], "item": ["B3", "B4", "B3", "B9", "B1"],
                  "score": [0.5, 0.1, 0.5, 0.2, 0.1]}), path)  # fmt: skip


class Page(HTMLParser):
    """Collects tags, and text outside of the style sheet, and refuses a page whose tags do not nest."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.open, self.words = [], [], []
        self.feed(self.source)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def named(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def test_a_finished_run_shows_all_its_parts(tmp_path):
    path = write_report(make_run(tmp_path / "toys-rqvae"))
    page = Page(path)

    assert path == tmp_path / "toys-rqvae" / "report.html"
    for heading in (
        "Result",
        "For whom it works",
        "Training",
        "Item tokens",
        "Examples",
        "Protocol",
        "How it was made",
    ):
        assert heading in page.text
    assert "Missing" not in page.text
    labels = [attrs["aria-label"] for attrs in page.named("svg")]
    for beginning in (
        "Recall@10 on test", "NDCG@10 on test", "Recall@10 by segment", "Loss:", "Validation metrics:", "Loss by term:",
        "Learning rate:", "Codewords in use:", "Items under each codeword", "The code tree: ",
    ):  # fmt: skip
        assert sum(label.startswith(beginning) for label in labels) == 1
    assert all(attrs["role"] == "img" for attrs in page.named("svg"))


def test_metrics_stand_beside_baselines_with_intervals(tmp_path):
    run = make_run(tmp_path)
    metrics = artifacts.read_json(run / "metrics.json")

    text = Page(write_report(run)).text

    for part in (metrics, *metrics["baselines"].values()):
        low, high = part["ci95"]["recall@10"]
        assert f"{part['test']['recall@10']:.4f} {low:.4f} – {high:.4f}" in text


@pytest.mark.parametrize(
    ("ours", "interval", "words"),
    [
        (0.09, [0.08, 0.10], "above the best baseline on test, markov, at 0.0600, 1.50 times its value"),
        (0.03, [0.02, 0.04], "below the best baseline on test, markov, at 0.0600, 0.50 times its value"),
        (
            0.06,
            [0.05, 0.07],
            "not clearly apart from the best baseline on test, markov, at 0.0600, 1.00 times its value",
        ),
    ],
)
def test_above_and_below_are_said_only_where_intervals_do_not_overlap(tmp_path, ours, interval, words):
    run = make_run(tmp_path, ())
    baselines = {
        "popularity": {"test": {"recall@10": 0.01}, "ci95": {"recall@10": [0.005, 0.015]}},
        "markov": {"test": {"recall@10": 0.06}, "ci95": {"recall@10": [0.055, 0.065]}},
    }
    metrics = {"test": {"recall@10": ours}, "ci95": {"recall@10": interval}, "baselines": baselines}
    artifacts.write_json(run / "metrics.json", metrics)

    assert words in Page(write_report(run)).text


def test_the_best_baseline_is_chosen_on_validation(tmp_path):
    """Chosen on the test that it is compared on, the best of several would be partly the luckiest."""
    run = make_run(tmp_path, ())
    baselines = {
        name: {"test": {"recall@10": test}, "validation": {"recall@10": validation}}
        for name, test, validation in (("markov", 0.06, 0.08), ("item-knn", 0.07, 0.05))
    }
    artifacts.write_json(
        run / "metrics.json", {"test": {"recall@10": 0.09}, "baselines": baselines | {"oracle": baselines["markov"]}}
    )

    assert "the best baseline, markov, at 0.0600" in Page(write_report(run)).text


def test_rules_of_the_recipe_may_be_called_like_segments_of_ours(tmp_path):
    run = make_run(tmp_path, ())
    names = ("head up", "head down", "history: 6-10", "other step", "same-time step", "history 21+")
    segments = {name: {"users": 9, "recall@10": 0.5} for name in names}
    artifacts.write_json(run / "metrics.json", {"test": {"recall@10": 0.5}, "segments": segments})

    text = Page(write_report(run)).text

    assert (
        "History: number of items the user had before. Same-time step: the target bears the time of the item before "
        "it, so that their order may be chance. The remaining segments are those of the recipe"
    ) in text
    assert "Head: targets among" not in text


def test_without_baselines_the_verdict_says_so(tmp_path):
    run = make_run(tmp_path, ())
    artifacts.write_json(run / "metrics.json", {"test": {"recall@10": 0.5}})

    assert "Recall@10 on test is 0.5000. No baseline was measured on this split." in Page(write_report(run)).text


@pytest.mark.parametrize("kept", [(), *[tuple(PARTS[:stop]) for stop in range(1, len(PARTS))]])
def test_a_run_that_stopped_shows_what_it_has_and_says_what_it_has_not(tmp_path, kept):
    text = Page(write_report(make_run(tmp_path, kept))).text

    files = {
        "environment": "environment.json",
        "log": "metrics.jsonl",
        "metrics": "metrics.json",
        "codes": "codes/v0",
        "examples": "examples.json",
        "predictions": "predictions.parquet",
        "model": "model/items.jsonl",
        "categories": "categories.parquet",
    }
    for part, name in files.items():
        assert (f"There is no {name} in the run folder." in text) == (part not in kept)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds `recipe.yaml`, found: no such file in it"):
        write_report(tmp_path)
    with pytest.raises(ArtifactError, match=r"nowhere: a run folder holds `recipe.yaml`, found: no such folder"):
        write_report(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_titles_and_recipes_cannot_write_markup(tmp_path):
    page = Page(write_report(make_run(tmp_path)))

    assert not page.named("script")
    assert not page.named("b")
    assert "<script>alert" not in page.source
    assert NASTY in page.text
    assert "# <b>no markup</b>" in page.text
    assert "User u<1>" in page.text


def test_the_page_loads_nothing(tmp_path):
    page = Page(write_report(make_run(tmp_path)))

    policy = [attrs["content"] for attrs in page.named("meta") if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not {name for _, attrs in page.tags for name in attrs} & {"src", "href", "srcset", "xlink:href", "onclick"}
    assert not re.search(r"url\(|@import|https?://", page.source)


def test_the_target_is_marked_among_the_recommendations(tmp_path):
    page = Page(write_report(make_run(tmp_path)))

    assert page.text.count("✓ target") == 1
    assert "target at rank 2" in page.text
    assert "target not found among the first 50" in page.text
    assert "4 older items" in page.text
    assert "the model reads the newest 1 of 8 items" in page.text


@pytest.mark.parametrize(("rank", "words"), [(2.5, "target at rank 2.5 "), (9, "target at rank 9, below this list ")])
def test_a_target_below_the_list_shown_is_said_to_be_there(tmp_path, rank, words):
    run = make_run(tmp_path, ("examples",))
    examples = artifacts.read_json(run / "examples.json")
    examples[0]["rank"] = rank
    artifacts.write_json(run / "examples.json", examples)

    assert words in Page(write_report(run)).text


def test_example_users_stand_under_the_rule_that_chose_them(tmp_path):
    text = Page(write_report(make_run(tmp_path, ("examples",)))).text

    assert text.index("Best of the users whose target was found") < text.index("User u<1>")
    assert text.index("User u<1>") < text.index("Worst users whose target was not found") < text.index("User u2")
    assert "Median" not in text


def test_the_page_of_a_run_says_that_it_is_private(tmp_path):
    """It looks like something to share: it is one file, and loads nothing."""
    assert (
        "It is private: users, their histories and places on this machine"
        in Page(write_report(make_run(tmp_path))).text
    )


def test_examples_of_a_run_that_did_not_note_its_rule_are_shown_without(tmp_path):
    run = make_run(tmp_path, ("examples",))
    examples = artifacts.read_json(run / "examples.json")
    artifacts.write_json(
        run / "examples.json",
        [{key: value for key, value in entry.items() if key not in ("rule", "older")} for entry in examples],
    )

    text = Page(write_report(run)).text

    assert "User u<1>" in text
    assert "Best" not in text


@given(st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.5, 7.0, 20.0]), max_size=40), st.integers(1, 4))
def test_users_are_chosen_by_rank_and_none_twice(ranks, each):
    """Best users are found and rank before median ones; worst ones were not found, or rank behind all others."""
    ranks = np.array(ranks, dtype=np.float64)

    chosen = _chosen_users(ranks, each)

    every = [case for cases in chosen.values() for case in cases]
    assert len(every) == len(set(every))
    assert all(len(cases) <= each for cases in chosen.values())
    best, median, worst = (ranks[cases].tolist() for cases in chosen.values())
    assert best == sorted(best)
    assert median == sorted(median)
    found = np.sort(ranks[ranks > 0])
    assert best == found[: len(best)].tolist()
    assert bool(best) == bool(len(found))
    if (ranks == 0).any():
        assert worst == [0.0] * min(each, int((ranks == 0).sum()))
    else:
        assert worst == found[::-1][: len(worst)].tolist()
    if len(median) == each and each % 2 and not (ranks == 0).any():
        assert median[each // 2] in (found[(len(found) - 1) // 2], found[len(found) // 2])


def test_an_item_without_title_shows_its_id(tmp_path):
    assert "3 B5 -3.25" in Page(write_report(make_run(tmp_path))).text


def test_recommendations_are_summed_up_over_users_in_the_first_ten_places(tmp_path):
    text = Page(write_report(make_run(tmp_path))).text

    assert f"of 2 users hold 3 different items; the one seen most, “{NASTY}”, stands in the list of 100.0%" in text


def test_half_a_line_at_the_end_of_the_log_is_left_out_and_said(tmp_path):
    run = make_run(tmp_path, ("log",), steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')

    page = Page(write_report(run))

    assert "Left out: 1 of the lines of metrics.jsonl cannot be read, first line 4." in page.text
    assert any("at step 30." in attrs["aria-label"] for attrs in page.named("svg"))


def test_a_resumed_run_counts_a_step_once_and_the_later_line_wins(tmp_path):
    run = make_run(tmp_path, ())
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 9.0}\n{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 3.0}\n'
    )

    svg = Page(write_report(run)).named("svg")[0]

    assert svg["aria-label"] == "Loss: loss goes from 5 at step 1 to 3 at step 2."


def test_losses_that_are_no_numbers_are_said_and_not_drawn(tmp_path):
    run = make_run(tmp_path, ())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": NaN}\n')

    page = Page(write_report(run))

    assert "loss was not a finite number at 2 logged steps, first at step 2." in page.text
    assert "nan" not in page.named("svg")[0]["aria-label"].lower()


def test_a_run_still_rising_and_levels_half_empty_are_noticed(tmp_path):
    run = make_run(tmp_path, ("log", "codes"), steps=20)
    quality = artifacts.read_json(run / "codes" / "v0" / "quality.json")
    quality["resolved"]["levels"][0]["used"] = 7
    quality["resolved"]["levels"][2]["used"] = 1
    artifacts.write_json(run / "codes" / "v0" / "quality.json", quality)

    text = Page(write_report(run)).text

    assert "best at the last measurement: longer training may still help" in text
    assert "level-0 uses only 7 of its 16 codewords" in text
    assert "extra uses only" not in text


@pytest.mark.parametrize(("values", "rising"), [((0.1, 0.2), True), ((0.2, 0.1), False), ((0.2,), False)])
def test_two_measurements_are_enough_to_see_a_rise(tmp_path, values, rising):
    run = make_run(tmp_path, ("log",))
    lines = [json.dumps({"step": step, "validation/ndcg@10": value}) for step, value in enumerate(values, start=1)]
    artifacts.write_text(run / "metrics.jsonl", "\n".join(lines) + "\n")

    assert ("longer training may still help" in Page(write_report(run)).text) == rising


def test_versions_of_the_codes_stand_side_by_side_in_order(tmp_path):
    run = make_run(tmp_path, ("codes",))
    for version, rate in (("v2", 0.02), ("v10", 0.01)):
        artifacts.write_json(run / "codes" / version / "quality.json", {"collision_rate": rate})

    text = Page(write_report(run)).text

    assert "Codes v0 v2 v10" in text
    assert "before resolution 4.2% 2.0% 1.0%" in text


def test_the_codes_in_use_are_shown_and_not_those_before_resolution(tmp_path):
    text = Page(write_report(make_run(tmp_path, ("codes",)))).text

    assert "Good: few items collide." in text
    assert "not unique" not in text
    assert "Codes there is room for 4096" in text
    assert "extra 16 9" in text
    assert "the same first 1 of the code (by chance) 45.3% (9.1%)" in text
    assert "as a share of their variance 25.0%" in text


def test_the_oracle_is_a_bound_and_no_rival(tmp_path):
    run = make_run(tmp_path, ())
    baselines = {name: {"test": {"recall@10": value}} for name, value in (("oracle", 0.9), ("markov", 0.2))}
    artifacts.write_json(run / "metrics.json", {"test": {"recall@10": 0.5}, "baselines": baselines})

    page = Page(write_report(run))

    assert "the best baseline on test, markov, at 0.2000, 2.50 times its value" in page.text
    assert "a bound, not a rival" in page.text
    assert '<td class="best">0.5000</td><td>0.9000</td><td>0.2000</td>' in page.source


def test_segments_stand_beside_the_baselines_measured_on_them_best_first(tmp_path):
    run = make_run(tmp_path, ("metrics",))
    metrics = artifacts.read_json(run / "metrics.json")
    metrics["segments"]["asin up"] = {"users": 9, "recall@10": 0.5}
    for name, value in (("popularity", 0.0123), ("markov", 0.0456)):
        metrics["baselines"][name]["segments"] = {"tail": {"users": 1000, "recall@10": value}}
    artifacts.write_json(run / "metrics.json", metrics)

    page = Page(write_report(run))

    ours = f"{metrics['segments']['tail']['recall@10']:.4f}"
    assert "Segment Users this model markov popularity" in page.text
    assert f"tail 1,000 {ours} 0.0456 0.0123" in page.text
    assert "cold 0 – – –" in page.text
    assert "asin up 9 0.5000 – –" in page.text
    assert "The remaining segments are those of the recipe" in page.text
    label = next(attrs["aria-label"] for attrs in page.named("svg") if "by segment" in attrs["aria-label"])
    assert f"tail: this model {ours}, markov 0.0456, popularity 0.0123" in label


def test_baselines_say_their_time_settings_and_validation(tmp_path):
    run = make_run(tmp_path, ("metrics",))
    metrics = artifacts.read_json(run / "metrics.json")
    metrics["baselines"]["markov"] |= {
        "seconds": 0.31, "settings": {"order": 1, "decay": 0.8}, "validation": {"ndcg@10": 0.0777}
    }  # fmt: skip
    metrics["training"] = {"seconds": 6300.0}
    artifacts.write_json(run / "metrics.json", metrics)

    text = Page(write_report(run)).text

    ours = f"{metrics['validation']['ndcg@10']:.4f}"
    assert f"NDCG@10 on validation {ours} – 0.0777 Time 1.8 h – 0.31 s Settings chosen – – order 1 decay 0.8" in text

    metrics["training"]["repeats"] = {"keep": 0.03, "drop": 0.04}
    metrics["protocol"] |= {"repeats": False, "dense_share": 0.5}
    artifacts.write_json(run / "metrics.json", metrics)

    assert "Settings chosen repeats no dense share 0.5 – order 1 decay 0.8" in Page(write_report(run)).text

    del metrics["baselines"]["markov"]["settings"]
    artifacts.write_json(run / "metrics.json", metrics)

    assert "Settings chosen repeats no dense share 0.5 – –" in Page(write_report(run)).text


def test_metrics_from_before_baselines_were_timed_have_no_empty_rows(tmp_path):
    text = Page(write_report(make_run(tmp_path, ("metrics",)))).text

    assert "Settings chosen" not in text
    assert "on validation" not in text
    assert "Segment Users this model head" in text


def test_what_training_took_is_said_as_far_as_it_is_known(tmp_path):
    run = make_run(tmp_path, ())
    facts = {"steps": 11310, "best_step": 9802, "flops": 1.23e15, "seconds": 1020.0, "peak_mb": None, "curve": [[1, 2]]}
    artifacts.write_json(run / "metrics.json", {"test": {"recall@10": 0.5}, "training": facts})

    text = Page(write_report(run)).text

    assert (
        "Training Steps 11,310 Best at step 9,802 Time 17 min Floating-point operations, estimated 1.2 × 10¹⁵ "
        "How it was made"
    ) in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "[1, 2]", r"metrics.json: must hold a dict, found: list"),
        ("metrics.json", "{", r"metrics.json:1: not JSON"),
        ("recipe.yaml", "a: [", r"recipe.yaml: the recipe of a run must be YAML"),
        ("recipe.yaml", "a: &a [1]\nb: *a", r"recipe.yaml: the recipe of a run must be YAML .*yaml:1: .*anchors"),
        ("recipe.yaml", "- a", r"recipe.yaml: the recipe of a run must be a mapping, found: list"),
        ("predictions.parquet", "no", r"predictions.parquet: must be parquet with columns user, rank and item"),
        ("categories.parquet", "no", r"categories.parquet: must be parquet with the columns categories"),
        ("codes/v0/trace.parquet", "no", r"trace.parquet: must be parquet with the columns item, why"),
        ("model/items.jsonl", '{"id": "B1"}\n', r"items.jsonl: must hold the 300 items that have codes, found: 1;"),
        ("model/items.jsonl", '{"title": "x"}\n', r"items.jsonl:1: a line must hold an item with `id`"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    run = make_run(tmp_path)
    (run / name).write_text(content)

    with pytest.raises(ArtifactError, match=message):
        write_report(run)


def test_a_report_replaces_the_one_before_and_is_the_same_for_the_same_run(tmp_path):
    run = make_run(tmp_path)

    first = write_report(run).read_text()

    assert write_report(run).read_text() == first


def test_the_report_needs_neither_torch_nor_transformers(tmp_path):
    code = "import sys, llm_itemtok.report.page; print([m for m in ('torch', 'transformers') if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_title_of_a_megabyte_does_not_fill_the_page(tmp_path):
    run = make_run(tmp_path)
    before = write_report(run).stat().st_size
    examples = artifacts.read_json(run / "examples.json")
    examples[0]["target"]["title"] = "word " * 200_000
    artifacts.write_json(run / "examples.json", examples)
    titles = [json.dumps({"id": f"B{i}", "title": "word " * 9_000}) + "\n" for i in range(300)]
    artifacts.write_text(run / "model" / "items.jsonl", "".join(titles))

    assert write_report(run).stat().st_size < before + 30_000


def test_the_page_of_a_large_catalogue_stays_small(tmp_path):
    """A page is sent by mail and opened on a phone; 12,101 items on 3 levels are the field's standard table."""
    run = make_run(tmp_path, ("metrics", "log"))
    rng = np.random.default_rng(0)
    table = np.minimum(rng.geometric(0.02, (12_101, 3)), 256) - 1
    ItemCodes(table, (256, 256, 256)).save(run / "codes" / "v0")
    _categories(run / "categories.parquet", [["Toys", f"a category of some length {i % 11}"] for i in range(12_101)])

    assert write_report(run).stat().st_size < 1_000_000

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

from llm_itemtok import artifacts
from llm_itemtok.errors import ArtifactError
from llm_itemtok.evaluation.metrics import bootstrap, metrics_from_ranks
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.report import write_report

PARTS = ("environment", "log", "metrics", "codes", "examples", "predictions", "model")
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
                json.dumps({"id": f"B{i}", "title": NASTY if i == 3 else f"Toy {i}", "code": [0, i, 0]}) + "\n"
                for i in range(40)
            ),
        ),
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


def _examples():
    def items(*numbers):
        return [{"item_id": f"B{i}", "title": NASTY if i == 3 else "" if i == 5 else f"Toy {i}"} for i in numbers]

    def recommend(*numbers):
        return [entry | {"score": -1.25 - place} for place, entry in enumerate(items(*numbers))]

    return [
        {"user": "u<1>", "history": items(*range(10, 20)), "target": items(3)[0], "rank": 2,
         "recommendations": recommend(7, 3, 5)},
        {"user": "u2", "history": items(1), "target": items(30)[0], "rank": 0, "recommendations": recommend(8, 9)},
    ]  # fmt: skip


def _predictions(path):
    pq.write_table(
        pa.table({"user": ["a", "a", "b", "b", "b"], "rank": [1, 2, 1, 2, 11], "item": ["B3", "B4", "B3", "B9", "B1"],
                  "score": [0.5, 0.1, 0.5, 0.2, 0.1]}), path)  # fmt: skip


class Page(HTMLParser):
    """Collects tags, and text outside of the style sheet, and refuses a page whose tags do not nest."""

    VOID = frozenset({"meta", "rect", "circle", "polyline", "path", "br"})

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
        "Learning rate:", "Codewords in use:", "Items under each codeword",
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
        (0.09, [0.08, 0.10], "above the best baseline, markov, at 0.0600, 1.50 times its value"),
        (0.03, [0.02, 0.04], "below the best baseline, markov, at 0.0600, 0.50 times its value"),
        (0.06, [0.05, 0.07], "not clearly apart from the best baseline, markov, at 0.0600, 1.00 times its value"),
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
    assert "target not in the list" in page.text
    assert "4 older items" in page.text


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

    assert "`loss` was not a finite number at 2 logged steps, first at step 2." in page.text
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

    assert "the best baseline, markov, at 0.2000, 2.50 times its value" in page.text
    assert "a bound, not a rival" in page.text
    assert '<td class="best">0.5000</td><td>0.9000</td><td>0.2000</td>' in page.source


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "[1, 2]", r"metrics.json: must hold a dict, found: list"),
        ("metrics.json", "{", r"metrics.json:1: not JSON"),
        ("recipe.yaml", "a: [", r"recipe.yaml: the recipe of a run must be YAML"),
        ("recipe.yaml", "- a", r"recipe.yaml: the recipe of a run must be a mapping, found: list"),
        ("predictions.parquet", "no", r"predictions.parquet: must be parquet with columns user, rank and item"),
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
    code = "import sys, llm_itemtok.report; print([m for m in ('torch', 'transformers') if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_title_of_a_megabyte_does_not_fill_the_page(tmp_path):
    run = make_run(tmp_path)
    examples = artifacts.read_json(run / "examples.json")
    examples[0]["target"]["title"] = "word " * 200_000
    artifacts.write_json(run / "examples.json", examples)

    assert write_report(run).stat().st_size < 100_000

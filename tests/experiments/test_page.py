"""A results page says what its numbers allow, says what is missing, and changes only when its results do."""

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from llm_itemtok.errors import ArtifactError
from llm_itemtok.evaluation.metrics import bootstrap, metrics_from_ranks
from llm_itemtok.evaluation.paired import Estimate, PairedDifference
from llm_itemtok.experiments.findings import KEYS, best_points, confirmed, edges
from llm_itemtok.experiments.page import render_page
from llm_itemtok.experiments.plots import Line, Mark, curve_picture, interval_picture
from llm_itemtok.experiments.wording import answer, number, percent, plain, table

USERS = 400
ARMS = {arm: {"control": arm == "random", "probe": False} for arm in ("random", "made", "other")}
PROBE = {"joint": {"control": False, "probe": True}}


class Results:
    """Rows, ranks and records as a plan leaves them."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.records: dict[str, dict] = {}
        self.ranks: dict[str, tuple[list[str], np.ndarray]] = {}

    def add(self, stage: str, dataset: str, arm: str, seed: int, hits: float, *, block: str = "", **changes) -> dict:
        """One run that finds the target of the share `hits` of the users, always those that come first."""
        sha = hashlib.sha256(repr((stage, dataset, arm, seed, block)).encode()).hexdigest()
        ranks = np.where(np.arange(USERS) < hits * USERS, 1.0 + np.arange(USERS) % 10, 0.0).astype(np.float32)
        metrics = metrics_from_ranks(ranks)
        curve = [[step, hits * min(step, 600) / 600] for step in range(100, 1000, 100)]
        row = {
            "stage": stage,
            "block": block or dataset,
            "dataset": dataset,
            "arm": arm,
            **(ARMS | PROBE)[arm],
            "seed": seed,
            "settings": {},
            "steps": 900,
            "targets_seen": 1_000_000,
            "flops": 1e12,
            "test": metrics if stage == "confirm" else None,
            "validation": metrics,
            "seconds": 60.0,
            "peak_mb": 512.0,
            "recipe_sha256": sha,
            "versions": {"torch": "2.13.0"},
        } | changes
        self.rows.append(row)
        parts = {"validation": metrics, "training": {"curve": curve}}
        if stage == "confirm":
            self.ranks[sha] = ([f"user {number}" for number in range(USERS)], ranks)
            segments = {"head": {"users": 100, **metrics_from_ranks(ranks[:100])}, "cold": {"users": 0}}
            parts |= {"test": metrics, "segments": segments, "baselines": {"markov": self.baseline(0.5)}}
        self.records[sha] = {"recipe": {}, "metrics": parts, "commit": "c" * 40}
        return row

    def baseline(self, hits: float) -> dict:
        ranks = np.where(np.arange(USERS) < hits * USERS, 5.0, 0.0)
        metrics = metrics_from_ranks(ranks)
        return {"test": metrics, "ci95": bootstrap(ranks), "validation": metrics, "settings": {"decay": 0.7}}

    @property
    def table(self) -> pa.Table:
        pieces = [
            (sha, user, rank)
            for sha, (users, ranks) in self.ranks.items()
            for user, rank in zip(users, ranks, strict=True)
        ]
        hashes, users, ranks = zip(*pieces, strict=True) if pieces else ((), (), ())
        names = ("recipe_sha256", "user", "rank")
        return pa.table(
            [pa.array(hashes, pa.string()), pa.array(users, pa.string()), pa.array(ranks, pa.float32())], names
        )

    def page(self, **options):
        return render_page("made", "Is it better?", self.rows, self.table, self.records, **options)


def _results(*, method: float = 0.3, seeds: int = 3, datasets: tuple[str, ...] = ("beauty", "small")) -> Results:
    found = Results()
    for arm, hits in (("random", 0.2), ("made", method)):
        found.add("screen", "beauty", arm, 9, hits, block="beauty, rate 0.1")
        found.add("screen", "beauty", arm, 9, hits / 2, block="beauty, rate 0.2")
    for seed in range(seeds):
        for dataset in datasets:
            found.add("confirm", dataset, "random", seed, 0.2)
            found.add("confirm", dataset, "made", seed, method)
            found.add("confirm", dataset, "joint", seed, 0.2)
    return found


@pytest.fixture(scope="module")
def results() -> Results:
    return _results()


def test_the_answer_says_ahead_where_the_interval_leaves_zero_out(results):
    page = results.page(titles={"made": "Made codes", "joint": ""}).markdown

    assert (
        "**On beauty**, Made codes reaches Recall@10 .3000 against .2000 for random (control) and is ahead: +50" in page
    )
    assert "three seeds, p < .001" in page
    assert "joint 0.0 % [0.0 %, 0.0 %] (cannot be told apart, three seeds)" in page


def test_the_answer_about_several_methods_is_a_list():
    found = _results(datasets=("beauty",))
    for seed in range(3):
        found.add("confirm", "beauty", "other", seed, 0.1)
    page = found.page().markdown
    assert (
        "**On beauty:**\n\n- made reaches Recall@10 .3000 against .2000 for random (control) and is ahead: +50" in page
    )
    assert "\n- other reaches Recall@10 .1000 against .2000 for random (control) and is behind: −50" in page


def test_the_answer_says_behind_where_the_method_loses():
    assert "(control) and is behind: −50.0 % [" in _results(method=0.1).page().markdown


def test_the_answer_takes_no_side_where_the_interval_holds_zero():
    """Seven in a thousand users more are within what other users would give."""
    page = _results(method=0.2075).page().markdown

    assert "the two cannot be told apart: +" in page
    assert "would probably have been seen" in page
    assert " is ahead: " not in page


def test_the_best_baseline_is_chosen_on_validation_and_compared_by_its_interval(results):
    """The Markov chain finds half of all targets and is ahead; what is better on test alone is not chosen."""
    lucky = results.baseline(0.9) | {"validation": results.baseline(0.1)["validation"]}
    other = _results(seeds=2)
    for record in other.records.values():
        if "baselines" in record["metrics"]:
            record["metrics"]["baselines"] |= {"item-knn": lucky, "oracle": results.baseline(1.0)}

    assert (
        "The best baseline there, Markov chain (.5000), is ahead of the best model, made (.3000)."
        in other.page().markdown
    )


def test_the_best_model_is_chosen_on_validation_as_well():
    other = _results(seeds=2)
    for row in other.rows:
        if row["arm"] == "joint":
            row["validation"] = metrics_from_ranks(np.ones(USERS))

    assert "Markov chain (.5000), is ahead of the best model, joint (.2000)." in other.page().markdown


def test_a_baseline_without_validation_is_chosen_on_test_and_the_page_says_so():
    found = _results(seeds=1)
    for record in found.records.values():
        for baseline in record["metrics"].get("baselines", {}).values():
            del baseline["validation"]

    assert "Markov chain (.5000, chosen on test for want of its validation)" in found.page().markdown


def test_a_baseline_of_one_seed_is_called_so():
    """Its interval is about other users only, while the model's is about other seeds too."""
    found = _results(seeds=2)
    for record in found.records.values():
        if "baselines" in record["metrics"]:
            record["metrics"]["baselines"]["sasrec"] = found.baseline(0.6)

    page = found.page().markdown

    assert "The best baseline there, SASRec (.6000, one seed), is ahead of the best model" in page
    assert (
        "**Baselines** are measured once, SASRec with one seed, so their intervals are about other users only." in page
    )


@pytest.mark.parametrize(
    ("hits", "fingerprint", "words"),
    [
        (0.4, "a", "disagree on its test metrics (by up to 0.1)"),
        (0.5, "b", "agree on its test metrics, but made it with different code or settings"),
    ],
)
def test_records_that_do_not_agree_on_a_baseline_are_named(hits, fingerprint, words):
    """Runs of a block share their baselines; where they do not, some were made by other code than the rest."""
    found = _results(seeds=2, datasets=("beauty",))
    assert "the records of these runs" not in found.page().markdown
    measured = [record["metrics"]["baselines"] for record in found.records.values() if "test" in record["metrics"]]
    for baselines in measured[1:]:
        baselines["markov"]["fingerprint"] = "a"  # the first record is older than fingerprints
    measured[-1]["markov"] = found.baseline(hits) | {"fingerprint": fingerprint}

    assert f"- Markov chain: the records of these runs {words}; the first of them is shown." in found.page().markdown


def test_where_arms_leave_out_histories_baselines_count_that_could_too():
    """The others are no disagreement, and stand where there is no better."""
    found = _results(seeds=2, datasets=("beauty",))
    measured = [record["metrics"] for record in found.records.values() if "test" in record["metrics"]]
    for metrics in measured[1:]:
        metrics["protocol"] = {"repeats": False}
        metrics["baselines"] = {"markov": found.baseline(0.6)}
    measured[0]["baselines"]["markov"] = found.baseline(0.4)
    measured[0]["baselines"]["popularity"] = found.baseline(0.1)

    (block,) = confirmed(found.rows, found.table, found.records)

    shown = {baseline.name: baseline.test[KEYS[0]].value for baseline in block.baselines}
    assert shown["markov"] == 0.6
    assert shown["popularity"] == 0.1
    assert not [note for note in block.notes if "disagree" in note.text]


def test_the_verdict_is_that_of_the_interval_that_is_printed():
    """On the border the interval of the relative gain may hold 0 where that of the difference does not."""
    of = PairedDifference(
        difference=Estimate(0.002, 0.00001, 0.00399),
        relative=Estimate(0.03, -0.001, 0.061),
        p=0.049,
        detectable=0.003,
        detectable_relative=0.045,
        by_seed=(0.0, 0.0, 0.0),
        users=400,
    )
    (block,) = confirmed((found := _results(datasets=("beauty",))).rows, found.table, found.records)

    def said(of: PairedDifference) -> str:
        arms = [arm if arm.name != "made" else replace(arm, differences={KEYS[0]: of}) for arm in block.arms]
        return "\n".join(answer([replace(block, arms=tuple(arms))], str, rising=(), settled=(), missing=0))

    assert "the two cannot be told apart: +3.0 % [−0.1 %, +6.1 %]" in said(of)
    apart = replace(of, relative=Estimate(0.03, 0.001, 0.059))
    assert "and is ahead: +3.0 % [+0.1 %, +5.9 %]" in said(apart)
    assert "cannot be told apart: +3.0 % [0.0 %, " in said(replace(of, relative=Estimate(0.03, 0.0004, 0.0596)))
    assert "cannot be told apart: +3.0 % [+0.1 %, +5.9 %], three seeds, p = .051" in said(replace(apart, p=0.051))


def test_what_has_not_run_is_listed_and_the_rest_is_counted(results):
    page = results.page(not_run=[f"beauty · joint · seed {seed}" for seed in range(20)]).markdown

    assert re.findall(r"^- (beauty · joint .*|and .*)$", page, re.M) == [
        *(f"beauty · joint · seed {seed}" for seed in range(12)),
        "and 8 more",
    ]
    assert "**Not finished.** 20 runs of the plan are missing (see Not run), so this answer may change." in page
    assert "all of the confirmation" not in page
    assert "Every run of the plan has ended." in results.page().markdown
    assert "Not finished" not in results.page().markdown


def test_the_page_says_how_its_plan_is_run(results):
    assert "\nitemtok reproduce recipes/plans/made.yaml\n" in results.page().markdown
    assert "\nitemtok reproduce 'my plans/made.yaml'\n" in results.page(plan_path="my plans/made.yaml").markdown


def test_the_same_results_give_the_same_bytes(results):
    assert results.page() == results.page()


def test_every_part_of_the_page_is_there_in_order(results):
    headings = re.findall(r"^## (.*)$", results.page(not_run=["one | cell"]).markdown, re.M)

    assert headings == [
        "beauty",
        "small",
        "How to read it",
        "For whom",
        "Every seed",
        "Tuning",
        "Are the arms at their plateau?",
        "Compute",
        "Not run",
        "How to repeat it",
    ]


def test_tables_are_regular_and_narrow(results):
    """Markdown drops or shifts the cells of a row that is longer or shorter than its header."""
    page = results.page(titles={"made": "a | b"}).markdown
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    assert len(tables) >= 10
    for lines in tables:
        widths = {len(re.split(r"(?<!\\)\|", line)) - 2 for line in lines}
        assert len(widths) == 1
        assert widths.pop() <= 8


def test_links_lead_to_records_and_pictures_only(results):
    page, pictures = results.page()
    links = set(re.findall(r"\]\(([^)]+)\)", page))

    runs = {f"runs/{sha[:12]}.json" for sha in results.records}
    assert links == runs | set(pictures)
    assert set(pictures) == {"made-metrics.svg", "made-difference.svg", "made-curves.svg"}


def test_a_run_without_a_record_is_named_but_not_linked():
    found = _results(seeds=1)
    sha = found.rows[-1]["recipe_sha256"]
    del found.records[sha]

    page = found.page().markdown

    assert f" {sha[:12]} |" in page
    assert f"runs/{sha[:12]}" not in page


def test_before_confirmation_the_page_holds_tuning_only():
    found = _results(seeds=0)

    page, pictures = found.page()

    assert "**Answer.** None yet: test has not been opened." in page
    assert "- all of the confirmation, which opens test; it begins when tuning" in page
    assert "How to read it" not in page
    assert set(pictures) == {"made-curves.svg"}
    assert page.count("** best") == 2


def test_segments_are_explained_where_they_stand(results):
    page = results.page().markdown

    assert "| Segment | Users | random | made | joint | Markov chain |" in page
    assert "Head: targets among the 20\u00a0% of items with most training interactions." in page


def test_a_plan_of_which_nothing_has_run_has_a_page():
    page, pictures = Results().page(not_run=["everything"])

    assert "- everything" in page
    assert pictures == {}


def test_one_seed_is_called_one_seed():
    assert "one seed, p < .001. With one seed this holds for other users, not for other seeds." in (
        _results(seeds=1, datasets=("beauty",)).page().markdown
    )


def test_a_row_without_ranks_is_left_out_of_the_test_and_named():
    found = _results()
    gone = next(row for row in found.rows if row["stage"] == "confirm" and row["arm"] == "made" and row["seed"] == 1)
    del found.ranks[gone["recipe_sha256"]]

    page = found.page(titles={"made": "Made codes"}).markdown

    assert "- Made codes: no ranks of seed 1 are kept, so means and tests leave it out." in page
    assert "two seeds, p" in page


def test_of_one_test_user_nothing_is_said_but_the_numbers():
    found = _results()
    for row in (row for row in found.rows if row["stage"] == "confirm"):
        users, ranks = found.ranks[row["recipe_sha256"]]
        found.ranks[row["recipe_sha256"]] = users[:1], ranks[:1]
        row["test"] = metrics_from_ranks(ranks[:1])

    page, pictures = found.page()

    assert "- There is one test user, which says nothing of others: no intervals, no comparisons." in page
    assert "the difference is not tested" in page
    assert "made-difference.svg" not in pictures


def test_without_any_ranks_the_means_stand_alone():
    found = _results()
    found.ranks.clear()

    page, pictures = found.page()

    assert "made reaches Recall@10 .3000 against .2000 for random (control); the difference is not tested" in page
    assert "made-difference.svg" not in pictures
    assert "best baseline" not in page


def test_a_block_whose_control_has_not_run_is_compared_with_nothing():
    found = _results()
    found.rows = [row for row in found.rows if row["stage"] == "screen" or not row["control"]]

    page = found.page().markdown

    assert "made reaches Recall@10 .3000; its control has not run yet." in page
    assert "- The control has not run yet, so nothing is compared with it." in page


def test_a_block_whose_method_has_not_run_says_so_first():
    found = _results()
    found.rows = [row for row in found.rows if row["stage"] == "screen" or row["control"]]

    page = found.page().markdown

    assert "**On beauty**, no method has run yet. The best baseline there, Markov chain" in page


def test_runs_on_different_users_are_refused(results):
    found = _results(seeds=1)
    users, _ = found.ranks[found.rows[-1]["recipe_sha256"]]
    users[0] = "somebody else"

    with pytest.raises(ArtifactError, match="ranked on the same users, was: 2 users that only one of"):
        found.page()


def test_the_order_of_users_does_not_matter(results):
    found = _results()
    found.ranks = {sha: (users[::-1], ranks[::-1]) for sha, (users, ranks) in found.ranks.items()}

    assert found.page() == results.page()


def test_ranks_of_another_run_are_refused():
    found = _results(seeds=1)
    _, ranks = found.ranks[found.rows[-1]["recipe_sha256"]]
    ranks[0] = 0

    with pytest.raises(ArtifactError, match=r"must give the row's recall@10 0\.2000.*run the cell again"):
        found.page()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "made", "control": True}, "must have one control, was: made, random"),
        ({"arm": "made", "probe": True}, "arm `made` must be control or probe in all its rows or in none"),
        ({"arm": "made", "seed": 0}, "arm `made` must have one row a seed"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(change, message):
    found = _results(datasets=("beauty",))
    last = [row for row in found.rows if row["arm"] == change["arm"]][-1]
    last |= change

    with pytest.raises(ArtifactError, match=message):
        confirmed(found.rows, found.table, found.records)


def test_a_user_ranked_twice_is_refused():
    found = _results(seeds=1)
    users, _ = found.ranks[found.rows[-1]["recipe_sha256"]]
    users[0] = users[1]

    with pytest.raises(ArtifactError, match="rank a user once, was: 'user 1' twice"):
        found.page()


def test_a_row_that_lacks_a_key_is_refused():
    found = _results(seeds=1)
    del found.rows[0]["flops"], found.rows[0]["recipe_sha256"]

    with pytest.raises(ArtifactError, match="a row of results must have flops, recipe_sha256; write the rows again"):
        found.page()


def test_the_best_point_of_each_arm_is_its_own():
    found = Results()
    for settings, random, made in (({"rate": 1}, 0.2, 0.3), ({"rate": 2}, 0.3, 0.2), ({"rate": 3}, 0.3, 0.1)):
        for arm, hits in (("random", random), ("made", made)):
            found.add("screen", "beauty", arm, 9, hits, block=f"beauty, {settings}", settings=settings)

    found.add("confirm", "beauty", "made", 0, 0.9, settings={"rate": 3})

    best = best_points(found.rows)

    assert {arm: row["settings"]["rate"] for arm, row in best.items()} == {"random": 2, "made": 1}
    assert best["made"] is found.rows[1]


def test_a_setting_that_is_best_at_the_end_of_its_grid_is_named():
    """Beyond the lowest and the highest value nothing was tried; kinds and switches have no beyond."""
    found = Results()
    for rate, hits in ((1e-3, 0.3), (2e-3, 0.4), (4e-3, 0.2)):
        for kind, more in (("rqvae", 0.0), ("random", 0.1)):
            settings = {"trainer.learning_rate": rate, "tokenizer.kind": kind, "model.tied": kind == "random"}
            made = hits + more if rate != 4e-3 else 0.8
            found.add("screen", "beauty", "made", 9, made, block=repr(settings), settings=settings | {"seeds": 1})
            found.add("screen", "beauty", "random", 9, hits + more, block=repr(settings), settings=settings)

    assert edges(found.rows) == [("made", "trainer.learning_rate", 4e-3, "highest")]
    page = found.page(titles={"made": "Made codes"}).markdown
    assert (
        "Best at the edge of the grid: Made codes (learning_rate 0.004, the highest tried). A wider one may be better."
    ) in page


def test_an_arm_that_still_rises_is_named():
    found = _results(datasets=("beauty",))
    assert "Every arm stands at its plateau." in found.page().markdown
    for row in found.rows:
        if row["arm"] == "made":
            found.records[row["recipe_sha256"]]["metrics"]["training"]["curve"] = [[1, 0.1], [2, 0.2], [3, 0.3]]

    page = found.page().markdown
    assert "Not at their plateau: made on beauty (still rising)." in page
    assert "Still rising when training ended: made on beauty. A gain over such an arm may be speed." in page

    for row in found.rows:
        found.records[row["recipe_sha256"]]["metrics"]["training"]["curve"] = [[1, 0.1], [2, 0.2], [3, 0.3]]
    assert "Still rising when training ended: all arms. A gain over such an arm may be speed." in found.page().markdown


def test_where_most_arms_rise_those_that_do_not_are_named():
    found = _results(datasets=("beauty", "toys"))
    for row in found.rows:
        if (row["arm"], row["dataset"]) != ("made", "toys"):
            found.records[row["recipe_sha256"]]["metrics"]["training"]["curve"] = [[1, 0.1], [2, 0.2], [3, 0.3]]

    assert "Still rising when training ended: all arms but made on toys. A gain" in found.page().markdown


def test_a_plateau_is_not_called_more_than_it_is(results):
    assert "whether longer training would help is shown by longer runs only" in results.page().markdown


def test_pictures_are_drawings_that_load_and_run_nothing(results):
    for svg in results.page(titles={"made": "a < b & c"}).pictures.values():
        ElementTree.fromstring(svg)
        assert not re.search(r"<script|@import|url\(|href|<image|foreignObject", svg)
        assert set(re.findall(r"https?://[^\"]+", svg)) == {"http://www.w3.org/2000/svg"}
        assert "prefers-color-scheme: dark" in svg


def test_intervals_are_drawn_to_scale():
    marks = [Mark("first", 0.1, 0.0, 0.2, ".1", "main"), Mark("second", 0.2, 0.2, 0.2, ".2", "other")]

    svg = interval_picture("Title", [("panel", marks)], legend=[], tick_text=str, one_scale=False)

    (low, high), (at, _) = [
        tuple(map(float, ends)) for ends in re.findall(r'span \w+" d="M([\d.]+) [\d.]+H([\d.]+)', svg)
    ]
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    assert dots == pytest.approx([(low + high) / 2, at], abs=0.1)
    assert at == high


def test_nothing_is_drawn_outside_the_picture():
    long = "a name that is longer than any label should ever be, whatever it may say"
    marks = [Mark(long, -0.3, -0.9, 0.4, "−30.0 %", "side"), Mark("b", 2.0, 1.0, 3.0, "+200.0 %", "main")]

    drawn = [
        interval_picture(long, [(long[:20], marks)], legend=[("main", long)], tick_text=str, one_scale=True),
        curve_picture(
            long, [("panel", [Line(long, [(1, 0.1)]), Line("b", [(1, 0.2), (90_000, 0.3)])])], x_label="steps"
        ),
    ]

    for svg in drawn:
        width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
        places = re.findall(r'(?:x|cx)="(-?[\d.]+)" (?:y|cy)="(-?[\d.]+)"', svg)
        assert places
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in places)


def test_more_than_six_curves_are_told_apart_by_dashes():
    lines = [Line(f"arm {number}", [(0, 0.1), (1, 0.1 + number / 100)]) for number in range(8)]

    styles = re.findall(r'<polyline class="([^"]+)"', curve_picture("Title", [("panel", lines)], x_label="steps"))

    assert len(set(styles)) == 8


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("learning_rate 0.002", "learning_rate 0.002"),
        ("a | b", r"a \| b"),
        ("*bold* [link](x) <b> `code`", r"\*bold\* \[link\](x) \<b\> \`code\`"),
        ("_leading", r"\_leading"),
        ("two\nlines", "two lines"),
    ],
)
def test_text_of_a_plan_is_not_taken_for_markup(text, escaped):
    assert plain(text) == escaped


def test_numbers_are_written_as_the_field_writes_them():
    assert [number(value) for value in (0.0601, 0.0, 1.0, -0.05)] == [".0601", ".0000", "1.0000", "-.0500"]
    assert [percent(value) for value in (0.4949, -0.031, 0.0001)] == ["+49.5 %", "−3.1 %", "0.0 %"]
    assert table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| :-- | --: |", "| 1 | 2 |"]

"""The results page of a plan: Markdown and pictures, made from rows, ranks and run records and from nothing else.

Decisions. The page opens with its answer, in sentences made from the numbers: "ahead" and "behind" stand only where
the 95 % interval of a difference leaves 0 out, everything else "cannot be told apart" and comes with the difference
that would have been seen. What is missing (runs, ranks, records) is said where it would have stood. The same input
gives the same bytes, so that a page in the repository changes only when its results do. Intervals of two or three
seeds hold the truth a little less often than their 95 % (`paired` has the simulation), and the page says so.

This module lays the page out; `findings` has the numbers, `wording` the sentences, `plots` draws. It reads and writes
no files.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llm_itemtok.evaluation.metrics import metric_name
from llm_itemtok.experiments.findings import (
    KEYS,
    PLATEAU_GAIN,
    Arm,
    Block,
    Curve,
    Row,
    best_points,
    confirmed,
    curves,
    edges,
)
from llm_itemtok.experiments.plots import Line, Mark, curve_picture, interval_picture, tick_number
from llm_itemtok.experiments.pool import DIGITS
from llm_itemtok.experiments.wording import (
    AT_PLATEAU,
    STILL_RISING,
    Call,
    answer,
    edge_lines,
    estimate_text,
    gain_text,
    how_to_read,
    not_run_lines,
    number,
    p_text,
    percent,
    plain,
    plateau,
    seeds_gain_text,
    table,
)
from llm_itemtok.report.page import segment_hints

_BASELINES = {"popularity": "popularity", "markov": "Markov chain", "item-knn": "item-kNN", "sasrec": "SASRec"}
_WIDEST = 6
"""Systems beside each other in a table of segments; more make another table."""


class Page(NamedTuple):
    """A page, and its pictures: SVG text under the file names that the page links to."""

    markdown: str
    pictures: dict[str, str]


def render_page(
    name: str,
    question: str,
    rows: Sequence[Row],
    ranks: pa.Table,
    records: Mapping[str, Mapping[str, Any]],
    *,
    not_run: Sequence[str] = (),
    titles: Mapping[str, str] | None = None,
    plan_path: str | None = None,
) -> Page:
    """Render the results of a plan.

    Args:
        name: of the plan; the page is `docs/results/NAME.md`, beside its pictures and the folder `runs`.
        question: what the plan asks.
        rows: of `docs/results/NAME.json`, in the plan's order; confirmation runs may still be missing.
        ranks: of `docs/results/NAME.ranks.parquet`: recipe_sha256, user, rank (0 = not in the beam).
        records: the run records, under the hash of their recipe; runs without one are not linked.
        not_run: the known runs of the plan that have not ended, a line each.
        titles: what to call an arm or a baseline; one without a title, or with an empty one, goes by its name.
        plan_path: of the plan, as somebody else would give it to repeat it; None is `recipes/plans/NAME.yaml`.

    Raises:
        ArtifactError: if rows lack a key or contradict each other, runs of a block have different users, or ranks are
            not those of the row.
    """
    given = {**_BASELINES, **{key: title for key, title in (titles or {}).items() if title}}

    def call(key: str) -> str:
        return given.get(key, key)

    blocks = confirmed(rows, ranks, records)
    screen = [row for row in rows if row["stage"] == "screen"]
    found = curves([row for row in rows if row["stage"] == ("confirm" if blocks else "screen")], records)
    drawn = _pictures(name, blocks, found, call)
    shown = {part: f"![{alt}]({name}-{part}.svg)" for part, (alt, _) in drawn.items()}
    plateaus = _plateau_of(found)
    rising, settled = (
        [plain(f"{call(arm)} on {data}") for (data, arm), (_, at) in plateaus.items() if (at == STILL_RISING) == rose]
        for rose in (True, False)
    )
    lines = [
        f"# Results: {plain(name)}",
        "",
        f"**Question.** {plain(question)}",
        "",
        *answer(blocks, call, rising=rising, settled=settled, missing=len(not_run)),
        *[line for part in ("metrics", "difference") if part in shown for line in (shown[part], "")],
        *[line for block in blocks for line in _block(block, call)],
        *_section("How to read it", how_to_read() if blocks else []),
        *_segments(blocks, call),
        *_seeds(blocks, records, call),
        *_screening(screen, records, call),
        *_plateaus(found, plateaus, shown.get("curves"), call),
        *_compute(rows, call),
        *_section("Not run", not_run_lines(not_run, confirming=bool(blocks))),
        *_repeat(plan_path or f"recipes/plans/{name}.yaml", rows, records),
    ]
    return Page("\n".join(lines).rstrip() + "\n", {f"{name}-{part}.svg": svg for part, (_, svg) in drawn.items()})


# ------------------------------------------------------------------------------------------------------- pictures


def _pictures(name: str, blocks: Sequence[Block], found: Sequence[Curve], call: Call) -> dict[str, tuple[str, str]]:
    """Draw what there is to draw: part of the file name → what it shows in words, SVG."""
    drawn = {}
    key = metric_name(KEYS[0])
    metrics = [(block.name, _metric_marks(block, call)) for block in blocks]
    if any(marks for _, marks in metrics):
        title = f"{key} on test, 95 % intervals"
        legend = [("main", "method"), ("reference", "control"), ("side", "side comparison"), ("other", "baseline")]
        svg = interval_picture(title, metrics, legend=_used(legend, metrics), tick_text=tick_number, one_scale=False)
        drawn["metrics"] = (_alt(title, metrics), svg)
    differences = [(block.name, _difference_marks(block, call)) for block in blocks]
    differences = [(heading, marks) for heading, marks in differences if marks]
    if differences:
        title = f"{key} relative to the control, 95 % intervals"
        legend = [("main", "method"), ("side", "side comparison")]
        svg = interval_picture(
            title, differences, legend=_used(legend, differences), tick_text=lambda x: percent(x, 0), one_scale=True
        )
        drawn["difference"] = (_alt(title, differences), svg)
    if found:
        title = "Validation NDCG@10 while training, a line a run"
        panels: dict[str, list[Line]] = {}
        for curve in found:
            panels.setdefault(curve.dataset, []).append(Line(call(curve.arm), curve.points))
        best = [
            f"{call(arm)} on {dataset} {number(float(np.mean([curve.best[1] for curve in of])))}"
            for (dataset, arm), of in _by_arm(found).items()
        ]
        alt = plain(f"{title}. Mean of the best values: {', '.join(best)}.")
        drawn["curves"] = (alt, curve_picture(title, list(panels.items()), x_label="steps"))
    return drawn


def _metric_marks(block: Block, call: Call) -> list[Mark]:
    estimates = [(call(arm.name), arm.test[KEYS[0]], _kind(arm)) for arm in block.arms if KEYS[0] in arm.test]
    estimates += [(call(baseline.name), baseline.test[KEYS[0]], "other") for baseline in block.baselines]
    return [Mark(label, of.value, of.low, of.high, number(of.value), kind) for label, of, kind in estimates]


def _difference_marks(block: Block, call: Call) -> list[Mark]:
    marks = []
    for arm in block.arms:
        relative = arm.differences[KEYS[0]].relative if arm.differences else None
        if relative is not None:
            text = percent(relative.value)
            marks.append(Mark(call(arm.name), relative.value, relative.low, relative.high, text, _kind(arm)))
    return marks


def _kind(arm: Arm) -> str:
    if arm.control:
        return "reference"
    return "side" if arm.probe else "main"


def _used(legend: Sequence[tuple[str, str]], panels: Sequence[tuple[str, Sequence[Mark]]]) -> list[tuple[str, str]]:
    kinds = {mark.kind for _, marks in panels for mark in marks}
    return [(kind, text) for kind, text in legend if kind in kinds]


def _alt(title: str, panels: Sequence[tuple[str, Sequence[Mark]]]) -> str:
    parts = [f"{heading}: " + ", ".join(f"{mark.label} {mark.text}" for mark in marks) for heading, marks in panels]
    return plain(f"{title}. " + "; ".join(parts) + ".")


# --------------------------------------------------------------------------------------------------------- tables


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _block(block: Block, call: Call) -> list[str]:
    arms = [
        [
            _label(arm, call),
            str(len(arm.rows)),
            *(estimate_text(arm.test[key]) if key in arm.test else "–" for key in KEYS),
            number(arm.validation["ndcg@10"]),
            f"{np.mean([row['seconds'] for row in arm.rows]) / 60:.1f}",
        ]
        for arm in block.arms
    ]
    differences = [
        [
            plain(call(arm.name)),
            metric_name(key),
            gain_text(of),
            p_text(of.p),
            "–" if of.detectable_relative is None else percent(of.detectable_relative, signed=False),
            seeds_gain_text(of),
            f"{of.users:,}",
        ]
        for arm in block.arms
        for key, of in arm.differences.items()
    ]
    baselines = [
        [
            plain(call(baseline.name)),
            *(estimate_text(baseline.test[key]) for key in KEYS),
            number(baseline.validation["ndcg@10"]) if baseline.validation else "–",
            plain(", ".join(f"{name} {json.dumps(value)}" for name, value in baseline.settings.items()) or "–"),
        ]
        for baseline in block.baselines
    ]
    headings = [metric_name(key) for key in KEYS]
    lines = ["On test, mean over seeds; minutes are of training:", ""]
    lines += table(["Arm", "Seeds", *headings, "Validation NDCG@10", "Minutes a run"], arms)
    if differences:
        lines += ["", "Against the control:", ""]
        lines += table(["Arm", "Metric", "Gain", "p", "Detectable", "By seed", "Users"], differences)
    if baselines:
        lines += ["", "Baselines on the same split, with the settings that they chose on validation:", ""]
        lines += table(["Baseline", *headings, "Validation NDCG@10", "Settings"], baselines, left=(0, 4))
    if block.notes:
        lines += ["", *(f"- {plain(f'{call(of.about)}: {of.text}' if of.about else of.text)}" for of in block.notes)]
    return _section(plain(block.name), lines)


def _label(arm: Arm, call: Call) -> str:
    role = " (control)" if arm.control else " (side comparison)" if arm.probe else ""
    return plain(call(arm.name)) + role


def _segments(blocks: Sequence[Block], call: Call) -> list[str]:
    lines: list[str] = []
    known: set[str] = set()
    for block in blocks:
        arms, baselines = (
            [(plain(call(of.name)), of.segments) for of in part] for part in (block.arms, block.baselines)
        )
        groups = [arms + baselines] if len(arms) + len(baselines) <= _WIDEST else [arms, baselines]
        tables = [group[at : at + _WIDEST] for group in groups for at in range(0, len(group), _WIDEST)]
        users = {name: count for _, of in (*baselines, *arms) for name, (count, _) in of.items()}
        known.update(users)
        if users and len(blocks) > 1:
            lines += ["", f"### {plain(block.name)}"]
        for part in tables:
            names = dict.fromkeys(name for _, of in part for name in of)
            body = [
                [plain(name), f"{users[name]:,}", *(number(of[name][1]) if name in of else "–" for _, of in part)]
                for name in names
            ]
            if body:
                lines += ["", *table(["Segment", "Users", *(system for system, _ in part)], body)]
    if not lines:
        return []
    note = f"{metric_name(KEYS[0])} of parts of the test users, mean over seeds. Small segments move a lot by chance."
    return _section("For whom", [" ".join([note, *segment_hints(known)]), *lines])


def _seeds(blocks: Sequence[Block], records: Mapping[str, Any], call: Call) -> list[str]:
    body = [
        [
            plain(block.name),
            plain(call(arm.name)),
            str(row["seed"]),
            *("–" if row["test"] is None else number(row["test"][key]) for key in KEYS),
            number(row["validation"]["ndcg@10"]),
            f"{row['steps']:,}",
            _run(row, records),
        ]
        for block in blocks
        for arm in block.arms
        for row in arm.rows
    ]
    header = ["Data set", "Arm", "Seed", *(metric_name(key) for key in KEYS), "Validation NDCG@10", "Steps", "Run"]
    return _section("Every seed", table(header, body, left=(0, 1, 7))) if body else []


def _screening(rows: Sequence[Row], records: Mapping[str, Any], call: Call) -> list[str]:
    if not rows:
        return []
    best = {row["recipe_sha256"] for row in best_points(rows).values()}
    body = [
        [
            plain(row["dataset"]),
            plain(call(row["arm"])),
            plain(", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in row.get("settings", {}).items()))
            or "–",
            number(row["validation"]["recall@10"]),
            f"**{number(row['validation']['ndcg@10'])}** best"
            if row["recipe_sha256"] in best
            else number(row["validation"]["ndcg@10"]),
            f"{row['steps']:,}",
            f"{row['seconds'] / 60:.1f}",
            _run(row, records),
        ]
        for row in rows
    ]
    header = ["Data set", "Arm", "Settings", "Validation Recall@10", "Validation NDCG@10", "Steps", "Minutes", "Run"]
    note = (
        "Tuning runs end before test is opened, with a seed that no confirmation run uses. The best settings of each "
        "arm, by validation NDCG@10, are those that it is confirmed with."
    )
    return _section("Tuning", [note, "", *edge_lines(edges(rows), call), *table(header, body, left=(0, 1, 2, 7))])


def _plateau_of(found: Sequence[Curve]) -> dict[tuple[str, str], tuple[float | None, str]]:
    """Data set and arm → mean gain of the last third of training, and what that means."""
    plateaus = {}
    for key, of in _by_arm(found).items():
        gains = [curve.late_gain for curve in of if curve.late_gain is not None]
        gain = float(np.mean(gains)) if gains else None
        plateaus[key] = (gain, plateau(gain))
    return plateaus


def _plateaus(
    found: Sequence[Curve],
    plateaus: Mapping[tuple[str, str], tuple[float | None, str]],
    picture: str | None,
    call: Call,
) -> list[str]:
    if not found:
        return []
    body, elsewhere = [], []
    for (dataset, arm), of in _by_arm(found).items():
        gain, verdict = plateaus[dataset, arm]
        if verdict != AT_PLATEAU:
            elsewhere.append(f"{call(arm)} on {dataset} ({verdict})")
        steps = (
            f"{np.mean([curve.best[0] for curve in of]):,.0f} of {np.mean([curve.points[-1][0] for curve in of]):,.0f}"
        )
        shown = "–" if gain is None else percent(gain)
        body.append([plain(dataset), plain(call(arm)), str(len(of)), steps, shown, verdict])
    words = f"Not at their plateau: {plain(', '.join(elsewhere))}." if elsewhere else "Every arm stands at its plateau."
    rule = (
        f"An arm stands there when its best validation NDCG@10 of the last third of training is less than "
        f"{percent(PLATEAU_GAIN, 0, signed=False)} above the best before it, in the mean of its runs; a gain over an "
        "arm that still rises may be one of speed. A learning rate that falls to 0 flattens every curve at its end: "
        "whether longer training would help is shown by longer runs only. Values are those seen while training, on a "
        "sample of the validation users if the recipe asks for one."
    )
    header = ["Data set", "Arm", "Runs", "Best step", "Gain of the last third", "Verdict"]
    lines = [f"{words} {rule}", "", *([picture, ""] if picture else []), *table(header, body, left=(0, 1, 5))]
    return _section("Are the arms at their plateau?", lines)


def _by_arm(found: Sequence[Curve]) -> dict[tuple[str, str], list[Curve]]:
    arms: dict[tuple[str, str], list[Curve]] = {}
    for curve in found:
        arms.setdefault((curve.dataset, curve.arm), []).append(curve)
    return arms


def _compute(rows: Sequence[Row], call: Call) -> list[str]:
    if not rows:
        return []
    body = []
    for stage, arm in dict.fromkeys((row["stage"], row["arm"]) for row in rows):
        of = [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
        body.append(
            [
                plain(call(arm)),
                "tuning" if stage == "screen" else "confirmation",
                str(len(of)),
                f"{sum(row['seconds'] for row in of) / 3600:.2f}",
                f"{sum(row['flops'] for row in of) / 1e15:,.3g}",
                f"{np.mean([row['targets_seen'] for row in of]) / 1e6:,.2f}",
                f"{max(row['peak_mb'] for row in of) / 1024:.1f}",
            ]
        )
    hours, flops = sum(row["seconds"] for row in rows) / 3600, sum(row["flops"] for row in rows) / 1e15
    words = (
        f"{len(rows)} run{'' if len(rows) == 1 else 's'} took {hours:.1f} hours of training and about {flops:,.3g} "
        "PFLOP (10^15 operations, estimated from sizes, of the batches of training and not of what a method reads "
        "beside them). A target is an item to predict, counted each time it is trained on; GiB are the most memory a "
        "run held. Runs that serve several plans are counted in each."
    )
    header = ["Arm", "Stage", "Runs", "Hours", "PFLOP", "Million targets a run", "Peak GiB"]
    return _section("Compute", [words, "", *table(header, body, left=(0, 1))])


def _repeat(plan_path: str, rows: Sequence[Row], records: Mapping[str, Any]) -> list[str]:
    lines = ["```bash", f"itemtok reproduce {shlex.quote(plan_path)}", "```", ""]
    versions = sorted({", ".join(f"{part} {of}" for part, of in sorted(row["versions"].items())) for row in rows})
    used = [records[row["recipe_sha256"]] for row in rows if row["recipe_sha256"] in records]
    commits = sorted({record["commit"] for record in used if record.get("commit")})
    lines += [f"- Versions: {plain(of)}" for of in versions]
    lines += [f"- Commit: {plain(of)}" for of in commits]
    lines.append("- Recipe and metrics of each run: the links in the tables above, named by the recipe's hash.")
    return _section("How to repeat it", lines)


def _run(row: Row, records: Mapping[str, Any]) -> str:
    """Link a run to its record by the first digits of its hash."""
    short = row["recipe_sha256"][:DIGITS]
    return f"[{short}](runs/{short}.json)" if row["recipe_sha256"] in records else short

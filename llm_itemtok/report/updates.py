"""The report's part on updates of item tokens: rounds as they were judged, where tokens flowed, which items moved most.

Decisions. Rounds that are judged are few, and each has its column. Those that come often, without a gate, are curves:
how many items moved, how many wanted the same code, how codewords were used, and how gradients went together where a
quantizer is trained by two; the table then has some of them, evenly spaced. What a round was worth stands in
`updates.jsonl`, what moved is read off the code tables. A version that is not in `codes` is not in the model: the best
checkpoint was before it, and the table says so. Items are named by a rule: those whose code keeps the shortest
beginning from the first version to the newest, then those with most codewords changed, then the first in the catalogue.
The neighbours of an item are those that share the longest beginning of its code, in the order of the catalogue.

This module decides what is shown of updates; `plots` draws.

Shape letters in this file: N items, L levels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.report.plots import Chart, Flow, Mark, Series, flow_chart, line_chart, metric_text
from llm_itemtok.report.run_folder import RunFolder
from llm_itemtok.report.tree import spelled

_MOVED = 10
_COLUMNS = 10
"""Rounds in the table, and marks in the picture of validation, at most."""

_VERSIONS = 4
"""Versions that are compared one after the other; of more, the first with the newest."""

_NEIGHBOURS = 3
_CODEWORDS = 10
"""Codewords of a picture of flow; the others are drawn as one."""

_OTHERS = -1


@dataclass(frozen=True)
class Mover:
    """An item whose code changed much.

    Attributes:
        label: its title, or its id.
        old: its code in the first version.
        new: its code in the newest.
        before: titles of items near it in the first version.
        after: those near it in the newest.
    """

    label: str
    old: str
    new: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """What is shown of updates; all of it empty for a run without.

    Attributes:
        rounds: a mapping of column → text each; the same columns for all.
        charts: of validation and of flows.
        movers: the items that moved most.
        hint: what a round is here, and which of them the table has.
    """

    rounds: Sequence[Mapping[str, str]]
    charts: Sequence[Chart]
    movers: Sequence[Mover]
    hint: str


def part(run: RunFolder) -> Part:
    """Gather what is shown."""
    return Part(rounds(run), charts(run), most_moved(run), _hint(run))


def _hint(run: RunFolder) -> str:
    shown, found = len(_shown(run)), len(run.updates)
    which = f" The table has {shown} of {found:,} rounds." if shown < found else ""
    if any(line["metric"] is not None for line in run.updates):
        return (
            "In a round codes are proposed, the model is trained with them for a while, and is measured: what made "
            f"validation worse was rolled back, weights and all.{which}"
        )
    return f"In a round codes are made anew, and training goes on with them; nothing is taken back.{which}"


def _shown(run: RunFolder) -> Sequence[Mapping[str, Any]]:
    """Rounds that the table has: all, or the first, the last and some between."""
    places = np.unique(np.linspace(0, len(run.updates) - 1, min(_COLUMNS, len(run.updates))).round().astype(int))
    return [run.updates[place] for place in places.tolist()]


def rounds(run: RunFolder) -> list[Mapping[str, str]]:
    """List the rounds, a mapping of column → text each; the same columns for all."""
    return [dict(_cells(line, run)) for line in _shown(run)]


def _cells(line: Mapping[str, Any], run: RunFolder) -> Iterable[tuple[str, str]]:
    yield "Round", str(line["round"])
    yield "Step", f"{line['step']:,}"
    yield "Items moved", f"{line['moves']:,} ({line['share']:.1%})"
    yield "Verdict", _verdict(line, run)
    if line["metric"] is None:
        yield "Judged by", "no gate"
    elif line["after"] is None:
        yield "Judged by", "–"
    else:
        yield "Judged by", f"{line['metric']} {metric_text(line['before'])} → {metric_text(line['after'])}"
    yield "Other codeword, by level", ", ".join(f"{share:.1%}" for share in line["churn"])
    collisions = line.get("collisions")
    yield "Wanted the same code", "–" if collisions is None else f"{collisions:.1%}"
    yield "Codewords in use", ", ".join(f"{level['used']:,}" for level in line["levels"])
    yield "Entropy, bits", ", ".join(f"{level['entropy_bits']:.2f}" for level in line["levels"])
    if "conflict" in line:
        yield "Gradients in conflict", f"{line['conflict']:.0%} of the tensors"
    near = line["neighbours"]
    yield (
        "Nearest items with the same first codeword (by chance)",
        (f"{near[0]['share']:.1%} ({near[0]['chance']:.1%})" if near else "–"),
    )
    # Before the first step there is no training to compare with.
    share = f", {line['pass_share']:.1%} of the training of its round" if line["step"] else ""
    yield "Pass over the items", f"{line['pass_seconds']:.1f} s{share}"


def _verdict(line: Mapping[str, Any], run: RunFolder) -> str:
    if not line["moves"]:
        return "nothing to move"
    if not line["accepted"]:
        return "✗ refused, rolled back"
    name = f"v{line['version']}"
    known = {version.name for version in run.versions}
    return f"✓ accepted as {name}" + ("" if name in known else ", later than the best model")


def charts(run: RunFolder) -> list[Chart]:
    """Draw validation with a mark where each round was decided, and where tokens of the first level flowed."""
    if not run.updates:
        return []
    return [*_validation_charts(run), *_curves(run), *_flow_charts(run)]


def _curves(run: RunFolder) -> Iterable[Chart]:
    """What went on from round to round, where rounds have no gate: a line a level, or one for all."""
    open_ = [line for line in run.updates if line["metric"] is None]
    if len(open_) < 3:
        return
    steps = [float(line["step"]) for line in open_]

    def curve(label: str, values: Iterable[float | None]) -> list[Series]:
        points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        return [Series(label, points)] if points else []

    moved, usage = curve("any", [line["share"] for line in open_]), []
    for at, level in enumerate(open_[0]["levels"]):
        moved += curve(level["name"], [line["churn"][at] for line in open_])
        bits = [(step, line["levels"][at]["entropy_bits"]) for step, line in zip(steps, open_, strict=True)]
        usage.append(Series(level["name"], [*_before(run, at), *bits]))
    yield line_chart("Share of items that a round gave another codeword", moved, x_label="step", from_zero=True)
    if collisions := curve("before resolution", [line.get("collisions") for line in open_]):
        title = "Share of items that wanted the same code as another"
        yield line_chart(title, collisions, x_label="step", from_zero=True)
    yield line_chart("Codewords in use, bits", usage, x_label="step")
    aligned = [line["losses"] if line.get("aligned") else {} for line in open_]
    names = [name for name in ("alignment/sequence", "alignment/preference") if any(name in one for one in aligned)]
    if terms := [each for name in names for each in curve(name, [one.get(name) for one in aligned])]:
        yield line_chart("Alignments in the quantizer's turns, weighted", terms, x_label="step", from_zero=True)
    if conflict := curve("share of tensors in conflict", [line.get("conflict") for line in open_]):
        conflict += curve("mean cosine", [_mean(line.get("cosines", {}).values()) for line in open_])
        yield line_chart("Gradients of recommendation and of reconstruction", conflict, x_label="step")


def _before(run: RunFolder, level: int) -> list[tuple[float, float]]:
    """Entropy of a level's codewords in the first version, as a point at step 0; none where that is not known."""
    codes = run.versions[0].codes if run.versions else None
    if codes is None or level >= codes.num_levels:
        return []
    shares = np.bincount(codes.table[:, level]) / len(codes)
    shares = shares[shares > 0]
    return [(0.0, float(-(shares * np.log2(shares)).sum()))]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _validation_charts(run: RunFolder) -> Iterable[Chart]:
    marks = [
        Mark(float(line["decided"]), f"round {line['round']}", good=line["accepted"])
        for line in run.updates
        if line["moves"] and len(run.updates) <= _COLUMNS
    ]
    for metric in dict.fromkeys(["ndcg@10", *(line["metric"] for line in run.updates if line["metric"])]):
        named = {"validation": "as it stood", "trial": "while codes were on trial"}
        series = []
        for kind, name in named.items():
            points = {
                float(line["step"]): float(line[f"{kind}/{metric}"])
                for line in run.log
                if line.get(f"{kind}/{metric}") is not None
            }
            if points:
                series.append(Series(name, sorted(points.items())))
        if series:
            yield line_chart(f"Validation {metric} and the rounds", series, x_label="step", marks=marks)


def _flow_charts(run: RunFolder) -> Iterable[Chart]:
    known = [(version.name, version.codes) for version in run.versions if version.codes is not None]
    if len(known) > _VERSIONS:
        known = [known[0], known[-1]]
    for (older, old), (newer, new) in pairwise(known):
        if old.sizes == new.sizes and len(old) == len(new):
            flows = token_flow(old, new)
            if flows:
                title = f"Items that changed their first codeword, {older} → {newer}"
                words = {flow.source for flow in flows} | {flow.target for flow in flows}
                yield flow_chart(
                    title, flows, {word: "others" if word == _OTHERS else spelled([word]) for word in words}
                )


def token_flow(old: ItemCodes, new: ItemCodes) -> list[Flow]:
    """Count the items whose first codeword is another in two versions.

    Returns:
        Flows between the codewords that gained or lost most, and one place for all others together (`-1`), by codeword.
    """
    before, after = old.table[:, 0].astype(np.int64), new.table[:, 0].astype(np.int64)
    moved = before != after
    traffic = np.bincount(before[moved], minlength=old.sizes[0]) + np.bincount(after[moved], minlength=old.sizes[0])
    busiest = np.argsort(-traffic, kind="stable")[:_CODEWORDS]
    shown = np.full(old.sizes[0], _OTHERS, dtype=np.int64)
    shown[busiest[traffic[busiest] > 0]] = busiest[traffic[busiest] > 0]
    pairs, counts = np.unique(np.stack([shown[before[moved]], shown[after[moved]]]), axis=1, return_counts=True)
    return [Flow(int(source), int(target), int(count)) for (source, target), count in zip(pairs.T, counts, strict=True)]


def most_moved(run: RunFolder) -> list[Mover]:
    """Name the items that moved most from the first version to the newest."""
    known = [version.codes for version in run.versions if version.codes is not None]
    if not run.updates or len(known) < 2 or known[0].sizes != known[-1].sizes:
        return []
    old, new = known[0], known[-1]
    labels = [item.label for item in run.items] or [f"row {row}" for row in range(len(new))]
    differs = old.table != new.table[: len(old)]  # behind them are items that `extend` added
    rows = np.flatnonzero(differs.any(axis=1))
    order = np.lexsort((rows, -differs[rows].sum(axis=1), differs[rows].argmax(axis=1)))
    return [
        Mover(
            labels[row],
            spelled(old.table[row].tolist()),
            spelled(new.table[row].tolist()),
            *(tuple(labels[near] for near in neighbours(codes.table, row)) for codes in (old, new)),
        )
        for row in rows[order[:_MOVED]].tolist()
    ]


def neighbours(table: NDArray[np.int32], row: int) -> Sequence[int]:
    """Rows of the items that share the longest beginning of an item's code, at most three; none that share nothing."""
    same = np.cumprod(table == table[row], axis=1).sum(axis=1)
    same[row] = 0
    nearest = np.argsort(-same, kind="stable")[:_NEIGHBOURS]
    found: Sequence[int] = nearest[same[nearest] > 0].tolist()
    return found

"""The report's part on updates of item tokens: rounds as they were judged, where tokens flowed, which items moved most.

Decisions. What a round was worth stands in `updates.jsonl`, what moved is read off the code tables. A version that is
not in `codes` is not in the model: the best checkpoint was before it, and the table says so. Items are named by a rule:
those whose code keeps the shortest beginning from the first version to the newest, then those with most codewords
changed, then the first in the catalogue. The neighbours of an item are those that share the longest beginning of its
code, in the order of the catalogue.

This module decides what is shown of updates; `report_plots` draws.

Shape letters in this file: N items, L levels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.report_plots import Chart, Flow, Mark, Series, flow_chart, line_chart, metric_text
from llm_itemtok.report_run import RunFolder
from llm_itemtok.report_tree import spelled

_MOVED = 10
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
    """

    rounds: Sequence[Mapping[str, str]]
    charts: Sequence[Chart]
    movers: Sequence[Mover]


def part(run: RunFolder) -> Part:
    """Gather what is shown."""
    return Part(rounds(run), charts(run), most_moved(run))


def rounds(run: RunFolder) -> list[Mapping[str, str]]:
    """List the rounds, a mapping of column → text each; the same columns for all."""
    return [dict(_cells(line, run)) for line in run.updates]


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
    near = line["neighbours"]
    yield (
        "Nearest items with the same first codeword (by chance)",
        (f"{near[0]['share']:.1%} ({near[0]['chance']:.1%})" if near else "–"),
    )
    yield "Pass over the items", f"{line['pass_seconds']:.1f} s, {line['pass_share']:.1%} of the training of its round"


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
    return [*_validation_charts(run), *_flow_charts(run)]


def _validation_charts(run: RunFolder) -> Iterable[Chart]:
    marks = [
        Mark(float(line["decided"]), f"round {line['round']}", good=line["accepted"])
        for line in run.updates
        if line["moves"]
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
    labels = [item.label for item in run.items] or [f"row {row}" for row in range(len(old))]
    differs = old.table != new.table
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

"""The report's part on item tokens: how they are used, what the code tree looks like, what changed between versions.

Decisions. Numbers of quality come from `quality.json`, counts of changes from the code tables themselves; a trace file
only says why. Examples of changed items are chosen by rule: those whose code changed at the earliest level, then in
catalogue order.

This module decides what is shown of item tokens; `tree` and `plots` draw.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.compare import movement_sentences
from llm_itemtok.items.findings import gaps_text
from llm_itemtok.report.plots import Chart, Dots, dot_chart, load_chart, usage_chart, value_text
from llm_itemtok.report.run_folder import RunFolder
from llm_itemtok.report.tree import category_groups, fullest_codewords, spelled, tree_chart

_QUALITY_NAMES = {
    "items": "Items",
    "capacity": "Codes there is room for",
    "words": "Existing words that name an item, on average, end token included",
    "collision_rate": "Items that shared their code with another, before resolution",
    "unique": "Each item has a code of its own",
    "reconstruction_error": "Squared error of the vectors rebuilt from codes, as a share of their variance",
}
_NEIGHBOURS = {"vectors": "nearest by item vectors", "training": "near in training"}
_SHARES = ("collision_rate", "reconstruction_error")
_EXAMPLES = 6
_ONE_BY_ONE = 12
"""Versions that are compared one after the other."""


@dataclass(frozen=True)
class Tree:
    """The picture of the code tree, how to read it, and its fullest codewords in words."""

    chart: Chart
    reading: str
    fullest: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Change:
    """What one version of the codes changed from the one before.

    Attributes:
        versions: names of the two, such as `v0 → v1`.
        items: items whose code changed.
        share: of all items.
        levels: (name of a level, share of items whose codeword changed there).
        reasons: (why, items), most frequent first; empty without a trace.
        examples: a few changed items: `label`, `old`, `new`, `why`.
    """

    versions: str
    items: int
    share: float
    levels: tuple[tuple[str, float], ...]
    reasons: tuple[tuple[str, int], ...]
    examples: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Part:
    """What a page shows of one table of codes and its versions.

    Attributes:
        name: of the run or the codes.
        verdict: in a sentence or more; empty where it was not judged.
        findings: what the doctor found: `rule`, `what`, `change`.
        not_judged: what it did not look at, in a sentence; empty where it looked at everything, or at nothing.
        tree: the picture of the newest codes; None without codes.
        charts: how they are used.
        levels: `quality.level_quality` of each.
        versions: names, oldest first.
        rows: numbers about the whole codes, a cell a version.
        changes: from version to version.
    """

    name: str
    verdict: str
    findings: Sequence[Mapping[str, str]]
    not_judged: str
    tree: Tree | None
    charts: Sequence[Chart]
    levels: Sequence[Mapping[str, Any]]
    versions: Sequence[str]
    rows: Sequence[tuple[str, list[str]]]
    changes: Sequence[Change]


@dataclass(frozen=True)
class Movement:
    """What moved between two tables of codes of the same items.

    Attributes:
        sentences: how items were joined, and how many moved how far.
        levels: name of a level, share of items with another codeword there, and how far both put the same items
            together, as text.
        movers: the items that moved most: `label`, `old`, `new`.
    """

    sentences: Sequence[str]
    levels: Sequence[tuple[str, str, str]]
    movers: Sequence[Mapping[str, str]]


def part(run: RunFolder) -> Part:
    """Collect what is known of a run's item tokens."""
    return Part(
        name=run.name,
        verdict=verdict(run.quality),
        findings=findings(run.quality),
        not_judged=gaps_text(_facts(run.quality).get("not_judged", [])),
        tree=code_tree(run),
        charts=usage_charts(run),
        levels=levels(run.quality),
        versions=list(run.quality),
        rows=quality_rows(run.quality),
        changes=changes(run),
    )


def movement(joined: str, found: Mapping[str, Any], old: ItemCodes, new: ItemCodes, labels: Sequence[str]) -> Movement:
    """Put the result of `compare_codes` for a page.

    Args:
        joined: how items were joined, in a sentence.
        found: what it returned.
        old: as there.
        new: as there.
        labels: of the items.
    """
    levels = []
    for level in found["levels"]:
        together = "–" if level["together"] is None else f"{level['together']:.2f}"
        levels.append((str(level["name"]), f"{level['churn']:.1%}", together))
    movers = [
        {"label": labels[row], "old": spelled(old.table[row], old.words), "new": spelled(new.table[row], new.words)}
        for row in found["movers"]
    ]
    return Movement([joined, *movement_sentences(found)], levels, movers)


def levels(quality: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """List the levels of the newest codes, as they are once collisions are resolved."""
    return list(resolved(list(quality.values())[-1]).get("levels", [])) if quality else []


def verdict(quality: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the verdict on the newest codes; empty where there is none."""
    return str(resolved(list(quality.values())[-1]).get("verdict", "")) if quality else ""


def findings(quality: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, str]]:
    """List what the doctor found in the newest codes: `rule`, `what`, `change`; empty where there is nothing."""
    return list(_facts(quality).get("findings", []))


def _facts(quality: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the doctor measured of the newest codes; empty where it did not."""
    facts: Mapping[str, Any] = list(quality.values())[-1].get("doctor", {}) if quality else {}
    return facts


def resolved(quality: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part about the codes in use: they differ from the fitted ones where collisions were resolved."""
    return quality.get("resolved", quality)


def usage_charts(run: RunFolder) -> list[Chart]:
    """Draw codewords in use, items under each, and what prefixes keep together."""
    charts = []
    used = [
        (str(level["name"]), int(level["size"]), int(level["used"]), float(level["perplexity"]))
        for level in levels(run.quality)
    ]
    if used and (run.codes is None or run.codes.words is None):  # of existing words, all that stand there are in use
        charts.append(usage_chart("Codewords in use", used))
    if run.codes is not None:
        loads = [
            (name, np.unique(run.codes.table[:, level], return_counts=True)[1].tolist())
            for level, name in enumerate(run.codes.names)
        ]
        charts.append(load_chart("Items under each codeword, fullest first", loads))
    return [*charts, *_together_charts(_facts(run.quality))]


def _together_charts(facts: Mapping[str, Any]) -> Iterable[Chart]:
    """Draw, by length of prefix, the share of neighbours that share it, and of items that follow their category."""
    neighbours = {_NEIGHBOURS.get(name, name): rows for name, rows in facts.get("neighbours", {}).items() if rows}
    if neighbours:
        yield _beside_chance_chart("Neighbours that share a prefix", neighbours)
    rows = facts.get("purity", {}).get("levels", [])
    if rows:
        title = "Items of the most frequent category of their prefix"
        yield _beside_chance_chart(title, {"most frequent category": rows})


def _beside_chance_chart(title: str, figures: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart:
    """Draw shares and what chance would give, a row a length of prefix that all figures have."""
    names = [text for name in figures for text in (name, f"{name}, by chance")]
    dots = [
        Dots(f"length {length}", [rows[length - 1][key] for rows in figures.values() for key in ("share", "chance")])
        for length in range(1, min(map(len, figures.values())) + 1)
    ]
    return dot_chart(title, names, dots)


def code_tree(run: RunFolder) -> Tree | None:
    """Draw the newest codes as a tree; None without codes."""
    if run.codes is None:
        return None
    groups = category_groups(run.categories or ((),) * run.codes.num_items)
    labels = [item.label for item in run.items] or [f"row {row}" for row in range(run.codes.num_items)]
    nodes = [
        f"{name} ({len(run.codes.prefix_counts(depth)[1]):,})" for depth, name in enumerate(run.codes.names, start=1)
    ]
    reading = (
        f"One row a level, from above, with its number of nodes: {', '.join(nodes)}. A block is a codeword after those "
        "above it, as wide as its items; neighbours too thin to be seen are drawn as one. "
    )
    if groups.names:
        entry = "the first entry" if groups.position == 0 else f"entry {groups.position + 1}, the first that differs,"
        reading += (
            f"Its colour is its most frequent category ({entry} of each item's list), paler where more of its items "
            "belong to others."
        )
        for row in _facts(run.quality).get("purity", {}).get("levels", [])[:1]:
            reading += (
                f" Of the items that have a category, {row['share']:.1%} have the most frequent one of their first "
                f"codeword; {row['chance']:.1%} would by chance."
            )
    elif run.categories is None:
        reading += "It has no colours, because the run folder does not say which categories the items have."
    else:
        reading += "It has no colours, because the items of this catalogue have no categories."
    return Tree(
        tree_chart("The code tree", run.codes, groups, labels), reading, fullest_codewords(run.codes, groups, labels)
    )


def changes(run: RunFolder) -> list[Change]:
    """Compare each version of the codes with the one before, or, of many, the newest with the first.

    Versions of other shapes cannot be compared.
    """
    known = [(version, version.codes) for version in run.versions if version.codes is not None]
    if len(known) > _ONE_BY_ONE:
        known = [known[0], known[-1]]
    return [
        _change(run, f"{older.name} → {newer.name}", newer.reasons, old, new)
        for (older, old), (newer, new) in pairwise(known)
        if old.sizes == new.sizes and len(old) == len(new)
    ]


def _change(run: RunFolder, versions: str, reasons: Mapping[str, str], old: ItemCodes, new: ItemCodes) -> Change:
    moved = old.table != new.table
    rows = np.flatnonzero(moved.any(axis=1))
    earliest_first = rows[np.argsort(moved[rows].argmax(axis=1), kind="stable")]
    examples = []
    for row in earliest_first[:_EXAMPLES].tolist():
        label, item_id = (run.items[row].label, run.items[row].item_id) if run.items else (f"row {row}", "")
        codes = {"old": spelled(old.table[row], old.words), "new": spelled(new.table[row], new.words)}
        examples.append({"label": label, **codes, "why": reasons.get(item_id, "")})
    return Change(
        versions=versions,
        items=len(rows),
        share=len(rows) / len(moved),
        levels=tuple(zip(new.names, moved.mean(axis=0).tolist(), strict=True)),
        reasons=tuple(Counter(filter(None, reasons.values())).most_common()),
        examples=tuple(examples),
    )


def quality_rows(quality: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """List the numbers about the whole codes, a cell a version."""
    versions = [dict(_quality_figures(part)) for part in quality.values()]
    names = dict.fromkeys(name for figures in versions for name in figures)
    return [(name, [figures.get(name, "–") for figures in versions]) for name in names]


def _quality_figures(quality: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    figures = {**quality, **resolved(quality)}
    for key, value in figures.items():
        if key == "neighbours":
            for row in value:
                name = f"Nearest items with the same first {row['depth']} of the code (by chance)"
                yield name, _beside_chance(row)
        elif key == "doctor":
            yield from _doctor_figures(value)
        elif not isinstance(value, list | Mapping) and key != "verdict":
            name = _QUALITY_NAMES.get(key, key)
            yield name, f"{value:.1%}" if key in _SHARES else value_text(value)


def _doctor_figures(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for row in facts.get("neighbours", {}).get("training", [])[:1]:
        yield "Items near each other in training with the same first codeword (by chance)", _beside_chance(row)
    for row in facts.get("purity", {}).get("levels", [])[:1]:
        yield "Items of the most frequent category of their first codeword (by chance)", _beside_chance(row)
    for level in facts.get("popularity", {}).get("levels", [])[:1]:
        yield "Interactions that go to the fullest first codeword", f"{level['fullest']:.1%}"


def _beside_chance(row: Mapping[str, float]) -> str:
    return f"{row['share']:.1%} ({row['chance']:.1%})"

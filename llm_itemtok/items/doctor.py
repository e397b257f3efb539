"""The item-token doctor: what a table of codes does to items, beyond how evenly it is used, and what to change.

`quality` counts codewords. This module asks what prefixes mean: do items that are near each other, by their vectors or
in training sequences, share them, more than chance would have it? Do they follow the categories? Do popular items
crowd? How much room is left? `findings` turns the numbers into advice by rules whose thresholds stand here.

Decisions:
- Every figure stands beside what chance would give, because a level with few codewords in use puts everything together.
  For pairs of neighbours, chance pairs the same items at random, so that popular neighbours do not look like meaning.
- Thresholds are rules of thumb, chosen so that residual k-means on sentence embeddings of a few thousand items or more
  passes and codes dealt at random do not.
- Interactions are those of training only; whoever calls this hands over nothing else.

Shape letters in this file: N items, L levels, P pairs of neighbours, C categories.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llm_itemtok.data.categories import telling_place
from llm_itemtok.items.codes import ItemCodes

HEAD_SHARE = 0.2
"""Share of the items, by training interactions, that are the head; as in the segments of an evaluation."""

SHUFFLES = 5
"""Random orders of the categories that chance purity is the mean of."""

LEAST_USED = 0.95
"""Share of a level's codewords, or of the items if those are fewer, that should be in use."""
LEAST_EVEN_FIRST = 0.5
"""Perplexity of the first level as a share of what it could be; below, beams crowd under a few prefixes."""
LEAST_EVEN = 0.25
"""The same for deeper levels, whose residuals are never even."""
MOST_COLLISIONS = 0.05
"""Share of items that shared their code before resolution; a well trained RQ-VAE stays below."""
FEWEST_COLLISIONS = 0.01
"""Below, a level that counts within codes costs every item a token for next to nothing."""
LEAST_OVER_CHANCE = 2.0
"""Neighbours by their vectors should share the first codeword this many times as often as by chance."""
LEAST_OVER_CHANCE_IN_TRAINING = 1.5
"""The same for items that occur near each other in training."""
LEAST_PURITY_GAIN = 0.1
"""How far the first level should go from chance purity to 1."""
LEAST_ROOM = 4.0
"""Codes there should be room for, in multiples of the items: codes are never spread evenly."""
MOST_FULL = 0.9
"""Share of the codes under the fullest prefix of L - 1 codewords that may be taken."""
MOST_ERROR = 0.7
"""Squared error of rebuilt vectors as a share of their variance; above, codes forget most of what the vectors say."""
MOST_ERROR_BY_MOVES = 0.1
"""How much, relatively, resolving collisions may add to that error."""
LEAST_EVEN_HEAD = 0.5
"""Perplexity of the first level over head items as a share of that over as many items drawn from all."""


WORST_FIRST = (
    *("not unique", "collapsed", "prefixes mean little", "little room", "coarse", "collisions", "dead codewords"),
    *(
        "blind to behaviour",
        "blind to categories",
        "dear moves",
        "crowded",
        "crowded head",
        "full prefix",
        "idle level",
    ),
)
"""All rules, in the order in which their findings are told."""

_NEAR = {"vectors": "nearest by item vectors", "training": "near each other in training"}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        rule: its name, the same in every report.
        what: the numbers, and what they mean.
        change: what to try.
    """

    rule: str
    what: str
    change: str


def examine(
    codes: ItemCodes,
    *,
    near: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    item_counts: np.ndarray | None = None,
    categories: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Measure what prefixes mean.

    Args:
        codes: N items, as they are in use.
        near: what made items neighbours (`vectors`, `training`) → rows of items and of their neighbours, int64 `[P]`
            each.
        item_counts: int64 `[N]`, training interactions of each item.
        categories: of each item, coarse first; empty where an item has none.

    Returns:
        Plain JSON values: `sha256` of the codes, `room` (see `room_left`), and as far as it is known `neighbours`
        (`shared_prefixes` by what made items neighbours), `purity` (see `category_purity`) and `popularity` (see
        `head_and_tail`).
    """
    facts: dict[str, Any] = {"sha256": codes.sha256, "room": room_left(codes)}
    pairs = {name: rows for name, rows in (near or {}).items() if len(rows[0])}
    if pairs:
        facts["neighbours"] = {name: shared_prefixes(codes, *rows) for name, rows in pairs.items()}
    if categories is not None and any(categories):
        facts["purity"] = category_purity(codes, categories)
    if item_counts is not None and item_counts.any():
        facts["popularity"] = head_and_tail(codes, item_counts)
    return facts


def judged_depths(codes: ItemCodes) -> range:
    """Lengths of prefix, from 1, that say something: before a level that only counts, and while items share them."""
    policy = codes.provenance.get("collisions", {})
    last = policy["levels_before"] if policy.get("policy") == "extra-level" else codes.num_levels
    shared = [depth for depth in range(1, last + 1) if len(codes.prefix_counts(depth)[1]) < codes.num_items]
    return range(1, max(shared, default=0) + 1)


def shared_prefixes(codes: ItemCodes, items: np.ndarray, neighbours: np.ndarray) -> list[dict[str, float]]:
    """Say how many neighbours share a prefix.

    Args:
        codes: N items.
        items: int64 `[P]`, rows; P at least 1.
        neighbours: int64 `[P]`, the row of a neighbour of each; never the item itself.

    Returns:
        For each length of prefix: `depth`, `share` of the pairs, and `chance`, the share were the same items and the
        same neighbours paired at random (an item never with itself).
    """
    item_shares = np.bincount(items, minlength=codes.num_items) / len(items)
    neighbour_shares = np.bincount(neighbours, minlength=codes.num_items) / len(items)
    itself = float(item_shares @ neighbour_shares)
    result = []
    for depth in judged_depths(codes):
        groups = codes.prefix_groups(depth)
        together = float(np.bincount(groups, item_shares) @ np.bincount(groups, neighbour_shares))
        share = float((groups[items] == groups[neighbours]).mean())
        chance = max(0.0, (together - itself) / (1 - itself)) if itself < 1 else 0.0
        result.append({"depth": depth, "share": share, "chance": chance})
    return result


def category_purity(codes: ItemCodes, categories: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Say how far prefixes follow the categories.

    Args:
        codes: N items.
        categories: of each item, coarse first; at least one item has some.

    Returns:
        `place` of the category lists that was taken, the first that tells items apart; `categories`, how many there
        are; `items` that have one; and `levels`, for each length of prefix `depth`, `share` of those items that are of
        the most frequent category of their prefix, and `chance`, the mean of that over random orders of the categories.
    """
    place = telling_place(categories)
    rows = np.array([row for row, parts in enumerate(categories) if len(parts) > place], dtype=np.int64)
    names, numbers = np.unique([categories[row][place] for row in rows], return_inverse=True)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(rows)) for _ in range(SHUFFLES)]
    levels = []
    for depth in judged_depths(codes):
        groups = codes.prefix_groups(depth)[rows]
        chance = float(np.mean([_purity(groups, numbers[order]) for order in orders]))
        levels.append({"depth": depth, "share": _purity(groups, numbers), "chance": chance})
    return {"place": place, "categories": len(names), "items": len(rows), "levels": levels}


def _purity(groups: np.ndarray, numbers: np.ndarray) -> float:
    """Share of items that are of the most frequent number of their group."""
    keys, counts = np.unique(groups * (int(numbers.max()) + 1) + numbers, return_counts=True)
    starts = np.flatnonzero(np.diff(keys // (int(numbers.max()) + 1), prepend=-1))
    return float(np.maximum.reduceat(counts, starts).sum() / len(groups))


def head_and_tail(codes: ItemCodes, item_counts: np.ndarray) -> dict[str, Any]:
    """Say how popular items are spread over codewords.

    Args:
        codes: N items.
        item_counts: int64 `[N]`, training interactions of each, not all zero.

    Returns:
        `head` and `tail`, numbers of items (the head are the 20 % with most interactions, as far as they have any), and
        `levels`: for each its `name` and the perplexity of its codewords over items of the `head`, of the `tail`, over
        `sample`, as many items as the head has, drawn from all, and over `interactions`; with `fullest`, the share of
        the interactions that go to its most frequent codeword.
    """
    order = np.argsort(-item_counts, kind="stable")
    head = order[: int(np.ceil(HEAD_SHARE * codes.num_items))]
    head = head[item_counts[head] > 0]
    tail = np.setdiff1d(order, head)
    sample = np.random.default_rng(0).choice(codes.num_items, len(head), replace=False)
    levels = []
    for name, column in zip(codes.names, codes.table.T, strict=True):
        weights = np.bincount(column, item_counts)
        figures = {"head": column[head], "tail": column[tail], "sample": column[sample]}
        levels.append(
            {"name": name}
            | {part: _perplexity(np.bincount(words)) for part, words in figures.items()}
            | {"interactions": _perplexity(weights), "fullest": float(weights.max() / weights.sum())}
        )
    return {"head": len(head), "tail": len(tail), "levels": levels}


def _perplexity(counts: np.ndarray) -> float:
    if not counts.any():
        return 0.0
    shares = counts[counts > 0] / counts.sum()
    return float(2.0 ** -(shares * np.log2(shares)).sum())


def room_left(codes: ItemCodes) -> dict[str, float]:
    """Say how much room codes have.

    Returns:
        `times`, how many codes there is room for, as a multiple of the items; `fullest`, the largest share of the codes
        under a prefix of all codewords but the last that is taken.
    """
    above = codes.prefix_counts(codes.num_levels - 1)[1]
    # A float, because the capacity has no bound; what is beyond floats is not worth telling.
    return {
        "times": min(codes.capacity / codes.num_items, 1e300),
        "fullest": float(min(above.max() / codes.sizes[-1], 1.0)),
    }


# ----------------------------------------------------------------------------------------------------------- verdict


def findings(report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    """Apply every rule.

    Args:
        report: what `quality` says of the codes in use; figures that are missing are not judged.
        facts: what `examine` says of them, and where it is known `reconstruction_error`, squared error of rebuilt
            vectors as a share of their variance, `before` and `after` resolution.

    Returns:
        What is not as it should be, the worst first.
    """
    found = [finding for rule in _RULES for finding in rule(report, facts)]
    return sorted(found, key=lambda finding: WORST_FIRST.index(finding.rule))


def verdict_text(found: Sequence[Finding]) -> str:
    """Say in words what was found and what to change."""
    if not found:
        return "Verdict: healthy. Codewords are well used, few items collided, and prefixes mean something."
    things = "one thing" if len(found) == 1 else f"{len(found)} things"
    lines = [f"Verdict: {things} to look at, the worst first."]
    for number, finding in enumerate(found, start=1):
        lines += [f"{number}. {finding.rule}: {finding.what}.", f"   change: {finding.change}"]
    return "\n".join(lines)


def as_json(found: Sequence[Finding]) -> list[dict[str, str]]:
    """Findings as plain values."""
    return [asdict(finding) for finding in found]


def facts_text(facts: Mapping[str, Any]) -> str:
    """What `examine` found, a line a figure."""
    lines = []
    rows = {_NEAR.get(name, name): figures for name, figures in facts.get("neighbours", {}).items()}
    if "purity" in facts:
        rows[f"of the most frequent of {facts['purity']['categories']} categories"] = facts["purity"]["levels"]
    if depths := max((len(figures) for figures in rows.values()), default=0):
        header = ["items that share a prefix (by chance)", *(f"length {depth}" for depth in range(1, depths + 1))]
        cells = [[name, *map(_beside_chance, figures)] for name, figures in rows.items()]
        widths = [max(len(row[place]) for row in (header, *cells)) for place in range(depths + 1)]
        for row in (header, *cells):
            lines.append("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())
    for level in facts.get("popularity", {}).get("levels", [])[:1]:
        lines.append(
            f"{level['name']} is used as if it had {level['head']:,.0f} codewords by popular items, "
            f"{level['sample']:,.0f} by as many of all, {level['tail']:,.0f} by the others, "
            f"{level['interactions']:,.0f} by interactions, of which its fullest gets {level['fullest']:.1%}"
        )
    if error := facts.get("reconstruction_error"):
        lines.append(
            f"error of rebuilt vectors: {error['after']:.1%} of the variance, {error['before']:.1%} before resolution"
        )
    room = facts["room"]
    lines.append(
        f"room: {room['times']:,.1f} codes an item; of those under the fullest prefix before the last level, "
        f"{room['fullest']:.0%} are taken"
    )
    return "\n".join(lines)


def _beside_chance(row: Mapping[str, float]) -> str:
    return f"{row['share']:.1%} ({row['chance']:.2%})"


Rule = Callable[[Mapping[str, Any], Mapping[str, Any]], Sequence[Finding]]


def _shared(report: Mapping[str, Any], _facts: Mapping[str, Any]) -> list[Finding]:
    if report["unique"]:
        return []
    what = "items share their full code, so decoding cannot tell them apart"
    return [Finding("not unique", what, "resolve collisions before training (`tokenizer.collisions`)")]


def _usage(report: Mapping[str, Any], _facts: Mapping[str, Any]) -> list[Finding]:
    found = []
    for number, level in enumerate(level for level in report["levels"] if not level["counts_only"]):
        possible = min(level["size"], report["items"])
        even = level["perplexity"] / possible
        if number == 0 and even < LEAST_EVEN_FIRST and level["size"] > 1:
            what = f"{level['name']} is used as if it had {level['perplexity']:.0f} of its {level['size']:,} codewords"
            change = "`tokenizer.kind: residual-kmeans`, a lower `tokenizer.codebook_size`, or other item vectors"
            found.append(Finding("collapsed", f"{what} ({even:.0%}, should be {LEAST_EVEN_FIRST:.0%})", change))
        elif level["used"] < LEAST_USED * possible:
            what = f"{level['dead']:,} of the {level['size']:,} codewords of {level['name']} stand for no item"
            change = "a lower `tokenizer.codebook_size`, or for RQ-VAE more epochs"
            found.append(Finding("dead codewords", what, change))
        elif even < LEAST_EVEN and level["size"] > 1:
            what = f"{level['name']} is used as if it had {level['perplexity']:.0f} of its {level['size']:,} codewords"
            change = "`tokenizer.kind: rqvae`, or vectors of fewer dimensions (`tokenizer.components`)"
            found.append(Finding("crowded", f"{what} ({even:.0%}, should be {LEAST_EVEN:.0%})", change))
    return found


def _collisions(report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    rate, counts = report["collision_rate"], any(level["counts_only"] for level in report["levels"])
    if rate > MOST_COLLISIONS:
        what = f"{rate:.1%} of the items shared their code before resolution (should be {MOST_COLLISIONS:.0%} at most)"
        return [Finding("collisions", what, "one more of `tokenizer.levels`, or a larger `tokenizer.codebook_size`")]
    if counts and rate < FEWEST_COLLISIONS:
        what = f"every item has a token that only counts, for {rate:.2%} of them that shared their code"
        return [Finding("idle level", what, "`tokenizer.collisions: matching`, which keeps codes short")]
    return []


def _meaning(_report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    found = []
    neighbours = facts.get("neighbours", {})
    for row in neighbours.get("vectors", [])[:1]:
        if row["share"] < LEAST_OVER_CHANCE * row["chance"]:
            what = (
                f"{row['share']:.1%} of an item's nearest share its first codeword, {row['chance']:.1%} would by chance"
            )
            change = "a tokenizer that is fitted on the vectors (random codes are a control)"
            found.append(Finding("prefixes mean little", what, change))
    for row in neighbours.get("training", [])[:1]:
        if row["share"] < LEAST_OVER_CHANCE_IN_TRAINING * row["chance"]:
            what = (
                f"{row['share']:.1%} of the items near each other in training share the first codeword, "
                f"{row['chance']:.1%} would by chance"
            )
            change = "`vectors.kind: collaborative`, or `vectors.kind: concat` of it and the text"
            found.append(Finding("blind to behaviour", what, change))
    for row in facts.get("purity", {}).get("levels", [])[:1]:
        gain = (row["share"] - row["chance"]) / max(1e-9, 1 - row["chance"])
        if row["chance"] < 1 and gain < LEAST_PURITY_GAIN:
            what = (
                f"{row['share']:.1%} of the items are of the most frequent category of their first codeword, "
                f"{row['chance']:.1%} would by chance"
            )
            found.append(Finding("blind to categories", what, "item vectors from text that names the category"))
    return found


def _error(_report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    error = facts.get("reconstruction_error")
    if not error:
        return []
    found = []
    before, after = error["before"], error["after"]
    if before > MOST_ERROR:
        what = f"codes leave {before:.0%} of the variance of the vectors out (should be {MOST_ERROR:.0%} at most)"
        found.append(Finding("coarse", what, "one more of `tokenizer.levels`, or a larger `tokenizer.codebook_size`"))
    if after > (1 + MOST_ERROR_BY_MOVES) * before and after - before > 1e-6:
        what = f"resolving collisions raised the error of rebuilt vectors from {before:.1%} to {after:.1%}"
        change = "`tokenizer.collisions: matching`, or fewer collisions to begin with"
        found.append(Finding("dear moves", what, change))
    return found


def _room(report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    room = facts["room"]
    if room["times"] < LEAST_ROOM:
        what = f"there is room for {room['times']:.1f} codes an item (should be {LEAST_ROOM:.0f} at least)"
        return [Finding("little room", what, "one more of `tokenizer.levels`; new items need room, too")]
    counts = any(level["counts_only"] for level in report["levels"])
    if room["fullest"] >= MOST_FULL and not counts:
        what = f"{room['fullest']:.0%} of the codes under the fullest prefix are taken, so new items must leave it"
        return [Finding("full prefix", what, "a larger `tokenizer.codebook_size`, or one more of `tokenizer.levels`")]
    return []


def _popularity(_report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    for level in facts.get("popularity", {}).get("levels", [])[:1]:
        if level["head"] < LEAST_EVEN_HEAD * level["sample"]:
            what = (
                f"popular items crowd under {level['name']}: they use it as if it had {level['head']:.0f} codewords, "
                f"as many items of all {level['sample']:.0f}"
            )
            return [Finding("crowded head", what, "item vectors of length 1, so that popularity does not rule codes")]
    return []


_RULES: Sequence[Rule] = (_shared, _usage, _collisions, _meaning, _error, _room, _popularity)

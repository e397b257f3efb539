"""What is not as it should be with item codes, and what to change: the rules of the item-token doctor.

The one place for thresholds and advice: the verdict of `quality` and that of the doctor come from here.

Decisions:
- Thresholds are rules of thumb, chosen so that residual k-means on sentence embeddings of a few thousand items or more
  passes and codes dealt at random do not.
- What no figure was there for is named beside the verdict (`gaps`): a table of random codes looks fine by itself.
- Advice does not contradict itself: while codewords lie idle, what may follow from that is said to follow from it.

This module knows figures only: what `quality.quality` and `doctor.examine` say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

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
        "costly moves",
        "crowded",
        "crowded head",
        "full prefix",
        "idle level",
    ),
)
"""All rules, in the order in which their findings are told."""

_FOLLOWING = {
    "collapsed": ("collisions", "coarse", "crowded", "full prefix"),
    "dead codewords": ("collisions", "coarse"),
}
"""Finding → those that may be nothing but its consequence."""


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


def findings(report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    """Apply every rule; to codewords that are existing words, those on what codes mean.

    Args:
        report: what `quality` says of the codes in use; figures that are missing are not judged.
        facts: what `examine` says of them, as far as it is known, and `reconstruction_error`, squared error of rebuilt
            vectors as a share of their variance, `before` and `after` resolution, with `estimated` true if the
            codebooks are not those of the codes but were estimated from the vectors.

    Returns:
        What is not as it should be, the worst first.
    """
    rules = (_shared, _meaning) if "words" in report else _RULES
    found = [finding for rule in rules for finding in rule(report, facts)]
    return sorted(_without_contradictions(found), key=lambda finding: WORST_FIRST.index(finding.rule))


def _without_contradictions(found: Sequence[Finding]) -> list[Finding]:
    """The findings, the advice of those that may follow from another one replaced by that."""
    causes = [cause for cause in _FOLLOWING if any(finding.rule == cause for finding in found)]
    changed = []
    for finding in found:
        of = [cause for cause in causes if finding.rule in _FOLLOWING[cause]]
        changed.append(replace(finding, change=f'first mend "{of[0]}", from which this may follow') if of else finding)
    return changed


def gaps(report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Name what was not judged, because there were no figures for it.

    Args:
        report: as for `findings`.
        facts: as there.

    Returns:
        A phrase a question, such as "whether they follow categories"; none if every rule had its figures.
    """
    near = facts.get("neighbours", {})
    judged = {
        "whether prefixes follow item vectors": near.get("vectors"),
        "whether they follow training sequences": near.get("training"),
        "whether they follow categories": facts.get("purity", {}).get("levels"),
    }
    if "words" not in report:
        judged["how popular items are spread"] = facts.get("popularity")
        judged["how well codes rebuild item vectors"] = facts.get("reconstruction_error")
    return [what for what, figures in judged.items() if not figures]


def gaps_text(missing: Sequence[str]) -> str:
    """`gaps` as a sentence; empty without any."""
    return f"Not judged, for want of figures: {'; '.join(missing)}." if missing else ""


def verdict_text(found: Sequence[Finding], missing: Sequence[str]) -> str:
    """Say in words what was found and what to change.

    Args:
        found: what `findings` returned.
        missing: what `gaps` returned; only without any are codes called healthy.
    """
    if not found and not missing:
        return "Verdict: healthy. No figure is out of order."
    lines = ["Verdict: no figure is out of order, but not everything could be judged."]
    if found:
        things = "one thing" if len(found) == 1 else f"{len(found)} things"
        lines = [f"Verdict: {things} to look at, the worst first."]
    for number, finding in enumerate(found, start=1):
        lines += [f"{number}. {finding.rule}: {finding.what}.", f"   change: {finding.change}"]
    return "\n".join([*lines, *filter(None, [gaps_text(missing)])])


def judged(report: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The doctor's part of a quality file: its facts, with `findings` and what was `not_judged`, as plain values."""
    found = [asdict(finding) for finding in findings(report, facts)]
    return {**facts, "findings": found, "not_judged": gaps(report, facts)}


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


def _first(rows: Sequence[Mapping[str, float]]) -> list[tuple[Mapping[str, float], str]]:
    """The figures of the shortest prefix that tells items apart, and what it is called."""
    telling = [row for row in rows if row["chance"] < 1 - 1e-9] or rows
    return [(row, "first codeword" if row["depth"] == 1 else f"first {row['depth']} codewords") for row in telling[:1]]


def _meaning(report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    found = []
    fitted = "a tokenizer that is fitted on item vectors, such as residual-kmeans" if "words" in report else ""
    neighbours = facts.get("neighbours", {})
    for row, prefix in _first(neighbours.get("vectors", [])):
        if row["share"] < LEAST_OVER_CHANCE * row["chance"]:
            what = f"{row['share']:.1%} of an item's nearest share its {prefix}, {row['chance']:.1%} would by chance"
            change = "a tokenizer that is fitted on the vectors; of one that is, fewer codewords, each with more items"
            found.append(Finding("prefixes mean little", what, change))
    for row, prefix in _first(neighbours.get("training", [])):
        if row["share"] < LEAST_OVER_CHANCE_IN_TRAINING * row["chance"]:
            what = (
                f"{row['share']:.1%} of the items near each other in training share the {prefix}, "
                f"{row['chance']:.1%} would by chance"
            )
            change = fitted or "`vectors.kind: collaborative`, or `vectors.kind: concat` of it and the text"
            found.append(Finding("blind to behaviour", what, change))
    for row, prefix in _first(facts.get("purity", {}).get("levels", [])):
        gain = (row["share"] - row["chance"]) / max(1e-9, 1 - row["chance"])
        if row["chance"] < 1 and gain < LEAST_PURITY_GAIN:
            what = (
                f"{row['share']:.1%} of the items are of the most frequent category of their {prefix}, "
                f"{row['chance']:.1%} would by chance"
            )
            change = fitted or "item vectors from text that names the category"
            found.append(Finding("blind to categories", what, change))
    return found


def _error(_report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    error = facts.get("reconstruction_error")
    if not error:
        return []
    found = []
    before, after = error["before"], error["after"]
    if before > MOST_ERROR:
        how = ", with codebooks estimated from them" if error.get("estimated") else ""
        what = f"codes leave {before:.0%} of the variance of the vectors out{how} (should be {MOST_ERROR:.0%} at most)"
        found.append(Finding("coarse", what, "one more of `tokenizer.levels`, or a larger `tokenizer.codebook_size`"))
    if after > (1 + MOST_ERROR_BY_MOVES) * before and after - before > 1e-6:
        what = f"resolving collisions raised the error of rebuilt vectors from {before:.1%} to {after:.1%}"
        change = "`tokenizer.collisions: matching`, or fewer collisions to begin with"
        found.append(Finding("costly moves", what, change))
    return found


def _room(report: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    room = facts.get("room")
    if room is None:
        return []
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

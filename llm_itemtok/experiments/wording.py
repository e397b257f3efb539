"""The words of a results page: numbers as text, Markdown tables, and the sentences of the answer.

Decisions. Metrics are written as the field writes them (`.0601`), shares as percent with their sign. A difference gets
a direction ("ahead", "behind") only where its 95 % interval, as it is printed, leaves 0 out and p is below .05; else
the two "cannot be told apart", with the difference that would have been seen. The interval is that of the relative
gain and p that of the difference, which on the border may disagree: then the page takes no side. Model and baseline
have no ranks to pair by, so they are compared through their intervals as if independent, which errs towards "cannot be
told apart".
"""

import re
from collections.abc import Callable, Sequence

from llm_itemtok.evaluation.metrics import metric_name
from llm_itemtok.evaluation.paired import Estimate, PairedDifference, independent_difference
from llm_itemtok.experiments.findings import KEYS, PLATEAU_GAIN, Arm, Block, Edge

Call = Callable[[str], str]
"""What to call an arm or a baseline."""

AT_PLATEAU = "at its plateau"
STILL_RISING = "still rising"

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_OF_ONE_SEED = {"sasrec"}
"""Baselines that another seed would make another; they are fitted with one."""
_HOW_TO_READ = (
    "**Intervals** stand in square brackets and are 95 %. That of an arm is about other users and other seeds, or with "
    "one seed about other users only. In simulations it held the truth 92 to 98 times of 100 with three seeds and 86 "
    "to 98 times with two.",
    "**Gain** is relative to the mean of the control, paired by user and seed. “Ahead” and “behind” are said only "
    "where its interval leaves 0 out and p is below .05; p is not corrected for how many comparisons a page makes.",
    "**Detectable** is the true difference that such a comparison sees 8 times of 10. Where it is large, “cannot be "
    "told apart” means that nobody could have seen a smaller one.",
    "**Baselines** are measured once, SASRec with one seed, so their intervals are about other users only. A baseline "
    "and a model are compared through their intervals as if independent, which errs towards “cannot be told apart”. "
    "The best of each is chosen on validation, unless the answer says otherwise.",
    "**Side comparisons** are neither the method nor its control.",
)
_NAMED_MISSING = 12
"""Lines of what has not run; the rest is counted."""


def plain(text: str) -> str:
    """Escape what Markdown or a table would take for markup; underscores inside words are none."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*\[\]<>|]|(?<!\w)_|_(?!\w))", r"\\\1", flat)


def number(value: float) -> str:
    """Write a metric: four decimals, no zero before the point."""
    return f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.4f}"


def percent(share: float, decimals: int = 1, *, signed: bool = True) -> str:
    """Write a share as percent, with a true minus sign."""
    text = f"{share * 100:+.{decimals}f}" if signed else f"{share * 100:.{decimals}f}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "−") + " %"


def p_text(p: float) -> str:
    """Write a p value."""
    return "< .001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)


def estimate_text(of: Estimate) -> str:
    """Write a metric with its interval; one without any is the value alone."""
    if of.low == of.high == of.value:
        return number(of.value)
    return f"{number(of.value)} [{number(of.low)}, {number(of.high)}]"


def gain_text(of: PairedDifference) -> str:
    """Write a difference with its interval: relative, or absolute where the control's mean is 0."""
    if of.relative is None:
        return f"{of.difference.value:+.4f} [{of.difference.low:+.4f}, {of.difference.high:+.4f}]".replace("-", "−")
    return f"{percent(of.relative.value)} [{percent(of.relative.low)}, {percent(of.relative.high)}]"


def seeds_gain_text(of: PairedDifference) -> str:
    """Write the difference under each seed, as shares of the control's mean over all of them where there is one."""
    if of.relative is None or not of.relative.value:
        return ", ".join(f"{value:+.4f}".replace("-", "−") for value in of.by_seed)
    base = of.difference.value / of.relative.value
    return ", ".join(percent(value / base) for value in of.by_seed)


def seeds_text(count: int) -> str:
    """`three seeds`."""
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else count} seed{'' if count == 1 else 's'}"


def plateau(gain: float | None) -> str:
    """Say what the gain of the last third of training means; None is a curve too short to tell."""
    if gain is None:
        return "too short to tell"
    return AT_PLATEAU if gain < PLATEAU_GAIN else STILL_RISING


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Lay out a Markdown table; columns are right-aligned but those of `left`. Cells are escaped already."""
    marks = [":--" if column in left else "--:" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)]


def answer(
    blocks: Sequence[Block], call: Call, *, rising: Sequence[str], settled: Sequence[str], missing: int
) -> list[str]:
    """The answer: a paragraph a block, or a list where there are several methods; then what stands against it.

    Args:
        blocks: what was confirmed; none yet is an answer too.
        call: what to call an arm or a baseline.
        rising: the arms, each with its data set, that still rose when training ended; escaped.
        settled: those that did not.
        missing: how many runs of the plan are.
    """
    if not blocks:
        return ["**Answer.** None yet: test has not been opened.", ""]
    lines = []
    for block in blocks:
        methods = [_against_control(block, arm, call) for arm in block.arms if not arm.control and not arm.probe]
        sentences = [*(methods or ["no method has run yet."]), *_probes(block, call), *_against_baseline(block, call)]
        if len(methods) > 1:
            lines += [f"**On {plain(block.name)}:**", "", *[f"- {sentence}" for sentence in sentences], ""]
        else:
            lines += [f"**On {plain(block.name)}**, " + " ".join(sentences), ""]
    if rising:
        few = ", ".join(rising) if len(rising) <= len(settled) else "all arms"
        but = f" but {', '.join(settled)}" if settled and few == "all arms" else ""
        lines += [f"Still rising when training ended: {few}{but}. A gain over such an arm may be speed.", ""]
    if missing:
        words = f"{missing} runs of the plan are" if missing > 1 else "One run of the plan is"
        lines += [f"**Not finished.** {words} missing (see Not run), so this answer may change.", ""]
    return lines


def how_to_read() -> list[str]:
    """What the intervals, gains and comparisons of the page mean, as the items of a list."""
    return [f"- {rule}" for rule in _HOW_TO_READ]


def not_run_lines(not_run: Sequence[str], *, confirming: bool) -> list[str]:
    """List what has not run, the first `_NAMED_MISSING` by name; before `confirming`, runs are not known by name."""
    lines = [f"- {plain(line)}" for line in not_run[:_NAMED_MISSING]]
    if len(not_run) > _NAMED_MISSING:
        lines.append(f"- and {len(not_run) - _NAMED_MISSING:,} more")
    if not confirming:
        lines.append("- all of the confirmation, which opens test; it begins when tuning, if there is any, has ended")
    return lines or ["Every run of the plan has ended."]


def edge_lines(found: Sequence[Edge], call: Call) -> list[str]:
    """Say which settings were best at the edge of their grid."""
    if not found:
        return []
    arms: dict[str, list[str]] = {}
    for edge in found:
        setting = f"{edge.setting.rpartition('.')[2]} {edge.value}, the {edge.end} tried"
        arms.setdefault(edge.arm, []).append(setting)
    said = "; ".join(f"{plain(call(arm))} ({plain('; '.join(settings))})" for arm, settings in arms.items())
    return [f"Best at the edge of the grid: {said}. A wider one may be better.", ""]


def _against_control(block: Block, arm: Arm, call: Call) -> str:
    """Compare a method with its control: `X reaches Recall@10 .06 against .04 for Y (control) and is ahead: …`."""
    name, key = plain(call(arm.name)), KEYS[0]
    reached = f"{name} reaches {metric_name(key)} {_value(arm)}"
    if block.control is None:
        return f"{reached}; its control has not run yet."
    against = f"{reached} against {_value(block.control)} for {plain(call(block.control.name))} (control)"
    if key not in arm.differences:
        return f"{against}; the difference is not tested, because no seed of both has ranks."
    of = arm.differences[key]
    numbers = f"{gain_text(of)}, {seeds_text(len(of.by_seed))}, {_p_phrase(of.p)}."
    if len(of.by_seed) == 1:
        numbers += " With one seed this holds for other users, not for other seeds."
    if direction := _direction(of):
        return f"{against} and is {direction}: {numbers}"
    seen = number(of.detectable) if of.detectable_relative is None else percent(of.detectable_relative, signed=False)
    return f"{against}; the two cannot be told apart: {numbers} A difference of {seen} would probably have been seen."


def _probes(block: Block, call: Call) -> list[str]:
    parts = []
    for arm in block.arms:
        if arm.probe and KEYS[0] in arm.differences:
            of = arm.differences[KEYS[0]]
            verdict = _direction(of) or "cannot be told apart"
            parts.append(f"{plain(call(arm.name))} {gain_text(of)} ({verdict}, {seeds_text(len(of.by_seed))})")
    return [f"Side comparisons with the control: {'; '.join(parts)}."] if parts else []


def _against_baseline(block: Block, call: Call) -> list[str]:
    baseline, arm, key = block.best_baseline, block.best_arm, KEYS[0]
    if baseline is None or key not in arm.test or arm.test[key].low == arm.test[key].high:
        return []  # without ranks a mean has no interval, and no direction can be claimed
    of = independent_difference(baseline.test[key], arm.test[key])
    verdict = "is ahead of" if of.low > 0 else "is behind" if of.high < 0 else "cannot be told apart from"
    facts = [number(baseline.test[key].value)]
    facts += ["one seed"] if baseline.name in _OF_ONE_SEED else []
    facts += [] if block.chosen_on == "validation" else ["chosen on test for want of its validation"]
    return [
        f"The best baseline there, {plain(call(baseline.name))} ({', '.join(facts)}), "
        f"{verdict} the best model, {plain(call(arm.name))} ({_value(arm)})."
    ]


def _value(arm: Arm) -> str:
    return number(arm.test[KEYS[0]].value) if KEYS[0] in arm.test else "(no test yet)"


def _direction(of: PairedDifference) -> str:
    """`ahead` or `behind`; empty where the interval of `gain_text`, rounded as there, holds 0 or p is .05 or more."""
    interval, decimals = (of.difference, 4) if of.relative is None else (of.relative, 3)
    if round(of.p, 3) >= 0.05:
        return ""
    return "ahead" if round(interval.low, decimals) > 0 else "behind" if round(interval.high, decimals) < 0 else ""


def _p_phrase(p: float) -> str:
    return f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"

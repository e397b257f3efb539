"""The words of a results page: numbers as text, Markdown tables, and the sentences of the answer.

Decisions. Metrics are written as the field writes them (`.0601`), shares as percent with their sign. A difference gets
a direction ("ahead", "behind") only where its 95 % interval leaves 0 out; else the two "cannot be told apart", with
the difference that would have been seen. Model and baseline have no ranks to pair by, so they are compared through
their intervals as if independent, which errs towards "cannot be told apart".
"""

import re
from collections.abc import Callable, Sequence

from llm_itemtok.evaluation.paired import Estimate, PairedDifference, independent_difference
from llm_itemtok.experiments.findings import KEYS, PLATEAU_GAIN, Arm, Block

Call = Callable[[str], str]
"""What to call an arm or a baseline."""

AT_PLATEAU = "at its plateau"

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_FAMILIES = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR"}
_BASELINE_RULE = (
    "Models and baselines are compared through their intervals as if independent, which errs towards seeing no "
    "difference; p values are not corrected for how many comparisons a page makes."
)


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


def metric_name(key: str) -> str:
    """`recall@10` → `Recall@10`."""
    family, _, cutoff = key.partition("@")
    return f"{_FAMILIES[family]}@{cutoff}"


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


def seeds_text(count: int) -> str:
    """`three seeds`."""
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else count} seed{'' if count == 1 else 's'}"


def plateau(gain: float | None) -> str:
    """Say what the gain of the last third of training means; None is a curve too short to tell."""
    if gain is None:
        return "too short to tell"
    return AT_PLATEAU if gain < PLATEAU_GAIN else "still rising"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Lay out a Markdown table; columns are right-aligned but those of `left`. Cells are escaped already."""
    marks = [":--" if column in left else "--:" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)]


def answer(blocks: Sequence[Block], call: Call) -> list[str]:
    """The answer: a paragraph a block, then how the comparisons were made."""
    if not blocks:
        return ["**Answer.** None yet: only tuning has run, and test has not been opened.", ""]
    lines = []
    for block in blocks:
        sentences = [_against_control(block, arm, call) for arm in block.arms if not arm.control and not arm.probe]
        sentences += _probes(block, call)
        sentences += _against_baseline(block, call)
        lines += [f"**On {plain(block.name)}**, " + " ".join(sentences or ["no method has run yet."]), ""]
    return [*lines, f"{_BASELINE_RULE} [How to read this page](../experiments.md).", ""]


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
    numbers = f"{gain_text(of)}, {seeds_text(of.seeds)}, {_p_phrase(of.p)}."
    if of.seeds == 1:
        numbers += " With one seed this holds for other users, not for other seeds."
    if of.difference.excludes_zero:
        return f"{against} and is {_direction(of.difference)}: {numbers}"
    seen = number(of.detectable) if of.detectable_relative is None else percent(of.detectable_relative, signed=False)
    return f"{against}; the two cannot be told apart: {numbers} A difference of {seen} would probably have been seen."


def _probes(block: Block, call: Call) -> list[str]:
    parts = []
    for arm in block.arms:
        if arm.probe and KEYS[0] in arm.differences:
            of = arm.differences[KEYS[0]]
            verdict = _direction(of.difference) if of.difference.excludes_zero else "cannot be told apart"
            parts.append(f"{plain(call(arm.name))} {gain_text(of)} ({verdict}, {seeds_text(of.seeds)})")
    return [f"Side comparisons with the control: {'; '.join(parts)}."] if parts else []


def _against_baseline(block: Block, call: Call) -> list[str]:
    baseline, arm, key = block.best_baseline, block.best_arm, KEYS[0]
    if baseline is None or key not in arm.test or arm.test[key].low == arm.test[key].high:
        return []  # without ranks a mean has no interval, and no direction can be claimed
    of = independent_difference(baseline.test[key], arm.test[key])
    verdict = f"is {_direction(of)} of" if of.low > 0 else "is behind" if of.high < 0 else "cannot be told apart from"
    chosen = "" if block.chosen_on == "validation" else ", chosen on test for want of its validation"
    return [
        f"The best baseline there, {plain(call(baseline.name))} ({number(baseline.test[key].value)}{chosen}), "
        f"{verdict} the best model, {plain(call(arm.name))} ({_value(arm)})."
    ]


def _value(arm: Arm) -> str:
    return number(arm.test[KEYS[0]].value) if KEYS[0] in arm.test else "(no test yet)"


def _direction(of: Estimate) -> str:
    return "ahead" if of.low > 0 else "behind"


def _p_phrase(p: float) -> str:
    return f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"

"""The report's part on token weights: what is mixed when, and which tokens count how much.

Decisions. The mix and the losses come from the training log, weights from `token_weights.json`, which holds those of
the codes that training ended with. A target's own loss is its logged term over its share, both being means since the
line before: terms are logged as they enter the loss, share included, and would show the curriculum more than what is
learned.

This module decides what is shown of token weights; `plots` draws.
"""

import math
from collections.abc import Mapping

from llm_itemtok.report.plots import Chart, Dots, Series, dot_chart, line_chart
from llm_itemtok.report.run_folder import RunFolder

_LEAST_SHARE = 1e-3
"""A target's loss is shown from this share on: below, rounding shows more than learning."""


def charts(run: RunFolder) -> list[Chart]:
    """Draw the mix over time, each target's loss, and weights by level and by how often an item is a target."""
    return [*_mix_charts(run), *_weight_charts(run)]


def _mix_charts(run: RunFolder) -> list[Chart]:
    shares: dict[str, dict[float, float]] = {}
    losses: dict[str, dict[float, float]] = {}
    for line in run.log:
        for target in [name.removeprefix("mix/") for name in line if name.startswith("mix/")]:
            step, share = float(line["step"]), line[f"mix/{target}"]
            shares.setdefault(target, {})[step] = share
            terms = [value for name, value in line.items() if _is_term(name, target)]
            if share >= _LEAST_SHARE and terms and all(_is_finite(value) for value in terms):
                losses.setdefault(target, {})[step] = sum(terms) / share
    drawn = []
    if shares:
        drawn.append(line_chart("What is mixed", _series(shares), x_label="step", from_zero=True))
    if losses:
        drawn.append(line_chart("Loss of each target on its own", _series(losses), x_label="step"))
    return drawn


def _weight_charts(run: RunFolder) -> list[Chart]:
    targets: Mapping[str, Mapping[str, list]] = run.token_weights.get("targets", {})
    if not targets:
        return []
    levels = len(next(iter(targets.values()))["levels"])
    names = run.codes.names if run.codes is not None else [f"level-{level}" for level in range(levels)]
    rows = [Dots(names[level], [found["levels"][level] for found in targets.values()]) for level in range(levels)]
    drawn = [dot_chart("Weight of a target token by level, mean over training", list(targets), rows)]
    by_count = {
        name: {math.log2(count): weight for count, weight in found["by_count"]} for name, found in targets.items()
    }
    if all(by_count.values()):
        title = "Weight of an item's tokens by how often it is a training target"
        drawn.append(line_chart(title, _series(by_count), x_label="log₂ of times it is a target", from_zero=True))
    return drawn


def _series(curves: Mapping[str, Mapping[float, float]]) -> list[Series]:
    return [Series(name, sorted(points.items())) for name, points in curves.items()]


def _is_term(name: str, target: str) -> bool:
    """Whether a number of the log is `loss/<task>/<target>`."""
    parts = name.split("/")
    return len(parts) == 3 and (parts[0], parts[2]) == ("loss", target)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

"""Pictures of the report, as SVG text that follows the page's colours.

Decisions. The SVG is written by hand: a plotting library would fix fonts and colours in the file, whereas these
pictures take both from the page's style sheet (classes `s0` … `s7`, `grid`, `label`, …) and so follow dark and light.
All are 460 units wide, so that text stays readable when a phone shrinks them by a fifth. Captions and legends are not
part of the SVG but text of the page. Each picture says in words what it shows (`Chart.summary`), for those who
cannot see it.

This module knows numbers and labels; it knows nothing of runs, files or metrics.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

WIDTH = 460
"""Width of every picture in SVG units; the page scales it."""

SERIES_COLOURS = 8
"""Series are coloured by the classes `s0` to `s7`; a chart of more series repeats them."""

_MAX_POINTS = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 10, 40
_LABEL_WIDTH, _ROW_HEIGHT = 118, 30
_FLOW_HEIGHT, _FLOW_LINE = 180.0, 16.0


@dataclass(frozen=True)
class Chart:
    """One picture: caption, SVG, legend of (class, text) pairs, and a summary in words."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]
    summary: str


@dataclass(frozen=True)
class Series:
    """One line of a chart: (x, y) points in order of x, finite, at least one."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One bar: `low` and `high` are the ends of its interval, None where there is none."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    ours: bool = False


@dataclass(frozen=True)
class Dots:
    """One row of a dot chart: a value a series, None where a series has none."""

    label: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Mark:
    """A place on the x axis where something was decided, for better or for worse."""

    x: float
    text: str
    good: bool


@dataclass(frozen=True)
class Flow:
    """How many items went from one place to another, or stayed; places are whole numbers."""

    source: int
    target: int
    items: int


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    from_zero: bool = False,
    mark_best: bool = False,
    marks: Sequence[Mark] = (),
) -> Chart:
    """Draw lines over a common x axis.

    Args:
        title: caption.
        series: at least one.
        x_label: what x counts.
        from_zero: begin the y axis at 0 instead of near the smallest value.
        mark_best: ring the highest point of each series; the legend then gives that value, else the last one.
        marks: lines across the picture, with a tick above those that are good and a cross above the others.
    """
    height = 250
    xs = [*(x for line in series for x, _ in line.points), *(mark.x for mark in marks)]
    ys = [y for line in series for _, y in line.points]
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = _widened(0.0 if from_zero else min(ys), max(ys))
    y_ticks = ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return height - _BOTTOM - (y - y_low) / (y_high - y_low) * (height - _TOP - _BOTTOM)

    parts = [*_y_axis(y_ticks, down), *_x_axis([x for x in ticks(x_low, x_high) if x_low <= x <= x_high], across)]
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, height - 4, x_label, "label middle"))
    legend, words = [], []
    for mark in marks:
        x = across(mark.x)
        parts.append(Markup('<path class="grid mark" d="M{:.1f} {}V{}"/>').format(x, _TOP + 6, height - _BOTTOM))
        sign, style = ("✓", "label middle good") if mark.good else ("✗", "label middle bad")
        parts.append(_text(x, _TOP + 2, sign, style))
        words.append(f"{mark.text} was {'accepted' if mark.good else 'refused'} at {x_label} {mark.x:,.6g}")
    for number, line in enumerate(series):
        colour = f"s{number % SERIES_COLOURS}"
        best = max(line.points, key=lambda point: point[1])
        drawn = thinned(line.points)
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in drawn)
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(colour, path))
        if len(drawn) <= 40:
            parts += [_dot(across(x), down(y), 2.2, f"fill {colour}") for x, y in drawn]
        if mark_best:
            parts.append(_dot(across(best[0]), down(best[1]), 5.5, f"ring {colour}"))
        end = f"best {number_text(best[1])} at {best[0]:,.6g}" if mark_best else number_text(line.points[-1][1])
        legend.append((colour, f"{line.label}: {end}"))
        words.append(
            f"{line.label} goes from {number_text(line.points[0][1])} at {x_label} {line.points[0][0]:,.6g} "
            f"to {number_text(line.points[-1][1])} at {x_label} {line.points[-1][0]:,.6g}"
        )
    summary = f"{title}: " + "; ".join(words) + "."
    return Chart(title, _svg(parts, height, summary), tuple(legend), summary)


def flow_chart(title: str, flows: Sequence[Flow], names: Mapping[int, str]) -> Chart:
    """Draw where items went between two moments: a column of places on either side, a band for each flow.

    Args:
        title: caption.
        flows: at least one, in the order of the places from above; one that ends where it begins is drawn pale.
        names: place → what it is called.
    """
    places = sorted({flow.source for flow in flows} | {flow.target for flow in flows})
    total, left, right = sum(flow.items for flow in flows), 92, WIDTH - 92
    scale = _FLOW_HEIGHT / total
    tops, y = {}, 0.0
    for place in places:
        tops[place] = y
        leaving, coming = (sum(f.items for f in flows if end(f) == place) for end in (_source, _target))
        y += max(scale * max(leaving, coming), _FLOW_LINE) + 4
    parts, middle = [], (left + right) / 2
    used = [dict(tops), dict(tops)]
    for flow in flows:
        thick = flow.items * scale
        y0, y1 = used[0][flow.source], used[1][flow.target]
        used[0][flow.source] += thick
        used[1][flow.target] += thick
        path = (
            f"M{left} {y0:.1f}C{middle} {y0:.1f} {middle} {y1:.1f} {right} {y1:.1f}v{thick:.2f}"
            f"C{middle} {y1 + thick:.1f} {middle} {y0 + thick:.1f} {left} {y0 + thick:.1f}Z"
        )
        colour = f"fill s{places.index(flow.source) % SERIES_COLOURS}" if flow.source != flow.target else "stay"
        said = f"{names[flow.source]} → {names[flow.target]}: {flow.items:,} items"
        parts.append(Markup('<path class="flow {}" d="{}"><title>{}</title></path>').format(colour, path, said))
    for x, style in ((left - 8, "label end"), (right + 8, "label")):
        parts += [_text(x, tops[place] + 12, names[place], style) for place in places]
    most = sorted((flow for flow in flows if flow.source != flow.target), key=lambda flow: -flow.items)[:5]
    words = ", ".join(f"{names[flow.source]} → {names[flow.target]} {flow.items:,}" for flow in most)
    summary = f"{title}: {total:,} items" + (f"; most: {words}." if most else ".")
    return Chart(title, _svg(parts, y, summary), (), summary)


def _source(flow: Flow) -> int:
    return flow.source


def _target(flow: Flow) -> int:
    return flow.target


def bar_chart(title: str, bars: Sequence[Bar]) -> Chart:
    """Draw metrics as bars from 0 with their intervals as whiskers; at least one bar, no value below 0."""
    top = max(max(bar.value, bar.high or 0.0) for bar in bars) or 1.0
    plot = WIDTH - _LABEL_WIDTH - 64
    parts = []
    for row, bar in enumerate(bars):
        y = row * _ROW_HEIGHT + 5
        middle, length = y + 10, bar.value / top * plot
        parts.append(_label(bar.label, middle, ours=bar.ours))
        parts.append(_rect(_LABEL_WIDTH, y, length, 20, "bar ours" if bar.ours else "bar"))
        end = length
        if bar.low is not None and bar.high is not None:
            left, end = _LABEL_WIDTH + bar.low / top * plot, max(length, bar.high / top * plot)
            right = _LABEL_WIDTH + bar.high / top * plot
            whisker = f"M{left:.1f} {middle - 4}v8m0 -4H{right:.1f}m0 -4v8"
            parts.append(Markup('<path class="whisker" d="{}"/>').format(whisker))
        parts.append(_text(_LABEL_WIDTH + end + 6, middle + 4.5, metric_text(bar.value), "value"))
    words = [
        f"{bar.label} {metric_text(bar.value)}"
        + ("" if bar.low is None or bar.high is None else f" ({metric_text(bar.low)} to {metric_text(bar.high)})")
        for bar in bars
    ]
    summary = f"{title}: " + ", ".join(words) + "."
    return Chart(title, _svg(parts, len(bars) * _ROW_HEIGHT + 2, summary), (), summary)


def dot_chart(title: str, names: Sequence[str], rows: Sequence[Dots]) -> Chart:
    """Draw metrics of several systems as dots on one line a row, from 0; the first system's are larger, with numbers.

    Args:
        title: caption.
        names: of the systems.
        rows: at least one, each with a value (not below 0) or None a system.
    """
    top = max((value for row in rows for value in row.values if value is not None), default=0.0) or 1.0
    zero, plot = _LABEL_WIDTH + 6, WIDTH - _LABEL_WIDTH - 76
    parts, words = [], []
    for number, row in enumerate(rows):
        middle = number * _ROW_HEIGHT + 15
        parts.append(_label(row.label, middle))
        parts.append(Markup('<path class="grid" d="M{} {}h{}"/>').format(zero, middle, plot))
        # The first system is drawn last, on top of the others.
        for system in reversed(range(len(names))):
            value = row.values[system]
            if value is not None:
                style = f"dot fill s{system % SERIES_COLOURS}"
                parts.append(_dot(zero + value / top * plot, middle, 4.5 if system else 7, style))
        if row.values[0] is not None:
            parts.append(_text(zero + plot + 12, middle + 4.5, metric_text(row.values[0]), "value"))
        known = zip(names, row.values, strict=True)
        values = [f"{name} {metric_text(value)}" for name, value in known if value is not None]
        words.append(f"{row.label}: " + (", ".join(values) or "none"))
    legend = tuple((f"s{number % SERIES_COLOURS}", name) for number, name in enumerate(names))
    summary = f"{title}: " + "; ".join(words) + "."
    return Chart(title, _svg(parts, len(rows) * _ROW_HEIGHT + 2, summary), legend, summary)


def usage_chart(title: str, levels: Sequence[tuple[str, int, int, float]]) -> Chart:
    """Draw for each level its capacity, the codewords in use, and the perplexity.

    Args:
        title: caption.
        levels: (name, capacity, codewords in use, perplexity), at least one; perplexity is the number of codewords
            that would spread the items as evenly were they used equally, from 1 to the codewords in use.
    """
    plot = WIDTH - _LABEL_WIDTH - 84
    parts, words = [], []
    for row, (name, size, used, perplexity) in enumerate(levels):
        y = row * _ROW_HEIGHT + 5
        parts.append(_label(name, y + 10))
        parts.append(_rect(_LABEL_WIDTH, y, plot, 20, "track"))
        parts.append(_rect(_LABEL_WIDTH, y, plot * min(used / size, 1.0), 20, "bar used"))
        parts.append(_rect(_LABEL_WIDTH, y, plot * min(perplexity / size, 1.0), 20, "bar ours"))
        parts.append(_text(_LABEL_WIDTH + plot + 6, y + 14.5, f"{used:,} of {size:,}", "value"))
        words.append(f"{name} uses {used:,} of {size:,} codewords, perplexity {perplexity:,.1f}")
    legend = (("k-ours", "perplexity"), ("k-used", "in use"), ("k-track", "never used"))
    summary = f"{title}: " + "; ".join(words) + "."
    return Chart(title, _svg(parts, len(levels) * _ROW_HEIGHT + 2, summary), legend, summary)


def load_chart(title: str, levels: Sequence[tuple[str, Sequence[int]]]) -> Chart:
    """Draw for each level how many items each codeword stands for, the fullest codeword first.

    Args:
        title: caption.
        levels: (name, items under each codeword in use, in any order), at least one, each with at least one codeword.
    """
    plot, tall = WIDTH - _LABEL_WIDTH - 84, 44
    parts, words = [], []
    for row, (name, loads) in enumerate(levels):
        base = row * (tall + 10) + tall + 4
        ordered = sorted(loads, reverse=True)
        shown = [y for _, y in thinned([(float(x), float(y)) for x, y in enumerate(ordered)])]
        wide = plot / len(shown)
        steps = "".join(f"V{base - load / ordered[0] * tall:.1f}h{wide:.3f}" for load in shown)
        parts.append(_label(name, base - tall / 2))
        parts.append(Markup('<path class="area" d="M{} {}{}V{}Z"/>').format(_LABEL_WIDTH, base, Markup(steps), base))
        parts.append(Markup('<path class="grid" d="M{} {}h{}"/>').format(_LABEL_WIDTH, base, plot))
        parts.append(_text(_LABEL_WIDTH + plot + 6, base - tall + 12, f"{ordered[0]:,} most", "value"))
        parts.append(_text(_LABEL_WIDTH + plot + 6, base - 2, f"{ordered[-1]:,} least", "label"))
        words.append(
            f"under {name} the fullest codeword stands for {ordered[0]:,} items, the emptiest for {ordered[-1]:,}"
        )
    summary = f"{title}: " + "; ".join(words) + "."
    return Chart(title, _svg(parts, len(levels) * (tall + 10) + 2, summary), (), summary)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (1, 2, 2.5 or 5 times a power of ten apart) that cover [low, high]; low < high."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours until at most 300 points are left; the first and the last point stay as they are."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    edges = [round(1 + place * (len(points) - 2) / (_MAX_POINTS - 2)) for place in range(_MAX_POINTS - 1)]
    groups = [points[start:stop] for start, stop in pairwise(edges)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]


def shortened(text: str, letters: int) -> str:
    """Cut a text to at most so many letters, the last of them then an ellipsis."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def metric_text(value: float) -> str:
    """Write a metric with four decimals, as tables of the field do."""
    return f"{value:.4f}"


def number_text(value: float) -> str:
    """Write a number with the digits a reader can use: four decimals below 1, four digits from there on."""
    if value == 0 or 1e-3 <= abs(value) < 1:
        return f"{value:.4f}" if value else "0"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def value_text(value: Any) -> str:
    """Write any JSON value for a table cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) < 10_000 else f"{value:,}"
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, list):
        return ", ".join(value_text(part) for part in value) or "none"
    return str(value)


def duration_text(seconds: float) -> str:
    """Write a time in the unit that a reader would use: seconds, minutes or hours."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:,.1f} h"


def power_text(value: float) -> str:
    """Write a large count as a power of ten: 1.2 × 10¹⁵."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits} × 10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return a range wide enough for floats to tell its ticks apart."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return (low - 0.5, high + 0.5) if low else (0.0, 1.0)


def _y_axis(values: Sequence[float], down: Callable[[float], float]) -> Iterable[Markup]:
    decimals = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    if round(values[1] - values[0], decimals) != round(values[1] - values[0], decimals + 1):
        decimals += 1  # steps of 2.5
    tiny = 0 < max(map(abs, values)) < 1e-3
    for value in values:
        yield Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, down(value), WIDTH - _RIGHT)
        text = f"{value:.1e}".replace("e-0", "e-") if tiny and value else f"{value:,.{0 if tiny else decimals}f}"
        yield _text(_LEFT - 8, down(value) + 4.5, text, "label end")


def _x_axis(values: Sequence[float], across: Callable[[float], float]) -> Iterable[Markup]:
    for value in values:
        yield _text(across(value), 250 - _BOTTOM + 18, f"{value:,.6g}", "label middle")


def _svg(parts: Iterable[Markup], height: float, summary: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, summary, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, style, text)


def _label(text: str, middle: float, *, ours: bool = False) -> Markup:
    short = shortened(text, 16)
    style = "label end strong" if ours else "label end"
    return Markup('<text x="{}" y="{:.1f}" class="{}">{}<title>{}</title></text>').format(
        _LABEL_WIDTH - 8, middle + 4.5, style, short, text
    )


def _rect(x: float, y: float, width: float, height: float, style: str) -> Markup:
    return Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.2f}" height="{:.1f}" rx="3" class="{}"/>').format(
        x, y, max(width, 0.0), height, style
    )


def _dot(x: float, y: float, radius: float, style: str) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{}"/>').format(x, y, radius, style)

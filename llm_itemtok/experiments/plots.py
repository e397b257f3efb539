"""Pictures of a results page, as SVG files that stand alone.

Decisions. A results page is Markdown, read on the documentation site and in the repository, and shows its pictures as
image files; so each file carries its own style, in light and in dark, and its own background, because the page around
it may be of the other kind. Nothing is loaded and nothing is run: the fonts are the reader's. All pictures are 440
units wide and at most 620 pixels, so that text stays readable on a phone. Colour never speaks alone: marks are
labelled, and lines beyond six are dashed.

This module knows labels and numbers; it knows nothing of plans, rows or arms.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from llm_itemtok.report.plots import shortened, ticks

_WIDTH, _PIXELS = 440, 620
_MARGIN, _ROW, _LINE, _HEADING, _AXIS = 14, 24, 14, 28, 34
_LETTER = 7.3
"""About how wide a letter is: the reader's font is not known, so a little too much."""
_LONGEST_LINE = 24
_PLOT_HEIGHT = 150
_COLOURS = 6

_STYLE = Markup("""
svg { --page: #ffffff; --ink: #1b2230; --soft: #586174; --grid: #e2e6ec; --zero: #8a94a6;
  --c0: #2f5fd0; --c1: #c2571a; --c2: #0e7a4b; --c3: #9333a8; --c4: #a37500; --c5: #0b7f94; }
@media (prefers-color-scheme: dark) {
  svg { --page: #171b22; --ink: #e6e9ef; --soft: #a6b0c1; --grid: #2d3441; --zero: #75809a;
    --c0: #7ea4ff; --c1: #f19a62; --c2: #5fd39a; --c3: #d48be6; --c4: #e5bf55; --c5: #5cc8dc; }
}
text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--soft); }
.page { fill: var(--page); }
.title { font-size: 14px; font-weight: 650; fill: var(--ink); }
.heading, .strong { font-weight: 600; fill: var(--ink); }
.value { fill: var(--ink); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--grid); fill: none; } .zero { stroke: var(--zero); stroke-width: 1.5; fill: none; }
.span { stroke-width: 2.4; stroke-linecap: round; fill: none; }
.line { stroke-width: 1.4; stroke-linejoin: round; fill: none; } .dashed { stroke-dasharray: 5 3; }
.main { fill: var(--c0); stroke: var(--c0); } .reference { fill: var(--ink); stroke: var(--ink); }
.side { fill: var(--c5); stroke: var(--c5); }
.other { fill: var(--page); stroke: var(--soft); }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
""")


@dataclass(frozen=True)
class Mark:
    """One dot with its interval.

    Attributes:
        label: on the left, on up to three lines if it is long; what is longer still is cut.
        value: where the dot is.
        low: end of the interval, at most `value`.
        high: end of the interval, at least `value`.
        text: the value in words, on the right.
        kind: `main`, `reference`, `side` or `other`: how it is coloured.
    """

    label: str
    value: float
    low: float
    high: float
    text: str
    kind: str


@dataclass(frozen=True)
class Line:
    """One curve: (x, y) points in order of x, at least one; lines of one group share colour and legend."""

    group: str
    points: Sequence[tuple[float, float]]


def interval_picture(
    title: str,
    panels: Sequence[tuple[str, Sequence[Mark]]],
    *,
    legend: Sequence[tuple[str, str]],
    tick_text: Callable[[float], str],
    one_scale: bool,
) -> str:
    """Draw dots with intervals, one panel below the other, each on an axis that includes 0.

    Args:
        title: says what is drawn.
        panels: heading and marks of each, at least one mark in each.
        legend: (kind, meaning) of the kinds in use.
        tick_text: writes a value of the axis.
        one_scale: the same axis in all panels, for values that may be compared between them.
    """
    marks = [mark for _, of in panels for mark in of]
    left = _MARGIN + 10 + _LETTER * max(len(line) for mark in marks for line in _label_lines(mark.label))
    right = _WIDTH - _MARGIN - 8 - _LETTER * max(len(mark.text) for mark in marks)
    keys = [(f'<circle cx="{{x:.1f}}" cy="{{y:.1f}}" r="4.2" class="{kind}"/>', text) for kind, text in legend]
    parts, y = _head(title, keys)
    for heading, of in panels:
        drawn, height = _intervals(of, _axis_of(marks if one_scale else of), y + _HEADING, (left, right), tick_text)
        parts += [_text(_MARGIN, y + 16, heading, "heading"), *drawn]
        y += _HEADING + height + _AXIS
    return _svg(parts, y, title)


def curve_picture(title: str, panels: Sequence[tuple[str, Sequence[Line]]], *, x_label: str) -> str:
    """Draw curves, one panel below the other, each on axes of its own; at least one line in each."""
    groups = list(dict.fromkeys(line.group for _, of in panels for line in of))
    styles = {group: f"line c{number % _COLOURS}" for number, group in enumerate(groups)}
    styles |= {group: f"{styles[group]} dashed" for group in groups[_COLOURS:]}
    keys = [(f'<path class="{styles[group]}" d="M{{left:.1f}} {{y:.1f}}h18"/>', group) for group in groups]
    parts, y = _head(title, keys)
    for heading, of in panels:
        parts.append(_text(_MARGIN, y + 16, heading, "heading"))
        parts += _curves(of, styles, y + _HEADING)
        y += _HEADING + _PLOT_HEIGHT + _AXIS
    parts.append(_text((_MARGIN + 46 + _WIDTH) / 2, y + 2, x_label, "middle"))
    return _svg(parts, y + 14, title)


def tick_number(value: float) -> str:
    """Write a metric on an axis, without the zeros that say nothing."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _axis_of(marks: Sequence[Mark]) -> list[float]:
    return ticks(*_with_room(min(0.0, *(mark.low for mark in marks)), max(0.0, *(mark.high for mark in marks))))


def _intervals(
    marks: Sequence[Mark],
    axis: Sequence[float],
    top: float,
    ends: tuple[float, float],
    tick_text: Callable[[float], str],
) -> tuple[list[Markup], float]:
    """Draw one panel from `top` on; returns its parts and its height without the texts of the axis."""
    left, right = ends

    def across(value: float) -> float:
        return left + (value - axis[0]) / (axis[-1] - axis[0]) * (right - left)

    rows, y = [], top
    for mark in marks:
        lines = _label_lines(mark.label)
        height = _ROW + _LINE * (len(lines) - 1)
        middle = y + height / 2
        for number, line in enumerate(lines):
            down = middle + 4.5 + _LINE * (number - (len(lines) - 1) / 2)
            rows.append(_text(left - 10, down, line, "strong end" if mark.kind == "main" else "end"))
        rows.append(
            Markup('<path class="span {}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(
                mark.kind, across(mark.low), middle, across(mark.high)
            )
        )
        rows.append(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4.2" class="{}"/>').format(across(mark.value), middle, mark.kind)
        )
        rows.append(_text(_WIDTH - _MARGIN, middle + 4.5, mark.text, "value end"))
        y += height
    grid = [
        Markup('<path class="{}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
            "zero" if abs(tick) < 1e-12 else "grid", across(tick), top - 4, y
        )
        for tick in axis
    ]
    texts = [_text(across(tick), y + 16, tick_text(tick), "middle") for tick in _spread(axis, across)]
    return [*grid, *texts, *rows], y - top


def _curves(lines: Sequence[Line], styles: dict[str, str], top: float) -> Iterable[Markup]:
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_axis, y_axis = ticks(*_with_room(0.0, max(xs))), ticks(*_with_room(min(ys), max(ys)))
    right = max(xs) or 1.0
    left, wide = _MARGIN + 46, _WIDTH - 2 * _MARGIN - 56

    def across(x: float) -> float:
        return left + x / right * wide

    def down(y: float) -> float:
        return top + _PLOT_HEIGHT - (y - y_axis[0]) / (y_axis[-1] - y_axis[0]) * _PLOT_HEIGHT

    for tick in y_axis:
        yield Markup('<path class="grid" d="M{:.1f} {:.1f}h{:.1f}"/>').format(left, down(tick), wide)
        yield _text(left - 8, down(tick) + 4.5, tick_number(tick), "end")
    for tick in _spread([x for x in x_axis if x <= right], across):
        yield _text(across(tick), top + _PLOT_HEIGHT + 17, f"{tick:,.6g}", "middle")
    for line in lines:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)
        yield Markup('<polyline class="{}" points="{}"/>').format(styles[line.group], path)


def _head(title: str, keys: Sequence[tuple[str, str]]) -> tuple[list[Markup], float]:
    """Draw title and legend; `keys` are (SVG with places for x, left and y, text). Returns where they end."""
    parts, y = [], 0.0
    for line in _wrapped(title, int((_WIDTH - 2 * _MARGIN) / 7.4)):
        y += 19
        parts.append(_text(_MARGIN, y + 5, line, "title"))
    x, y = float(_MARGIN), y + 24
    for symbol, text in keys:
        text = shortened(text, 48)
        width = 36 + _LETTER * len(text)
        if x > _MARGIN and x + width > _WIDTH:
            x, y = float(_MARGIN), y + 18
        parts.append(Markup(symbol.format(x=x + 9, left=x, y=y)))
        parts.append(_text(x + 23, y + 4.5, text, ""))
        x += width
    return parts, y + 14


def _label_lines(label: str) -> list[str]:
    """Break a long label; what three lines do not hold is cut."""
    first, second, *rest = [*_wrapped(label, _LONGEST_LINE), ""]
    return [shortened(line, _LONGEST_LINE) for line in (first, second, " ".join(rest).strip()) if line]


def _wrapped(text: str, letters: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _with_room(low: float, high: float) -> tuple[float, float]:
    """Return a range wide enough for floats to tell its ticks apart."""
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - 0.5, low + 0.5)


def _spread(values: Sequence[float], across: Callable[[float], float]) -> Sequence[float]:
    """Leave out every other tick's text where they would touch, but never that of 0."""
    if all(across(right) - across(left) >= 52 for left, right in pairwise(values)):
        return values
    zero = min(range(len(values)), key=lambda number: abs(values[number]))
    return values[zero % 2 :: 2]


def _svg(parts: Iterable[Markup], height: float, summary: str) -> str:
    tall = round(height)
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}" role="img">'
            '<title>{}</title><style>{}</style><rect class="page" width="100%" height="100%" rx="8"/>\n{}\n</svg>\n'
        ).format(_WIDTH, tall, _PIXELS, round(tall * _PIXELS / _WIDTH), summary, _STYLE, Markup("\n").join(parts))
    )


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, style, text)

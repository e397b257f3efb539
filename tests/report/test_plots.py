"""Pictures are drawn to scale, say in words what they show, and escape what they are given."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_itemtok.report.plots import (
    Bar,
    Dots,
    Series,
    bar_chart,
    dot_chart,
    duration_text,
    line_chart,
    load_chart,
    number_text,
    power_text,
    shortened,
    thinned,
    ticks,
    usage_chart,
)


@given(st.floats(-100, 100), st.floats(1e-3, 1e6))
def test_ticks_cover_the_range_in_equal_steps(low, width):
    values = ticks(low, low + width)

    assert values[0] <= low + 1e-6 * width
    assert values[-1] >= low + width - 1e-6 * width
    assert 2 <= len(values) <= 9
    steps = [right - left for left, right in pairwise(values)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


@pytest.mark.parametrize("values", [(2.0, 2.0), (2.0, 2.0 + 1e-15), (0.0, 0.0), (1e-7, 3e-7), (-5.0, 1e9)])
def test_any_finite_values_can_be_drawn(values):
    chart = line_chart("Loss", [Series("loss", list(enumerate(values)))], x_label="step")

    assert "nan" not in chart.svg


def test_ticks_are_round():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.013, 0.048) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert ticks(0, 1200) == [0, 250, 500, 750, 1000, 1250]


@given(st.integers(1, 5000))
def test_thinning_keeps_the_ends_and_at_most_300_points_in_order(count):
    points = [(float(x), float(-x)) for x in range(count)]

    kept = thinned(points)

    assert len(kept) == min(count, 300)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert all(left[0] < right[0] for left, right in pairwise(kept))


def test_thinning_averages():
    assert sum(y for _, y in thinned([(float(x), float(x % 2)) for x in range(10_000)])[1:-1]) / 298 == pytest.approx(
        0.5, abs=0.01
    )


def test_bars_are_to_scale():
    svg = bar_chart("Recall@10", [Bar("a", 0.02), Bar("b", 0.04, 0.03, 0.05, ours=True)]).svg

    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]

    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-3)
    assert svg.count('class="whisker"') == 1


def test_bars_of_nothing_but_zeros_are_drawn():
    assert "0.0000" in bar_chart("Recall@10", [Bar("cold", 0.0, 0.0, 0.0)]).svg


def test_dots_are_to_scale_and_a_missing_value_has_none():
    chart = dot_chart("Recall@10", ["ours", "markov"], [Dots("head", [0.1, 0.2]), Dots("cold", [0.0, None])])

    places = {
        name: [float(x) for x in re.findall(rf'<circle cx="([\d.]+)"[^>]*class="dot fill {style}"', chart.svg)]
        for name, style in (("ours", "s0"), ("markov", "s1"))
    }
    zero = places["ours"][1]
    assert len(places["markov"]) == 1
    assert places["markov"][0] - zero == pytest.approx(2 * (places["ours"][0] - zero), abs=0.2)
    assert chart.summary == "Recall@10: head: ours 0.1000, markov 0.2000; cold: ours 0.0000."


def test_a_line_of_one_point_is_a_dot():
    chart = line_chart("Loss", [Series("loss", [(5.0, 2.0)])], x_label="step")

    assert "<circle" in chart.svg
    assert chart.legend == (("s0", "loss: 2"),)


def test_the_best_point_is_named_where_asked_for():
    points = [(10.0, 0.1), (20.0, 0.3), (30.0, 0.2)]

    chart = line_chart("Validation", [Series("NDCG@10", points)], x_label="step", mark_best=True)

    assert chart.legend == (("s0", "NDCG@10: best 0.3000 at 20"),)
    assert chart.svg.count("ring") == 1


def test_usage_and_load_say_their_numbers():
    usage = usage_chart("Codewords in use", [("level-0", 256, 200, 150.25)])
    load = load_chart("Items", [("level-0", [3, 9, 1])])

    assert usage.summary == "Codewords in use: level-0 uses 200 of 256 codewords, perplexity 150.2."
    assert load.summary == "Items: under level-0 the fullest codeword stands for 9 items, the emptiest for 1."


def test_labels_cannot_write_markup():
    nasty = '"><script>'

    charts = [
        line_chart(nasty, [Series(nasty, [(0, 1), (1, 2)])], x_label=nasty),
        bar_chart(nasty, [Bar(nasty, 0.5)]),
        dot_chart(nasty, [nasty], [Dots(nasty, [0.5])]),
        usage_chart(nasty, [(nasty, 4, 3, 2.0)]),
        load_chart(nasty, [(nasty, [1])]),
    ]

    assert all("<script>" not in chart.svg and '""' not in chart.svg for chart in charts)


def test_a_long_name_is_cut_and_kept_in_full_beside():
    svg = bar_chart("Recall@10", [Bar("a-very-long-baseline-name", 0.5)]).svg

    assert ">a-very-long-bas…<title>a-very-long-baseline-name</title>" in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.06123, "0.0612"), (0.0002, "2.00e-04"), (3.14159, "3.142"), (12345.6, "12,346"), (-2.5, "-2.5")],
)
def test_numbers_have_the_digits_a_reader_can_use(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.314, "0.31 s"), (9.94, "9.9 s"), (42.4, "42 s"), (99.6, "2 min"), (1020, "17 min"), (6300, "1.8 h")],
)
def test_a_time_has_the_unit_a_reader_would_use(seconds, text):
    assert duration_text(seconds) == text


def test_large_counts_are_powers_of_ten():
    assert power_text(1.234e15) == "1.2 × 10¹⁵"
    assert power_text(0) == "0.0 × 10⁰"


@given(st.text(max_size=30), st.integers(1, 20))
def test_a_shortened_text_is_no_longer_than_asked_for(text, letters):
    short = shortened(text, letters)

    assert len(short) == min(len(text), letters)
    assert short == text or (short[-1] == "…" and text.startswith(short[:-1]))

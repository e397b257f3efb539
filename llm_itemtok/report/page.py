"""The report of a run: one self-contained HTML page, made from what stands in the run folder and nothing else.

Decisions. The report is a reader: nothing feeds it during training, so it can be made again at any time, also of a
run that stopped half way. A part whose files are missing is left out and *said* to be missing, in the notes at the
top. The page needs no network and no script, and forbids itself both; everything from the run (titles, recipe, ids)
is escaped. Words such as "above" and "below" a baseline are used only where the 95 % intervals do not overlap.

This module decides what to show, of item tokens `codes` does; `run_folder` reads, `plots` and
`tree` draw, `page.html.jinja` lays out. No torch, no transformers, no training code.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from llm_itemtok import artifacts
from llm_itemtok.evaluation.metrics import METRIC_KEYS, metric_name
from llm_itemtok.report import codes, paths, rescoring, updates, weights
from llm_itemtok.report.plots import (
    SERIES_COLOURS,
    Bar,
    Chart,
    Dots,
    Series,
    bar_chart,
    dot_chart,
    duration_text,
    line_chart,
    metric_text,
    power_text,
    value_text,
)
from llm_itemtok.report.run_folder import RunFolder, read_run

_HEADLINE = ("recall@10", "ndcg@10")
_FEW_USERS = 1000
_ORACLE = "oracle"
"""On synthetic data the generator itself is measured among the baselines. It is a bound and no rival."""

_OURS = "this model"
_BESIDE = 3
"""Baselines drawn beside the model by segment; more would hide each other."""

_SEGMENTS = (
    ("head", "Head: targets among the 20\u00a0% of items with most training interactions."),
    ("tail", "Tail: all other items."),
    ("cold", "Cold: items without any."),
    (r"history \d+(-\d+|\+)?", "History: number of items the user had before."),
    (
        r"(same-time|other) step",
        "Same-time step: the target bears the time of the item before it, so that their order may be chance.",
    ),
)
"""Pattern of a segment's whole name → what it is, in the order of the page. Other segments are the recipe's, whose
rules may be called `head` or `history` too, but go on with `up` or a colon."""

_RULES = {
    "best": ("Best", "of the users whose target was found, those where it stood highest"),
    "median": ("Median", "those in the middle, by rank, of the users whose target was found"),
    "worst": ("Worst", "users whose target was not found, or where it stood lowest if all were found"),
}


def write_report(run: Path | str) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run: the folder; `recipe.yaml` must stand in it, everything else may be missing.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: if the folder is no run, or a file in it cannot be read as what it should be.
        OSError: if the page cannot be written.
    """
    page = Path(run) / artifacts.REPORT
    artifacts.write_text(page, render_report(run))
    return page


def render_report(run: Path | str) -> str:
    """Return the page that `write_report` writes; raises the same `ArtifactError`."""
    return _rendered(read_run(Path(run)))


def render_codes(shown: Sequence[RunFolder], lead: str, movement: codes.Movement | None = None) -> str:
    """Return a page about item tokens alone.

    Args:
        shown: one or more tables of codes (`run_folder.codes_alone`); the first gives the page its title.
        lead: the sentence under the title.
        movement: what moved from the first to the second.
    """
    return _rendered(shown[0], lead, [codes.part(found) for found in shown], movement)


def _rendered(
    found: RunFolder,
    lead: str = "",
    token_parts: Sequence[codes.Part] = (),
    movement: codes.Movement | None = None,
) -> str:
    """Lay out what there is; with a `lead`, as a page about item tokens alone."""
    return _template().render(
        run=found,
        lead=lead,
        choices=_choices(found.recipe),
        verdict=_verdict(found.metrics),
        systems=_systems(found.metrics),
        oracle=_ORACLE,
        series=SERIES_COLOURS,
        metric_rows=_metric_rows(found.metrics),
        fitting_rows=_fitting_rows(found.metrics),
        result_charts=_result_charts(found.metrics),
        training_charts=[
            *_training_charts(found.log),
            *(chart for part in (weights, paths, rescoring) for chart in part.charts(found)),
        ],
        training_facts=_training_facts(found.metrics.get("training", {})),
        segments=_segments(found.metrics),
        token_parts=token_parts or [codes.part(found)],
        movement=movement,
        updates=updates.part(found),
        examples=_examples(found.examples),
        notes=[*found.notes, *_observations(found)],
        protocol=_flat(found.metrics.get("protocol", {})),
        speed=_flat(found.metrics.get("speed", {})),
        environment=_flat(found.environment),
    )


def segment_hints(names: Iterable[str]) -> list[str]:
    """Say what segments are, a sentence for each kind of them.

    Args:
        names: of segments, as they stand in `metrics.json`.
    """
    left, hints = set(names), []
    for pattern, hint in _SEGMENTS:
        known = {name for name in left if re.fullmatch(pattern, name)}
        hints += [hint] if known else []
        left -= known
    if left:
        hints.append("The remaining segments are those of the recipe (`evaluation.segments`).")
    return hints


@functools.cache
def _template() -> jinja2.Template:
    # Jinja escapes by file extension unless told otherwise, and `.jinja` is not one it knows.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {"number": value_text, "metric": metric_text, "code": _code}
    environment.filters |= filters
    return environment.get_template("page.html.jinja")


# --------------------------------------------------------------------------------------------------- what is shown


def _choices(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pick the settings a reader asks for first."""
    flat = dict(_flat(recipe))
    levels, size = flat.get("tokenizer.levels"), flat.get("tokenizer.codebook_size")
    tokenizer = flat.get("tokenizer.kind", "")
    if tokenizer and levels and size:
        tokenizer += f", {levels} × {size}"
    found = {
        "Data": Path(flat.get("data.path", "")).name or flat.get("data.source", ""),
        "Item vectors": flat.get("vectors.kind", ""),
        "Item tokens": tokenizer,
        "Model": " + ".join(
            part for part in (flat.get("model.name", ""), flat.get("model.adapter", "")) if part not in ("", "none")
        ),
        "Updates": flat.get("update.kind", ""),
        "Seed": flat.get("seed", ""),
    }
    return [(name, value) for name, value in found.items() if value]


def _systems(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the model and the baselines, each with its metrics and intervals."""
    systems = [(_OURS, metrics, True)] if "test" in metrics else []
    systems += [(name, part, False) for name, part in metrics.get("baselines", {}).items()]
    return [
        {
            "name": name,
            "test": part.get("test", {}),
            "ci95": part.get("ci95", {}),
            "validation": part.get("validation", {}),
            "segments": part.get("segments", {}),
            "seconds": part.get("training", {}).get("seconds") if ours else part.get("seconds"),
            "settings": _chosen(metrics) if ours else part.get("settings", {}),
            "ours": ours,
        }
        for name, part, ours in systems
    ]


def _chosen(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What validation chose for the model beside its best step: whether items come out again, a dense model's share."""
    protocol = metrics.get("protocol", {})
    chosen = {"repeats": protocol.get("repeats", True)} if "repeats" in metrics.get("training", {}) else {}
    return chosen | ({"dense share": protocol["dense_share"]} if "dense_share" in protocol else {})


def _metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """List each metric with a cell a system: value, interval, and whether it is the best of the row."""
    systems = _systems(metrics)
    rows = []
    for key in METRIC_KEYS:
        values = [part["test"].get(key) for part in systems]
        known = [part["test"][key] for part in systems if key in part["test"] and part["name"] != _ORACLE]
        cells = [
            {"value": value, "interval": part["ci95"].get(key), "best": len(known) > 1 and value == max(known)}
            for value, part in zip(values, systems, strict=True)
        ]
        if any(value is not None for value in values):
            rows.append((metric_name(key), cells))
    return rows


def _fitting_rows(metrics: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """List how each system was fitted, a cell of lines a system.

    Rows that no baseline has are left out, but for what was chosen for the model.
    """
    systems = _systems(metrics)
    key = "ndcg@10"
    rows = [
        (
            f"{metric_name(key)} on validation",
            [[metric_text(part["validation"][key])] if key in part["validation"] else [] for part in systems],
        ),
        ("Time", [[] if part["seconds"] is None else [duration_text(part["seconds"])] for part in systems]),
        ("Settings chosen", [_setting_lines(part["settings"]) for part in systems]),
    ]
    telling = [place for place, part in enumerate(systems) if part["settings"] or not part["ours"]]
    return [(name, cells) for name, cells in rows if any(cells[place] for place in telling)]


def _setting_lines(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as they were given: 0.8 and not 0.8000."""
    return [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value_text(value)}"
        for name, value in settings.items()
    ]


def _verdict(metrics: Mapping[str, Any], key: str = "recall@10") -> str:
    """Say in one sentence where the model stands; stronger words only where intervals do not overlap.

    The best baseline is chosen on validation, never on the test that it is compared on, unless one has no validation.
    """
    if key not in metrics.get("test", {}):
        return ""
    ours, (low, high) = metrics["test"][key], metrics.get("ci95", {}).get(key, (None, None))
    interval = "" if low is None else f" (95\u00a0% interval {metric_text(low)} to {metric_text(high)})"
    sentence = f"Recall@10 on test is {metric_text(ours)}{interval}"
    baselines = {
        name: part
        for name, part in metrics.get("baselines", {}).items()
        if key in part.get("test", {}) and name != _ORACLE
    }
    if not baselines:
        return sentence + ". No baseline was measured on this split."
    chosen_on = "validation" if all(key in part.get("validation", {}) for part in baselines.values()) else "test"
    best = max(baselines, key=lambda name: baselines[name][chosen_on][key])
    value = baselines[best]["test"][key]
    best_low, best_high = baselines[best].get("ci95", {}).get(key, (value, value))
    if low is not None and low > best_high:
        relation = "above"
    elif high is not None and high < best_low:
        relation = "below"
    else:
        relation = "not clearly apart from"
    ratio = f", {ours / value:.2f} times its value" if value else ""
    named = "the best baseline" if chosen_on == "validation" else "the best baseline on test"
    return f"{sentence}: {relation} {named}, {best}, at {metric_text(value)}{ratio}."


def _result_charts(metrics: Mapping[str, Any]) -> list[Chart]:
    charts = []
    for key in _HEADLINE:
        bars = [
            _bar(part["name"], part["test"][key], part["ci95"].get(key), ours=part["ours"])
            for part in _systems(metrics)
            if key in part["test"]
        ]
        if bars:
            charts.append(bar_chart(f"{metric_name(key)} on test, with 95\u00a0% intervals", bars))
    return charts


def _bar(name: str, value: float, interval: list[float] | None, *, ours: bool) -> Bar:
    low, high = interval or (None, None)
    return Bar(name, value, low, high, ours)


def _training_charts(log: Iterable[Mapping[str, Any]]) -> list[Chart]:
    curves = _curves(log)
    terms = [name for name in curves if name.startswith("loss/")]
    validation = [f"validation/{key}" for key in _HEADLINE if f"validation/{key}" in curves] or [
        name for name in curves if name.startswith("validation/") and name != "validation/loss"
    ][:3]
    charts = []
    losses = [Series(name, curves[name]) for name in ("loss", "validation/loss") if name in curves]
    if losses:
        charts.append(line_chart("Loss", losses, x_label="step"))
    if validation:
        named = [Series(metric_name(name.removeprefix("validation/")), curves[name]) for name in validation]
        charts.append(line_chart("Validation metrics", named, x_label="step", from_zero=True, mark_best=True))
    if len(terms) > 1:
        named = [Series(name.removeprefix("loss/"), curves[name]) for name in terms]
        charts.append(line_chart("Loss by term", named, x_label="step"))
    if "learning_rate" in curves:
        charts.append(
            line_chart(
                "Learning rate", [Series("learning rate", curves["learning_rate"])], x_label="step", from_zero=True
            )
        )
    return charts


def _curves(log: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Collect (step, value) of each logged number; a step logged again after a resume replaces the older one."""
    curves: dict[str, dict[float, float]] = {}
    for line in log:
        for name, value in line.items():
            if "step" in line and name not in ("step", "epoch") and _is_number(value):
                curves.setdefault(name, {})[float(line["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def _training_facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what training took, as far as it was measured."""
    forms: dict[str, tuple[str, Callable[..., str]]] = {
        "steps": ("Steps", "{:,}".format),
        "best_step": ("Best at step", "{:,}".format),
        "seconds": ("Time", duration_text),
        "targets_seen": ("Targets seen", "{:,}".format),
        "parameters": ("Parameters trained", "{:,}".format),
        "flops": ("Floating-point operations, estimated", power_text),
        "peak_mb": ("Memory at most", "{:,.0f} MB".format),
    }
    return [(name, form(training[key])) for key, (name, form) in forms.items() if training.get(key) is not None]


def _segments(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare the table and the picture of the segments: the model beside the baselines measured on them."""
    parts = metrics.get("segments", {})
    key = _HEADLINE[0]
    others = [part for part in _systems(metrics) if part["segments"] and not part["ours"]]
    others.sort(key=lambda part: (part["name"] == _ORACLE, -part["test"].get(key, 0.0)))
    columns = [(_OURS, parts), *((part["name"], part["segments"]) for part in others)]
    rows = [
        (name, part.get("users", 0), [column.get(name, {}).get(key) for _, column in columns])
        for name, part in parts.items()
    ]
    drawn = [part for part in others if part["name"] != _ORACLE][:_BESIDE]
    dots = [Dots(name, values[: len(drawn) + 1]) for name, _, values in rows if values[0] is not None]
    if dots and key in metrics.get("test", {}):
        dots.insert(0, Dots("all users", [metrics["test"][key], *(part["test"].get(key) for part in drawn)]))
    names = [_OURS, *(part["name"] for part in drawn)]
    return {
        "metric": metric_name(key),
        "columns": [name for name, _ in columns],
        "rows": rows,
        "charts": [dot_chart(f"{metric_name(key)} by segment", names, dots)] if dots else [],
        "hints": segment_hints(parts),
    }


def _examples(examples: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Sort the example users by the rule that chose them: heading, rule, users; the last for users without a rule."""
    by_rule: dict[str, list[Mapping[str, Any]]] = {rule: [] for rule in (*_RULES, "")}
    for example in examples:
        rule = example.get("rule", "")
        by_rule[rule if rule in _RULES else ""].append(example)
    return [(*_RULES.get(rule, ("", "")), chosen) for rule, chosen in by_rule.items() if chosen]


def _observations(run: RunFolder) -> list[str]:
    """Say what a careful reader would notice in the numbers."""
    notes = []
    for name in ("loss", *sorted({key for line in run.log for key in line if key.startswith("loss/")})):
        bad = [line.get("step") for line in run.log if isinstance(line.get(name), float) and not _is_number(line[name])]
        if bad:
            notes.append(f"`{name}` was not a finite number at {len(bad)} logged steps, first at step {bad[0]}.")
    points = _curves(run.log).get("validation/ndcg@10", [])
    if len(points) >= 2 and max(points, key=lambda point: point[1]) == points[-1]:
        notes.append("Validation NDCG@10 was best at the last measurement: longer training may still help.")
    for level in codes.levels(run.quality):
        if level["used"] < level["size"] / 2 and not level.get("counts_only"):
            notes.append(f"{level['name']} uses only {level['used']:,} of its {level['size']:,} codewords.")
    users = [run.metrics.get("segments", {}).get(name, {}).get("users", 0) for name in ("head", "tail")]
    if 0 < sum(users) < _FEW_USERS:
        notes.append(f"Test has {sum(users):,} users only: differences of a few per cent cannot be told from chance.")
    return notes


# ------------------------------------------------------------------------------------------------------- small parts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _code(text: str) -> Markup:
    """Set what stands between backquotes as code, and escape everything."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:  # one without its partner
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested mappings into (dotted name, text) pairs."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value_text(value)))
    return pairs

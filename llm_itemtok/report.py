"""The report of a run: one self-contained HTML page, made from what stands in the run folder and nothing else.

Decisions. The report is a reader: nothing feeds it during training, so it can be made again at any time, also of a
run that stopped half way. A part whose files are missing is left out and *said* to be missing, in the notes at the
top. The page needs no network and no script, and forbids itself both; everything from the run (titles, recipe, ids)
is escaped. Words such as "above" and "below" a baseline are used only where the 95 % intervals do not overlap.

This module decides what to show; `report_run` reads, `report_plots` draws, `report.html.jinja` lays out. No
torch, no transformers, no training code.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from llm_itemtok import artifacts
from llm_itemtok.evaluation.metrics import METRIC_KEYS
from llm_itemtok.report_plots import (
    Bar,
    Chart,
    Series,
    bar_chart,
    line_chart,
    load_chart,
    metric_text,
    number_text,
    usage_chart,
)
from llm_itemtok.report_run import RunFolder, read_run

_HEADLINE = ("recall@10", "ndcg@10")
_FEW_USERS = 1000
_ORACLE = "oracle"
"""On synthetic data the generator itself is measured among the baselines. It is a bound and no rival."""

_QUALITY_NAMES = {
    "items": "Items",
    "capacity": "Codes there is room for",
    "collision_rate": "Items that shared their code with another, before resolution",
    "unique": "Each item has a code of its own",
    "reconstruction_error": "Squared error of the vectors rebuilt from codes, as a share of their variance",
}
_SHARES = ("collision_rate", "reconstruction_error")


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
    found = read_run(Path(run))
    # Jinja escapes by file extension unless told otherwise, and `.jinja` is not one it knows.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _value_text, "metric": metric_text}
    return environment.get_template("report.html.jinja").render(
        run=found,
        choices=_choices(found.recipe),
        verdict=_verdict(found.metrics),
        systems=_systems(found.metrics),
        oracle=_ORACLE,
        metric_rows=_metric_rows(found.metrics),
        headline=[(key, _metric_name(key)) for key in (*_HEADLINE, "mrr@20")],
        result_charts=_result_charts(found.metrics),
        training_charts=_training_charts(found.log),
        segments=_segments(found.metrics),
        token_charts=_token_charts(found),
        levels=_levels(found.quality),
        quality_rows=_quality_rows(found.quality),
        token_verdict=_resolved(list(found.quality.values())[-1]).get("verdict", "") if found.quality else "",
        notes=[*found.notes, *_observations(found)],
        protocol=_flat(found.metrics.get("protocol", {})),
        speed=_flat(found.metrics.get("speed", {})),
        environment=_flat(found.environment),
    )


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
    systems = [("this model", metrics, True)] if "test" in metrics else []
    systems += [(name, part, False) for name, part in metrics.get("baselines", {}).items()]
    return [
        {"name": name, "test": part.get("test", {}), "ci95": part.get("ci95", {}), "ours": ours}
        for name, part, ours in systems
    ]


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
            rows.append((_metric_name(key), cells))
    return rows


def _verdict(metrics: Mapping[str, Any], key: str = "recall@10") -> str:
    """Say in one sentence where the model stands; stronger words only where intervals do not overlap."""
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
    best = max(baselines, key=lambda name: baselines[name]["test"][key])
    value = baselines[best]["test"][key]
    best_low, best_high = baselines[best].get("ci95", {}).get(key, (value, value))
    if low is not None and low > best_high:
        relation = "above"
    elif high is not None and high < best_low:
        relation = "below"
    else:
        relation = "not clearly apart from"
    ratio = f", {ours / value:.2f} times its value" if value else ""
    return f"{sentence}: {relation} the best baseline, {best}, at {metric_text(value)}{ratio}."


def _result_charts(metrics: Mapping[str, Any]) -> list[Chart]:
    charts = []
    for key in _HEADLINE:
        bars = [
            _bar(part["name"], part["test"][key], part["ci95"].get(key), ours=part["ours"])
            for part in _systems(metrics)
            if key in part["test"]
        ]
        if bars:
            charts.append(bar_chart(f"{_metric_name(key)} on test, with 95\u00a0% intervals", bars))
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
        named = [Series(_metric_name(name.removeprefix("validation/")), curves[name]) for name in validation]
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


def _segments(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare the table and the picture of the segments."""
    parts = metrics.get("segments", {})
    key = _HEADLINE[0]
    bars = [Bar(name, part[key]) for name, part in parts.items() if key in part]
    if bars and key in metrics.get("test", {}):
        bars.insert(0, Bar("all users", metrics["test"][key], ours=True))
    return {"rows": parts, "charts": [bar_chart(f"{_metric_name(key)} by segment", bars)] if bars else []}


def _levels(quality: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """List the levels of the newest codes, as they are once collisions are resolved."""
    return list(_resolved(list(quality.values())[-1]).get("levels", [])) if quality else []


def _resolved(quality: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part about the codes in use: they differ from the fitted ones where collisions were resolved."""
    return quality.get("resolved", quality)


def _token_charts(run: RunFolder) -> list[Chart]:
    charts = []
    levels = [
        (str(level["name"]), int(level["size"]), int(level["used"]), float(level["perplexity"]))
        for level in _levels(run.quality)
    ]
    if levels:
        charts.append(usage_chart("Codewords in use", levels))
    if run.codes is not None:
        loads = [
            (name, np.unique(run.codes.table[:, level], return_counts=True)[1].tolist())
            for level, name in enumerate(run.codes.names)
        ]
        charts.append(load_chart("Items under each codeword, fullest first", loads))
    return charts


def _quality_rows(quality: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """List the numbers about the whole codes, a cell a version."""
    versions = [dict(_quality_figures(part)) for part in quality.values()]
    names = dict.fromkeys(name for figures in versions for name in figures)
    return [(name, [figures.get(name, "–") for figures in versions]) for name in names]


def _quality_figures(quality: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    figures = {**quality, **_resolved(quality)}
    for key, value in figures.items():
        if key == "neighbours":
            for row in value:
                name = f"Nearest items with the same first {row['depth']} of the code (by chance)"
                yield name, f"{row['share']:.1%} ({row['chance']:.1%})"
        elif not isinstance(value, list | Mapping) and key != "verdict":
            name = _QUALITY_NAMES.get(key, key)
            yield name, f"{value:.1%}" if key in _SHARES else _value_text(value)


def _observations(run: RunFolder) -> list[str]:
    """Say what a careful reader would notice in the numbers."""
    notes = []
    for name in ("loss", *sorted({key for line in run.log for key in line if key.startswith("loss/")})):
        bad = [line.get("step") for line in run.log if isinstance(line.get(name), float) and not _is_number(line[name])]
        if bad:
            notes.append(f"`{name}` was not a finite number at {len(bad)} logged steps, first at step {bad[0]}.")
    points = _curves(run.log).get("validation/ndcg@10", [])
    if len(points) >= 3 and max(points, key=lambda point: point[1]) == points[-1]:
        notes.append("Validation NDCG@10 was best at the last measurement: longer training may still help.")
    for level in _levels(run.quality):
        if level["used"] < level["size"] / 2 and not level.get("counts_only"):
            notes.append(f"{level['name']} uses only {level['used']:,} of its {level['size']:,} codewords.")
    users = [run.metrics.get("segments", {}).get(name, {}).get("users", 0) for name in ("head", "tail")]
    if 0 < sum(users) < _FEW_USERS:
        notes.append(f"Test has {sum(users):,} users only: differences of a few per cent cannot be told from chance.")
    return notes


# ------------------------------------------------------------------------------------------------------- small parts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _metric_name(key: str) -> str:
    """Write `ndcg@10` as NDCG@10 and `recall@10` as Recall@10."""
    family, at, cutoff = key.partition("@")
    return (family.upper() if family in ("ndcg", "mrr") else family.capitalize()) + at + cutoff


def _value_text(value: Any) -> str:
    """Write any JSON value for a table cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) < 10_000 else f"{value:,}"
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, list):
        return ", ".join(_value_text(part) for part in value) or "none"
    return str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested mappings into (dotted name, text) pairs."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", _value_text(value)))
    return pairs

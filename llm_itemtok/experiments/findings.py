"""What a plan found: the numbers of its results page, from rows, ranks and run records.

Decisions. Every comparison is made on exactly the users that both sides have, which must be all users of the block:
runs of one block that were ranked on different users are refused, never cut to what they share. Two arms are paired
on the seeds that both have. Ranks that do not give the metric that stands in the row are refused as stale. A row
without ranks is left out of means and tests and named in `Block.notes`. The best model and the best baseline of a
block are chosen on validation, never on the test that they are then compared on; where a baseline's file has no
validation, the choice falls on test and `Block.chosen_on` says so. Baselines are the same for all runs of a block, but
where some arms leave out items of a history, those that could do so, too, count; records that do not agree on one are
named in `Block.notes`.

This module knows numbers and names; `page` finds the words, `plots` draws. It reads no files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llm_itemtok.errors import ArtifactError
from llm_itemtok.evaluation.metrics import gains
from llm_itemtok.evaluation.paired import Estimate, PairedDifference, mean_interval, paired_difference

KEYS = ("recall@10", "ndcg@10")
"""The metrics of the page; the first one carries the answer and the choice of the best."""

PLATEAU_GAIN = 0.02
"""An arm stands at its plateau when the last third of training raised validation NDCG@10 by less than this share: less
than half of what three seeds on some 20,000 users can tell apart."""

_ORACLE = "oracle"
"""On synthetic data the generator itself is measured among the baselines. It is a bound and no rival."""

CHOOSE_BY = "ndcg@10"
"""Validation metric that early stopping and tuning go by."""

_IDENTITY = {"stage", "block", "dataset", "arm", "control", "probe", "seed", "recipe_sha256", "versions"}
_NEEDED = _IDENTITY | {"test", "validation", "steps", "targets_seen", "flops", "seconds", "peak_mb"}
_TOLERANCE = 2e-6

Row = Mapping[str, Any]
"""One entry of `docs/results/NAME.json`."""


@dataclass(frozen=True)
class Arm:
    """One arm of a block.

    Attributes:
        name: of the plan.
        control: whether gains are measured against it.
        probe: whether it is a side comparison.
        rows: by seed.
        test: mean over seeds and users under each of `KEYS`; without an interval (all three numbers alike) where no
            row has ranks.
        differences: to the control, under each of `KEYS`; empty for the control and where no seed of both has ranks.
        validation: mean over seeds under each of `KEYS`.
        segments: name → users and mean Recall@10 over seeds.
    """

    name: str
    control: bool
    probe: bool
    rows: tuple[Row, ...]
    test: Mapping[str, Estimate]
    differences: Mapping[str, PairedDifference]
    validation: Mapping[str, float]
    segments: Mapping[str, tuple[int, float]]


@dataclass(frozen=True)
class Baseline:
    """One baseline of a block, as the first run record that has it tells it; `validation` may be empty."""

    name: str
    test: Mapping[str, Estimate]
    validation: Mapping[str, float]
    settings: Mapping[str, Any]
    segments: Mapping[str, tuple[int, float]]


class Note(NamedTuple):
    """What a reader must know of a block: the words, and the arm or baseline that they are about (empty for all)."""

    about: str
    text: str


class Edge(NamedTuple):
    """A tuned setting of an arm whose best value is the `lowest` or the `highest` of those tried."""

    arm: str
    setting: str
    value: float
    end: str


@dataclass(frozen=True)
class Block:
    """Matched confirmation runs on one data set: control first, then methods, then probes; and what they lack."""

    name: str
    arms: tuple[Arm, ...]
    baselines: tuple[Baseline, ...]
    notes: tuple[Note, ...]

    @property
    def control(self) -> Arm | None:
        """The arm that gains are measured against, None while it has not run."""
        return next((arm for arm in self.arms if arm.control), None)

    @property
    def best_arm(self) -> Arm:
        """The arm of the highest validation Recall@10."""
        return max(self.arms, key=lambda arm: arm.validation[KEYS[0]])

    @property
    def chosen_on(self) -> str:
        """What the best baseline was chosen on: `validation`, or `test` where a baseline has no validation."""
        rivals = [baseline for baseline in self.baselines if baseline.name != _ORACLE]
        return "validation" if all(KEYS[0] in baseline.validation for baseline in rivals) else "test"

    @property
    def best_baseline(self) -> Baseline | None:
        """The baseline of the highest Recall@10 on `chosen_on`; the oracle of synthetic data is none."""
        rivals = [baseline for baseline in self.baselines if baseline.name != _ORACLE]
        if self.chosen_on == "validation":
            return max(rivals, key=lambda baseline: baseline.validation[KEYS[0]], default=None)
        return max(rivals, key=lambda baseline: baseline.test[KEYS[0]].value, default=None)


@dataclass(frozen=True)
class Curve:
    """Validation NDCG@10 over the steps of one run: (step, value) in order of steps, at least one."""

    dataset: str
    arm: str
    seed: int
    points: tuple[tuple[float, float], ...]

    @property
    def best(self) -> tuple[float, float]:
        """The highest point, the first of them."""
        return max(self.points, key=lambda point: point[1])

    @property
    def late_gain(self) -> float | None:
        """How much higher the best of the last third is than the best before it, as a share; None if too short."""
        cut = self.points[-1][0] * 2 / 3
        early = max((value for step, value in self.points if step <= cut), default=0.0)
        late = [value for step, value in self.points if step > cut]
        return max(late) / early - 1 if early > 0 and late else None


def confirmed(rows: Sequence[Row], ranks: pa.Table, records: Mapping[str, Mapping[str, Any]]) -> tuple[Block, ...]:
    """Compare the arms of every confirmation block.

    Args:
        rows: of `docs/results/NAME.json`, in the plan's order.
        ranks: of `docs/results/NAME.ranks.parquet`: recipe_sha256, user, rank (0 or at least 1).
        records: the run records, under the hash of their recipe.

    Returns:
        Blocks in order of their first row.

    Raises:
        ArtifactError: if rows lack a key or contradict each other, runs of a block have different users, or ranks are
            not those of the row.
    """
    for row in rows:
        if missing := sorted(_NEEDED - set(row)):
            raise ArtifactError(f"a row of results must have {', '.join(missing)}; write the rows again, was: {row}")
    by_run = _by_run(ranks)
    confirm = [row for row in rows if row["stage"] == "confirm"]
    return tuple(
        _block(name, [row for row in confirm if row["block"] == name], by_run, records)
        for name in dict.fromkeys(row["block"] for row in confirm)
    )


def curves(rows: Iterable[Row], records: Mapping[str, Mapping[str, Any]]) -> list[Curve]:
    """Collect the validation curves of those rows whose record holds one."""
    found = []
    for row in rows:
        points = _metrics(row, records).get("training", {}).get("curve") or []
        if points:
            ordered = tuple(sorted((float(step), float(value)) for step, value in points))
            # Of a confirmation, the block: entries of a plan may share a data set.
            panel = row["block"] if row["stage"] == "confirm" else row["dataset"]
            found.append(Curve(panel, row["arm"], row["seed"], ordered))
    return found


def best_points(rows: Iterable[Row]) -> dict[str, Row]:
    """Choose the point of the grid that each arm carries on: what a plan's tuning has decided.

    Args:
        rows: of any stage; those of tuning count, each a point.

    Returns:
        Arm → its row of the highest validation `CHOOSE_BY`, of equal ones the first.
    """
    best: dict[str, Row] = {}
    for row in rows:
        if row["stage"] == "screen":
            before = best.get(row["arm"])
            if before is None or row["validation"][CHOOSE_BY] > before["validation"][CHOOSE_BY]:
                best[row["arm"]] = row
    return best


def edges(rows: Iterable[Row]) -> list[Edge]:
    """Find the chosen values beyond which nothing was tried, of numeric settings with at least two values tried."""
    tuning = [row for row in rows if row["stage"] == "screen"]
    found = []
    for arm, best in best_points(tuning).items():
        for setting, value in best.get("settings", {}).items():
            tried = [row.get("settings", {}).get(setting) for row in tuning if row["arm"] == arm]
            if not all(isinstance(of, int | float) and not isinstance(of, bool) for of in tried):
                continue
            if min(tried) < max(tried) and value in (min(tried), max(tried)):
                found.append(Edge(arm, setting, value, "lowest" if value == min(tried) else "highest"))
    return found


def _block(
    name: str,
    rows: Sequence[Row],
    by_run: Mapping[str, tuple[NDArray[np.object_], NDArray[np.float64]]],
    records: Mapping[str, Mapping[str, Any]],
) -> Block:
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    _check_roles(name, by_arm)
    _check_users(name, rows, by_run)
    users = {row["recipe_sha256"]: len(by_run.get(row["recipe_sha256"], [()])[0]) for row in rows}
    per_user = {row["recipe_sha256"]: _gains(row, by_run) for row in rows if users[row["recipe_sha256"]] > 1}
    controls = {row["seed"]: row for row in rows if row["control"]}
    order = sorted(by_arm, key=lambda arm: (not by_arm[arm][0]["control"], by_arm[arm][0]["probe"]))
    notes = [
        Note(row["arm"], f"no ranks of seed {row['seed']} are kept, so means and tests leave it out.")
        for row in rows
        if not users[row["recipe_sha256"]]
    ]
    if 1 in users.values():
        notes.append(Note("", "There is one test user, which says nothing of others: no intervals, no comparisons."))
    if not controls:
        notes.append(Note("", "The control has not run yet, so nothing is compared with it."))
    arms = tuple(_arm(arm, by_arm[arm], controls, per_user, records) for arm in order)
    measured = _measured_baselines(rows, records)
    return Block(
        name,
        arms,
        tuple(_baseline(baseline, of[0]) for baseline, of in measured.items()),
        (*notes, *(note for baseline, of in measured.items() for note in _disagreements(baseline, of))),
    )


def _check_roles(block: str, by_arm: Mapping[str, Sequence[Row]]) -> None:
    controls = sorted({arm for arm, rows in by_arm.items() for row in rows if row["control"]})
    if len(controls) > 1:
        raise ArtifactError(f"block `{block}` must have one control, was: {', '.join(controls)}; correct the plan")
    for arm, rows in by_arm.items():
        if len({(row["control"], row["probe"]) for row in rows}) > 1:
            raise ArtifactError(f"block `{block}`: arm `{arm}` must be control or probe in all its rows or in none")
        seeds = [row["seed"] for row in rows]
        if len(set(seeds)) < len(seeds):
            raise ArtifactError(f"block `{block}`: arm `{arm}` must have one row a seed, was: seeds {sorted(seeds)}")


def _check_users(
    block: str, rows: Sequence[Row], by_run: Mapping[str, tuple[NDArray[np.object_], NDArray[np.float64]]]
) -> None:
    ranked = [row for row in rows if row["recipe_sha256"] in by_run]
    for row in ranked[1:]:
        first, users = by_run[ranked[0]["recipe_sha256"]][0], by_run[row["recipe_sha256"]][0]
        if not np.array_equal(first, users):
            odd = sorted(set(first.tolist()) ^ set(users.tolist()))
            raise ArtifactError(
                f"the runs of block `{block}` must be ranked on the same users, was: {len(odd)} users that only one of "
                f"`{ranked[0]['arm']}` seed {ranked[0]['seed']} and `{row['arm']}` seed {row['seed']} has, such as "
                f"{odd[0]!r}; run both on the same data"
            )


def _gains(
    row: Row, by_run: Mapping[str, tuple[NDArray[np.object_], NDArray[np.float64]]]
) -> dict[str, NDArray[np.float64]]:
    """Return the gain of every user under each of `KEYS`, checked against the row's own metrics."""
    name = f"block `{row['block']}`, arm `{row['arm']}`, seed {row['seed']}"
    try:
        found = {key: gains(by_run[row["recipe_sha256"]][1], key) for key in KEYS}
    except ValueError as error:
        raise ArtifactError(f"{name}: the ranks cannot be used: {error}") from error
    for key in KEYS:
        if row["test"] is not None and abs(row["test"][key] - found[key].mean()) > _TOLERANCE:
            raise ArtifactError(
                f"{name}: the ranks must give the row's {key} {row['test'][key]:.6f}, was: {found[key].mean():.6f}; "
                "rows and ranks are of different runs, so run the cell again"
            )
    return found


def _arm(
    name: str,
    rows: Sequence[Row],
    controls: Mapping[int, Row],
    per_user: Mapping[str, Mapping[str, NDArray[np.float64]]],
    records: Mapping[str, Mapping[str, Any]],
) -> Arm:
    rows = sorted(rows, key=lambda row: row["seed"])
    ranked = [row for row in rows if row["recipe_sha256"] in per_user]
    test = {}
    for key in KEYS:
        known = [row["test"][key] for row in rows if row["test"] is not None]
        if ranked:
            test[key] = mean_interval(np.stack([per_user[row["recipe_sha256"]][key] for row in ranked]))
        elif known:
            test[key] = Estimate(*[float(np.mean(known))] * 3)
    pairs = [
        (per_user[row["recipe_sha256"]], per_user[controls[row["seed"]]["recipe_sha256"]])
        for row in ranked
        if row["seed"] in controls and controls[row["seed"]]["recipe_sha256"] in per_user
    ]
    differences = {}
    if pairs and not rows[0]["control"]:
        differences = {
            key: paired_difference(np.stack([a[key] for a, _ in pairs]), np.stack([b[key] for _, b in pairs]))
            for key in KEYS
        }
    return Arm(
        name=name,
        control=rows[0]["control"],
        probe=rows[0]["probe"],
        rows=tuple(rows),
        test=test,
        differences=differences,
        validation={key: float(np.mean([row["validation"][key] for row in rows])) for key in KEYS},
        segments=_mean_segments([_metrics(row, records).get("segments", {}) for row in rows]),
    )


def _mean_segments(seeds: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    """Average each segment's Recall@10 over the seeds that have it; empty segments are left out."""
    values: dict[str, list[tuple[int, float]]] = {}
    for segments in seeds:
        for name, part in segments.items():
            if part["users"]:
                values.setdefault(name, []).append((part["users"], part[KEYS[0]]))
    return {name: (of[0][0], float(np.mean([value for _, value in of]))) for name, of in values.items()}


def _measured_baselines(
    rows: Sequence[Row], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Mapping[str, Any]]]:
    """Collect what the records of a block say of each baseline, in order of the rows.

    Where some arms leave out items of a history, those records of a baseline count in which it could, too.
    """
    found: dict[bool, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        metrics = _metrics(row, records)
        of_rule = found.setdefault(metrics.get("protocol", {}).get("repeats", True), {})
        for name, part in metrics.get("baselines", {}).items():
            of_rule.setdefault(name, []).append(part)
    return {**found.get(True, {}), **found.get(False, {})}


def _baseline(name: str, part: Mapping[str, Any]) -> Baseline:
    return Baseline(
        name,
        {key: Estimate(part["test"][key], *part["ci95"][key]) for key in KEYS},
        {key: part["validation"][key] for key in KEYS if key in part.get("validation", {})},
        part.get("settings", {}),
        _mean_segments([part.get("segments", {})]),
    )


def _disagreements(name: str, measured: Sequence[Mapping[str, Any]]) -> list[Note]:
    """Say where runs that should share a baseline do not: by other code, on other data or on another machine."""
    tests = [part["test"] for part in measured]
    largest = max(max(test[key] for test in tests) - min(test[key] for test in tests) for key in tests[0])
    if any(test != tests[0] for test in tests):
        found = f"disagree on its test metrics (by up to {largest:.2g})"
    elif len({part["fingerprint"] for part in measured if "fingerprint" in part}) > 1:
        found = "agree on its test metrics, but made it with different code or settings"
    else:
        return []
    return [Note(name, f"the records of these runs {found}; the first of them is shown.")]


def _metrics(row: Row, records: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    metrics: Mapping[str, Any] = records.get(row["recipe_sha256"], {}).get("metrics", {})
    return metrics


def _by_run(ranks: pa.Table) -> dict[str, tuple[NDArray[np.object_], NDArray[np.float64]]]:
    """Split the ranks by run: users in ascending order, and their ranks."""
    if missing := {"recipe_sha256", "user", "rank"} - set(ranks.column_names):
        raise ArtifactError(f"ranks must have the columns {', '.join(sorted(missing))}, was: {ranks.column_names}")
    if not len(ranks):
        return {}
    ordered = ranks.sort_by([("recipe_sha256", "ascending"), ("user", "ascending")])
    hashes, users = (ordered[name].to_numpy(zero_copy_only=False) for name in ("recipe_sha256", "user"))
    values = ordered["rank"].to_numpy(zero_copy_only=False).astype(np.float64)
    new_run = hashes[1:] != hashes[:-1]
    twice = ~new_run & (users[1:] == users[:-1])
    if twice.any():
        raise ArtifactError(f"a run must rank a user once, was: {users[twice.argmax()]!r} twice; write the ranks again")
    edges = [0, *(np.flatnonzero(new_run) + 1).tolist(), len(hashes)]
    return {hashes[a]: (users[a:b], values[a:b]) for a, b in pairwise(edges)}

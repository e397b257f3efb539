"""An experiment plan: arms × data sets × seeds, as changes of recipes.

A plan is a YAML file of values. `datasets` name a recipe each; `arms` change it; exactly one arm is the `control`, the
one that gains are measured against. `tuning` tries every combination of its grid for every arm, on one data set and one
seed, by validation alone: those runs end before test is opened, and the best point of each arm is carried over to all
data sets. `confirm` then runs each arm with fresh seeds on each data set, and opens test.

A *cell* is one run: a stage, a block (rows of one block are matched), a data set, an arm, a seed, and the recipe that
follows from them. This module makes cells; it runs nothing.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml

from llm_itemtok import recipe_file, strict
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.strict import Within

Seed = Annotated[int, Within(low=0, high=2**32 - 1)]
VARIANT = "variant"
"""Name under which a point holds the name of one of an arm's variants; no dotted setting is called so."""

Point = tuple[tuple[str, Any], ...]
"""One combination of a grid: pairs (dotted setting, value)."""


@dataclass(frozen=True, kw_only=True)
class PlannedData:
    """A data set of a plan."""

    recipe: str
    """Recipe that all arms start from; relative to the plan."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What this data set changes in it, nested as in a recipe."""
    folder: str = ""
    """Name of the data folder, where several entries share one, such as to begin with other codes; empty is its own."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things compared."""

    title: str = ""
    """How tables and pictures call it; its name if empty."""
    control: bool = False
    """Gains are measured against this arm."""
    probe: bool = False
    """A side comparison: neither the plan's method nor its control."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it changes in the recipe, nested as in a recipe."""
    recipes: Mapping[str, str] = field(default_factory=dict)
    """Data set → recipe that it starts from in place of the data set's; relative to the plan."""
    grid: Mapping[str, list[Any]] = field(default_factory=dict)
    """Settings of its own to tune, beside those of `tuning.grid`: dotted setting → values."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name → settings that belong together, nested as in a recipe, above its own; tuning keeps the best of them."""
    based_on: str = ""
    """Another arm, whose settings it takes over, the tuned ones too, below its own: an ablation, or more training."""
    codes_of: str = ""
    """Another arm: each run begins with the item tokens that this arm's run of the data set and seed ended with."""
    variant: str = ""
    """Of the variants of the arm that it is based on, the one that it takes in place of the chosen one."""
    seeds: tuple[Seed, ...] | None = None
    """Seeds of its confirmation; null takes those of `confirm`."""
    datasets: tuple[str, ...] | None = None
    """Data sets it is confirmed on; null takes all."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The stage that cannot see test."""

    dataset: str
    """Data set to tune on."""
    seed: Seed
    """Of every tuning run; `confirm` may not use it."""
    grid: Mapping[str, list[Any]]
    """Dotted setting → values to try; every combination, for every arm."""


@dataclass(frozen=True, kw_only=True)
class Confirm:
    """The stage that opens test."""

    seeds: tuple[Seed, ...]
    """One run an arm, a data set and a seed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment."""

    name: str
    """Of its files under `docs/results`; where one method is held against the control, its arm bears it too."""
    question: str
    """What it asks, in a sentence."""
    datasets: Mapping[str, PlannedData]
    """Name of the data folder → recipe; or another name, with `folder`. Arms are compared within each entry."""
    arms: Mapping[str, Arm]
    """Name → what is compared."""
    tuning: Tuning | None = None
    """Choice of settings on validation; null takes the recipes as they are."""
    confirm: Confirm
    """Runs that are reported."""


@dataclass(frozen=True)
class Cell:
    """One run of a plan.

    Attributes:
        stage: `screen` cells end before test is opened.
        block: rows of one block are matched.
        dataset: name of the data folder.
        arm: name in the plan.
        point: the tuned settings, empty where nothing is tuned.
        name: for a progress line; no other cell of the plan has it.
        config: the recipe, resolved.
        codes_of: the run whose final item tokens it begins with, and where the pool keeps it is its tokenizer's path;
            None where the recipe says all.
        own: what of `point` the block does not tell, in words: the variant, and tuned settings of this arm alone.
    """

    stage: Literal["screen", "confirm"]
    block: str
    dataset: str
    arm: str
    point: Point
    name: str
    config: RunConfig
    codes_of: "Cell | None" = None
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedPlan:
    """A plan and where it stands, so that its recipes are found."""

    path: Path
    plan: Plan

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a plan.

        Raises:
            RecipeError: if anything about it is not right; the message names the file and the setting.
        """
        layers = recipe_file.read_layers(path, ())
        plan: Plan = strict.Checker(str(path), layers.origins).section((Plan,), Plan, layers.settings, ())
        for fault in _faults(plan):
            raise RecipeError(f"{path}: {fault}")
        return cls(path, plan)

    def tuning_cells(self) -> list[Cell]:
        """Every arm at every point of its grid, matched arms next to each other; empty without `tuning`."""
        tuning = self.plan.tuning
        if tuning is None:
            return []
        cells = []
        for shared in points(tuning.grid):
            block = ", ".join([tuning.dataset, *map(_short, shared)])
            for arm in [name for name, arm in self.plan.arms.items() if not arm.based_on]:
                for own in _own_points(self.plan.arms[arm]):
                    words = tuple(map(_short, own))
                    name = " · ".join([block, arm, *words, f"seed {tuning.seed}"])
                    config = self._config(tuning.dataset, arm, tuning.seed, (*shared, *own))
                    folder = self._folder(tuning.dataset)
                    cells.append(Cell("screen", block, folder, arm, (*shared, *own), name, config, own=words))
        return cells

    def foregone(self) -> dict[str, Point]:
        """Arms that tuning has nothing to choose for, since their grid has one point, with that point."""
        cells: dict[str, list[Cell]] = {}
        for cell in self.tuning_cells():
            cells.setdefault(cell.arm, []).append(cell)
        return {arm: own[0].point for arm, own in cells.items() if len(own) == 1}

    def check(self) -> None:
        """Resolve what would be confirmed of each arm after any outcome of tuning, so that it cannot fail after hours.

        Raises:
            RecipeError: if a recipe would not be right then, or two arms could have the same.
        """
        owners: dict[tuple[str, ...], str] = {}
        for name in self.plan.arms:
            for claim in self._claims(name):
                owner = owners.setdefault(claim, name)
                if owner != name:
                    first, second = sorted((owner, name))
                    raise RecipeError(
                        f"{self.path}: every arm must have a recipe of its own, but on {claim[0]} those of "
                        f"`arms.{first}` and `arms.{second}` can be the same"
                    )

    def _claims(self, name: str) -> Iterator[tuple[str, ...]]:
        """Yield what no other arm may have on a data set: all recipes that an arm may get; each, unless it is a probe.

        A probe may turn out to be another arm, but not always: where the same choice decides both.
        """
        arm, seed = self.plan.arms[name], self.plan.confirm.seeds[0]
        outcomes = [self._point(name, chosen) for chosen in self._outcomes(name)]
        chooser = (arm.based_on or name) if len(outcomes) > 1 else ""
        for dataset in arm.datasets or self.plan.datasets:
            recipes = [self._config(dataset, name, seed, point).to_yaml() for point in outcomes]
            yield dataset, chooser, *recipes
            if not arm.probe:
                yield from ((dataset, recipe) for recipe in recipes)

    def _outcomes(self, name: str) -> list[Point]:
        """What tuning may choose for an arm; one empty point for a plan without tuning."""
        arm = self.plan.arms[name]
        shared = points(self.plan.tuning.grid) if self.plan.tuning else [()]
        own = _own_points(self.plan.arms[arm.based_on] if arm.based_on else arm)
        return [(*first, *then) for first, then in itertools.product(shared, own)]

    def _point(self, name: str, chosen: Point) -> Point:
        """The point at which an arm is confirmed, given what was chosen for it or what it is based on."""
        variant = self.plan.arms[name].variant
        return ((VARIANT, variant), *(pair for pair in chosen if pair[0] != VARIANT)) if variant else chosen

    def confirm_cells(self, chosen: Mapping[str, Point]) -> list[Cell]:
        """Every arm with every seed on every data set, at the point that was chosen for it.

        First what the plan asks about, and first seeds first: a plan that is stopped early has an answer with fewer
        seeds, and then one without side comparisons. A side comparison that turns out to be a run of another arm, such
        as an ablation of what was not chosen anyway, is left out.
        """
        everywhere, always = tuple(self.plan.datasets), self.plan.confirm.seeds
        cells = []
        for seed in _all_seeds(self.plan):
            for dataset, (name, arm) in itertools.product(everywhere, self.plan.arms.items()):
                if seed in (arm.seeds or always) and dataset in (arm.datasets or everywhere):
                    cells.append(self._confirmed(dataset, name, seed, chosen))
        cells.sort(key=lambda cell: self.plan.arms[cell.arm].probe)
        return [cell for at, cell in enumerate(cells) if not self._is_anothers(cell, cells[:at], chosen)]

    def _is_anothers(self, cell: Cell, before: Sequence[Cell], chosen: Mapping[str, Point]) -> bool:
        """Whether a side comparison turns out to be a run of another arm."""
        arms = self.plan.arms
        return arms[cell.arm].probe and any(
            (other.block, other.config) == (cell.block, cell.config)
            for other in before
            if not self.plan.tuning or {arms[of.arm].based_on or of.arm for of in (cell, other)} <= set(chosen)
        )

    def _confirmed(self, dataset: str, name: str, seed: int, chosen: Mapping[str, Point]) -> Cell:
        """One cell of `confirm`."""
        arm = self.plan.arms[name]
        point = self._point(name, chosen.get(arm.based_on or name, ()))
        config = self._config(dataset, name, seed, point)
        title = f"{dataset} · {name} · seed {seed}"
        codes_of = self._confirmed(dataset, arm.codes_of, seed, chosen) if arm.codes_of else None
        return Cell("confirm", dataset, self._folder(dataset), name, point, title, config, codes_of)

    def _folder(self, dataset: str) -> str:
        """Name of the data folder of an entry of `datasets`."""
        return self.plan.datasets[dataset].folder or dataset

    def _config(self, dataset: str, arm: str, seed: int, point: Point) -> RunConfig:
        planned = self.plan.datasets[dataset]
        given = self.plan.arms[arm]
        base = self.plan.arms[given.based_on] if given.based_on else given
        variant = dict(point).get(VARIANT)
        overrides = [
            *_overrides(planned.settings),
            *_overrides(base.settings),
            *(_overrides(base.variants[variant]) if variant else ()),
            *(f"{name}={_yaml(value)}" for name, value in point if name != VARIANT),
            *(_overrides(given.settings) if given.based_on else ()),
            f"seed={seed}",
        ]
        if given.codes_of:
            overrides = [text for text in overrides if not text.startswith("tokenizer.")]
            overrides += ["tokenizer.kind=file", f"tokenizer.path={given.codes_of}"]
        whose = f"arm `{arm}` of {self.path}"
        return RunConfig.load(self.path.parent / base.recipes.get(dataset, planned.recipe), overrides, whose=whose)


def points(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of a grid, the last setting changing fastest; one empty point for an empty grid."""
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _own_points(arm: Arm) -> list[Point]:
    """What is tuned of an arm beside what all tune: every variant at every point of its own grid."""
    return points({**({VARIANT: list(arm.variants)} if arm.variants else {}), **arm.grid})


def _faults(plan: Plan) -> list[str]:
    """What is wrong with a plan whose settings are each right alone."""
    faults = []
    controls = [name for name, arm in plan.arms.items() if arm.control]
    if len(controls) != 1:
        faults.append(f"`arms` must have exactly one with `control: true`, was: {', '.join(controls) or 'none'}")
    both = [name for name, arm in plan.arms.items() if arm.control and arm.probe]
    if both:
        faults.append(f"`arms.{both[0]}` must be the control or a probe, not both")
    methods = [name for name, arm in plan.arms.items() if not arm.control and not arm.probe]
    if not methods:
        faults.append("`arms` must have at least one that is neither control nor probe, was: none")
    if len(methods) == 1 and methods[0] != plan.name:
        faults.append(
            f"the arm that is the plan's only method must bear its name, `arms.{plan.name}`, was: {methods[0]}"
        )
    if not plan.name.replace("-", "").isalnum():
        faults.append(f"`name` must be letters, digits and hyphens, as it names files, was: {plan.name!r}")
    if not plan.datasets:
        faults.append("`datasets` must name at least one")
    faults += _repeats("confirm.seeds", plan.confirm.seeds)
    for name, arm in plan.arms.items():
        faults += _arm_faults(plan, name, arm)
    return faults + (_tuning_faults(plan, plan.tuning) if plan.tuning else [])


def _arm_faults(plan: Plan, name: str, arm: Arm) -> list[str]:
    faults = [*_repeats(f"arms.{name}.seeds", arm.seeds), *_repeats(f"arms.{name}.datasets", arm.datasets)]
    tuned = [other for other, given in plan.arms.items() if not given.based_on]
    if arm.based_on and (arm.based_on not in tuned or arm.grid):
        faults.append(
            f"`arms.{name}.based_on` must be an arm that is tuned itself ({', '.join(tuned)}), and leaves no room for "
            f"a `grid`, was: {arm.based_on}"
        )
    variants = list(plan.arms[arm.based_on].variants) if arm.based_on in tuned else []
    if arm.based_on and arm.variants:
        faults.append(f"`arms.{name}.variants` must be empty where an arm is `based_on` another, which is not tuned")
    if arm.variant and arm.variant not in variants:
        faults.append(
            f"`arms.{name}.variant` must be one of the variants of the arm that it is based on "
            f"({', '.join(variants) or 'none'}), was: {arm.variant}"
        )
    if arm.codes_of:
        faults += _codes_faults(plan, name, arm)
    if arm.variants and not plan.tuning:
        faults.append(f"`arms.{name}.variants` need `tuning`, which chooses one of them")
    for setting, named in (("datasets", arm.datasets or ()), ("recipes", arm.recipes)):
        if unknown := [dataset for dataset in named if dataset not in plan.datasets]:
            faults.append(f"`arms.{name}.{setting}` must be of {', '.join(plan.datasets)}, was: {', '.join(unknown)}")
    if arm.based_on and arm.recipes:
        faults.append(f"`arms.{name}.recipes` must be empty where an arm is `based_on` another, whose recipes it takes")
    if (arm.control or name == plan.name) and (arm.seeds or arm.datasets):
        faults.append(f"`arms.{name}` is the method or its control: it takes all seeds and data sets")
    return faults


def _codes_faults(plan: Plan, name: str, arm: Arm) -> list[str]:
    of = plan.arms.get(arm.codes_of)
    if of is None or of.codes_of or not arm.based_on:
        return [
            f"`arms.{name}.codes_of` must be an arm with a tokenizer of its own, and stand in one which is `based_on` "
            f"another and so not tuned, was: {arm.codes_of}"
        ]
    everywhere, always = tuple(plan.datasets), plan.confirm.seeds
    lacking = [
        *(set(arm.datasets or everywhere) - set(of.datasets or everywhere)),
        *(f"seed {seed}" for seed in set(arm.seeds or always) - set(of.seeds or always)),
    ]
    if not lacking:
        return []
    return [f"`arms.{arm.codes_of}` must run wherever `arms.{name}` needs its codes, but lacks: {', '.join(lacking)}"]


def _repeats(name: str, values: Sequence[Any] | None) -> list[str]:
    if values is None or (values and len(set(values)) == len(values)):
        return []
    return [f"`{name}` must be distinct and at least one, was: {list(values)}"]


def _all_seeds(plan: Plan) -> list[int]:
    """Seeds of confirm, each once, those of all arms first."""
    return list(dict.fromkeys((*plan.confirm.seeds, *(seed for arm in plan.arms.values() for seed in arm.seeds or ()))))


def _tuning_faults(plan: Plan, tuning: Tuning) -> list[str]:
    faults = []
    if tuning.dataset not in plan.datasets:
        faults.append(f"`tuning.dataset` must be one of {', '.join(plan.datasets)}, was: {tuning.dataset}")
    if tuning.seed in _all_seeds(plan):
        faults.append(f"`tuning.seed` must be none of the seeds of `confirm`, was: {tuning.seed}")
    grids = {"tuning.grid": tuning.grid, **{f"arms.{name}.grid": arm.grid for name, arm in plan.arms.items()}}
    for where, grid in grids.items():
        for name, values in grid.items():
            if not values or name in ("seed", VARIANT) or any(value in values[:at] for at, value in enumerate(values)):
                faults.append(
                    f"`{where}.{name}` must list distinct values to try (and not seeds or variants), was: {values}"
                )
    return faults


def _overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as texts `a.b=value`, a text each, so that later ones do not wipe out their neighbours."""
    texts = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            texts += _overrides(value, f"{prefix}{name}.")
        else:
            texts.append(f"{prefix}{name}={_yaml(value)}")
    return texts


def _yaml(value: Any) -> str:
    """A value on one line, as `--set` reads it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _short(setting: tuple[str, Any]) -> str:
    name, value = setting
    return f"{name.rpartition('.')[2]} {value}"

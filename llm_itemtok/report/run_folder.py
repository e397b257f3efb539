"""Reading a run folder for the report: what is there, and what is not.

A run may have stopped anywhere. A missing file is no error but a note; a file that is there and is not what it should
be is an `ArtifactError`, because a report must not guess. The one exception is the end of the training log, where a
killed run leaves half a line: unreadable lines are left out, and the note says how many.

This module knows files; it does not know what the report shows of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from llm_itemtok import artifacts, plain_yaml
from llm_itemtok.errors import ArtifactError, RecipeError
from llm_itemtok.items.codes import FILE_NAME as CODES_FILE
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.items.listing import read_listing


@dataclass(frozen=True)
class Recommended:
    """What the predictions of all test users cover."""

    users: int
    items: int
    most_title: str
    most_share: float


@dataclass(frozen=True)
class Item:
    """An item as the bundle has it; the title is empty where the catalogue has none."""

    item_id: str
    title: str

    @property
    def label(self) -> str:
        """The title, or the id where there is none."""
        return self.title or self.item_id


@dataclass(frozen=True)
class Version:
    """One version of the item tokens; None or empty where a file is missing."""

    name: str
    codes: ItemCodes | None
    quality: Mapping[str, Any]
    reasons: Mapping[str, str]  # why an item's code changed, by item id


@dataclass(frozen=True)
class RunFolder:
    """What was found in a run folder; None or empty where a file is missing."""

    name: str
    recipe_text: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    log: tuple[dict[str, Any], ...]
    metrics: Mapping[str, Any]
    versions: tuple[Version, ...]  # oldest first
    items: tuple[Item, ...]  # in catalogue order
    categories: tuple[tuple[str, ...], ...] | None  # in catalogue order, coarse first
    examples: tuple[Mapping[str, Any], ...]
    recommended: Recommended | None
    notes: tuple[str, ...]
    token_weights: Mapping[str, Any] = field(default_factory=dict)  # empty where all tokens weigh the same
    rescoring: Mapping[str, Any] = field(default_factory=dict)  # empty where no dense model scores items as well
    item_paths: Mapping[str, Any] = field(default_factory=dict)  # empty where no recursive network makes vectors
    updates: tuple[dict[str, Any], ...] = ()  # rounds of updates of item tokens, oldest first

    @property
    def codes(self) -> ItemCodes | None:
        """The item tokens in use: the newest."""
        return self.versions[-1].codes if self.versions else None

    @property
    def quality(self) -> dict[str, Mapping[str, Any]]:
        """Quality by version, oldest first, where it was measured."""
        return {version.name: version.quality for version in self.versions if version.quality}


def codes_alone(
    name: str, version: Version, items: tuple[Item, ...], categories: tuple[tuple[str, ...], ...] | None
) -> RunFolder:
    """What a page about item tokens shows: codes without a run.

    Args:
        name: what they are called.
        version: the codes and their quality.
        items: in the order of the rows; empty where they are not known.
        categories: in the same order; None where they are not known.
    """
    nothing: dict[str, Any] = {"recipe_text": "", "recipe": {}, "environment": {}, "log": (), "metrics": {}}
    return RunFolder(
        name=name,
        versions=(version,),
        items=items,
        categories=categories,
        examples=(),
        recommended=None,
        notes=(),
        **nothing,
    )


def read_run(folder: Path) -> RunFolder:
    """Read what there is.

    Args:
        folder: a folder that holds at least `recipe.yaml`.

    Raises:
        ArtifactError: if the folder is no run, or a file in it cannot be read as what it should be.
    """
    if not (folder / artifacts.RECIPE).is_file():
        raise ArtifactError(
            f"{folder}: a run folder holds `{artifacts.RECIPE}`, "
            f"found: {'no such file in it' if folder.is_dir() else 'no such folder'}; give the folder of `itemtok run`"
        )
    notes: list[str] = []
    recipe_text = artifacts.read_text(folder / artifacts.RECIPE)
    recipe = _parsed_recipe(folder / artifacts.RECIPE, recipe_text)
    environment = _optional_json(folder / artifacts.ENVIRONMENT, {}, "the environment of the run", notes)
    versions = _read_versions(folder, notes)
    log = _read_lines(folder / artifacts.METRICS_LOG, "the training log", notes)
    num_items = next((version.codes.num_items for version in reversed(versions) if version.codes is not None), None)
    items = read_items(folder / artifacts.MODEL / artifacts.ITEMS, num_items, notes)
    categories = _read_categories(folder / artifacts.CATEGORIES, num_items, notes)
    metrics = _optional_json(folder / artifacts.METRICS, {}, "metrics (the run was not evaluated)", notes)
    weights: Mapping[str, Any] = {}
    if recipe.get("objective", {}).get("kind") == "token-weighted":
        weights = _optional_json(folder / artifacts.TOKEN_WEIGHTS, {}, "weights of target tokens", notes)
    shares: Mapping[str, Any] = {}
    if recipe.get("rescoring", {}).get("kind", "none") != "none":
        shares = _optional_json(folder / artifacts.RESCORING, {}, "shares of the dense model", notes)
    paths: Mapping[str, Any] = {}
    if recipe.get("scoring", {}).get("kind") == "recursive":
        paths = _optional_json(folder / artifacts.ITEM_PATHS, {}, "how items' vectors go by their codes", notes)
    updates: tuple[dict[str, Any], ...] = ()
    if recipe.get("update", {}).get("kind", "fixed") != "fixed":
        updates = _read_lines(folder / artifacts.UPDATES, "the rounds of updates", notes)
    return RunFolder(
        name=folder.resolve().name,
        recipe_text=recipe_text,
        recipe=recipe,
        environment=environment,
        log=log,
        metrics=metrics,
        versions=versions,
        items=items,
        categories=categories,
        examples=tuple(_optional_json(folder / artifacts.EXAMPLES, [], "example recommendations", notes)),
        recommended=_read_predictions(folder / artifacts.PREDICTIONS, items, notes),
        notes=tuple(notes),
        token_weights=weights,
        rescoring=shares,
        item_paths=paths,
        updates=updates,
    )


def _parsed_recipe(path: Path, text: str) -> Mapping[str, Any]:
    try:
        recipe = plain_yaml.parse(text, path.name)
    except RecipeError as error:
        raise ArtifactError(f"{path}: the recipe of a run must be YAML as runs write it, found: {error}") from error
    if not isinstance(recipe, dict):
        raise ArtifactError(f"{path}: the recipe of a run must be a mapping, found: {type(recipe).__name__}")
    return recipe


def _optional_json(path: Path, missing: Any, what: str, notes: list[str]) -> Any:
    """Read a JSON file of the same type as `missing`, or note that it is not there."""
    if not path.exists():
        notes.append(f"Missing: {what}. There is no {path.name} in the run folder.")
        return missing
    value = artifacts.read_json(path)
    if not isinstance(value, type(missing)):
        raise ArtifactError(f"{path}: must hold a {type(missing).__name__}, found: {type(value).__name__}")
    return value


def _read_lines(path: Path, what: str, notes: list[str]) -> tuple[dict[str, Any], ...]:
    """Read a log. A run killed while writing leaves half a line, which is no reason to show nothing."""
    if not path.exists():
        notes.append(f"Missing: {what}. There is no {path.name} in the run folder.")
        return ()
    lines, broken = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            broken.append(number)
    if broken:
        notes.append(f"Left out: {len(broken)} of the lines of {path.name} cannot be read, first line {broken[0]}.")
    return tuple(lines)


def _read_versions(folder: Path, notes: list[str]) -> tuple[Version, ...]:
    paths = [path for _, path in artifacts.code_versions(folder)]
    if not paths:
        notes.append(f"Missing: item tokens. There is no {artifacts.CODES}/v0 in the run folder.")
    versions = []
    for path in paths:
        name = str((path / artifacts.QUALITY).relative_to(folder))
        if (path / artifacts.QUALITY).exists():
            quality = _optional_json(path / artifacts.QUALITY, {}, name, notes)
        else:
            notes.append(f"Missing: the quality of the item tokens. There is no {name} in the run folder.")
            quality = {}
        codes = ItemCodes.load(path) if (path / CODES_FILE).exists() else None
        versions.append(Version(path.name, codes, quality, _read_reasons(path / artifacts.TRACE)))
    return tuple(versions)


def _read_reasons(path: Path) -> dict[str, str]:
    """Why items changed their code. Old and new codes stand in the versions themselves and are read there."""
    if not path.exists():
        return {}
    columns = _read_table(path, ("item", "why"))
    return {str(item): str(why or "") for item, why in zip(columns["item"], columns["why"], strict=True)}


def read_items(path: Path, num_items: int | None, notes: list[str]) -> tuple[Item, ...]:
    """Read the items of a bundle, in catalogue order.

    Args:
        path: of the file; if it is missing, that is noted, and there are no items.
        num_items: how many there must be, where that is known.
        notes: where notes are put.

    Raises:
        ArtifactError: if a line holds no item, or their number is another.
    """
    if not path.exists():
        notes.append(f"Missing: the model to use. There is no {path.parent.name}/{path.name} in the run folder.")
        return ()
    items = [Item(item["id"], item.get("title", "")) for item in read_listing(path)]
    _check_number(path, len(items), num_items)
    return tuple(items)


def _read_categories(path: Path, num_items: int | None, notes: list[str]) -> tuple[tuple[str, ...], ...] | None:
    if not path.exists():
        notes.append(f"Missing: the categories of the items. There is no {path.name} in the run folder.")
        return None
    values = _read_table(path, ("categories",))["categories"]
    if not all(value is None or isinstance(value, list) for value in values):
        raise ArtifactError(f"{path}: the column `categories` must hold lists; make it again with `--from evaluate`")
    _check_number(path, len(values), num_items)
    return tuple(tuple(map(str, value or ())) for value in values)


def _check_number(path: Path, found: int, num_items: int | None) -> None:
    if num_items is not None and found != num_items:
        raise ArtifactError(
            f"{path}: must hold the {num_items:,} items that have codes, found: {found:,}; "
            "were files mixed from two runs?"
        )


def _read_table(path: Path, columns: tuple[str, ...]) -> dict[str, list[Any]]:
    """Read columns of a parquet file."""
    try:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
        return {name: table[name].to_pylist() for name in columns}
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        wanted = ", ".join(columns)
        raise ArtifactError(f"{path}: must be parquet with the columns {wanted}, found: {error}") from error


def _read_predictions(path: Path, items: tuple[Item, ...], notes: list[str]) -> Recommended | None:
    """Count which items stand in the first ten places."""
    if not path.exists():
        notes.append(f"Missing: the recommendations of the test users. There is no {path.name} in the run folder.")
        return None
    try:
        table = pyarrow.parquet.read_table(path, columns=["user", "rank", "item"])
    except (pyarrow.ArrowException, OSError) as error:
        raise ArtifactError(f"{path}: must be parquet with columns user, rank and item, found: {error}") from error
    counts = table.filter(pyarrow.compute.less_equal(table["rank"], 10))["item"].value_counts().to_pylist()
    users = len(table["user"].unique())
    if not counts:
        return None
    most = max(counts, key=lambda entry: (entry["counts"], str(entry["values"])))
    item = str(most["values"])
    labels = {entry.item_id: entry.label for entry in items}
    return Recommended(users, len(counts), labels.get(item, item), most["counts"] / users)

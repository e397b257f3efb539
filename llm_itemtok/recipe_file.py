"""Recipe files as layers of plain values: the recipe, its parents below it, `--set` on top.

A recipe is a YAML mapping. `extends: base.yaml` names at most one parent, relative to the
recipe that says so; mappings merge, everything else replaces. The YAML is plain (`plain_yaml.py`), without anchors:
`extends` and `--set` do their work where a reader can see it.

Which layer gave a setting last is kept, so that a recipe that changes a `kind` can leave its
parent's options of the old kind behind, while its own stay errors. Knows files and merging;
what a setting means and which exist is `config.py`'s. The way back is here, too: settings as
plain values, and how these are written.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_itemtok import strict
from llm_itemtok.errors import RecipeError
from llm_itemtok.plain_yaml import parse

Settings = dict[str, Any]


@dataclass(frozen=True)
class Layers:
    """The settings of all layers, merged."""

    settings: Settings
    """Nested plain values, `extends` taken out."""
    origins: dict[tuple[str, ...], int]
    """For every setting and mapping given, by path, the number of the layer that wrote (into) it last; 0 = lowest."""


def read_layers(path: Path, overrides: Sequence[str]) -> Layers:
    """Read a recipe, its parents and `--set` overrides.

    Args:
        path: the recipe file.
        overrides: texts `a.b=value`, the value in YAML; all of them are one layer, later ones win.

    Raises:
        RecipeError: if a file cannot be read as a recipe, a parent is missing or extends its own child, or an
            override is not `KEY=VALUE`.
    """
    chain: list[Settings] = []
    seen: list[Path] = []
    child: Path | None = None
    while True:
        settings = _read(path, child)
        seen.append(path.resolve())
        parent = settings.pop("extends", None)
        chain.append(settings)
        if parent is None:
            break
        if not isinstance(parent, str) or not parent:
            raise RecipeError(f"{path}: `extends` must be the path of one recipe, was: {parent!r}")
        child, path = path, path.parent / parent
        if path.resolve() in seen:
            raise RecipeError(f"{child}: `extends: {parent}` makes a circle: that recipe extends this one")
    chain.reverse()
    if overrides:
        chain.append(_parse_overrides(overrides))
    merged: Settings = {}
    origins: dict[tuple[str, ...], int] = {}
    for number, layer in enumerate(chain):
        _merge(merged, layer, (), number, origins)
    return Layers(merged, origins)


def _read(path: Path, child: Path | None) -> Settings:
    if path.is_dir():
        raise RecipeError(f"{path}: a recipe is a YAML file, was: a folder")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        said_by = f"; {child} extends it (the path is relative to that file)" if child else ""
        raise RecipeError(f"{path}: there is no such recipe{said_by}") from error
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error.strerror}") from error
    settings = parse(content, str(path))
    if settings is None:
        raise RecipeError(f"{path}: the recipe is empty; it needs at least `data: {{path: ...}}`")
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: a recipe must be a mapping `setting: value`, was: {type(settings).__name__}")
    return settings


def _parse_overrides(overrides: Sequence[str]) -> Settings:
    settings: Settings = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        names = dotted.strip().split(".")
        if not equals or not all(names):
            raise RecipeError(f"--set takes KEY=VALUE, such as tokenizer.levels=4, was: {override}")
        if names == ["extends"]:
            raise RecipeError("--set cannot change `extends`: run the other recipe instead")
        place = settings
        for name in names[:-1]:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[names[-1]] = parse(text, f"--set {dotted}")
    return settings


def _merge(
    below: Settings, layer: Mapping[str, Any], path: tuple[str, ...], number: int, origins: dict[tuple[str, ...], int]
) -> None:
    for name, value in layer.items():
        here = (*path, name)
        origins[here] = number
        if not isinstance(value, Mapping):
            below[name] = value
            continue
        if not isinstance(below.get(name), dict) or not value:  # an empty mapping empties what stands below it
            below[name] = {}
        _merge(below[name], value, here, number, origins)


class Dumper(yaml.SafeDumper):
    """Writes recipes: lists on one line, mappings in blocks, no aliases (`RunConfig.load` refuses them)."""

    def ignore_aliases(self, data: object) -> bool:
        """Never write one."""
        return True


Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


def as_plain(value: Any) -> Any:
    """Settings as values of YAML and JSON; those that do not apply are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            name: as_plain(getattr(value, name))
            for name, annotation in strict.annotations_of(type(value)).items()
            if all(mark.holds(getattr(value, mark.key)) for mark in strict.conditions_of(annotation))
        }
    if isinstance(value, Mapping):
        return {key: as_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(inner) for inner in value]
    return value


def place_of(plain: Settings, dotted: str) -> tuple[Settings, str]:
    """The mapping that a setting such as `vectors.parts.0.path` stands in, and its name there."""
    *above, name = dotted.split(".")
    place: Any = plain
    for step in above:
        place = place[int(step) if isinstance(place, list) else step]
    return place, name


def defaults_of(section: Any) -> Any:
    """The defaults of all settings of the kinds that a section has chosen, nested; required ones are left out."""
    found = {}
    for part in dataclasses.fields(section):
        value, default = getattr(section, part.name), strict.default_of(part)
        if dataclasses.is_dataclass(value):
            found[part.name] = defaults_of(value)
        elif default is not dataclasses.MISSING:
            found[part.name] = as_plain(default)
    return found

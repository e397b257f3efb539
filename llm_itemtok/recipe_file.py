"""Recipe files as layers of plain values: the recipe, its parents below it, `--set` on top.

A recipe is a YAML mapping. `extends: base.yaml` names at most one parent, relative to the
recipe that says so; mappings merge, everything else replaces. Anchors and aliases are refused:
`extends` and `--set` do their work where a reader can see it. A key written twice is an error,
because YAML would silently keep the last.

Which layer gave a setting last is kept, so that a recipe that changes a `kind` can leave its
parent's options of the old kind behind, while its own stay errors. Knows files and merging;
what a setting means and which exist is `config.py`'s. The way back is here, too: settings as
plain values, and how these are written.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_itemtok import strict
from llm_itemtok.errors import RecipeError

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
    settings = _parse(content, str(path))
    if settings is None:
        raise RecipeError(f"{path}: the recipe is empty; it needs at least `data: {{path: ...}}`")
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: a recipe must be a mapping `setting: value`, was: {type(settings).__name__}")
    return settings


def _parse(content: bytes | str, source: str) -> Any:
    try:
        return yaml.load(content, Loader=_StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{source}{line}: broken YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Bytes that are no text, a date such as 2024-13-45, a number of thousands of digits, brackets without end.
        raise RecipeError(f"{source}: broken YAML: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML without its surprises: no key twice, no key but text, no anchors."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            problem = (
                "anchors (&name) and aliases (*name) are not used in recipes; write the value out, or use `extends`"
            )
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"a key must be text, was: {key!r} (YAML reads it as {type(key).__name__}); put it in quotes"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            if key in keys:
                problem = f"`{key}` is given twice; YAML would keep only the last"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


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
        place[names[-1]] = _parse(text, f"--set {dotted}")
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

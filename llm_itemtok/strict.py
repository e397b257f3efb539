"""Plain values, as YAML gives them, into typed ones: strictly, with messages a person can act on.

A *section* is a frozen dataclass; its annotations are the schema. What they may say:

- `int`, `float`, `bool`, `str`, `None`, `Literal`, enums, `tuple[X, ...]`, `list[X]`, `Mapping[K, V]`, unions and
  sections;
- a union of sections is a closed set of kinds, told apart by the field `kind`, so options of one kind cannot be
  written for another; `X` of a list or `V` of a mapping may be one too, and entries then say their kind, having no
  default;
- `Annotated` with `Within` (a range), `Only` and `Unless` (the field applies only beside some value of another
  field of the section) or `PATH` (variables expand).

Nothing is converted but a whole number to `float` and a list to a tuple: YAML reads `2e-5` as text and `no` as false,
and guessing what was meant would hide it. A value that an earlier layer (a parent recipe) gave for another kind
is left behind when a later layer changes the kind; a value that the same layer gives is an error.

Knows annotations and values; knows neither files nor what any setting means.
"""

import dataclasses
import difflib
import enum
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from llm_itemtok.errors import RecipeError

Path = tuple[str, ...]

_VARIABLE = re.compile(r"\$\{([^}]*)\}?")
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


@dataclass(frozen=True)
class Within:
    """A range that a number must lie in; `above` and `below` exclude their end, `low` and `high` include it."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Tell whether the value lies in the range."""
        return not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        ends = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {end}" for word, end in ends.items() if end is not None)


@dataclass(frozen=True)
class Only:
    """The field applies only where its section's field `key` has one of `values`."""

    key: str
    values: tuple[str | float, ...]

    def holds(self, value: object) -> bool:
        """Tell whether the field applies beside this value of `key`."""
        return value in self.values

    def __str__(self) -> str:
        return f"{self.key}: {' | '.join(map(str, self.values))}"


@dataclass(frozen=True)
class Unless(Only):
    """The field applies except where its section's field `key` has one of `values`."""

    def holds(self, value: object) -> bool:
        """Tell whether the field applies beside this value of `key`."""
        return value not in self.values

    def __str__(self) -> str:
        return f"another {self.key} than {' | '.join(map(str, self.values))}"


MANY_NAMES = 40
"""Settings of a section beyond which they are not all listed beside the one that was meant."""

PATH = "path"
"""Marks text in which `${NAME}` stands for an environment variable."""


def describe(value: object) -> str:
    """Show a value as it may have been written, with its type where the text alone would mislead."""
    if isinstance(value, bool):
        return f"{'true' if value else 'false'} (YAML reads yes, no, on and off as true and false)"
    if value is None:
        return "nothing (null)"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 80 else f"a text of {len(value):,} characters"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return str(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like this one, or None when none is."""
    found = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def type_name(annotation: Any) -> str:
    """Say in words what an annotation asks for."""
    annotation, marks = unwrap(annotation)
    ranges = "".join(f" {mark}" for mark in marks if isinstance(mark, Within))
    if annotation in _NAMES:
        return _NAMES[annotation] + ranges
    if choices_of(annotation):
        return "one of " + ", ".join(str(choice) for choice in choices_of(annotation))
    if is_union(annotation):
        return " or ".join(dict.fromkeys(type_name(part) for part in typing.get_args(annotation)))
    if typing.get_origin(annotation) in (tuple, list):
        return f"a list, each {type_name(typing.get_args(annotation)[0])}"
    names = ", ".join(names_in(annotation) or ())
    return f"a mapping of {names}" if names else "a mapping"


def choices_of(annotation: Any) -> list[Any]:
    """The values that a `Literal` or an enum allows; empty for another annotation."""
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    return []


def unwrap(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split `Annotated[X, marks]` into `X` and its marks."""
    if typing.get_origin(annotation) is Annotated:
        inner, *marks = typing.get_args(annotation)
        return inner, tuple(marks)
    return annotation, ()


def is_union(annotation: Any) -> bool:
    """Tell whether an annotation is `X | Y`, in either spelling."""
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def annotations_of(section: type) -> dict[str, Any]:
    """The annotations of a section's fields, by name, resolved, marks kept."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {part.name: hints[part.name] for part in dataclasses.fields(section)}


def default_of(part: dataclasses.Field[Any]) -> Any:
    """A field's default, or `dataclasses.MISSING`."""
    return part.default_factory() if part.default_factory is not dataclasses.MISSING else part.default


def sections_in(annotation: Any) -> tuple[type, ...]:
    """The sections that a field may hold: its kinds, or the one it is, or none."""
    parts = _parts(unwrap(annotation)[0])
    return tuple(part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part))


def entries_in(annotation: Any) -> tuple[type, ...]:
    """The sections that the entries of a list may be, or of a mapping whose names the recipe chooses; else none."""
    inner = unwrap(annotation)[0]
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin in (tuple, list):
        return sections_in(arguments[0])
    is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
    return sections_in(arguments[1]) if is_mapping and arguments else ()


def names_in(annotation: Any) -> tuple[str, ...] | None:
    """The names that a mapping of plain values may have, none for what is no mapping; None where any will do."""
    inner = unwrap(annotation)[0]
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if not (isinstance(origin, type) and issubclass(origin, Mapping)):
        return ()
    return tuple(choices_of(arguments[0])) or None


def conditions_of(annotation: Any) -> list[Only]:
    """The `Only` and `Unless` marks of a field."""
    return [mark for mark in unwrap(annotation)[1] if isinstance(mark, Only)]


@dataclass(frozen=True)
class Checker:
    """Turns plain values into typed ones; every complaint names its source and the dotted setting."""

    source: str
    """What the message starts with: the recipe's path."""
    layers: Mapping[Path, int] = field(default_factory=dict)
    """For each setting given, the layer that gave it last; higher wins. Settings not in it are defaults."""
    also: tuple[str, ...] = ()
    """Names at the top that are taken out before checking, such as `extends`."""

    def fail(self, path: Path, message: str) -> NoReturn:
        """Raise a `RecipeError` about one setting."""
        raise RecipeError(f"{self.source}: `{'.'.join(path)}` {message}")

    def fail_unknown(self, path: Path, names: Iterable[str]) -> NoReturn:
        """Raise a `RecipeError` about a setting that does not exist, with the nearest one that does."""
        names = sorted({*names, *(self.also if len(path) == 1 else ())})
        guess = nearest(path[-1], names)
        hint = f"; did you mean `{'.'.join((*path[:-1], guess))}`?" if guess else ""
        if not names:
            self.fail(path, f"is not a setting: `{'.'.join(path[:-1])}` has none below it")
        owner = f"`{'.'.join(path[:-1])}`" if path[:-1] else "a recipe"
        if guess and len(names) > MANY_NAMES:
            self.fail(path, f"is not a setting{hint}\n  `itemtok explain {'.'.join((*path[:-1], guess))}` explains it")
        self.fail(path, f"is not a setting{hint}\n  {owner} takes: {', '.join(names)}")

    def section(self, kinds: tuple[type, ...], default: type | None, given: object, path: Path) -> Any:
        """Build one section out of a mapping.

        Args:
            kinds: the closed set of sections it may be; one where there are no kinds.
            default: which of them it is when no `kind` is written; None where it must be.
            given: the mapping of settings.
            path: where it stands in the recipe.

        Raises:
            RecipeError: for anything that is not as the annotations say.
        """
        if not isinstance(given, Mapping):
            self.fail(path, f"must be a mapping of settings, was: {describe(given)}")
        chosen = self._kind(kinds, default, given, path) if len(kinds) > 1 else kinds[0]
        annotations = annotations_of(chosen)
        siblings = {name for kind in kinds for name in annotations_of(kind)}
        for name in given:
            if name in annotations or self._left_behind((*path, name), (*path, "kind"), name in siblings):
                continue
            if name in siblings:
                takes = ", ".join(sorted(annotations))
                self.fail((*path, name), f"does not apply to `kind: {_kind_of(chosen)}`, which takes: {takes}")
            self.fail_unknown((*path, name), annotations)
        return self._fill(chosen, {name: given[name] for name in annotations if name in given}, path)

    def _kind(self, kinds: tuple[type, ...], default: type | None, given: Mapping[str, object], path: Path) -> type:
        by_name = {_kind_of(kind): kind for kind in kinds}
        if default is None and "kind" not in given:
            self.fail((*path, "kind"), f"must be given: one of {', '.join(by_name)}")
        name = given["kind"] if default is None else given.get("kind", _kind_of(default))
        if not isinstance(name, str) or name not in by_name:
            self._fail_choice(name, list(by_name), (*path, "kind"))
        return by_name[name]

    def _left_behind(self, path: Path, chooser: Path, known: bool) -> bool:
        """Tell whether a setting that no longer applies comes from a layer below the one that changed that."""
        return known and self.layers.get(path, -1) < self.layers.get(chooser, -1)

    def _fill(self, section: type, given: dict[str, object], path: Path) -> Any:
        annotations = annotations_of(section)
        values: dict[str, Any] = {}
        for part in dataclasses.fields(section):
            annotation, here = annotations[part.name], (*path, part.name)
            default = default_of(part)
            for condition in conditions_of(annotation):
                # Fields are declared after the field that decides on them, so its value is known here.
                if part.name in given and not condition.holds(values[condition.key]):
                    if not self._left_behind(here, (*path, condition.key), True):
                        chooser = ".".join((*path, condition.key))
                        self.fail(here, f"applies only with {condition}; `{chooser}` was: {values[condition.key]}")
                    del given[part.name]
            if part.name in given:
                values[part.name] = self._given(annotation, default, given[part.name], here)
            elif default is not dataclasses.MISSING:
                values[part.name] = default
            elif all(condition.holds(values[condition.key]) for condition in conditions_of(annotation)):
                self.fail(here, f"must be given: {type_name(annotation)}")
        return section(**values)

    def _given(self, annotation: Any, default: Any, value: object, path: Path) -> Any:
        kinds = sections_in(annotation)
        if kinds and not (value is None and types.NoneType in _parts(unwrap(annotation)[0])):
            chosen = type(default) in kinds
            return self.section(kinds, type(default) if chosen else None, value, path)
        checked = self.value(annotation, value, path)
        if isinstance(default, Mapping) and isinstance(checked, Mapping):
            return {**default, **checked}  # as between layers: mappings merge
        return checked

    def value(self, annotation: Any, value: object, path: Path) -> Any:
        """Check one value against an annotation, and return it: whole numbers as floats where those are asked for.

        Raises:
            RecipeError: if it is of another type or out of range.
        """
        inner, marks = unwrap(annotation)
        if is_union(inner):
            return self._union(inner, value, path)
        origin = typing.get_origin(inner) or inner
        if choices := choices_of(inner):
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                self._fail_choice(value, choices, path)
            return value
        if origin in (tuple, list):
            return self._list(inner, origin, value, path)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self._mapping(inner, value, path)
        checked = self._scalar(inner, annotation, value, path)
        for mark in marks:
            if isinstance(mark, Within) and not mark.holds(checked):
                self.fail(path, f"must be {mark}, was: {value}")
            if mark == PATH and isinstance(checked, str):
                checked = self._expand(checked, path)
        return checked

    def _scalar(self, inner: Any, annotation: Any, value: object, path: Path) -> Any:
        if inner is Any:
            return value
        if inner is types.NoneType and value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if inner is float and is_number:
            number = _as_float(value)
            if not math.isfinite(number):
                self.fail(path, f"must be a finite number, was: {number}")
            return number
        if inner in (int, bool, str) and type(value) is inner:
            return value
        self.fail(path, f"must be {type_name(annotation)}, was: {describe(value)}{_hint(inner, value)}")

    def _union(self, annotation: Any, value: object, path: Path) -> Any:
        # With their marks: a range holds inside a union, too.
        parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        if value is None and types.NoneType in _parts(annotation):
            return None
        if any(choices_of(unwrap(part)[0]) for part in parts):
            parts = [part for part in parts if part is not str]  # `Enum | str` means: the enum, spelled as text
        complaints = []
        for part in parts:
            try:
                return self.value(part, value, path)
            except RecipeError as error:
                complaints.append(error)
        if len(complaints) == 1:
            raise complaints[0]
        hints = dict.fromkeys(hint for part in parts if (hint := _hint(unwrap(part)[0], value)))
        self.fail(path, f"must be {type_name(annotation)}, was: {describe(value)}{''.join(hints)}")

    def _list(self, annotation: Any, origin: type, value: object, path: Path) -> Any:
        if not isinstance(value, list | tuple):
            self.fail(path, f"must be {type_name(annotation)}, was: {describe(value)}; write it in [brackets]")
        inner = typing.get_args(annotation)[0] if typing.get_args(annotation) else Any
        here = [(*path[:-1], f"{path[-1]}[{place}]") for place in range(len(value))]
        return origin(self._given(inner, dataclasses.MISSING, *entry) for entry in zip(value, here, strict=True))

    def _mapping(self, annotation: Any, value: object, path: Path) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self.fail(path, f"must be a mapping, was: {describe(value)}")
        key_type, value_type = typing.get_args(annotation) or (Any, Any)
        if typing.get_origin(key_type) is Literal:
            for key in value:
                if key not in typing.get_args(key_type):
                    self.fail_unknown((*path, str(key)), typing.get_args(key_type))
        return {
            str(key): self._given(value_type, dataclasses.MISSING, inner, (*path, str(key)))
            for key, inner in value.items()
        }

    def _fail_choice(self, value: object, choices: list[Any], path: Path) -> NoReturn:
        guess = nearest(value, [str(choice) for choice in choices]) if isinstance(value, str) else None
        hint = f"; did you mean {guess}?" if guess else ""
        self.fail(path, f"must be one of {', '.join(str(choice) for choice in choices)}, was: {describe(value)}{hint}")

    def _expand(self, text: str, path: Path) -> str:
        def replace(match: re.Match[str]) -> str:
            name = match.group(1)
            if not match.group().endswith("}") or not name.isidentifier():
                self.fail(path, f"has a variable that is not written ${{NAME}}, was: {text}")
            if not os.environ.get(name):
                self.fail(path, f"uses ${{{name}}}, but that environment variable is not set; export {name}=...")
            return os.environ[name]

        return _VARIABLE.sub(replace, text)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf  # a whole number of more than 308 digits


def _parts(annotation: Any) -> tuple[Any, ...]:
    return tuple(unwrap(part)[0] for part in typing.get_args(annotation)) if is_union(annotation) else (annotation,)


def _kind_of(section: type) -> str:
    return str(typing.get_args(unwrap(annotations_of(section)["kind"])[0])[0])


def _hint(wanted: Any, value: object) -> str:
    """What to write instead, where the way YAML reads a value is the likely reason for its type."""
    if wanted in (int, float) and isinstance(value, str):
        return _number_hint(wanted, value)
    if wanted is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if wanted is bool and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return "; write true or false, without quotes"
    if wanted is str and isinstance(value, bool | int | float):
        return "; put it in quotes"
    return ""


def _number_hint(wanted: type, text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    if wanted is int:
        return f"; write {int(number)}" if number.is_integer() else ""
    mantissa, e, exponent = text.lower().partition("e")
    plain = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if e else repr(number)
    if e and exponent[0] not in "+-":
        plain = plain.replace("e", "e+")  # YAML 1.1 wants the sign too: 1.0e5 is text, 1.0e+5 a number
    return f"; YAML reads {text} as text; write {plain}" if e else f"; write {plain}, without quotes"

"""What each setting of a recipe means, read off the classes that hold them: `itemtok explain`."""

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from llm_itemtok import strict
from llm_itemtok.config import RunConfig
from llm_itemtok.errors import RecipeError
from llm_itemtok.recipe_file import as_plain
from llm_itemtok.training.arguments import OWNED, explain_setting


def explain(dotted: str = "") -> str:
    """Say what a setting means, what it takes and what it is by default; for a section, its settings.

    Args:
        dotted: such as `tokenizer.levels`; empty for the whole recipe.

    Raises:
        RecipeError: if there is no such setting, with the nearest one.
    """
    sections: list[type] = [RunConfig]
    owners: list[type] = []
    path: tuple[str, ...] = ()
    names = [name for name in dotted.split(".") if name]
    while names:
        path, holder = (*path, names.pop(0)), owners[:1]
        owners = [section for section in sections if path[-1] in strict.annotations_of(section)]
        if not owners and dotted == path[-1] and (homes := _homes(dotted)):
            raise RecipeError(f"explain: `{dotted}` stands in a section; ask for {' or '.join(homes)}")
        if not owners:
            strict.Checker("explain").fail_unknown(path, {n for s in sections for n in strict.annotations_of(s)})
        annotations = [strict.annotations_of(owner)[path[-1]] for owner in owners]
        sections = [part for annotation in annotations for part in strict.sections_in(annotation)]
        entries = [part for annotation in annotations for part in strict.entries_in(annotation)]
        if entries and names:
            path, sections, owners = (*path, names.pop(0)), entries, []  # the recipe names its entries as it likes
        elif not sections and not names and holder and path[-1] == "kind" and len(owners) > 1:
            return _explain_kinds(dotted, owners, _default(holder[0], path[-2]))
        elif not sections:
            return _explain_leaf(dotted, path, names, owners, entries)
    return "\n\n".join(dict.fromkeys(_explain_section(dotted, section) for section in sections))


def _homes(name: str) -> list[str]:
    """Where a setting of that name stands, each as in a message: `` `tokenizer.levels` ``."""
    sections = {top: strict.sections_in(annotation) for top, annotation in strict.annotations_of(RunConfig).items()}
    ours = [top for top, parts in sections.items() if any(name in strict.annotations_of(part) for part in parts)]
    library = ["trainer"] if name in TrainingArguments.__dataclass_fields__ and name not in OWNED else []
    return [f"`{top}.{name}`" for top in [*ours, *library]]


def _explain_leaf(
    dotted: str, path: tuple[str, ...], below: Sequence[str], owners: Sequence[type], entries: Sequence[type]
) -> str:
    """Explain a setting that is no section, `below` being what was asked for under it."""
    if path == ("trainer",) and below:
        return explain_setting(below[0])
    names = strict.names_in(strict.annotations_of(owners[0])[path[-1]])
    if below and ((names is not None and below[0] not in names) or len(below) > 1):
        strict.Checker("explain").fail_unknown((*path, *below), names or ())
    dotted = ".".join(path)
    fields = "\n".join(dict.fromkeys(_explain_field(dotted, owner, path[-1]) for owner in owners))
    return "\n\n".join([fields, *(_explain_section(f"{dotted}.NAME", entry) for entry in entries)])


def _explain_kinds(dotted: str, owners: Sequence[type], section: Any) -> str:
    """Explain which kinds a section may be of, `section` being what it is by default."""
    texts = {strict.choices_of(strict.annotations_of(owner)["kind"])[0]: _field_docs(owner)["kind"] for owner in owners}
    lines = [f"      {kind}: {text}" for kind, text in texts.items()]
    facts = f"one of {', '.join(texts)}; default {json.dumps(section.kind)}"
    text = "Each kind has settings of its own, beside those that kinds share."
    return "\n".join([f"  {dotted}: {text}", *lines, f"      ({facts})"])


def _explain_section(dotted: str, section: type) -> str:
    prefix = f"{dotted}." if dotted else ""
    fields = [_explain_field(prefix + name, section, name) for name in strict.annotations_of(section)]
    return "\n".join([f"{dotted or 'recipe'}: {section.__doc__}", *fields])


def _explain_field(dotted: str, section: type, name: str) -> str:
    annotation = strict.annotations_of(section)[name]
    default = _default(section, name)
    facts = [strict.type_name(annotation), *(f"only with {mark}" for mark in strict.conditions_of(annotation))]
    if not strict.sections_in(annotation):
        given = default is not dataclasses.MISSING
        facts.append(f"default {json.dumps(as_plain(default))}" if given else "must be given")
    return f"  {dotted}: {_field_docs(section)[name]}\n      ({'; '.join(facts)})"


def _default(section: type, name: str) -> Any:
    """A setting's default, or `dataclasses.MISSING`."""
    return next(strict.default_of(part) for part in dataclasses.fields(section) if part.name == name)


def _field_docs(section: type) -> dict[str, str]:
    """Field → the text under it, read from the source of the class."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(node, ast.ClassDef)
    return {
        part.target.id: ast.literal_eval(text.value)
        for part, text in itertools.pairwise(node.body)
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and isinstance(text, ast.Expr)
    }

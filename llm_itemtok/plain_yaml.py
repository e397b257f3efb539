"""YAML as recipes are written in: without its surprises.

Anchors and aliases are refused: a few lines of them stand for gigabytes, and recipes have other ways to say a thing
once. A key written twice is an error, because YAML would silently keep the last. Knows text and plain values; knows
neither files nor settings.
"""

from collections.abc import Hashable
from typing import Any

import yaml

from llm_itemtok.errors import RecipeError


def parse(content: bytes | str, source: str) -> Any:
    """Read one YAML document.

    Args:
        content: its text.
        source: what messages call it, such as its path.

    Raises:
        RecipeError: if it is not such YAML; the message names the line.
    """
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

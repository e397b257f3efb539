"""Texts of data and models as people are shown them: on one line, and nothing that a terminal would obey."""

import json
import re
from typing import Any

_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines and paragraphs, changes of direction, and what no encoding holds."""


def one_line(text: str) -> str:
    r"""A text on one line: what is no letter, sign or space in it as Python writes it, such as `\n` or `\x1b`."""
    return _UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


def json_line(value: Any) -> str:
    r"""A value as JSON on one line: letters as they are, and as `\uXXXX` what `one_line` does not show."""
    return _UNSHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def lines(text: str) -> str:
    """A text whose own line ends stay, and each line as `one_line` gives it."""
    return "\n".join(map(one_line, text.split("\n")))

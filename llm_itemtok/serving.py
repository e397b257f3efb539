"""Requests and replies as JSON: one history in, a ranked list out.

A request is `{"user": …, "history": [item ids, oldest first]}`, with `"allow": [ids]` besides when only these items may
come out, and `"deny": [ids]` when these must not. A reply is `{"user": …, "items": [{"rank", "item_id", "title",
"score"}]}`, with `"unknown": [ids]` besides when ids of the history were skipped, and `"unknown_allow"` and
`"unknown_deny"` when ids of those lists were. To a line that is no request it is `{"error": …}`. Anything else in a
request is an error: a misspelt `deny` must not let through what may not come out.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_itemtok.answering import Answering, Recommendation, item_id_list
from llm_itemtok.errors import DataError
from llm_itemtok.printable import json_line, one_line

BATCH = 32
"""Requests answered at a time when all of them are there already, as in a file."""

_SHAPE = '{"user": …, "history": [item ids]}, with "allow" or "deny": [item ids] where wanted'


@dataclass(frozen=True)
class Request:
    """What one reply is asked for; `allow` None lets all items come out."""

    user: str | float | None
    history: list[str]
    allow: list[str] | None
    deny: list[str]


def answer(
    user: str | float | None,
    items: Sequence[Recommendation],
    unknown: Sequence[str] = (),
    *,
    unknown_allow: Sequence[str] = (),
    unknown_deny: Sequence[str] = (),
) -> dict[str, Any]:
    """Build a reply; the lists of unknown ids are in it only if there are any."""
    reply: dict[str, Any] = {"user": user, "items": [asdict(item) for item in items]}
    skipped = {"unknown": unknown, "unknown_allow": unknown_allow, "unknown_deny": unknown_deny}
    return reply | {name: list(ids) for name, ids in skipped.items() if ids}


def text_lines(items: Iterable[Recommendation]) -> list[str]:
    """Recommendations for people, a line each whatever is in their ids and titles."""
    return [
        f"{item.rank:>3}  {item.score:8.3f}  {one_line(item.item_id):<14}  {one_line(item.title)}" for item in items
    ]


def answer_lines(
    recommender: Answering,
    lines: Iterable[str | bytes],
    k: int,
    *,
    allow: Iterable[str] | None = None,
    deny: Iterable[str] = (),
    batch: int = BATCH,
) -> Iterator[str]:
    """Answer JSON Lines requests, in order.

    Args:
        recommender: gives the answers.
        lines: one request a line, as text or as bytes in UTF-8; blank lines are passed over.
        k: items a reply.
        allow: items that may come out of any request; of one with a list of its own, those in both. All when None.
        deny: items that must not come out of any request, besides its own list.
        batch: requests read before the first of them is answered; 1 for a conversation.

    Yields:
        One JSON reply a line that is not blank.

    Raises:
        DataError: at the end, if there were lines that are no requests, naming the first.
    """
    lists = (None if allow is None else frozenset(item_id_list(allow)), frozenset(item_id_list(deny)))
    waiting: list[Request | DataError] = []
    bad: list[DataError] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            waiting.append(_request(line, number))
        except DataError as error:
            waiting.append(error)
            bad.append(error)
        if len(waiting) == batch:
            yield from _answer_all(recommender, waiting, k, *lists)
            waiting = []
    yield from _answer_all(recommender, waiting, k, *lists)
    if bad:
        more = f"\n  and {len(bad) - 1:,} more lines, whose replies say why" if len(bad) > 1 else ""
        raise DataError(f"standard input, {bad[0]}{more}")


def _answer_all(
    recommender: Answering,
    waiting: Sequence[Request | DataError],
    k: int,
    allow: frozenset[str] | None,
    deny: frozenset[str],
) -> Iterator[str]:
    requests = [request for request in waiting if isinstance(request, Request)]
    # Lists that are for all requests are handed on as one object, which `recommend_batch` reads once.
    lists = iter(
        recommender.recommend_batch(
            [request.history for request in requests],
            k,
            allow=[
                allow if request.allow is None else request.allow if allow is None else allow & set(request.allow)
                for request in requests
            ],
            deny=[deny.union(request.deny) if request.deny else deny for request in requests],
        )
    )
    for request in waiting:
        if isinstance(request, DataError):
            reply: dict[str, Any] = {"error": str(request)}
        else:
            reply = answer(
                request.user,
                next(lists),
                recommender.known(request.history)[1],
                unknown_allow=recommender.known(request.allow or ())[1],
                unknown_deny=recommender.known(request.deny)[1],
            )
        yield json_line(reply)


def _request(line: str | bytes, number: int) -> Request:
    """What one line asks for."""
    try:
        text = line if isinstance(line, str) else line.decode("utf-8-sig" if number == 1 else "utf-8")
        request = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and brackets without end
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"line {number}: a request must be JSON, {_SHAPE}: {reason}") from error
    if not isinstance(request, dict) or not isinstance(request.get("history"), list):
        raise DataError(f"line {number}: a request must be {_SHAPE}, was: {text.strip()[:80]}")
    if others := sorted(request.keys() - {"user", "history", "allow", "deny"}):
        raise DataError(f"line {number}: a request must be {_SHAPE}, and nothing else, was: {', '.join(others):.80}")
    user = request.get("user")
    if isinstance(user, bool | list | dict) or (isinstance(user, float) and not math.isfinite(user)):
        raise DataError(f"line {number}: `user` must be text or a number, was: {user!r:.80}")
    lists = {name: _item_ids(request.get(name), name, number) for name in ("history", "allow", "deny")}
    return Request(user, lists["history"] or [], lists["allow"], lists["deny"] or [])


def _item_ids(given: Any, name: str, number: int) -> list[str] | None:
    """Ids of a request's list as text; None where there is no such list."""
    if given is None:
        return None
    if not isinstance(given, list):
        raise DataError(f"line {number}: `{name}` must be a list of item ids, was: {given!r:.80}")
    wrong = [item for item in given if isinstance(item, bool) or not isinstance(item, str | int)]
    if wrong:
        raise DataError(f"line {number}: item ids must be text or whole numbers, was: {wrong[0]!r}")
    return [str(item) for item in given]


def ids_of(text: str) -> list[str]:
    """Item ids of `ID,ID`, or of the lines of `@FILE`, which may hold commas.

    Raises:
        DataError: if there is no such file, or it is not text in UTF-8.
    """
    if not text.startswith("@"):
        return [item_id.strip() for item_id in text.split(",") if item_id.strip()]
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{text[1:]}: must be text in UTF-8, one item id a line: {error}") from error
    except OSError as error:
        raise DataError(f"{text}: a file of item ids, one a line, must be behind `@`: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip()]

"""Requests and replies as JSON: one history in, a ranked list out.

A request is `{"user": …, "history": [item ids, oldest first]}`; a reply is `{"user": …, "items": [{"rank", "item_id",
"title", "score"}]}`, with `"unknown": [ids]` besides when ids of the history were skipped.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from llm_itemtok.errors import DataError
from llm_itemtok.recommender import Recommendation, Recommender

BATCH = 32
"""Requests answered at a time when all of them are there already, as in a file."""


def answer(user: str | None, items: Sequence[Recommendation], unknown: Sequence[str] = ()) -> dict[str, Any]:
    """Build a reply."""
    reply: dict[str, Any] = {"user": user, "items": [asdict(item) for item in items]}
    if unknown:
        reply["unknown"] = list(unknown)
    return reply


def answer_lines(recommender: Recommender, lines: Iterable[str], k: int, *, batch: int = BATCH) -> Iterator[str]:
    """Answer JSON Lines requests, in order.

    Args:
        recommender: gives the answers.
        lines: one request a line; blank lines are passed over.
        k: items a reply.
        batch: requests read before the first of them is answered; 1 for a conversation.

    Yields:
        One JSON reply a request.

    Raises:
        DataError: for a line that is no request, naming it; the requests before it are answered first.
    """
    waiting: list[tuple[str | None, list[str]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            waiting.append(_request(line, number))
        except DataError:
            yield from _answer_all(recommender, waiting, k)
            raise
        if len(waiting) == batch:
            yield from _answer_all(recommender, waiting, k)
            waiting = []
    yield from _answer_all(recommender, waiting, k)


def _answer_all(recommender: Recommender, waiting: Sequence[tuple[str | None, list[str]]], k: int) -> Iterator[str]:
    lists = recommender.recommend_batch([history for _, history in waiting], k)
    for (user, history), items in zip(waiting, lists, strict=True):
        yield json.dumps(answer(user, items, recommender.known(history)[1]), ensure_ascii=False)


def _request(line: str, number: int) -> tuple[str | None, list[str]]:
    """User and history of one line."""
    shape = '{"user": …, "history": [item ids]}'
    try:
        request = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"standard input, line {number}: a request must be JSON, {shape}: {error.msg}") from error
    if not isinstance(request, dict) or not isinstance(request.get("history"), list):
        raise DataError(f"standard input, line {number}: a request must be {shape}, was: {line.strip()[:80]}")
    wrong = [item for item in request["history"] if isinstance(item, bool) or not isinstance(item, str | int)]
    if wrong:
        raise DataError(f"standard input, line {number}: item ids must be text or whole numbers, was: {wrong[0]!r}")
    user = request.get("user")
    return (None if user is None else str(user)), [str(item) for item in request["history"]]

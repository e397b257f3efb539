"""Requests are answered in order, one reply a line, and a bad line is named."""

import json
import re
from typing import Any

import pytest

from llm_itemtok.answering import Recommendation
from llm_itemtok.errors import DataError
from llm_itemtok.serving import BATCH, answer, answer_lines, text_lines
from tests.test_recommender import IDS, merged

RECOMMENDER = merged()


def replies(lines: list[str], k: int = 3) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer_lines(RECOMMENDER, lines, k)]


def test_a_reply_is_the_recommendation():
    (reply,) = replies(['{"user": "u1", "history": ["item-3", "item-7"]}'])
    expected = RECOMMENDER.recommend(["item-3", "item-7"], 3)
    assert reply["user"] == "u1"
    assert set(reply) == {"user", "items"}
    assert [(item["rank"], item["item_id"], item["title"]) for item in reply["items"]] == [
        (item.rank, item.item_id, item.title) for item in expected
    ]
    assert [item["score"] for item in reply["items"]] == pytest.approx([item.score for item in expected])


def test_many_requests_are_answered_in_order_and_blank_lines_passed_over():
    lines = []
    for number in range(2 * BATCH + 5):
        lines += [json.dumps({"user": number, "history": [f"item-{number % 60}"]}), "\n", "  "]
    found = replies(lines)
    assert [reply["user"] for reply in found] == list(range(2 * BATCH + 5))
    for number in (0, BATCH, 2 * BATCH + 4):
        expected = [item.item_id for item in RECOMMENDER.recommend([f"item-{number % 60}"], 3)]
        assert [item["item_id"] for item in found[number]["items"]] == expected


def test_requests_may_be_bytes():
    request = '{"user": "ä", "history": ["item-3"]}'
    assert replies([request.encode()]) == replies([("\ufeff" + request).encode()]) == replies([request])


def test_no_requests_give_no_replies():
    assert replies([]) == replies(["", "\n"]) == []


def test_unknown_ids_are_told_and_numbers_are_read_as_text():
    first, second = replies(['{"history": [5, "item-3", "x"]}', '{"history": ["5", "item-3", "x"]}'])
    assert first == second
    assert first["unknown"] == ["5", "x"]
    assert first["user"] is None


def ids(reply: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in reply["items"]]


def test_a_request_says_what_may_come_out_and_what_must_not():
    whole = ids(replies(['{"history": []}'], 60)[0])
    some = whole[40:3:-6]
    found = replies(
        [
            json.dumps({"history": [], "allow": some}),
            json.dumps({"history": [], "deny": whole[:5]}),
            json.dumps({"history": [], "allow": some, "deny": some[1:]}),
            json.dumps({"history": [], "allow": []}),
            json.dumps({"history": [], "allow": None, "deny": None}),
        ],
        60,
    )
    assert [ids(reply) for reply in found] == [some[::-1], whole[5:], some[:1], [], whole]


def test_unknown_ids_of_lists_are_told_apart_from_those_of_the_history():
    (reply,) = replies(['{"history": ["h"], "allow": [7, "item-3", "a"], "deny": ["d", "item-4"]}'])
    assert ids(reply) == ["item-3"]
    skipped = {name: value for name, value in reply.items() if name.startswith("unknown")}
    assert skipped == {"unknown": ["h"], "unknown_allow": ["7", "a"], "unknown_deny": ["d"]}


def test_lists_for_all_requests_hold_besides_those_of_each():
    lines = [
        '{"history": []}',
        '{"history": [], "allow": ["item-2", "item-9", "x"]}',
        '{"history": [], "deny": ["item-2", "y"]}',
        '{"history": [], "allow": ["item-1", "item-2"], "deny": ["item-1"]}',
        '{"history": [], "allow": []}',
    ]
    allow, deny = ["item-1", "item-2", "item-3", "item-4"], ["item-4", "item-5"]
    found = [json.loads(line) for line in answer_lines(RECOMMENDER, lines, 60, allow=allow, deny=deny)]
    expected = [["item-1", "item-2", "item-3"], ["item-2"], ["item-1", "item-3"], ["item-2"], []]
    assert [sorted(ids(reply)) for reply in found] == expected
    assert [reply.get("unknown_allow") for reply in found] == [None, ["x"], None, None, None]
    assert [reply.get("unknown_deny") for reply in found] == [None, None, ["y"], None, None]
    (free,) = (json.loads(line) for line in answer_lines(RECOMMENDER, lines[:1], 60, deny=deny))
    assert set(ids(free)) == set(IDS) - set(deny)
    (none,) = (json.loads(line) for line in answer_lines(RECOMMENDER, lines[:1], 60, allow=[]))
    assert ids(none) == []


def test_replies_are_one_line_each_and_keep_letters_as_they_are():
    (line,) = answer_lines(RECOMMENDER, ['{"user": "Zoë\\n", "history": []}'], 60)
    assert "\n" not in line
    assert "Zoë" in line
    assert "“" in line


def test_no_id_or_title_makes_a_line_of_its_own_or_moves_the_cursor():
    (line,) = text_lines(
        [Recommendation(1, "a\x1b[2J", "x\n  1     0.000  b               Best\x9b1A\u2028\u202e東京 é", -1.5)]
    )
    assert line.isprintable()
    assert line == r"  1    -1.500  a\x1b[2J        x\n  1     0.000  b               Best\x9b1A\u2028\u202e東京 é"


def test_a_reply_is_one_line_wherever_lines_are_thought_to_end_and_says_the_same():
    user = "a\u2028b\x85c\x9b2J\x7f\u202e東京 é"
    (line,) = answer_lines(RECOMMENDER, [json.dumps({"user": user, "history": ["x\x9b"]})], 60)
    assert line.isprintable()
    assert line.splitlines() == [line]
    reply = json.loads(line)
    assert (reply["user"], reply["unknown"]) == (user, ["x\x9b"])
    assert "東京 é" in line


def test_half_a_letter_is_answered_like_any_other_text():
    """JSON can name half of a pair of code units, which no file can hold: it goes out as it came in."""
    line = '{"user": "\\ud800", "history": ["\\udfff", "item-3"]}'
    (text,) = answer_lines(RECOMMENDER, [line], 1)
    assert text.encode("utf-8")
    reply = json.loads(text)
    assert (reply["user"], reply["unknown"]) == ("\ud800", ["\udfff"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"history": [',
            r"line 4: a request must be JSON, {\"user\": …, \"history\": \[item ids\]}.*: Expecting value",
        ),
        ("[]", r"line 4: a request must be .*, was: \[\]"),
        ('{"user": "u"}', "line 4: a request must be"),
        ('{"history": "item-3"}', "line 4: a request must be"),
        ('{"history": [null]}', "line 4: item ids must be text or whole numbers, was: None"),
        ('{"history": [true]}', "line 4: item ids must be text or whole numbers, was: True"),
        ('{"history": [1.5]}', "line 4: item ids must be text or whole numbers, was: 1.5"),
        ('{"history": [], "allow": "item-3"}', "line 4: `allow` must be a list of item ids, was: 'item-3'"),
        ('{"history": [], "deny": {"item-3": 1}}', "line 4: `deny` must be a list of item ids, was: {"),
        ('{"history": [], "deny": [null]}', "line 4: item ids must be text or whole numbers, was: None"),
        (f'{{"history": [{"1" * 5000}]}}', "line 4: a request must be JSON, .*: Exceeds the limit"),
        (f'{{"history": {"[" * 100_000}', "line 4: a request must be JSON, .*: maximum recursion depth"),
        ('{"user": {"id": 1}, "history": []}', "line 4: `user` must be text or a number, was: {'id': 1}"),
        ('{"user": NaN, "history": []}', "line 4: `user` must be text or a number, was: nan"),
        ('{"user": true, "history": []}', "line 4: `user` must be text or a number, was: True"),
        ('{"history": [], "dney": ["item-3"], "k": 3}', "line 4: a request must be .* nothing else, was: dney, k"),
        (b'{"user": "\xff", "history": []}', "line 4: a request must be JSON, .*: 'utf-8' codec can't decode"),
    ],
)
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_bad_line_is_answered_as_such_and_all_others_as_ever(line, message, batch):
    good = '{"user": "u", "history": []}'
    replies = answer_lines(RECOMMENDER, [good, "", good, line, good], 2, batch=batch)
    told = [json.loads(next(replies)) for _ in range(4)]
    assert [len(reply.get("items", [])) for reply in told] == [2, 2, 0, 2]
    assert re.search(message, told[2]["error"])
    with pytest.raises(DataError, match=f"standard input, {message}"):
        next(replies)


def test_a_reply_without_unknown_ids_says_nothing_of_them():
    item = Recommendation(1, "a", "", -0.5)
    assert answer("u", [item]) == {
        "user": "u", "items": [{"rank": 1, "item_id": "a", "title": "", "score": -0.5}]
    }  # fmt: skip
    assert answer(None, [], ["x"]) == {"user": None, "items": [], "unknown": ["x"]}
    assert answer(None, [], unknown_deny=["x"]) == {"user": None, "items": [], "unknown_deny": ["x"]}


@pytest.mark.parametrize("lists", [{"allow": "item-3"}, {"deny": "item-3"}])
def test_a_text_is_no_list(lists):
    with pytest.raises(DataError, match="must be a list of item ids, was: the text 'item-3'"):
        list(answer_lines(RECOMMENDER, ['{"history": []}'], 3, **lists))

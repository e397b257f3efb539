"""Assignment: never two items on one code, the best sum or the most confident first, and nothing without a reason."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_itemtok.errors import DataError
from llm_itemtok.items.assign import Assignment, Candidates, assign
from llm_itemtok.items.codes import ItemCodes

METHODS = ("greedy", "matching")
BOTH = pytest.mark.parametrize("method", METHODS)


def candidates(keep: list[float], *edges: tuple[int, tuple[int, ...], float]) -> Candidates:
    return Candidates(
        np.array([item for item, _, _ in edges], dtype=np.int64),
        np.array([code for _, code, _ in edges], dtype=np.int32).reshape(len(edges), 2),
        np.array([value for _, _, value in edges], dtype=np.float32),
        np.array(keep, dtype=np.float32),
    )


def of_table(*rows: tuple[int, ...], sizes: tuple[int, ...] = (4, 4)) -> ItemCodes:
    return ItemCodes(np.array(rows), sizes)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ItemCodes, Candidates]:
    """Up to 6 items on 9 codes, each with up to 4 candidates; log-likelihoods of few values, so that many tie."""
    num = draw(st.integers(1, 6))
    flat = draw(st.permutations(range(9)))[:num]
    table = np.stack(np.unravel_index(flat, (3, 3)), axis=1)
    edge = st.tuples(st.integers(0, num - 1), st.integers(0, 8), st.integers(-4, 0))
    edges = draw(st.lists(edge, max_size=4 * num))
    keep = draw(st.lists(st.integers(-4, 0), min_size=num, max_size=num))
    return ItemCodes(table, (3, 3)), candidates(keep, *((i, divmod(code, 3), value) for i, code, value in edges))


def total(found: Assignment, given_: Candidates, price: float) -> float:
    """What is maximised."""
    return float(given_.keep.sum() - found.before.sum() + found.after.sum() - price * len(found.moved))


def best_total(codes: ItemCodes, given_: Candidates, price: float) -> float:
    """The same, over all assignments there are."""
    choices = []
    for item, own in enumerate(map(tuple, codes.table.tolist())):
        values = {own: float(given_.keep[item])}
        for row, code, value in zip(given_.items, given_.codes.tolist(), given_.log_likelihoods, strict=True):
            if row == item and tuple(code) != own:
                values[tuple(code)] = max(values.get(tuple(code), -np.inf), float(value) - price)
        choices.append(list(values.items()))
    return max(
        sum(value for _, value in chosen)
        for chosen in itertools.product(*choices)
        if len({code for code, _ in chosen}) == codes.num_items
    )


@BOTH
@given(case=cases(), price=st.sampled_from([0.0, 0.5, 2.0]), share=st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=150, deadline=None)
def test_codes_stay_unique_items_get_what_they_were_offered_and_the_limit_holds(method, case, price, share) -> None:
    codes, given_ = case
    limit = int(share * codes.num_items)
    found = assign(codes, given_, method=method, price=price, max_moves=limit)
    assert ItemCodes(found.table, codes.sizes).is_injective
    assert len(found.moved) <= limit
    offered = {(int(row), *code) for row, code in zip(given_.items, given_.codes.tolist(), strict=True)}
    changed = (found.table != codes.table).any(axis=1)
    assert found.moved.tolist() == np.flatnonzero(changed).tolist()
    assert all((int(row), *found.table[row].tolist()) in offered for row in found.moved)
    assert total(found, given_, price) >= float(given_.keep.sum()) - 1e-6
    again = assign(codes, given_, method=method, price=price, max_moves=limit)
    np.testing.assert_array_equal(again.table, found.table)


@given(case=cases(), price=st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=100, deadline=None)
def test_matching_finds_the_best_sum_there_is(case, price) -> None:
    codes, given_ = case
    found = assign(codes, given_, method="matching", price=price, max_moves=codes.num_items)
    assert total(found, given_, price) == pytest.approx(best_total(codes, given_, price), abs=1e-5)


@BOTH
def test_of_two_items_that_want_one_code_the_more_confident_gets_it_and_the_other_its_next(method) -> None:
    codes = of_table((0, 0), (0, 1))
    wanted = candidates([-9, -9], (0, (3, 3), -2.0), (1, (3, 3), -1.0), (0, (2, 2), -3.0), (1, (1, 1), -8.0))
    found = assign(codes, wanted, method=method, max_moves=2)
    assert found.table.tolist() == [[2, 2], [3, 3]]
    assert found.collisions == 1.0
    np.testing.assert_array_equal(found.after, np.array([-3, -1], dtype=np.float32))
    np.testing.assert_array_equal(found.before, np.array([-9, -9], dtype=np.float32))


@BOTH
def test_without_another_free_candidate_an_item_keeps_its_code(method) -> None:
    codes = of_table((0, 0), (0, 1))
    found = assign(codes, candidates([-5, -5], (0, (3, 3), -2.0), (1, (3, 3), -1.0)), method=method, max_moves=2)
    assert found.table.tolist() == [[0, 0], [3, 3]]


@BOTH
def test_a_code_that_was_left_is_free_for_another(method) -> None:
    """Item 0 is asked before item 1, whose code it wants, has left it."""
    codes = of_table((0, 0), (0, 1), (0, 2))
    wanted = candidates([-9, -9, -9], (0, (0, 1), -0.5), (1, (0, 2), -1.0), (2, (3, 3), -2.0))
    assert assign(codes, wanted, method=method, max_moves=3).table.tolist() == [[0, 1], [0, 2], [3, 3]]


def test_only_matching_lets_two_items_change_places() -> None:
    codes = of_table((0, 0), (0, 1))
    swap = candidates([-5, -5], (0, (0, 1), -1.0), (1, (0, 0), -1.0))
    assert assign(codes, swap, method="matching", max_moves=2).table.tolist() == [[0, 1], [0, 0]]
    assert not len(assign(codes, swap, method="greedy", max_moves=2).moved)


@BOTH
def test_a_move_must_be_worth_its_price(method) -> None:
    codes = of_table((0, 0), (0, 1))
    offers = candidates([-5, -5], (0, (3, 3), -3.0), (1, (2, 2), -4.5))
    assert assign(codes, offers, method=method, price=1.0, max_moves=2).moved.tolist() == [0]
    assert not len(assign(codes, offers, method=method, price=2.5, max_moves=2).moved)


@BOTH
def test_under_a_limit_those_move_who_gain_most(method) -> None:
    codes = of_table((0, 0), (0, 1), (0, 2))
    offers = candidates([-5, -9, -5], (0, (3, 3), -4.0), (1, (2, 2), -4.0), (2, (1, 1), -3.0))
    assert assign(codes, offers, method="matching", max_moves=1).moved.tolist() == [1]
    greedy = assign(codes, offers, method="greedy", max_moves=1).moved.tolist()
    assert greedy == [2]  # the most confident is asked first, whatever it gains
    assert len(assign(codes, offers, method=method, max_moves=2).moved) == 2


def test_of_equal_claims_the_first_item_and_the_first_candidate_win() -> None:
    codes = of_table((0, 0), (0, 1))
    one_code = candidates([-9, -9], (1, (3, 3), -1.0), (0, (3, 3), -1.0))
    assert assign(codes, one_code, max_moves=2).table.tolist() == [[3, 3], [0, 1]]
    two_codes = candidates([-9, -9], (1, (2, 2), -1.0), (1, (3, 3), -1.0))
    assert assign(codes, two_codes, max_moves=2).table.tolist() == [[0, 0], [2, 2]]


@BOTH
def test_wanting_a_code_that_another_keeps_is_a_collision(method) -> None:
    """Of four items, the second is content and the third has no candidates; the first wants what the second has."""
    codes = of_table((0, 0), (0, 1), (0, 2), (0, 3))
    wanted = candidates([-5, -1, 0, -5], (0, (0, 1), -2.0), (1, (1, 1), -3.0), (3, (3, 3), -2.0))
    assert assign(codes, wanted, method=method, max_moves=4).collisions == 0.5


@BOTH
def test_codes_of_items_without_candidates_are_out_of_reach(method) -> None:
    codes = of_table((0, 0), (0, 1))
    assert not len(assign(codes, candidates([-5, -5], (0, (0, 1), -1.0)), method=method, max_moves=2).moved)
    nothing = Candidates(np.empty(0, np.int64), np.empty((0, 2), np.int32), np.empty(0, np.float32), np.zeros(2, "f4"))
    found = assign(codes, nothing, method=method, max_moves=2)
    assert found.table.tolist() == codes.table.tolist()
    assert found.collisions == 0.0


@BOTH
def test_what_does_not_fit_is_refused(method) -> None:
    with pytest.raises(DataError, match=r"must be unique, but 100.0% of the items share theirs"):
        assign(of_table((0, 0), (0, 0)), candidates([0, 0]), method=method, max_moves=2)
    codes = of_table((0, 0), (0, 1))
    with pytest.raises(DataError, match=r"codewords below \(4, 4\), found others"):
        assign(codes, candidates([0, 0], (0, (0, 4), -1.0)), method=method, max_moves=2)
    with pytest.raises(DataError, match=r"log-likelihood of keeping an item, 2, was: \(1,\)"):
        assign(codes, candidates([0], (0, (0, 3), -1.0)), method=method, max_moves=2)
    with pytest.raises(DataError, match="must be finite numbers"):
        assign(codes, candidates([0, 0], (0, (0, 3), float("nan"))), method=method, max_moves=2)


@pytest.mark.scale
@pytest.mark.parametrize(("method", "num"), [("greedy", 1_000_000), ("matching", 20_000)])
def test_large_catalogues_with_ten_candidates_an_item_take_minutes(method, num) -> None:
    """Matching is for tens of thousands: the candidates here are drawn at random, which is its worst case."""
    rng = np.random.default_rng(0)
    sizes = (256, 256, 256)
    flat = rng.choice(int(np.prod(sizes)), size=num, replace=False)
    codes = ItemCodes(np.stack(np.unravel_index(flat, sizes), axis=1), sizes)
    offered = np.stack(np.unravel_index(rng.integers(0, int(np.prod(sizes)), size=10 * num), sizes), axis=1)
    values = rng.normal(-6, 1, size=10 * num).astype(np.float32)
    given_ = Candidates(np.repeat(np.arange(num), 10), offered.astype(np.int32), values, np.full(num, -6, np.float32))
    found = assign(codes, given_, method=method, price=0.5, max_moves=num)
    assert ItemCodes(found.table, sizes).is_injective

"""Every case gets the list that it gets alone, in its place, however the cases are cut up and shared out."""

import time
from pathlib import Path

import numpy as np
import pytest

from llm_itemtok.decoding.beams import beam_search
from llm_itemtok.decoding.tree import TreeDecoder
from llm_itemtok.evaluation.full_ranking import rank_cases
from llm_itemtok.model.prompts import Prompts
from llm_itemtok.vocab.trie import ItemTrie
from tests.evaluation.shared import SIZES, make_cases, ranked
from tests.process_pairs import PLAIN, finish, start
from tests.tiny import tiny_item_model


def test_lists_are_those_of_each_case_alone_in_the_order_of_the_cases() -> None:
    cases = make_cases(37)
    model, tokenizer = tiny_item_model()
    trie, prompts = ItemTrie(model.vocab.codes), Prompts(tokenizer, model.vocab)
    ranking = ranked(cases)
    for case, history in enumerate(cases.histories()):
        alone = beam_search(TreeDecoder(model), trie, [prompts.history(history[-10:])], beam=20)
        assert ranking.items[case].tolist() == alone.items[0].tolist()
        np.testing.assert_allclose(ranking.scores[case], alone.scores[0], atol=1e-5)
        place = np.flatnonzero(alone.items[0] == cases.targets[case])
        assert ranking.ranks[case] == (place[0] + 1 if len(place) else 0)


@pytest.mark.parametrize("batch_size", [1, 7, 37, 64])
def test_the_size_of_a_batch_changes_no_list(batch_size: int) -> None:
    cases = make_cases(37)
    ours, theirs = ranked(cases, batch_size=batch_size), ranked(cases)
    np.testing.assert_array_equal(ours.items, theirs.items)
    np.testing.assert_array_equal(ours.ranks, theirs.ranks)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)


def test_seen_items_are_left_out_but_not_a_target_that_comes_again() -> None:
    cases = make_cases(37)
    ranking = ranked(cases, beam=60, mask_seen=True)
    again = [case for case, history in enumerate(cases.histories()) if cases.targets[case] in history]
    assert again
    assert (ranking.ranks > 0).all()
    for case, history in enumerate(cases.histories()):
        assert set(ranking.items[case]) & set(history) <= {cases.targets[case]}


def test_who_knows_that_nobody_returns_knows_it_of_the_target_too() -> None:
    cases = make_cases(37)
    without, masked = ranked(cases, beam=60, repeats=False), ranked(cases, beam=60, mask_seen=True)
    again = np.array([target in history for history, target in zip(cases.histories(), cases.targets, strict=True)])
    assert again.any()
    assert (without.ranks[again] == 0).all()
    np.testing.assert_array_equal(without.ranks[~again], masked.ranks[~again])
    for case, history in enumerate(cases.histories()):
        assert not set(without.items[case]) & set(history)
    np.testing.assert_array_equal(
        ranked(cases, mask_seen=True, repeats=False).ranks, ranked(cases, repeats=False).ranks
    )


def test_progress_ends_with_all_cases() -> None:
    told: list[tuple[int, int]] = []
    ranked(make_cases(37), batch_size=8, progress=lambda done, total: told.append((done, total)))
    assert told == [(8, 37), (16, 37), (24, 37), (32, 37), (37, 37)]


def test_the_time_in_the_model_is_part_of_the_time_and_the_clock_is_taken_off_again() -> None:
    model, tokenizer = tiny_item_model()
    trie, prompts = ItemTrie(model.vocab.codes), Prompts(tokenizer, model.vocab)
    settings = {"beam": 20, "history_length": 10, "normaliser": "level"}
    before = set(vars(model))
    began = time.perf_counter()
    many, none = (rank_cases(model, trie, prompts, make_cases(number), **settings) for number in (37, 0))
    assert many.model_seconds is not None
    assert 0 < many.model_seconds < time.perf_counter() - began
    assert none.model_seconds == 0
    assert set(vars(model)) == before


@pytest.mark.slow
def test_two_processes_rank_as_one_to_the_last_digit(tmp_path: Path) -> None:
    """Also with fewer batches than processes, and with no case at all; each process gets everything."""
    finish([start(["-m", "tests.evaluation.shared", tmp_path, place, "2"], PLAIN) for place in "01"])
    for size in SIZES:
        alone = ranked(make_cases(size), mask_seen=size == 8)
        for place in "01":
            shared = np.load(tmp_path / f"{size}-{place}.npz")
            for name in ("items", "scores", "ranks"):
                np.testing.assert_array_equal(shared[name], getattr(alone, name), err_msg=f"{name} of {size} cases")

"""Beams are the right items in the right order, for every supported family."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_itemtok.decoding.beams import Beams, beam_search
from llm_itemtok.decoding.choice import decoder_for
from llm_itemtok.decoding.scoring import score_items
from llm_itemtok.decoding.tree import TreeDecoder, TreeState
from llm_itemtok.errors import DataError
from llm_itemtok.items.codes import ItemCodes
from llm_itemtok.model.item_lm import ItemTokenModel
from llm_itemtok.model.likelihood import Normaliser
from llm_itemtok.vocab.trie import ItemTrie
from tests.code_tables import code_tables
from tests.decoding.test_decoders import generated
from tests.tiny import ALL_FAMILIES, FAMILIES, KINDS, states, tiny_codes, tiny_item_model, tiny_prompts

HISTORIES = [np.array([3, 7, 1, 9, 22]), np.array([5]), np.array([], dtype=int), np.arange(12)]


@pytest.mark.parametrize("normaliser", ["level", "items", "vocab", "children"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_as_wide_as_the_catalogue_rank_as_exact_scoring_does(family: str, normaliser: str) -> None:
    model, tokenizer = tiny_item_model(family)
    trie, prompts = ItemTrie(model.vocab.codes), tiny_prompts(model, tokenizer)
    rendered = [prompts.history(history) for history in HISTORIES]
    beams = beam_search(decoder_for(model), trie, rendered, beam=trie.num_items, normaliser=normaliser)
    everything = [np.arange(trie.num_items)] * len(rendered)
    exact = np.stack(score_items(model, trie, rendered, everything, normaliser=normaliser))
    np.testing.assert_array_equal(beams.items, np.argsort(-exact, axis=1))
    np.testing.assert_allclose(beams.scores, -np.sort(-exact, axis=1), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 7, 40])
def test_beams_of_20_rank_as_generate_with_a_prefix_function_does(family: str, padding: int) -> None:
    """`padding`: item ids may fall beyond the base table, astride its end, or wholly into its padding."""
    model, tokenizer = tiny_item_model(family, padding=padding, normaliser="vocab")
    trie, prompts = ItemTrie(model.vocab.codes), tiny_prompts(model, tokenizer)
    for history in HISTORIES:
        prompt = prompts.history(history)
        ours = beam_search(decoder_for(model), trie, [prompt], beam=20, normaliser="vocab")
        items, scores = generated(model, prompt, 20)
        assert ours.items[0].tolist() == items
        np.testing.assert_allclose(ours.scores[0], scores, atol=2e-4)


@pytest.mark.parametrize("sizes", [(60,), (1, 1, 60), (2, 2, 2, 2, 4), (6, 5, 4)])
@pytest.mark.parametrize("family", KINDS)
def test_every_recommendation_is_an_existing_item_and_comes_once(family: str, sizes: tuple[int, ...]) -> None:
    codes = tiny_codes(min(55, int(np.prod(sizes))), sizes)
    model, tokenizer = tiny_item_model(family, codes=codes)
    trie, prompts = ItemTrie(codes), tiny_prompts(model, tokenizer)
    rng = np.random.default_rng(1)
    rendered = [prompts.history(rng.integers(0, codes.num_items, size=rng.integers(0, 9))) for _ in range(50)]
    beams = beam_search(decoder_for(model), trie, rendered, beam=20)
    assert beams.items.min() >= 0
    assert beams.items.max() < codes.num_items
    assert all(len(set(row)) == 20 for row in beams.items.tolist())
    assert (np.diff(beams.scores, axis=1) <= 0).all()


def test_a_catalogue_smaller_than_the_beam_comes_out_whole() -> None:
    codes = tiny_codes(3)
    model, tokenizer = tiny_item_model(codes=codes)
    prompt = tiny_prompts(model, tokenizer).history([0, 1])
    beams = beam_search(decoder_for(model), ItemTrie(codes), [prompt], beam=20)
    assert sorted(beams.items[0].tolist()) == [0, 1, 2]


def test_excluded_items_never_come_out_and_the_rest_keep_their_order() -> None:
    model, tokenizer = tiny_item_model()
    trie, prompt = ItemTrie(model.vocab.codes), tiny_prompts(model, tokenizer).history([4, 8])
    free = beam_search(decoder_for(model), trie, [prompt], beam=60).items[0]
    banned = free[[0, 2, 5]]
    kept = beam_search(decoder_for(model), trie, [prompt], beam=60, excluded=[banned]).items[0]
    assert kept[:57].tolist() == [item for item in free.tolist() if item not in banned]
    assert kept[57:].tolist() == [-1, -1, -1]


@torch.inference_mode()
def one_by_one(model: ItemTokenModel, prompt: np.ndarray, normaliser: str) -> np.ndarray:
    """Log-probability `[N]` of every item from plain forward passes over whole paths; no cache, tree or trie."""
    codes, paths = model.vocab.codes, model.vocab.paths
    hidden = states(model, [prompt] * len(paths), paths)
    total = torch.zeros(len(paths))
    for level in range(codes.num_levels):
        log_probs = model.level_log_probs(hidden[:, level], level, "level" if normaliser == "children" else normaliser)
        if normaliser == "children":
            for row, code in enumerate(codes.table):
                same = (codes.table[:, :level] == code[:level]).all(axis=1)
                log_probs[row] -= log_probs[row, np.unique(codes.table[same, level])].logsumexp(0)
        total += log_probs[torch.arange(len(paths)), torch.from_numpy(codes.table[:, level].astype(np.int64))]
    return total.numpy()


@dataclass
class Case:
    """A batch on a tiny catalogue, and what is true of it."""

    model: ItemTokenModel
    trie: ItemTrie
    prompts: list[np.ndarray]
    normaliser: str
    truth: list[np.ndarray]

    def search(self, **changes) -> Beams:
        return beam_search(decoder_for(self.model), self.trie, self.prompts, normaliser=self.normaliser, **changes)


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    codes = draw(code_tables())
    normaliser = draw(st.sampled_from(["level", "items", "vocab", "children"]))
    model, tokenizer = tiny_item_model(family, codes=codes, normaliser="level", seed=draw(st.integers(0, 3)))
    histories = draw(st.lists(st.lists(st.integers(0, len(codes) - 1), max_size=4), min_size=1, max_size=3))
    prompts = [tiny_prompts(model, tokenizer).history(history) for history in histories]
    truth = [one_by_one(model, prompt, normaliser) for prompt in prompts]
    return Case(model, ItemTrie(codes), prompts, normaliser, truth)


def check_list(items: np.ndarray, scores: np.ndarray, truth: np.ndarray, may: np.ndarray, beam: int) -> None:
    """A list holds only items that may come out, as many as there are, each once, by falling score, rightly scored.

    When there are no more than beams, these are all of them: the exhaustive ranking with the others taken out.
    """
    assert len(items) == len(scores) == min(beam, len(truth))
    count = min(beam, len(may))
    assert (items[count:] == -1).all()
    assert (scores[count:] == -np.inf).all()
    items, scores = items[:count], scores[:count]
    assert len(set(items.tolist())) == count
    assert set(items.tolist()) <= set(may.tolist())
    assert (np.diff(scores) <= 0).all()
    np.testing.assert_allclose(scores, truth[items], atol=2e-4)
    if len(may) <= beam:
        np.testing.assert_allclose(scores, -np.sort(-truth[may]), atol=2e-4)


def check_free_lists(data: st.DataObject, family: str) -> None:
    case = data.draw(cases(family))
    everything = np.arange(case.trie.num_items)
    for beam in {len(everything), data.draw(st.integers(1, len(everything) + 2))}:
        beams = case.search(beam=beam)
        for items, scores, truth in zip(beams.items, beams.scores, case.truth, strict=True):
            check_list(items, scores, truth, everything, beam)


def check_restricted_lists(data: st.DataObject, family: str) -> None:
    case = data.draw(cases(family))
    everything = np.arange(case.trie.num_items)
    lists = st.none() | st.lists(st.sampled_from(everything.tolist()), max_size=30).map(
        lambda rows: np.array(rows, int)
    )
    users = len(case.prompts)
    allowed = [data.draw(lists) for _ in range(users)]
    excluded = [data.draw(lists) for _ in range(users)]
    beam = data.draw(st.integers(1, len(everything) + 2))
    beams = case.search(beam=beam, allowed=allowed, excluded=excluded)
    for user in range(users):
        may = everything if allowed[user] is None else np.unique(allowed[user])
        may = may if excluded[user] is None else np.setdiff1d(may, excluded[user])
        check_list(beams.items[user], beams.scores[user], case.truth[user], may, beam)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_lists_of_any_catalogue_are_legal_sorted_and_exact_when_wide_enough(family: str, data: st.DataObject) -> None:
    check_free_lists(data, family)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_lists_of_what_may_come_out_are_the_full_ranking_filtered(family: str, data: st.DataObject) -> None:
    check_restricted_lists(data, family)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_many_restrictions_of_one_family(data: st.DataObject) -> None:
    check_restricted_lists(data, "llama")


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_free_lists, check_restricted_lists])
@pytest.mark.parametrize("family", ALL_FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_large_sweep(family: str, check, data: st.DataObject) -> None:
    check(data, family)


def test_only_allowed_items_come_out_however_improbable() -> None:
    model, tokenizer = tiny_item_model()
    trie, prompt = ItemTrie(model.vocab.codes), tiny_prompts(model, tokenizer).history([4, 8])
    free = beam_search(decoder_for(model), trie, [prompt], beam=60).items[0]
    last = free[-5:]
    beams = beam_search(decoder_for(model), trie, [prompt], beam=20, allowed=[np.tile(last[::-1], 2)])
    assert beams.items[0].tolist() == [*last.tolist(), *[-1] * 15]
    assert np.isneginf(beams.scores[0, 5:]).all()
    beams = beam_search(decoder_for(model), trie, [prompt], beam=20, allowed=[last], excluded=[last[1:3]])
    assert beams.items[0].tolist() == [last[0], *last[3:].tolist(), *[-1] * 17]


@pytest.mark.parametrize("family", KINDS)
def test_users_with_and_without_lists_share_a_batch(family: str) -> None:
    model, tokenizer = tiny_item_model(family)
    trie, prompts = ItemTrie(model.vocab.codes), tiny_prompts(model, tokenizer)
    rendered = [prompts.history(history) for history in HISTORIES]
    some = np.arange(0, 60, 7)
    lists = {"allowed": [some, None, np.array([], dtype=int), some], "excluded": [None, some, some, np.array([7])]}
    beams = beam_search(decoder_for(model), trie, rendered, beam=20, **lists)
    assert (beams.items[2] == -1).all()
    for user, prompt in enumerate(rendered):
        own = {name: [rows[user]] for name, rows in lists.items()}
        alone = beam_search(decoder_for(model), trie, [prompt], beam=20, **own)
        assert beams.items[user].tolist() == alone.items[0].tolist()
    everywhere = beam_search(decoder_for(model), trie, rendered, beam=20, allowed=[some] * 4)
    copies = beam_search(decoder_for(model), trie, rendered, beam=20, allowed=[some.copy() for _ in range(4)])
    np.testing.assert_array_equal(everywhere.items, copies.items)


def test_lists_that_restrict_nothing_change_nothing() -> None:
    model, tokenizer = tiny_item_model()
    trie, prompt = ItemTrie(model.vocab.codes), tiny_prompts(model, tokenizer).history([4, 8])
    free = beam_search(decoder_for(model), trie, [prompt], beam=20)
    for lists in ({"allowed": [None]}, {"excluded": [None]}, {"excluded": [[]]}, {"allowed": [np.arange(60)]}):
        beams = beam_search(decoder_for(model), trie, [prompt], beam=20, **lists)
        np.testing.assert_array_equal(beams.items, free.items)
        np.testing.assert_array_equal(beams.scores, free.scores)


class Widths(TreeDecoder):
    """Writes down how many beams it is asked to extend."""

    def __init__(self, model: ItemTokenModel) -> None:
        super().__init__(model)
        self.seen: list[int] = []

    def encode(self, prompts: list[np.ndarray]) -> TreeState:
        self.seen.append(0)
        return super().encode(prompts)

    def level_log_probs(
        self,
        state: TreeState,
        parents: torch.Tensor | None,
        codes: torch.Tensor | None,
        level: int,
        normaliser: Normaliser,
    ) -> torch.Tensor:
        self.seen.append(1 if codes is None else codes.shape[1])
        return super().level_log_probs(state, parents, codes, level, normaliser)


@pytest.mark.parametrize(
    ("lists", "widths"),
    [
        ({}, [0, 1, 6, 20]),
        ({"allowed": [np.array([3, 5, 9])]}, [0, 1, 3, 3]),
        ({"allowed": [np.array([3, 5, 9])], "excluded": [np.array([5, 11])]}, [0, 1, 2, 2]),
        ({"excluded": [np.arange(56)]}, [0, 1, 4, 4]),
        ({"allowed": [np.array([], dtype=int)]}, []),
        ({"allowed": [np.array([3])], "excluded": [np.array([3])]}, []),
    ],
)
def test_no_beam_is_spent_where_no_legal_path_is_left(lists: dict, widths: list[int]) -> None:
    """Six codewords at the first level; then no more beams than items that may come out, and no work for none."""
    model, tokenizer = tiny_item_model()
    prompt, decoder = tiny_prompts(model, tokenizer).history([2]), Widths(model)
    beam_search(decoder, ItemTrie(model.vocab.codes), [prompt], beam=20, **lists)
    assert decoder.seen == widths


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"allowed": [np.array([0, 60])]}, r"`allowed` must hold catalogue rows in \[0, 60\), was: 0 to 60"),
        ({"excluded": [np.array([-1])]}, r"`excluded` must hold catalogue rows in \[0, 60\), was: -1 to -1"),
        ({"allowed": [None, None]}, "`allowed` must have one list per prompt, 1, was: 2"),
        ({"excluded": []}, "`excluded` must have one list per prompt, 1, was: 0"),
    ],
)
def test_lists_that_do_not_fit_are_refused(lists: dict, message: str) -> None:
    model, tokenizer = tiny_item_model()
    prompt = tiny_prompts(model, tokenizer).history([2])
    with pytest.raises(DataError, match=message):
        beam_search(decoder_for(model), ItemTrie(model.vocab.codes), [prompt], beam=20, **lists)


@pytest.mark.parametrize("family", ["gemma3", "t5"])
def test_users_of_a_batch_do_not_see_each_other(family: str) -> None:
    model, tokenizer = tiny_item_model(family)
    trie, prompts = ItemTrie(model.vocab.codes), tiny_prompts(model, tokenizer)
    rendered = [prompts.history(history) for history in HISTORIES]
    together = beam_search(decoder_for(model), trie, rendered, beam=20)
    for row, prompt in enumerate(rendered):
        alone = beam_search(decoder_for(model), trie, [prompt], beam=20)
        assert alone.items[0].tolist() == together.items[row].tolist()


def test_children_log_probabilities_of_the_whole_catalogue_sum_to_one() -> None:
    codes = ItemCodes(np.array([[0, 0], [0, 1], [1, 0]], dtype=np.int32), (2, 2), provenance={})
    model, tokenizer = tiny_item_model(codes=codes)
    prompt = tiny_prompts(model, tokenizer).history([2])
    beams = beam_search(decoder_for(model), ItemTrie(codes), [prompt], beam=3, normaliser="children")
    assert np.exp(beams.scores).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"beam": 0}, "`beam` must be at least 1, was: 0"),
        (
            {"beam": 5, "allowed": [np.array([True, False])]},
            "must hold catalogue rows, whole numbers, was: bool",
        ),
        (
            {"beam": 5, "excluded": [np.array([1.7])]},
            "`excluded` must hold catalogue rows, .* was: float64",
        ),
    ],
)
def test_what_is_no_beam_and_no_list_is_refused(settings_: dict, message: str) -> None:
    model, tokenizer = tiny_item_model()
    prompt = tiny_prompts(model, tokenizer).history([1])
    with pytest.raises(DataError, match=message):
        beam_search(decoder_for(model), ItemTrie(model.vocab.codes), [prompt], **settings_)

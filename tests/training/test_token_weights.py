"""Weights of tokens are what the formulas say, by hand, by brute force, and by the release's stored gains."""

from collections import Counter

import numpy as np
import pytest

from llm_itemtok.items.codes import ENDED, ItemCodes
from llm_itemtok.training import token_weights
from tests.tiny import tiny_codes

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(60, 70)) + np.repeat(RNG.normal(size=(6, 70)), 10, axis=0)
COUNTS = RNG.integers(0, 40, 60).astype(float)
TABLE = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]])
CODES = ItemCodes(TABLE, (2, 2, 2))


def words_of_unequal_number():
    """Identifiers of one to three words."""
    words = (("red", "blue"), ("lamp", ENDED), ("one", ENDED))
    return ItemCodes(np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]]), (2, 2, 2), words=words)


@pytest.mark.parametrize(
    ("gains", "weights"),
    [
        ([20.999, 9.038, 6.326, 4.012], [1.374, 1.025, 0.885, 0.716]),
        ([23.559, 11.152, 5.342, 0.742], [1.581, 1.233, 0.912, 0.274]),
        ([8.580, 13.306, 4.458, 0.428], [1.296, 1.526, 0.973, 0.205]),
        ([10.019, 11.564, 0.930, 0.066], [1.698, 1.791, 0.465, 0.045]),
        ([7.220, 25.407, 7.437, 0.374], [1.076, 1.672, 1.089, 0.162]),
        ([3.734, 17.847, 4.796, 0.405], [0.944, 1.783, 1.067, 0.206]),
        ([2.450, 16.965, 3.017, 0.147], [0.876, 2.043, 0.984, 0.097]),
    ],
)
def test_the_gains_that_the_release_stores_give_its_weights(gains, weights):
    """Four levels, seven tables of codes, to the three digits that gains are stored with."""
    codes = ItemCodes(np.zeros((1, 4)).astype(int), (1, 1, 1, 1))
    np.testing.assert_allclose(token_weights.front(codes, np.array(gains))[0], weights, atol=1e-3)


def test_front_weights_sum_to_the_number_of_tokens_and_are_one_where_nothing_is_gained():
    gains = token_weights.prefix_gains(tiny_codes(), VECTORS)
    for some in (gains, gains[0], np.array([-1.0, 2.0, 0.0])):
        np.testing.assert_allclose(token_weights.front(tiny_codes(), some).sum(1), 3, atol=1e-12)
    for none in (np.zeros(3), -np.ones(3)):
        np.testing.assert_array_equal(token_weights.front(tiny_codes(), none), np.ones((60, 3)))


def test_gains_add_up_to_what_the_codes_tell():
    """D_0 less all gains is what is left open, and codes that nobody shares leave nothing open."""
    shared = ItemCodes(tiny_codes().table[:, :2], (6, 5))
    for codes in (tiny_codes(), shared):
        spread = token_weights.dispersions(codes, VECTORS)
        gains = token_weights.level_gains(codes, VECTORS)
        assert spread[0] - gains.sum() == pytest.approx(spread[-1])
        np.testing.assert_allclose(token_weights.prefix_gains(codes, VECTORS).mean(0), gains, atol=1e-12)
    assert token_weights.dispersions(tiny_codes(), VECTORS)[-1] == pytest.approx(0, abs=1e-12)


def test_dispersion_is_the_mean_over_prefixes_of_the_mean_distance_to_their_centre():
    codes = tiny_codes()
    for depth in range(4):
        total = 0.0
        for prefix in {tuple(row) for row in codes.table[:, :depth]}:
            rows = (codes.table[:, :depth] == prefix).all(1)
            part = VECTORS[rows]
            total += rows.sum() / 60 * np.linalg.norm(part - part.mean(0), axis=1).mean()
        assert token_weights.dispersions(codes, VECTORS)[depth] == pytest.approx(total)


def test_a_prefix_gain_is_what_the_next_codeword_tells_among_the_items_of_the_prefix():
    vectors = np.array([[0.0], [2.0], [5.0], [100.0]])
    gains = token_weights.prefix_gains(CODES, vectors)
    # Under <0>: centre 7/3, distances 7/3, 1/3 and 8/3; the second level parts {0, 2} (distances 1) from {5}.
    assert gains[0, 1] == pytest.approx(16 / 9 - 2 / 3)
    assert gains[2, 2] == gains[3, 1] == 0  # alone already
    np.testing.assert_allclose(gains[:3, 1], gains[0, 1])


def test_entropy_gains_are_what_each_token_leaves_less_open_by_hand():
    """Four items, the first two under <0, 0>; chosen 2, 2, 4 and 8 times of 16."""
    counts = np.array([2.0, 2.0, 4.0, 8.0])
    gains = token_weights.entropy_gains(CODES, counts)
    # 1.75 bits in all; 1 bit says whether it is the last; under <0> a bit parts {4} from {2, 2}; and a last bit those.
    np.testing.assert_allclose(gains / np.log(2), [1.0, 0.5, 0.25])
    np.testing.assert_allclose(gains.sum(), -np.sum(counts / 16 * np.log(counts / 16)))
    alike = token_weights.entropy_gains(CODES, np.zeros(4))
    np.testing.assert_allclose(alike.sum(), np.log(4))


def test_frequency_weights_are_one_over_the_effective_number_of_samples():
    counts = np.array([3.0, 1.0, 0.0, 0.0])
    weights = token_weights.frequency(CODES, counts, beta=0.5, over="item")
    effective = {n: 0.5 / (1 - 0.5**n) for n in (1, 3, 4)} | {0: 1.0}
    assert effective[0] == effective[1]  # a token that was never seen weighs as much as one seen once
    seen = Counter()
    for row, count in zip(TABLE, counts, strict=True):
        seen.update({(level, int(code)): count for level, code in enumerate(row)})
    for row in range(4):
        raw = np.array([effective[int(seen[level, int(code)])] for level, code in enumerate(TABLE[row])])
        np.testing.assert_allclose(weights[row], 3 * raw / raw.sum())


def test_frequency_weights_shared_out_within_items_make_no_item_weigh_more_than_another():
    weights = token_weights.frequency(tiny_codes(), COUNTS, beta=0.99, over="item")
    np.testing.assert_allclose(weights.sum(1), 3)
    np.testing.assert_allclose(token_weights.frequency(tiny_codes(), COUNTS * 0 + 1, beta=0.0, over="item"), 1)
    rare = token_weights.frequency(CODES, np.array([0.0, 1.0, 0.0, 100.0]), beta=0.99, over="item")
    assert rare[1, 0] > rare[1, 1]  # seen once, and 101 times


def test_frequency_weights_over_the_batch_favour_rare_items_and_have_mean_one_over_the_targets():
    codes = ItemCodes(np.arange(60)[:, None], (60,))
    weights = token_weights.frequency(codes, COUNTS, beta=0.9, over="batch")
    assert (weights[:, 0] * COUNTS).sum() / COUNTS.sum() == pytest.approx(1)
    order = np.argsort(COUNTS)
    assert (np.diff(weights[order, 0]) <= 1e-12).all()
    assert weights[COUNTS.argmin(), 0] > 2 * weights[COUNTS.argmax(), 0]
    np.testing.assert_allclose(token_weights.frequency(codes, COUNTS, beta=0.9, over="item"), 1)


def test_position_weights_fall_evenly_to_the_last():
    np.testing.assert_allclose(token_weights.position(CODES, last=0.5), np.tile([4 / 3, 1, 2 / 3], (4, 1)))
    np.testing.assert_array_equal(token_weights.position(CODES, last=1.0), np.ones((4, 3)))
    np.testing.assert_array_equal(token_weights.position(ItemCodes(TABLE[:2, 2:], (2,)), last=0.5), np.ones((2, 1)))


def test_tokens_without_information_gain_weigh_less():
    counts = np.array([3.0, 3.0, 0.0, 1.0])
    weights = token_weights.information_gain(CODES, counts, without=0.1)
    # Level 0: entropy falls from that of (3, 3, 0, 1) to ln 2 under <0>, to 0 under <1>. Level 1: it stays ln 2
    # for <0 0>. Level 2: <0 0 x> tells all; items alone under their prefix gain nothing.
    raw = np.array([[1, 0.1, 1], [1, 0.1, 1], [1, 1, 0.1], [1, 0.1, 0.1]])
    np.testing.assert_allclose(weights / weights[0, 0], raw)
    assert (weights * counts[:, None]).sum() / (3 * counts.sum()) == pytest.approx(1)


def test_items_that_nobody_chose_are_all_as_likely():
    weights = token_weights.information_gain(CODES, np.zeros(4), without=0.5)
    np.testing.assert_allclose(weights / weights[0, 0], [[1, 1, 1], [1, 1, 1], [1, 1, 0.5], [1, 0.5, 0.5]])


def test_a_word_is_one_token_wherever_it_stands():
    """By hand: `blue` is first of the second item and second of the first; nothing is counted behind an end."""
    codes = ItemCodes(np.array([[0, 0], [1, 1]]), (2, 2), words=(("red", "blue"), ("blue", ENDED)))
    assert token_weights.token_counts(codes, np.array([3.0, 4.0]))[:, 0].tolist() == [3, 7]
    assert token_weights.token_counts(codes, np.array([3.0, 4.0]))[0, 1] == 7


def test_identifiers_of_unequal_length_share_out_their_own_tokens_only():
    codes = words_of_unequal_number()
    held = token_weights.counted(codes)
    assert held.sum(1).tolist() == [3, 1, 2, 1]
    vectors, counts = RNG.normal(size=(4, 3)), np.array([5.0, 1.0, 2.0, 0.0])
    for weights in (
        token_weights.front(codes, token_weights.level_gains(codes, vectors)),
        token_weights.frequency(codes, counts, beta=0.9, over="item"),
        token_weights.position(codes, last=0.5),
    ):
        np.testing.assert_allclose(weights.sum(1), held.sum(1))
        assert not weights[~held].any()
    for weights in (
        token_weights.frequency(codes, counts, beta=0.9, over="batch"),
        token_weights.information_gain(codes, counts, without=0.1),
    ):
        assert (weights * counts[:, None]).sum() / (held * counts[:, None]).sum() == pytest.approx(1)
        assert not weights[~held].any()

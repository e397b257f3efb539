"""A difference is only called one if other users and other seeds would show it too."""

import numpy as np
import pytest
from scipy import stats

from llm_itemtok.evaluation.metrics import METRIC_KEYS, gains, metrics_from_ranks
from llm_itemtok.evaluation.paired import Estimate, independent_difference, mean_interval, paired_difference


def _arms(rng: np.random.Generator, seeds: int, users: int, *, by_seed: float, by_user: float, rest: float = 1.0):
    """Two arms without any true difference; users are easy or hard for both."""
    easy = rng.normal(size=users)
    noise = by_seed * rng.normal(size=(seeds, 1)) + by_user * rng.normal(size=users)
    control = 5 + easy + np.zeros((seeds, 1))
    return control + noise + rest * rng.normal(size=(seeds, users)), control


def test_the_worked_example():
    """Differences 3 5 / 1 3 (two seeds, two users).

    The mean is 3, the means of seeds 4 and 2, of users 2 and 4; nothing is left over. MS_seeds = 2 (1 + 1) / 1 = 4 and
    MS_users = 4, MS_rest = 0, so the variance of the mean is (4 + 4 - 0) / 4 = 2 on 8² / (4²/1 + 4²/1) = 2 degrees of
    freedom. The control's mean is 2, so the ratio is 5/2; (method - 5/2 control)/2 has the values 0 1 / -1 0.
    """
    control = np.full((2, 2), 2.0)

    found = paired_difference(control + np.array([[3, 5], [1, 3]]), control)

    t = stats.t(2)
    half = t.ppf(0.975) * np.sqrt(2)
    assert found.difference == Estimate(3.0, pytest.approx(3 - half), pytest.approx(3 + half))
    assert found.p == pytest.approx(2 * t.sf(3 / np.sqrt(2)))
    assert found.detectable == pytest.approx((t.ppf(0.975) + t.ppf(0.8)) * np.sqrt(2))
    assert found.detectable_relative == pytest.approx(found.detectable / 2)
    assert found.relative == Estimate(1.5, pytest.approx(1.5 - half / 2), pytest.approx(1.5 + half / 2))
    assert (found.by_seed, found.users) == ((4.0, 2.0), 2)


def test_with_one_seed_it_is_the_paired_t_test_over_users():
    rng = np.random.default_rng(1)
    method, control = rng.random((1, 40)), rng.random((1, 40))

    found = paired_difference(method, control)

    textbook = stats.ttest_rel(method[0], control[0])
    assert found.p == pytest.approx(textbook.pvalue)
    interval = textbook.confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert found.by_seed == (pytest.approx(found.difference.value),)


def test_swapping_the_arms_turns_the_sign_and_nothing_else():
    method, control = _arms(np.random.default_rng(2), 3, 50, by_seed=0.3, by_user=0.5)

    there, back = paired_difference(method, control), paired_difference(control, method)

    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.difference.low == pytest.approx(-back.difference.high)
    assert there.p == pytest.approx(back.p)
    assert there.detectable == pytest.approx(back.detectable)


def test_the_order_of_seeds_and_users_does_not_matter():
    rng = np.random.default_rng(3)
    method, control = _arms(rng, 3, 30, by_seed=0.3, by_user=0.5)
    users, seeds = rng.permutation(30), rng.permutation(3)

    shuffled = paired_difference(method[seeds][:, users], control[seeds][:, users])

    assert shuffled.p == pytest.approx(paired_difference(method, control).p)


def test_what_one_seed_alone_shows_is_no_finding():
    """Ten thousand users see a clear gain under one seed of three: very sure about users, nothing about seeds."""
    rng = np.random.default_rng(4)
    control = (rng.random((3, 10_000)) < 0.06).astype(float)
    method = control.copy()
    method[0, rng.random(10_000) < 0.03] = 1.0

    over_seeds, that_seed = paired_difference(method, control), paired_difference(method[:1], control[:1])

    assert that_seed.p < 1e-10
    assert over_seeds.p > 0.1
    assert not over_seeds.difference.excludes_zero


def test_what_every_seed_shows_is_a_finding():
    rng = np.random.default_rng(5)
    control = (rng.random((3, 10_000)) < 0.06).astype(float)
    method = np.where(rng.random(10_000) < 0.01, 1.0, control)

    found = paired_difference(method, control)

    assert found.p < 0.001
    assert found.difference.low > 0
    assert found.relative.low > 0


@pytest.mark.parametrize(("by_seed", "by_user"), [(0.0, 0.0), (0.0, 1.0), (0.2, 1.0), (2.0, 1.0)])
def test_intervals_of_three_seeds_hold_the_truth_about_95_times_of_100(by_seed, by_user):
    """The truth is 0: coverage near .95 and p below .05 near .05, with noise of users, of seeds, or of both.

    1,200 draws give a standard error of .006; without user and seed noise the floor makes intervals a little too wide.
    """
    rng = np.random.default_rng(6)
    found = [paired_difference(*_arms(rng, 3, 60, by_seed=by_seed, by_user=by_user)) for _ in range(1200)]

    coverage = np.mean([not each.difference.excludes_zero for each in found])
    assert 0.92 <= coverage <= 0.985
    assert np.mean([each.p >= 0.05 for each in found]) == coverage


@pytest.mark.parametrize(("by_seed", "by_user"), [(0.0, 1.0), (2.0, 1.0)])
def test_without_a_difference_every_p_value_is_about_as_likely(by_seed, by_user):
    rng = np.random.default_rng(7)
    p = [paired_difference(*_arms(rng, 3, 60, by_seed=by_seed, by_user=by_user)).p for _ in range(1200)]

    shares = np.histogram(p, bins=4, range=(0, 1))[0] / len(p)
    assert shares == pytest.approx(0.25, abs=0.06)


def test_relative_intervals_hold_the_true_ratio():
    """Hits at rates .10 and .12: the relative gain is 20 %, over users that both arms find easy or hard."""
    rng = np.random.default_rng(8)
    inside = []
    for _ in range(400):
        luck = rng.random(2000)
        control, method = luck + rng.random((3, 2000)) < 0.44721, luck + rng.random((3, 2000)) < 0.48990
        inside.append(paired_difference(method.astype(float), control.astype(float)).relative)
    covered = np.mean([found.low <= 0.2 <= found.high for found in inside])
    assert 0.92 <= covered <= 0.99


def test_a_difference_of_the_detectable_size_is_seen_about_8_times_of_10():
    rng = np.random.default_rng(9)
    size = np.median([paired_difference(*_arms(rng, 1, 60, by_seed=0, by_user=1)).detectable for _ in range(100)])

    seen = []
    for _ in range(1000):
        method, control = _arms(rng, 1, 60, by_seed=0, by_user=1)
        seen.append(paired_difference(method + size, control).p < 0.05)

    assert np.mean(seen) == pytest.approx(0.8, abs=0.05)


def test_equal_arms_differ_by_nothing():
    same = np.arange(6.0).reshape(2, 3)

    found = paired_difference(same, same)

    assert found.difference == Estimate(0.0, 0.0, 0.0)
    assert found.p == 1
    assert found.detectable == 0


def test_a_control_that_finds_nothing_has_no_relative_gain():
    found = paired_difference(np.eye(2), np.zeros((2, 2)))

    assert found.relative is None
    assert found.detectable_relative is None


def test_the_mean_interval_of_three_seeds_holds_the_truth():
    rng = np.random.default_rng(10)
    inside = []
    for _ in range(1000):
        found = mean_interval(rng.normal(size=(3, 1)) * 0.3 + rng.normal(size=60) + rng.normal(size=(3, 60)))
        inside.append(found.low <= 0 <= found.high)
    assert 0.92 <= np.mean(inside) <= 0.985


def test_independent_estimates_are_subtracted_end_by_end():
    found = independent_difference(Estimate(10, 7, 12), Estimate(4, 3, 8))

    assert found == Estimate(6, pytest.approx(6 - np.hypot(3, 4)), pytest.approx(6 + np.hypot(2, 1)))
    assert found.excludes_zero


@pytest.mark.parametrize(
    ("method", "control", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), r"the same seeds and users, was: \(2, 3\) and \(2, 4\)"),
        (np.ones((2, 1)), np.ones((2, 1)), r"2 users, was: shape \(2, 1\)"),
        (np.ones(3), np.ones(3), r"was: shape \(3,\)"),
        (np.full((1, 2), np.nan), np.ones((1, 2)), "finite numbers, was: 2"),
    ],
)
def test_what_cannot_be_paired_is_refused(method, control, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(method, control)


def test_gains_average_to_the_metrics():
    ranks = np.array([0.0, 1.0, 1.5, 10.0, 10.5, 20.0, 300.0])

    assert {key: gains(ranks, key).mean() for key in METRIC_KEYS} == pytest.approx(metrics_from_ranks(ranks))


def test_an_unknown_metric_has_no_gains():
    with pytest.raises(ValueError, match=r"must be one of recall@1, .* was: 'recall@3'"):
        gains(np.ones(2), "recall@3")

"""Metrics against values worked by hand, and their edge cases."""

import itertools
import math

import numpy as np
import pytest

from sdpo_jax.evaluation import metrics

CANDIDATES = ["Alien", "Aliens", "Heat", "The Thing"]


@pytest.mark.parametrize(
    "generation, expected",
    [
        ("Heat", 2),
        ("I would watch Heat next.", 2),
        ("\nHeat\nHeat", 2),
        ("Alien", 0),
        ("", None),
        ("Blade Runner", None),
        ("heat", None),  # case-sensitive
        ("Heat or The Thing", None),
        ("Aliens", None),  # contains "Alien" too: two candidates, so invalid
        ("The Thi", None),  # cut after 20 tokens
    ],
)
def test_a_generation_is_valid_if_it_names_exactly_one_candidate(generation, expected):
    assert metrics.recommended(generation, CANDIDATES) == expected


@pytest.mark.parametrize(
    "scores, rank",
    [
        ([-1.0, -2.0, -3.0], 1),
        ([-2.0, -1.0, -3.0], 2),
        ([-3.0, -1.0, -2.0], 3),
        ([-1.0, -1.0, -3.0], 2),  # a tie puts the target second
        ([0.0, 0.0, 0.0], 3),
        ([-1.0, -math.inf, -math.inf], 1),
        ([math.nan, -1.0, -2.0], 3),
        ([-1.0, math.nan, -2.0], 2),
    ],
)
def test_ties_place_the_target_last(scores, rank):
    assert metrics.target_rank(scores, 0) == rank


def test_ranking_metrics_equal_those_worked_by_hand():
    assert [metrics.hit_at(5, rank) for rank in (1, 5, 6)] == [1, 1, 0]
    assert [metrics.ndcg_at(5, rank) for rank in (1, 3, 6)] == [1, 0.5, 0]
    assert metrics.ndcg_at(10, 7) == pytest.approx(1 / 3)
    assert [metrics.reciprocal_rank(rank) for rank in (1, 4)] == [1, 0.25]
    assert metrics.mean([1, 0, 0, 1]) == 0.5


def test_a_target_outside_the_ranked_list_is_a_miss():
    assert metrics.hit_at(20, None) == metrics.ndcg_at(20, None) == 0
    assert metrics.reciprocal_rank(None) == 0


def test_recommended_items_by_hand():
    """Four items are recommended 0, 1, 1 and 2 times: (-3 * 0 - 1 + 1 + 3 * 2) / (4 * 4)."""
    lists = [["a", "b"], ["a", "c"]]
    assert metrics.coverage(lists, 4) == 0.75
    assert metrics.gini(lists, 4) == 0.375
    # (5 + 1) / 2 and (5 + 0) / 2, as c has no training interaction.
    assert metrics.mean_popularity(lists, {"a": 5, "b": 1, "d": 9}) == 2.75


@pytest.mark.parametrize(
    "lists, items, coverage, gini",
    [
        ([["a"]], 1, 1, 0),
        ([["a"], ["a"], ["a"]], 4, 0.25, 0.75),  # one item of four: (I - 1) / I
        ([["a", "b"], ["c", "d"]], 4, 1, 0),  # ties: all equally often
        ([["a"], []], 2, 0.5, 0.5),
        ([[], []], 3, 0, 0),
        ([], 3, 0, 0),
    ],
)
def test_coverage_and_gini_at_their_ends(lists, items, coverage, gini):
    assert metrics.coverage(lists, items) == coverage
    assert metrics.gini(lists, items) == gini


def test_the_gini_index_is_half_the_relative_mean_difference():
    """Another form of it: sum_ij |P_i - P_j| / (2 I sum_i P_i), over all pairs of items."""
    rng = np.random.default_rng(0)
    lists = (rng.integers(0, 30, (50, 10)) ** 2 // 30).tolist()
    times = np.bincount(np.ravel(lists), minlength=40)
    expected = np.abs(times[:, None] - times).sum() / (2 * 40 * times.sum())
    assert metrics.gini(lists, 40) == pytest.approx(expected)


def test_a_list_of_nothing_has_no_popularity():
    assert metrics.mean_popularity([["a", "b"], []], {"a": 3, "b": 1}) == 2
    assert metrics.mean_popularity([[]], {"a": 3}) == metrics.mean_popularity([], {}) == 0


@pytest.mark.parametrize("measure", [metrics.coverage, metrics.gini])
def test_more_items_recommended_than_there_are_is_an_error(measure):
    with pytest.raises(ValueError, match="found 2 recommended, expected at most 1"):
        measure([["a", "b"]], 1)


def test_chance_is_the_mean_over_all_ranks():
    assert metrics.chance(lambda rank: metrics.hit_at(1, rank), 20) == pytest.approx(0.05)
    assert metrics.chance(lambda rank: metrics.hit_at(5, rank), 20) == pytest.approx(0.25)
    assert metrics.chance(metrics.reciprocal_rank, 2) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        # p = 0.5, n = 100, z² = 3.8415: centre 0.5, half = z sqrt(.0025 + z²/40000) / (1 + z²/100)
        (50, 100, 0.4038, 0.5962),
        (0, 10, 0.0, 0.2775),  # z² / (n + z²)
        (10, 10, 0.7225, 1.0),
        (1, 20, 0.0089, 0.2361),
        (0, 1, 0.0, 0.7935),
    ],
)
def test_wilson_intervals_equal_published_ones(successes, n, low, high):
    assert metrics.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_the_design_effect_by_hand():
    """Mean 1/2, so deviations are +-1/2: users' sums 1, -1, 0; 3/2 (1 + 1 + 0) / (6/4) 5/6.

    Two degrees of freedom: t is 4.303.
    """
    found = metrics.design_effect([1, 1, 0, 0, 1, 0], list("aabbcc"))
    assert found == pytest.approx(min(6, 5 / 3 * (4.303 / 1.960) ** 2), abs=1e-2)
    many = metrics.design_effect([1, 1, 0, 0, 1, 0] * 100, sorted([*range(300)] * 2))
    assert many == pytest.approx(4 / 3, rel=0.02)


def test_the_design_effect_is_one_for_one_window_a_user_and_never_less():
    hits = [True, False, False, True, True]
    assert metrics.design_effect(hits, range(5)) == 1
    assert metrics.design_effect([1, 0] * 500, sorted([*range(500)] * 2)) >= 1


def test_windows_of_one_user_tell_as_much_as_one_window():
    assert metrics.design_effect([1, 0] * 200, ["a"] * 400) == 400
    low, high = metrics.wilson(200, 400, 400)
    assert low < 0.1 and high > 0.9


def test_ten_copies_of_each_window_tell_no_more_than_the_windows_do():
    hits, users = [i % 3 == 0 for i in range(60)], range(60)
    low, high = metrics.wilson(20, 60)
    effect = metrics.design_effect(hits * 10, [*users] * 10)
    assert metrics.wilson(200, 600, effect) == pytest.approx((low, high), abs=5e-3)
    other = [i % 4 == 0 for i in range(60)]
    once = metrics.paired_difference(hits, other, users)
    copied = metrics.paired_difference(hits * 10, other * 10, [*users] * 10)
    assert copied.p == pytest.approx(once.p)
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.05)


def test_the_interval_of_a_mean_by_hand():
    """Values 1, 2, 3, 4: mean 5/2, s² = 5/3, so ± 1.96 sqrt(5/12)."""
    low, high = metrics.interval([1, 2, 3, 4], range(4))
    assert (low, high) == pytest.approx((2.5 - 1.2652, 2.5 + 1.2652), abs=1e-4)


def test_the_interval_of_a_mean_is_wider_where_windows_of_a_user_are_alike():
    values = [0.2, 0.8] * 100
    apart = metrics.interval(values, range(200))
    alike = metrics.interval(sorted(values), [i // 20 for i in range(200)])
    assert np.ptp(alike) == pytest.approx(
        np.ptp(apart) * metrics.design_effect(sorted(values), [i // 20 for i in range(200)]) ** 0.5
    )
    assert np.ptp(alike) > 4 * np.ptp(apart)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.0, 0.0, 0.1], (0.0, 0.074)),  # 0.025 ± 1.96 * 0.025, cut at 0
        ([1.0, 1.0, 1.0, 0.9], (0.926, 1.0)),
        ([0.5, 0.5], (0.5, 0.5)),
        ([0.5], (0.0, 1.0)),
        ([7.0], (-math.inf, math.inf)),
    ],
)
def test_the_interval_of_shares_stays_within_zero_and_one(values, expected):
    assert metrics.interval(values, range(len(values))) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (3, 1, 2 * (1 + 4) / 16),
        (6, 6, 1.0),
        (1000, 1000, 1.0),  # beyond a float's 2**n
    ],
)
def test_with_one_window_a_user_the_test_is_mcnemars(only_a, only_b, p):
    assert metrics.exchanged([1] * only_a + [0] * 3 + [-1] * only_b) == pytest.approx(p)


def test_the_exchange_of_systems_counts_every_sign_of_every_user():
    nets = [3, -1, 2, 0, 2]
    sums = [
        abs(sum(s * n for s, n in zip(signs, nets, strict=True)))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    assert metrics.exchanged(nets) == pytest.approx(sum(s >= 6 for s in sums) / 32)


def test_paired_difference_by_hand():
    """n = 10, b = 4, c = 1: p_a = 5/12, p_b = 2/12, sqrt((7/12 - 1/16) / 12) = 0.20833."""
    a = [1, 1, 1, 1, 0, 1, 0, 0, 0, 0]
    b = [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    d = metrics.paired_difference(a, b, range(10))
    assert (d.value, d.only_a, d.only_b, d.n) == (pytest.approx(0.3), 4, 1, 10)
    assert d.low == pytest.approx(0.25 - 1.96 * 0.20833, abs=1e-3)
    assert d.high == pytest.approx(0.25 + 1.96 * 0.20833, abs=1e-3)
    assert d.p == pytest.approx(2 * (1 + 5) / 32)


def test_equal_systems_differ_by_nothing():
    d = metrics.paired_difference([True, False] * 50, [True, False] * 50, range(100))
    assert d.value == 0 and d.p == 1 and d.low == -d.high and 0 < d.high < 0.05


def test_systems_of_other_examples_cannot_be_paired():
    with pytest.raises(ValueError):
        metrics.paired_difference([1, 0], [1], [1])

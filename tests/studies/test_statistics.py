"""The statistics of studies against exact small cases, and against what they must be for data that are known."""

import itertools
import math

import numpy as np
import pytest

from fusion_jax.studies import statistics


def test_the_bootstrap_of_equal_scores_has_no_width():
    assert statistics.bootstrap_interval(np.full((3, 4), 0.25)) == (0.25, 0.25)


def test_the_bootstrap_draws_runs_and_questions():
    """Against every sample that can be drawn from two runs and three questions."""
    scores = np.array([[0.1, 0.25, 0.9], [0.3, 0.72, 0.81]])
    runs = itertools.product(range(2), repeat=2)
    means = [scores[np.ix_(r, q)].mean() for r in runs for q in itertools.product(range(3), repeat=3)]
    low, high = np.quantile(means, [0.1, 0.9])
    assert statistics.bootstrap_interval(scores, 0.8) == pytest.approx((low, high), abs=0.01)


def test_runs_that_differ_widen_the_interval_although_each_answers_evenly():
    alike, differ = np.tile([0.0, 1.0], (4, 30)), np.repeat([[0.2], [0.4], [0.6], [0.8]], 60, 1)
    (a, b), (c, d) = map(statistics.bootstrap_interval, (alike, differ))
    assert d - c > 0.3 > b - a > 0.1


def test_one_run_has_no_spread_and_an_interval_over_questions():
    assert statistics.spread(np.array([3.0])) is None
    low, high = statistics.bootstrap_interval(np.array([[0.0, 1.0] * 20]))
    assert 0.3 < low < 0.4 and 0.6 < high < 0.7
    assert statistics.spread(np.array([1.0, 2.0, 3.0])) == 1.0


def test_the_p_value_of_runs_counts_every_way_to_deal_them():
    high, low = np.array([5.0, 6.0, 7.0]), np.array([1.0, 2.0, 3.0])
    assert statistics.p_runs(high, low) == pytest.approx(2 / math.comb(6, 3))
    assert statistics.p_runs(low, high) == pytest.approx(0.1)
    assert statistics.p_runs(high, high) == 1.0
    assert statistics.p_runs(high[:1], low) is None


def test_the_p_value_of_questions_counts_every_sign():
    differences = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert statistics.p_questions(differences) == pytest.approx(2 / 2**4)
    assert statistics.p_questions(np.array([1.0, -1.0])) == 1.0
    assert statistics.p_questions(np.zeros(5)) == 1.0


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(0)
    values = [statistics.p_questions(rng.integers(-1, 2, 200) / 5) for _ in range(40)]
    assert 0.3 < np.mean(values) < 0.7 and np.mean(np.array(values) < 0.05) < 0.2


def test_holm_multiplies_by_the_comparisons_that_are_left():
    # 0.01 * 4; 0.02 * 3; 0.03 * 2 is not below the one before; 0.5 * 1.
    assert statistics.holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([None, 0.01, None]) == [None, 0.01, None]
    assert statistics.holm([]) == []


def test_the_smallest_p_value_is_what_the_best_result_gives():
    assert statistics.smallest_p(3, 1) == statistics.p_runs(np.array([5.0, 6.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert statistics.smallest_p(5, 7) == pytest.approx(7 * 2 / 252)
    assert statistics.smallest_p(2, 9) == 1.0 and statistics.smallest_p(1, 1) is None

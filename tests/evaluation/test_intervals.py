"""Intervals against their definitions, written out in NumPy."""

import statistics

import numpy as np
import pytest

from afr_jax.evaluation.metrics import intervals


@pytest.mark.parametrize(
    "successes, total, confidence",
    [(0, 10, 0.95), (10, 10, 0.95), (3, 10, 0.95), (985, 1000, 0.99), (1, 1, 0.9)],
)
def test_wilson_interval_holds_the_rates_that_a_score_test_accepts(successes, total, confidence):
    interval = intervals.wilson_interval(successes, total, confidence=confidence)
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    for end, open_end in zip(interval, (0.0, 1.0), strict=True):
        error = (successes / total - end) ** 2 - z**2 * end * (1 - end) / total
        assert abs(error) < 1e-12 and (end == open_end) == (successes == open_end * total)


def test_wilson_interval_of_no_trials_says_nothing():
    assert intervals.wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("successes, total", [(-1, 3), (4, 3)])
def test_wilson_interval_rejects_impossible_counts(successes, total):
    with pytest.raises(ValueError, match=f"successes is {successes}"):
        intervals.wilson_interval(successes, total)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_is_checked(confidence):
    with pytest.raises(ValueError, match="confidence"):
        intervals.wilson_interval(1, 2, confidence=confidence)
    with pytest.raises(ValueError, match="confidence"):
        intervals.bootstrap_interval(np.ones(3), confidence=confidence)


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_bootstrap_interval_is_that_of_drawn_rows(statistic):
    values = np.random.default_rng(0).gamma(2.0, size=120)
    rows = np.random.default_rng(3).integers(120, size=(500, 120))
    expected = np.quantile(statistic(values[rows], axis=1), [0.025, 0.975])
    found = intervals.bootstrap_interval(values, statistic=statistic, num_resamples=500, seed=3)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_grouped_interval_is_that_of_drawn_groups():
    generator = np.random.default_rng(0)
    values, groups = generator.uniform(size=90), generator.integers(0, 7, 90)
    members = [values[groups == group] for group in range(7)]
    drawn = np.random.default_rng(3).integers(7, size=(500, 7))
    means = [np.concatenate([members[group] for group in row]).mean() for row in drawn]
    found = intervals.grouped_interval(values, groups, num_resamples=500, seed=3)
    np.testing.assert_allclose(found, np.quantile(means, [0.025, 0.975]), atol=1e-12)
    assert intervals.grouped_interval(values, ["one"] * 90) == (values.mean(), values.mean())


def test_bootstrap_interval_depends_on_the_seed_only():
    values = np.arange(20.0)
    first = intervals.bootstrap_interval(values, seed=1)
    assert first == intervals.bootstrap_interval(values, seed=1)
    assert first != intervals.bootstrap_interval(values, seed=2)


def test_bootstrap_interval_of_one_value_is_that_value():
    assert intervals.bootstrap_interval(np.array([2.5])) == (2.5, 2.5)


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2))])
def test_bootstrap_interval_rejects_other_shapes(values):
    with pytest.raises(ValueError, match="must be"):
        intervals.bootstrap_interval(values)

import numpy as np
import pytest
from scipy import stats

from afr_jax.evaluation.metrics import intervals


@pytest.mark.parametrize(
    "successes, total, confidence",
    [(0, 10, 0.95), (10, 10, 0.95), (3, 10, 0.95), (985, 1000, 0.99), (1, 1, 0.9)],
)
def test_wilson_interval_agrees_with_scipy(successes, total, confidence):
    expected = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
    interval = intervals.wilson_interval(successes, total, confidence=confidence)
    np.testing.assert_allclose(interval, expected, atol=1e-12)


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
def test_bootstrap_interval_agrees_with_scipy(statistic):
    values = np.random.default_rng(0).gamma(2.0, size=120)
    oracle = stats.bootstrap(
        (values,), statistic, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    interval = intervals.bootstrap_interval(values, statistic=statistic, num_resamples=20_000)
    # Two Monte Carlo estimates of a quantile; the interval itself is about 0.5 wide.
    np.testing.assert_allclose(interval, oracle, atol=0.02)


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

"""Scores of identification, on cases that can be counted by hand and against brute force."""

import numpy as np
import pytest

from afr_jax.evaluation.metrics import identification, intervals

# Three people (0, 1, 2); person 0 is enrolled with two faces.
_GALLERY = np.array([0, 0, 1, 2])


def test_by_hand():
    found = identification.identification(
        np.array(
            [
                [0.9, 0.2, 0.5, 0.6],  # 0: nearest by the second face
                [0.1, 0.8, 0.3, 0.9],  # 1: second rank
                [0.7, 0.7, 0.7, 0.7],  # 2: a tie counts against
                [np.inf, np.inf, np.inf, np.inf],  # no face
            ]
        ),
        np.array([0, 1, 2, 0]),
        np.array([[0.4, 0.9, 0.9, 0.9], [0.9, 0.9, 0.15, 0.9]]),
        _GALLERY,
    )
    np.testing.assert_array_equal(found.ranks, [1, 2, 3, 4])
    np.testing.assert_array_equal(found.strangers, [0.4, 0.15])
    assert identification.rank_rate(found, 1) == 0.25
    assert identification.rank_rate(found, 3) == 0.75
    # No stranger may come nearer than the threshold, or one of the two.
    assert identification.threshold_at_fpir(found, 0.01) == 0.15
    assert identification.identification_rate(found, 0.01) == 0.0
    assert identification.threshold_at_fpir(found, 0.5) == 0.4
    assert identification.identification_rate(found, 0.5) == 0.25
    assert identification.threshold_at_fpir(found, 1.0) == np.inf


def test_by_brute_force():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 30)
    labels[:6] = np.arange(6)
    known, strangers = rng.uniform(size=(40, 30)), rng.uniform(size=(200, 30)) * 3
    own = rng.integers(0, 6, 40)
    known[labels[None] == own[:, None]] *= 0.3
    found = identification.identification(known, own, strangers, labels)
    for fpir in (0.01, 0.05, 0.3):
        best = 0.0
        for threshold in np.concatenate([strangers.ravel(), [9.0]]):
            false = np.mean(strangers.min(axis=1) < threshold)
            nearest = np.argmin(known, axis=1)
            right = (labels[nearest] == own) & (known.min(axis=1) < threshold)
            if false <= fpir:
                best = max(best, right.mean())
        assert identification.identification_rate(found, fpir) == pytest.approx(best)
    fpir, rate = identification.rate_curve(found)
    assert np.all(np.diff(fpir) > 0) and np.all(np.diff(rate) >= 0)
    at = int(np.searchsorted(fpir, 0.05, side="right")) - 1
    assert rate[at] <= identification.identification_rate(found, 0.05)
    threshold = identification.threshold_at_fpir(found, 0.05)
    dir_rate, false_rate = identification.rate_at_threshold(found, threshold)
    assert dir_rate == identification.identification_rate(found, 0.05) and false_rate <= 0.05


def test_the_interval_knows_that_few_strangers_set_the_threshold():
    """At a FPIR of 0 the nearest of 20 strangers decides: far more spread than of the probes."""
    rng = np.random.default_rng(0)
    count, strangers = 2000, np.sort(rng.uniform(0.2, 1.0, 20))
    mates = rng.uniform(0, 1, count)
    found = identification.Identification(np.ones(count, int), mates, mates, strangers)
    people, others = [str(i) for i in range(count)], [str(i) for i in range(20)]
    low, high = identification.identification_interval(found, people, others, 0.0)
    rate = identification.identification_rate(found, 0.0)
    # The nearest stranger is drawn 64 % of the time, one of the three nearest 95 %.
    assert low == pytest.approx(rate, abs=0.03) and low <= rate
    assert high == pytest.approx(np.mean(mates < strangers[2]), abs=0.06)
    # With many strangers of one threshold only the probes are left.
    found = found._replace(strangers=np.full(500, 0.5))
    low, high = identification.identification_interval(found, people, list(map(str, range(500))), 0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / count), rel=0.15)
    # Probes of one person hang together.
    found = found._replace(mates=np.repeat(rng.uniform(size=20), 100))
    groups = [str(i // 100) for i in range(count)]
    low, high = identification.identification_interval(found, groups, list(map(str, range(500))), 0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 20), rel=0.2)


def test_bad_input():
    with pytest.raises(ValueError, match="not enrolled"):
        identification.identification(np.ones((1, 4)), [7], np.ones((1, 4)), _GALLERY)
    with pytest.raises(ValueError, match="expected"):
        identification.identification(np.ones((1, 3)), [0], np.ones((1, 4)), _GALLERY)


def test_a_grouped_interval_is_wider_where_values_hang_together():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.uniform(size=50) < 0.5, 20).astype(float)
    groups = np.repeat(np.arange(50), 20)
    low, high = intervals.grouped_interval(values, groups)
    # The standard error of 50 independent coins, not of 1000.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 50), rel=0.15)
    alone = intervals.grouped_interval(values, np.arange(1000))
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 1000), rel=0.15)
    with pytest.raises(ValueError, match="groups"):
        intervals.grouped_interval(values, groups[:-1])

"""Intervals for measured figures, in float64 numpy on the host.

A rate over photos, pairs or people comes with `wilson_interval`; the mean or median of a measured
quantity with `bootstrap_interval`, or `grouped_interval` where measurements hang together, such as
photos of one person.
"""

import statistics
from collections.abc import Callable

import numpy as np


def wilson_interval(successes: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson score interval of a rate.

    It stays within [0, 1] and is sensible at 0 and at `total` successes. E. B. Wilson, "Probable
    inference, the law of succession, and statistical inference", 1927.

    Args:
      successes: how many of the trials succeeded.
      total: how many trials there were; none gives (0, 1).
      confidence: the coverage, in (0, 1).

    Returns:
      (low, high).
    """
    if not 0 <= successes <= total:
        raise ValueError(f"successes is {successes}, but must lie in [0, total={total}]")
    z = statistics.NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    if total == 0:
        return 0.0, 1.0
    rate = successes / total
    scale = 1 + z**2 / total
    center = (rate + z**2 / (2 * total)) / scale
    half = z / scale * np.sqrt(rate * (1 - rate) / total + z**2 / (4 * total**2))
    low = 0.0 if successes == 0 else float(center - half)
    high = 1.0 if successes == total else float(center + half)
    return low, high


def bootstrap_interval(
    values: np.ndarray,
    *,
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a statistic.

    B. Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Args:
      values: [N] independent measurements, N >= 1.
      statistic: reduces an array along `axis`, as `np.mean` and `np.median` do.
      confidence: the coverage, in (0, 1).
      num_resamples: how often the values are drawn again with replacement.
      seed: of the draws; the same seed gives the same interval.

    Returns:
      (low, high).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values has shape {values.shape}, but must be [N] with N >= 1")
    tail = (1 - _checked(confidence)) / 2
    generator = np.random.default_rng(seed)
    rows = generator.integers(values.size, size=(num_resamples, values.size))
    low, high = np.quantile(statistic(values[rows], axis=1), [tail, 1 - tail])
    return float(low), float(high)


def grouped_interval(
    values: np.ndarray,
    groups: np.ndarray,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a mean, groups drawn with all their values.

    The cluster bootstrap: A. C. Davison and D. V. Hinkley, "Bootstrap methods and their
    application", 1997, section 3.8.

    Args:
      values: [N] measurements, N >= 1.
      groups: [N], whom each belongs to; of any type that sorts.
      confidence: the coverage, in (0, 1).
      num_resamples: how often the groups are drawn again with replacement.
      seed: of the draws; the same seed gives the same interval.

    Returns:
      (low, high).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0 or len(groups) != values.size:
        raise ValueError(f"values {values.shape} and {len(groups)} groups, must be [N], N >= 1")
    tail = (1 - _checked(confidence)) / 2
    _, member = np.unique(groups, return_inverse=True)
    counts, sums = np.bincount(member), np.bincount(member, weights=values)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(counts.size, size=(num_resamples, counts.size))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie in (0, 1)")
    return confidence

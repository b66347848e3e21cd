"""Intervals for measured figures, by SciPy, in float64 on the host.

A rate over photos, pairs or people comes with `wilson_interval`; the mean or median of a measured
quantity with `bootstrap_interval`, or `grouped_interval` where measurements hang together, such as
photos of one person.
"""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats


def wilson_interval(
    successes: int, total: int, *, num_groups: int | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """Returns the Wilson score interval of a rate.

    It stays within [0, 1] and is sensible at 0 and at `total` successes. E. B. Wilson, "Probable
    inference, the law of succession, and statistical inference", 1927.

    Args:
      successes: how many of the trials succeeded.
      total: how many trials there were; none gives (0, 1).
      num_groups: how many trials there were of which the others are variants: the interval is that
        of the share in so many trials. By default all count.
      confidence: the coverage, in (0, 1).

    Returns:
      (low, high).
    """
    if not 0 <= successes <= total:
        raise ValueError(f"successes is {successes}, but must lie in [0, total={total}]")
    _check_confidence(confidence)
    if total == 0:
        return 0.0, 1.0
    share, count = successes / total, total if num_groups is None else num_groups
    square = float(scipy.stats.norm.ppf((1 + confidence) / 2)) ** 2 / count
    middle = share + square / 2
    spread = np.sqrt(square * (share * (1 - share) + square / 4))
    low, high = (float((middle + sign * spread) / (1 + square)) for sign in (-1, 1))
    return low if successes else 0.0, high if successes < total else 1.0


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
    return _bootstrap((values,), statistic, confidence, num_resamples, seed)


def grouped_interval(
    values: np.ndarray,
    groups: np.ndarray | Sequence[str] | Sequence[int],
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
    _, member = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(member, weights=values), np.bincount(member)

    def mean(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis) / counts.sum(axis)

    return _bootstrap((sums, counts), mean, confidence, num_resamples, seed)


def _bootstrap(
    samples: Sequence[np.ndarray],
    statistic: Callable[..., np.ndarray],
    confidence: float,
    num_resamples: int,
    seed: int,
) -> tuple[float, float]:
    """The percentile interval of a statistic of samples that are drawn together."""
    _check_confidence(confidence)
    if len(samples[0]) == 1:  # SciPy wants two; one value is all that can be drawn.
        value = float(statistic(*samples, axis=0))
        return value, value
    found = scipy.stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        n_resamples=num_resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie in (0, 1)")

"""Scores of face verification: accuracy over folds, ROC, AUC, EER, TAR at a FAR.

Distances are of pairs, smaller is more alike; everything is float64 on the host.
"""

from typing import NamedTuple

import numpy as np
from sklearn import metrics


class Roc(NamedTuple):
    """Receiver operating characteristic: a point for each distance, ascending thresholds.

    A pair is accepted if its distance is at most the threshold. far `[N]` is the share of accepted
    pairs of different people, tar `[N]` that of accepted pairs of one person; the first point
    accepts nothing.
    """

    thresholds: np.ndarray
    far: np.ndarray
    tar: np.ndarray


def roc(distances: np.ndarray, same: np.ndarray) -> Roc:
    """The ROC of pairs.

    Args:
        distances: `[N]`; inf for a pair that could not be compared (never accepted).
        same: `[N]` bool.

    Raises:
        ValueError: one of the two kinds of pairs is missing, or a distance is NaN.
    """
    distances, same = np.asarray(distances, np.float64), np.asarray(same, bool)
    if same.all() or not same.any():
        raise ValueError("pairs of one person and pairs of two people are both needed")
    if np.isnan(distances).any():
        raise ValueError("a distance is NaN")
    is_finite = np.isfinite(distances)
    # scikit-learn takes finite scores only: what cannot be compared lies beyond all others, and the
    # point that accepts it is left out.
    beyond = distances[is_finite].max(initial=0.0) + 1.0
    far, tar, scores = metrics.roc_curve(
        same, -np.where(is_finite, distances, beyond), drop_intermediate=False
    )
    points = slice(None) if is_finite.all() else slice(-1)
    return Roc(-scores[points], far[points], tar[points])


def auc(curve: Roc) -> float:
    """Area under the ROC; pairs without a distance count as rejected."""
    return float(metrics.auc(np.append(curve.far, 1.0), np.append(curve.tar, 1.0)))


def equal_error_rate(curve: Roc) -> float:
    """Error where false acceptances and false rejections are equally frequent (interpolated)."""
    # Pairs without a distance are accepted last of all, as in `auc`.
    far, tar = np.append(curve.far, 1.0), np.append(curve.tar, 1.0)
    gap = far - (1 - tar)
    after = int(np.argmax(gap >= 0))
    before = max(after - 1, 0)
    span = gap[after] - gap[before]
    part = -gap[before] / span if span > 0 else 0.0
    return float(far[before] + part * (far[after] - far[before]))


def tar_at_far(curve: Roc, far: float) -> float:
    """Largest TAR whose FAR does not exceed `far`."""
    return float(curve.tar[curve.far <= far].max())


def fold_accuracies(distances: np.ndarray, same: np.ndarray, *, num_folds: int = 10) -> np.ndarray:
    """Accuracy on each fold with the threshold that is best on the others.

    After Huang et al. 2007, "Labeled Faces in the Wild", view 2, whose folds share no people. Here
    a fold is every `num_folds`-th pair of each kind, so that all folds hold both kinds in equal
    shares, in whatever order the pairs come; people are in several.

    Args:
        distances: `[N]`.
        same: `[N]` bool.
        num_folds: at least 2.

    Returns:
        `[num_folds]`.
    """
    distances, same = np.asarray(distances, np.float64), np.asarray(same, bool)
    rank = np.where(same, np.cumsum(same), np.cumsum(~same)) - 1
    fold = rank % num_folds
    return np.array(
        [
            accuracy(
                distances[fold == held],
                same[fold == held],
                best_threshold(distances[fold != held], same[fold != held]),
            )
            for held in range(num_folds)
        ]
    )


def accuracy(distances: np.ndarray, same: np.ndarray, threshold: float) -> float:
    """Share of pairs judged rightly; a pair is one person below the threshold."""
    return float(np.mean((distances < threshold) == same))


def best_threshold(distances: np.ndarray, same: np.ndarray) -> float:
    """A threshold of highest accuracy: midway between two neighboring distances."""
    order = np.argsort(distances, kind="stable")
    ranked, positive = distances[order], same[order]
    # Accepting the first k pairs: their positives and the rest's negatives are right.
    right = np.concatenate([[0], np.cumsum(positive)]) + np.concatenate(
        [np.cumsum(~positive[::-1])[::-1], [0]]
    )
    # Equal distances are accepted together.
    apart = np.concatenate([[True], ranked[1:] > ranked[:-1], [True]])
    k = int(np.argmax(np.where(apart, right, -1)))
    low = ranked[k - 1] if k > 0 else ranked[0] - 1.0
    high = ranked[k] if k < len(ranked) else low + 1.0
    return float((low + high) / 2) if np.isfinite(high) else float(low + 1e-6)

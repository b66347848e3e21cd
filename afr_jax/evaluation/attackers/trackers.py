"""Deciders of a tracker over enrolled embeddings: nearest face, vote, linear head.

Deciders take the distances of Q probes to N enrolled faces, infinite where a face was not found,
and give a label for each probe, `NOBODY` where they name none. NumPy on the host, but for the
linear head, whose loss and gradient are compiled. A head that is trained together with its
extractor is in `tracker_training`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

NOBODY = -1
VOTERS = 5
KINDS = ("nearest", "nearest_threshold", "knn_vote", "linear_head")
# Of the head's weights, beside the mean cross entropy of unit-length embeddings.
_DECAY = 1e-4


class Head(NamedTuple):
    """A linear classifier: weights `[D, K]`, bias `[K]`, float32."""

    weights: np.ndarray
    bias: np.ndarray

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """`[Q, K]` of unit-length vectors `[Q, D]`."""
        return vectors @ self.weights + self.bias


def nearest(
    distances: np.ndarray, labels: np.ndarray, *, threshold: float | None = None
) -> np.ndarray:
    """The label of the nearest enrolled face, `NOBODY` where none lies below the threshold.

    Args:
        distances: `[Q, N]`.
        labels: `[N]` int.
        threshold: None for no limit.

    Returns:
        `[Q]` int; ties go to the first face.
    """
    if not len(labels):
        return np.full(len(distances), NOBODY)
    at = np.argmin(distances, axis=1)
    found = distances[np.arange(len(distances)), at]
    limit = np.inf if threshold is None else threshold
    return np.where(found < limit, labels[at], NOBODY)


def knn_vote(distances: np.ndarray, labels: np.ndarray, *, k: int = VOTERS) -> np.ndarray:
    """The commonest label among the k nearest faces; ties go to the label with the nearest one.

    (scikit-learn's classifier gives ties to the smallest label, and takes no infinite distances.)

    Args:
        distances: `[Q, N]`.
        labels: `[N]` int.
        k: voters; fewer where fewer faces were found.

    Returns:
        `[Q]` int.
    """
    winners = np.full(len(distances), NOBODY)
    for row, own in enumerate(distances):
        order = np.argsort(own, kind="stable")[:k]
        voters = labels[order[np.isfinite(own[order])]]
        if len(voters):
            names, first, votes = np.unique(voters, return_index=True, return_counts=True)
            winners[row] = names[np.lexsort((first, -votes))[0]]
    return winners


def fit_head(
    vectors: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    counted: np.ndarray | None = None,
    start: Head | None = None,
    num_iterations: int = 60,
) -> Head:
    """Multinomial logistic regression on frozen embeddings.

    Minimizes mean cross entropy + 1e-4 / 2 * |weights|^2 by L-BFGS over all rows. The problem is
    strictly convex in the weights: where it starts from is a matter of time. scikit-learn's
    `LogisticRegression` has the same objective; here the many similar problems of a study share one
    compiled program, and each starts from another's head.

    Args:
        vectors: `[N, D]` float32 of unit length.
        labels: `[N]` int in [0, num_classes).
        num_classes: K.
        counted: `[N]` bool, rows that are learned from; all by default. Problems that differ in
            them alone share a compiled program.
        start: a head of a similar problem; zeros by default.
        num_iterations: at most so many.

    Returns:
        The head.
    """
    shape = vectors.shape[1], num_classes
    if start is None:
        start = Head(np.zeros(shape, np.float32), np.zeros(num_classes, np.float32))
    shares = np.ones(len(labels)) if counted is None else np.asarray(counted, np.float64)
    shares = jnp.asarray(shares / max(shares.sum(), 1.0), jnp.float32)
    rows, targets = jnp.asarray(vectors, jnp.float32), jnp.asarray(labels, jnp.int32)

    def loss_fn(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[: shape[0] * shape[1]].reshape(shape), flat[shape[0] * shape[1] :]
        head = jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32)
        loss, gradient = _loss_and_gradient(head, rows, targets, shares)
        flat_gradient = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in gradient])
        return float(loss), flat_gradient

    flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in start])
    found = scipy.optimize.minimize(
        loss_fn,
        flat,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": num_iterations, "gtol": 1e-6},
    ).x.astype(np.float32)
    return Head(found[: shape[0] * shape[1]].reshape(shape), found[shape[0] * shape[1] :])


def without_classes(head: Head, labels: np.ndarray) -> Head:
    """A head that knows nothing of some classes: their weights and biases at zero."""
    weights, bias = head.weights.copy(), head.bias.copy()
    weights[:, labels], bias[labels] = 0.0, 0.0
    return Head(weights, bias)


def _loss(head: Head, vectors: jax.Array, labels: jax.Array, shares: jax.Array) -> jax.Array:
    weights, bias = head
    logits = vectors @ weights + bias[None, :]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(shares * losses) + _DECAY / 2 * jnp.sum(weights**2)


_loss_and_gradient = jax.jit(jax.value_and_grad(_loss))

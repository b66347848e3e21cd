"""Deciders on cases counted by hand and against brute force; the head against its optimality."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from afr_jax.evaluation.attackers import tracker_training, trackers
from afr_jax.models.extractors import registry

_LABELS = np.array([7, 7, 3, 3, 5])


def test_nearest_by_hand():
    distances = np.array(
        [
            [0.9, 0.2, 0.5, 0.6, 0.3],
            [0.7, 0.8, 0.4, 0.4, 0.9],
            [0.5, 0.5, 0.5, 0.5, 0.5],  # a tie goes to the first
            [np.inf] * 5,  # no face
        ]
    )
    np.testing.assert_array_equal(trackers.nearest(distances, _LABELS), [7, 3, 7, -1])
    # The threshold itself does not match.
    found = trackers.nearest(distances, _LABELS, threshold=0.4)
    np.testing.assert_array_equal(found, [7, -1, -1, -1])
    np.testing.assert_array_equal(trackers.nearest(np.zeros((2, 0)), np.zeros(0)), [-1, -1])


def test_votes_and_their_ties_by_hand():
    distances = np.array(
        [
            [0.1, 0.9, 0.2, 0.3, 0.4],  # 3 has two of three votes, though 7 is nearest
            [0.3, 0.4, 0.2, 0.9, 0.1],  # one each: the nearest, 5, wins
            [np.inf, np.inf, 0.9, np.inf, 0.8],  # fewer faces than voters
            [np.inf] * 5,
        ]
    )
    np.testing.assert_array_equal(trackers.knn_vote(distances, _LABELS, k=3), [3, 5, 5, -1])
    # With all five voters 7 and 3 have two each; the nearer of them wins.
    np.testing.assert_array_equal(trackers.knn_vote(distances[:2], _LABELS), [7, 3])


def test_votes_by_brute_force():
    rng = np.random.default_rng(0)
    distances, labels = rng.random((50, 30)), rng.integers(0, 6, 30)
    distances[rng.random((50, 30)) < 0.1] = np.inf
    expected = []
    for row in distances:
        order = [i for i in sorted(range(30), key=lambda i, row=row: row[i]) if row[i] < np.inf][:5]
        votes = collections.Counter(labels[i] for i in order)
        most = [name for name, count in votes.items() if count == max(votes.values())]
        expected.append(next(labels[i] for i in order if labels[i] in most))
    np.testing.assert_array_equal(trackers.knn_vote(distances, labels, k=5), expected)


def _problem():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 10)
    vectors = rng.normal(size=(4, 6))[labels] + 0.7 * rng.normal(size=(40, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), labels


def _objective(weights, bias, vectors, labels):
    logits = vectors.astype(np.float64) @ weights + bias
    own = logits[np.arange(len(labels)), labels]
    return np.mean(scipy.special.logsumexp(logits, axis=1) - own) + 5e-5 * np.sum(weights**2)


def test_head_is_the_regression_s_optimum():
    vectors, labels = _problem()
    head = trackers.fit_head(vectors, labels, 4)
    weights, bias = head.weights.astype(np.float64), head.bias.astype(np.float64)
    reached = _objective(weights, bias, vectors, labels)
    best = scipy.optimize.minimize(
        lambda flat: _objective(flat[:24].reshape(6, 4), flat[24:], vectors, labels), np.zeros(28)
    ).fun
    # 60 iterations in float32 come within half a percent.
    assert best - 1e-9 <= reached <= 1.005 * best + 1e-4
    np.testing.assert_allclose(
        head.logits(vectors), vectors @ head.weights + head.bias, rtol=1e-6, atol=1e-6
    )


def test_rows_that_do_not_count_change_nothing():
    vectors, labels = _problem()
    more = np.concatenate([vectors, -vectors[:7]]), np.concatenate([labels, labels[:7]])
    counted = np.arange(47) < 40
    head = trackers.fit_head(*more, 4, counted=counted)
    np.testing.assert_allclose(
        head.logits(vectors), trackers.fit_head(vectors, labels, 4).logits(vectors), atol=0.02
    )


def test_head_that_starts_elsewhere_ends_there():
    vectors, labels = _problem()
    cold = trackers.fit_head(vectors, labels, 4)
    moved = vectors.copy()
    moved[labels == 2] *= -1
    start = trackers.without_classes(trackers.fit_head(moved, labels, 4), np.array([2]))
    assert not start.weights[:, 2].any() and not start.bias[2] and start.weights[:, 1].any()
    warm = trackers.fit_head(vectors, labels, 4, start=start)
    first, second = (
        _objective(np.float64(h.weights), np.float64(h.bias), vectors, labels) for h in (cold, warm)
    )
    np.testing.assert_allclose(first, second, rtol=0.01)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, chips):
        x = nn.relu(nn.Conv(4, (3, 3), 2, name="conv")(chips))
        return nn.Dense(8, name="out")(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def toy():
    template = ((4.0, 4.0), (4.0, 11.0), (8.0, 8.0), (12.0, 5.0), (12.0, 11.0))
    thresholds = registry.Thresholds(0.6, None, None)
    extractor = registry.Extractor(
        "toy", _Net(), 16, template, 1.0, 0.0, 8, False, thresholds, dict, "test", "test"
    )
    return extractor, extractor.module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_training_the_network_learns_what_a_head_cannot(toy):
    """Classes differ in texture; the start's embedding, a mean over the chip, tells little."""
    extractor, variables = toy
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    chips = rng.integers(90, 130, (36, 16, 16, 3))
    chips[labels == 1, ::2] += 60
    chips[labels == 2, :, ::2] += 60
    chips = chips.astype(np.uint8)
    before = jax.tree.map(np.array, variables)

    def accuracy(epochs, rate=1e-2):
        options = tracker_training.TrainingOptions(epochs, 8, rate)
        logits_fn = tracker_training.train(extractor, variables, chips, labels, 3, options=options)
        assert logits_fn(chips[:5]).shape == (5, 3)
        return logits_fn(chips)

    trained = accuracy(20)
    np.testing.assert_array_equal(trained.argmax(axis=1), labels)
    # Without training it is the head on the start's embeddings.
    vectors = np.asarray(
        registry.embed(extractor, variables, jnp.asarray(chips, jnp.float32) / 255)
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    head = trackers.fit_head(unit, labels, 3)
    np.testing.assert_allclose(accuracy(0), head.logits(unit), atol=0.02)
    # The same seed trains the same; the caller's weights stay.
    np.testing.assert_array_equal(trained, accuracy(20))
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_logits_do_not_depend_on_the_devices(toy, one_device, spread):
    """Ten chips to train on and three or eleven to tell apart, in batches of six."""
    extractor, variables = toy
    chips = np.random.default_rng(1).integers(0, 256, (11, 16, 16, 3), np.uint8)
    options = tracker_training.TrainingOptions(1, 6, 1e-3)

    def logits(mesh, backend):
        logits_fn = tracker_training.train(
            extractor,
            variables,
            chips[:10],
            np.arange(10) % 3,
            3,
            options=options,
            mesh=mesh,
            backend=backend,
        )
        return logits_fn(chips), logits_fn(chips[:3])

    for found, expected in zip(logits(*spread), logits(one_device, "jit"), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("fields", [{"num_epochs": -1}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_training_options_are_checked(fields):
    with pytest.raises(ValueError, match="above 0"):
        tracker_training.TrainingOptions(**fields)

"""Heads and losses against NumPy float64, their gradients, and the edges of the angle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from afr_jax.models import heads


def _batch(num_classes=5, size=8, depth=6):
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(size, depth))
    labels = generator.integers(num_classes, size=size)
    return embeddings.astype(np.float32), labels.astype(np.int32)


def _cross_entropy(logits, labels, smoothing=0.0):
    targets = np.eye(logits.shape[1])[labels] * (1 - smoothing) + smoothing / logits.shape[1]
    return -np.sum(targets * scipy.special.log_softmax(logits, axis=1), axis=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_and_logits(smoothing, variant):
    embeddings, labels = _batch()
    head = heads.Softmax(5, smoothing)
    variables = head.init(jax.random.key(0), embeddings, labels)
    judged = variant(head.apply)(variables, embeddings, labels)
    kernel = np.asarray(variables["params"]["classifier"]["kernel"], np.float64)
    logits = embeddings @ kernel
    np.testing.assert_allclose(judged.losses, _cross_entropy(logits, labels, smoothing), rtol=1e-5)
    np.testing.assert_array_equal(judged.correct, logits.argmax(axis=1) == labels)
    # The same logits judged without a head of their own; bfloat16 is widened first.
    plain = heads.Logits(smoothing).apply({}, jnp.asarray(logits, jnp.float32), labels)
    np.testing.assert_allclose(plain.losses, judged.losses, rtol=1e-5)
    assert heads.Logits().apply({}, jnp.ones((2, 3), jnp.bfloat16), labels[:2]).losses.dtype == (
        jnp.float32
    )


@pytest.mark.parametrize("angle, cosine", [(0.5, 0.0), (0.0, 0.35), (0.3, 0.2)])
def test_angular_margins_against_the_arccosine(angle, cosine, variant):
    embeddings, labels = _batch()
    head = heads.AngularMargin(5, 16.0, angle, cosine)
    variables = head.init(jax.random.key(0), embeddings, labels)
    judged = variant(head.apply)(variables, embeddings, labels)
    centers = np.asarray(variables["params"]["centres"], np.float64)
    cosines = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)) @ (
        centers / np.linalg.norm(centers, axis=1, keepdims=True)
    ).T
    logits, rows = 16.0 * cosines, np.arange(len(labels))
    own = np.arccos(cosines[rows, labels])
    # Past pi - angle the curve goes on without turning back; see the next test.
    assert (own < np.pi - angle).all()
    logits[rows, labels] = 16.0 * (np.cos(own + angle) - cosine)
    np.testing.assert_allclose(judged.losses, _cross_entropy(logits, labels), rtol=1e-4)
    np.testing.assert_array_equal(judged.correct, cosines.argmax(axis=1) == labels)
    plain = head.apply(variables, embeddings, method="logits")
    np.testing.assert_allclose(plain, 16.0 * cosines, atol=1e-4)


def test_the_margin_never_helps_and_is_monotone_with_finite_gradients():
    own = jnp.concatenate([jnp.linspace(-1, 1, 2001), jnp.array([1 + 1e-6, -1 - 1e-6])])
    values = np.asarray(heads.with_margin(own, angle=0.5), np.float64)
    assert (np.diff(values[:2001]) > 0).all()
    assert (values < own).all()
    slopes = jax.vmap(jax.grad(lambda c: heads.with_margin(c, angle=0.5)))(own)
    assert np.isfinite(slopes).all() and (slopes > 0).all()
    inside = np.linspace(-np.cos(0.5) + 1e-3, 0.9999, 500)
    np.testing.assert_allclose(
        heads.with_margin(jnp.asarray(inside, jnp.float32), angle=0.5),
        np.cos(np.arccos(inside) + 0.5),
        atol=2e-5,
    )


def test_gradients_of_the_margin_are_those_of_differences():
    embeddings, labels = _batch(size=4)
    head = heads.AngularMargin(5, 4.0, 0.5, 0.1)
    variables = head.init(jax.random.key(0), embeddings, labels)
    loss = jax.jit(lambda e: jnp.sum(head.apply(variables, e, labels).losses))
    chex.assert_numerical_grads(loss, (embeddings,), order=1, eps=1e-2, rtol=1e-2, atol=1e-2)


def test_an_embedding_of_zeros_has_a_finite_gradient():
    labels, zeros = jnp.array([0, 0, 1]), jnp.zeros((3, 4))
    head = heads.AngularMargin(3)
    variables = head.init(jax.random.key(0), zeros, labels)

    @jax.jit
    def gradients(embeddings):
        margin = lambda e: jnp.sum(head.apply(variables, e, labels).losses)  # noqa: E731
        triplet = lambda e: jnp.sum(heads.triplet_loss(e, labels).losses)  # noqa: E731
        return jax.grad(margin)(embeddings), jax.grad(triplet)(embeddings)

    assert all(np.isfinite(gradient).all() for gradient in gradients(zeros))


def test_margins_out_of_range():
    with pytest.raises(ValueError, match="angle"):
        heads.AngularMargin(3, angle=2.0).init(
            jax.random.key(0), jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32)
        )
    with pytest.raises(ValueError, match="mining"):
        heads.triplet_loss(jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32), mining="easy")


def _triplets(embeddings, labels, margin, mining):
    """The definition, one anchor at a time."""
    points = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    losses, correct = [], []
    for i, label in enumerate(labels):
        others = np.arange(len(labels)) != i
        positives = distances[i][others & (labels == label)]
        negatives = distances[i][labels != label]
        if not len(positives) or not len(negatives):
            losses.append(0.0)
            correct.append(False)
            continue
        negative = negatives.min()
        if mining == "semihard":
            beyond = negatives[negatives > positives.max()]
            negative = beyond.min() if len(beyond) else negatives.max()
        losses.append(max(0.0, margin + positives.max() - negative))
        correct.append(positives.min() < negatives.min())
    return np.array(losses), np.array(correct)


@pytest.mark.parametrize("mining", ["hard", "semihard"])
@pytest.mark.parametrize("num_classes", [1, 3, 8])
def test_triplets_against_the_definition(mining, num_classes):
    embeddings, labels = _batch(num_classes, size=10, depth=3)
    judged = heads.Triplet(0.3, mining).apply({}, embeddings, labels)
    losses, correct = _triplets(embeddings.astype(np.float64), labels, 0.3, mining)
    np.testing.assert_allclose(judged.losses, losses, atol=1e-5)
    np.testing.assert_array_equal(judged.correct, correct)

"""Sums over windows beside SciPy's, and their gradient beside the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from afr_jax.core.perception import windows

_WEIGHTS = np.array([0.1, 0.3, 0.7, 0.3, 0.1])


@pytest.mark.parametrize("shape", [(5, 5), (2, 9, 12), (2, 3, 6, 7)])
def test_sums_are_those_of_scipy(shape):
    planes = np.random.default_rng(0).normal(size=shape)
    whole = planes
    for axis in (-2, -1):
        whole = ndimage.correlate1d(whole, _WEIGHTS, axis=axis)
    found = jax.jit(windows.window_sums)(planes.astype(np.float32), _WEIGHTS)
    np.testing.assert_allclose(found, whole[..., 2:-2, 2:-2], rtol=1e-5, atol=1e-6)


def test_spread_is_the_transpose_and_the_gradient():
    keys = jax.random.split(jax.random.key(0))
    planes = jax.random.normal(keys[0], (3, 9, 11))
    sums = jax.random.normal(keys[1], (3, 5, 7))
    product = jnp.vdot(windows.window_sums(planes, _WEIGHTS), sums)
    np.testing.assert_allclose(product, jnp.vdot(planes, windows.spread(sums, _WEIGHTS)), rtol=1e-5)
    gradient = jax.jit(
        jax.grad(lambda planes: jnp.vdot(windows.window_sums(planes, _WEIGHTS), sums))
    )(planes)
    np.testing.assert_allclose(gradient, windows.spread(sums, _WEIGHTS), rtol=1e-5, atol=1e-6)


def test_each_of_a_batch_may_have_weights_of_its_own():
    planes = jax.random.normal(jax.random.key(0), (2, 3, 8, 9))
    weights = jnp.stack([jnp.asarray(_WEIGHTS), jnp.ones(5)]).astype(jnp.float32)
    together = jax.jit(jax.vmap(windows.window_sums))(planes, weights)
    for one, plane, weight in zip(together, planes, weights, strict=True):
        np.testing.assert_allclose(one, windows.window_sums(plane, weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mirror, mode", [(False, "edge"), (True, "symmetric")])
@pytest.mark.parametrize("margins", [((0, 0), (2, 0), (0, 0)), ((0, 0), (0, 3), (1, 2))])
def test_edges_are_repeated_and_mirrored_as_numpy_does(mirror, mode, margins):
    generator = np.random.default_rng(3)
    values = generator.normal(size=(2, 5, 4)).astype(np.float32)
    expected = np.pad(values, margins, mode=mode)
    given = {axis: each for axis, each in enumerate(margins) if axis}
    extended, transpose = jax.vjp(lambda x: windows.extend(x, given, mirror=mirror), values)
    np.testing.assert_array_equal(extended, expected)
    # The transpose: where each number went, its weights are summed up.
    weights = generator.normal(size=expected.shape).astype(np.float32)
    places = np.pad(np.arange(values.size).reshape(values.shape), margins, mode=mode)
    sums = np.bincount(places.ravel(), weights.ravel().astype(np.float64), values.size)
    np.testing.assert_allclose(transpose(weights)[0], sums.reshape(values.shape), atol=1e-5)

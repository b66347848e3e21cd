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

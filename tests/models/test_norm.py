"""BatchNorm beside that of Flax: values, statistics and gradients."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.models import norm

_OPTIONS = {"momentum": 0.8, "epsilon": 1e-3}


def _variables(module, x):
    """Filled with numbers that are not those of the start."""
    fresh = module.init(jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        [jax.random.uniform(k, v.shape, minval=0.5) for k, v in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6, 5), (2, 1, 1, 3), (8, 33, 35, 16)])
@pytest.mark.parametrize("use_scale", [True, False])
def test_training_is_that_of_flax(shape, use_scale):
    x = 3 * jax.random.normal(jax.random.key(2), shape) + 1
    weights = jax.random.normal(jax.random.key(3), shape)
    ours = norm.BatchNorm(False, use_scale=use_scale, **_OPTIONS)
    theirs = nn.BatchNorm(False, use_scale=use_scale, **_OPTIONS)
    variables = _variables(ours, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, theirs.init(jax.random.key(0), x))

    def run(module):
        def loss(params, x):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            y, moved = module.apply(given, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y) * weights), (y, moved)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)

    chex.assert_trees_all_close(run(ours), run(theirs), rtol=2e-4, atol=2e-4)


def test_running_statistics_normalize_as_in_flax():
    x = jax.random.normal(jax.random.key(2), (3, 4, 6, 5))
    ours, theirs = norm.BatchNorm(True, **_OPTIONS), nn.BatchNorm(True, **_OPTIONS)
    variables = _variables(ours, x)
    np.testing.assert_allclose(
        ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-6, atol=1e-6
    )


def test_moments_of_values_far_from_zero():
    x = np.random.default_rng(0).normal(50.0, 1.0, (32, 64, 64, 2)).astype(np.float32)
    module = norm.BatchNorm(False, momentum=0.0)
    _, moved = module.apply(module.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    exact = x.astype(np.float64)
    found = moved["batch_stats"]
    np.testing.assert_allclose(found["mean"], exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found["var"], exact.var((0, 1, 2)), rtol=1e-2)


def test_bfloat16_comes_out_as_such_and_its_statistics_do_not():
    x = jax.random.normal(jax.random.key(2), (4, 8, 8, 3)).astype(jnp.bfloat16)
    module = norm.BatchNorm(False, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    y, moved = module.apply(variables, x, mutable=["batch_stats"])
    gradient = jax.grad(
        lambda x: module.apply(variables, x, mutable=["batch_stats"])[0].astype(jnp.float32).sum()
    )(x)
    assert y.dtype == gradient.dtype == jnp.bfloat16
    assert moved["batch_stats"]["mean"].dtype == jnp.float32


def test_runs_side_by_side_are_those_one_by_one():
    x = jax.random.normal(jax.random.key(2), (3, 4, 5, 6, 2))
    module = norm.BatchNorm(False)
    variables = module.init(jax.random.key(0), x[0])

    def gradient(x):
        apply = lambda x: module.apply(variables, x, mutable=["batch_stats"])[0]  # noqa: E731
        return jax.grad(lambda x: jnp.sum(apply(x) ** 3))(x)

    together = jax.vmap(gradient)(x)
    apart = jnp.stack([gradient(one) for one in x])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)

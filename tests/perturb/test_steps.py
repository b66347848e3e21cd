import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afr_jax.perturb import steps


def _numpy_steps(gradients, sizes, momenta):
    """Kaziakhmedov et al.'s update, in float64."""
    position, moment, path = np.zeros_like(gradients[0]), np.zeros_like(gradients[0]), []
    for gradient, size, momentum in zip(gradients, sizes, momenta, strict=True):
        moment = momentum * moment + gradient / np.abs(gradient).sum()
        position = position - size * np.sign(moment)
        path.append(position)
    return path


def test_mi_fgsm_equals_numpy_with_the_published_schedule(variant):
    generator = np.random.default_rng(0)
    gradients = generator.normal(size=(40, 3, 4))
    tx = steps.published_patch_steps(40)
    # 100, 300 and 1,000 of 2,000 iterations are 2, 6 and 20 of 40.
    sizes = np.array([60] * 2 + [30] * 4 + [15] * 14 + [1] * 20) / 255
    momenta = np.array([0.9] * 6 + [0.95] * 14 + [0.99] * 20)
    patch = jnp.zeros((3, 4))
    state = tx.init(patch)
    update = variant(tx.update)
    for gradient, expected in zip(gradients, _numpy_steps(gradients, sizes, momenta), strict=True):
        change, state = update(jnp.asarray(gradient, jnp.float32), state)
        patch = optax.apply_updates(patch, change)
        np.testing.assert_allclose(patch, expected, atol=1e-5)


def test_zero_gradients_move_nothing_and_leave_no_nan():
    tx = steps.published_patch_steps(40)
    patches = {"left": jnp.ones((2, 2)), "right": jnp.ones((2, 2))}
    state = tx.init(patches)
    gradients = {"left": jnp.zeros((2, 2)), "right": jnp.full((2, 2), 1e-30)}
    updates, state = tx.update(gradients, state)
    assert (updates["left"] == 0).all()
    # However small, the other patch's gradient counts: patches are steered apart.
    np.testing.assert_allclose(updates["right"], -60 / 255)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        steps.published_patch_steps(0)

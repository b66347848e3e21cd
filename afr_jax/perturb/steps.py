"""Steps of the perturbation loop that optax does not have, as optax transformations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from afr_jax.core.parallel import AnyArray, PyTree

# Step sizes and momenta of the MTCNN patch attack over its 2,000 iterations: Kaziakhmedov et al.
# 2019, "Real-world attack on MTCNN face detection system", in the authors' code.
_SHARES = (0.05, 0.15, 0.5)
_STEP_SIZES = (60 / 255, 30 / 255, 15 / 255, 1 / 255)
_MOMENTA = (0.9, 0.9, 0.95, 0.99)


class MomentState(NamedTuple):
    """Number of steps taken, and the moment of every leaf."""

    count: jax.Array
    moment: PyTree


def mi_fgsm(
    step_size_fn: optax.Schedule, momentum_fn: optax.Schedule
) -> optax.GradientTransformation:
    """Momentum iterative fast gradient sign steps.

    m <- momentum * m + g / ||g||_1, update = -step_size * sign(m); Dong et al., "Boosting
    Adversarial Attacks with Momentum", CVPR 2018, equations 6 and 7. The norm is that of each leaf,
    so the patches of a pair are steered apart. A gradient of zero leaves the moment to decay, and a
    moment of zero leaves the variable where it is.

    Args:
        step_size_fn: step number -> step size, in units of the variable.
        momentum_fn: step number -> momentum in [0, 1).

    Returns:
        The transformation, which descends.
    """

    def init(params: PyTree) -> MomentState:
        return MomentState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, MomentState]:
        del params
        momentum = momentum_fn(state.count)

        def moved(moment: jax.Array, gradient: jax.Array) -> AnyArray:
            norm = jnp.sum(jnp.abs(gradient))
            unit = gradient / jnp.where(norm > 0, norm, 1.0)
            return (momentum * moment + unit).astype(moment.dtype)

        moment = jax.tree.map(moved, state.moment, updates)
        size = step_size_fn(state.count)
        steps = jax.tree.map(lambda m: (-jnp.sign(m) * size).astype(m.dtype), moment)
        return steps, MomentState(state.count + 1, moment)

    return optax.GradientTransformation(init, update)


def published_patch_steps(num_steps: int) -> optax.GradientTransformation:
    """`mi_fgsm` with the schedule of the MTCNN patch attack, stretched to `num_steps`.

    The published boundaries are 100, 300 and 1,000 of 2,000 iterations.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, must be at least 1")
    bounds = jnp.array([round(share * num_steps) for share in _SHARES])

    def stage_of(values: tuple[float, float, float, float]) -> optax.Schedule:
        table = jnp.array(values, jnp.float32)
        return lambda count: table[jnp.sum(count >= bounds)]

    return mi_fgsm(stage_of(_STEP_SIZES), stage_of(_MOMENTA))

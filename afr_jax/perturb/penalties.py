"""Adaptive weights of penalties, as `loop.Penalties`."""

import jax
import jax.numpy as jnp

from afr_jax.perturb import loop


def hold_below(
    name: str, limit: float, *, start: float, rate: float, least: float = 1e-3, most: float = 1e6
) -> loop.Penalties:
    """A multiplier that rises while a metric is above its limit and falls while it is below.

    The multiplier w changes by the factor exp(rate * clip(metric / limit - 1, -1, 1)): a dual
    ascent in log w, whose fixed point has the metric at its limit. (Fawkes doubles and halves its
    weight outside a dead band instead; a small steady factor settles nearer to the limit.)

    Args:
        name: of the metric in `Evaluation.metrics`.
        limit: that the metric should stay below, > 0.
        start: first multiplier.
        rate: of its change in a step.
        least: bound of the multiplier.
        most: bound of the multiplier.

    Returns:
        The penalties; their weights are the multiplier, a scalar.
    """
    if not limit > 0:
        raise ValueError(f"limit is {limit}, must be above 0")

    def update(weight: jax.Array, evaluation: loop.Evaluation) -> jax.Array:
        excess = jnp.clip(evaluation.metrics[name] / limit - 1.0, -1.0, 1.0)
        return jnp.clip(weight * jnp.exp(rate * excess), least, most)

    return loop.Penalties(init=lambda: jnp.full((), start, jnp.float32), update=update)

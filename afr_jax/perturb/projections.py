"""Projections onto the sets that perturbations must stay in.

All take and return a perturbation of ONE image; values are in [0, 1] units (8 gray levels are
8 / 255).
"""

import chex
import jax
import jax.numpy as jnp

from afr_jax.core.parallel import AnyArray


def linf_box(delta: jax.Array, limit: AnyArray | float) -> jax.Array:
    """Clips to [-limit, limit]; `limit` is a number or broadcasts against delta (one per pixel)."""
    return jnp.clip(delta, -limit, limit)


def image_box(delta: jax.Array, image: AnyArray) -> jax.Array:
    """Clips so that image + delta lies in [0, 1]; image and delta have one shape."""
    chex.assert_equal_shape([delta, image])
    return jnp.clip(delta, -image, 1.0 - image)


def gray(delta: jax.Array) -> jax.Array:
    """The nearest perturbation `[H, W, C]` that is equal in all channels: their mean."""
    return jnp.broadcast_to(jnp.mean(delta, axis=-1, keepdims=True), delta.shape)

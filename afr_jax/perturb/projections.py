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


def luma_chroma_box(delta: jax.Array, luma: AnyArray, chroma: AnyArray) -> jax.Array:
    """Clips the luma of a perturbation and its two chroma components, each by itself.

    Args:
        delta: `[H, W, 3]`, RGB.
        luma: Largest change of Y of JFIF 1.02 (ITU-R BT.601), `[H, W]` or a number.
        chroma: Largest change of Cb and of Cr, likewise.

    Returns:
        `[H, W, 3]`.
    """
    red, green, blue = (delta[..., channel] for channel in range(3))
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    cb, cr = (jnp.clip(part, -chroma, chroma) for part in ((blue - y) / 1.772, (red - y) / 1.402))
    y = jnp.clip(y, -luma, luma)
    green = y - (0.114 * 1.772 * cb + 0.299 * 1.402 * cr) / 0.587
    return jnp.stack([y + 1.402 * cr, green, y + 1.772 * cb], axis=-1)


def image_box(delta: jax.Array, image: AnyArray) -> jax.Array:
    """Clips so that image + delta lies in [0, 1]; image and delta have one shape."""
    chex.assert_equal_shape([delta, image])
    return jnp.clip(delta, -image, 1.0 - image)


def gray(delta: jax.Array) -> jax.Array:
    """The nearest perturbation `[H, W, C]` that is equal in all channels: their mean."""
    return jnp.broadcast_to(jnp.mean(delta, axis=-1, keepdims=True), delta.shape)

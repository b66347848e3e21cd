"""How much a change of luma flickers where two photos alternate: FLIP's core, differentiable.

Andersson, Nilsson, Akenine-Moeller, Oskarsson, Astrom, Fairchild: "FLIP: A Difference Evaluator for
Alternating Images", HPG 2020: both images as the eye resolves them (section 4.1), the difference of
color there to the power of 0.7 (4.1.4), and edges and points that differ count on top (4.2). Here
are the first two for gray changes: a few products in a search instead of a color pipeline. With
a larger factor and what is left out here, FLIP of cloaks is about 3.7 times as large (3.4 to 4.4);
`measures.flip` has it in full.
"""

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import backend, images
from afr_jax.core.parallel import AnyArray
from afr_jax.core.perception import windows

# Luma of JFIF 1.02 (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)
# Standard deviation in pixels of the achromatic filter (4.1.1, table 1: b = 0.0047 square degrees)
# at 67 pixels a degree, and the pixels after which it is cut.
_SIGMA, _RADIUS = 67 * (0.0047 / (2 * np.pi**2)) ** 0.5, 3
# Small differences of lightness L are worth 0.95 / (0.4 * c) * L^0.7 (4.1.4), where c is that of
# green and blue. FLIP adjusts colors for the Hunt effect, with which the factor is 0.0575; this is
# about the one without it (0.0430), and the budgets of searches are calibrated to it.
_FACTOR, _POWER = 0.0432, 0.7
# Below this lightness the power, which has no slope at zero, is flattened.
_FLOOR = 0.22


def flicker(
    image: jax.Array, original: AnyArray, *, size: AnyArray, is_coarse: AnyArray | bool = False
) -> jax.Array:
    """Mean visible change of luma.

    Args:
        image: `[H, W, 3]` float in [0, 1].
        original: Of the same shape.
        size: `[2]` int, rows and columns of the upper left part that is counted; nothing changes
            outside.
        is_coarse: Whether pixels are two wide of what is shown.

    Returns:
        Scalar, at least 0.
    """
    # L runs from 0 to 100 while luma runs from 0 to 1, roughly in proportion.
    change = image - original
    red, green, blue = (weight * change[..., i] for i, weight in enumerate(LUMA))
    lightness = 100 * (red + green + blue)
    weights = jnp.where(is_coarse, _weights(_SIGMA / 2), _weights(_SIGMA))
    # Nothing changes outside.
    seen = windows.window_sums(jnp.pad(lightness, _RADIUS), weights)
    error = images.power(seen**2 + _FLOOR**2, _POWER / 2) - _FLOOR**_POWER
    return _FACTOR * backend.plane_sums(error) / (size[0] * size[1])


def _weights(sigma: float) -> np.ndarray:
    """The filter along an axis, of sum 1."""
    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)

"""SSIMULACRA2 to a fixed reference image, differentiable: what a search holds of that measure.

Sneyers' measure (libjxl, version 2.1; the constants are those of the package `ssimulacra2`): SSIM
and edges that appear or vanish, in an opponent color space (XYB) of linear light, at up to six
scales, each as a mean and as a fourth norm, in a weighted sum. Only the maps that have a weight are
computed: most of the sum is SSIM of luma at a quarter and an eighth of the size. `measures.py` has
the package's own figure, by which final files are judged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import ssimulacra2 as package

from afr_jax.core import backend, images
from afr_jax.core.parallel import AnyArray
from afr_jax.core.perception import ssim, windows

_C2 = package.ssimulacra2.kC2
_MIXING = package.ssimulacra2.kOpsinAbsorbanceMatrix.reshape(3, 3).astype(np.float32)
_BIAS = np.float32(package.ssimulacra2.kB0)
# `[scale, channel, norm, map]`; weights below a hundredth are left out, the largest is 225.
_WEIGHTS = package.ssimulacra2.weights.reshape(3, 6, 2, 3).transpose(1, 0, 2, 3)
_WEIGHTS = np.where(_WEIGHTS > 0.01, _WEIGHTS, 0.0).astype(np.float32)[:5]
# The same for an image whose pixels are two wide: its first scale is the second one.
_COARSE_WEIGHTS = np.concatenate([_WEIGHTS[1:], np.zeros_like(_WEIGHTS[:1])])
# How many channels count at each scale, the first ones.
_CHANNELS = [
    1 + int(np.flatnonzero((fine + coarse).any(axis=(1, 2)))[-1])
    for fine, coarse in zip(_WEIGHTS, _COARSE_WEIGHTS, strict=True)
]
# The weighted sum is scaled, bent by a polynomial, and raised to a power.
_SCALE, _POLYNOMIAL = (
    0.9562382616834844,
    (2.326765642916932, -0.020884521182843837, 6.248496625763138e-05),
)
_FACTOR, _POWER = 10.0, 0.6276336467831387
_SMALLEST_SIDE, _MARGIN = 8, ssim.WINDOW // 2
# The smallest side of an image that has all six scales.
LEAST_SIDE = (_SMALLEST_SIDE - 1) * 2**5 + 1


class Scale(NamedTuple):
    """A scale of the reference: planes `[C, h, w]` of the channels that count, and their moments.

    Attributes:
        planes: XYB, all positive.
        mean: of the windows.
        square: mean of the squares.
    """

    planes: jax.Array
    mean: jax.Array
    square: jax.Array


def reference(image: AnyArray) -> tuple[Scale, ...]:
    """Prepares `[H, W, 3]`, sRGB in [0, 1], sides of at least 8, for `lost`."""
    scales = []
    for planes in _planes(image):
        mean, square = _blurred(jnp.stack([planes, planes**2]))
        scales.append(Scale(planes, mean, square))
    return tuple(scales)


def lost(
    image: jax.Array,
    original: tuple[Scale, ...],
    *,
    size: AnyArray,
    is_coarse: AnyArray | bool = False,
) -> jax.Array:
    """100 less SSIMULACRA2, with the weights of all six scales however small the images are.

    Args:
        image: `[H, W, 3]` sRGB in [0, 1].
        original: `reference` of an image of its shape.
        size: `[2]` int, rows and columns of the upper left part that is compared; nothing may
            differ outside.
        is_coarse: Whether pixels are two wide of what is shown: the first scale, on which smooth
            changes hardly count, is left out.

    Returns:
        Scalar, at least 0.
    """
    weights = jnp.where(is_coarse, _COARSE_WEIGHTS, _WEIGHTS)
    total = jnp.zeros(())
    for number, (planes, known) in enumerate(zip(_planes(image), original, strict=True)):
        area = jnp.prod(-(-jnp.asarray(size) // 2**number))
        norms = _norms(_maps(planes, known), area)
        total += jnp.sum(weights[number, : _CHANNELS[number]] * norms)
    total = _SCALE * total
    first, second, third = _POLYNOMIAL
    bent = total * (first + total * (second + total * third))
    return _FACTOR * jnp.maximum(bent, 1e-6) ** _POWER


def _maps(planes: jax.Array, known: Scale) -> jax.Array:
    """What is lost at every pixel `[C, 3, h, w]`: SSIM, edges that appear, edges that vanish."""
    mean, square, product = _blurred(jnp.stack([planes, planes**2, planes * known.planes]))
    luminance = 1 - (known.mean - mean) ** 2
    structure = 2 * (product - known.mean * mean) + _C2
    variances = known.square - known.mean**2 + square - mean**2 + _C2
    unlike = 1 - luminance * structure / variances
    edges = (1 + jnp.abs(planes - mean)) / (1 + jnp.abs(known.planes - known.mean)) - 1
    return jnp.maximum(jnp.stack([unlike, edges, -edges], axis=1), 0)


def _norms(maps: jax.Array, area: jax.Array) -> jax.Array:
    """Means and fourth norms `[C, 2, 3]` of maps."""
    mean = backend.plane_sums(maps) / area
    fourth = backend.plane_sums(maps**4) / area
    return jnp.stack([mean, jnp.maximum(fourth, 1e-30) ** 0.25], axis=1)


def _planes(image: AnyArray) -> list[jax.Array]:
    """The channels that count at each scale, `[C, h, w]`."""
    image = jnp.asarray(image).transpose(2, 0, 1)
    low = image <= 0.04045
    # Where the other branch is taken, its power still has a slope.
    curve = images.power((jnp.where(low, 1.0, image) + 0.055) / 1.055, 2.4)
    linear = jnp.where(low, image / 12.92, curve)
    scales = []
    for number, channels in enumerate(_CHANNELS):
        if min(linear.shape[1:]) < _SMALLEST_SIDE:
            break
        scales.append(_xyb(linear)[:channels])
        if number + 1 < len(_CHANNELS):
            linear = _halved(linear)
    return scales


def _xyb(linear: jax.Array) -> jax.Array:
    """The opponent colors `[3, h, w]` of linear light, shifted so that they are positive."""
    mixed = jnp.tensordot(_MIXING, linear, axes=1) + _BIAS
    first, second, third = images.power(jnp.maximum(mixed, 1e-9), 1 / 3) - np.cbrt(_BIAS)
    luma = (first + second) / 2
    return jnp.stack([7 * (first - second) + 0.42, luma + 0.01, third - luma + 0.55])


def _halved(planes: jax.Array) -> jax.Array:
    """Means of two by two pixels; of fewer where a side is odd."""
    *_, height, width = planes.shape
    padded = windows.extend(planes, {1: (0, height % 2), 2: (0, width % 2)})
    blocks = padded.reshape(len(planes), padded.shape[1] // 2, 2, padded.shape[2] // 2, 2)
    return blocks.mean(axis=(2, 4))


def _blurred(planes: jax.Array) -> jax.Array:
    """Gaussian means of `[..., H, W]`, at the borders as the package has them."""
    lead = [(0, 0)] * (planes.ndim - 2)
    planes = jnp.pad(planes, [*lead, (0, 0), (_MARGIN, _MARGIN)])
    planes = windows.extend(planes, {planes.ndim - 2: (_MARGIN, _MARGIN)}, mirror=True)
    return ssim.window_means(planes)

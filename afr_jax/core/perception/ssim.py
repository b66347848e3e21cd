"""Structural similarity to a fixed reference image, and the DSSIM that budgets are stated in.

DSSIM = (1 - SSIM) / 2: single scale, 11 x 11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03,
windows wholly inside the image, mean over places and channels, as in Fawkes (Shan et al. 2020, and
the authors' code, which applies `tf.image.ssim`). SSIM is of Wang, Bovik, Sheikh, Simoncelli:
"Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 2004.

`dm_pix.ssim` has the same values (the tests compare both values and gradients). This module exists
because DSSIM is evaluated at every step of a cloak: the reference's moments are computed once, the
window filter is two passes of shifted sums, and the gradient is written out (three filters instead
of five, forward and backward), which together is several times faster.
"""

from typing import NamedTuple

import chex
import cv2
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import backend
from afr_jax.core.parallel import AnyArray
from afr_jax.core.perception import windows

WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


class SsimReference(NamedTuple):
    """The fixed image of a comparison: planes `[C, H, W]` and its windows' first two moments."""

    planes: jax.Array
    mean: jax.Array
    square: jax.Array


def ssim_reference(image: AnyArray) -> SsimReference:
    """Prepares `[H, W, C]`, float in [0, 1], sides of at least 11, for `ssim_map`."""
    chex.assert_rank(image, 3)
    chex.assert_axis_dimension_gteq(image, 0, WINDOW)
    chex.assert_axis_dimension_gteq(image, 1, WINDOW)
    planes = jnp.asarray(image).transpose(2, 0, 1)
    return SsimReference(planes, window_means(planes), window_means(planes**2))


def ssim_map(image: jax.Array, reference: SsimReference) -> jax.Array:
    """SSIM of an image with the reference at every window, averaged over channels.

    Args:
        image: `[H, W, C]` float in [0, 1], of the reference's shape. Gradients flow to it alone.
        reference: `ssim_reference` of the other image.

    Returns:
        `[H - 10, W - 10]`, at most 1; entry (i, j) is the window of rows i..i+10, columns j..j+10.
    """
    planes = image.transpose(2, 0, 1)
    chex.assert_equal_shape([planes, reference.planes])
    return jnp.mean(_ssim(planes, reference), axis=0)


def tolerance(reference: SsimReference) -> jax.Array:
    """How far single pixels can change for an equal loss of SSIM, up to a common factor.

    By the structure term of Wang et al. 2004, equation 13, for small changes: a window of variance
    v loses change^2 / (2 v + C2) at its pixels, so that texture hides more than smooth skin.

    Args:
        reference: of an image `[H, W, C]`.

    Returns:
        `[H, W, C]`, > 0.
    """
    variance = jnp.maximum(reference.square - reference.mean**2, 0.0)
    sums = jnp.stack([1 / (2 * variance + _C2), jnp.ones_like(variance)])
    loss, whole = windows.spread(sums, window())
    return jnp.sqrt(whole / loss).transpose(1, 2, 0)


def dssim(image: jax.Array, other: jax.Array) -> jax.Array:
    """Structural dissimilarity (1 - SSIM) / 2 of two images `[H, W, C]` in [0, 1]; 0 if equal."""
    return (1.0 - jnp.mean(ssim_map(image, ssim_reference(other)))) / 2.0


def box_dssim(similarity: jax.Array, box: jax.Array) -> jax.Array:
    """DSSIM over a rectangle, from the SSIM map of the whole image.

    Args:
        similarity: `[H - 10, W - 10]` (`ssim_map`).
        box: `[4]` int (y0, x0, y1, x1), at least 11 pixels a side; only windows wholly inside it
            count.

    Returns:
        Scalar, equal to `dssim` of the two cropped images.
    """
    rows, columns = (
        (jnp.arange(size) >= box[axis]) & (jnp.arange(size) <= box[axis + 2] - WINDOW)
        for axis, size in enumerate(similarity.shape)
    )
    total = backend.plane_sums(jnp.where(rows[:, None] & columns[None, :], similarity, 0.0))
    return (1.0 - total / jnp.maximum(jnp.sum(rows) * jnp.sum(columns), 1)) / 2.0


def window() -> np.ndarray:
    """The Gaussian window along one axis, `[11]`, of sum 1."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    return weights / weights.sum()


def dssim_uint8(image: np.ndarray, other: np.ndarray, *, boxes: np.ndarray | None = None) -> float:
    """DSSIM of two host images by OpenCV's filters, whatever their size.

    This is the yardstick of final files, independent of the code above; scikit-image in float64 is
    the tests'. With a change d = y - x the two factors of Wang et al. 2004, equation 13, are one
    less small terms, mean(d)^2 / (mean(x)^2 + mean(y)^2 + C1) and var(d) / (var(x) + var(y) + C2),
    which float32 has to some five digits where the factors themselves would lose them.

    Args:
        image: `[H, W, C]` uint8, as the other.
        other: of the same shape.
        boxes: `[N, 4]` int (y0, x0, y1, x1), at least 11 pixels a side; the largest DSSIM of these
            pieces is taken, in place of that of the whole.

    Raises:
        ValueError: an image or a box is smaller than the window.
    """
    if boxes is None:
        boxes = np.array([[0, 0, *image.shape[:2]]])
    if np.min(boxes[:, 2:] - boxes[:, :2]) < WINDOW:
        raise ValueError(
            f"DSSIM needs sides of {WINDOW} pixels, a box of {boxes.tolist()} has less"
        )
    unlike = np.mean(
        [_unlike(*planes) for planes in zip(cv2.split(image), cv2.split(other), strict=True)], 0
    )
    margin = WINDOW // 2
    pieces = [unlike[y0 : y1 - 2 * margin, x0 : x1 - 2 * margin] for y0, x0, y1, x1 in boxes]
    return max(float(np.mean(piece, dtype=np.float64) / 2) for piece in pieces)


def _unlike(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 - SSIM `[H - 10, W - 10]` of two planes `[H, W]` uint8, float32."""
    margin = WINDOW // 2
    kernel = window()[:, None]

    def means(plane: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(plane, cv2.CV_32F, kernel, kernel)[margin:-margin, margin:-margin]

    first, second = image.astype(np.float32), other.astype(np.float32)
    change, middle = second - first, first.mean()
    by, mean = means(change), means(first)
    light = by**2 / (mean**2 + (mean + by) ** 2 + _C1 * 255**2)
    # Squares of what is left without the plane's mean are small where the plane is flat.
    squares = means((first - middle) ** 2 + (second - middle) ** 2)
    variances = squares - (mean - middle) ** 2 - (mean + by - middle) ** 2
    structure = (means(change**2) - by**2) / (variances + _C2 * 255**2)
    return light + (1 - light) * structure


@jax.custom_vjp
def _ssim(planes: jax.Array, reference: SsimReference) -> jax.Array:
    """SSIM map `[C, H - 10, W - 10]` of planes `[C, H, W]`."""
    return _ssim_forward(planes, reference)[0]


def _ssim_forward(
    planes: jax.Array, reference: SsimReference
) -> tuple[jax.Array, tuple[jax.Array, SsimReference, jax.Array]]:
    """Wang et al. 2004, equation 13, and its derivatives with respect to the windows' moments."""
    mean, square, product = window_means(jnp.stack([planes, planes**2, planes * reference.planes]))
    luminance = 2 * mean * reference.mean + _C1
    structure = 2 * (product - mean * reference.mean) + _C2
    inverse_squares = 1 / (mean**2 + reference.mean**2 + _C1)
    inverse_variances = 1 / (square - mean**2 + reference.square - reference.mean**2 + _C2)
    inverse = inverse_squares * inverse_variances
    similarity = luminance * structure * inverse
    by_mean = 2 * reference.mean * (structure - luminance) * inverse
    by_mean -= 2 * mean * similarity * (inverse_squares - inverse_variances)
    by_square = -similarity * inverse_variances
    by_product = 2 * luminance * inverse
    return similarity, (planes, reference, jnp.stack([by_mean, by_square, by_product]))


def _ssim_backward(
    residuals: tuple[jax.Array, SsimReference, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None]:
    planes, reference, by_moment = residuals
    mean, square, product = windows.spread(by_moment * cotangent[None], window())
    return mean + 2 * planes * square + reference.planes * product, None


_ssim.defvjp(_ssim_forward, _ssim_backward)


def window_means(planes: jax.Array) -> jax.Array:
    """Means by the Gaussian window of `[..., H, W]`, `[..., H - 10, W - 10]`."""
    return windows.window_sums(planes, window())

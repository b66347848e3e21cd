"""Stage 2b of face recognition: from landmarks to the extractor's chip.

A similarity transform takes five landmarks to an extractor's template; the photo is resampled along
it. The warp is antialiased and differentiable, so gradients flow from the chip to the photo's own
pixels.

Coordinates are (y, x) in pixels, 0 at the center of the first pixel. A transform is `[2, 3]`: chip
point (y, x, 1) to photo point (y, x).
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import backend, images, parallel
from afr_jax.core.perception import windows
from afr_jax.models.extractors import registry

# Pixels of an averaged photo from one pixel of a chip to the next, at most.
MOST_STEP = 1.25


class Canvas(NamedTuple):
    """A piece of a photo on an array of a bucket's size, float32 in [0, 1].

    Canvas pixel (i, j) is the average of the `factor` x `factor` photo pixels from `origin` +
    factor * (i, j) on. The piece fills the first `size` rows and columns; what lies outside it, or
    outside the photo, is black.
    """

    image: np.ndarray
    origin: tuple[int, int]
    factor: int
    size: tuple[int, int]


def cut_canvas(
    pixels: np.ndarray, bounds: np.ndarray, *, factor: int, bucket_sizes: tuple[int, ...]
) -> Canvas:
    """Cuts a rectangle out of a photo.

    Args:
        pixels: `[H, W, 3]` uint8.
        bounds: `[4]` (y0, x0, y1, x1), float; rounded outwards and clipped to the photo.
        factor: photo pixels per canvas pixel.
        bucket_sizes: sides of canvases, of `images.bucket_size`.

    Returns:
        The canvas, square.
    """
    low, high = integer_bounds(bounds, pixels.shape[:2])
    piece = pixels[low[0] : high[0], low[1] : high[1]].astype(np.float32) / 255.0
    size = -(-piece.shape[0] // factor), -(-piece.shape[1] // factor)
    if factor > 1:
        extra = [(0, n * factor - m) for n, m in zip(size, piece.shape[:2], strict=True)]
        piece = np.pad(piece, [*extra, (0, 0)], mode="edge")
        piece = piece.reshape(size[0], factor, size[1], factor, 3).mean(axis=(1, 3))
    side = images.bucket_size(max(size), bucket_sizes)
    return Canvas(images.pad_to(piece, (side, side)), (int(low[0]), int(low[1])), factor, size)


def integer_bounds(bounds: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last (row, column) of a rectangle, rounded outwards, within `shape`."""
    limit = np.array(shape[:2])
    low = np.clip(np.floor(np.asarray(bounds)[:2]).astype(int), 0, limit - 1)
    high = np.clip(np.ceil(np.asarray(bounds)[2:]).astype(int), low + 1, limit)
    return low, high


def canvas_transform(transform: np.ndarray, canvas: Canvas) -> np.ndarray:
    """The transform `[2, 3]` from chip to canvas, of one from chip to photo."""
    center = np.asarray(canvas.origin) + (canvas.factor - 1) / 2
    moved = np.array(transform, np.float64)
    moved[:, 2] -= center
    return moved / canvas.factor


def similarity_transform(landmarks: np.ndarray, template: np.ndarray) -> np.ndarray:
    """The transform from chip to photo whose inverse takes the landmarks nearest to the template.

    Rotation, uniform scale and shift with the least squared error in the chip (Umeyama 1991, for
    two dimensions and without reflection: one complex division).

    Args:
        landmarks: `[5, 2]` (y, x) in the photo.
        template: `[5, 2]` (y, x) in the chip.

    Returns:
        `[2, 3]` float64.

    Raises:
        ValueError: the landmarks coincide or are not finite.
    """
    if not np.all(np.isfinite(landmarks)):
        raise ValueError("the landmarks are not finite numbers")
    source = np.asarray(landmarks, np.float64) @ [1j, 1.0]
    target = np.asarray(template, np.float64) @ [1j, 1.0]
    centered = source - source.mean()
    spread = np.sum(np.abs(centered) ** 2)
    factor = np.sum(np.conj(centered) * (target - target.mean())) / spread if spread > 0 else 0.0
    if abs(factor) < 1e-9:
        raise ValueError("the landmarks do not span a face")
    inverse = 1.0 / factor
    shift = source.mean() - inverse * target.mean()
    return np.array(
        [
            [inverse.real, inverse.imag, shift.imag],
            [-inverse.imag, inverse.real, shift.real],
        ]
    )


def chip_transform(extractor: registry.Extractor, landmarks: np.ndarray) -> np.ndarray:
    """The transform `[2, 3]` float64 from an extractor's chip to a photo.

    A similarity transform to the extractor's template, stretched in the chip's columns where the
    extractor learned from faces that were.

    Args:
        extractor: whose chip.
        landmarks: `[5, 2]` (y, x) in the photo.

    Raises:
        ValueError: the landmarks span no face.
    """
    center, stretch = (extractor.input_px - 1) / 2, extractor.stretch
    template = np.array(extractor.template)
    template[:, 1] = center + (template[:, 1] - center) / stretch
    transform = similarity_transform(landmarks, template)
    squeeze = np.array([[1, 0, 0], [0, 1 / stretch, center - center / stretch], [0, 0, 1]])
    return np.vstack([transform, [0, 0, 1]])[:2] @ squeeze


def transform_scale(transform: np.ndarray) -> float:
    """Photo pixels per chip pixel, from row to row of the chip."""
    return float(np.hypot(transform[0, 0], transform[1, 0]))


def chip_bounds(transform: np.ndarray, size: int) -> np.ndarray:
    """The rectangle `[4]` (y0, x0, y1, x1), float, that a chip of side `size` covers in a photo."""
    edge = size - 0.5
    corners = np.array([[-0.5, -0.5, 1], [-0.5, edge, 1], [edge, -0.5, 1], [edge, edge, 1]])
    points = corners @ np.asarray(transform).T + 0.5
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def pool_factor(scale: float) -> int:
    """By how much to box-average a photo before sampling it at `scale` pixels per chip pixel.

    Bilinear sampling of the averaged photo then steps by at most `MOST_STEP` of its pixels, so
    little aliases, and by no less than 0.6 (above a factor of 1), so little blurs.
    """
    return max(1, int(np.ceil(scale - (MOST_STEP - 1))))


def jitter_transform(
    key: jax.Array,
    transform: parallel.AnyArray,
    size: int,
    *,
    shift: jax.Array | float,
    turn: jax.Array | float,
) -> jax.Array:
    """A chip-to-photo transform as slightly different landmarks would give it.

    Args:
        key: of the draw.
        transform: `[2, 3]`.
        size: side of the chip.
        shift: standard deviation of the shift in both axes, as a share of the chip's side.
        turn: standard deviation of the rotation (radians) and of the relative scale about its
            center.

    Returns:
        `[2, 3]`.
    """
    spread = jnp.array([shift, shift, turn, turn])
    shift_y, shift_x, angle, growth = spread * jax.random.normal(key, (4,))
    center = (size - 1) / 2
    cosine, sine = (1 + growth) * jnp.cos(angle), (1 + growth) * jnp.sin(angle)
    matrix = jnp.array([[cosine, sine], [-sine, cosine]])
    offset = center - matrix @ jnp.full(2, center) + size * jnp.array([shift_y, shift_x])
    linear = transform[:, :2]
    return jnp.concatenate([linear @ matrix, (linear @ offset + transform[:, 2])[:, None]], axis=1)


def warp(
    image: parallel.AnyArray,
    transform: parallel.AnyArray,
    *,
    size: int,
    pool: int | jax.Array = 1,
) -> jax.Array:
    """Resamples an image to a chip: box average over `pool` pixels, then bilinear; black outside.

    Args:
        image: `[H, W, C]` float.
        transform: `[2, 3]`, chip to image.
        size: side of the chip.
        pool: factor of the box average, `pool_factor` of the transform's scale. As an int32 scalar
            it may differ from call to call of a compiled program, up to the one of a chip that is
            as large as the image, and one more.

    Returns:
        `[size, size, C]`.
    """
    chex.assert_rank(image, 3)
    chex.assert_shape(transform, (2, 3))
    if isinstance(pool, int):
        image = _pooled(image, pool)
    else:
        most = -(-max(image.shape[:2]) // size) + 1
        pool = jnp.clip(pool, 1, most)
        # Zeros behind a smaller image are what lies outside of it.
        sizes = [functools.partial(_pooled, pool=each, padded=True) for each in range(1, most + 1)]
        image = jax.lax.switch(pool - 1, sizes, image)
    steps = jnp.arange(size, dtype=jnp.float32)
    y, x = (
        row[0] * steps[:, None] + row[1] * steps[None, :] + row[2]
        for row in transform.astype(jnp.float32)
    )
    places = (row - (pool - 1) / 2 for row in (y, x))
    # Whoever reads the chip would look all four pixels up anew, on one core.
    return backend.apart(_bilinear, jnp.asarray(image), *(row / pool for row in places))


def _pooled(image: parallel.AnyArray, pool: int, *, padded: bool = False) -> parallel.AnyArray:
    """Averages over `pool` x `pool` pixels, behind them zeros up to the old shape if asked for."""
    if pool == 1:
        return image
    height, width, channels = image.shape
    rows, columns = -(-height // pool), -(-width // pool)
    image = windows.extend(
        jnp.asarray(image), {0: (0, rows * pool - height), 1: (0, columns * pool - width)}
    )
    image = image.reshape(rows, pool, columns, pool, channels).mean(axis=(1, 3))
    if padded:
        image = jnp.pad(image, ((0, height - rows), (0, width - columns), (0, 0)))
    return image


def _bilinear(image: parallel.AnyArray, y: jax.Array, x: jax.Array) -> jax.Array:
    """Samples `[H, W, C]` at points `[R, S]`; beyond the outermost centers it fades to zero.

    It reads, and its gradient writes, a plane of each channel: on CPU that takes two thirds of the
    time of pixels of three numbers.
    """
    height, width, channels = image.shape
    low_y, low_x = jnp.floor(y), jnp.floor(x)
    is_near = (low_y >= -1) & (low_y < height) & (low_x >= -1) & (low_x < width)
    # What lies outside are the zeros of a border.
    row = jnp.clip(low_y + 1, 0, height).astype(jnp.int32)
    column = jnp.clip(low_x + 1, 0, width).astype(jnp.int32)
    first = row * (width + 2) + column
    planes = jnp.pad(image, ((1, 1), (1, 1), (0, 0))).transpose(2, 0, 1).reshape(channels, -1)
    corners = []
    for step_y, by_row in enumerate((1 - (y - low_y), y - low_y)):
        for step_x, by_column in enumerate((1 - (x - low_x), x - low_x)):
            weight = jnp.where(is_near, by_row * by_column, 0.0)
            place = first + step_y * (width + 2) + step_x
            corners.append(jnp.take(planes, place, axis=1, mode="clip") * weight[None])
    return functools.reduce(operator.add, corners).transpose(1, 2, 0)

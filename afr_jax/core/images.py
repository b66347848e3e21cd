"""Array operations on images: area resize, cropping, 8-bit conversion.

Images are float32 RGB in [0, 1], `[H, W, 3]`, unless a docstring says otherwise. Functions take one
image; batch with `jax.vmap`. Files are not read here (see `afr_jax.data.photos`).
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np


def to_float(pixels: jax.Array) -> jax.Array:
    """uint8 pixels in 0..255, any shape, as float32 in [0, 1]."""
    chex.assert_type(pixels, jnp.uint8)
    return pixels.astype(jnp.float32) / 255.0


def to_uint8(image: jax.Array) -> jax.Array:
    """Float image in [0, 1], any shape, clipped and rounded (not truncated) to uint8."""
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def power(values: jax.Array, exponent: float) -> jax.Array:
    """Positive numbers raised to a power, by logarithms: on CPU six times as fast as `**`.

    The relative error is some 1e-6 for values and exponents of the order of one.
    """
    return jnp.exp(exponent * jnp.log(values))


def changed_pixels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Which pixels of two images `[H, W, 3]` differ in any channel, `[H, W]` bool; on the host."""
    changed = first[..., 0] != second[..., 0]
    for channel in (1, 2):
        changed |= first[..., channel] != second[..., channel]
    return changed


def resize_area(
    image: jax.Array,
    shape: tuple[int, int],
    *,
    in_size: jax.Array | None = None,
    out_size: jax.Array | None = None,
) -> jax.Array:
    """Shrinks an image by area averaging, as OpenCV's `INTER_AREA`.

    Output i averages the input interval [i r, (i + 1) r), r = in / out, partly covered pixels
    counted by the covered part, rows first, then columns. Sizes may be traced, so arrays of one
    padded shape serve images of many sizes.

    Args:
        image: `[H, W, C]` float.
        shape: (rows, columns) of the resulting array, at most those of the image.
        in_size: `[2]` true rows and columns of the image; by default its shape.
        out_size: `[2]` true rows and columns of the result; by default `shape`. The ratio in / out
            may exceed that of the array shapes by at most a tenth.

    Returns:
        `[rows, columns, C]`, the image's dtype; past `out_size` its values mean nothing.

    Raises:
        ValueError: the shape is larger than the image or empty.
    """
    chex.assert_rank(image, 3)
    image = jnp.asarray(image)
    true_in = image.shape[:2] if in_size is None else in_size
    true_out = shape if out_size is None else out_size
    if not all(0 < new <= old for new, old in zip(shape, image.shape[:2], strict=True)):
        raise ValueError(f"resize_area shrinks: {shape} does not lie within {image.shape[:2]}")
    height, width, channels = image.shape
    rows = _average_leading(image.reshape(height, -1), shape[0], true_in[0], true_out[0])
    by_column = rows.reshape(shape[0], width, channels).transpose(1, 0, 2).reshape(width, -1)
    columns = _average_leading(by_column, shape[1], true_in[1], true_out[1])
    return columns.reshape(shape[1], shape[0], channels).transpose(1, 0, 2)


def bilinear_crops(
    image: jax.Array, rows: jax.Array, columns: jax.Array, size: jax.Array
) -> jax.Array:
    """Samples an image bilinearly on grids of rows and columns; outside it is zero.

    Args:
        image: `[H, W, C]` float, of which the first `size` rows and columns are the image.
        rows: `[N, R]` float, row coordinates of each crop (0 = centre of the first row).
        columns: `[N, S]` float, column coordinates.
        size: `[2]` int, true rows and columns of the image.

    Returns:
        `[N, R, S, C]`.
    """
    chex.assert_rank([image, rows, columns], [3, 2, 2])

    def corners(
        at: jax.Array, limit: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, length - 1)
        high = jnp.clip(low + 1, 0, jnp.maximum(limit - 1, 0))
        inside = (at >= 0) & (at <= limit - 1)
        return low, high, at - low, inside

    row_low, row_high, row_part, row_in = corners(rows, size[0], image.shape[0])
    col_low, col_high, col_part, col_in = corners(columns, size[1], image.shape[1])

    def row_of(index: jax.Array) -> jax.Array:
        # Two gathers of whole pixels for a row index: left and right neighbour, mixed by column.
        left = image[index[:, :, None], col_low[:, None, :]]
        right = image[index[:, :, None], col_high[:, None, :]]
        part = col_part[:, None, :, None]
        return left + (right - left) * part

    top, bottom = row_of(row_low), row_of(row_high)
    crops = top + (bottom - top) * row_part[:, :, None, None]
    return jnp.where((row_in[:, :, None] & col_in[:, None, :])[..., None], crops, 0.0)


def bucket_size(size: int, bucket_sizes: tuple[int, ...]) -> int:
    """The smallest bucket size that holds `size`, or the next multiple of the largest one.

    Shapes are rounded up to few sizes so that inputs of many sizes share compiled programs.
    """
    for step in bucket_sizes:
        if size <= step:
            return step
    return -(-size // bucket_sizes[-1]) * bucket_sizes[-1]


def pad_to(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Zero-pads the rows and columns of a host array `[H, W, ...]` at the end up to `shape`."""
    extra = [(0, shape[0] - array.shape[0]), (0, shape[1] - array.shape[1])]
    return np.pad(array, extra + [(0, 0)] * (array.ndim - 2))


def _average_leading(
    x: jax.Array, num_out: int, in_size: jax.Array | int, out_size: jax.Array | int
) -> jax.Array:
    """Area averages `[N, M]` -> `[num_out, M]` along the leading axis, as a sum over shifted rows.

    A row of the result touches in / out + 1 rows of the input, so this costs a pass over the input
    whatever the ratio (a dense matrix product costs `num_out` times as much, a running sum loses
    digits).
    """
    if all(isinstance(n, int) and n == x.shape[0] for n in (num_out, in_size, out_size)):
        return x
    num_taps = math.ceil(1.1 * x.shape[0] / num_out) + 1
    # float32 holds i * in / out to 2^-9 pixel for sides up to 2^14.
    ratio = jnp.asarray(in_size, jnp.float32) / jnp.maximum(jnp.asarray(out_size, jnp.float32), 1)
    start = jnp.arange(num_out, dtype=jnp.float32) * ratio
    first = jnp.floor(start).astype(jnp.int32)

    def tap(k: int, total: jax.Array) -> jax.Array:
        index = first + k
        covered = jnp.minimum(start + ratio, index + 1.0) - jnp.maximum(start, index)
        # Rounding must not let a tap reach past the true end of the input.
        weight = jnp.where(index < in_size, jnp.clip(covered, 0.0, 1.0), 0.0) / ratio
        return total + x[jnp.minimum(index, x.shape[0] - 1)] * weight[:, None].astype(x.dtype)

    total = jnp.zeros_like(x, shape=(num_out, x.shape[1]))
    if num_taps <= 8:
        for k in range(num_taps):
            total = tap(k, total)
        return total
    return jax.lax.fori_loop(0, num_taps, tap, total)

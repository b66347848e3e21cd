"""Convolutions with fewer multiplications on CPU: Winograd's minimal filtering of the rows.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks" (CVPR), section 4.1, along
one axis: m rows of outputs take m + 2 products of rows, where three taps for each take 3 m. Along
both axes there would be fewer products yet, and more of what is not a product.

Sums are those of a convolution in another order: results differ by some 1e-5 of their standard
deviation. Rows that are made at once share roundings: a huge number among the inputs takes digits
from the rows beside it, too.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.core import backend

_NHWC = ("NHWC", "HWIO", "NHWC")
_TAPS = 3
# Rows of outputs at a time, and the points at which polynomials are multiplied, but for infinity.
_STEPS = (3, 4)
_POINTS = (0, 1, -1, 2, -2)
# With fewer channels, read and made, or multiplications in all, sums cost what products save; for a
# kernel's gradient more are transposed.
_SOME, _MANY, _MANY_FOR_KERNELS = 16, 32, 64
_FEWEST_PRODUCTS, _FEWEST_ON_ONE_CORE = 1 << 26, 1 << 24


@functools.cache
def transforms(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices of minimal filtering F(m, 3), by Toom and Cook.

    For inputs d and taps g outputs are A^T ((G g) * (B^T d)), in Lavin and Gray's names.

    Args:
        step: m, the number of outputs, at most 4.

    Returns:
        B^T `[m + 2, m + 2]`, G `[m + 2, 3]` and A^T `[m, m + 2]`, float32.
    """
    points = np.array(_POINTS[: step + _TAPS - 2], float)
    powers = np.vander(points, len(points) + 1, increasing=True)
    others = [np.delete(points, i) for i in range(len(points))]
    scales = [np.prod(point - rest) for point, rest in zip(points, others, strict=True)]
    of_inputs = np.zeros((len(points) + 1, len(points) + 1))
    for row, rest in enumerate([*others, points]):
        of_inputs[row, : len(rest) + 1] = np.poly(rest)[::-1]
    infinity = np.eye(1, len(points) + 1, len(points))
    of_taps = np.concatenate([powers[:, :_TAPS] / np.stack(scales)[:, None], infinity[:, -_TAPS:]])
    of_outputs = np.concatenate([powers[:, :step], infinity[:, -step:]]).T
    return of_inputs.astype(np.float32), of_taps.astype(np.float32), of_outputs.astype(np.float32)


def saves(
    kernel: tuple[int, ...], batch: int, sizes: Sequence[int], *, is_on_one_core: bool = False
) -> bool:
    """Whether `convolve` is faster than a convolution, as a rule.

    Args:
        kernel: shape of its kernel, `[R, S, C, D]`.
        batch: number of images.
        sizes: rows and columns of an output.
        is_on_one_core: whether other programs keep the other cores busy. Else there must be more to
            multiply, as XLA does not share out small sums among cores.
    """
    rows, _, channels, features = kernel
    if rows != _TAPS or min(channels, features) < _SOME or max(channels, features) < _MANY:
        return False
    fewest = _FEWEST_ON_ONE_CORE if is_on_one_core else _FEWEST_PRODUCTS
    return batch * math.prod(sizes) * math.prod(kernel) >= fewest


def saves_for_kernel(kernel: tuple[int, ...], batch: int, sizes: Sequence[int]) -> bool:
    """Whether `kernel_gradient` is faster, as a rule; see `saves`."""
    return saves(kernel, batch, sizes) and min(kernel[2:]) >= _MANY_FOR_KERNELS


def convolve(images: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """A convolution of three rows of taps with stride 1.

    Args:
        images: `[B, H, W, C]` float32.
        kernel: `[3, S, C, D]`.
        padding: (before, after) for rows and for columns, not negative.

    Returns:
        `[B, H', W', D]`.
    """
    batch, height, width, channels = images.shape
    step, count, pads = _rows(height, padding[0])
    of_inputs, of_taps, of_outputs = transforms(step)

    def input_rows(images: jax.Array) -> tuple[jax.Array, ...]:
        # Rows lie together for XLA's loops.
        flat = images.reshape(batch, height, width * channels)
        seen = _windows(_padded(flat, 1, pads), 1, step, count)
        return tuple(
            _combined(row, seen).reshape(batch, count, width, channels) for row in of_inputs
        )

    products = [
        _product(row, _combined(taps, kernel)[None], padding[1])
        for row, taps in zip(backend.apart(input_rows, images), of_taps, strict=True)
    ]
    found = jnp.stack([_combined(row, products) for row in of_outputs], 2)
    rows = height + sum(padding[0]) - _TAPS + 1
    return found.reshape(batch, count * step, *found.shape[3:])[:, :rows]


def kernel_gradient(
    images: jax.Array, gradient: jax.Array, padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Gradient for the kernel of such a convolution: each step of it transposed.

    Args:
        images: `[B, H, W, C]` float32, what was convolved.
        gradient: `[B, H', W', D]` float32.
        padding: as in `convolve`.

    Returns:
        `[3, S, C, D]`, with as many columns of taps as the sizes tell.
    """
    batch, height, width, channels = images.shape
    step, count, pads = _rows(height, padding[0])
    of_inputs, of_taps, of_outputs = transforms(step)

    def rows_first(
        images: jax.Array, gradient: jax.Array
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        flat = images.transpose(3, 1, 2, 0).reshape(channels, height, width * batch)
        seen = _windows(_padded(flat, 1, pads), 1, step, count)
        inputs = (_combined(row, seen).reshape(channels, count, width, batch) for row in of_inputs)
        outputs = _padded(gradient.transpose(1, 2, 0, 3), 0, (0, count * step - gradient.shape[1]))
        made = [outputs[i::step] for i in range(step)]
        return tuple(inputs), tuple(_combined(column, made) for column in of_outputs.T)

    found = [
        _product(inputs, outputs, padding[1])
        for inputs, outputs in zip(*backend.apart(rows_first, images, gradient), strict=True)
    ]
    taps = jnp.stack([_combined(column, found) for column in of_taps.T])
    return taps[:, :, 0].transpose(0, 2, 1, 3)


def _rows(height: int, padding: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
    """Rows made at once, how many times, and the padding of inputs by which these come out even."""
    rows = height + sum(padding) - _TAPS + 1
    step = min(_STEPS, key=lambda step: -(-rows // step) * (step + _TAPS - 1))
    count = -(-rows // step)
    return step, count, (padding[0], padding[1] + count * step - rows)


def _padded(images: jax.Array, axis: int, padding: tuple[int, int]) -> jax.Array:
    """Zeros before and behind along an axis."""
    pads = [(*padding, 0) if i == axis else (0, 0, 0) for i in range(images.ndim)]
    return jax.lax.pad(images, jnp.zeros((), images.dtype), pads)


def _windows(images: jax.Array, axis: int, step: int, count: int) -> list[jax.Array]:
    """The first row along an axis of each of `count` windows, the second of each, and so on."""
    reach = (count - 1) * step + 1
    return [
        jax.lax.slice_in_dim(images, row, row + reach, step, axis)
        for row in range(step + _TAPS - 1)
    ]


def _product(rows: jax.Array, kernel: jax.Array, padding: tuple[int, int]) -> jax.Array:
    """A convolution without padding of rows."""
    return jax.lax.conv_general_dilated(
        rows, kernel, (1, 1), ((0, 0), padding), dimension_numbers=_NHWC
    )


def _combined(factors: np.ndarray, arrays: Sequence[jax.Array] | jax.Array) -> jax.Array:
    """The sum of arrays by factors, of which many are 0 or 1."""
    terms = [
        array if factor == 1 else -array if factor == -1 else array * factor
        for factor, array in zip(factors, arrays, strict=True)
        if factor
    ]
    return functools.reduce(jnp.add, terms)

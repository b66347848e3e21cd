"""Convolutions whose kernel gradient is fast on CPU, to be given to `flax.linen.Conv`.

XLA:CPU computes the gradient with respect to a kernel as a convolution whose window is as large as
the image, with images for channels. Whatever made its two inputs (BatchNorm, ReLU, the sum of a
shortcut) it computes anew while it transposes them, in the worst order for the caches, which took
longer than the convolution. Here both are transposed apart. The kernel gradient of a 1 x 1
convolution is a product for each image, then their sum: the one product over all pixels, which XLA
would run, takes up to 1.8 times as long. The gradient with respect to few channels (images),
or through a stride, is one product and a sum of its shifted parts, one for each tap: that takes a
quarter to nine tenths of XLA's time. Accelerators keep the gradients of `jax.lax`.

Only reverse mode differentiation is defined where the fast gradients are used.
"""

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from afr_jax.core import backend

_NHWC = ("NHWC", "HWIO", "NHWC")
# So few channels are those of images; with more taps a sum of them is no faster.
_FEW_CHANNELS, _FEW_TAPS = 4, 9
# Of images of fewer pixels the products of a 1 x 1 convolution's gradient are one.
_FEW_PIXELS = 256


def conv_fn(kernel: tuple[int, int]) -> Callable[..., jax.Array]:
    """What `flax.linen.Conv(conv_general_dilated=...)` should call for a kernel of that size.

    On CPU a convolution of 1 x 1 is a matrix product. On GPUs it stays a convolution: with products
    XLA of jaxlib 0.11 ended a ResNet-18's run in bfloat16.
    """
    is_product = kernel == (1, 1) and jax.default_backend() == "cpu"
    return pointwise if is_product else conv_general_dilated


def conv_general_dilated(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: jax.lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with a fast kernel gradient on CPU.

    Args:
        inputs: `[B, H, W, C]` float.
        kernel: `[R, S, C / groups, D]`.
        window_strides: (rows, columns).
        padding: "SAME", "VALID", or (before, after) for rows and for columns.
        lhs_dilation: as in `jax.lax`.
        rhs_dilation: as in `jax.lax`.
        dimension_numbers: as in `jax.lax`; by default those of the shapes above.
        feature_group_count: number of groups of channels.
        precision: as in `jax.lax`.

    Returns:
        `[B, H', W', D]`.
    """
    asked = _NHWC if dimension_numbers is None else dimension_numbers
    numbers = jax.lax.conv_dimension_numbers(inputs.shape, kernel.shape, asked)
    plain = jax.lax.conv_dimension_numbers(inputs.shape, kernel.shape, _NHWC)
    dilated = any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    is_known = numbers == plain and not dilated and feature_group_count == 1
    if jax.default_backend() != "cpu" or not is_known or precision is not None:
        return jax.lax.conv_general_dilated(
            inputs,
            kernel,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=asked,
            feature_group_count=feature_group_count,
            precision=precision,
        )
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(
            inputs.shape[1:3], kernel.shape[:2], strides, padding.upper()
        )
    padding = tuple((before, after) for before, after in padding)
    return _convolve(inputs, kernel, strides, padding)


def pointwise(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: object,
    **_: object,
) -> jax.Array:
    """A convolution of 1 x 1, without groups, dilation or padding, as a matrix product.

    On CPU XLA runs the product in as much time as the convolution or in half of it, by processor
    and compiler.

    Args:
        inputs: `[B, H, W, C]` float.
        kernel: `[1, 1, C, D]`.
        window_strides: (rows, columns).
        padding: not read.

    Returns:
        `[B, H', W', D]`.
    """
    del padding
    inputs = inputs[:, :: window_strides[0], :: window_strides[1]]
    return _mix_channels(inputs, kernel[0, 0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    return _plain(inputs, kernel, strides, padding)


def _plain(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, dimension_numbers=_NHWC)


def _forward(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(inputs, kernel, strides, padding), (inputs, kernel)


def _backward(
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    kept: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = kept
    is_slow = max(strides) > 1 or inputs.shape[-1] <= _FEW_CHANNELS
    if is_slow and kernel.shape[0] * kernel.shape[1] <= _FEW_TAPS:
        by_inputs = _sum_of_taps(gradient, kernel, inputs.shape[1:3], strides, padding)
    else:
        _, inputs_fn = jax.vjp(lambda x: _plain(x, kernel, strides, padding), inputs)
        (by_inputs,) = inputs_fn(gradient)
    by_kernel = _kernel_gradient(inputs, gradient, kernel.shape[:2], strides, padding)
    return by_inputs.astype(inputs.dtype), by_kernel.astype(kernel.dtype)


def _sum_of_taps(
    gradient: jax.Array,
    kernel: jax.Array,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """Gradient `[B, H, W, C]` with respect to inputs of (H, W) pixels."""
    rows, columns, channels, _ = kernel.shape
    flat = kernel.reshape(-1, kernel.shape[3])
    products = jax.lax.dot_general(gradient, flat, (((3,), (1,)), ((), ())))

    def placed(i: int, j: int) -> jax.Array:
        """The part of tap (i, j), where its window had it; outside is cut off."""
        first = (i * columns + j) * channels
        places = []
        for tap, (before, _), size, stride, steps in zip(
            (i, j), padding, sizes, strides, gradient.shape[1:3], strict=True
        ):
            start = tap - before
            places.append((start, size - start - (steps - 1) * stride - 1, stride - 1))
        part = products[..., first : first + channels]
        return jax.lax.pad(part, jnp.zeros((), part.dtype), [(0, 0, 0), *places, (0, 0, 0)])

    parts = [placed(i, j) for i in range(rows) for j in range(columns)]
    return functools.reduce(operator.add, parts)


def _kernel_gradient(
    inputs: jax.Array,
    gradient: jax.Array,
    taps: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """Gradient `[R, S, C, D]` for a kernel of R x S taps."""
    channels_first, images_last = backend.apart(
        lambda x, y: (x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3)), inputs, gradient
    )
    pads = []
    for axis in range(2):
        before, size = padding[axis][0], inputs.shape[1 + axis]
        reach = (gradient.shape[1 + axis] - 1) * strides[axis] + taps[axis]
        pads.append((before, reach - size - before))  # Negative: what no window has reached.
    found = jax.lax.conv_general_dilated(
        channels_first, images_last, (1, 1), pads, rhs_dilation=strides, dimension_numbers=_NHWC
    )
    return found.transpose(1, 2, 0, 3)


_convolve.defvjp(_forward, _backward)


@jax.custom_vjp
def _mix_channels(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[B, H, W, C]` times `[C, D]`."""
    return jax.lax.dot_general(inputs, kernel, (((3,), (0,)), ((), ())))


def _mix_forward(
    inputs: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _mix_channels(inputs, kernel), (inputs, kernel)


def _mix_backward(
    kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = kept
    if inputs.shape[1] * inputs.shape[2] < _FEW_PIXELS:
        by_kernel = jnp.einsum("bhwc,bhwd->cd", inputs, gradient)
    else:
        by_kernel = jnp.sum(jnp.einsum("bhwc,bhwd->bcd", inputs, gradient), axis=0)
    by_inputs = jax.lax.dot_general(gradient, kernel, (((3,), (1,)), ((), ())))
    return by_inputs, by_kernel.astype(kernel.dtype)


_mix_channels.defvjp(_mix_forward, _mix_backward)

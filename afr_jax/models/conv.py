"""Convolutions that are fast on CPU, gradients above all, to be given to `flax.linen.Conv`.

XLA:CPU computes the gradient with respect to a kernel as a convolution whose window is as large as
the image, with images for channels. Whatever made its two inputs (BatchNorm, ReLU, the sum of a
shortcut) it computes anew while it transposes them, in the worst order for the caches, which took
longer than the convolution. Here both are transposed apart. The kernel gradient of a 1 x 1
convolution is a product for each image, then their sum: the one product over all pixels, which XLA
would run, takes up to 1.8 times as long. The gradient with respect to few channels (images),
or through a stride, is one product and a sum of its shifted parts, one for each tap: that takes a
quarter to nine tenths of XLA's time. Where the taps are many, it is a convolution to the channels
of all pixels of a block. Accelerators keep the gradients of `jax.lax`.

The gradient with respect to images is a convolution with the kernel turned, which XLA turns anew
each time, slowly: where kernels stay as they are (`turn_kernels`) that is done once.

The convolution itself goes block by block where channels are few, as in images (`in_blocks`), and
where there is much to multiply with fewer multiplications (`winograd`).

Only reverse mode differentiation is defined where the fast gradients are used.
"""

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict

from afr_jax.core import backend
from afr_jax.models import winograd

_NHWC = ("NHWC", "HWIO", "NHWC")
# So few channels are those of images; with more taps a sum of them is no faster.
_FEW_CHANNELS, _FEW_TAPS = 4, 9
# With so few channels read and made, columns go in pairs; an image has so many pixels a side.
_SOME_CHANNELS, _SMALLEST = 16, 8
# Side of the blocks in pixels, where there are more taps.
_BLOCK = 4
# Of images of fewer pixels the products of a 1 x 1 convolution's gradient are one.
_FEW_PIXELS = 256


# Collection of the turned kernels.
_TURNED = "turned"


class Convolution(nn.Module):
    """What `flax.linen.Conv(conv_general_dilated_cls=...)` should be."""

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        kernel: jax.Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        **options: Any,
    ) -> jax.Array:
        """See `conv_general_dilated`; takes turned kernels where the variables have them."""
        turned = None
        if self.has_variable(_TURNED, "kernel"):
            turned = self.get_variable(_TURNED, "kernel").astype(kernel.dtype)
        return conv_general_dilated(
            inputs, kernel, window_strides, padding, turned=turned, **options
        )


def turn_kernels(variables: Sequence[VariableDict]) -> tuple[VariableDict, ...]:
    """Variables of networks whose kernels stay as they are, for gradients of images.

    Args:
        variables: of some modules whose convolutions are `Convolution`.

    Returns:
        On CPU the same with another collection; results are the same, and the gradient with respect
        to kernels is still right. Elsewhere the variables as they are.
    """
    if jax.default_backend() != "cpu":
        return tuple(variables)
    turned = _turn_all([each["params"] for each in variables])
    return tuple({**each, _TURNED: own} for each, own in zip(variables, turned, strict=True))


@jax.jit
def _turn_all(networks: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The kernels of some networks, by one program."""
    return [_turned_kernels(params) for params in networks]


def _turned_kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels of a module and of those in it, but for 1 x 1, by the module that reads them."""
    found = {}
    for name, each in params.items():
        if isinstance(each, Mapping):
            inner = _turned_kernels(each)
            found |= {name: inner} if inner else {}
        elif name == "kernel" and each.ndim == 4 and each.shape[:2] != (1, 1):
            found[f"{Convolution.__name__}_0"] = {"kernel": _turn(each)}
    return found


def _turn(kernel: jax.Array) -> jax.Array:
    """`[R, S, C, D]` to `[R, S, D, C]`, with its taps in reverse."""
    return jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)


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
    turned: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with fast gradients on CPU.

    There a convolution of 1 x 1 is a matrix product. On GPUs it stays a convolution: with products
    XLA of jaxlib 0.11 ended a ResNet-18's run in bfloat16.

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
        turned: the kernel `[R, S, D, C]` as `turn_kernels` has it; None turns it when it is needed.

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
    taps, pads = [], []
    for axis, axis_padding in enumerate(padding):
        used, left = _used_taps(
            kernel.shape[axis], inputs.shape[1 + axis], strides[axis], axis_padding
        )
        taps.append(used)
        pads.append(left)
    cut = kernel[taps[0], taps[1]]
    if cut.shape != kernel.shape:
        turned = None
    if cut.shape[:2] == (1, 1) and not any(map(any, pads)):
        return pointwise(inputs, cut, strides)
    return _convolve(inputs, cut, turned, strides, tuple(pads))


def _used_taps(
    taps: int, size: int, stride: int, padding: tuple[int, int]
) -> tuple[slice, tuple[int, int]]:
    """Which taps along an axis see more than padding, and the padding of these alone.

    On a single pixel a window of three has one; XLA multiplies by the others all the same, and
    takes the pixel for the window.
    """
    before, after = padding
    count = (size + before + after - taps) // stride + 1
    seen = [
        tap
        for tap in range(taps)
        if any(0 <= tap - before + stride * place < size for place in range(count))
    ]
    if not seen:
        return slice(taps), (before, after)
    first, last = seen[0], seen[-1]
    return slice(first, last + 1), (before - first, after - (taps - 1 - last))


def pointwise(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
) -> jax.Array:
    """A convolution of 1 x 1, without groups, dilation or padding, as a matrix product.

    On CPU XLA runs the product in as much time as the convolution or in half of it, by processor
    and compiler.

    Args:
        inputs: `[B, H, W, C]` float.
        kernel: `[1, 1, C, D]`.
        window_strides: (rows, columns).

    Returns:
        `[B, H', W', D]`.
    """
    inputs = inputs[:, :: window_strides[0], :: window_strides[1]]
    return _mix_channels(inputs, kernel[0, 0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    turned: jax.Array | None,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    del turned
    return _forward_conv(inputs, kernel, strides, padding)


def fast_forward(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` that is fast at few channels on CPU, with JAX's own gradients.

    For `flax.linen.Conv(conv_general_dilated=...)` of small networks, of which some programs run
    side by side: an epoch of patches against R- and O-Net was no faster by the gradients of
    `Convolution`.

    Args:
        inputs: `[B, H, W, C]` float.
        kernel: `[R, S, C, D]`.
        window_strides: (rows, columns).
        padding: "VALID" for the fast way, or as in `jax.lax`.
        **options: as in `jax.lax`, those that `flax.linen.Conv` has by default.

    Returns:
        `[B, H', W', D]`.
    """
    if jax.default_backend() == "cpu" and padding == "VALID":
        strides = tuple(window_strides)
        return _forward_conv(inputs, kernel, strides, ((0, 0), (0, 0)), is_on_one_core=True)
    return jax.lax.conv_general_dilated(inputs, kernel, window_strides, padding, **options)


def in_blocks(
    images: jax.Array,
    kernel: jax.Array,
    block: tuple[int, int],
    *,
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
    is_on_one_core: bool = False,
) -> jax.Array:
    """A convolution with stride 1, all pixels of a block at once.

    XLA:CPU takes the longer for a multiplication, the fewer the channels. Here those of all pixels
    of a block are the channels of one place, read and made; taps that a pixel lacks are zero.

    Args:
        images: `[B, H, W, C]` float.
        kernel: `[R, S, C, D]`.
        block: rows and columns of a block, (r, s).
        padding: (before, after) for rows and for columns, not negative.
        is_on_one_core: as of `winograd.saves`. Then blocks go with fewer multiplications, too; on
            two cores they take as long or longer.

    Returns:
        `[B, h, w, r, s, D]`: h x w blocks hold the convolution's H' x W' pixels; what is beyond
        these is meaningless.
    """
    pads, counts, seen = [], [], []
    for size, taps, side, (before, after) in zip(
        images.shape[1:3], kernel.shape[:2], block, padding, strict=True
    ):
        count, reach = -(-(size + before + after - taps + 1) // side), -(-(side + taps - 1) // side)
        pads.append((before, (count + reach - 1) * side - before - size, 0))
        counts.append(count)
        seen.append(reach)
    rows, columns = block
    channels, features = kernel.shape[2:]
    if any(map(any, pads)):
        images = jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    shape = (-1, images.shape[1] // rows, rows, images.shape[2] // columns, columns, channels)
    images = images.reshape(shape).transpose(0, 1, 3, 2, 4, 5)
    images = images.reshape(*images.shape[:3], rows * columns * channels)
    places = (seen[0] * rows, seen[1] * columns, channels, rows, columns, features)
    taps = jnp.zeros(places, kernel.dtype)
    for i, j in itertools.product(range(rows), range(columns)):
        taps = taps.at[i : i + kernel.shape[0], j : j + kernel.shape[1], :, i, j].set(kernel)
    taps = taps.reshape(seen[0], rows, seen[1], columns, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    taps = taps.reshape(*seen, rows * columns * channels, -1)
    none = (0, 0), (0, 0)
    saves = _has_fewer_products(images, taps.shape, (1, 1), none, is_on_one_core=is_on_one_core)
    if is_on_one_core and saves:
        found = winograd.convolve(images, taps, none)
    else:
        found = _plain(images, taps, (1, 1), none)
    return found.reshape(-1, *counts, rows, columns, features)


def _forward_conv(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    *,
    is_on_one_core: bool = False,
) -> jax.Array:
    """A convolution, in blocks or with fewer multiplications where that is faster."""
    shape = kernel.shape
    if _has_fewer_products(inputs, shape, strides, padding, is_on_one_core=is_on_one_core):
        return winograd.convolve(inputs, kernel, padding)
    sizes = _sizes(inputs.shape, kernel.shape, padding)
    channels, features = kernel.shape[2:]
    if channels <= _FEW_CHANNELS:
        block = 2, 2
    elif max(channels, features) <= _SOME_CHANNELS:
        block = 1, 2
    else:
        block = 1, 1
    is_small = min(sizes) < _SMALLEST or kernel.shape[:2] != (3, 3)
    if block == (1, 1) or is_small or not _is_simple(strides, padding):
        return _plain(inputs, kernel, strides, padding)
    found = in_blocks(inputs, kernel, block, padding=padding, is_on_one_core=is_on_one_core)
    found = found.transpose(0, 1, 3, 2, 4, 5)
    height, width = (found.shape[axis] * found.shape[axis + 1] for axis in (1, 3))
    return found.reshape(-1, height, width, features)[:, : sizes[0], : sizes[1]]


def _sizes(
    images: tuple[int, ...], kernel: tuple[int, ...], padding: Sequence[tuple[int, int]]
) -> list[int]:
    """Rows and columns that a convolution with stride 1 makes."""
    return [
        size + sum(pads) - taps + 1
        for size, pads, taps in zip(images[1:3], padding, kernel[:2], strict=True)
    ]


def _is_simple(strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> bool:
    return max(strides) == 1 and min(map(min, padding)) >= 0


def _has_fewer_products(
    images: jax.Array,
    kernel: tuple[int, ...],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    is_on_one_core: bool = False,
) -> bool:
    """Whether a convolution is faster by `winograd`."""
    sizes = _sizes(images.shape, kernel, padding)
    saves = winograd.saves(kernel, len(images), sizes, is_on_one_core=is_on_one_core)
    return saves and images.dtype == jnp.float32 and _is_simple(strides, padding)


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
    turned: jax.Array | None,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    return _forward_conv(inputs, kernel, strides, padding), (inputs, kernel, turned)


@functools.partial(jax.jit, static_argnums=(0, 1))  # Traced once for all layers of one shape.
def _backward(
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    kept: tuple[jax.Array, jax.Array, jax.Array | None],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    inputs, kernel, turned = kept
    is_few = inputs.shape[-1] <= _FEW_CHANNELS
    pads = [
        (taps - 1 - before, taps - 1 - after)
        for taps, (before, after) in zip(kernel.shape[:2], padding, strict=True)
    ]
    if (is_few or max(strides) > 1) and kernel.shape[0] * kernel.shape[1] <= _FEW_TAPS:
        by_inputs = _sum_of_taps(gradient, kernel, inputs.shape[1:3], strides, padding)
    elif is_few and not any(_BLOCK % stride for stride in strides):
        by_inputs = _by_blocks(gradient, kernel, inputs.shape[1:3], strides, padding)
    elif max(strides) == 1 and (
        turned is not None
        or min(map(min, pads)) < 0
        or _has_fewer_products(gradient, (*kernel.shape[:2], *kernel.shape[:1:-1]), strides, pads)
    ):
        cut, pads = _cut(gradient, pads)
        by_inputs = _forward_conv(cut, _turn(kernel) if turned is None else turned, strides, pads)
    else:
        _, inputs_fn = jax.vjp(lambda x: _plain(x, kernel, strides, padding), inputs)
        (by_inputs,) = inputs_fn(gradient)
    by_kernel = _kernel_gradient(inputs, gradient, kernel.shape[:2], strides, padding)
    # Kernels that were turned once do not move.
    by_turned = None if turned is None else jnp.zeros_like(turned)
    return by_inputs.astype(inputs.dtype), by_kernel.astype(kernel.dtype), by_turned


def _cut(
    images: jax.Array, pads: Sequence[tuple[int, int]]
) -> tuple[jax.Array, tuple[tuple[int, int], ...]]:
    """Images without what negative pads take off their sides, and the pads that are left.

    XLA:CPU reads beyond an array whose convolution has a negative pad before and a positive one
    behind.
    """
    off = [(0, 0, 0), *((min(low, 0), min(high, 0), 0) for low, high in pads), (0, 0, 0)]
    left = tuple((max(low, 0), max(high, 0)) for low, high in pads)
    if any(map(any, off)):
        images = jax.lax.pad(images, jnp.zeros((), images.dtype), off)
    return images, left


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


def _by_blocks(
    gradient: jax.Array,
    kernel: jax.Array,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """Gradient `[B, H, W, C]` with respect to inputs of (H, W) pixels, block by block.

    One convolution of the outputs' gradient has all pixels of a block for channels; taps that a
    pixel lacks are zero.
    """
    channels, features = kernel.shape[2:]
    taps, steps, pads, counts, offsets = [], [], [], [], []
    for number, stride, (before, _), size, outputs in zip(
        kernel.shape[:2], strides, padding, sizes, gradient.shape[1:3], strict=True
    ):
        step, reach = _BLOCK // stride, -(-number // stride) - 1
        # The tap through which pixel j of a block sees output i of those that the block sees.
        places = np.arange(_BLOCK) - stride * (np.arange(reach + step)[:, None] - reach)
        taps.append(np.where((places >= 0) & (places < number), places, number))
        first, offset = divmod(before, _BLOCK)
        count = -(-(size + offset) // _BLOCK)
        pads.append((reach - step * first, step * (first + count) - outputs))
        steps.append(step)
        counts.append(count)
        offsets.append(offset)
    # Zeros for the taps that there are not.
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    blocks = kernel[taps[0]][:, :, taps[1]].transpose(0, 2, 5, 1, 3, 4)
    blocks = blocks.reshape(*blocks.shape[:2], features, _BLOCK * _BLOCK * channels)
    cut, pads = _cut(gradient, pads)
    found = _plain(cut, blocks, tuple(steps), pads)
    found = found.reshape(-1, *counts, _BLOCK, _BLOCK, channels).transpose(0, 1, 3, 2, 4, 5)
    found = found.reshape(-1, counts[0] * _BLOCK, counts[1] * _BLOCK, channels)
    rows, columns = (slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))
    return found[:, rows, columns]


def _kernel_gradient(
    inputs: jax.Array,
    gradient: jax.Array,
    taps: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> jax.Array:
    """Gradient `[R, S, C, D]` for a kernel of R x S taps."""
    shape = *taps, inputs.shape[-1], gradient.shape[-1]
    is_float = inputs.dtype == gradient.dtype == jnp.float32
    saves = winograd.saves_for_kernel(shape, len(inputs), gradient.shape[1:3])
    if saves and is_float and _is_simple(strides, padding):
        return winograd.kernel_gradient(inputs, gradient, padding)
    channels_first, images_last = backend.apart(
        lambda x, y: (x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3)), inputs, gradient
    )
    pads = []
    for axis in range(2):
        before, size = padding[axis][0], inputs.shape[1 + axis]
        reach = (gradient.shape[1 + axis] - 1) * strides[axis] + taps[axis]
        pads.append((before, reach - size - before))  # Negative: what no window has reached.
    channels_first, pads = _cut(channels_first, pads)
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

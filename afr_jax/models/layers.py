"""Layers that several networks share and that Flax lacks or runs slowly on CPU."""

import functools
import operator
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.core import backend
from afr_jax.models import conv, norm


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Max pooling without padding, as the maximum of strided slices, rows then columns.

    Same values as `flax.linen.max_pool(..., padding="VALID")`; its gradient on CPU runs about five
    times faster, since no select-and-scatter is needed. Ties share the gradient.

    Args:
        x: `[B, H, W, C]` float.
        window: side of the square window.
        stride: step in both axes.

    Returns:
        `[B, (H - window) // stride + 1, (W - window) // stride + 1, C]`.
    """
    rows = (x.shape[1] - window) // stride * stride + 1
    columns = (x.shape[2] - window) // stride * stride + 1
    x = functools.reduce(jnp.maximum, [x[:, i : i + rows : stride] for i in range(window)])
    return functools.reduce(jnp.maximum, [x[:, :, i : i + columns : stride] for i in range(window)])


def pad_for_pool(x: jax.Array, window: int, stride: int, low: float) -> jax.Array:
    """Pads `[B, H, W, C]` with `low` so that VALID pooling gives TensorFlow's SAME result."""
    extra = []
    for size in x.shape[1:3]:
        out = -(-size // stride)
        extra.append(max((out - 1) * stride + window - size, 0))
    pads = [(0, 0)] + [(e // 2, e - e // 2) for e in extra] + [(0, 0)]
    return jnp.pad(x, pads, constant_values=low)


def depthwise_conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """Convolution of each channel by itself, as a sum of shifted products that fuse into one pass.

    XLA runs a grouped convolution on CPU 15 to 25 times slower forward, and 2 to 60 times slower
    backward. Its gradients are those of the sum, with all taps of the kernel's in one reduction.

    Args:
        x: `[B, H, W, C]` float.
        kernel: `[K, L, 1, C]`.
        stride: step in both axes.
        padding: zeros on all four sides.

    Returns:
        `[B, (H + 2 padding - K) // stride + 1, (W + 2 padding - L) // stride + 1, C]`.
    """
    kernel = kernel.astype(x.dtype)
    if tuple(size + 2 * padding for size in x.shape[1:3]) == kernel.shape[:2]:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        return jnp.einsum("bhwc,hwc->bc", x, kernel[:, :, 0])[:, None, None]
    return _depthwise(x, kernel, stride, padding)


@functools.partial(jax.jit, static_argnums=(2, 3))  # Traced once for all layers of one shape.
def _sum_of_taps(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        taps = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
        pieces = _shifted(x, kernel.shape[:2], stride, padding)
        return functools.reduce(operator.add, map(operator.mul, pieces, taps))

    # Else XLA would work the sum out anew for each of the K * L taps of the gradient.
    return backend.apart(shifted, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return _sum_of_taps(x, kernel, stride, padding)


def _depthwise_forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum_of_taps(x, kernel, stride, padding), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _depthwise_backward(
    stride: int, padding: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    gradients = gradient.astype(jnp.float32)
    pieces = _shifted(x.astype(jnp.float32), kernel.shape[:2], stride, padding)
    by_taps = backend.sums(*(piece * gradients for piece in pieces))
    by_kernel = jnp.stack(by_taps).reshape(kernel.shape).astype(kernel.dtype)
    # The gradient of the input is such a sum as well, of the gradient with gaps between its pixels.
    low = [taps - 1 - padding for taps in kernel.shape[:2]]
    high = [
        size + taps - 1 - before - (stride * (out - 1) + 1)
        for size, taps, before, out in zip(
            x.shape[1:3], kernel.shape[:2], low, gradient.shape[1:3], strict=True
        )
    ]
    gaps = [(before, after, stride - 1) for before, after in zip(low, high, strict=True)]
    wide = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])
    return _sum_of_taps(wide, kernel[::-1, ::-1], 1, 0), by_kernel


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _shifted(
    x: jax.Array, window: tuple[int, ...], stride: int, padding: int
) -> Iterator[jax.Array]:
    """Yields what each tap of a window sees of `[B, H, W, C]`, row by row."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = (
        (size - taps) // stride * stride + 1
        for size, taps in zip(x.shape[1:3], window, strict=True)
    )
    for i in range(window[0]):
        for j in range(window[1]):
            yield x[:, i : i + rows : stride, j : j + columns : stride]


class PReLU(nn.Module):
    """Parametric ReLU with one slope a channel (the last axis)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`max(x, 0) + slope * min(x, 0)`, any shape `[..., C]`."""
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        slope = slope.astype(x.dtype).reshape((1,) * (x.ndim - 1) + slope.shape)
        return jnp.maximum(x, 0) + slope * jnp.minimum(x, 0)


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm and an activation.

    Parameters are float32; `dtype` is that of the computation.

    Attributes:
        features: output channels.
        kernel: rows and columns of the kernel.
        stride: step in both axes.
        padding: "VALID", "SAME", or zeros on all four sides.
        activation: "relu", "prelu" or "none".
        depthwise: every channel by itself; `padding` is then a number.
        epsilon: added to the variance.
        momentum: share of the old statistics that a training step keeps.
        dtype: of the computation; None follows the input.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str | int = "VALID"
    activation: str = "relu"
    depthwise: bool = False
    epsilon: float = 1e-3
    momentum: float = 0.99
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """`[B, H, W, C]` to `[B, H', W', features]`; `train` normalizes by the batch."""
        if self.depthwise:
            x = x if self.dtype is None else x.astype(self.dtype)
            if isinstance(self.padding, str):
                raise ValueError(f"padding is {self.padding!r}, must be a number with depthwise")
            kernel = _DepthwiseKernel(self.kernel, name="conv")(x.shape[-1])
            x = depthwise_conv(x, kernel, stride=self.stride, padding=self.padding)
        else:
            x = nn.Conv(
                self.features,
                self.kernel,
                self.stride,
                padding=self.padding,
                use_bias=False,
                dtype=self.dtype,
                conv_general_dilated_cls=conv.Convolution,
                name="conv",
            )(x)
        x = norm.BatchNorm(
            use_running_average=not train,
            epsilon=self.epsilon,
            momentum=self.momentum,
            dtype=self.dtype,
            name="norm",
        )(x)
        if self.activation == "prelu":
            return PReLU(name="activation")(x)
        return nn.relu(x) if self.activation == "relu" else x


class _DepthwiseKernel(nn.Module):
    """Parameter of a depthwise convolution, `[K, L, 1, C]`."""

    kernel: tuple[int, int]

    @nn.compact
    def __call__(self, channels: int) -> jax.Array:
        shape = (*self.kernel, 1, channels)
        return self.param("kernel", nn.initializers.lecun_normal(), shape)

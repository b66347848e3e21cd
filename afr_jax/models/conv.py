"""Convolution whose kernel gradient is fast on CPU, to be given to `flax.linen.Conv`.

XLA:CPU computes the gradient with respect to a kernel as a convolution with a window of the size of
the image, which it runs two to five times slower than the forward pass. Here it is one matrix
product for each of the kernel's taps, over shifted slices of the input: the same sums in another
order. Accelerators keep the gradient of `jax.lax`.

Only reverse mode differentiation is defined where the fast gradient is used.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_NHWC = ("NHWC", "HWIO", "NHWC")


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

    Use: `nn.Conv(..., conv_general_dilated=conv.conv_general_dilated)`.

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
    depthwise = feature_group_count == inputs.shape[-1] == kernel.shape[-1]
    is_known = numbers == plain and not dilated and (feature_group_count == 1 or depthwise)
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
    return _convolve(inputs, kernel, strides, padding, feature_group_count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    groups: int,
) -> jax.Array:
    return _plain(inputs, kernel, strides, padding, groups)


def _plain(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    groups: int,
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        inputs, kernel, strides, padding, dimension_numbers=_NHWC, feature_group_count=groups
    )


def _forward(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    groups: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(inputs, kernel, strides, padding, groups), (inputs, kernel)


def _backward(
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    groups: int,
    kept: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = kept
    _, inputs_fn = jax.vjp(lambda x: _plain(x, kernel, strides, padding, groups), inputs)
    return *inputs_fn(gradient), _kernel_gradient(
        inputs, gradient, kernel, strides, padding, groups
    )


def _kernel_gradient(
    inputs: jax.Array,
    gradient: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    groups: int,
) -> jax.Array:
    """Gradient `[R, S, C / groups, D]`: for each tap the product of its slice with `gradient`."""
    # The barrier keeps XLA from computing what leads to these two anew for every tap.
    padded, gradient = jax.lax.optimization_barrier(
        (jnp.pad(inputs, ((0, 0), *padding, (0, 0))), gradient)
    )
    rows, columns = ((n - 1) * s + 1 for n, s in zip(gradient.shape[1:3], strides, strict=True))
    flat = gradient.reshape(-1, gradient.shape[-1])
    taps = []
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            tap = padded[:, i : i + rows : strides[0], j : j + columns : strides[1]]
            tap = tap.reshape(-1, tap.shape[-1])
            if groups == 1:
                taps.append(
                    jax.lax.dot_general(
                        tap,
                        flat,
                        (((0,), (0,)), ((), ())),
                        preferred_element_type=jnp.float32,
                    )
                )
            else:
                product = tap.astype(jnp.float32) * flat.astype(jnp.float32)
                taps.append(jnp.sum(product, axis=0)[None])
    return jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)

"""BatchNorm as `flax.linen` has it, whose sums are fast on CPU.

A training step needs four sums over the pixels for each BatchNorm. XLA:CPU runs a sum over all axes
but the last as a tree of windows, for 64 channels twenty times slower than it reads the numbers;
two sums in one reduction it runs as fast as it reads. So the batch's moments are one reduction, and
the gradient, written out after Ioffe and Szegedy 2015 ("Batch Normalization", section 3), is
another one.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.core import backend


class BatchNorm(nn.Module):
    """Normalizes each channel (the last axis) by the batch's statistics or by the running ones.

    Parameters ("scale", "bias"), statistics ("mean", "var" in "batch_stats") and values are those
    of `flax.linen.BatchNorm`; all are float32. Only reverse mode differentiation is defined, and
    none of the running statistics.

    Attributes:
        use_running_average: normalize by the running statistics; else by the batch's, which then
            move them where "batch_stats" is mutable.
        momentum: share of the old statistics that a step keeps.
        epsilon: added to the variance.
        dtype: of the result; None is that of the input with the parameters.
        use_scale: whether there is a scale.
    """

    use_running_average: bool
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: jax.typing.DTypeLike | None = None
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` float, normalized."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape) if self.use_scale else None
        bias = self.param("bias", nn.initializers.zeros, shape)
        dtype = jnp.result_type(x.dtype, bias.dtype) if self.dtype is None else self.dtype
        factor = jnp.ones(shape) if scale is None else scale
        if self.use_running_average:
            rate = jax.lax.rsqrt(var.value + self.epsilon) * factor
            y = (x - _along(mean.value, x)) * _along(rate, x) + _along(bias, x)
            return y.astype(dtype)
        y, *moments = _normalize(x, factor, bias, self.epsilon, jnp.dtype(dtype).name)
        if not self.is_initializing():
            for kept, moment in zip((mean, var), moments, strict=True):
                moved = self.momentum * kept.value + (1 - self.momentum) * moment
                kept.value = jax.lax.stop_gradient(moved)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[..., C]` by its own moments, and these: mean and variance `[C]`, without gradients."""
    return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: str
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    values = x.astype(jnp.float32)
    count = x.size // x.shape[-1]
    mean, square = (total / count for total in backend.sums(values, values * values))
    var = jnp.maximum(square - mean * mean, 0.0)
    rate = jax.lax.rsqrt(var + epsilon)
    y = (values - _along(mean, x)) * _along(rate * scale, x) + _along(bias, x)
    return (y.astype(dtype), mean, var), (x, scale, mean, rate)


def _backward(
    epsilon: float,
    dtype: str,
    kept: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del epsilon, dtype
    x, scale, mean, rate = kept
    gradient = gradients[0].astype(jnp.float32)
    normal = (x.astype(jnp.float32) - _along(mean, x)) * _along(rate, x)
    by_bias, by_scale = backend.sums(gradient, gradient * normal)
    count = x.size // x.shape[-1]
    mean_part = _along(by_bias / count, x) + normal * _along(by_scale / count, x)
    by_x = _along(scale * rate, x) * (gradient - mean_part)
    return by_x.astype(x.dtype), by_scale, by_bias


_normalize.defvjp(_forward, _backward)


def _along(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values of the channels `[C]`, to be combined with `[..., C]`."""
    return values.reshape((1,) * (x.ndim - 1) + values.shape)

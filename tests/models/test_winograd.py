"""Winograd's minimal filtering: against arithmetic in NumPy float64 and JAX's own convolution."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.models import conv, winograd


def float64_convolution(images, kernel, padding):
    images, kernel = (np.asarray(array, np.float64) for array in (images, kernel))
    images = np.pad(images, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        size - taps + 1 for size, taps in zip(images.shape[1:3], kernel.shape[:2], strict=True)
    )
    return sum(
        images[:, i : i + rows, j : j + columns] @ kernel[i, j]
        for i, j in itertools.product(*map(range, kernel.shape[:2]))
    )


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_transforms_filter_three_taps(step):
    of_inputs, of_taps, of_outputs = (each.astype(float) for each in winograd.transforms(step))
    inputs, taps = np.random.default_rng(0).normal(size=step + 2), np.array([0.5, -1.0, 2.0])
    found = of_outputs @ ((of_taps @ taps) * (of_inputs @ inputs))
    np.testing.assert_allclose(found, np.correlate(inputs, taps), rtol=1e-6, atol=1e-6)


def test_transforms_are_those_of_lavin_and_gray():
    """Their F(4, 3), of which only signs and the order of points may differ."""
    of_inputs, _, of_outputs = winograd.transforms(4)
    expected = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
    expected += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
    np.testing.assert_array_equal(of_inputs, expected)
    expected = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    np.testing.assert_array_equal(of_outputs, expected)


@pytest.mark.parametrize(
    "shape, columns, padding",
    [
        ((2, 9, 7, 16), 3, ((1, 1), (1, 1))),
        ((1, 8, 5, 32), 1, ((0, 0), (0, 0))),
        ((3, 5, 8, 16), 2, ((2, 1), (0, 2))),
        ((1, 3, 3, 4), 3, ((0, 0), (0, 0))),
    ],
)
def test_convolution_is_that_of_float64(shape, columns, padding):
    images, kernel = normal(0, *shape), normal(1, 3, columns, shape[-1], 32)
    expected = float64_convolution(images, kernel, padding)
    found = jax.jit(lambda x, k: winograd.convolve(x, k, padding))(images, kernel)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * expected.std())
    gradient = normal(2, *expected.shape)
    found = jax.jit(lambda x, y: winograd.kernel_gradient(x, y, padding))(images, gradient)
    assert found.shape == kernel.shape
    # A kernel's gradient is what it has to be multiplied by to give that of the outputs.
    along = np.sum(np.asarray(found, float) * np.asarray(kernel, float))
    whole = np.sum(expected * np.asarray(gradient, float))
    np.testing.assert_allclose(along, whole, rtol=0, atol=1e-4 * np.linalg.norm(expected))
    _, vjp_fn = jax.vjp(
        lambda k: jax.lax.conv_general_dilated(
            images, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        kernel,
    )
    (wanted,) = vjp_fn(gradient)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * float(wanted.std()))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends keep JAX's")
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_layers_with_much_to_multiply_take_it(padding, monkeypatch):
    calls = []

    def counted(name):
        fn = getattr(winograd, name)
        return lambda *args, **options: calls.append(name) or fn(*args, **options)

    for name in ("convolve", "kernel_gradient"):
        monkeypatch.setattr(winograd, name, counted(name))
    images = normal(0, 8, 19, 19, 64)
    fast = nn.Conv(64, (3, 3), padding=padding, conv_general_dilated_cls=conv.Convolution)
    plain = nn.Conv(64, (3, 3), padding=padding)
    variables = fast.init(jax.random.key(1), images)
    calls.clear()

    def gradients(net):
        def loss_fn(variables, images):
            return jnp.sum(jnp.sin(net.apply(variables, images)))

        return jax.jit(jax.grad(loss_fn, (0, 1)))(variables, images)

    found, expected = gradients(fast), gradients(plain)
    assert sorted(calls) == ["convolve", "convolve", "kernel_gradient"]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * float(other.std()))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends keep JAX's")
def test_blocks_of_few_channels_with_much_to_multiply_take_it(monkeypatch):
    """P-Net's second layer, of four tiles: pairs of columns have channels enough."""
    calls, convolve = [], winograd.convolve
    monkeypatch.setattr(
        winograd, "convolve", lambda *some: calls.append(some[1].shape) or convolve(*some)
    )
    images, kernel = normal(0, 4, 63, 64, 10), normal(1, 3, 3, 10, 16)
    found = conv.fast_forward(images, kernel, (1, 1), "VALID")
    assert calls == [(3, 2, 20, 32)]
    expected = float64_convolution(images, kernel, ((0, 0), (0, 0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())


def test_little_to_multiply_and_other_types_are_left_to_jax():
    kernel = (3, 3, 64, 64)
    assert winograd.saves(kernel, 8, (17, 17)) and not winograd.saves(kernel, 1, (8, 8))
    assert winograd.saves(kernel, 8, (12, 12), is_on_one_core=True)
    assert not winograd.saves(kernel, 8, (12, 12))
    for other in ((1, 3, 64, 64), (3, 3, 8, 64), (3, 3, 16, 16), (5, 5, 64, 64)):
        assert not winograd.saves(other, 512, (64, 64))
    images = jnp.zeros((8, 17, 17, 64), jnp.bfloat16)
    kernel = jnp.zeros(kernel, jnp.bfloat16)
    text = str(
        jax.make_jaxpr(conv.conv_general_dilated, static_argnums=(2, 3))(
            images, kernel, (1, 1), "SAME"
        )
    )
    assert text.count("conv_general_dilated[") == 1

"""ResNets against a NumPy float64 forward pass and known sizes; the convolution's own gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.models import conv
from afr_jax.models.classifiers import resnet


def _num_parameters(module, side):
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
    "module, side, count",
    [
        # torchvision 0.x: resnet18 and resnet50 have these numbers of parameters.
        (resnet.resnet18(num_classes=1000, stem="imagenet"), 64, 11_689_512),
        (resnet.resnet50(num_classes=1000, stem="imagenet"), 64, 25_557_032),
        # The CIFAR ResNets that the literature uses with 10 classes.
        (resnet.resnet18(num_classes=10), 32, 11_173_962),
        (resnet.resnet50(num_classes=10), 32, 23_520_842),
    ],
)
def test_numbers_of_parameters_are_those_of_the_literature(module, side, count):
    assert _num_parameters(module, side) == count


def _numpy_conv(x, kernel, stride):
    pad = kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcrs,rscd->bhwd", windows[:, ::stride, ::stride], kernel)


def _numpy_norm(x, params, stats, train):
    mean = x.mean(axis=(0, 1, 2)) if train else stats["mean"]
    variance = x.var(axis=(0, 1, 2)) if train else stats["var"]
    return (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def _numpy_resnet(module, variables, x, train):
    """The network as He et al. draw it, in float64."""
    params, stats = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables[name])
        for name in ("params", "batch_stats")
    )
    x = _numpy_conv(x, params["stem_conv"]["kernel"], 1 if module.stem == "cifar" else 2)
    x = np.maximum(_numpy_norm(x, params["stem_norm"], stats["stem_norm"], train), 0)
    if module.stem == "imagenet":
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        x = windows[:, ::2, ::2].max(axis=(-1, -2))
    for stage, num_blocks in enumerate(module.num_blocks):
        for block in range(num_blocks):
            name = f"stage_{stage}_block_{block}"
            stride = 2 if stage and not block else 1
            strides = (1, stride, 1) if module.bottleneck else (stride, 1)
            y = x
            for i, step in enumerate(strides):
                y = _numpy_conv(y, params[name][f"conv_{i}"]["kernel"], step)
                y = _numpy_norm(y, params[name][f"norm_{i}"], stats[name][f"norm_{i}"], train)
                y = np.maximum(y, 0) if i + 1 < len(strides) else y
            if "shortcut_conv" in params[name]:
                x = _numpy_conv(x, params[name]["shortcut_conv"]["kernel"], stride)
                x = _numpy_norm(
                    x, params[name]["shortcut_norm"], stats[name]["shortcut_norm"], train
                )
            x = np.maximum(x + y, 0)
    x = x.mean(axis=(1, 2))
    if module.num_classes is None:
        return x
    return x @ params["logits"]["kernel"] + params["logits"]["bias"]


def _random_variables(module, images):
    """Variables with statistics and scales that are not 0 and 1; no initializer is compiled."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    generator = np.random.default_rng(0)

    def values(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            array = generator.normal(size=leaf.shape) * np.sqrt(2 / fan_in)
        else:
            low = 0.5 if name in ("scale", "var") else -0.2
            array = generator.uniform(low, low + 1, leaf.shape)
        return jnp.asarray(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(values, shapes)


@pytest.mark.parametrize(
    "module, train",
    [
        (resnet.ResNet((1, 1), False, 4, "cifar", 5), True),
        (resnet.ResNet((1, 1), True, 2, "imagenet", None), False),
    ],
)
def test_forward_pass_against_numpy(module, train):
    images = jax.random.uniform(jax.random.key(2), (3, 13, 16, 3))
    variables = _random_variables(module, images)
    outputs = jax.jit(lambda v, x: module.apply(v, x, train=train, mutable=["batch_stats"])[0])(
        variables, images
    )
    expected = _numpy_resnet(module, variables, np.asarray(images, np.float64), train)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs, expected, rtol=2e-4, atol=2e-4)


def test_training_moves_the_running_statistics_and_bf16_stays_near():
    module = resnet.FaceResNet(resnet.ResNet((1,), width=4), embedding_size=6)
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
    variables = _random_variables(module, images)
    variables["params"]["embedding_norm"]["bias"] *= 0
    outputs, moved = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    # The last BatchNorm has no scale: unit variance over the batch (up to epsilon).
    np.testing.assert_allclose(np.mean(outputs, axis=0), 0, atol=1e-5)
    assert outputs.shape == (4, 6)
    before, after = (
        tree["batch_stats"]["backbone"]["stem_norm"]["mean"] for tree in (variables, moved)
    )
    assert np.abs(after - before).max() > 0
    half = resnet.FaceResNet(resnet.ResNet((1,), width=4, dtype=jnp.bfloat16), embedding_size=6)
    shapes = jax.tree.map(lambda leaf: leaf.dtype, variables)
    assert set(jax.tree.leaves(shapes)) == {jnp.dtype("float32")}
    rough = jax.jit(half.apply)(variables, images)
    assert rough.dtype == jnp.float32
    # bfloat16 keeps 8 bits: a few percent after a handful of layers.
    np.testing.assert_allclose(rough, jax.jit(module.apply)(variables, images), atol=0.1)


def test_unknown_stem():
    with pytest.raises(ValueError, match="stem"):
        resnet.ResNet((1,), stem="none").init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(
    "shape, kernel_shape, strides, padding, groups",
    [
        ((2, 7, 9, 3), (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1)), 1),
        ((2, 8, 9, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1)), 1),
        ((2, 8, 8, 3), (1, 1, 3, 4), (2, 2), ((0, 0), (0, 0)), 1),
        ((2, 9, 8, 3), (3, 5, 3, 2), (2, 1), "SAME", 1),
        ((2, 9, 8, 3), (4, 2, 3, 2), (1, 2), "VALID", 1),
        ((2, 8, 8, 5), (3, 3, 5, 4), (1, 1), "SAME", 1),
        ((2, 17, 18, 5), (3, 3, 5, 4), (2, 3), ((0, 2), (1, 0)), 1),
        ((2, 8, 8, 4), (3, 3, 1, 4), (2, 2), ((1, 1), (1, 1)), 4),
        # In blocks: of 2 x 2 pixels, and pairs of columns.
        ((2, 12, 15, 3), (3, 3, 3, 5), (1, 1), "SAME", 1),
        ((2, 11, 10, 1), (3, 3, 1, 40), (1, 1), "VALID", 1),
        ((2, 11, 14, 7), (3, 3, 7, 6), (1, 1), ((0, 2), (1, 4)), 1),
        # Many taps on few channels.
        ((2, 23, 30, 3), (7, 7, 3, 4), (2, 2), "VALID", 1),
        ((2, 23, 30, 3), (7, 7, 3, 4), (2, 2), ((3, 3), (3, 3)), 1),
        ((2, 16, 17, 1), (4, 7, 1, 2), (4, 1), ((6, 2), (0, 5)), 1),
        ((1, 19, 14, 4), (5, 3, 4, 2), (1, 4), "SAME", 1),
        ((1, 14, 15, 3), (5, 5, 3, 2), (3, 3), "SAME", 1),
        # More padding than taps.
        ((1, 20, 23, 3), (4, 4, 3, 2), (2, 1), ((9, 0), (13, 15)), 1),
        # Taps that see padding alone.
        ((2, 1, 1, 5), (3, 3, 5, 4), (1, 1), "SAME", 1),
        ((2, 1, 3, 5), (5, 3, 5, 4), (1, 1), "SAME", 1),
        ((2, 2, 1, 5), (7, 7, 5, 4), (2, 2), ((3, 3), (3, 3)), 1),
        ((2, 1, 1, 5), (3, 3, 5, 4), (2, 2), ((0, 2), (2, 0)), 1),
        ((2, 2, 2, 5), (3, 3, 5, 4), (3, 3), ((5, 2), (4, 4)), 1),
        ((2, 3, 3, 5), (1, 1, 5, 4), (2, 2), ((1, 1), (2, 2)), 1),
    ],
)
def test_gradients_of_the_convolution_are_those_of_jax(
    shape, kernel_shape, strides, padding, groups
):
    keys = jax.random.split(jax.random.key(0), 3)
    inputs, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], kernel_shape)

    def grads(conv_fn):
        call = lambda x, k: conv_fn(  # noqa: E731
            x,
            k,
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        outputs, backward = jax.vjp(call, inputs, kernel)
        return outputs, *backward(jax.random.normal(keys[2], outputs.shape))

    ours = jax.jit(lambda: grads(conv.conv_general_dilated))()
    theirs = jax.jit(lambda: grads(jax.lax.conv_general_dilated))()
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (1, 3), (4, 2)])
@pytest.mark.parametrize(
    "shape, taps, padding",
    [((2, 9, 8, 3), (3, 3), ((0, 0), (0, 0))), ((1, 6, 11, 2), (2, 5), ((3, 0), (1, 4)))],
)
def test_convolution_in_blocks_is_that_of_jax(block, shape, taps, padding):
    keys = jax.random.split(jax.random.key(3))
    images = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (*taps, shape[-1], 5))
    found = np.asarray(conv.in_blocks(images, kernel, block, padding=padding))
    expected = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for row, column in np.ndindex(*expected.shape[1:3]):
        (y, i), (x, j) = divmod(row, block[0]), divmod(column, block[1])
        np.testing.assert_allclose(
            found[:, y, x, i, j], expected[:, row, column], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("channels, features", [(3, 10), (10, 16), (16, 32)])
def test_fast_forward_is_the_convolution_of_jax(padding, channels, features):
    images = jax.random.normal(jax.random.key(0), (2, 13, 12, channels))
    plain = nn.Conv(features, (3, 3), padding=padding)
    variables = plain.init(jax.random.key(1), images)
    fast = nn.Conv(features, (3, 3), padding=padding, conv_general_dilated=conv.fast_forward)
    run = lambda net: jax.value_and_grad(lambda x: jnp.sum(jnp.tanh(net.apply(variables, x))))  # noqa: E731
    for one, other in zip(run(fast)(images), run(plain)(images), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding, stride", [("SAME", 1), ("VALID", 1), ((0, 2), 1), (1, 2)])
@pytest.mark.parametrize("side", [7, 1])
def test_kernels_that_are_turned_once_give_the_same_gradients(padding, stride, side):
    if isinstance(padding, tuple):
        padding = [padding, padding[::-1]]
    if side == 1 and padding == "VALID":
        padding = 2
    net = nn.Sequential(
        [
            nn.Conv(6, (3, 5), padding=2, conv_general_dilated_cls=conv.Convolution),
            nn.relu,
            nn.Conv(4, (3, 3), stride, padding=padding, conv_general_dilated_cls=conv.Convolution),
            nn.Conv(3, (1, 1), conv_general_dilated_cls=conv.Convolution),
        ]
    )
    images = jax.random.normal(jax.random.key(0), (2, side, side, 5))
    variables = net.init(jax.random.key(1), images)
    (turned,) = conv.turn_kernels([variables])
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(turned["turned"]))
    assert shapes == [(3, 3, 4, 6), (3, 5, 6, 5)] and turned["params"] is variables["params"]

    def grads(variables):
        def loss_fn(params, images):
            outputs = net.apply({**variables, "params": params}, images)
            return jnp.sum(jnp.sin(outputs)), outputs

        return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))(
            variables["params"], images
        )

    plain, fast = grads(variables), grads(turned)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_more_padding_than_taps():
    """Where the gradient of `jax.lax` reads beyond its array on CPU."""
    padding, images = [(5, 0), (4, 6)], jax.random.normal(jax.random.key(0), (2, 9, 7, 5))
    net = nn.Conv(4, (3, 3), padding=padding, conv_general_dilated_cls=conv.Convolution)
    variables = net.init(jax.random.key(1), images)
    plain = nn.Conv(4, (3, 3), padding="VALID")

    def padded(x):
        return plain.apply(variables, jnp.pad(x, ((0, 0), *padding, (0, 0))))

    def gradient(apply_fn):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(apply_fn(x)))))(images)

    expected = gradient(padded)
    for each in (variables, *conv.turn_kernels([variables])):
        found = gradient(lambda x, each=each: net.apply(each, x))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_turned_kernels_are_those_that_the_gradient_reads():
    net = nn.Conv(4, (3, 3), conv_general_dilated_cls=conv.Convolution)
    images = jax.random.normal(jax.random.key(0), (1, 6, 6, 5))
    variables = net.init(jax.random.key(1), images)
    (turned,) = conv.turn_kernels([variables])
    turned = {**turned, "turned": jax.tree.map(jnp.zeros_like, turned["turned"])}
    gradient = jax.grad(lambda x: jnp.sum(net.apply(turned, x) ** 2))(images)
    assert not np.any(gradient)


def test_turned_kernels_follow_the_type_of_the_computation():
    net = nn.Conv(4, (3, 3), dtype=jnp.bfloat16, conv_general_dilated_cls=conv.Convolution)
    images = jax.random.normal(jax.random.key(0), (1, 6, 6, 5))
    variables = net.init(jax.random.key(1), images)
    (turned,) = conv.turn_kernels([variables])
    plain, fast = (
        jax.grad(lambda x, v=v: jnp.sum(net.apply(v, x).astype(jnp.float32) ** 2))(images)
        for v in (variables, turned)
    )
    np.testing.assert_allclose(plain, fast, rtol=0.02, atol=0.02)


def test_what_the_fast_gradient_does_not_cover_goes_to_jax():
    images = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    for options in ({"kernel_dilation": 2}, {"feature_group_count": 2}):
        fast = nn.Conv(4, (3, 3), conv_general_dilated=conv.conv_general_dilated, **options)
        plain = nn.Conv(4, (3, 3), **options)
        variables = jax.eval_shape(plain.init, jax.random.key(1), images)
        text = [str(jax.make_jaxpr(net.apply)(variables, images)) for net in (fast, plain)]
        assert text[0] == text[1]

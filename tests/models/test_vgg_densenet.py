"""VGG-11, DenseNet-121 and the table of classifiers: sizes, shapes, statistics, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.models.classifiers import densenet, registry, vgg


def _count(module, side):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
    "module, side, count",
    [
        # 9,217,728 kernels of configuration A, 2 x 2,752 of BatchNorm, 5,130 of the last layer.
        (vgg.vgg11(num_classes=10), 32, 9_228_362),
        # torchvision's densenet121.
        (densenet.densenet121(num_classes=1000, stem="imagenet"), 64, 7_978_856),
    ],
)
def test_parameter_counts_are_the_published_ones(module, side, count):
    assert _count(module, side) == count


@pytest.mark.parametrize(
    "module, width", [(vgg.vgg11(), 512), (densenet.densenet121(), 1024)], ids=["vgg", "densenet"]
)
def test_without_classes_a_net_returns_features(module, width):
    shape = jax.eval_shape(
        lambda key, x: module.init_with_output(key, x)[0],
        jax.random.key(0),
        jnp.zeros((2, 32, 32, 3)),
    )
    assert shape.shape == (2, width) and shape.dtype == jnp.float32


@pytest.mark.parametrize(
    "module",
    [
        vgg.Vgg(plan=(1, 0, 2, 0), width=4, num_classes=3),
        densenet.DenseNet(num_layers=(1, 2), growth=4, num_classes=3),
    ],
    ids=["vgg", "densenet"],
)
def test_statistics_are_explicit_and_examples_independent_in_eval(module):
    images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
    variables = jax.jit(module.init)(jax.random.key(0), images)
    eval_fn = jax.jit(module.apply)
    whole, one = eval_fn(variables, images), eval_fn(variables, images[:1])
    np.testing.assert_allclose(whole[:1], one, atol=1e-5)  # Other tilings of the same sums.
    train_fn = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, moved = train_fn(variables, images)
    assert logits.shape == (4, 3)
    before, after = (jax.tree.leaves(v["batch_stats"]) for v in (variables, moved))
    assert all(not np.allclose(b, a) for b, a in zip(before, after, strict=True))


def test_bfloat16_computes_what_float32_does_roughly():
    images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        module = vgg.Vgg(plan=(1, 0, 2, 0), width=4, num_classes=3, dtype=dtype)
        variables = module.init(jax.random.key(0), images)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
        found.append(module.apply(variables, images))
        assert found[-1].dtype == jnp.float32
    np.testing.assert_allclose(*found, atol=0.05)  # 8 bits of mantissa, two layers.
    assert np.abs(found[0] - found[1]).max() > 0


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_classifier_of_the_table_gives_logits(name):
    side = 96 if name == "inception_resnet_v1" else 32
    module = registry.classifier(name, num_classes=7)
    images = jnp.zeros((2, side, side, 3))
    shape = jax.eval_shape(
        lambda key, x: module.init_with_output(key, x)[0], jax.random.key(0), images
    )
    assert shape.shape == (2, 7) and shape.dtype == jnp.float32


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="alexnet"):
        registry.classifier("alexnet", num_classes=2)
    with pytest.raises(ValueError, match="stem"):
        densenet.DenseNet(stem="odd").init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

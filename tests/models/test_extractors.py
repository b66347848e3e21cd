"""The extractors against stored embeddings of the originals, with weights that both make alike.

The originals are facenet-pytorch, the Keras models of deepface and InsightFace's layouts in torch
(`make_extractor_references.py`). A reader that put an array into the wrong place would be noticed:
the values of an array depend on its name in the original's file.
"""

import functools
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import make_extractor_references as references
import numpy as np
import pytest

from afr_jax.models import layers
from afr_jax.models.extractors import (
    deepface,
    inception_resnet,
    iresnet,
    mobilefacenet,
    openface,
    registry,
    vggface,
)
from afr_jax.models.weights import conversion, formats

_SMALL = iresnet.IResNet(references.SMALL_BLOCKS)
_TORCH_MOBILE = mobilefacenet.MobileFaceNet(use_bias=False, epsilon=1e-5)
# Module, reader, kind of the file.
_NETWORKS = {
    "facenet": (inception_resnet.InceptionResnetV1(), inception_resnet.read_weights, "torch"),
    "mobilefacenet": (
        _TORCH_MOBILE,
        functools.partial(mobilefacenet.read_weights, module=_TORCH_MOBILE),
        "torch",
    ),
    "arcface_small": (_SMALL, functools.partial(iresnet.read_weights, module=_SMALL), "torch"),
    "openface": (openface.OpenFace(), openface.read_weights, "keras"),
    "deepface": (deepface.DeepFace(), deepface.read_weights, "keras"),
    "arcface_r50": (iresnet.IResNet(), iresnet.read_weights, "torch"),
    "vggface": (vggface.VggFace(), vggface.read_weights, "keras"),
}
_SLOW = ("arcface_r50", "vggface")
# VGG-Face's layers have no names of their own in Keras: they are numbered.
_VGG_ORDER = (
    *("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3"),
    *("conv4_1", "conv4_2", "conv4_3", "conv5_1", "conv5_2", "conv5_3", "fc6", "fc7"),
)


@functools.cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(references.REFERENCES / "embeddings.npz") as file:
        return dict(file)


def _variables(monkeypatch, name: str) -> dict:
    """What the reader makes of a file with the arrays that it asks for, made from their names."""
    _, read_fn, kind = _NETWORKS[name]
    fan_in = getattr(references.random_weights, f"{kind}_fan_in")
    fill = conversion.fill

    def fill_random(path, shapes, arrays, entry_fn, **options):
        arrays = {}
        for leaf, expected in flax.traverse_util.flatten_dict(shapes).items():
            entry = entry_fn(leaf, expected.shape)
            layer, _, array = entry.name.partition("/")
            known = f"{_VGG_ORDER.index(layer)}/{array}" if layer in _VGG_ORDER else entry.name
            arrays[entry.name] = references.random_weights.random_array(
                references.SEED, known, entry.shape, fan_in(entry.shape)
            )
        return fill(path, shapes, arrays, entry_fn, **options)

    monkeypatch.setattr(conversion, "fill", fill_random)
    monkeypatch.setattr(formats, "kind_of", lambda path: kind)
    monkeypatch.setattr(formats, "read_arrays", lambda path: (kind, {}))
    return read_fn(pathlib.Path("random"))


def _error(ours, theirs) -> float:
    """The largest difference in units of the root mean square of an embedding."""
    ours = np.asarray(ours, np.float64)[:, : theirs.shape[1]]
    return np.abs(ours - theirs).max() / np.sqrt(np.mean(theirs.astype(np.float64) ** 2))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in _SLOW else []) for n in _NETWORKS]
)
def test_embeddings_equal_those_of_the_original(monkeypatch, name):
    module = _NETWORKS[name][0]
    variables = _variables(monkeypatch, name)
    ours = np.asarray(jax.jit(module.apply)(variables, references.chips(name)))
    assert ours.dtype == np.float32
    if name in ("facenet", "openface"):
        # These originals scale their embeddings to unit length.
        ours = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    theirs = _stored()[name]
    # Sums of thousands of float32 products in another order.
    assert _error(ours, theirs) < 1e-4
    # The oracle sees differences: the two chips are far further apart than that.
    assert _error(theirs[:1], theirs[1:]) > 1e-2


@pytest.mark.shared
def test_the_published_mobilefacenet_equals_its_list_of_layers(shared):
    extractor = registry.get("mobilefacenet")
    variables = registry.load_variables(extractor, shared / "weights" / "mobilefacenet_y1_ms1m.npz")
    chips = references.published_chips()
    raw = chips * extractor.input_scale + extractor.input_offset
    theirs = _stored()["mobilefacenet_y1"]
    assert _error(jax.jit(extractor.module.apply)(variables, raw), theirs) < 1e-4
    unit = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    ours = jax.jit(registry.embed, static_argnums=0)(extractor, variables, chips)
    np.testing.assert_allclose(ours, unit, atol=1e-5)


@pytest.mark.shared
def test_the_published_facenet_is_read(shared):
    path = shared / "weights" / "facenet_casia_20180408.npz"
    variables = registry.load_variables(registry.get("facenet_casia"), path)
    with np.load(path) as file:
        block = variables["params"]["Block17_10"]
        kernel = block["Branch_1_Conv2d_0c_7x1"]["conv"]["kernel"]
        np.testing.assert_array_equal(kernel, file["Block17_10_Branch_1_Conv2d_0c_7x1_kernel"])
        norm = variables["batch_stats"]["Bottleneck_BatchNorm"]
        np.testing.assert_array_equal(norm["var"], file["Bottleneck_BatchNorm_moving_variance"])
    # TensorFlow's BatchNorm has no scale.
    assert np.all(block["Branch_1_Conv2d_0c_7x1"]["norm"]["scale"] == 1)


# In training and in half precision.

_TRAINABLE = {
    "facenet": inception_resnet.InceptionResnetV1(dtype=jnp.bfloat16),
    "mobilefacenet": mobilefacenet.MobileFaceNet(dtype=jnp.bfloat16),
    "arcface_small": iresnet.IResNet(references.SMALL_BLOCKS, dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("name", _TRAINABLE)
def test_half_precision_keeps_parameters_and_embeddings_in_float32(name):
    module, (side, _) = _TRAINABLE[name], references.NETWORKS[name]
    shapes = conversion.shapes(module, side)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    chips = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)

    def forward(variables, chips):
        keys = {"dropout": jax.random.key(0)}
        return module.apply(variables, chips, train=True, mutable=["batch_stats"], rngs=keys)

    embeddings, updates = jax.eval_shape(forward, shapes, chips)
    assert embeddings.dtype == jnp.float32
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(shapes["batch_stats"])
    # Nearly everything is computed in half precision.
    text = str(jax.make_jaxpr(forward)(shapes, chips))
    assert text.count("bf16[") > 100


def test_training_normalizes_by_the_batch_and_moves_the_statistics():
    module = layers.ConvNorm(3, (3, 3), padding=1, activation="none", momentum=0.9)
    x = np.random.default_rng(0).normal(2.0, 3.0, (4, 6, 5, 2)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    result, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(np.mean(result, axis=(0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.std(result, axis=(0, 1, 2)), 1.0, atol=1e-3)
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    mean = np.einsum("bhwcij,ijcd->bhwd", windows, kernel).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(updates["batch_stats"]["norm"]["mean"], 0.1 * mean, atol=1e-4)


def test_openfaces_pooling_has_a_finite_gradient_where_nothing_is():
    x = jnp.zeros((1, 3, 6, 2)).at[0, :, 3:].set(2.0)
    pooled, gradient = jax.value_and_grad(lambda x: openface._l2_pool(x).sum())(x)
    # The length of nine twos, for two channels.
    np.testing.assert_allclose(pooled, 2 * 6.0)
    np.testing.assert_allclose(gradient[0, :, :3], 0.0)
    np.testing.assert_allclose(gradient[0, :, 3:], 1 / 3, atol=1e-6)

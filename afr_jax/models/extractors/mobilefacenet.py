"""MobileFaceNet in Flax, and the readers of its weights.

Chen, Liu, Gao, Han: "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on
Mobile Devices", CCBR 2018, as InsightFace trained it with ArcFace (`y1`: no convolution is wider
than 512 channels). Chips are RGB, 0.007812 (x - 127.5) from 0..255.

Four forms of the weights are read: arrays by layer name (`.npz`, MXNet's names; the variances
contain BatchNorm's epsilon, as in ncnn's files), torch state dicts with InsightFace's names, those
of FRBench, after cavaface, whose blocks end in channel attention (Wang and others: "ECA-Net:
Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020), and TensorFlow Lite
files of MobileFaceNet_TF (github.com/sirius-ai/MobileFaceNet_TF), whose convolutions contain their
BatchNorm; that network has two convolutions more.
"""

import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import layers, norm
from afr_jax.models.weights import conversion, formats

INPUT_SIZE = 112
EMBEDDING_SIZE = 128
# Scale of the pixels in the published graph.
INPUT_SCALE = 0.007812
# Name, width of the bottleneck, output channels and stride of the blocks; res are residual.
_BLOCKS = (
    ("dconv_23", 128, 64, 2),
    *((f"res_3_block{i}", 128, 64, 1) for i in range(4)),
    ("dconv_34", 256, 128, 2),
    *((f"res_4_block{i}", 256, 128, 1) for i in range(6)),
    ("dconv_45", 512, 128, 2),
    *((f"res_5_block{i}", 256, 128, 1) for i in range(2)),
)
_NPZ_LEAVES = {
    ("conv", "kernel"): "conv2d/w",
    ("norm", "scale"): "batchnorm/s",
    ("norm", "bias"): "batchnorm/b",
    ("norm", "mean"): "batchnorm/m",
    ("norm", "var"): "batchnorm/v",
    ("activation", "slope"): "relu/a",
    ("pre_fc1", "kernel"): "w",
    ("pre_fc1", "bias"): "b",
    ("fc1", "scale"): "s",
    ("fc1", "bias"): "b",
    ("fc1", "mean"): "m",
    ("fc1", "var"): "v",
}


class MobileFaceNet(nn.Module):
    """Chips `[B, 112, 112, 3]`, RGB in about [-1, 1], to embeddings `[B, 128]`, float32.

    The embeddings are not of unit length. Scopes bear the layer names of the published graph.

    Attributes:
        embedding_size: 128 in the published weights.
        use_bias: of the last matrix; InsightFace's torch version has none.
        epsilon: of BatchNorm; 1e-5 in torch.
        attention: whether every block weighs its channels, as FRBench's network does.
        tensorflow: whether it is MobileFaceNet_TF's network: a linear convolution more at either
            end, and strided windows that begin at the first pixel, not before it.
        dtype: of the computation; parameters and embeddings stay float32.
    """

    embedding_size: int = EMBEDDING_SIZE
    use_bias: bool = True
    epsilon: float = 1e-3
    attention: bool = False
    tensorflow: bool = False
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, chips: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings; `train` normalizes by the batch and updates `batch_stats`."""
        options: dict[str, Any] = {"epsilon": self.epsilon, "momentum": 0.9, "dtype": self.dtype}

        def unit(x: jax.Array, name: str, features: int, kernel: int = 1, **more: Any) -> jax.Array:
            size = (kernel, kernel)
            if self.tensorflow and more.get("padding"):
                x = layers.pad_for_pool(x, kernel, more.get("stride", 1), 0)
                more["padding"] = 0
            module = layers.ConvNorm(features, size, name=name, **{**options, **more})
            return module(x, train=train)

        x = unit(chips, "conv_1", 64, 3, stride=2, padding=1, activation="prelu")
        x = unit(x, "conv_2_dw", 64, 3, padding=1, depthwise=True, activation="prelu")
        if self.tensorflow:
            x = unit(x, "conv_2_proj", 64, activation="none")
        for name, width, features, stride in _BLOCKS:
            y = unit(x, f"{name}_conv_sep", width, activation="prelu")
            depthwise = {"depthwise": True, "activation": "prelu"}
            y = unit(y, f"{name}_conv_dw", width, 3, stride=stride, padding=1, **depthwise)
            y = unit(y, f"{name}_conv_proj", features, activation="none")
            if self.attention:
                y = _ChannelAttention(name=f"{name}_eca")(y)
            x = x + y if name.startswith("res") else y
        x = unit(x, "conv_6sep", 512, activation="prelu")
        x = unit(x, "conv_6dw7_7", 512, 7, padding=0, depthwise=True, activation="none")
        if self.tensorflow:
            x = unit(x, "conv_7", 512, activation="none")
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        x = nn.Dense(self.embedding_size, use_bias=self.use_bias, name="pre_fc1")(x)
        return norm.BatchNorm(not train, epsilon=self.epsilon, momentum=0.9, name="fc1")(x)


class _ChannelAttention(nn.Module):
    """Every channel times a number in (0, 1) that follows from the means of its neighbors."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        # An odd number near half the binary logarithm, at least three.
        taps = max(3, int((math.log2(channels) + 1) / 2) // 2 * 2 + 1)
        kernel = self.param("kernel", nn.initializers.normal(taps**-0.5), (taps,))
        means = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        means = jnp.pad(means, ((0, 0), (taps // 2, taps // 2)))
        mixed = [means[:, tap : tap + channels] * kernel[tap] for tap in range(taps)]
        weights = nn.sigmoid(functools.reduce(jnp.add, mixed))
        return x * weights[:, None, None, :].astype(x.dtype)


def read_weights(
    path: str | os.PathLike[str], *, module: MobileFaceNet | None = None
) -> conversion.Variables:
    """Reads the variables of a `MobileFaceNet`.

    Args:
        path: an `.npz`, a torch state dict (`.pth`, `.pt`, `.safetensors`), or a `.tflite`.
        module: the network that the file is for; default: that of the published weights.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    module = module or MobileFaceNet()
    kind, arrays = formats.read_arrays(path)
    shapes = conversion.shapes(module, INPUT_SIZE)
    if (kind == "tflite") != module.tensorflow:
        raise ValueError(
            f"{path} is {'no' if module.tensorflow else 'a'} TensorFlow Lite file, the only form "
            "of MobileFaceNet_TF that is read"
        )
    if module.tensorflow:
        names = _tensorflow_names()
        return conversion.fill(
            path,
            shapes,
            arrays,
            lambda leaf, shape: _tensorflow_entry(names, module.epsilon, leaf[1:], shape),
            ignore_fn=lambda name: name == "MobileFaceNet/Logits/SpatialSqueeze_shape",
        )
    if kind in ("torch", "safetensors"):
        names = _frbench_names() if "conv2_dw.conv.weight" in arrays else _torch_names()
        return conversion.fill(
            path,
            shapes,
            arrays,
            lambda leaf, shape: _torch_entry(names, leaf[1:-1], leaf[-1], shape),
            ignore_fn=conversion.is_torch_counter,
        )

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry:
        *scopes, layer, name = leaf[1:]
        if (layer, name) not in _NPZ_LEAVES:  # Files of this form have no attention.
            return conversion.plain_entry(f"{layer}/{name}", shape)
        stem = "_".join([*scopes, "" if scopes else f"{layer}/"])
        found = conversion.torch_entry("", name, shape)._replace(
            name=stem + _NPZ_LEAVES[layer, name]
        )
        if name == "var":
            return found._replace(convert=lambda array: array - module.epsilon)
        return found

    return conversion.fill(path, shapes, arrays, entry)


def _torch_entry(
    names: Mapping[tuple[str, ...], str], scopes: tuple[str, ...], leaf: str, shape: tuple[int, ...]
) -> conversion.Entry:
    *_, last = scopes
    if not last.endswith("_eca"):
        return conversion.torch_entry(names[scopes], leaf, shape)
    name = names.get(scopes, last)
    return conversion.Entry(f"{name}.weight", (1, 1, *shape), lambda array: array.reshape(shape))


def _torch_names() -> dict[tuple[str, ...], str]:
    """InsightFace's torch name of every scope of ours."""
    units = {"conv_1": "layers.0", "conv_2_dw": "layers.1", "conv_6sep": "conv_sep"}
    units["conv_6dw7_7"] = "features.layers.0"
    stages = {"dconv_23": 2, "res_3": 3, "dconv_34": 4, "res_4": 5, "dconv_45": 6, "res_5": 7}
    for name, *_ in _BLOCKS:
        stage, _, number = name.partition("_block")
        block = f"layers.{stages[stage]}" + (f".layers.{number}" if number else "")
        for index, part in enumerate(("sep", "dw", "proj")):
            units[f"{name}_conv_{part}"] = f"{block}.layers.{index}"
    names: dict[tuple[str, ...], str] = {
        ("pre_fc1",): "features.layers.2",
        ("fc1",): "features.layers.3",
    }
    for ours, theirs in units.items():
        for index, layer in enumerate(("conv", "norm", "activation")):
            names[ours, layer] = f"{theirs}.layers.{index}"
    return names


def _frbench_names() -> dict[tuple[str, ...], str]:
    """FRBench's torch name of every scope of ours."""
    units = {"conv_1": "conv1", "conv_2_dw": "conv2_dw", "conv_6sep": "conv_6_sep"}
    units["conv_6dw7_7"] = "output_layer.conv_dw"
    names: dict[tuple[str, ...], str] = {
        ("pre_fc1",): "output_layer.fc",
        ("fc1",): "output_layer.bn",
    }
    for name, *_ in _BLOCKS:
        stage, _, number = name.partition("_block")
        block = f"conv_{stage.rpartition('_')[2]}" + (f".layers.{number}" if number else "")
        for ours, theirs in (("sep", "expand"), ("dw", "dw"), ("proj", "project")):
            units[f"{name}_conv_{ours}"] = f"{block}.conv_{theirs}"
        names[(f"{name}_eca",)] = f"{block}.eca.conv"
    for ours, theirs in units.items():
        for layer, leaf in (("conv", "conv"), ("norm", "bn"), ("activation", "prelu")):
            names[ours, layer] = f"{theirs}.{leaf}"
    return names


def _tensorflow_entry(
    names: Mapping[str, tuple[str, str]],
    epsilon: float,
    leaf: tuple[str, ...],
    shape: tuple[int, ...],
) -> conversion.Entry | float:
    unit, *_, layer, name = ("pre_fc1", *leaf) if len(leaf) == 2 else leaf
    kernel, scope = names[unit]
    depthwise = "SeparableConv2d" in kernel
    if name in ("scale", "mean", "var"):  # BatchNorm is part of the convolution before it.
        return {"scale": 1.0, "mean": 0.0, "var": 1 - epsilon}[name]
    if name == "bias":
        name = "depthwise_bias" if depthwise else "Conv2D_bias"
        return conversion.plain_entry(f"{scope}/{name}", shape)
    if layer == "activation":
        # The graph adds half the slope times x - |x|.
        return conversion.Entry(f"{scope}/mul", shape, lambda array: 2 * array)
    if depthwise:
        stored = (1, *shape[:2], shape[3])
        entry = conversion.plain_entry(f"{kernel}/depthwise_weights/read", stored)
        return entry._replace(convert=lambda array: array.reshape(shape))
    rows, columns, inputs, outputs = (1, 1, *shape)[-4:]
    return conversion.Entry(
        f"{kernel}/weights/read",
        (outputs, rows, columns, inputs),
        lambda array: array.transpose(1, 2, 3, 0).reshape(shape),
    )


def _tensorflow_names() -> dict[str, tuple[str, str]]:
    """MobileFaceNet_TF's name of the kernel of every unit of ours, and of all else that it has."""
    places = {"conv_1": ("Conv2d_0",) * 2, "conv_2_dw": ("SeparableConv2d",) * 2}
    places |= {"conv_2_proj": ("Conv",) * 2, "conv_6sep": ("Conv2d_7",) * 2}
    stages = {"dconv_23": 2, "res_3": 2, "dconv_34": 3, "res_4": 4, "dconv_45": 5, "res_5": 6}
    for index, (name, *_) in enumerate(_BLOCKS):
        stage, _, number = name.partition("_block")
        block = int(number or 0) + (stage == "res_3")
        scope = f"Conv2d_{stages[stage]}_InvResBlock_{block}"
        places[f"{name}_conv_sep"] = f"Conv_{2 * index + 1}", f"{scope}/Conv"
        places[f"{name}_conv_dw"] = f"SeparableConv2d_{index + 1}", f"{scope}/SeparableConv2d"
        places[f"{name}_conv_proj"] = f"Conv_{2 * index + 2}", f"{scope}/Conv_1"
    names = {
        unit: (f"MobileFaceNet/{kernel}", f"MobileFaceNet/MobileFaceNet/{scope}")
        for unit, (kernel, scope) in places.items()
    }
    ends = {"conv_6dw7_7": "SeparableConv2d", "conv_7": "Conv", "pre_fc1": "LinearConv1x1"}
    return names | {unit: (f"MobileFaceNet/Logits/{end}",) * 2 for unit, end in ends.items()}

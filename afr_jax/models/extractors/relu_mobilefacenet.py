"""foamliu's MobileFaceNet in Flax, and the reader of its torch weights.

Chen, Liu, Gao, Han: "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on
Mobile Devices", CCBR 2018, as github.com/foamliu/MobileFaceNet built it from MobileNet-v2: ReLU6
where others have PReLU, one block more that is not residual but strided, and means and deviations
of ImageNet for its chips.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import layers, norm
from afr_jax.models.weights import conversion, formats

INPUT_SIZE = 112
EMBEDDING_SIZE = 128
# Of ImageNet, RGB in [0, 1].
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Widening, output channels, number and stride of the first, of the inverted residuals.
_STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
_EPSILON, _MOMENTUM = 1e-5, 0.9


class ReluMobileFaceNet(nn.Module):
    """Chips `[B, 112, 112, 3]`, RGB in [0, 1], to embeddings `[B, 128]`, float32.

    The embeddings are not of unit length.

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
            kernel: int = 1,
            *,
            stride: int = 1,
            padding: int | None = None,
            depthwise: bool = False,
        ) -> jax.Array:
            module = layers.ConvNorm(
                features,
                (kernel, kernel),
                stride,
                padding=kernel // 2 if padding is None else padding,
                activation="none",
                depthwise=depthwise,
                epsilon=_EPSILON,
                momentum=_MOMENTUM,
                dtype=self.dtype,
                name=name,
            )
            return module(x, train=train)

        shape = (1, 1, 1, 3)
        x = (chips - jnp.array(_MEANS, chips.dtype).reshape(shape)) / jnp.array(
            _DEVIATIONS, chips.dtype
        ).reshape(shape)
        x = nn.relu6(unit(x, "conv1", 64, 3, stride=2))
        x = nn.relu(unit(x, "dw_conv_dw", 64, 3, depthwise=True))
        x = nn.relu(unit(x, "dw_conv_pw", 64))
        number = 0
        for widening, features, count, first in _STAGES:
            for stride in (first,) + (1,) * (count - 1):
                name, width = f"features_{number}", widening * x.shape[-1]
                y = nn.relu6(unit(x, f"{name}_0", width))
                y = nn.relu6(unit(y, f"{name}_1", width, 3, stride=stride, depthwise=True))
                y = unit(y, f"{name}_2", features)
                x = x + y if y.shape == x.shape else y
                number += 1
        x = nn.relu6(unit(x, "conv2", 512))
        x = unit(x, "gdconv", 512, 7, padding=0, depthwise=True)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        x = nn.Dense(EMBEDDING_SIZE, name="conv3")(x)
        return norm.BatchNorm(not train, epsilon=_EPSILON, momentum=_MOMENTUM, name="bn")(x)


def read_weights(path: str | os.PathLike[str]) -> conversion.Variables:
    """Reads the variables of `ReluMobileFaceNet`.

    Args:
        path: a torch state dict (`mobilefacenet.pt`, `.safetensors`).

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    kind, arrays = formats.read_arrays(path)
    if kind not in ("torch", "safetensors"):
        raise ValueError(f"{path} is no torch state dict, the only form of this that is read")

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry:
        *scopes, name = leaf[1:]
        if scopes == ["conv3"] and name == "kernel":
            stored = (*shape[::-1], 1, 1)
            return conversion.Entry("conv3.weight", stored, lambda array: array[:, :, 0, 0].T)
        return conversion.torch_entry(_scope(scopes), name, shape)

    return conversion.fill(
        path,
        conversion.shapes(ReluMobileFaceNet(), INPUT_SIZE),
        arrays,
        entry,
        ignore_fn=conversion.is_torch_counter,
    )


def _scope(scopes: list[str]) -> str:
    """The original's name of a layer of ours."""
    unit, *inner = scopes
    if not inner:
        return unit
    is_norm = inner == ["norm"]
    if unit == "gdconv":
        return "gdconv.bn" if is_norm else "gdconv.depthwise"
    if unit.startswith("dw_conv"):
        place = ("bn1", "depthwise") if unit.endswith("dw") else ("bn2", "pointwise")
        return f"dw_conv.{place[0] if is_norm else place[1]}"
    if not unit.startswith("features"):
        return f"{unit}.{int(is_norm)}"
    _, number, part = unit.split("_")
    # The last convolution and its BatchNorm lie in the same list as what comes before.
    inside = str(2 + is_norm) if part == "2" else f"{part}.{int(is_norm)}"
    return f"features.{number}.conv.{inside}"

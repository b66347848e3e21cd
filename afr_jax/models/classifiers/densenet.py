"""DenseNet-121 in linen: a classifier in which every layer sees all earlier ones of its block.

Huang, Liu, van der Maaten, Weinberger 2017, "Densely Connected Convolutional Networks": BatchNorm,
ReLU, 1 x 1 convolution to four times the growth, BatchNorm, ReLU, 3 x 3 convolution; transitions
halve channels and resolution. The CIFAR stem is one 3 x 3 convolution without pooling, the ImageNet
stem 7 x 7 / 2 and a 3 x 3 / 2 pool.

Images are `[B, H, W, 3]` float, already in the range that the run uses. Parameters and statistics
are float32; `dtype` is that of the computation. BatchNorm as in `resnet.py`.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import conv, layers, norm

Stem = Literal["cifar", "imagenet"]
_LAYERS_121 = (6, 12, 24, 16)
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DenseNet(nn.Module):
    """A densely connected network.

    Attributes:
        num_layers: of each dense block.
        growth: channels that a layer adds; the stem has twice as many.
        stem: "cifar" or "imagenet".
        num_classes: number of logits; None for features.
        dtype: of the computation; parameters, statistics and outputs are float32.
    """

    num_layers: tuple[int, ...] = _LAYERS_121
    growth: int = 32
    stem: Stem = "cifar"
    num_classes: int | None = None
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits `[B, num_classes]` or features `[B, F]`, float32, of images `[B, H, W, 3]`."""
        if self.stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem is {self.stem!r}, but must be 'cifar' or 'imagenet'")

        def conv_fn(x: jax.Array, channels: int, side: int, stride: int, name: str) -> jax.Array:
            return nn.Conv(
                channels,
                (side, side),
                stride,
                padding=side // 2,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_KERNEL_INIT,
                conv_general_dilated_cls=conv.Convolution,
                name=name,
            )(x)

        def active(x: jax.Array, name: str) -> jax.Array:
            x = norm.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                name=name,
            )(x)
            return nn.relu(x)

        x = images.astype(self.dtype)
        if self.stem == "cifar":
            x = conv_fn(x, 2 * self.growth, 3, 1, "stem_conv")
        else:
            x = active(conv_fn(x, 2 * self.growth, 7, 2, "stem_conv"), "stem_norm")
            # After a ReLU, zeros around the image never win: the same as padding with -inf.
            x = layers.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)
        for block, count in enumerate(self.num_layers):
            for layer in range(count):
                name = f"block_{block}_layer_{layer}"
                y = conv_fn(active(x, f"{name}_norm_0"), 4 * self.growth, 1, 1, f"{name}_conv_0")
                y = conv_fn(active(y, f"{name}_norm_1"), self.growth, 3, 1, f"{name}_conv_1")
                x = jnp.concatenate([x, y], axis=-1)
            if block + 1 < len(self.num_layers):
                x = active(x, f"transition_{block}_norm")
                x = conv_fn(x, x.shape[-1] // 2, 1, 1, f"transition_{block}_conv")
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = jnp.mean(active(x, "final_norm").astype(jnp.float32), axis=(1, 2))
        return x if self.num_classes is None else nn.Dense(self.num_classes, name="logits")(x)


def densenet121(
    *,
    num_classes: int | None = None,
    stem: Stem = "cifar",
    growth: int = 32,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> DenseNet:
    """DenseNet-121. With 1,000 classes and the ImageNet stem it has 7,978,856 parameters."""
    return DenseNet(_LAYERS_121, growth, stem, num_classes, dtype)

"""ResNet-18 and ResNet-50 in linen: classifiers, feature nets and face extractors.

He et al. 2016, "Deep Residual Learning for Image Recognition"; layout as in torchvision (v1.5 of
the bottleneck: the 3 x 3 convolution has the stride). The CIFAR stem is one 3 x 3 convolution
without pooling, for images of about 32 px; the ImageNet stem 7 x 7 / 2 and a 3 x 3 / 2 pool.

Images are `[B, H, W, 3]` float, already in the range that the run uses (nothing is normalized
here). Parameters and BatchNorm statistics are float32; `dtype` is that of the computation.
BatchNorm statistics are in the collection "batch_stats": with `train` the ones of the batch are
used and the running ones are updated (apply with `mutable=["batch_stats"]`). Running variances are
biased (torch's are not); momentum 0.9 and epsilon 1e-5 are torch's defaults.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import conv, layers, norm

Stem = Literal["cifar", "imagenet"]
_NUM_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
# He et al. 2015, "Delving Deep into Rectifiers", fan out: torchvision's initialisation.
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(nn.Module):
    """A residual network.

    Attributes:
        num_blocks: residual blocks of each stage; every stage but the first halves the resolution.
        bottleneck: blocks of 1 x 1, 3 x 3, 1 x 1 convolutions, four times as wide at their end,
            instead of two 3 x 3.
        width: channels of the first stage; each stage doubles them.
        stem: "cifar" or "imagenet".
        num_classes: number of logits; None for features, `width * 2 ** (stages - 1)` of them
            (times four with bottleneck blocks).
        dtype: of the computation; parameters, statistics and outputs are float32.
    """

    num_blocks: tuple[int, ...]
    bottleneck: bool = False
    width: int = 64
    stem: Stem = "cifar"
    num_classes: int | None = None
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits `[B, num_classes]` or features `[B, F]`, float32, of images `[B, H, W, 3]`."""
        if self.stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem is {self.stem!r}, but must be 'cifar' or 'imagenet'")
        conv_fn, norm_fn = _layer_functions(self.dtype, train)
        x = images.astype(self.dtype)
        if self.stem == "cifar":
            x = conv_fn(self.width, 3, 1, name="stem_conv")(x)
        else:
            x = conv_fn(self.width, 7, 2, name="stem_conv")(x)
        x = nn.relu(norm_fn(name="stem_norm")(x))
        if self.stem == "imagenet":
            # After a ReLU, zeros around the image never win: the same as padding with -inf.
            x = layers.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)
        for stage, num_blocks in enumerate(self.num_blocks):
            for block in range(num_blocks):
                x = _Block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=self.bottleneck,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{block}",
                )(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, name="logits")(x)


class FaceResNet(nn.Module):
    """A face extractor: residual features, one linear layer, BatchNorm without a scale.

    The last two layers are those of Deng et al. 2019, "ArcFace", section 3.1 (without dropout, and
    behind a global mean).

    Attributes:
        backbone: with `num_classes=None`.
        embedding_size: D.
    """

    backbone: ResNet
    embedding_size: int = 512

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings `[B, D]`, float32, not normalized, of images `[B, H, W, 3]`."""
        features = self.backbone(images, train=train)
        embeddings = nn.Dense(self.embedding_size, use_bias=False, name="embedding")(features)
        last = norm.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            use_scale=False,
            name="embedding_norm",
        )
        return last(embeddings)


def resnet18(
    *,
    num_classes: int | None = None,
    stem: Stem = "cifar",
    width: int = 64,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> ResNet:
    """ResNet-18; see `ResNet`. With 10 classes and the CIFAR stem it has 11,173,962 parameters."""
    return ResNet(_NUM_BLOCKS[18], False, width, stem, num_classes, dtype)


def resnet50(
    *,
    num_classes: int | None = None,
    stem: Stem = "cifar",
    width: int = 64,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> ResNet:
    """ResNet-50; see `ResNet`. With 1,000 classes and the ImageNet stem: 25,557,032 parameters."""
    return ResNet(_NUM_BLOCKS[50], True, width, stem, num_classes, dtype)


class _Block(nn.Module):
    """A residual block; its shortcut is a 1 x 1 convolution where the shape changes."""

    channels: int
    stride: int
    bottleneck: bool
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv_fn, norm_fn = _layer_functions(self.dtype, train)
        if self.bottleneck:
            plan = (
                (self.channels, 1, 1),
                (self.channels, 3, self.stride),
                (self.channels * 4, 1, 1),
            )
        else:
            plan = ((self.channels, 3, self.stride), (self.channels, 3, 1))
        y = x
        for index, (channels, side, stride) in enumerate(plan):
            y = conv_fn(channels, side, stride, name=f"conv_{index}")(y)
            y = norm_fn(name=f"norm_{index}")(y)
            y = nn.relu(y) if index + 1 < len(plan) else y
        if x.shape != y.shape:
            x = conv_fn(y.shape[-1], 1, self.stride, name="shortcut_conv")(x)
            x = norm_fn(name="shortcut_norm")(x)
        return nn.relu(x + y)


def _layer_functions(
    dtype: jax.typing.DTypeLike, train: bool
) -> tuple[Callable[..., nn.Conv], Callable[..., norm.BatchNorm]]:
    """Constructors `(channels, side, stride, name) -> convolution` and `(name) -> BatchNorm`."""

    def conv_fn(channels: int, side: int, stride: int, *, name: str) -> nn.Conv:
        return nn.Conv(
            channels,
            (side, side),
            stride,
            padding=side // 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=_KERNEL_INIT,
            conv_general_dilated_cls=conv.Convolution,
            name=name,
        )

    norm_fn = functools.partial(
        norm.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype
    )
    return conv_fn, norm_fn

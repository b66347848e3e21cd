"""The registry of image classifiers that are trained from scratch, as sources and as victims."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.core import options
from afr_jax.models.classifiers import densenet, resnet, vgg
from afr_jax.models.extractors import inception_resnet

NAMES = ("resnet18", "resnet50", "vgg11", "densenet121", "inception_resnet_v1", "small_resnet")


@dataclasses.dataclass(frozen=True)
class ClassifierOptions:
    """Which classifier is trained from scratch, and in which precision."""

    architecture: str = options.option("resnet18", "the network", choices=NAMES)
    width: int | None = options.option(
        None, "channels of its first stage; default: as published", at_least=1
    )
    stem: resnet.Stem = options.option(
        "cifar", "its first layers: cifar for images of about 32 px, or imagenet"
    )
    bfloat16: bool = options.option(False, "compute in bfloat16; parameters stay float32")

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        options.check(self)

    def make(self, num_classes: int | None) -> nn.Module:
        """The network, with so many logits; None for its features, with the same parameters."""
        return classifier(
            self.architecture,
            num_classes=num_classes,
            width=self.width,
            stem=self.stem,
            dtype=jnp.bfloat16 if self.bfloat16 else jnp.float32,
        )


class FaceClassifier(nn.Module):
    """Inception-ResNet-v1 with a linear classifier behind its 512-d embedding.

    Attributes:
        num_classes: number of logits; None for the embedding.
        dtype: of the computation; parameters and outputs are float32.
    """

    num_classes: int | None = None
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits `[B, num_classes]` or embeddings `[B, 512]` of images `[B, H, W, 3]` in [0, 1]."""
        net = inception_resnet.InceptionResnetV1(dtype=self.dtype, name="backbone")
        # The public weights' input range, (x - 127.5) / 128 of 0..255.
        x = net(images * (255.0 / 128.0) - 127.5 / 128.0, train=train)
        return x if self.num_classes is None else nn.Dense(self.num_classes, name="logits")(x)


def classifier(
    name: str,
    *,
    num_classes: int | None,
    width: int | None = None,
    stem: resnet.Stem = "cifar",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> nn.Module:
    """A classifier of RGB images in [0, 1].

    Args:
        name: one of `NAMES`; "small_resnet" has one block in each of three stages.
        num_classes: number of logits; None for features.
        width: channels of the first stage (growth of DenseNet); None for the published one, and
            16 for small_resnet.
        stem: of ResNets and DenseNet: "cifar" for images of about 32 px, "imagenet" for larger
            ones, and for small ones where speed counts.
        dtype: of the computation.

    Raises:
        ValueError: there is no such classifier.
    """
    shared: dict[str, Any] = {"num_classes": num_classes, "dtype": dtype}
    width_given: dict[str, Any] = {} if width is None else {"width": width}
    if name == "small_resnet":
        return resnet.ResNet((1, 1, 1), False, width or 16, stem, num_classes, dtype)
    if name == "resnet18":
        return resnet.resnet18(stem=stem, **width_given, **shared)
    if name == "resnet50":
        return resnet.resnet50(stem=stem, **width_given, **shared)
    if name == "vgg11":
        return vgg.vgg11(**width_given, **shared)
    if name == "densenet121":
        growth: dict[str, Any] = {} if width is None else {"growth": width}
        return densenet.densenet121(stem=stem, **growth, **shared)
    if name == "inception_resnet_v1":
        return FaceClassifier(**shared)
    raise ValueError(f"no classifier {name!r}; there are: {', '.join(NAMES)}")

"""VGG-11 with BatchNorm in linen, as a classifier of small images.

Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
configuration A, with BatchNorm behind each convolution and one linear layer behind a global mean:
the form that is used on CIFAR. At 32 px the mean is over one position.

Images are `[B, H, W, 3]` float, at least 32 px, already in the range that the run uses. Parameters
and statistics are float32; `dtype` is that of the computation. BatchNorm as in `resnet.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import conv, layers, norm

# Channels of the convolutions, in multiples of the width; 0 is a 2 x 2 max pool.
_PLAN_11 = (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Vgg(nn.Module):
    """A plain stack of 3 x 3 convolutions.

    Attributes:
        plan: channels of the convolutions in multiples of `width`, 0 for a 2 x 2 max pool.
        width: 64 in the paper.
        num_classes: number of logits; None for features.
        dtype: of the computation; parameters, statistics and outputs are float32.
    """

    plan: tuple[int, ...] = _PLAN_11
    width: int = 64
    num_classes: int | None = None
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits `[B, num_classes]` or features `[B, F]`, float32, of images `[B, H, W, 3]`."""
        x = images.astype(self.dtype)
        for index, multiple in enumerate(self.plan):
            if not multiple:
                x = layers.max_pool(x, 2, 2)
                continue
            x = nn.Conv(
                self.width * multiple,
                (3, 3),
                padding=1,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_KERNEL_INIT,
                conv_general_dilated_cls=conv.Convolution,
                name=f"conv_{index}",
            )(x)
            x = norm.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                name=f"norm_{index}",
            )(x)
            x = nn.relu(x)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return x if self.num_classes is None else nn.Dense(self.num_classes, name="logits")(x)


def vgg11(
    *, num_classes: int | None = None, width: int = 64, dtype: jax.typing.DTypeLike = jnp.float32
) -> Vgg:
    """VGG-11; see `Vgg`. With 10 classes it has 9,228,362 parameters."""
    return Vgg(_PLAN_11, width, num_classes, dtype)

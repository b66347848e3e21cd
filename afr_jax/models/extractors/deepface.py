"""Facebook's DeepFace in Flax, and the reader of its Keras weights.

Taigman, Yang, Ranzato, Wolf: "DeepFace: Closing the Gap to Human-Level Performance in Face
Verification", CVPR 2014, as the `deepface` package defines it (weights by Swarup Ghosh, trained on
VGGFace2): two convolutions, three locally connected layers, whose kernels differ from place to
place, and one dense layer. `deepface` gives it BGR in [0, 1].
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp

from afr_jax.models import layers
from afr_jax.models.weights import conversion, formats

INPUT_SIZE = 152
EMBEDDING_SIZE = 4096


class DeepFace(nn.Module):
    """Chips `[B, 152, 152, 3]`, BGR in [0, 1], to embeddings `[B, 4096]`, not of unit length.

    Scopes bear the paper's names. The dropout of the original lies behind the embedding.
    """

    @nn.compact
    def __call__(self, chips: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings; `train` changes nothing, it is there as in the other networks."""
        del train
        x = nn.relu(nn.Conv(32, (11, 11), padding="VALID", name="C1")(chips))
        x = layers.max_pool(layers.pad_for_pool(x, 3, 2, 0.0), 3, 2)
        x = nn.relu(nn.Conv(16, (9, 9), padding="VALID", name="C3")(x))
        x = nn.relu(_LocallyConnected(16, 9, 1, name="L4")(x))
        x = nn.relu(_LocallyConnected(16, 7, 2, name="L5")(x))
        x = nn.relu(_LocallyConnected(16, 5, 1, name="L6")(x))
        return nn.relu(nn.Dense(EMBEDDING_SIZE, name="F7")(x.reshape(x.shape[0], -1)))


class _LocallyConnected(nn.Module):
    """A convolution without padding whose kernel is another one at every place."""

    features: int
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows, columns = ((n - self.kernel) // self.stride + 1 for n in x.shape[1:3])
        height, width = ((n - 1) * self.stride + 1 for n in (rows, columns))
        # Rows, then columns: far fewer operations than all taps of the window one by one.
        taps = [x[:, i : i + height : self.stride] for i in range(self.kernel)]
        x = jnp.stack(taps, axis=3)
        taps = [x[:, :, j : j + width : self.stride] for j in range(self.kernel)]
        patches = jnp.stack(taps, axis=4).reshape(x.shape[0], rows, columns, -1)
        shape = (rows, columns, patches.shape[-1], self.features)
        kernel = self.param("kernel", _initialize_local, shape)
        bias = self.param("bias", nn.initializers.zeros, (rows, columns, self.features))
        return jnp.einsum("bhwk,hwkf->bhwf", patches, kernel) + bias[None]


def _initialize_local(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """LeCun's normal, with the fan-in of one place."""
    return jax.random.normal(key, shape) * shape[2] ** -0.5


def read_weights(path: str | os.PathLike[str]) -> conversion.Variables:
    """Reads the variables of `DeepFace` from a Keras file.

    Args:
        path: `VGGFace2_DeepFace_weights_val-0.9034.h5`; the classifier F8 is left out.

    Returns:
        `{"params": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    kind, arrays = formats.read_arrays(path)
    if kind != "keras":
        raise ValueError(f"{path} is no Keras weight file, the only form of DeepFace that is read")

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry:
        layer, name = leaf[1:]
        # Keras numbers the places of a locally connected kernel row by row.
        is_local = layer.startswith("L") and name == "kernel"
        stored = (shape[0] * shape[1], *shape[2:]) if is_local else shape
        return conversion.Entry(f"{layer}/{name}", stored, lambda array: array.reshape(shape))

    return conversion.fill(
        path,
        conversion.shapes(DeepFace(), INPUT_SIZE),
        arrays,
        entry,
        ignore_fn=lambda name: name.startswith("F8/"),
    )
